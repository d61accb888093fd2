"""The vocabulary of a recipe, one model per section, in the order of the work. This file is the user manual.

Nothing here imports torch: a recipe can be checked on a login node. What a strategy (a score, a loss) accepts beyond
these keys is the keyword-only signature of its function and is given under `params`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, StrictInt, StrictStr


def _not_a_switch(value: Any) -> Any:
    """Pydantic reads `true` as the number 1."""
    if isinstance(value, bool):
        raise ValueError("a number is not true or false")
    return value


NotASwitch = BeforeValidator(_not_a_switch)
"""Comes after the limits, which would be missing from the JSON schema otherwise."""
Count = Annotated[StrictInt, Field(ge=1)]
Index = Annotated[StrictInt, Field(ge=0)]
Positive = Annotated[float, Field(gt=0), NotASwitch]
NonNegative = Annotated[float, Field(ge=0), NotASwitch]
Fraction = Annotated[float, Field(ge=0, le=1), NotASwitch]
Format = Literal["uniform", "native", "padded"]
Params = dict[StrictStr, StrictBool | StrictInt | float | StrictStr]
Arm = Literal["teacher", "cut", "repaired", "distilled", "labels_only"]


class Section(BaseModel):
    """Strict, frozen base of every section: an unknown key is an error and nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class Optimization(Section):
    """How long and how fast a model learns; shared by `training` and `teacher.fit`."""

    epochs: Positive | None = None
    """Passes over the training examples. Give one of `epochs`, `steps` and `tokens`."""
    steps: Count | None = None
    """Optimizer steps."""
    tokens: Count | None = None
    """Training tokens, padding not counted; the step that reaches them is the last."""
    batch_size: Count = 32
    """Examples per optimizer step, over all processes and micro-batches."""
    micro_batch_size: Count | None = None
    """Examples per forward pass; null: `batch_size` divided by the number of processes. When it is given, processes
    only deal these out, and any number of them computes the same, dropout included."""
    lr: Positive = 1e-4
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Shape of the learning rate after warmup; `wsd`: constant, then down to 0 in a straight line."""
    warmup: NonNegative = 0.1
    """Below 1: share of the steps; 1 or more: steps."""
    decay: NonNegative = 0.2
    """`wsd`: how long the way down is, counted as `warmup` is."""
    optimizer: StrictStr = "adamw"
    """A name from `distill.training.optimizers.OPTIMIZERS` or `package.module:function`, called with parameter groups
    and `lr`."""
    optimizer_params: Params = {}
    """Keyword arguments of the optimizer, e.g. `{eps: 1e-6}`."""
    weight_decay: NonNegative = 0.01
    """Decay of the parameter group with the matrices; the group of biases and norms has none."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """AdamW's moment decays."""
    max_grad_norm: Positive | None = 1.0
    """Clip the global gradient norm to this; null: never."""
    skip_spikes: Annotated[float, Field(gt=1), NotASwitch] | None = 30.0
    """Leave out a step whose gradient norm is more than so many times the median of the last 31; null: never. Steps
    with a loss or gradient that is not finite are always left out."""
    max_skipped: Count = 20
    """Stop the run when so many steps in a row had to be left out."""
    ema: Annotated[float, Field(gt=0, lt=1), NotASwitch] | None = None
    """Keep an average of the weights as well: after every step ema · average + (1 - ema) · weights."""
    ema_release: StrictBool = False
    """Measure and hand on the average instead of the last weights."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast precision of the model being trained; losses are always fp32."""
    freeze: list[StrictStr] = []
    """Parameters that do not learn, by shell pattern over their names, e.g. `["*.embeddings.*"]`; they get no optimizer
    state. A pattern that matches nothing is an error."""
    only: list[StrictStr] = ["*"]
    """The opposite view: parameters that learn, e.g. `["*.mlp.*"]`; `freeze` is then taken out of them."""
    gradient_checkpointing: StrictBool = False
    """Keep the inputs of layers only and compute the rest a second time: less memory, more time."""
    compile: StrictBool = False
    """Compile the layers with `torch.compile`."""
    loader_workers: Index = 0
    """Processes that prepare batches, for each training process; 0: the training process does it. The batches are the
    same."""
    save_every: Index = 50
    """Publish a checkpoint every so many steps; 0: only at the end."""


class Fit(Optimization):
    """Teacher correction: fine-tune the teacher on the recipe's own labels before anything else."""


