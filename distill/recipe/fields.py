"""What every section of a recipe is made of: strict numbers, and the base of all sections."""

from __future__ import annotations

from typing import Annotated, Any

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
Params = dict[StrictStr, StrictBool | StrictInt | float | StrictStr]


class Section(BaseModel):
    """Strict, frozen base of every section: an unknown key is an error and nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)
