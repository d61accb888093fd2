"""The head and the rows it reads must give the model's own logits, for every family that has such a head."""

from __future__ import annotations

import pytest
import torch
import transformers
from language_models import FAMILIES, SEQ2SEQ, SIZES, language_model
from tiny import tiny_batch
from transformers import AutoConfig

from distill.losses.chunked import HeadInput, chunks
from distill.models.forward import Capture, forward
from distill.models.head import OutputHead, class_head, output_head, stop_at_head


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_rows_and_head_give_the_models_own_logits(family):
    model, batch = language_model(family), tiny_batch(padded=False)
    if family in SEQ2SEQ:
        batch["decoder_input_ids"] = tiny_batch(seed=1, padded=False)["input_ids"]
    expected = model(**batch).logits
    found = forward(model, batch, Capture(stop_at_head=True))
    assert found.logits is None and found.last.shape[:2] == expected.shape[:2]
    torch.testing.assert_close(found.head(found.last), expected, rtol=1e-5, atol=1e-6)
    rows = HeadInput(found.last.flatten(0, 1), found.head)
    for part, (logits,) in chunks([rows], 7):
        torch.testing.assert_close(logits, expected.flatten(0, 1)[part], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model(**batch).logits, expected, rtol=0, atol=0)  # the model is as it was


def test_a_cohere_scale_is_part_of_the_head():
    model = transformers.AutoModelForCausalLM.from_config(AutoConfig.for_model("cohere", **SIZES, logit_scale=0.25))
    assert output_head(model).scale == 0.25


def test_a_model_without_a_vocabulary_keeps_its_logits():
    config = AutoConfig.for_model("bert", **{key: value for key, value in SIZES.items() if "key" not in key})
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    assert forward(model, tiny_batch(), Capture(stop_at_head=True)).logits.shape == (3, 2)


def test_a_forward_pass_that_fails_leaves_the_head_in_place():
    model = language_model("llama")
    with pytest.raises(RuntimeError), stop_at_head(model):
        raise RuntimeError
    assert "forward" not in model.lm_head.__dict__


@torch.no_grad()
def test_a_half_precision_head_gives_fp32_logits_of_its_own_numbers():
    draw = torch.Generator().manual_seed(0)
    weight, rows = (torch.randn(shape, generator=draw).bfloat16() for shape in [(50, 16), (9, 16)])
    before = torch.backends.mkldnn.matmul.fp32_precision
    ((_, (logits,)),) = chunks(
        [HeadInput(rows, OutputHead(weight, bias=torch.ones(50, dtype=torch.bfloat16), scale=2.0))]
    )
    assert logits.dtype == torch.float32 and torch.backends.mkldnn.matmul.fp32_precision == before
    torch.testing.assert_close(logits.double(), 2 * rows.double() @ weight.double().T + 1, rtol=1e-6, atol=1e-5)


KINDS = ("SequenceClassification", "TokenClassification", "QuestionAnswering")


def class_models():
    """(family, Auto class) for every model with classes that transformers has of the known families."""
    kinds = [(kind, getattr(transformers, f"AutoModelFor{kind}")._model_mapping) for kind in KINDS]
    configs = [(family, type(AutoConfig.for_model(family))) for family in FAMILIES]
    return [
        (family, f"AutoModelFor{kind}")
        for family, config in configs
        for kind, known in kinds
        if config in known and (family[-2:], kind) != ("t5", "TokenClassification")
    ]  # an encoder alone


def class_model(family, auto_class):
    torch.manual_seed(0)
    config = language_model(family).config
    config.num_labels = 2 if auto_class.endswith("Answering") else 3
    return getattr(transformers, auto_class).from_config(config).eval()


ONE_OF_EACH = [
    ("bert", "AutoModelForSequenceClassification"),
    ("gpt2", "AutoModelForTokenClassification"),
    ("bart", "AutoModelForQuestionAnswering"),
]


@pytest.mark.parametrize(
    ("family", "auto_class", "how"),
    [(*model, "bf16") for model in class_models()] + [(*model, "autocast") for model in ONE_OF_EACH],
)
@torch.no_grad()
def test_logits_of_classes_are_fp32_products_of_what_the_last_map_reads(family, auto_class, how):
    model, batch = class_model(family, auto_class), tiny_batch(padded=False)
    batch["input_ids"][:, -1] = 2  # the end that a BART looks for
    head, plain = class_head(model), forward(model, batch, Capture()).logits
    expected = model(**batch)
    expected = (
        torch.stack([expected.start_logits, expected.end_logits], 1) if "start_logits" in expected else expected.logits
    )
    assert torch.equal(plain, expected) and "forward" not in head.__dict__
    calls = []
    handle = head.register_forward_hook(lambda _module, inputs, output: calls.append((inputs[0], output)))
    if how == "bf16":
        model.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        found = forward(model, batch, Capture()).logits
    handle.remove()
    ((read, made),) = calls
    bias = None if head.bias is None else head.bias.double()
    by_hand = torch.nn.functional.linear(read.double(), head.weight.double(), bias)
    torch.testing.assert_close(made.double(), by_hand, rtol=1e-6, atol=1e-6)
    assert found.dtype == torch.float32 and torch.isin(found, made).all()  # they are the logits
    assert not torch.equal(found, found.bfloat16().float()) and "forward" not in head.__dict__


def test_models_without_classes_have_no_head_of_classes():
    assert class_head(language_model("llama")) is None
    assert class_head(transformers.AutoModel.from_config(language_model("bert").config)) is None
