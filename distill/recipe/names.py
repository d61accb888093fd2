"""Built-in names that a recipe may give and the parameters of each, known without importing what they stand for.

Each list repeats the keys of a table of functions, and each row of `PARAMS` the keyword-only parameters of a function,
so that an editor completes the names and a recipe is checked in milliseconds; one test holds them together.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
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
Optimizer = Literal["adamw", "adamw_8bit"]
BuiltInSource = Literal["stdlib-docstrings", "pydoc-topics", "stdlib-sources", "stdlib-names"]
TaskName = Literal[
    "classification", "causal_lm", "question_answering", "relation_extraction", "token_classification", "chat",
    "masked_lm", "embedding", "seq2seq", "speech_to_text",
]  # fmt: skip
Metric = Literal[
    "accuracy", "f1_macro", "agreement", "perplexity", "token_accuracy", "kl", "loss", "exact_match_answer",
    "f1_answer", "f1_relations", "f1_micro", "matthews", "ece", "mse", "rmse", "pearson", "spearman", "teacher_mse",
    "entity_f1", "entity_precision", "entity_recall", "bits_per_byte", "masked_perplexity", "masked_accuracy",
    "mrr_at_10", "ndcg_at_10", "recall_at_10", "cosine_to_teacher", "neighbours_kept",
    "rouge_l", "rouge_1", "rouge_2", "chrf", "exact_text", "wer", "cer",
]  # fmt: skip
LogitLoss = Literal[
    "forward_kl", "reverse_kl", "symmetric_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "total_variation",
    "soft_cross_entropy", "logit_mse", "adaptive_kl", "tail_aware_kl",
]  # fmt: skip
UNNORMALIZED: tuple[LogitLoss, ...] = ("logit_mse",)
"""Losses that compare logits themselves, which probabilities tell only up to a constant."""
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
    "optimizer": {name: {"eps": "float"} for name in ("adamw", "adamw_8bit")},
    "loss": {
        "jsd": {"beta": "float"},
        **{name: {"alpha": "float"} for name in ("skew_forward_kl", "skew_reverse_kl")},
        "adaptive_kl": {"head": "float"},
        "tail_aware_kl": {"k": "int", "beta": "float"},
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
    "question_answering": ("question", "context", "answers"),
    "relation_extraction": ("text", "head", "tail", "relation"),
    "token_classification": ("tokens", "tags", "text", "spans"),
    "chat": ("messages", "prompt", "completion", "tools"),
    "masked_lm": ("text",),
    "embedding": ("text", "pair", "score"),
    "seq2seq": ("source", "target"),
    "speech_to_text": ("audio", "text"),
}
"""Columns of each task."""
OPTIONAL_COLUMNS = ("pair", "score")
"""Columns that are read only where `data.columns` names them."""
OFFERED_COLUMNS = ("messages", "prompt", "completion", "tools")
"""Columns that are read where a file has them; the task judges whether a row has enough."""
FORMS: dict[TaskName, tuple[tuple[str, ...], ...]] = {"token_classification": (("tokens", "tags"), ("text", "spans"))}
"""Tasks whose rows may have several forms -> the columns of each; the first, unless `data.columns` names another's."""
LABELLED_TASKS: tuple[TaskName, ...] = (
    "classification", "question_answering", "relation_extraction", "token_classification",
)  # fmt: skip
"""Tasks that ask for something which a row may lack."""
SOURCE_COLUMNS: dict[BuiltInSource, tuple[str, ...]] = {
    "stdlib-docstrings": ("text", "label"),
    "pydoc-topics": ("text", "label"),
    "stdlib-sources": ("text", "label"),
    "stdlib-names": ("text", "pair"),
}
"""Columns of each built-in corpus."""
TASK_KEYS: dict[str, tuple[TaskName, ...]] = {
    "labelled": LABELLED_TASKS,
    "contradictions": (*LABELLED_TASKS, "seq2seq", "speech_to_text"),
    "classes": ("classification", "token_classification", "relation_extraction"),
    "stride": ("question_answering",),
    "none_class": ("relation_extraction",),
    "learn_from": ("chat",),
    "mask_share": ("masked_lm",),
    "prompts": ("embedding",),
    "max_target_length": ("seq2seq",),
    "prefix": ("seq2seq",),
    "language": ("speech_to_text",),
}
"""Key of `data` -> tasks for which it means something; other keys are for all."""
TASK_METRICS: dict[TaskName, tuple[Metric, ...]] = {
    "classification": (
        "accuracy", "f1_macro", "loss", "f1_micro", "matthews", "ece", "mse", "rmse", "pearson", "spearman",
    ),
    "causal_lm": ("perplexity", "token_accuracy", "loss", "bits_per_byte"),
    "question_answering": ("exact_match_answer", "f1_answer", "loss"),
    "relation_extraction": ("accuracy", "f1_macro", "f1_relations", "loss"),
    "token_classification": ("entity_f1", "entity_precision", "entity_recall", "token_accuracy", "loss"),
    "chat": ("perplexity", "token_accuracy", "loss"),
    "masked_lm": ("masked_perplexity", "masked_accuracy", "loss"),
    "embedding": ("mrr_at_10", "ndcg_at_10", "recall_at_10", "spearman"),
    "seq2seq": ("rouge_l", "chrf", "exact_text", "perplexity", "token_accuracy"),
    "speech_to_text": ("wer", "cer", "perplexity", "token_accuracy"),
}  # fmt: skip
"""Metrics of each task; the labels decide which of them its data have."""
OTHER_METRICS: dict[TaskName, tuple[Metric, ...]] = {
    "seq2seq": ("rouge_1", "rouge_2", "wer", "cer", "loss"),
    "speech_to_text": ("exact_text", "loss"),
}
"""Metrics that a task measures where the recipe asks for them."""
GENERATED_METRICS: tuple[Metric, ...] = ("rouge_l", "rouge_1", "rouge_2", "chrf", "exact_text", "wer", "cer")
"""Metrics of texts that a model writes, a forward pass per token: they are measured after training."""
NO_MAJORITY: tuple[TaskName, ...] = ("question_answering", "embedding", "seq2seq", "speech_to_text")
"""Tasks without a most frequent answer: theirs are places in a text, vectors, or texts."""
TWO_STACK_TASKS: tuple[TaskName, ...] = ("seq2seq", "speech_to_text")
"""Tasks whose models have an encoder and a decoder."""
SPEECH_FAMILIES = ("whisper",)
"""Families whose encoder reads sound."""
CAUSAL_TASKS: tuple[TaskName, ...] = ("causal_lm", "chat")
"""Tasks in which every token is predicted from those before it alone."""
VOCABULARY_TASKS: tuple[TaskName, ...] = (*CAUSAL_TASKS, *TWO_STACK_TASKS, "masked_lm")
"""Tasks whose predictions are tokens."""
PROMPTED_TASKS: tuple[TaskName, ...] = ("chat", "seq2seq")
"""Tasks whose rows tell a prompt from its answer, so that a student can write one of its own."""
TEACHER_METRICS: tuple[Metric, ...] = ("agreement", "kl", "teacher_mse", "cosine_to_teacher", "neighbours_kept")
"""Metrics that compare with the teacher, after training; a task has those that its kind of predictions allows."""
VECTOR_METRICS: tuple[Metric, ...] = ("cosine_to_teacher", "neighbours_kept")
"""Those of them that compare vectors; the others compare predictions."""
RETRIEVAL_METRICS: tuple[Metric, ...] = ("mrr_at_10", "ndcg_at_10", "recall_at_10")
"""Metrics of `embedding` that need a `pair`, the text that each text has to find; the others of the task need a `score`
beside it."""


def columns_read(task: str, roles: Iterable[str], named: Collection[str]) -> list[str]:
    """List the columns that a task reads, of those that it has, where `data.columns` names some of them."""
    forms = FORMS.get(task, ())  # type: ignore[call-overload]
    chosen = next((form for form in forms if {*form} & {*named}), next(iter(forms), None))
    optional = [role for role in OPTIONAL_COLUMNS if role not in named]
    return [role for role in roles if role not in optional and (chosen is None or role in chosen)]
