"""Loading teachers and students: a folder, an installed package or a hub id ends as one local folder.

Only safetensors weights are read, and code that came with a model runs only when the user said so on the command line.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AddedToken, AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from distill.errors import InputError
from distill.files import read_object, sha256_of
from distill.models.gguf import dequantised
from distill.models.pattern import settle_periods
from distill.models.quantised import import_bitsandbytes
from distill.models.report import check_loaded, untie_config
from distill.models.sentence import sentence_head
from distill.models.trainable import mark_drawn
from distill.models.weights import as_input_error, check_files, weights_sha256
from distill.models.widths import as_stock, is_unequal, with_widths
from distill.recipe.locate import is_gguf, teacher_folder, teacher_size
from distill.recipe.schema import Teacher
from distill.recipe.weights import weight_files

SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.spm", "*.codes", "*.tiktoken"]
TOKENIZER_FILES = ("*token*", "*vocab*", "*.model", "*.spm", "*.codes", "tekken.json", "*.py")
"""Names of files that tokenizers are made from; of some folders without one transformers makes one without words."""
HUB_FILES = [*SMALL_FILES, "*.safetensors"]
CPU = torch.device("cpu")
UNLIMITED = 10**9
"""A tokenizer that states no `model_max_length` has one beyond this."""


@dataclass(frozen=True)
class ModelHead:
    """The model class of a task, and what its config must say."""

    auto_class: str
    """Name of the transformers Auto class, e.g. `AutoModelForSequenceClassification`."""
    labels: Sequence[str] = ()
    """Names of the classes by index, for classification heads."""
    padding: int | None = None
    """Token id of padding; decoders with a class head need it to find the last token."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Other attributes that the config must have."""
    pooled: bool = False
    """The last hidden states of a text become one vector, as the folder says."""


def teacher_path(
    teacher: Teacher,
    base: Path,
    remote_code: bool = False,
    say: Callable[[str], None] = lambda _line: None,
    key: str = "teacher.model",
) -> Path:
    """Find the local folder of a teacher; downloads a hub id (safetensors, config and tokenizer files, and the card).

    A GGUF file is dequantised into a folder first, if that was not done before.

    Args:
        teacher: The recipe's section.
        base: The folder that relative paths start from (the recipe's).
        remote_code: Download the modelling code that comes with a hub id, too.
        say: Gets a line about a GGUF file that is dequantised.
        key: That of the recipe which names it.

    Raises:
        InputError: The folder, package or hub id cannot be had, something in it leads elsewhere, or the weights do
            not have the given sha256.
    """
    folder, section = teacher_folder(teacher.model, base), key.rpartition(".")[0]
    if folder is not None and is_gguf(folder):
        if (actual := sha256_of(folder)) != (teacher.sha256 or actual):
            raise InputError(f"{section}.sha256: {teacher.model} has {actual}, not {teacher.sha256}")
        return dequantised(folder, actual, say)
    if folder is None:
        folder = _from_hub(teacher.model, teacher.revision, ["*.py"] if remote_code else [], key)
    check_files(folder)
    if teacher.sha256 is not None and (actual := weights_sha256(folder)) != teacher.sha256:
        raise InputError(f"{section}.sha256: the weights of {teacher.model} have {actual}, not {teacher.sha256}")
    return folder


def _from_hub(model: str, revision: str | None, code: list[str], key: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=[*HUB_FILES, "README.md", *code]))
    except (OSError, ValueError) as error:  # every hub error is one of these
        raise InputError(f"{key}: cannot get {model!r} from the model hub: {error}") from error


def folder_fingerprint(folder: Path) -> str:
    """Return one sha256 over the names and contents of a model folder's config, weights, tokenizer files and code."""
    return _fingerprint(folder, HUB_FILES)


def tokenizer_fingerprint(folder: Path) -> str:
    """Return one sha256 over the names and contents of a model folder's config and tokenizer files."""
    return _fingerprint(folder, SMALL_FILES)


def _fingerprint(folder: Path, patterns: Sequence[str]) -> str:
    files = {file for pattern in (*patterns, "*.py") for file in folder.glob(pattern)}
    files |= {*folder.glob("additional_chat_templates/*.jinja"), *folder.glob("*/config.json")}
    listing = {str(file.relative_to(folder)): sha256_of(file) for file in sorted(files) if file.is_file()}
    return hashlib.sha256(json.dumps(listing, sort_keys=True).encode()).hexdigest()


