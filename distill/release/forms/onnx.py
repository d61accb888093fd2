"""ONNX: `onnx/model.onnx`, exported by transformers with batch and length free, and its int8 in `onnx/model_int8.onnx`.

The graph is one forward pass without a key-value cache. Of a model of sentence vectors it gives the states of the last
layer and the vector of each text. The names of the files are those that transformers.js and sentence-transformers look
for in a folder of transformers.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill.models.forward import Outputs, with_decoder_inputs, without_cache
from distill.release.forms.form import Answers, Ask, Form, Probe, always

FILE, INT8_FILE = "onnx/model.onnx", "onnx/model_int8.onnx"
ONE_FILE = 1_500_000_000
"""Bytes of weights that go into the file itself; more lie beside it (protobuf ends at 2 GB)."""
BY_POSITION = ("start_logits", "end_logits")
"""Outputs [B, L]; the others with a value per position are [B, L, …]."""
PROGRAM = """
import json, sys
import onnxruntime
from safetensors.numpy import load_file, save_file
asked = json.loads(sys.argv[1])
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = asked["threads"]
session = onnxruntime.InferenceSession(asked["path"], options, providers=["CPUExecutionProvider"])
names = [each.name for each in session.get_outputs()]
for probe, answer in asked["pairs"]:
    given = load_file(probe)
    found = session.run(names, {each.name: given[each.name] for each in session.get_inputs()})
    save_file(dict(zip(names, found)), answer)
if {"torch", "transformers", "distill"} & set(sys.modules):
    sys.exit("something besides the runtime was imported")
"""


class Vectors(nn.Module):
    """A model of sentence vectors whose outputs are the states of its last layer, and the vector of each text."""

    def __init__(self, model: Any):
        super().__init__()
        self.model, self.config, self.pool = model, model.config, model.sentence_head

    def forward(self, attention_mask: Tensor, **inputs: Tensor) -> dict[str, Tensor]:
        """Run the model and pool: states [B, L, D], vectors [B, D]."""
        states = self.model(attention_mask=attention_mask, **inputs)[0]
        return {"last_hidden_state": states, "sentence_embedding": self.pool(states, attention_mask)}


def exported(model: Any) -> Any:
    """Return the module whose outputs the graph has."""
    return model if getattr(model, "sentence_head", None) is None else Vectors(model).eval()


@contextmanager
def _quietly() -> Iterator[None]:
    """Silence what torch and onnxscript say about their own code on every export."""
    before = logging.root.manager.disable
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)


def write(folder: Path, model: Any, preprocessors: Sequence[Any], probe: Probe) -> None:
    """Export a model and save what makes its inputs beside it."""
    import onnx
    import onnx_ir
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    # A dimension of 1 would be taken for one that is always 1.
    inputs = {name: torch.cat([tensor, tensor]) if len(tensor) == 1 else tensor for name, tensor in probe.items()}
    for module in model.modules():  # T5 keeps a config for each stack
        if hasattr(getattr(module, "config", None), "use_cache"):
            module.config.use_cache = False
    with _quietly(), torch.no_grad():
        found = OnnxExporter().export(exported(model), {**inputs, **without_cache(model)}, OnnxConfig(dynamic=True))
    program = getattr(found, "program", found)  # transformers before 5.20 gives torch's program itself
    path = folder / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    beside = f"{path.name}_data" if size > ONE_FILE else None
    onnx_ir.save(getattr(program, "model", program), path, external_data=beside)
    proto = onnx.load(path, load_external_data=False)
    del proto.graph.value_info[:]  # shapes that runtimes infer anew; the quantiser trips over those of its matrices
    onnx.save(proto, path)
    for each in preprocessors:
        each.save_pretrained(path.parent)


def write_int8(folder: Path, model: Any, preprocessors: Sequence[Any], probe: Probe) -> None:
    """Round the matrices of the exported graph to 8 bits per column; what they multiply is rounded as it comes."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    source, alone = folder / FILE, not (folder / FILE).exists()
    if alone:
        write(folder, model, preprocessors, probe)
    data = source.with_name(f"{source.name}_data")
    with _quietly():
        quantize_dynamic(
            source,
            folder / INT8_FILE,
            per_channel=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=data.exists(),
        )
    for file in (source, data) if alone else ():
        file.unlink(missing_ok=True)


@torch.no_grad()
def answer(model: Any, probe: Probe) -> Answers:
    """Run the model itself on a probe, without a cache."""
    output = exported(model)(**probe, **without_cache(model))
    return {name: at_real_positions(name, tensor, probe) for name, tensor in output.items()}


def at_real_positions(name: str, tensor: Tensor, probe: Probe) -> Tensor:
    """Set an output to 0 at padding, where runtimes may say what they like."""
    of_decoder = "decoder_input_ids" in probe and not name.startswith("encoder_")
    mask = probe.get("decoder_attention_mask" if of_decoder else "attention_mask")
    if mask is None or not (tensor.ndim == 3 or name in BY_POSITION) or mask.shape != tensor.shape[:2]:
        return tensor
    return tensor.masked_fill(~mask.bool().reshape(*mask.shape, *[1] * (tensor.ndim - 2)), 0)


def ask(path: Path, model: Any) -> Ask:
    """Open a session that answers batches in the place of a model."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_outputs()]

    def run(batch: dict[str, Tensor]) -> Outputs:
        inputs = with_decoder_inputs(model, batch)
        found = session.run(names, {each.name: inputs[each.name].numpy() for each in session.get_inputs()})
        by_name = {name: torch.from_numpy(values) for name, values in zip(names, found, strict=True)}
        if "start_logits" in by_name:
            return Outputs(torch.stack([by_name["start_logits"], by_name["end_logits"]], 1))
        return Outputs(by_name["sentence_embedding" if "sentence_embedding" in by_name else "logits"])

    return run


def example(_auto_class: str, folder: str, file: str = FILE) -> str:
    """Write the card's example for a file."""
    return f"""import onnxruntime
from transformers import AutoTokenizer

folder = "{folder}"  # this folder
tokenizer = AutoTokenizer.from_pretrained(f"{{folder}}/onnx")
session = onnxruntime.InferenceSession(f"{{folder}}/{file}")
inputs = tokenizer(["Some text.", "Another one."], padding=True, return_tensors="np")
outputs = session.run(None, {{each.name: inputs[each.name] for each in session.get_inputs()}})
print([each.shape for each in outputs])"""


PACKAGES = ("onnx", "onnxscript", "onnxruntime")
FORM = Form("ONNX, fp32", "onnx", PACKAGES, FILE, always, write, PROGRAM, answer, example)
INT8 = Form(
    "ONNX, int8", "onnx", PACKAGES, INT8_FILE, always, write_int8, PROGRAM, answer, partial(example, file=INT8_FILE),
    tolerance=None, ask=ask,
)  # fmt: skip
