"""Settings for every test: offline, a fixed number of threads, files left whole, and each family as a parameter."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run without a GPU
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run beside each other, and start processes of their own

import hypothesis
import pytest
from tiny import DECODERS, ENCODERS, FORMS, SEQ2SEQ

hypothesis.settings.register_profile("distill", deadline=None)  # no test fails because the machine is busy
hypothesis.settings.load_profile("distill")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Give each worker of pytest-xdist a stretch of the tests: what the tests of a file share is then made once."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """A cache of tokenised corpora of these tests alone, also for the processes that they start."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["DISTILL_CACHE"] = str(folder)
    return folder


@pytest.fixture(params=FORMS)
def form(request):
    """A family for each form of layer: for tests of what depends on the form, not on the family's row."""
    return request.param


@pytest.fixture(params=DECODERS + ENCODERS + SEQ2SEQ)
def any_family(request):
    return request.param
