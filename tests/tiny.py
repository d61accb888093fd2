"""Tiny real models of every known family, built from configs; no network, no downloads."""

from __future__ import annotations

import torch
import transformers
from transformers import AutoConfig

VOCABULARY, HIDDEN, WIDTH, LAYERS = 64, 32, 48, 4

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SEQ2SEQ_SIZES = {
    **{f"{side}_layers": LAYERS for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": WIDTH for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
    **{key: 64 for key in ("max_position_embeddings", "max_source_positions", "max_target_positions")},
    "d_model": HIDDEN,
    "vocab_size": VOCABULARY,
    "num_mel_bins": 8,
    "decoder_start_token_id": 1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "forced_eos_token_id": None,
    "begin_suppress_tokens": None,
}
T5_SIZES = {
    "d_model": HIDDEN,
    "vocab_size": VOCABULARY,
    "d_kv": 8,
    "num_heads": 4,
    "d_ff": WIDTH,
    "num_layers": LAYERS,
    "num_decoder_layers": LAYERS,
    "decoder_start_token_id": 0,
}
GQA = {"num_key_value_heads": 2}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
OWN_SIZES = {
    "roberta": {"pad_token_id": 1, "bos_token_id": 0},
    "xlm-roberta": {"pad_token_id": 1, "bos_token_id": 0},
    "distilbert": {"dim": HIDDEN, "n_heads": 4, "n_layers": LAYERS, "hidden_dim": WIDTH},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8},
    "modernbert": {"global_attn_every_n_layers": 2, "local_attention": 8, "cls_token_id": 1, "sep_token_id": 2},
    "llama": GQA,
    "mistral": GQA,
    "qwen2": GQA,
    "qwen3": {**GQA, "head_dim": 8},
    "gemma2": {**GQA, "head_dim": 8, "sliding_window": 4},
    "gemma3_text": {**GQA, "head_dim": 8, "sliding_window": 4, "sliding_window_pattern": 2},
    "phi3": {**GQA, "original_max_position_embeddings": 64},
    "olmo2": GQA,
    "granite": GQA,
    "smollm3": {**GQA, "no_rope_layer_interval": 2},
    "gpt2": {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 4, "n_positions": 64, "n_inner": WIDTH},
    "opt": {"ffn_dim": WIDTH, "word_embed_proj_dim": HIDDEN},
    "mixtral": {**GQA, **EXPERTS},
    "qwen3_moe": {**GQA, **EXPERTS, "head_dim": 8, "moe_intermediate_size": WIDTH, "mlp_only_layers": [1]},
    "t5": T5_SIZES,
    "t5-gated": {
        **T5_SIZES,
        "feed_forward_proj": "gated-gelu",
        "num_decoder_layers": LAYERS - 1,
        "tie_word_embeddings": False,
    },
    "mt5": T5_SIZES,
    **dict.fromkeys(("bart", "marian", "mbart", "pegasus", "whisper"), SEQ2SEQ_SIZES),
}
NO_ROW = {
    "gptj": {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 4, "n_positions": 64, "n_inner": WIDTH, "rotary_dim": 4},
    "stablelm": {**GQA},
    "cohere": GQA,
    "falcon": {"ffn_hidden_size": WIDTH, "bias": True},
    "phi": {},
    "glm": {**GQA, "head_dim": 8},
}
"""Families that distill finds by their structure."""
DECODERS = (
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2", "granite", "smollm3", "gpt2",
    "gpt_neox", "opt", "mixtral", "qwen3_moe",
)  # fmt: skip
ENCODERS = ("bert", "roberta", "xlm-roberta", "electra", "distilbert", "deberta-v2", "modernbert")
SEQ2SEQ = ("t5", "t5-gated", "mt5", "bart", "marian", "mbart", "pegasus", "whisper")
FORMS = ("llama", "phi3", "gpt_neox", "gpt2", "qwen3_moe", "t5", "t5-gated", "bert", "bart")
"""A family for each form of layer: GLU, fused GLU, two matrices, transposed, experts beside dense layers, T5 with and
without a gate, a norm after the MLP, encoder-decoder."""
PREDICTION_KINDS = {
    **dict.fromkeys(DECODERS, "AutoModelForCausalLM"),
    **dict.fromkeys(ENCODERS, "AutoModelForSequenceClassification"),
    **dict.fromkeys(SEQ2SEQ, "AutoModelForSeq2SeqLM"),
    "whisper": "AutoModelForSpeechSeq2Seq",
    **dict.fromkeys(NO_ROW, "AutoModelForCausalLM"),
}


def tiny_config(family: str, **changes):
    """`t5-gated` is a T5 with a gate and one decoder layer less."""
    common = {} if family in SEQ2SEQ else SIZES
    own = {**OWN_SIZES, **NO_ROW}.get(family, {})
    return AutoConfig.for_model(family.removesuffix("-gated"), **{**common, **own, **changes})


def tiny_model(family: str, seed: int = 0, **changes):
    """A model with a head for language or, for encoders, 3 classes; random weights, biases included."""
    torch.manual_seed(seed)
    if family in ENCODERS:
        changes.setdefault("num_labels", 3)
    model = getattr(transformers, PREDICTION_KINDS[family]).from_config(tiny_config(family, **changes))
    with torch.no_grad():  # fresh biases are zero and norms are one, which would hide a wrong slice
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def tiny_batch(seed: int = 0, rows: int = 3, length: int = 10, *, padded: bool = True):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        for row in range(1, rows):
            mask[row, length - row :] = 0
        ids[mask == 0] = 0
    return {"input_ids": ids, "attention_mask": mask}