def load_tokenizer(folder: Path, remote_code: bool = False) -> Any:
    """Load the folder's tokenizer; where it states no length, it gets the number of the model's positions.

    Raises:
        InputError: There is none that works.
    """
    if not any(path for names in TOKENIZER_FILES for path in folder.glob(names)):
        raise InputError(f"{folder} holds no tokenizer: save that of the model there, with its save_pretrained")
    with as_input_error(f"{folder} has no usable tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=remote_code)
        words = len(tokenizer) - len(tokenizer.all_special_tokens) if tokenizer else 0  # without its files it has none
        if not (isinstance(tokenizer, PreTrainedTokenizerBase) and tokenizer.model_max_length > 0 and words > 1):
            raise ValueError(f"a {type(tokenizer).__name__} without words, or for no text")
    if tokenizer.pad_token is None:
        # The head of a decoder with classes finds the end of a text by the padding that its config names.
        stated = read_object(folder / "config.json").get("pad_token_id") if (folder / "config.json").exists() else None
        if isinstance(stated, int) and 0 <= stated < len(tokenizer):
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(stated)
        elif tokenizer.eos_token is None:
            raise InputError(f"the tokenizer in {folder} has neither a padding nor an end-of-text token")
        else:
            tokenizer.pad_token = tokenizer.eos_token
    positions = teacher_size(folder).positions if (folder / "config.json").exists() else None
    if positions is not None and tokenizer.model_max_length > UNLIMITED:
        tokenizer.model_max_length = positions  # a text cut to nothing else runs into an index error in the model
    return tokenizer


def add_tokens(tokenizer: Any, tokens: Sequence[str]) -> list[str]:
    """Add special tokens to a tokenizer; returns those that it did not have.

    A space before one belongs to it, so that byte-level tokenizers write the words around it as they would without it.
    """
    new = [token for token in tokens if token not in tokenizer.get_added_vocab()]
    added = [AddedToken(token, lstrip=True, normalized=False, special=True) for token in new]
    tokenizer.add_tokens(added, special_tokens=True)
    return new


def grow_embeddings(model: Any, tokenizer: Any, tokens: Sequence[str], seed: int, say: Callable[[str], None]) -> None:
    """Give a model about to be fitted embeddings for tokens that were added to its tokenizer, drawn as its others were.

    Args:
        model: A transformers model, changed in place.
        tokenizer: With the tokens.
        tokens: Those that the task writes.
        seed: Seeds the new embeddings.
        say: Gets a line about them.
    """
    have = model.get_input_embeddings().num_embeddings
    new = {token: number for token in tokens if (number := tokenizer.convert_tokens_to_ids(token)) >= have}
    if new:
        torch.manual_seed(seed)
        model.resize_token_embeddings(max(new.values()) + 1, mean_resizing=False)
        tables = (model.get_input_embeddings(), model.get_output_embeddings())
        mark_drawn(model, [name for name, own in model.named_parameters() if any(own is t.weight for t in tables if t)])
        say(f"  drawn at random, to be fitted: the embeddings of {', '.join(new)}")


def load_model(
    folder: Path,
    head: ModelHead,
    *,
    allow_untrained_head: bool = False,
    random_seed: int | None = None,
    remote_code: bool = False,
    device: torch.device = CPU,
    int8: bool = False,
    say: Callable[[str], None] = lambda _line: None,
) -> Any:
    """Load a model with the task's head, in the dtype it was saved in; widths per layer need no code of the folder.

    Args:
        folder: Local folder.
        head: The Auto class and class names.
        allow_untrained_head: Draw a head (and a pooler) without trained weights from `random_seed`: it is about to be
            fitted.
        random_seed: With `allow_untrained_head`, seeds what has to be drawn.
        remote_code: Run modelling code found in the folder.
        device: What the weights are read to, and where those without are drawn.
        int8: Quantise linear layers to 8 bits with bitsandbytes.
        say: Gets a line about tensors that are drawn, left out or not tied.

    Raises:
        InputError: The folder cannot be loaded, or weights are missing that nobody is going to train.
    """
    config = load_config(folder, head, remote_code)
    weight_files(folder)  # refused here where transformers would follow them out of the folder
    unequal = is_unequal(config)
    named = None if remote_code else _class_of(head, config)
    loader = with_widths(named or _class_of(head, config)) if unequal else getattr(transformers, head.auto_class)
    torch.manual_seed(random_seed or 0)
    extra: dict[str, Any] = {}
    if int8:
        import_bitsandbytes()
        extra = {"quantization_config": transformers.BitsAndBytesConfig(load_in_8bit=True), "device_map": {"": device}}
    elif device.type != "cpu":
        extra = {"device_map": {"": device}}
    with as_input_error(f"cannot load {folder} as {head.auto_class}"):
        model, info = loader.from_pretrained(
            folder,
            config=config,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # judged below, with what is missing
            **extra,
        )
    check_loaded(folder, model, info, allow_untrained_head, head.pooled, say)
    untie_config(model, say)
    settle_periods(model.config)
    if head.pooled:
        model.sentence_head = sentence_head(folder, say)
    return (as_stock(model) if unequal else model).eval()


def _class_of(head: ModelHead, config: Any) -> Any:
    """Find the stock class that the Auto class stands for; a head may also name it itself."""
    named = getattr(transformers, head.auto_class)
    mapping = getattr(named, "_model_mapping", None)
    try:
        return named if mapping is None else mapping[type(config)]
    except KeyError as error:
        raise InputError(f"{head.auto_class} has no class for a {config.model_type}") from error


def random_model(
    folder: Path,
    head: ModelHead,
    seed: int,
    remote_code: bool = False,
    device: torch.device = CPU,
    say: Callable[[str], None] = lambda _line: None,
) -> Any:
    """Build a model from the folder's config (`teacher.init: random`), with weights that are drawn on a device.

    Other kinds of devices draw other numbers from a seed.
    """
    config = load_config(folder, head, remote_code)
    torch.manual_seed(seed)
    with device, as_input_error(f"cannot build {head.auto_class} from the config.json of {folder}"):
        model = _built(head, config, remote_code)
    if head.pooled:
        model.sentence_head = sentence_head(folder, say)
    return model


def hollow_model(folder: Path, remote_code: bool = False) -> Any:
    """Build the base model on the meta device, without weights, to inspect its structure."""
    config = load_config(folder, ModelHead(""), remote_code)
    with torch.device("meta"), as_input_error(f"cannot build a model from the config.json of {folder}"):
        return _built(ModelHead("AutoModel"), config, remote_code)


def _built(head: ModelHead, config: Any, remote_code: bool) -> Any:
    """Build a model from its config, sizes per layer included."""
    if is_unequal(config):
        return as_stock(with_widths(_class_of(head, config))._from_config(config)).eval()
    return getattr(transformers, head.auto_class).from_config(config, trust_remote_code=remote_code).eval()


def trained_labels(folder: Path) -> list[str]:
    """Return the class names of a model that is already trained for classes, in the order of its outputs."""
    names: dict[int, str] = load_config(folder, ModelHead(""), remote_code=False).id2label
    return [names[index] for index in sorted(names)]


def load_config(folder: Path, head: ModelHead, remote_code: bool = False) -> Any:
    """Load the folder's config, with the task's classes and padding.

    Raises:
        InputError: There is none that transformers takes, its weights are stored quantized and cannot be cut, or its
            sizes are those of no model.
    """
    teacher_size(folder)
    with as_input_error(f"{folder} has no usable config.json"):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=remote_code)
    if head.padding is not None and getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = head.padding
    if head.pooled and config.is_encoder_decoder:
        raise InputError(f"{folder}: the vectors of an encoder-decoder ({config.model_type}) cannot be distilled")
    own = {"return_dict": True, "output_attentions": False, "output_hidden_states": False}  # for whoever calls a model
    for name, value in {**own, **head.settings}.items():
        setattr(config, name, value)
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
        architecture = read_object(folder / "config.json")["architectures"][0]
    except (InputError, LookupError, TypeError) as error:
        raise InputError(
            f"{folder} is not a student folder: its config.json names no architecture ({error})"
        ) from error
    named = getattr(transformers, str(architecture), None)
    if not (isinstance(named, type) and issubclass(named, transformers.PreTrainedModel)):
        raise InputError(f"{folder}: transformers {transformers.__version__} has no model class {architecture!r}")
    if not isinstance(config := load_config(folder, ModelHead("")), getattr(named, "config_class", None) or object):
        raise InputError(
            f"{folder}: config.json says model_type {config.model_type}, which is not that of {architecture}"
        )
    return load_model(folder, ModelHead(architecture))
