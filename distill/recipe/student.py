"""The `student` section of a recipe: what is kept of the teacher, and what is done to it before training."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StrictBool, StrictStr

from distill.recipe.fields import Count, Fraction, Index, NonNegative, NotASwitch, Params, Positive, Section

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
    """How neurons are ranked: a name from `distill.student.scores.SCORES` or `package.module:function`."""
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
    """How single weights are ranked: a name from `distill.student.masks.masks.SCORES` or `package.module:function`.
    A neuron has the 2-norm of the scores of its weights."""
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
