"""Adapters of low rank: they alone learn, and in the end the model has no trace of them but its weights."""

from __future__ import annotations

import importlib.util
import shutil

import pytest
import torch
import transformers
from launched import launched
from peft.tuners.lora import LoraLayer
from running import dropped, published, run
from safetensors.torch import load_file
from tiny import FORMS, tiny_batch, tiny_config, tiny_model
from transformers import AutoModelForSequenceClassification

from distill.errors import InputError
from distill.models.forward import Capture, forward
from distill.models.load import ModelHead, load_model
from distill.models.trainable import mark_drawn
from distill.pipeline import train_checks
from distill.recipe.schema import Training
from distill.recipe.sections import Lora
from distill.training.lora import Adapters, adapted_names
from distill.training.setup import check_launch_keeps
from distill.training.shards import read

BF16 = {"weights": "bf16", "precision": "bf16"}


def drawn(model):
    """Give every adapter an effect: its B starts at zero."""
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)


@pytest.mark.parametrize("family", FORMS)
def test_in_every_form_of_layer_adapters_are_seen_by_the_forward_pass_and_merged_exactly(family):
    model, plain = tiny_model(family).eval(), tiny_model(family).eval()
    batch = tiny_batch()
    two = model.config.is_encoder_decoder
    batch |= {"labels": batch["input_ids"]} if two else {}
    wanted = Capture(hidden=(0, 2), relations=(1,), stop_at_head=True)
    before = forward(model, batch, wanted)
    adapters = Adapters(model, Lora(rank=3, alpha=6))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if "lora_" in name
    }
    untouched = forward(model, batch, wanted)
    torch.testing.assert_close(untouched.hidden[2], before.hidden[2], rtol=1e-3, atol=1e-5)  # rounding of T5's bias
    drawn(model)
    adapted = forward(model, batch, wanted)
    assert (adapted.hidden[0] - before.hidden[0]).abs().max() > 1e-3
    assert (adapted.relations[1][0] - before.relations[1][0]).abs().max() > 1e-4
    adapters.merge()
    after = forward(model, batch, wanted)
    ends = [each.logits if each.last is None else each.head(each.last) for each in (adapted, after)]
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-4, atol=1e-4)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert str(model) == str(plain) and vars(model).keys() == vars(plain).keys()


def test_a_merged_weight_is_the_weight_and_the_scaled_product():
    model, plain = tiny_model("llama"), tiny_model("llama")
    adapters = Adapters(model, Lora(rank=2, alpha=5, targets=["q_proj"]))
    drawn(model)
    layer = model.model.layers[1].self_attn.q_proj
    product = 2.5 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    adapters.merge()
    attention = plain.model.layers[1].self_attn
    torch.testing.assert_close(model.model.layers[1].self_attn.q_proj.weight, attention.q_proj.weight + product)
    assert torch.equal(model.model.layers[1].self_attn.k_proj.weight, attention.k_proj.weight)


@pytest.mark.parametrize(
    ("family", "targets", "count"),
    [
        ("llama", "all-linear", 4 * 7),
        ("llama", ["q_proj", "v_proj"], 4 * 2),
        ("llama", ["*.1.mlp.*"], 3),
        ("llama", ["layers.[01].self_attn.o_proj"], 2),
        ("gpt2", "all-linear", 4 * 4),
        ("phi3", "all-linear", 4 * 4),
        ("bert", ["pooler.dense"], 1),
        ("bart", ["encoder.*.fc1"], 4),
    ],
)
def test_targets_are_names_their_ends_or_patterns(family, targets, count):
    assert len(adapted_names(tiny_model(family), Lora(targets=targets))) == count


def test_targets_that_cannot_be_adapted_are_refused():
    model = tiny_model("llama")
    with pytest.raises(
        InputError, match=r"lora\.targets: 'embed_tokens' matches no linear map; there are e\.g\. model"
    ):
        Adapters(model, Lora(targets=["q_proj", "embed_tokens"]))
    with pytest.raises(InputError, match="'lm_head' is the output head"):
        Adapters(model, Lora(targets=["lm_head"]))
    with pytest.raises(InputError, match=r"q_proj\.weight is adapted as well"):
        Adapters(model, Lora(also=["*.q_proj.weight"]))
    with pytest.raises(InputError, match=r"'\*nothing\*' matches no parameter"):
        Adapters(model, Lora(also=["*nothing*"]))
    assert not any(isinstance(module, LoraLayer) for module in model.modules())


def test_a_line_says_what_learns_and_that_experts_do_not():
    model = tiny_model("mixtral")
    line = Adapters(model, Lora(rank=1)).describe()
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"; {learning:,} of " in line and line.endswith("experts stay as they are (gate_up_proj, down_proj)")
    assert "experts" not in Adapters(tiny_model("llama"), Lora()).describe()


