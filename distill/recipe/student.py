"""The `student` section of a recipe: the cut from the teacher and its repair, or a model to start from."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, StrictBool, StrictStr

from distill.recipe.fields import Count, Fraction, Index, Mistake, NonNegative, NotASwitch, Params, Positive, Section
from distill.recipe.locate import is_path
from distill.recipe.names import PROTECTING, Allocation, LayerPolicy, MaskScore, Reference, Score
from distill.recipe.sections import SHA256, Teacher

Width = Count | Annotated[float, Field(gt=0, le=1), NotASwitch]
"""Neurons (integer) or a share of them (0 < share ≤ 1)."""


class Layers(Section):
    """Layers of a stack that the student keeps."""

    keep: Count | list[Index]
    """Number of layers, or the indices themselves (0 is the first layer of the teacher)."""
    choose: LayerPolicy | Reference = "even"
    """Policy when `keep` is a number: a built-in one or `package.module:function`."""
    params: Params = {}
    """Keyword arguments of the policy."""
    protect_first: Index = 0
    """So many layers at the start are kept whatever a policy says that reads data or chooses at random."""
    protect_last: Index = 0
    """The same at the end."""

    @property
    def protected(self) -> int:
        """Number of layers that are kept whatever the policy says."""
        return self.protect_first + self.protect_last

    def mistakes(self) -> Iterator[Mistake]:
        """Refuse lists of layers that are not lists of layers, and keys that the policy does not read."""
        if not isinstance(self.keep, int):
            keys = ("choose", "params", "protect_first", "protect_last")
            fix = "remove it, or give `keep` as a number"
            yield from self.without_effect(keys, ": `keep` names the layers", fix)
            if not self.keep:
                yield Mistake(("keep",), "the list names no layer", "name at least one")
            yield from self.repeated("keep", "layer {}")
            for position, (before, layer) in enumerate(pairwise(self.keep), start=1):
                if layer < before and layer not in self.keep[:position]:
                    message = f"layer {layer} comes after layer {before}, not in ascending order"
                    yield Mistake(("keep", position), message, f"write {sorted(set(self.keep))}")
            return
        given = self.changed("protect_first", "protect_last")
        if given and self.choose not in PROTECTING and ":" not in self.choose:
            fix = f"remove it; it is for {', '.join(PROTECTING)}"
            yield from self.without_effect((given[0],), f" with choose: {self.choose}", fix)
        elif given and self.protected > self.keep:
            message = f"{self.protected} layers are protected, and only {self.keep} are kept"
            yield Mistake((given[0],), message, "protect fewer, or keep more")
        yield from self.wrong_params("layer policy", self.choose, reserved={"protected": "protect_first"})


class Mlp(Section):
    """Neurons that each kept layer's MLP keeps."""

    keep: Width | list[Width] = 1.0
    """Neurons per layer (integer) or the share of them (0 < share ≤ 1); or a list with one of these for each kept
    layer, those of an encoder before those of its decoder."""
    score: Score | Reference = "activation"
    """Ranking of the neurons: a built-in score or `package.module:function`."""
    allocate: Allocation | Reference = "uniform"
    """Split of the budget over layers: a built-in allocation or `package.module:function`."""
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

    def mistakes(self) -> Iterator[Mistake]:
        """Refuse keys that contradict `keep`, and an allocation by threshold without its one rule."""
        if isinstance(self.keep, list):
            keys, fix = ("allocate", "allocate_params", "protect"), "remove it, or give `keep` as one number"
            yield from self.without_effect(keys, ": `keep` lists a width for each layer", fix)
        yield from self.repeated("protect", "layer {}")
        if self.allocate == "threshold":
            if sum(self.allocate_params.get(key) is not None for key in ("threshold", "mass")) != 1:
                message = "allocate: threshold needs `threshold` or `mass`, one of them"
                yield Mistake(("allocate_params",), message, "for example allocate_params: {mass: 0.9}", at="key")
            yield from self.without_effect(("keep",), ": the threshold says how many neurons are kept")
        yield from self.wrong_params("score", self.score)
        yield from self.wrong_params("allocation", self.allocate, "allocate_params")


