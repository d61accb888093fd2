"""The sections of a recipe beside `student` and `losses`, in the order of the work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool, StrictStr

from distill.recipe.cache import TeacherCache
from distill.recipe.controls import Controls
from distill.recipe.data import FILE, Sets, renamed, weights_without_effect
from distill.recipe.fields import Count, Fraction, Index, Mistake, NonNegative, NotASwitch, Params, Positive, Section
from distill.recipe.locate import is_path
from distill.recipe.names import Metric, Optimizer, Reference
from distill.recipe.on_policy import OnPolicy

Format = Literal["uniform", "native", "padded"]
Form = Literal["onnx", "int8", "ctranslate2", "gguf"]
SHA256 = "^[0-9a-f]{64}$"
Compile = Literal["auto"] | StrictBool
Arm = Literal[
    "teacher", "cut", "repaired", "distilled", "labels_only", "majority", "random_cut", "from_scratch"
]  # fmt: skip


ONLY_WITH = (("decay", "schedule", ("wsd",)), ("betas", "optimizer", ("adamw", "adamw_8bit")))
"""(key, the key that it depends on, the values of that key with which it means something)."""


class Lora(Section):
    """Adapters of low rank: weight + alpha / rank · B A, where only A [rank, in] and B [out, rank] learn (LoRA).

    They are merged into the weights at the end of the training.
    """

    rank: Count = 16
    """Rank of each adapter."""
    alpha: Positive = 32
    """Its factor is alpha / rank."""
    targets: Literal["all-linear"] | Annotated[list[StrictStr], Field(min_length=1)] = "all-linear"
    """Linear maps that are adapted: all of the layers, or those whose name, or its end, matches a shell pattern, e.g.
    `[q_proj, v_proj]`. A pattern that matches nothing is an error."""
    dropout: Annotated[float, Field(ge=0, lt=1), NotASwitch] = 0.0
    """Share of an adapter's inputs that are dropped in training."""
    also: list[StrictStr] = []
    """Parameters that learn as they are, by shell pattern over their names, e.g. `["classifier.*", "*norm*"]`."""

    def pattern_for(self, module: str) -> str | None:
        """Find the pattern of `targets` that a module's name, or the end of it, matches."""
        return next((own for own in self.targets if fnmatchcase(f".{module}", f"*.{own}")), None)


