"""Loading teachers and students: a folder, an installed package or a hub id ends as one local folder.

Only safetensors weights are read, and code that came with a model runs only when the user said so on the command line.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer

from distill.errors import InputError
from distill.files import sha256_of
from distill.models.widths import as_stock, is_unequal, with_widths
from distill.recipe.load import teacher_folder
from distill.recipe.schema import Teacher

HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]


@dataclass(frozen=True)
class ModelHead:
    """What the task asks of the model class."""

    auto_class: str
    """Name of the transformers Auto class, e.g. `AutoModelForSequenceClassification`."""
    labels: Sequence[str] = ()
    """Names of the classes by index, for classification heads."""
    padding: int | None = None
    """Token id of padding; decoders with a class head need it to find the last token."""


def teacher_path(teacher: Teacher, base: Path, remote_code: bool = False) -> Path:
    """The local folder of a teacher; downloads a hub id (safetensors, config and tokenizer files only).

    Args:
        teacher: The recipe's section.
        base: The folder that relative paths start from (the recipe's).
        remote_code: Download the modelling code that comes with a hub id, too.

    Raises:
        InputError: The folder, package or hub id cannot be had, or the weights do not have the given sha256.
    """
    folder = teacher_folder(teacher.model, base)
    if folder is None:
        folder = _from_hub(teacher.model, teacher.revision, ["*.py"] if remote_code else [])
    if teacher.sha256 is not None:
        weights = folder / "model.safetensors"
        actual = sha256_of(weights) if weights.is_file() else "missing"
        if actual != teacher.sha256:
            raise InputError(f"teacher.sha256: {weights.name} of {teacher.model} is {actual}, not {teacher.sha256}")
    return folder


def _from_hub(model: str, revision: str | None, code: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=[*HUB_FILES, *code]))
    except (OSError, ValueError) as error:  # every hub error is one of these
        raise InputError(f"teacher.model: cannot get {model!r} from the model hub: {error}") from error


def folder_fingerprint(folder: Path) -> str:
    """One sha256 over the names and contents of a model folder's config, weights and tokenizer files."""
    files = sorted({file for pattern in HUB_FILES for file in folder.glob(pattern)})
    listing = {file.name: sha256_of(file) for file in files}
    return hashlib.sha256(json.dumps(listing, sort_keys=True).encode()).hexdigest()


def load_tokenizer(folder: Path, remote_code: bool = False) -> Any:
    """The folder's tokenizer. Raises InputError when there is none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder} has no usable tokenizer: {error}") from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise InputError(f"the tokenizer in {folder} has neither a padding nor an end-of-text token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    folder: Path,
    head: ModelHead,
    *,
    new_head: bool = False,
    random_seed: int | None = None,
    remote_code: bool = False,
    int8_on: torch.device | None = None,
) -> Any:
    """Load a model with the task's head, in the dtype it was saved in; widths per layer need no code of the folder.

    Args:
        folder: Local folder.
        head: The Auto class and class names.
        new_head: Accept a head without trained weights (the caller is about to fit it); drawn from `random_seed`.
        random_seed: With `new_head`, seeds what has to be drawn.
        remote_code: Run modelling code found in the folder.
        int8_on: Quantise linear layers to 8 bits with bitsandbytes, on this device.

    Raises:
        InputError: The folder cannot be loaded, or weights are missing that nobody is going to train.
    """
    config = _config(folder, head, remote_code)
    unequal = is_unequal(config)
    loader = with_widths(_class_of(head, config)) if unequal else getattr(transformers, head.auto_class)
    torch.manual_seed(random_seed or 0)
    extra: dict[str, Any] = {}
    if int8_on is not None:
        extra = {"quantization_config": transformers.BitsAndBytesConfig(load_in_8bit=True), "device_map": {"": int8_on}}
    try:
        model, info = loader.from_pretrained(
            folder,
            config=config,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=new_head,
            **extra,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"cannot load {folder} as {head.auto_class}: {error}") from error
    missing = sorted(info["missing_keys"]) + sorted(str(entry[0]) for entry in info["mismatched_keys"])
    if missing and not new_head:
        raise InputError(
            f"{folder} has no trained weights for {', '.join(missing[:4])}: "
            f"add `fit: {{epochs: …, lr: …}}` under `teacher:` to train them on the recipe's labels first"
        )
    return (as_stock(model) if unequal else model).eval()


def _class_of(head: ModelHead, config: Any) -> type[Any]:
    """The stock class that the Auto class stands for; a head may also name it itself."""
    named = getattr(transformers, head.auto_class)
    mapping = getattr(named, "_model_mapping", None)
    try:
        found = named if mapping is None else mapping[type(config)]
    except KeyError as error:
        raise InputError(f"{head.auto_class} has no class for a {config.model_type}") from error
    assert isinstance(found, type), "families with several base classes have no widths per layer"
    return found


def random_model(folder: Path, head: ModelHead, seed: int, remote_code: bool = False) -> Any:
    """A model with random weights from the folder's config (`teacher.init: random`)."""
    config = _config(folder, head, remote_code)
    torch.manual_seed(seed)
    return getattr(transformers, head.auto_class).from_config(config, trust_remote_code=remote_code).eval()


def hollow_model(folder: Path, remote_code: bool = False) -> Any:
    """The folder's model without values (on the meta device) and without a head: to look at its structure for free."""
    config = _config(folder, ModelHead(""), remote_code)
    with torch.device("meta"):
        return transformers.AutoModel.from_config(config, trust_remote_code=remote_code).eval()


def trained_labels(folder: Path) -> list[str]:
    """Class names of a model that is already trained for classes, in the order of its outputs."""
    names: dict[int, str] = _config(folder, ModelHead(""), remote_code=False).id2label
    return [names[index] for index in sorted(names)]


def _config(folder: Path, head: ModelHead, remote_code: bool) -> Any:
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=remote_code)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} has no usable config.json: {error}") from error
    if head.padding is not None and getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = head.padding
    if head.labels:
        config.id2label = dict(enumerate(head.labels))
        config.label2id = {name: index for index, name in enumerate(head.labels)}
    return config


def load_student(folder: str | Path) -> Any:
    """Load a student that distill wrote, with the class named in its config; runs no code from the folder.

    Raises:
        InputError: The folder is not a model folder.
    """
    folder = Path(folder)
    try:
        architecture = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    except (OSError, ValueError, LookupError) as error:
        raise InputError(
            f"{folder} is not a student folder: its config.json names no architecture ({error})"
        ) from error
    if not hasattr(transformers, str(architecture)):
        raise InputError(f"{folder}: transformers {transformers.__version__} has no model class {architecture!r}")
    return load_model(folder, ModelHead(architecture))
