"""CTranslate2: `ctranslate2/`, converted by its own loaders, which take the width of every MLP from the weights.

It runs stacks of layers, with a head of tokens. Of an encoder it gives the states of the last layer (and BERT's pooled
one); its head lies beside it in `head.safetensors`. The weights are fp32, and the runtime rounds them to 8 bits where
it is asked to (`compute_type="int8"`): both are compared.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutput

from distill.models.forward import Capture, Outputs, forward, model_inputs, without_cache
from distill.release.forms.form import Answers, Ask, Form, Probe

FOLDER, HEAD = "ctranslate2", "head.safetensors"
ENCODERS = ("bert", "roberta", "xlm-roberta", "distilbert")
DECODERS = ("llama", "mistral", "qwen2", "qwen3", "gpt2", "opt")
TWO_STACKS = ("t5", "mt5", "bart", "marian")
"""Families whose loaders give the outputs of transformers; others differ, fail with version 5, or were not tried."""
KINDS = {
    **dict.fromkeys(ENCODERS, "Encoder"),
    **dict.fromkeys(DECODERS, "Generator"),
    **dict.fromkeys(TWO_STACKS, "Translator"),
}
"""Family -> class of CTranslate2 that runs it."""
PROGRAM = """
import json, sys
import ctranslate2, numpy
from safetensors.numpy import load_file, save_file
asked = json.loads(sys.argv[1])
settings = {"device": "cpu", "compute_type": asked["compute_type"], "intra_threads": asked["threads"]}
model = getattr(ctranslate2, asked["kind"])(asked["path"], **settings)
for probe, answer in asked["pairs"]:
    given = load_file(probe)
    masks = [row.astype(bool) for row in given["attention_mask"]]
    def lists(name):
        return [row[mask].tolist() for row, mask in zip(given[name], masks)]
    def join(found):
        return numpy.concatenate([rows[: mask.sum()] for rows, mask in zip(numpy.array(found), masks)])
    ids = lists("input_ids")
    if asked["kind"] == "Generator":
        answers = {"logits": join(model.forward_batch(ids))}
    elif asked["kind"] == "Encoder":
        found = model.forward_batch(ids, token_type_ids=lists("token_type_ids") if "token_type_ids" in given else None)
        answers = {"last_hidden_state": join(found.last_hidden_state)}
        if found.pooler_output is not None:
            answers["pooler_output"] = numpy.array(found.pooler_output)
    else:
        words = json.load(open(asked["path"] + "/shared_vocabulary.json", encoding="utf-8")).__getitem__
        counts = given.get("decoder_attention_mask", numpy.ones_like(given["decoder_input_ids"])).sum(1)
        targets = [row[1:count].tolist() for row, count in zip(given["decoder_input_ids"], counts)]
        found = model.score_batch([[*map(words, row)] for row in ids], [[*map(words, row)] for row in targets])
        scores = [each.log_probs[: len(row)] for each, row in zip(found, targets)]
        answers = {"log_probs": numpy.concatenate(scores).astype("float32")}
    save_file({name: numpy.ascontiguousarray(values) for name, values in answers.items()}, answer)
if "distill" in sys.modules:
    sys.exit("distill was imported")
