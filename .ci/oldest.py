"""Print the oldest version that pyproject.toml allows of each package, as constraints for pip.

An older torch comes from PyPI as a build for CUDA of several gigabytes: torch, and the Triton that goes with it, are
those of constraints.txt.
"""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
asked = [*project["dependencies"], *(each for extra in project["optional-dependencies"].values() for each in extra)]
oldest = [found[1] + "==" + found[2] for each in asked if (found := re.fullmatch(r"([\w.-]+)>=([\w.]+)", each))]
pinned = re.findall(r"^(?:torch|triton)==.*$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
print(*(line for line in oldest if not line.startswith("torch==")), *pinned, sep="\n")  # noqa: T201
