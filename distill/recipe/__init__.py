"""The recipe: its vocabulary (`schema`) and its reader (`load`). Nothing here imports torch."""

from distill.recipe.load import load_recipe
from distill.recipe.schema import Recipe

__all__ = ["Recipe", "load_recipe"]
