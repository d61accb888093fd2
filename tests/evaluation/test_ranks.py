"""Two processes share the test split and give the figures of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny import tiny_model, tiny_project
from transformers import AutoTokenizer

HERE = Path(__file__).parent
ENV = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": f"{HERE.parents[1]}:{HERE.parent}",
    "ACCELERATE_USE_CPU": "true",
}


def launch(processes, recipe, run, *overrides):
    several = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone"]
    command = [sys.executable, *(several if processes > 1 else []), HERE / "evaluating.py", recipe, run, *overrides]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads((run / "evaluation.json").read_text())


@pytest.mark.slow
def test_two_processes_give_the_figures_of_one(tmp_path):
    recipe = tiny_project(tmp_path)
    models = {"teacher": 0, "student": 1, "distilled": 2, "controls/labels_only/model": 3}
    for folder in ("1", "2", "sharded"):
        run = tmp_path / folder
        for name, seed in models.items():
            tiny_model("bert", seed=seed, vocab_size=17, pad_token_id=0).save_pretrained(run / name)
            AutoTokenizer.from_pretrained(tmp_path / "teacher").save_pretrained(run / name)
    one, two = (launch(processes, recipe, tmp_path / str(processes)) for processes in (1, 2))
    assert [arm["name"] for arm in two["arms"]] == ["teacher", "cut", "distilled", "labels_only", "majority"]
    for own, other in zip(one["arms"], two["arms"], strict=True):
        assert own["metrics"] == pytest.approx(other["metrics"], rel=1e-6, abs=1e-6), own["name"]
        rows, others = (load_file(tmp_path / f"{n}/predictions/{own['name']}.safetensors") for n in (1, 2))
        assert rows["example"].tolist() == others["example"].tolist() == list(range(one["data"]["examples"]))
        assert all(np.allclose(rows[name], others[name], rtol=1e-5, atol=1e-6) for name in rows)
    assert two["arms"][0]["metrics"]["kl"] == 0 < two["arms"][1]["metrics"]["kl"]
    # The second process has the second of three batches: each of four models once, and nothing to time.
    assert one["data"]["examples"] in range(33, 49) and (tmp_path / "2/passes-1").read_text() == "4"
    assert two["efficiency"]["models"]["student"]["throughput"] > 0
    # Of a sharded teacher there is one copy in main memory, not one for each process.
    alone = launch(2, recipe, tmp_path / "sharded", "teacher.device=sharded", "evaluation.efficiency=false")
    assert (tmp_path / "sharded/passes-1").read_text() == "0"
    for own, other in zip(one["arms"], alone["arms"], strict=True):
        assert own["metrics"] == pytest.approx(other["metrics"], rel=1e-6, abs=1e-6), own["name"]
    assert not list(tmp_path.glob("*/.teacher-*"))
