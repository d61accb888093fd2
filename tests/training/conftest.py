from __future__ import annotations

import pytest
from tiny import tiny_corpus, tiny_project


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    tiny_project(folder)
    return tiny_corpus(folder, seed=0)
