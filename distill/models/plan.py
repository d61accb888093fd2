"""The plan: the layers of the teacher, and the units of each axis in them, that the student keeps; as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from distill.errors import InputError
from distill.files import read_json
from distill.models.layout import AxisName, StackName


def even_pairs(student_layers: int, teacher_layers: int) -> list[tuple[int, int]]:
    """Divide the teacher into as many equal spans as the student has layers, and pair these with their ends."""
    ends = [(layer + 1) * teacher_layers // student_layers - 1 for layer in range(student_layers)]
    return [(layer, max(0, end)) for layer, end in enumerate(ends)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class KeptUnits(_Part):
    """The units of one axis that a layer keeps."""

    of: int = Field(ge=1, le=1_000_000)
    """Number of units of the teacher's layer."""
    units: list[int] | list[list[int]] | None = None
    """Their indices in the teacher, ascending; one list per expert where each has its own; null: all."""

    @property
    def count(self) -> int:
        """Number of kept units."""
        return len(self._lists[0])

    @property
    def _lists(self) -> list[Any]:
        if not self.units:
            return [range(self.of) if self.units is None else []]
        return self.units if isinstance(self.units[0], list) else [self.units]

    @model_validator(mode="after")
    def _check_units(self) -> KeptUnits:
        lists = [] if self.units is None else self._lists
        inside = all(units and units[0] >= 0 and units[-1] < self.of for units in lists)
        ascending = inside and all(one < other for units in lists for one, other in pairwise(units))
        if not ascending or len({*map(len, self._lists)}) > 1:
            raise ValueError(f"units must be ascending indices below {self.of}, equally many for each expert")
        return self


class LayerPlan(_Part):
    """The teacher layer that a student layer comes from, and the units of each axis that it keeps."""

    teacher_layer: int = Field(ge=0)
    """Index of the teacher layer."""
    kept: dict[AxisName, KeptUnits] = Field(min_length=1)
    """By axis; every axis of the layer is listed."""

    @property
    def width(self) -> int:
        """Width of its MLP."""
        return self.kept["mlp"].count

    @property
    def teacher_width(self) -> int:
        """Width of the teacher layer's MLP."""
        return self.kept["mlp"].of

    @property
    def neurons(self) -> list[int] | list[list[int]] | None:
        """Indices of the kept neurons; one list per expert where the MLP has experts; None: all."""
        return self.kept["mlp"].units


class Outcome(_Part):
    """A requested value and what the student actually has."""

    asked: str
    """As the recipe says it."""
    got: str
    """In the student."""
    reason: str = ""
    """Cause of the difference; empty when there is none."""


class GivenStudent(_Part):
    """A student that was not cut from the teacher."""

    model_type: str
    """Its own `config.model_type`."""
    hidden_size: int
    """Width of its hidden states."""
    teacher_hidden_size: int
    """That of the teacher's."""
    map: Literal["rule", "plan"]
    """Source of the pairs of layers: an even rule, or the plan of the run that cut it from this teacher."""


class StudentPlan(_Part):
    """Decided before anything is cut; `build_student` only carries it out."""

    format: Literal["distill.plan/2"] = "distill.plan/2"
    model_type: str
    """`config.model_type` of the teacher."""
    teacher_layers: int = Field(ge=1)
    """Layers of the teacher."""
    layers: list[LayerPlan] = Field(min_length=1)
    """The student's layers, first to last; of an encoder-decoder, those of the decoder."""
    teacher_encoder_layers: int | None = None
    """Layers of the teacher's encoder, for encoder-decoders."""
    encoder_layers: list[LayerPlan] | None = None
    """Layers of the student's encoder, for encoder-decoders."""
    layer_policy: str
    """Name of the layer policy."""
    mlp_score: str
    """Name of the neuron score."""
    mlp_allocation: str
    """Name of the allocation."""
    calibration: str | None = None
    """Fingerprint of the statistics that the decision was based on; null: none."""
    outcomes: dict[str, Outcome] = {}
    """Asked against got, by recipe key."""
    layer_scores: dict[str, list[float]] = {}
    """Figures per teacher layer that the decision was based on, e.g. block influence."""
    given: GivenStudent | None = None
    """A student that was there: `teacher_layer` is then the layer that each of its layers is compared with, and the
    numbers of units are its own. null: the student was cut."""

    @model_validator(mode="after")
    def _check_layers(self) -> StudentPlan:
        for layers, depth in ((self.layers, self.teacher_layers), (self.encoder_layers, self.teacher_encoder_layers)):
            numbers = [layer.teacher_layer for layer in layers or ()] + ([] if depth is None else [depth])
            if layers and not all(one < other for one, other in pairwise(numbers)):
                raise ValueError(f"layers must be ascending layers of the teacher, which has {depth}")
        return self

    def is_for(self, model_type: str, depths: Mapping[StackName, int]) -> bool:
        """Tell whether the plan was made for a teacher of this family with as many layers in each stack."""
        planned = {"main": self.teacher_layers, "encoder": self.teacher_encoder_layers}
        return self.model_type == model_type and all(planned[side] == depth for side, depth in depths.items())

    def stack(self, side: StackName) -> list[LayerPlan]:
        """The layers of one stack; empty when the model does not have it."""
        return self.layers if side == "main" else self.encoder_layers or []

    @property
    def kept_layers(self) -> list[int]:
        """Teacher indices of the kept layers, in order."""
        return [layer.teacher_layer for layer in self.layers]

    @property
    def widths(self) -> list[int]:
        """MLP width of each student layer."""
        return [layer.width for layer in self.layers]

    def to_json(self) -> str:
        """The plan as JSON text with a final newline."""
        left_out = {"given"} if self.given is None else set()
        return json.dumps(self.model_dump(mode="json", exclude=left_out), indent=1) + "\n"

    @classmethod
    def load(cls, path: Path) -> StudentPlan:
        """Read a plan. Raises InputError when the file is not one."""
        try:
            return cls.model_validate(read_json(path))
        except (OSError, ValueError) as error:
            said = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
            raise InputError(f"{path} is not a student plan: {said}") from error