class Optimization(Section):
    """Length, speed and method of a training: `teacher.fit`, and the larger part of `training`."""

    epochs: Positive | None = None
    """Passes over the training examples. Give one of `epochs`, `steps` and `tokens`."""
    steps: Count | None = None
    """Optimizer steps."""
    tokens: Count | None = None
    """Training tokens, padding not counted; the step that reaches them is the last."""
    batch_size: Count = 32
    """Examples per optimizer step, over all ranks and micro-batches."""
    micro_batch_size: Count | None = None
    """Examples per forward pass; null: `batch_size` divided by the number of ranks. When it is given, ranks only
    deal these out, and any number of them computes the same, dropout included."""
    lr: Positive = 1e-4
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Shape of the learning rate after warmup; `wsd`: constant, then down to 0 in a straight line."""
    warmup: NonNegative = 0.1
    """Below 1: share of the steps; 1 or more: steps."""
    decay: NonNegative = 0.2
    """`wsd`: how long the way down is, counted as `warmup` is."""
    optimizer: Optimizer | Reference = "adamw"
    """A built-in optimizer or `package.module:function`, called with parameter groups and `lr`. `adamw_8bit`: moments
    of 8 bits, by bitsandbytes."""
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
    """Keep an average of the weights as well: after every step d · average + (1 - d) · weights, d = ema, but at most
    (1 + step) / (10 + step), so that the first weights are soon forgotten."""
    ema_release: StrictBool = False
    """Measure and hand on the average instead of the last weights."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast precision of the model being trained, wherever it is measured too; losses are always fp32."""
    head_precision: Literal["auto", "bf16", "tf32", "fp32"] = "auto"
    """Precision in which the output head of a language model takes its operands. Near the teacher `bf16` falsifies the
    gradient; `auto` on a GPU in bf16: the fastest that keeps the error below 2 % at the divergence of the last record,
    elsewhere that of `precision`, on a CPU fp32. `tf32` needs a GPU."""
    weights: Literal["fp32", "bf16"] = "fp32"
    """What the model and its gradients are held in during training. `bf16`: the optimizer keeps what is missing to
    fp32, so that small steps are not lost, and its moments in bf16: 10 bytes per parameter instead of 16."""
    lora: Lora | None = None
    """Train adapters instead of the weights; null: the weights."""
    freeze: list[StrictStr] = []
    """Parameters that do not learn, by shell pattern over their names, e.g. `["*.embeddings.*"]`; they get no optimizer
    state. A pattern that matches nothing is an error."""
    only: list[StrictStr] = ["*"]
    """The opposite view: parameters that learn, e.g. `["*.mlp.*"]`; `freeze` is then taken out of them."""
    gradient_checkpointing: StrictBool = False
    """Keep the inputs of layers only and compute the rest a second time: less memory, more time."""
    compile: Compile = "auto"
    """Compile the layers, also those of the teacher, with `torch.compile`, and pad rows to a few lengths. `auto`: on a
    GPU, unless a loss reads inside of layers."""
    loader_workers: Index = 0
    """Worker processes that prepare batches, for each rank; 0: the rank itself does it. The batches are the same."""
    save_every: Index = 50
    """Publish a checkpoint every so many steps; 0: only at the end."""

    def mistakes(self) -> Iterator[Mistake]:
        """Refuse two lengths or none, broken batches, and keys without effect."""
        yield from self.not_one_of("epochs", "steps", "tokens")
        if self.steps is not None and self.warmup > self.steps:
            message = f"a warmup of {self.warmup:g} steps is longer than the training of {self.steps}"
            yield Mistake(("warmup",), message, "give fewer steps, or a share below 1")
        batch, micro = self.batch_size, self.micro_batch_size
        if micro and batch % micro:
            fits = next(size for size in range(min(micro, batch), 0, -1) if batch % size == 0)
            message = f"batch_size {batch} is not a multiple of micro_batch_size {micro}"
            yield Mistake(("micro_batch_size",), message, f"for example {fits}")
        for key, other, values in ONLY_WITH:
            if getattr(self, other) not in values:
                fix = f"remove it; it is for {other}: {' or '.join(values)}"
                yield from self.without_effect((key,), f" with {other}: {getattr(self, other)}", fix)
        if self.ema_release and self.ema is None:
            message = "there is no average to hand on: ema is not given"
            yield Mistake(("ema_release",), message, "add ema: 0.999, or remove this", at="key")
        yield from self.wrong_params("optimizer", self.optimizer, "optimizer_params", {"lr": "lr"})
        yield from self._wrong_weights()

    def _wrong_weights(self) -> Iterator[Mistake]:
        """Refuse bf16 weights that lose small steps, or are computed with in fp32, and two choices of what learns."""
        if self.weights == "bf16" and self.precision != "bf16":
            message = f"bf16 weights are computed with in bf16, and precision is {self.precision}"
            yield Mistake(("weights",), message, "write precision: bf16")
        if self.weights == "bf16" and ":" in self.optimizer:
            message = f"{self.optimizer} keeps no fp32 masters, and bf16 weights alone lose small steps"
            yield Mistake(("weights",), message, "write optimizer: adamw or adamw_8bit")
        if self.lora is not None:
            fix = "remove it; lora.targets and lora.also say what learns"
            yield from self.without_effect(("freeze", "only"), " beside lora", fix)


