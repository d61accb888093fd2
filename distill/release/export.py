"""Write the release folder and prove, in fresh processes, that it is the trained student for whoever loads it."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill.errors import RunError
from distill.files import parts_of, read_json, sha256_of, write_text
from distill.models.widths import pad_to_largest
from distill.recipe.load import dump
from distill.recipe.locate import CHECKSUMS, is_path
from distill.recipe.schema import Format, Recipe
from distill.release.formats import write_modelling
from distill.release.old_names import add_old_names
from distill.release.wording import one_line

CODE_KEYS = ("auto_map", "custom_pipelines")
"""Keys of a config that name code."""
PADDING_TOLERANCE = 1e-6
"""Of the largest logit, or of 1: zero neurons change the order in which a matrix product is summed, nothing else."""

OLDER_TOLERANCE = 1e-5
"""The same for another version of transformers, which may compute in another order."""

PATIENCE = 6 * 3600
"""Seconds after which a fresh process is ended."""
SECRET = re.compile("TOKEN|KEY|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
"""Words in the names of variables that a fresh process does not get."""
GUARD = """
import sys
def refuse(event, given):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        place = given[0] if event == "socket.getaddrinfo" else given[1]
        if (place[0] if isinstance(place, tuple) else place) not in ("127.0.0.1", "::1", "localhost"):
            raise PermissionError("it asked for the network")
sys.addaudithook(refuse)
"""
"""Starts every program of a fresh process: none may ask for the network; a runtime may be a server on this machine."""

FRESH_PROCESS = """
import contextlib, io, json, os, runpy, sys
asked = json.loads(sys.argv[1])
sys.path[:0] = asked["packages"] + asked.get("older", [])
import torch, transformers
from safetensors.torch import load_file, save_file
torch.set_num_threads(asked["threads"])
folder, loader = asked["folder"], getattr(transformers, asked["auto_class"])
local = {"local_files_only": True, "trust_remote_code": asked["code"]}
if asked["code"]:
    for stock in (loader, transformers.AutoModel):
        try:
            stock.from_pretrained(folder, local_files_only=True, trust_remote_code=False, ignore_mismatched_sizes=True)
        except Exception:
            continue
        sys.exit(f"without its code, {stock.__name__} loads it as another model")
if asked["packages"]:
    from distill import load_student
    model, info = load_student(folder), {}
else:
    model, info = loader.from_pretrained(folder, output_loading_info=True, **local)
faults = {name: sorted(map(str, found)) for name, found in info.items() if found}
if faults:
    sys.exit(f"weights do not fit: {json.dumps(faults)}")
if asked["code"]:
    _, info = transformers.AutoModel.from_pretrained(folder, output_loading_info=True, **local)
    faults = {name for name in info["missing_keys"] if name in dict(model.base_model.named_parameters())}
    if faults or info["mismatched_keys"]:
        sys.exit(f"weights do not fit AutoModel: {sorted(faults)} {info['mismatched_keys']}")
with torch.no_grad():
    logits = model.eval()(**load_file(asked["probe"]))[0]
save_file({"logits": logits.contiguous()}, asked["answer"])
model.save_pretrained(asked["again"])
if model.can_generate():
    model.float()  # half-precision logits tie often, and then a rounding error chooses the token
    own = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "num_beams": 1}
    found = [model.generate(**load_file(asked["prompt"]), use_cache=cache, **own) for cache in (True, False)]
    if not torch.equal(*found):
        sys.exit("greedy generation differs with and without cache")
del model, logits
os.chdir(asked["place"])
printed, kept, fault = {}, [], ""
for title, code in asked.get("examples", {}).items():
    with open(asked["place"] + ".py", "w", encoding="utf-8") as file:
        file.write(code)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        try:
            kept.append(runpy.run_path(file.name, run_name="__main__"))
        except Exception as error:
            fault = f"{title} fails: {type(error).__name__}: {error}"
    printed[title] = said.getvalue()
with open(asked["said"], "w", encoding="utf-8") as file:
    json.dump([printed, fault], file)
if "distill" in sys.modules and not asked["packages"]:
    sys.exit("distill was imported")
