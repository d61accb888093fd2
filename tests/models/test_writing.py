"""What a model writes to a prompt: its own predictions, cut where they end, whatever else is in the batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import DECODERS, SEQ2SEQ, VOCABULARY, tiny_model
from transformers import GenerationConfig

from distill.models.forward import with_decoder_inputs
from distill.models.generate import Writing, end_tokens

FAMILIES = [family for family in (*DECODERS, *SEQ2SEQ) if family != "whisper"]
GREEDY = Writing(12, 0.0, frozenset({2, 7}), 0, length=40, vocabulary=60)


def drawn_prompts(*lengths):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(8, 60, (length,), generator=generator) for length in lengths]


def predicted(model, prompt, answer):
    """Logits [T, V] for each token of an answer, from one pass over a row of its own, without cache and padding."""
    with torch.no_grad():
        if not model.config.is_encoder_decoder:
            return model(torch.cat([prompt, answer])[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
        batch = {"input_ids": prompt[None], "attention_mask": torch.ones_like(prompt[None]), "labels": answer[None]}
        inputs = with_decoder_inputs(model, batch)
        del inputs["labels"]
        return model(**inputs, use_cache=False).logits[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_writes_what_it_predicts_whatever_prompts_are_beside_it(family):
    model, prompts = tiny_model(family), drawn_prompts(5, 9, 2)
    writing = replace(GREEDY, length=None) if model.config.is_encoder_decoder else GREEDY
    for prompt, answer in zip(prompts, writing(model, prompts), strict=True):
        assert torch.equal(predicted(model, prompt, answer)[:, :60].argmax(-1), answer)
        ends = [at for at, token in enumerate(answer.tolist()) if token in (2, 7)]
        assert ends in ([], [len(answer) - 1]) and (ends or len(answer) == 12)


def test_an_answer_ends_with_the_first_of_several_ends_or_with_its_room():
    model, (prompt, longer) = tiny_model("llama"), drawn_prompts(5, 36)
    whole = replace(GREEDY, ends=frozenset())(model, [prompt, longer])
    assert [len(answer) for answer in whole] == [12, 4]  # 40 - 36
    ends = frozenset(whole[0][[3, 6]].tolist())
    cut = replace(GREEDY, ends=ends)(model, [prompt])[0]
    first = next(at for at, token in enumerate(whole[0].tolist()) if token in ends)
    assert torch.equal(cut, whole[0][: first + 1])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_no_position_is_beyond_those_of_the_model(family):
    model, prompts = tiny_model(family), drawn_prompts(60, 5, 62, 63)  # it has 64
    model.generation_config.max_length = 64
    answers = replace(GREEDY, length=64, ends=frozenset(), max_new_tokens=20)(model, prompts)
    assert [len(answer) for answer in answers] == [4, 20, 2, 1]
    for prompt, answer in zip(prompts, answers, strict=True):
        assert torch.equal(predicted(model, prompt, answer)[:, :60].argmax(-1), answer)


def test_settings_of_the_model_do_not_bend_what_it_writes():
    model, prompts = tiny_model("llama"), drawn_prompts(5, 9)
    plain = GREEDY(model, prompts)
    own = GenerationConfig(repetition_penalty=5.0, no_repeat_ngram_size=2, min_new_tokens=9, num_beams=3, top_k=1)
    model.generation_config = own
    assert all(torch.equal(one, other) for one, other in zip(plain, GREEDY(model, prompts), strict=True))
    assert model.generation_config is own


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_tokens_are_drawn_from_the_predictions_at_the_temperature(temperature):
    model, (prompt,) = tiny_model("llama", initializer_range=0.3), drawn_prompts(5)
    logits = model(prompt[None]).logits[0, -1, :40].detach()
    expected = (logits / temperature).softmax(-1)
    torch.manual_seed(0)
    found = replace(GREEDY, max_new_tokens=1, temperature=temperature, vocabulary=40)(model, [prompt] * 4000)
    shares = torch.bincount(torch.cat(found), minlength=VOCABULARY) / 4000
    assert shares[40:].sum() == 0  # a padded head has no tokens there
    assert (shares[:40] - expected).abs().sum() / 2 < 0.06 < (logits.softmax(-1) - 1 / 40).abs().sum() / 2


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_under_autocast_it_writes_what_it_predicts_there(family):
    model, prompts = tiny_model(family, initializer_range=0.3), drawn_prompts(5, 9)
    writing = replace(GREEDY, length=None) if model.config.is_encoder_decoder else GREEDY
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for prompt, answer in zip(prompts, writing(model, prompts), strict=True):
            logits = predicted(model, prompt, answer)[:, :60].float()
            chosen = logits.gather(1, answer[:, None])[:, 0]
            assert (logits.amax(-1) - chosen).max() < 0.05 * logits.std()  # but for ties in bf16


def test_what_was_written_before_does_not_change_what_is_written():
    model, prompts = tiny_model("llama"), drawn_prompts(5, 9)
    drawing, found = replace(GREEDY, temperature=1.0), []
    for limit in (12, 30, 12):  # a longer cache, which transformers would keep to, sums in another order
        torch.manual_seed(3)
        found.append(replace(drawing, max_new_tokens=limit)(model, prompts))
        assert not hasattr(model, "_previous_max_cache_length")
    assert all(torch.equal(one, other) for one, other in zip(found[0], found[2], strict=True))


def test_ends_are_those_of_both_configs_and_the_template():
    model = tiny_model("llama")
    model.generation_config.eos_token_id = [5, 6]
    assert end_tokens(model, [9]) == {2, 5, 6, 9}
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    assert end_tokens(model, []) == frozenset()