class Teacher(Section):
    """The large model that teaches."""

    model: StrictStr
    """`package:NAME/SUBFOLDER` (inside an installed Python package), `./FOLDER` (relative to the recipe, or absolute),
    or a hub id `ORG/NAME`; in place of a folder also a `FILE.gguf`, whose quantised weights are dequantised once."""
    revision: StrictStr | None = None
    """Commit of a hub id."""
    sha256: Annotated[StrictStr, Field(pattern=SHA256)] | None = None
    """Refuse the weights unless they have this sha256; of several files, that of the lines that `sha256sum` prints."""
    init: Literal["pretrained", "random"] = "pretrained"
    """`random`: the folder holds a config and a tokenizer only; weights are drawn from `seed`. Needs `fit`."""
    dtype: Literal["stored", "fp32", "bf16", "fp16", "int8", "fp8"] = "stored"
    """Precision that the teacher computes in; `stored`: that of its weights as they were saved, where these are fp32
    that of `training.precision`. `int8` needs a GPU and bitsandbytes, `fp8` a GPU of compute capability 8.9 or more;
    stages that read its weights, or measure, take the stored ones then."""
    fp8_max_kl: Positive = 0.02
    """`fp8`: refuse it where it changes the teacher's predictions by more than so many nats, KL(stored || fp8) on
    training examples."""
    device: Literal["same", "cpu", "sharded"] = "same"
    """Memory that holds it: beside the student, main memory, or (under FSDP) sharded over the ranks while the student
    is trained and in main memory for stages that need the whole of it."""
    cache: TeacherCache | None = None
    """Run the teacher once over the training examples, and train from what it said, which lies on disk; null: it runs
    in every step. Evaluation and calibration have the teacher itself."""
    fit: Optimization | None = None
    """Fine-tune the teacher on this recipe's own labels first; needed where the task's head has no trained weights."""

    def mistakes(self) -> Iterator[Mistake]:
        """Refuse random weights that are never fitted, and keys that do not go together."""
        if self.init == "random" and self.fit is None:
            message = "a teacher with random weights has nothing to teach"
            yield Mistake(("init",), message, "add `fit: {epochs: …, lr: …}` under teacher:")
        if self.init == "random" and self.fit is not None and self.fit.lora is not None:
            message = "adapters cannot make a model of random weights"
            yield Mistake(("fit", "lora"), message, "remove it: all weights must learn", at="key")
        if self.init == "random":
            yield from self.without_effect(("sha256",), " with init: random, which reads no weights")
        if is_path(self.model) or self.model.startswith("package:"):
            fix = "remove it; `sha256` pins the weights of a folder"
            yield from self.without_effect(("revision",), ": only hub ids have revisions", fix)
        if self.dtype != "fp8":
            yield from self.without_effect(("fp8_max_kl",), f" with dtype: {self.dtype}")
        if self.dtype in ("int8", "fp8") and self.device != "same":
            message = f"{self.dtype} needs the GPU that the student is on, not device: {self.device}"
            yield Mistake(("dtype",), message, "write device: same, or another dtype")


class Training(Optimization):
    """Training of the student."""

    on_policy: OnPolicy | None = None
    """Learn from answers that the student itself writes as well, for chat and seq2seq; null: from those of the data."""
    evaluate_every: Index = 0
    """Measure the held-out split every so many steps; 0: only at the end."""
    log_every: Count = 10
    """Write a line to metrics.jsonl every so many steps."""
    keep_best: Metric | None = None
    """Keep the checkpoint with the best value of this metric in `checkpoints/best` as well; looked at every
    `evaluate_every` steps. Nothing else uses it."""
    trackers: list[Literal["tensorboard", "trackio", "wandb"]] = []
    """Trackers that get the records of metrics.jsonl as well, through Accelerate; each is an extra of the same name."""

    def mistakes(self) -> Iterator[Mistake]:
        """Refuse, beside the mistakes of every optimization, a best checkpoint that nothing looks for."""
        yield from super().mistakes()
        if self.keep_best is not None and self.evaluate_every == 0:
            message = "nothing is measured during training: evaluate_every is 0"
            yield Mistake(("keep_best",), message, "give evaluate_every as well", at="key")


class Harness(Section):
    """Tasks of lm-evaluation-harness (extra `harness`), which language models are measured on as well."""

    tasks: list[StrictStr] = []
    """Names of its tasks, or of those in `folder`; [] takes all of the folder."""
    folder: Annotated[StrictStr, Field(pattern=FILE)] | None = None
    """A folder with tasks as YAML files. Such a file may name Python code, which is run."""
    limit: Count | None = None
    """Use at most so many examples of each task, the first ones."""
    num_fewshot: Index | None = None
    """Examples before each question; null: as the task says."""
    batch_size: Count = 8
    """Requests per forward pass."""

    def mistakes(self) -> Iterator[Mistake]:
        """Refuse to run nothing, and tasks that are listed twice."""
        if not self.tasks and self.folder is None:
            yield Mistake((), "names no task", "add tasks: [NAME], or a folder", at="key")
        yield from self.repeated("tasks", "the task {}")