sys.stdout.flush()
os._exit(0)  # a runtime that is taken apart may wait for itself forever: what an example made is kept until here
"""


def releasable_recipe(recipe: Recipe, *, defaults: bool = True) -> str:
    """Write the recipe as YAML, with folders of this machine cut down to their names."""
    return dump(recipe.with_paths(without_folders), defaults=defaults)


def without_folders(path: str) -> str:
    """Cut a path to what may be published, its last name; names of packages, corpora and hub ids stay."""
    return f"./{Path(path).name}" if is_path(path) else path


def write_release(
    folder: Path,
    model: Any,
    preprocessors: Sequence[Any],
    texts: Mapping[str, str],
    auto_class: str = "",
    release_format: Format = "uniform",
) -> Any:
    """Write weights, preprocessors and the given text files.

    Args:
        folder: A folder with nothing in it, or other forms of the student.
        model: The trained student.
        preprocessors: Its tokenizer, and whatever else makes its inputs.
        texts: File name -> content.
        auto_class: The transformers Auto class that a user would call; `native` releases name it.
        release_format: Format of the release.

    Returns:
        The model as written.
    """
    written = pad_to_largest(model) if release_format == "padded" else model
    written.save_pretrained(folder)
    for each in preprocessors:
        each.save_pretrained(folder)
    remove_code_references(folder)
    if release_format == "native":
        write_modelling(folder, model, auto_class)
    add_old_names(folder)
    for name, text in texts.items():
        write_text(folder / name, text)
    return written


def write_checksums(folder: Path) -> None:
    """List the sha256 of every file of a release, once all of them are there."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    lines = [f"{sha256_of(file)}  {file.relative_to(folder)}\n" for file in files]
    write_text(folder / CHECKSUMS, "".join(lines))


def remove_code_references(folder: Path) -> None:
    """Remove the keys by which the source teacher may name code of others from every config of a saved model."""
    for file in folder.rglob("*config.json"):
        content = read_json(file)
        objects = [each for each in parts_of(content) if isinstance(each, dict)]
        if [each.pop(key) for each in objects for key in CODE_KEYS if key in each]:
            write_text(file, json.dumps(content, indent=2, sort_keys=True) + "\n")  # as transformers does


def check_release(
    folder: Path,
    model: Any,
    auto_class: str,
    probe: Mapping[str, Tensor],
    release_format: Format = "uniform",
    older: Path | None = None,
    examples: Mapping[str, str] | None = None,
    name: str = "release",
) -> dict[str, str]:
    """Prove a release: loaded by a process that never imports distill, it is the same model.

    A `native` release must load with its own code, also as `AutoModel`; fail without, even where mismatched sizes are
    ignored; and load through `load_student` in a process of its own.

    Args:
        folder: The release.
        model: The model that was written, in eval mode on the CPU.
        auto_class: The transformers Auto class that a user would call.
        probe: Inputs of the model, e.g. input_ids and attention_mask [B, L].
        release_format: Format of the release.
        older: Packages that a process more finds before those of this environment: an older transformers, whose logits
            may differ by rounding.
        examples: Python of the card, by title, to be run in that process as well.
        name: The folder's name in these examples.

    Returns:
        What each example printed, by its title.

    Raises:
        RunError: It does not load, logits differ in any bit, greedy generation differs with and without cache, saving
            it again gives other files, or an example fails.
    """
    with torch.no_grad():
        expected = model(**probe)[0]
    printed: dict[str, str] = {}
    ways: list[dict[str, Any]] = [{"code": release_format == "native", "packages": []}]
    ways += [] if older is None else [{**ways[0], "older": [str(older)]}]
    if release_format == "native":
        ways.append({"code": False, "packages": [path for path in sys.path if path]})
    ways[0]["examples"] = dict(examples or {})
    for way in ways:
        with tempfile.TemporaryDirectory() as scratch:
            files = _load_again({**way, "folder": str(folder), "auto_class": auto_class}, probe, name, scratch)
            printed |= read_json(Path(files["said"]))[0]
            logits = load_file(files["answer"])["logits"]
            gap = (logits - expected).abs().max().item()
            allowed = OLDER_TOLERANCE * max(1.0, expected.abs().max().item()) if "older" in way else 0.0
            if not gap <= allowed:
                raise RunError(f"release: logits of the reloaded student differ by up to {gap:.3g}")
            if "older" in way:
                continue
            add_old_names(Path(files["again"]))
            # Our own loader runs no code, and does not carry the modelling file over.
            patterns = ["*.safetensors"] if way["packages"] else ["*.safetensors", "*.py", "config.json"]
            if _sums(folder, patterns) != _sums(Path(files["again"]), patterns):
                raise RunError("release: loading the student and saving it again gives other files")
    return printed


