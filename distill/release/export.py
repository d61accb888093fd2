"""Write the release folder and prove, in a fresh process without distill, that stock transformers loads it."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill.errors import RunError
from distill.recipe.load import dump
from distill.recipe.schema import Recipe
from distill.rundir import sha256_of, write_text

CHECKSUMS = "SHA256SUMS"

FRESH_PROCESS = """
import json, sys
import torch, transformers
from safetensors.torch import load_file, save_file
folder, auto_class, probe, answer, again, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
model, info = getattr(transformers, auto_class).from_pretrained(folder, local_files_only=True, output_loading_info=True)
faults = {name: sorted(map(str, found)) for name, found in info.items() if found}
if faults:
    sys.exit(f"weights do not fit: {json.dumps(faults)}")
with torch.no_grad():
    logits = model.eval()(**load_file(probe)).logits
save_file({"logits": logits.contiguous()}, answer)
model.save_pretrained(again)
if "distill" in sys.modules:
    sys.exit("distill was imported")
"""


def releasable_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, with folders of this machine cut down to their names."""
    teacher, data = recipe.teacher, recipe.data
    shown = recipe.model_copy(
        update={
            "teacher": teacher.model_copy(update={"model": without_folders(teacher.model)}),
            "data": data.model_copy(update={"source": without_folders(data.source)}),
        }
    )
    return dump(shown)


def without_folders(path: str) -> str:
    """A path as it may be published: the name alone, where it led to a folder of this machine."""
    return f"./{Path(path).name}" if path.startswith(("/", "~", "../")) else path


def write_release(folder: Path, model: Any, tokenizer: Any, texts: Mapping[str, str]) -> None:
    """Weights, tokenizer and the given text files, then checksums over everything.

    Args:
        folder: An empty folder.
        model: The student.
        tokenizer: Its tokenizer.
        texts: File name -> content.
    """
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name, text in texts.items():
        write_text(folder / name, text)
    lines = [f"{sha256_of(file)}  {file.name}\n" for file in sorted(folder.iterdir()) if file.is_file()]
    write_text(folder / CHECKSUMS, "".join(lines))


def check_release(folder: Path, model: Any, auto_class: str, probe: Mapping[str, Tensor]) -> None:
    """The gate every release passes: loaded by a process that never imports distill, it is the same model.

    Args:
        folder: The release.
        model: The trained student, in eval mode on the CPU.
        auto_class: The transformers Auto class that a user would call.
        probe: input_ids and attention_mask [B, L].

    Raises:
        RunError: It does not load, logits differ in any bit, or saving it again gives other weights.
    """
    with torch.no_grad():
        expected = model(**probe).logits
    with tempfile.TemporaryDirectory() as scratch:
        inputs, answer, again = (str(Path(scratch) / name) for name in ("probe", "answer", "again"))
        save_file(dict(probe), inputs)
        # Isolated mode: neither the working folder nor PYTHONPATH can slip distill or a shadowing module in.
        command = [sys.executable, "-I", "-c", FRESH_PROCESS, str(folder), auto_class, inputs, answer, again]
        done = subprocess.run(  # noqa: S603 (our own interpreter on our own text)
            [*command, str(torch.get_num_threads())], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise RunError(f"release: stock transformers cannot load the student: {reason}")
        logits = load_file(answer)["logits"]
        if not torch.equal(logits, expected):
            gap = (logits - expected).abs().max().item()
            raise RunError(f"release: logits of the reloaded student differ by up to {gap:.3g}")
        first, second = (json.dumps(_weight_sums(Path(path))) for path in (folder, again))
        if first != second:
            raise RunError("release: loading the student and saving it again gives other weights")


def _weight_sums(folder: Path) -> dict[str, str]:
    return {file.name: sha256_of(file) for file in sorted(folder.glob("*.safetensors"))}