class Evaluation(Section):
    """Metrics, and the arms that they are measured on."""

    metrics: list[Metric | Reference] | None = None
    """Metrics over the predictions; null: the task's own."""
    arms: list[Arm] = ["teacher", "cut", "repaired", "distilled", "labels_only", "majority"]
    """`cut`: the student before repair and training; `repaired`: before training, where `student.repair` asks for
    anything; `labels_only`: the same student trained without teacher; `majority`: no model, the most frequent answer
    of the training labels; `random_cut`: a student of the same sizes with random layers and neurons, trained as
    `distilled`; `from_scratch`: the same student with random weights, trained as `distilled`. Beside `teacher`, the
    mixture of several is measured as well."""
    controls: Controls = Controls()
    """Learning rate and length of control arms, where they are not those of `training`."""
    seeds: Count = 1
    """Repeat all that is random after the teacher with so many seeds, `seed` and those after it; the released student
    is that of `seed`."""
    sets: Sets = {}
    """Name -> more rows that every arm is measured on, given as `data.source` is: what a student forgets shows on texts
    of other kinds than those of training. A set of which training rows are a part is marked."""
    harness: Harness | None = None
    """Tasks of lm-evaluation-harness for every arm of a language model; null: none."""
    batch_size: Count = 64
    """Examples per forward pass."""
    efficiency: StrictBool = True
    """Measure size, FLOPs, latency and throughput of teacher and student."""

    def with_sources(self, rename: Callable[[str], str]) -> Evaluation:
        """Return the section with other names for the sources of its sets, e.g. absolute paths."""
        changes: dict[str, Any] = {"sets": {name: renamed(each, rename) for name, each in self.sets.items()}}
        if self.harness is not None and self.harness.folder is not None:
            changes["harness"] = self.harness.model_copy(update={"folder": rename(self.harness.folder)})
        return self.model_copy(update=changes)

    def mistakes(self) -> Iterator[Mistake]:
        """Refuse what is listed twice, settings of what is not measured, and sets with weights."""
        yield from weights_without_effect({("sets", name): each for name, each in self.sets.items()})
        yield from self.repeated("arms", "{}")
        yield from self.repeated("metrics", "{}")
        for arm in self.controls.changed(*type(self.controls).model_fields):
            if arm not in self.arms:
                yield Mistake(
                    ("controls", arm), f"has no effect: {arm} is not in arms", "add it, or remove this", at="key"
                )
        if self.seeds > 1 and "distilled" not in self.arms:
            yield Mistake(("seeds",), "has no effect: distilled is not in arms", "add it, or remove this", at="key")


class Release(Section):
    """The folder that is handed out."""

    format: Format = "uniform"
    """`uniform`: one MLP width for all layers; stock transformers loads it everywhere. For students with different
    widths: `native` (widths in `per_layer_config` and a small modelling file; loads with `trust_remote_code=True` or
    `distill.load_student`) or `padded` (zero neurons up to the widest layer; loads everywhere, saves nothing)."""
    also: list[Form] = []
    """Other forms of the student in the same folder, each compared with it in its own runtime: `onnx` (ONNX Runtime,
    batch and length free), `int8` (the same with weights of 8 bits), `ctranslate2` (CTranslate2, which rounds to 8
    bits where it is asked to), which all hold different MLP widths; and `gguf` (llama.cpp, a file in fp32 and one of
    8 bits), which holds one width and pads to it with `format: padded`."""
    license: StrictStr | None = None
    """SPDX id for the model card: the teacher's licence, or one that it allows. None: that of the teacher's card, where
    one stands in its folder."""
    language: StrictStr | None = None
    """Language code for the model card."""

    def mistakes(self) -> Iterator[Mistake]:
        """Refuse a form that is listed twice, and one that cannot hold what the format is for."""
        yield from self.repeated("also", "{}")
        if "gguf" in self.also and self.format == "native":
            message = "gguf has one MLP width for all layers, and format: native is for different ones"
            yield Mistake(("also",), message, "write format: padded, or onnx or ctranslate2 in its place")