def tiny_inputs(model, **settings):
    """A batch that any tiny model takes: what the decoder of an encoder-decoder reads comes with it, and sound."""
    batch = tiny_batch(**settings)
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = batch["input_ids"].flip(1)[:, :5]
    if model.config.model_type == "whisper":
        rows = batch.pop("input_ids").shape[0]
        del batch["attention_mask"]
        batch["input_features"] = torch.randn(rows, 8, 128, generator=torch.Generator().manual_seed(1))
    return batch


def generate(model, use_cache=True):
    """Eight greedy tokens."""
    prompt = {name: tensor for name, tensor in tiny_inputs(model, padded=False).items() if "decoder" not in name}
    own = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "num_beams": 1, "use_cache": use_cache}
    return model.generate(**prompt, **own)


def cut_by_hand(teacher, kept, widths=None, encoder=None):
    """A student with these layers (`encoder`: of the encoder; default the same) and the last neurons of each MLP."""
    from distill.models.family import layers_of, layout_of
    from distill.models.mlp import mlps_of
    from distill.models.plan import KeptUnits, LayerPlan, StudentPlan
    from distill.student import build_student

    def stack(side, kept):
        mlps = [mlps_of(teacher, side)[index] for index in kept]
        wanted = [mlp.width for mlp in mlps] if widths is None else (list(widths) * len(mlps))[: len(mlps)]
        layers = []
        for index, mlp, width in zip(kept, mlps, wanted, strict=True):
            last = list(range(mlp.width - width, mlp.width))
            neurons = [last] * mlp.experts if mlp.experts else last
            kept = KeptUnits(of=mlp.width, units=neurons if width < mlp.width else None)
            layers.append(LayerPlan(teacher_layer=index, kept={"mlp": kept}))
        return layers

    two = "encoder" in layout_of(teacher).sides
    plan = StudentPlan(
        model_type=teacher.config.model_type,
        teacher_layers=len(layers_of(teacher)),
        layers=stack("main", kept),
        teacher_encoder_layers=len(layers_of(teacher, "encoder")) if two else None,
        encoder_layers=stack("encoder", encoder or kept) if two else None,
        layer_policy="explicit",
        mlp_score="by hand",
        mlp_allocation="by hand",
    )
    return build_student(teacher, plan)


def tiny_corpus(folder, *overrides, spec=None, seed=None, looks=False, packs=False):
    """The corpus of the recipe in a folder, prepared in a new folder beside it; `spec` instead of its section data."""
    import tempfile
    from pathlib import Path

    from distill.data import TASKS
    from distill.data.prepare import prepare
    from distill.data.rows import Order
    from distill.models.load import load_tokenizer
    from distill.recipe import load_recipe

    recipe = load_recipe(folder / "recipe.yaml", overrides)
    spec, tokenizer = spec or recipe.data, load_tokenizer(folder / "teacher")
    seed = recipe.seed if seed is None else seed
    order = Order(TASKS[spec.task](), spec, tokenizer, seed, folder, looks=looks, packs=packs)
    return prepare(order, Path(tempfile.mkdtemp(dir=folder)))


WORDS = ("red", "green", "blue", "cat", "dog", "fish", "runs", "sleeps", "eats", "fast", "slow", "here", "there")
CLASSES = {"cat": "mammal", "dog": "mammal", "fish": "swimmer"}

RECIPE = """\
name: tiny
seed: 3
teacher:
  model: ./teacher
  init: random
  fit: {steps: 12, batch_size: 8, micro_batch_size: 4, lr: 3e-3, save_every: 4}
student:
  layers: {keep: 2, choose: every}
  mlp: {keep: 0.5, multiple_of: 8}
  calibration: {examples: 16, batch_size: 8}
data: {source: ./data.jsonl, task: classification, labelled: 24, max_length: 16}
losses:
  - {match: labels, weight: 0.3}
  - {match: logits, temperature: 2.0}
  - {match: hidden}
training: {steps: 12, batch_size: 8, micro_batch_size: 4, lr: 1e-3, save_every: 4, evaluate_every: 6, log_every: 2}
evaluation: {batch_size: 16}
release: {license: apache-2.0}
"""


def tiny_project(folder, recipe: str = RECIPE, family: str = "bert"):
    """A recipe with its own teacher folder (config and tokenizer) and data file; returns the recipe's path."""
    import json
    import random

    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*specials, *WORDS])}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "eos_token": "[SEP]"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=64, **names)
    tokenizer.save_pretrained(folder / "teacher")
    tiny_config(family, pad_token_id=0).save_pretrained(folder / "teacher")
    chooser = random.Random(0)
    texts = {" ".join(chooser.choices(WORDS, k=chooser.randint(3, 14))) for _ in range(150)}
    rows = [(text, next((CLASSES[w] for w in text.split() if w in CLASSES), "none")) for text in sorted(texts)]
    lines = [json.dumps({"text": text, "label": label}) + "\n" for text, label in rows]
    (folder / "data.jsonl").write_text("".join(lines))
    (folder / "recipe.yaml").write_text(recipe)
    return folder / "recipe.yaml"
