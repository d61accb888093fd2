from __future__ import annotations

import pytest
from tiny import tiny_project

from distill.data import read_texts, tokenise
from distill.models.load import load_tokenizer
from distill.recipe import load_recipe


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    spec = load_recipe(tiny_project(folder)).data
    return tokenise(read_texts(spec, 0, folder), spec, load_tokenizer(folder / "teacher"))