def _load_again(asked: dict[str, Any], probe: Mapping[str, Tensor], name: str, scratch: str) -> dict[str, str]:
    """Load a release in a fresh process, where examples find it by its name; returns the files of what it answers.

    Raises:
        RunError: It does not load, or an example fails.
    """
    files = {each: str(Path(scratch) / each) for each in ("probe", "prompt", "answer", "again", "said", "place")}
    Path(files["place"]).mkdir()
    Path(files["place"], name).symlink_to(Path(asked["folder"]).absolute(), target_is_directory=True)
    save_file({key: tensor.contiguous() for key, tensor in probe.items()}, files["probe"])
    save_file(_prompt(probe), files["prompt"])
    loader = "load_student" if asked["packages"] else f"stock transformers{', the older one' * ('older' in asked)}"
    ask_fresh_process(FRESH_PROCESS, {**asked, "threads": torch.get_num_threads(), **files}, scratch, loader)
    if fault := read_json(Path(files["said"]))[1]:
        raise RunError(f"release: the card's example of {one_line(fault)}")
    return files


def check_padding(model: Any, wide: Any, probe: Mapping[str, Tensor]) -> None:
    """Prove the format `padded`: in fp32, the zero neurons change logits by no more than rounding.

    Args:
        model: The trained student.
        wide: The model that was written; the student itself in other formats, where there is nothing to check.
        probe: Inputs of both.

    Raises:
        RunError: They change more.
    """
    if wide is model:
        return
    with torch.no_grad():
        expected, found = (copy.deepcopy(own).float()(**probe)[0] for own in (model, wide))
    gap = (found - expected).abs().max().item()
    if not gap <= PADDING_TOLERANCE * max(1.0, expected.abs().max().item()):
        raise RunError(f"release: zero neurons change the logits by up to {gap:.3g}")


def ask_fresh_process(program: str, asked: dict[str, Any], scratch: str, loader: str) -> None:
    """Run a program in a new Python process of this environment, which has no network and no secrets.

    Args:
        program: Python that reads `asked` as JSON from its argument.
        asked: Paths and settings.
        scratch: Folder for what transformers keeps of modelling code.
        loader: Name, for the message, of what loads the student there.

    Raises:
        RunError: It fails, with its last line, or does not come to an end.
    """
    # Isolated mode: neither the working folder nor PYTHONPATH can slip distill or a shadowing module in.
    command = [sys.executable, "-I", "-c", GUARD + program, json.dumps(asked)]
    kept = {name: value for name, value in os.environ.items() if not SECRET.search(name)}
    environment = {**kept, "HF_MODULES_CACHE": str(Path(scratch) / "modules"), "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(  # noqa: S603 (our own interpreter on our own text)
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            env=environment,
            timeout=PATIENCE,
        )
    except subprocess.TimeoutExpired as error:
        raise RunError(f"release: {loader} is not done with the student after {PATIENCE} s") from error
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RunError(f"release: {loader} cannot load the student: {reason}")


def _prompt(probe: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Cut the prompt that generation starts from: the first 8 real positions of the first example."""
    first = {name: tensor[:1] for name, tensor in probe.items() if not name.startswith("decoder_")}
    if "attention_mask" not in first or "input_ids" not in first:
        return {name: tensor.contiguous() for name, tensor in first.items()}
    real = first["attention_mask"][0].bool()
    return {name: tensor[:, real][:, :8].contiguous() for name, tensor in first.items()}


def _sums(folder: Path, patterns: Sequence[str]) -> dict[str, str]:
    return {file.name: sha256_of(file) for pattern in patterns for file in sorted(folder.glob(pattern))}