"""


def refuse(config: Any, auto_class: str) -> str:
    """Refuse families that its loaders do not know or get wrong, and heads that no part of it is."""
    family = config.model_type
    if family not in KINDS:
        return f"it is written for {', '.join(KINDS)}, not for {family}"
    of_tokens = {"Generator": "AutoModelForCausalLM", "Translator": "AutoModelForSeq2SeqLM"}.get(KINDS[family])
    if of_tokens not in (None, auto_class):
        return f"of a {family} it runs {of_tokens} only, and the task has {auto_class}"
    return ""


def write(folder: Path, model: Any, preprocessors: Sequence[Any], _probe: Probe) -> None:
    """Convert a model in memory, and save its head where it is none of tokens, and what makes its inputs."""
    from ctranslate2.converters import transformers as loaders
    from ctranslate2.converters.converter import Converter

    # Marian's own loader starts the decoder from zeros, which the embedding of the padding is until somebody trains it.
    config = type(model.config).__name__.replace("Marian", "Bart")
    loader = loaders._MODEL_LOADERS[config]
    stack = _prepared(copy.deepcopy(model), loader.architecture_name)  # loaders take models apart
    pooled = getattr(stack, "pooler", True) is not None

    class InMemory(Converter):  # type: ignore[misc]  # the package has no types
        def _load(self) -> Any:
            if not pooled:
                width = stack.config.hidden_size
                stack.pooler = SimpleNamespace(dense=nn.Linear(width, width))  # BERT's loader wants one
            with torch.no_grad():
                spec = loader(stack, preprocessors[0])
            for name, token in spec.config.to_dict().items():
                if token is None and name.endswith("_token"):  # a Llama whose tokenizer has no token for beginnings
                    setattr(spec.config, name, "")
            if not pooled and hasattr(spec, "pooler_dense"):
                del spec.pooler_dense, spec.pooler_activation
            return spec

    InMemory().convert(str(folder / FOLDER))
    base = f"{model.base_model_prefix}."
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if not name.startswith(base)}
    if KINDS[model.config.model_type] == "Encoder" and model is not model.base_model:
        save_file(tensors, folder / FOLDER / HEAD)
    for each in preprocessors:
        each.save_pretrained(folder / FOLDER)


def _prepared(model: Any, wanted: str) -> Any:
    """Take the part of a model that a loader is for, and put back what it reads and transformers 5 removed."""
    config, family = model.config, model.config.model_type
    config.position_embedding_type = "absolute"
    config.normalize_before, config.normalize_embedding = False, family == "bart"
    if family in ("t5", "mt5"):
        # The loader scales the states before the head where embeddings are tied; transformers 5 where this says so.
        config.tie_word_embeddings = getattr(config, "scale_decoder_outputs", False)
    if family == "xlm-roberta":
        return SimpleNamespace(config=config, roberta=model.base_model)
    return model if type(model).__name__ == wanted or family == "marian" else model.base_model


def settings(model: Any, _path: str) -> dict[str, Any]:
    """Name the class that runs the model."""
    return {"kind": KINDS[model.config.model_type], "compute_type": "float32"}


def settings_int8(model: Any, path: str) -> dict[str, Any]:
    """Ask for 8 bits."""
    return {**settings(model, path), "compute_type": "int8"}


@torch.no_grad()
def answer(model: Any, probe: Probe) -> Answers:
    """Run the model, or its stack of layers, on a probe: [N, …] over its N real positions."""
    kind, real = KINDS[model.config.model_type], probe["attention_mask"].bool()
    if kind == "Encoder":
        output = model.base_model(**probe)
        pooled = {"pooler_output": output.pooler_output} if _has_pooler(model) else {}
        return {"last_hidden_state": output.last_hidden_state[real], **pooled}
    logits = model(**probe, **without_cache(model)).logits
    if kind == "Generator":
        return {"logits": logits[real]}
    # The decoder of the runtime starts by itself; what is said next is scored.
    ids = probe["decoder_input_ids"]
    said = probe.get("decoder_attention_mask", torch.ones_like(ids))[:, 1:].bool()
    scores = logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return {"log_probs": scores[said]}


class _Stack(nn.Module):
    """The layers of a model, in CTranslate2, in 8 bits."""

    def __init__(self, path: Path, kind: str):
        import ctranslate2

        super().__init__()
        threads = torch.get_num_threads()
        self.runtime = getattr(ctranslate2, kind)(str(path), device="cpu", compute_type="int8", intra_threads=threads)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Any = None, **_settings: Any) -> Any:
        """Run the stack on real positions [B, L]; padding gets zeros. Returns logits or states, by their name."""
        real = attention_mask.bool()

        def lists(ids: Tensor) -> list[list[int]]:
            return [row[mask].tolist() for row, mask in zip(ids, real, strict=True)]

        kinds = {} if token_type_ids is None else {"token_type_ids": lists(token_type_ids)}
        found = self.runtime.forward_batch(lists(input_ids), **kinds)
        states = getattr(found, "last_hidden_state", found)
        given = torch.from_numpy(np.array(states))
        values = given.new_zeros(*real.shape, given.shape[-1])
        values[real] = torch.cat([row[:length] for row, length in zip(given, real.sum(1).tolist(), strict=True)])
        if states is found:
            return CausalLMOutput(logits=values)
        pooled = found.pooler_output
        return BaseModelOutputWithPooling(values, None if pooled is None else torch.from_numpy(np.array(pooled)))


def ask(path: Path, model: Any) -> Ask | None:
    """Make a callable that answers batches with the layers in 8 bits; None for what the runtime can only score."""
    kind = KINDS[model.config.model_type]
    if kind == "Translator":
        return None
    stack = _Stack(path, kind)
    if kind == "Generator":
        return lambda batch: Outputs(stack(**{name: batch[name] for name in ("input_ids", "attention_mask")}).logits)
    own: Any = copy.deepcopy(model)
    if own.base_model is not own:
        setattr(own, own.base_model_prefix, stack)
        return partial(forward, own, wanted=Capture())
    return lambda batch: Outputs(own.sentence_head(stack(**model_inputs(batch))[0], batch["attention_mask"]))


def _has_pooler(model: Any) -> bool:
    return getattr(model.base_model, "pooler", None) is not None


USES = {
    "AutoModelForCausalLM": """model = ctranslate2.Generator(path, compute_type="float32")  # or "int8"
tokens = tokenizer.convert_ids_to_tokens(tokenizer("Some text.").input_ids)
print(tokenizer.decode(model.generate_batch([tokens], max_length=20)[0].sequences_ids[0]))""",
    "AutoModelForSeq2SeqLM": """model = ctranslate2.Translator(path, compute_type="float32")  # or "int8"
tokens = tokenizer.convert_ids_to_tokens(tokenizer("Some text.").input_ids)
found = tokenizer.convert_tokens_to_ids(model.translate_batch([tokens], max_decoding_length=20)[0].hypotheses[0])
print(tokenizer.decode(found, skip_special_tokens=True))""",
}
STATES = """model = ctranslate2.Encoder(path, compute_type="float32")  # or "int8"
ids = tokenizer(["Some text."]).input_ids
states = model.forward_batch(ids).last_hidden_state  # what the head or the pooling reads
print(states.shape)"""


def example(auto_class: str, folder: str) -> str:
    """Write the card's example: what is run depends on the head."""
    return f"""import ctranslate2
from transformers import AutoTokenizer

path = "{folder}/ctranslate2"  # in this folder
tokenizer = AutoTokenizer.from_pretrained(path)
{USES.get(auto_class, STATES)}"""


FORM = Form(
    "CTranslate2, fp32", "ctranslate2", ("ctranslate2",), FOLDER, refuse, write, PROGRAM, answer, example, settings
)
INT8 = replace(FORM, title="CTranslate2, int8", write=None, settings=settings_int8, tolerance=None, ask=ask)