class Teacher(Section):
    """The large model."""

    model: StrictStr
    """`package:NAME/SUBFOLDER` (inside an installed Python package), `./FOLDER` (relative to the recipe, or absolute),
    or a hub id `ORG/NAME`."""
    revision: StrictStr | None = None
    """Commit of a hub id."""
    sha256: Annotated[StrictStr, Field(pattern="^[0-9a-f]{64}$")] | None = None
    """Refuse the weights unless model.safetensors has this sha256."""
    init: Literal["pretrained", "random"] = "pretrained"
    """`random`: the folder holds a config and a tokenizer only; weights are drawn from `seed`. Needs `fit`."""
    dtype: Literal["stored", "fp32", "bf16", "fp16", "int8"] = "stored"
    """What the teacher computes in while the student is trained; `stored`: as its weights were saved. `int8` needs a
    GPU and bitsandbytes."""
    device: Literal["same", "cpu", "sharded"] = "same"
    """Where it is while the student is trained: beside the student, in main memory, or (under FSDP) spread over the
    processes."""
    fit: Fit | None = None
    """Fine-tune the teacher on this recipe's data first; needed where the task's head has no trained weights."""


Width = Count | Annotated[float, Field(gt=0, le=1), NotASwitch]
"""Neurons (integer) or a share of them (0 < share ≤ 1)."""


class Layers(Section):
    """Which layers of a stack the student keeps."""

    keep: Count | list[Index]
    """How many, or the indices themselves (0 is the first layer of the teacher)."""
    choose: StrictStr = "even"
    """Policy when `keep` is a number: a name from `distill.student.layers.CHOICES` or `package.module:function`."""
    params: Params = {}
    """Keyword arguments of the policy."""
    protect_first: Index = 0
    """So many layers at the start are kept whatever a policy says that reads data or chooses at random."""
    protect_last: Index = 0
    """The same at the end."""


class Mlp(Section):
    """Which neurons each kept layer's MLP keeps."""

    keep: Width | list[Width] = 1.0
    """Neurons per layer (integer) or the share of them (0 < share ≤ 1); or a list with one of these for each kept
    layer, those of an encoder before those of its decoder."""
    score: StrictStr = "activation"
    """How neurons are ranked: a name from `distill.student.importance.SCORES` or `package.module:function`."""
    allocate: StrictStr = "uniform"
    """How the budget is spread over layers: a name from `distill.student.allocate.ALLOCATIONS` or
    `package.module:function`."""
    allocate_params: Params = {}
    """Keyword arguments of the allocation."""
    multiple_of: Count = 64
    """Widths are rounded down to a multiple of this; asked and got are reported."""
    floor: Width | None = None
    """No layer gets fewer neurons than this, rounded up to `multiple_of`; null: one `multiple_of`."""
    protect: list[Index] = []
    """Layers of the teacher whose MLP keeps all its neurons; they are not part of the budget."""
    params: Params = {}
    """Keyword arguments of the score."""


class Mask(Section):
    """Weights of the student's MLPs that become exactly zero and stay so while the others learn."""

    per: Literal["weight", "neuron"] = "weight"
    """Single weights, or whole neurons: their rows and biases in the first projections and their column in the last."""
    sparsity: Annotated[float, Field(gt=0, lt=1), NotASwitch] | None = None
    """Share of each layer's MLP weights (neurons; of each expert's, where there are experts) that becomes zero, rounded
    down to whole ones. Give `sparsity` or `threshold`."""
    threshold: Positive | None = None
    """Zero is what scores below so many times its layer's mean score, zeros included."""
    score: StrictStr = "magnitude"
    """How single weights are ranked: a name from `distill.student.masks.SCORES` or `package.module:function`. A neuron
    has the 2-norm of the scores of its weights."""
    params: Params = {}
    """Keyword arguments of the score."""
    only: list[StrictStr] = ["*"]
    """Which weights may be chosen, by shell pattern over parameter names of the student, e.g. `["*.down_proj.*"]`.
    Parameters that `training` keeps frozen are never chosen."""
    schedule: Literal["one_shot", "cubic"] = "one_shot"
    """`one_shot`: all at `begin`. `cubic`: from 0 at `begin` to all at `end`, fast at first: 1 - (1 - t)³."""
    begin: Fraction = 0.0
    """Share of the training steps after which the masks begin; 0: before the first step."""
    end: Fraction = 0.75
    """`cubic`: share of the steps after which nothing more is masked; the rest is for healing."""
    every: Count = 10
    """`cubic`: steps between choices."""
    compact: StrictBool | Literal["uniform"] = False
    """After training, take out neurons that have no effect any more. true: each layer its own, so that widths may
    differ; `uniform`: the same number in every layer. Widths are multiples of `mlp.multiple_of`."""


