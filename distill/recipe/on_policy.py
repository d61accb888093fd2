"""The section `training.on_policy`: how much of what a student learns from it writes itself."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from distill.recipe.fields import Count, NonNegative, NotASwitch, Section


class OnPolicy(Section):
    """The student writes answers to the prompts of the data, and the teacher scores them (Agarwal et al. 2023, GKD)."""

    share: Annotated[float, Field(gt=0, le=1), NotASwitch] = 0.5
    """Probability that a micro-batch holds answers of the student instead of those of the data, GKD's λ; 1: all do."""
    max_new_tokens: Count = 128
    """Tokens of an answer at most, the one that ends it included; prompt and answer have `data.max_length` together."""
    temperature: NonNegative = 1.0
    """Of the predictions that tokens are drawn from; 0: the likeliest token each time."""