class Mask(Section):
    """Weights of the student's MLPs that become exactly zero and stay so while the others learn."""

    per: Literal["weight", "neuron"] = "weight"
    """Single weights, or whole neurons: their rows and biases in the first projections and their column in the last."""
    sparsity: Annotated[float, Field(gt=0, lt=1), NotASwitch] | None = None
    """Share of each layer's MLP weights (neurons; of each expert's, where there are experts) that becomes zero, rounded
    down to whole ones. Give `sparsity` or `threshold`."""
    threshold: Positive | None = None
    """Zero whatever scores below so many times its layer's mean score, zeros included."""
    score: MaskScore | Reference = "magnitude"
    """Ranking of single weights: a built-in score or `package.module:function`. A neuron has the 2-norm of the
    scores of its weights."""
    params: Params = {}
    """Keyword arguments of the score."""
    only: list[StrictStr] = ["*"]
    """Weights that may be chosen, by shell pattern over parameter names of the student, e.g. `["*.down_proj.*"]`.
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

    def mistakes(self) -> Iterator[Mistake]:
        """Refuse two amounts or none, and keys that the schedule or the score gives no meaning."""
        yield from self.not_one_of("sparsity", "threshold")
        if self.threshold is not None and self.score == "random":
            message = "has no meaning with score: random, whose scores have no size"
            yield Mistake(("threshold",), message, "give sparsity", at="key")
        if self.schedule == "one_shot":
            fix = "remove it, or write schedule: cubic"
            yield from self.without_effect(("end", "every"), " with schedule: one_shot", fix)
        elif self.begin >= self.end:
            message = f"begins at {self.begin:g} of the steps, the end is at {self.end:g}"
            yield Mistake(("begin",), message, "begin before the end")
        yield from self.wrong_params("mask score", self.score)


class Calibration(Section):
    """The one pass over data that all scores read."""

    examples: Count = 512
    """Number of training examples, taken in the order of the data source."""
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
        """The one of the three that is given."""
        return "parameters" if self.parameters is not None else "flops" if self.flops is not None else "latency"

    def mistakes(self) -> Iterator[Mistake]:
        """Refuse two sizes or none, and a length that plays no part."""
        yield from self.not_one_of("parameters", "flops", "latency")
        if self.parameters is not None:
            yield from self.without_effect(("length",), " on parameters")


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
    """Number of training examples after the calibration sample measure what each step is worth."""

    @property
    def wanted(self) -> bool:
        """True when any step is asked for."""
        return self.bias or self.refit or self.merge

    def mistakes(self) -> Iterator[Mistake]:
        """Refuse settings of steps that are not taken."""
        for key, steps in (("ridge", ("refit", "merge")), ("held_out", ("bias", "refit", "merge"))):
            if not self.changed(*steps):
                fix = f"remove it, or set {' or '.join(steps)} to true"
                yield from self.without_effect((key,), ": no step is asked for that uses it", fix)


class Student(Section):
    """The student: cut from the teacher, or given."""

    layers: Layers | None = None
    """Depth; of an encoder-decoder, that of the decoder. Give `layers` or `from`."""
    from_: Annotated[StrictStr | None, Field(alias="from")] = None
    """Instead of a cut: a model that is there, named as `teacher.model` is, with the teacher's tokenizer. It may be of
    another family and width, or a release of an earlier run."""
    revision: StrictStr | None = None
    """`from`: commit of a hub id."""
    sha256: Annotated[StrictStr, Field(pattern=SHA256)] | None = None
    """`from`: refuse other weights, as `teacher.sha256` does."""
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

    @property
    def depth(self) -> Layers:
        """The layers that a cut keeps."""
        assert self.layers is not None, "nothing is cut of a student that is given"
        return self.layers

    @property
    def given(self) -> Teacher | None:
        """The model that `from` names; None where the student is cut."""
        own = {"model": self.from_, "revision": self.revision, "sha256": self.sha256}
        return None if self.from_ is None else Teacher.model_validate(own)

    def mistakes(self) -> Iterator[Mistake]:
        """Refuse a student from nowhere, and keys about a cut beside one that is given."""
        if self.from_ is None:
            yield from self.without_effect(("revision", "sha256"), ": they are about the model of `from`")
            if self.layers is None:
                fix = "add layers: {keep: …} to cut the teacher, or from: ./FOLDER"
                yield Mistake(("layers",), "missing, and from is not given either", fix, at="key")
            return
        if is_path(self.from_) or self.from_.startswith("package:"):
            fix = "remove it; `sha256` pins the weights of a folder"
            yield from self.without_effect(("revision",), ": only hub ids have revisions", fix)
        why, fix = ": `from` names a student, and nothing is cut", "remove it, or `from`"
        cutting = ("layers", "encoder_layers", "target", "calibration", "repair")
        yield from self.without_effect(cutting, why, fix)
        used = ("multiple_of",) if self.mask and self.mask.compact else ()
        for key in self.mlp.changed(*(name for name in Mlp.model_fields if name not in used)):
            yield Mistake(("mlp", key), f"has no effect{why}", fix, at="key")