class Calibration(Section):
    """The one pass over data that all scores read."""

    examples: Count = 512
    """How many training examples, taken in the order of the data source."""
    batch_size: Count = 32
    """Examples per forward pass; does not change the statistics."""
    gradients: StrictBool | None = None
    """Collect what `taylor`, `taylor_kl` and `fisher` read: one or two backward passes per example. null: when the
    recipe's score asks for it."""
    gram: StrictBool | None = None
    """Collect what `output_change` reads: the square of each MLP's width in numbers. null: when the score asks."""


class Target(Section):
    """A size that the student must have, in place of `mlp.keep`. Give one of the first three."""

    parameters: Count | Annotated[float, Field(gt=0, le=1), NotASwitch] | None = None
    """At most so many parameters (integer), or this share of the teacher's."""
    flops: Annotated[float, Field(gt=0, le=1), NotASwitch] | None = None
    """At most this share of the FLOPs of the teacher's forward pass."""
    latency: Annotated[float, Field(gt=0, le=1), NotASwitch] | None = None
    """At most this share of the teacher's time for one example, measured in turns on this machine."""
    length: Count = 128
    """Tokens of the example at which FLOPs and latency are taken."""

    @property
    def kind(self) -> Literal["parameters", "flops", "latency"]:
        """Which of the three is given."""
        return "parameters" if self.parameters is not None else "flops" if self.flops is not None else "latency"


class Repair(Section):
    """Corrections of the cut student in closed form over the calibration sample, before it is trained; all are off.

    Each is measured on training examples that are not in the sample.
    """

    bias: StrictBool = False
    """Add to the MLP's output bias what the removed neurons gave on average; for families with such a bias."""
    refit: StrictBool = False
    """Refit the MLP's output weights of the kept neurons (and the output bias, where there is one) to what all of the
    teacher's neurons gave."""
    merge: StrictBool = False
    """Fit a linear map that makes the MLP before a block of dropped layers stand for the block, too, and multiply it
    into that MLP's output weights; for families whose MLP output is added to the stream as it is."""
    ridge: NonNegative = 1e-3
    """Pulls `refit` and `merge` towards no change; relative to the mean square of what they fit with."""
    held_out: Count = 256
    """How many training examples after the calibration sample measure what each step is worth."""

    @property
    def wanted(self) -> bool:
        """Whether there is anything to do."""
        return self.bias or self.refit or self.merge


class Student(Section):
    """How the student is cut from the teacher."""

    layers: Layers
    """Depth; of an encoder-decoder, that of the decoder."""
    encoder_layers: Layers | None = None
    """Depth of the encoder of an encoder-decoder; null: all of its layers."""
    mlp: Mlp = Mlp()
    """Width of the MLPs."""
    mask: Mask | None = None
    """Zeros in the MLPs that are kept through training; null: none."""
    target: Target | None = None
    """A size to cut to; `mlp.keep` follows from it."""
    calibration: Calibration = Calibration()
    """Sample that the scores and the repair see."""
    repair: Repair = Repair()
    """Corrections after the cut, before training."""


class Data(Section):
    """Texts, labels and how they become batches."""

    source: StrictStr
    """A built-in corpus from `distill.data.sources.SOURCES`, or `./FILE.jsonl`, `.csv`, `.parquet`, `.txt`."""
    task: StrictStr
    """What the model predicts: a name from `distill.data.tasks.TASKS`."""
    text: StrictStr = "text"
    """Column with the text, for files."""
    label: StrictStr = "label"
    """Column with the label, for files; an empty or null label means unlabelled."""
    labelled: Count | None = None
    """Keep the labels of only so many training examples (chosen by `seed`); the rest become unlabelled text that the
    teacher labels. null: keep all."""
    max_length: Count = 128
    """Tokens per example; longer texts are cut (classification) or packed in blocks of this length (causal LM)."""
    test_share: Annotated[float, Field(gt=0, lt=1), NotASwitch] = 0.2
    """Share of examples held out, by a hash of their text."""
    limit: Count | None = None
    """Use at most this many examples, for trials."""


