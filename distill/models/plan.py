"""The plan: what of the teacher the student keeps. Pure data, written as JSON, released with the student."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from distill.errors import InputError
from distill.models.layout import StackName


class LayerPlan(BaseModel):
    """What one student layer is made of."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    teacher_layer: int = Field(ge=0)
    """Index of the teacher layer it comes from."""
    width: int = Field(ge=1)
    """Width of its MLP."""
    teacher_width: int = Field(ge=1)
    """Width of that layer's MLP in the teacher."""
    neurons: list[int] | list[list[int]] | None = None
    """Indices of the kept neurons, ascending; one list per expert where the MLP has experts; null: all."""


class Choice(BaseModel):
    """One thing that was asked for and what came of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    asked: str
    """As the recipe says it."""
    got: str
    """What the student has."""
    reason: str = ""
    """Why the two differ, empty when they do not."""


class StudentPlan(BaseModel):
    """Decided before anything is cut; `build_student` only carries it out."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["distill.plan/1"] = "distill.plan/1"
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
    """Fingerprint of the statistics that the decision saw; null: none."""
    choices: dict[str, Choice] = {}
    """Asked against got, by recipe key."""
    layer_scores: dict[str, list[float]] = {}
    """Per-teacher-layer figures that the decision saw, e.g. block influence."""

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

    @property
    def layer_map(self) -> list[tuple[int, int]]:
        """(student layer, teacher layer) pairs for hidden-state losses."""
        return [(student, layer.teacher_layer) for student, layer in enumerate(self.layers)]

    def to_json(self) -> str:
        """The plan as JSON text with a final newline."""
        return json.dumps(self.model_dump(mode="json"), indent=1) + "\n"

    @classmethod
    def load(cls, path: Path) -> StudentPlan:
        """Read a plan. Raises InputError when the file is not one."""
        try:
            data: Any = json.loads(path.read_text(encoding="utf-8"))
            return cls.model_validate(data)
        except (OSError, ValueError) as error:
            raise InputError(f"{path} is not a student plan: {error}") from error
