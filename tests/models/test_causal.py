"""Whether a model sees what it is to predict: told from its config, and tried."""

from __future__ import annotations

import re

import pytest
import torch
import transformers
from tiny import DECODERS, NO_ROW, tiny_config, tiny_model, tiny_project
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.models.rembert import modeling_rembert

from distill.cli import main
from distill.errors import InputError, RecipeError
from distill.models.causal import check_causal
from distill.recipe import load_recipe
from distill.recipe.locate import DECODER_FLAGS, ENCODERS, teacher_size

LANGUAGE_MODEL = """\
name: tiny
teacher: {model: ./teacher}
student:
  layers: {keep: 2, choose: even}
  mlp: {keep: 0.5, multiple_of: 8}
data: {source: ./data.jsonl, task: causal_lm, max_length: 16}
losses:
  - {match: logits}
training: {steps: 2, batch_size: 8}
release: {license: apache-2.0}
"""


def model_of(family, auto="AutoModelForCausalLM", **changes):
    torch.manual_seed(0)
    return getattr(transformers, auto).from_config(tiny_config(family, **changes)).eval()


@pytest.mark.parametrize("family", [*DECODERS, *NO_ROW])
def test_decoders_pass_the_trial(family):
    check_causal(tiny_model(family))
    check_causal(tiny_model(family).bfloat16())


SWITCHED = ["bert", "roberta", "xlm-roberta", "electra", "camembert"]
if hasattr(modeling_rembert, "create_causal_mask"):  # without it RemBERT says that it is a decoder, and sees everything
    SWITCHED.append("rembert")


@pytest.mark.parametrize("family", SWITCHED)
def test_families_with_a_switch_are_what_it_says(family, tmp_path):
    for is_decoder in (False, True):
        model = model_of(family, is_decoder=is_decoder)
        model.config.save_pretrained(tmp_path)
        assert teacher_size(tmp_path).both_ways is not is_decoder
        if is_decoder:
            check_causal(model)
            continue
        with pytest.raises(InputError, match=rf"in this {family} a token sees those after it"):
            check_causal(model)


@pytest.mark.parametrize("family", ["modernbert", "distilbert", "deberta-v2", "albert", "mpnet"])
def test_encoders_fail_the_trial(family):
    model = model_of(family, "AutoModelForMaskedLM")
    with pytest.raises(InputError, match="a token sees those after it"):
        check_causal(model)
    for tensor in model.parameters():  # as in a trained one, what others say is more than rounding
        tensor.data *= 5 if tensor.ndim == 2 else 1
    with pytest.raises(InputError, match="a token sees those after it"):
        check_causal(model.bfloat16())


def test_a_decoder_that_was_switched_to_look_both_ways_fails_it_too(tmp_path):
    model = tiny_model("gemma3_text", use_bidirectional_attention=True)
    with pytest.raises(InputError, match="a token sees those after it"):
        check_causal(model)
    model.config.save_pretrained(tmp_path)
    assert teacher_size(tmp_path).both_ways


def test_every_family_with_a_head_for_masked_tokens_is_known_as_an_encoder():
    named = {name for name in MODEL_FOR_MASKED_LM_MAPPING_NAMES if not CONFIG_MAPPING[name]().is_encoder_decoder}
    assert named - {*ENCODERS, *DECODER_FLAGS} == set()
    assert {*ENCODERS} & {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES} == {"xlnet"}
    for family, flag in DECODER_FLAGS.items():
        assert hasattr(CONFIG_MAPPING[family](), flag)


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("bert", r"bert is an encoder: .* its config.json must say is_decoder: true"),
        ("modernbert", r"modernbert is an encoder: .* name a decoder, e.g. a Llama or GPT-2$"),
        ("t5", "t5 is an encoder-decoder, and task: causal_lm needs a decoder alone"),
        ("bart", "bart is an encoder-decoder"),
    ],
)
def test_a_recipe_with_another_teacher_than_a_decoder_is_refused(family, words, tmp_path):
    recipe = tiny_project(tmp_path, LANGUAGE_MODEL, family=family)
    model_of(family, "AutoModel").save_pretrained(tmp_path / "teacher")
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe)
    (problem,) = caught.value.problems
    assert problem.key == "teacher.model"
    assert re.search(words, f"{problem.message} {problem.fix}")
    load_recipe(recipe, ["data.task=classification"])


def test_what_no_config_says_ends_the_run_with_code_2_before_anything_is_trained(tmp_path, capsys, monkeypatch):
    recipe = tiny_project(tmp_path, LANGUAGE_MODEL, family="bert")
    model_of("bert").save_pretrained(tmp_path / "teacher")
    monkeypatch.setattr("distill.recipe.locate.DECODER_FLAGS", {})  # a family that nobody listed
    assert main(["run", str(recipe), "--out", str(tmp_path / "run")]) == 2
    assert "in this bert a token sees those after it" in capsys.readouterr().err
    assert not (tmp_path / "run/calibration.safetensors").exists()