class Schedule(Section):
    """Where the numbers of a term go in the course of training, from those of the term itself to those given here."""

    weight: NonNegative | None = None
    """The weight at the end, e.g. 0 for a term that only helps at the start."""
    temperature: Positive | None = None
    """The temperature at the end."""
    params: Params = {}
    """Numeric parameters of the loss at the end, e.g. `{beta: 0.9}`; the term gives their first value."""
    start: Fraction = 0.0
    """Share of the steps before which nothing changes."""
    end: Fraction = 1.0
    """Share of the steps after which nothing changes any more."""
    shape: Literal["linear", "cosine"] = "linear"
    """The way from the first value to the last."""


class Term(Section):
    """One term of the training loss."""

    match: Literal["labels", "logits", "hidden", "embeddings", "attention", "relations", "output"]
    """What the student must match: true labels, or of the teacher: its logits, its hidden states after the mapped
    layers or before the first one (`embeddings`), the attention probabilities or the relations within queries, keys and
    values of mapped layers, or its sentence embedding (`output`)."""
    weight: NonNegative = 1.0
    """Factor of this term's mean."""
    loss: StrictStr | None = None
    """`logits`: a name from `distill.losses.LOGITS` (default forward_kl); `hidden`, `embeddings` and `output`: from
    `HIDDEN` (default mse); `attention`: from `ATTENTION` (default kl); `relations`: from `RELATION` (default qkv); or
    `package.module:function`."""
    temperature: Positive = 1.0
    """Softens student and teacher logits."""
    scale_by_temperature: StrictBool = True
    """Multiply by temperature², so that gradients keep their size (Hinton et al. 2015)."""
    map: Literal["plan", "span", "even", "last"] | list[tuple[Index, Index]] = "plan"
    """Which layers are compared: `plan` (each kept layer with the teacher layer it came from), `span` (each kept layer
    with the last teacher layer before the next kept one), `even` (spread over the teacher), `last`, or [student,
    teacher] pairs."""
    params: Params = {}
    """Keyword arguments of the loss, e.g. `{beta: 0.5}` for `jsd`."""
    schedule: Schedule | None = None
    """How weight, temperature and parameters change in the course of training; null: they do not."""


class Training(Optimization):
    """How the student learns."""

    evaluate_every: Index = 0
    """Measure the held-out split every so many steps; 0: only at the end."""
    log_every: Count = 10
    """Write a line to metrics.jsonl every so many steps."""
    keep_best: StrictStr | None = None
    """Keep the checkpoint with the best value of this metric in `checkpoints/best` as well; looked at every
    `evaluate_every` steps. Nothing else uses it."""
    trackers: list[Literal["tensorboard", "trackio", "wandb"]] = []
    """Where the records of metrics.jsonl go as well, through Accelerate; each is an extra of the same name."""


class Evaluation(Section):
    """What is measured, on which arms."""

    metrics: list[StrictStr] | None = None
    """Names from `distill.evaluation.metrics.METRICS`; null: the task's own."""
    arms: list[Arm] = ["teacher", "cut", "repaired", "distilled", "labels_only"]
    """`cut`: the student before repair and training; `repaired`: before training, where `student.repair` asks for
    anything; `labels_only`: the same student trained as long without teacher."""
    batch_size: Count = 64
    """Examples per forward pass."""
    efficiency: StrictBool = True
    """Measure size, FLOPs, latency and throughput of teacher and student."""


class Release(Section):
    """The folder that is handed out."""

    format: Format = "uniform"
    """`uniform`: one MLP width for all layers; stock transformers loads it everywhere. For students with different
    widths: `native` (widths in `per_layer_config` and a small modelling file; loads with `trust_remote_code=True` or
    `distill.load_student`) or `padded` (zero neurons up to the widest layer; loads everywhere, saves nothing)."""
    license: StrictStr | None = None
    """SPDX id for the model card. Give the teacher's licence, or one that it allows."""
    language: StrictStr | None = None
    """Language code for the model card."""


class Recipe(Section):
    """Everything about one run. Sections have the names of the packages that do their work."""

    name: Annotated[StrictStr, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Names the run folder `runs/<name>`."""
    seed: Index = 0
    """Every random choice follows from this number."""
    teacher: Teacher
    student: Student
    data: Data
    losses: Annotated[list[Term], Field(min_length=1)]
    training: Training
    evaluation: Evaluation = Evaluation()
    release: Release = Release()


def json_schema() -> dict[str, Any]:
    """JSON schema of a recipe, for editors (`distill schema > recipe.schema.json`)."""
    return Recipe.model_json_schema()
