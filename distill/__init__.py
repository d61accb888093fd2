"""distill: one recipe takes a large transformer to a released, measured small one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "load_recipe", "load_student"]

if TYPE_CHECKING:
    from distill.models.load import load_student
    from distill.recipe.load import load_recipe


def __getattr__(name: str) -> Any:
    """Import the public functions on first use, so that `import distill` (and `distill --help`) needs no torch."""
    if name == "load_student":
        from distill.models.load import load_student

        return load_student
    if name == "load_recipe":
        from distill.recipe.load import load_recipe

        return load_recipe
    raise AttributeError(f"module 'distill' has no attribute {name!r}")
