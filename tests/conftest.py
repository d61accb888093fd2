"""Settings for every test: offline, on the CPU, a fixed number of threads, and each family as a parameter."""

from __future__ import annotations

import os
import random

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run beside each other, and start processes of their own

import gpus
import hypothesis
import numpy as np
import pytest
import torch
from tiny import DECODERS, ENCODERS, FORMS, SEQ2SEQ

# No test fails because the machine is busy, or by an example that the next run would not draw again.
hypothesis.settings.register_profile("distill", deadline=None, derandomize=True)
hypothesis.settings.load_profile("distill")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Give each worker of pytest-xdist a stretch of the tests: what the tests of a file share is then made once."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


def pytest_collection_modifyitems(items):
    """Skip tests marked `gpu` where there is none."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not gpus.is_there():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """Run a test marked `gpu` by a pytest of its own, which sees the GPUs that are hidden from this process."""
    if gpus.VISIBLE or pyfuncitem.get_closest_marker("gpu") is None:
        return None
    test = f"{pyfuncitem.path}::{pyfuncitem.nodeid.partition('::')[2]}"
    done = gpus.start("-m", "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={pyfuncitem.config.rootpath}", test)
    if done.returncode:
        pytest.fail(f"{done.stdout}{done.stderr}", pytrace=False)
    return True


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """A cache of tokenised corpora of these tests alone, also for the processes that they start."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["DISTILL_CACHE"] = str(folder)
    return folder


@pytest.fixture(autouse=True)
def seeds():
    """Let each test draw the same numbers, whatever ran before it in the same process."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(params=FORMS)
def form(request):
    """A family for each form of layer: for tests of what depends on the form, not on the family's row."""
    return request.param


@pytest.fixture(params=DECODERS + ENCODERS + SEQ2SEQ)
def any_family(request):
    return request.param
