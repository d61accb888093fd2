"""Building blocks of every section: strict numbers, and a base class that holds the section's own rules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, StrictInt, StrictStr, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from distill.recipe.names import PARAMS
from distill.registry import type_mismatch, unknown_param

KeyPath = tuple[str | int, ...]
"""Path of keys and positions in the data: `("losses", 0, "weight")`."""


def _not_a_switch(value: Any) -> Any:
    """Refuse true and false, which pydantic reads as the numbers 1 and 0."""
    if isinstance(value, bool):
        raise PydanticCustomError("float_type", "Input should be a valid number")
    return value


NotASwitch = BeforeValidator(_not_a_switch)
"""Comes after the limits, which would be missing from the JSON schema otherwise."""
Count = Annotated[StrictInt, Field(ge=1)]
Index = Annotated[StrictInt, Field(ge=0)]
Positive = Annotated[float, Field(gt=0), NotASwitch]
NonNegative = Annotated[float, Field(ge=0), NotASwitch]
Fraction = Annotated[float, Field(ge=0, le=1), NotASwitch]
Columns = dict[StrictStr, StrictStr]
Params = dict[StrictStr, StrictBool | StrictInt | float | StrictStr]


class Location(NamedTuple):
    """Place of a key or a value; locations sort in reading order, overrides after the file."""

    order: tuple[int, int, int]
    text: str
    """`file:line:column`, or `override 'key=value'`."""


@dataclass(frozen=True)
class Mistake:
    """Something wrong at a key, not yet tied to a line."""

    path: KeyPath
    """From the section whose rule it breaks, or from the top of the recipe."""
    message: str
    fix: str = ""
    at: Literal["key", "value"] = "value"
    """Point to the key itself (it is unknown, it lacks something) or to its value."""
    location: Location | None = None
    """Known beforehand, for what is not in the data: the second of two equal keys."""

    def __str__(self) -> str:
        key = f"{dotted(self.path)}: " if self.path else ""
        return f"{key}{self.message}" + (f" ({self.fix})" if self.fix else "")


def dotted(path: KeyPath) -> str:
    """Write a path as `losses.0.weight`; the recipe as a whole is `recipe`."""
    return ".".join(map(str, path)) or "recipe"


class Section(BaseModel):
    """Strict, frozen base of every section: an unknown key is an error and nothing changes after loading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True, serialize_by_alias=True
    )

    @classmethod
    def fields_by_key(cls) -> dict[str, FieldInfo]:
        """Map the keys of the section, as a recipe writes them, to their fields."""
        return {field.alias or name: field for name, field in cls.model_fields.items()}

    def mistakes(self) -> Iterator[Mistake]:
        """Yield what is wrong with keys that are right one by one."""
        yield from ()

    @model_validator(mode="after")
    def _refuse_mistakes(self) -> Self:
        found = list(self.mistakes())
        if found:
            context = {"text": "; ".join(map(str, found)), "mistakes": found}
            raise PydanticCustomError("mistakes", "{text}", context)
        return self

    def get(self, path: KeyPath) -> Any:
        """Return the value at a path of keys as a recipe writes them; None below a section that is not given."""
        value: Any = self
        for key in path:
            names = {} if value is None else type(value).model_fields
            found = [name for name, field in names.items() if key == (field.alias or name)]
            value = getattr(value, found[0]) if found else None
        return value

    def changed(self, *keys: str) -> list[str]:
        """Return those of the keys that differ from their default, which says nothing: a dumped recipe has them all."""
        fields = type(self).model_fields
        return [key for key in keys if getattr(self, key) != fields[key].get_default(call_default_factory=True)]

    def without_effect(self, keys: tuple[str, ...], why: str, fix: str = "remove it") -> Iterator[Mistake]:
        """Yield a mistake for each key that was changed although it has no effect."""
        for key in self.changed(*keys):
            yield Mistake((key,), f"has no effect{why}", fix, at="key")

    def not_one_of(self, *keys: str) -> Iterator[Mistake]:
        """Yield a mistake unless exactly one of the keys is given."""
        given = self.changed(*keys)
        if not given:
            options = f"{', '.join(keys[:-1])} and {keys[-1]}"
            yield Mistake((), f"none of {options} is given", "add one of them", at="key")
        if len(given) > 1:
            message = f"{' and '.join(given)} are both given, and only one can hold"
            yield Mistake((given[-1],), message, "remove one, or set it to null", at="key")

    def repeated(self, key: str, what: str) -> Iterator[Mistake]:
        """Yield a mistake for each item of a list that stands in it before."""
        items = [list(item) if isinstance(item, tuple) else item for item in getattr(self, key) or ()]
        for position, item in enumerate(items):
            if item in items[:position]:
                yield Mistake((key, position), f"{what.format(item)} is listed twice", "keep one of them")

    def wrong_params(
        self, kind: str, name: str, key: str = "params", reserved: Mapping[str, str] = MappingProxyType({})
    ) -> Iterator[Mistake]:
        """Yield a mistake for each parameter that a built-in strategy does not take, or takes in another type.

        Args:
            kind: A key of `PARAMS`.
            name: The strategy; parameters of the user's own functions are looked at when these are imported.
            key: Where the parameters stand in the section.
            reserved: Parameter of the function -> the key of the recipe that gives it.
        """
        accepted = PARAMS[kind].get(name, {})
        for param, value in getattr(self, key).items():
            path = (key, param)
            if param in reserved:
                fix = f"write `{reserved[param]}:` beside `{key}:`"
                yield Mistake(path, f"{param} is a key of its own, not a parameter", fix, at="key")
            elif ":" in name:
                continue
            elif param not in accepted:
                fix = unknown_param(param, accepted)
                yield Mistake(path, f"the {kind} {name} has no such parameter", fix, at="key")
            elif mismatch := type_mismatch(accepted[param], value):
                yield Mistake(path, mismatch)
