"""GGUF teachers: dequantised once into a folder like any other, which is kept by content and read from then on."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.initialization import no_init_weights

from distill.files import read_object, write_json
from distill.models.report import check_loaded
from distill.models.weights import as_input_error
from distill.recipe.gguf import gguf_size, read_header


def dequantised(file: Path, digest: str, say: Callable[[str], None] = lambda _line: None) -> Path:
    """Return the folder of a GGUF file's dequantised model and tokenizer; makes it where there is none yet.

    It lies in the user's cache, under the file's sha256 (`digest`) and the version of transformers. Several processes
    may make it at a time: the first one's is kept.

    Raises:
        InputError: The file is broken, of an unknown architecture, or lacks weights.
    """
    gguf_size(file)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "distill" / "gguf"
    folder = cache / f"{digest}-{transformers.__version__}"
    if folder.is_dir():
        return folder
    say(f"  dequantising {file.name} once, into {folder}")
    cache.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".", dir=cache))
    try:
        _convert(file, temporary, say)
        if not folder.is_dir():
            os.rename(temporary, folder)
    except OSError:
        if not folder.is_dir():  # not just another process that was faster
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _convert(file: Path, folder: Path, say: Callable[[str], None]) -> None:
    """Load a GGUF file and save it as what it is without quantisation."""
    with tempfile.TemporaryDirectory() as alone:  # transformers would look at other files beside it
        os.symlink(file.absolute(), Path(alone) / file.name)
        given: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
        with as_input_error(f"cannot dequantise {file}"):
            tokenizer = AutoTokenizer.from_pretrained(alone, **given)
            for name in ("bos", "eos"):  # some versions of transformers take one for the other
                if (number := read_header(file).get(f"tokenizer.ggml.{name}_token_id")) is not None:
                    setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(number))
            loaded, info = AutoModelForCausalLM.from_pretrained(alone, output_loading_info=True, **given)
    check_loaded(file, loaded, info, False, False, say)
    config = copy.deepcopy(loaded.config)
    del config.quantization_config  # one that was quantised refuses to be saved
    config._name_or_path = ""
    with no_init_weights():  # every tensor is copied
        plain = type(loaded)._from_config(config, dtype=loaded.dtype)
    plain.tie_weights()
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    words = read_object(folder / "tokenizer.json")
    # transformers gives some of them an <|endoftext|> that the file does not have, and that no embedding is for.
    words["added_tokens"] = [token for token in words["added_tokens"] if token["id"] < plain.config.vocab_size]
    write_json(folder / "tokenizer.json", words)
