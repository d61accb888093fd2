"""A folder with a good recipe and the teachers that it or its variants name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from bad_recipes import GOOD
from teacher_files import BERT, weights


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    teacher = {"model_type": "bert", "num_hidden_layers": 6, "intermediate_size": 1536, "hidden_size": 384}
    teacher["max_position_embeddings"] = 512
    for name, config in {"teacher": json.dumps(teacher), "org/model": "{}", "broken": "{"}.items():
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text(config)
        (tmp_path / name / "model.safetensors").write_bytes(weights(BERT))
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts.csv").write_text("body,label\nhello,a\n")
    return tmp_path


@pytest.fixture
def write(folder: Path) -> Callable[[str], Path]:
    """Writes a recipe's text into the folder and returns its path."""

    def write_recipe(text: str = GOOD) -> Path:
        path = folder / "recipe.yaml"
        path.write_bytes(text.encode())
        return path

    return write_recipe