def test_what_was_drawn_at_random_learns_in_full():
    model = tiny_model("bert")
    mark_drawn(model, ["classifier.weight", "classifier.bias"])
    Adapters(model, Lora(also=["*.LayerNorm.weight"]))
    whole = {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
    assert {"classifier.weight", "classifier.bias", "bert.embeddings.LayerNorm.weight"} <= whole
    assert all("classifier" in name or name.endswith("LayerNorm.weight") for name in whole)


def test_a_head_that_a_teacher_lacks_is_loaded_as_drawn_and_learns_in_full(tmp_path):
    transformers.AutoModel.from_config(tiny_config("bert")).save_pretrained(tmp_path)
    head = ModelHead("AutoModelForSequenceClassification", ["a", "b", "c"])
    model = load_model(tmp_path, head, allow_untrained_head=True, random_seed=0)
    Adapters(model, Lora())
    whole = {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
    assert whole == {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize("weights", [{}, BF16], ids=["fp32", "bf16"])
def test_adapters_alone_learn_are_checkpointed_and_resume_bitwise(weights, corpus, tmp_path):
    def trained(folder):
        model = tiny_model("bert", num_labels=len(corpus.classes), **dropped(0.1))
        teacher = tiny_model("bert", seed=1, hidden_size=48)
        lora = {"rank": 2, "dropout": 0.2, "also": ["*.LayerNorm.bias"]}
        return run(corpus, folder, model=model, wide=teacher, lora=lora, ema=0.5, ema_release=True, **weights)

    whole, said = trained(tmp_path / "whole")
    assert said[0].startswith("  lora: adapters on 24 linear maps; ")
    trained(tmp_path / "parts")
    shutil.rmtree(published(tmp_path / "parts/checkpoints")[-1])
    trained(tmp_path / "parts")
    model, _ = trained(tmp_path / "parts")
    start = tiny_model("bert", num_labels=len(corpus.classes), **dropped(0.1)).state_dict()
    assert model.state_dict().keys() == start.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, whole.state_dict()[name]), name
        moved = name.endswith("LayerNorm.bias") or (".layer." in name and "LayerNorm" not in name and "weight" in name)
        assert torch.equal(tensor, start[name]) != moved, name
        assert tensor.dtype == torch.float32
    saved = read(published(tmp_path / "whole/checkpoints")[-1])
    parameters = {name for name in saved["model"] if not name.endswith("_ids")}
    assert all("lora_" in name or "LayerNorm.bias" in name or "projections" in name for name in parameters)
    adapters = {tensor.dtype for name, tensor in saved["model"].items() if "lora_" in name}
    assert adapters == {torch.float32}


def test_a_model_that_is_measured_in_training_has_its_adapters(corpus, tmp_path):
    seen = []

    def look(model, _stopped):
        ids = torch.arange(1, 9)[None]
        seen.append(
            forward(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, Capture()).logits.detach()
        )
        return {"accuracy": 0.5}

    job = {"evaluate": look}
    model, _ = run(corpus, tmp_path, lora={"rank": 4}, lr=1e-2, evaluate_every=3, job=job)
    assert len(seen) == 2 and (seen[1] - seen[0]).abs().max() > 1e-3
    ids = torch.arange(1, 9)[None]
    final = forward(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, Capture()).logits
    torch.testing.assert_close(final, seen[1], rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_goes_with_adapters(corpus, tmp_path):
    plain, _ = run(corpus, tmp_path / "plain", lora={"rank": 2})
    less, _ = run(corpus, tmp_path / "less", lora={"rank": 2}, gradient_checkpointing=True)
    for a, b in zip(plain.parameters(), less.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp-lora", "fsdp-lora", "fsdp-sharded-lora"])
def test_two_processes_train_the_adapters_that_one_does(kind, tmp_path):
    from test_processes import assert_close

    launched(1, tmp_path / "one", "ddp-lora")
    launched(2, tmp_path / "two", kind, "8:0", codes=[75, 75])
    assert "continuing after step 8" in launched(2, tmp_path / "two", kind)
    assert_close(tmp_path / "two", tmp_path / "one")
    exported = AutoModelForSequenceClassification.from_pretrained(tmp_path / "two/exported")
    final = load_file(tmp_path / "two/final.safetensors")
    assert all(torch.equal(tensor, final[name]) for name, tensor in exported.state_dict().items())


def test_deepspeed_is_refused_with_what_to_do(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(InputError, match=r"training\.lora does not go with DeepSpeed: launch it with DDP or FSDP2"):
        check_launch_keeps(Training(steps=1, lora={}))


def test_packages_that_are_not_installed_are_named_with_their_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"^teacher\.fit\.lora needs peft: pip install 'distill\[lora\]'$"):
        train_checks.check_optimization("teacher.fit", Training(steps=1, lora={}), "sequence")
    with pytest.raises(InputError, match=r"adamw_8bit needs bitsandbytes: pip install 'distill\[int8\]'"):
        train_checks.check_optimization("training", Training(steps=1, optimizer="adamw_8bit"), "sequence")
    train_checks.check_optimization("training", Training(steps=1), "sequence")


def test_a_pooler_that_the_vectors_do_not_depend_on_is_not_adapted():
    model = transformers.AutoModel.from_config(tiny_config("bert"))
    model.sentence_head = torch.nn.Identity()
    with pytest.raises(InputError, match=r"'dense' matches pooler\.dense, which the vectors do not depend on"):
        adapted_names(model, Lora(targets=["dense"]))
