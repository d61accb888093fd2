"""Built-in names that a recipe may give and the parameters of each, known without importing what they stand for.

Each list repeats the keys of a table of functions, and each row of `PARAMS` the keyword-only parameters of a function,
so that an editor completes the names and a recipe is checked in milliseconds; one test holds them together.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StrictStr, TypeAdapter, WithJsonSchema

from distill.registry import REFERENCE

Reference = Annotated[StrictStr, Field(pattern=f"^{REFERENCE}$")]
"""A function of the user's own: `package.module:function`."""
LayerPolicy = Literal[
    "even", "even_rounded", "every", "first", "last", "random", "block_influence", "angular", "loss_drop", "greedy_loss"
]
Score = Literal[
    "activation", "activation_l2", "output_norm", "wanda", "magnitude", "taylor", "taylor_kl", "fisher", "fluctuation",
    "output_change", "random",
]  # fmt: skip
MaskScore = Literal["magnitude", "random"]
Allocation = Literal["uniform", "threshold", "global", "sensitivity"]
Optimizer = Literal["adamw"]
BuiltInSource = Literal["stdlib-docstrings", "pydoc-topics", "stdlib-sources"]
TaskName = Literal["classification", "causal_lm", "seq2seq", "speech_to_text"]
Metric = Literal[
    "accuracy", "f1_macro", "agreement", "perplexity", "token_accuracy", "kl", "loss",
    "rouge_l", "rouge_1", "rouge_2", "chrf", "exact_text", "wer", "cer",
]  # fmt: skip
LogitLoss = Literal[
    "forward_kl", "reverse_kl", "symmetric_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "total_variation",
    "soft_cross_entropy", "logit_mse", "adaptive_kl",
]  # fmt: skip
HiddenLoss = Literal["mse", "cosine", "normalized_mse", "relative_mse"]
AttentionLoss = Literal["kl", "mse"]
RelationLoss = Literal["qkv", "values"]
AnyLoss = Annotated[
    StrictStr,
    WithJsonSchema(TypeAdapter(LogitLoss | HiddenLoss | AttentionLoss | RelationLoss | Reference).json_schema()),
]
"""A loss; which ones there are depends on what a term matches, see `TERM_KEYS`."""

PARAMS: dict[str, dict[str, dict[str, str]]] = {
    "layer policy": {"random": {"seed": "int"}},
    "score": {"magnitude": {"norm": "int"}, "random": {"seed": "int"}},
    "mask score": {"random": {"seed": "int"}},
    "allocation": {
        "threshold": {"threshold": "float | None", "mass": "float | None"},
        "sensitivity": {"strength": "float"},
    },
    "optimizer": {"adamw": {"eps": "float"}},
    "loss": {
        "jsd": {"beta": "float"},
        **{name: {"alpha": "float"} for name in ("skew_forward_kl", "skew_reverse_kl")},
        "adaptive_kl": {"head": "float"},
        **{name: {"heads": "int"} for name in ("qkv", "values")},
    },
}
"""Kind of strategy -> name -> parameter -> type; a name that is not here has no parameters."""
PROTECTING: tuple[LayerPolicy, ...] = ("random", "block_influence", "angular", "loss_drop", "greedy_loss")
"""Layer policies that know protected layers."""
READS: dict[Score, str] = {
    **dict.fromkeys(("taylor", "taylor_kl", "fisher"), "gradients"),
    "output_change": "gram",
}
"""Scores that read what `student.calibration` can switch off -> the key that does so."""
TASK_COLUMNS: dict[TaskName, tuple[str, ...]] = {
    "classification": ("text", "label", "pair"),
    "causal_lm": ("text",),
    "seq2seq": ("source", "target"),
    "speech_to_text": ("audio", "text"),
}
"""Columns of each task."""
OPTIONAL_COLUMNS = ("pair",)
"""Columns that are read only where `data.columns` names them."""
TASK_KEYS: dict[str, tuple[TaskName, ...]] = {
    "labelled": ("classification",),
    "contradictions": ("classification", "seq2seq", "speech_to_text"),
    "max_target_length": ("seq2seq",),
    "prefix": ("seq2seq",),
    "language": ("speech_to_text",),
}
"""Key of `data` -> tasks for which it means something; other keys are for all."""
TASK_METRICS: dict[TaskName, tuple[Metric, ...]] = {
    "classification": ("accuracy", "f1_macro", "loss"),
    "causal_lm": ("perplexity", "token_accuracy", "loss"),
    "seq2seq": ("rouge_l", "chrf", "exact_text", "perplexity", "token_accuracy"),
    "speech_to_text": ("wer", "cer", "perplexity", "token_accuracy"),
}
"""Metrics that each task measures by itself, in training too, except those of `GENERATED_METRICS`."""
OTHER_METRICS: dict[TaskName, tuple[Metric, ...]] = {
    "seq2seq": ("rouge_1", "rouge_2", "wer", "cer", "loss"),
    "speech_to_text": ("exact_text", "loss"),
}
"""Metrics that a task measures where the recipe asks for them."""
GENERATED_METRICS: tuple[Metric, ...] = ("rouge_l", "rouge_1", "rouge_2", "chrf", "exact_text", "wer", "cer")
"""Metrics of texts that a model writes, a forward pass per token: they are measured after training."""
TWO_STACK_TASKS: tuple[TaskName, ...] = ("seq2seq", "speech_to_text")
"""Tasks whose models have an encoder and a decoder."""
SPEECH_FAMILIES = ("whisper",)
"""Families whose encoder reads sound."""
CAUSAL_TASKS: tuple[TaskName, ...] = ("causal_lm",)
"""Tasks in which every token is predicted from those before it alone."""
TEACHER_METRICS: tuple[Metric, ...] = ("agreement", "kl")
"""Metrics that compare with the teacher; every task has them, after training."""
