"""The head and the rows it reads must give the model's own logits, for every family that has such a head."""

from __future__ import annotations

import pytest
import torch
import transformers
from language_models import FAMILIES, SEQ2SEQ, SIZES, language_model
from tiny import tiny_batch
from transformers import AutoConfig

from distill.losses.chunked import Side, chunks
from distill.models.head import OutputHead, output_head, stopped_at_head
from distill.models.outputs import Wanted, run


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_rows_and_head_give_the_models_own_logits(family):
    model, batch = language_model(family), tiny_batch(padded=False)
    if family in SEQ2SEQ:
        batch["decoder_input_ids"] = tiny_batch(seed=1, padded=False)["input_ids"]
    expected = model(**batch).logits
    found = run(model, batch, Wanted(stop_at_head=True))
    assert found.logits is None and found.last.shape[:2] == expected.shape[:2]
    torch.testing.assert_close(found.head(found.last), expected, rtol=1e-5, atol=1e-6)
    rows = Side(found.last.flatten(0, 1), found.head)
    for part, (logits,) in chunks([rows], 7):
        torch.testing.assert_close(logits, expected.flatten(0, 1)[part], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model(**batch).logits, expected, rtol=0, atol=0)  # the model is as it was


def test_a_cohere_scale_is_part_of_the_head():
    model = transformers.AutoModelForCausalLM.from_config(AutoConfig.for_model("cohere", **SIZES, logit_scale=0.25))
    assert output_head(model).scale == 0.25


def test_a_model_without_a_vocabulary_keeps_its_logits():
    config = AutoConfig.for_model("bert", **{key: value for key, value in SIZES.items() if "key" not in key})
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    assert run(model, tiny_batch(), Wanted(stop_at_head=True)).logits.shape == (3, 2)


def test_a_forward_pass_that_fails_leaves_the_head_in_place():
    model = language_model("llama")
    with pytest.raises(RuntimeError), stopped_at_head(model):
        raise RuntimeError
    assert "forward" not in model.lm_head.__dict__


@torch.no_grad()
def test_a_half_precision_head_gives_fp32_logits_of_its_own_numbers():
    draw = torch.Generator().manual_seed(0)
    weight, rows = (torch.randn(shape, generator=draw).bfloat16() for shape in [(50, 16), (9, 16)])
    before = torch.backends.mkldnn.matmul.fp32_precision
    ((_, (logits,)),) = chunks([Side(rows, OutputHead(weight, bias=torch.ones(50, dtype=torch.bfloat16), scale=2.0))])
    assert logits.dtype == torch.float32 and torch.backends.mkldnn.matmul.fp32_precision == before
    torch.testing.assert_close(logits.double(), 2 * rows.double() @ weight.double().T + 1, rtol=1e-6, atol=1e-5)
