"""Lists, indices and numbers of a config after layers are dropped: all say the same, to whoever reads them."""

from __future__ import annotations

import json

import pytest
import torch
from tiny import cut_by_hand, tiny_batch, tiny_config, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from distill.models.load import load_student
from distill.models.pattern import INDEX_LISTS, PERIOD_KEYS, cut_lists, pattern_note, settle_periods

NUMBERS = {key for keys in PERIOD_KEYS.values() for key in keys}
GEMMA = {"num_hidden_layers": 12, "sliding_window_pattern": 6}
MODERNBERT = {"num_hidden_layers": 9, "global_attn_every_n_layers": 3}
SMOLLM = {"num_hidden_layers": 8, "no_rope_layer_interval": 4}
BOTH = {"sliding_window_pattern": 3, "_sliding_window_pattern": 3}


def numbers_of(config: dict) -> dict:
    return {key: value for key, value in config.items() if key in NUMBERS}


@pytest.mark.parametrize(
    ("family", "sizes", "kept", "numbers"),
    [
        ("gemma3_text", GEMMA, (0, 3, 5, 8, 10, 11), BOTH),
        ("gemma3_text", GEMMA, (0, 5, 6, 7), {}),
        ("gemma3_text", GEMMA, (0, 1, 2), dict.fromkeys(BOTH, 6)),
        ("modernbert", MODERNBERT, (0, 1, 3, 4, 6), {"global_attn_every_n_layers": 2}),
        ("modernbert", MODERNBERT, (0, 3, 4, 6), {}),
        ("smollm3", SMOLLM, (0, 3, 4, 7), {"no_rope_layer_interval": 2}),
        ("smollm3", SMOLLM, (3, 4), {}),
    ],
)
def test_a_saved_student_names_the_period_of_its_layers_or_none(family, sizes, kept, numbers, tmp_path):
    teacher = tiny_model(family, **sizes)
    student = cut_by_hand(teacher, kept)
    kinds = [teacher.config.layer_types[layer] for layer in kept]
    for folder in ("student", "again"):  # a loaded one has the family's default put back, and is saved as well
        student.save_pretrained(tmp_path / folder)
        written = json.loads((tmp_path / folder / "config.json").read_text())
        assert numbers_of(written) == numbers
        assert AutoConfig.from_pretrained(tmp_path / folder).layer_types == kinds
        student = load_student(tmp_path / folder)
    assert (pattern_note(student.config) == "") == (numbers == numbers_of(teacher.config.to_dict()))
    if numbers:  # the family's own rule makes the lists of the number alone
        alone = {key: value for key, value in written.items() if key not in ("layer_types", "no_rope_layers")}
        derived = type(student.config).from_dict(alone)
        assert derived.layer_types == kinds
        assert getattr(derived, "no_rope_layers", None) == getattr(student.config, "no_rope_layers", None)


def test_stock_software_computes_what_the_student_does(tmp_path):
    student = cut_by_hand(tiny_model("gemma3_text", **GEMMA), (0, 5, 6, 7))
    student.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(stock(**tiny_batch()).logits, student(**tiny_batch()).logits)


def test_a_folder_whose_number_contradicts_its_list_is_put_right_when_loaded(tmp_path):
    student = cut_by_hand(tiny_model("gemma3_text", **GEMMA), (0, 3, 5, 8, 10, 11))
    student.config.sliding_window_pattern = 6
    student.save_pretrained(tmp_path)
    assert numbers_of(load_student(tmp_path).config.to_dict()) == BOTH


def test_nothing_changes_where_every_layer_stays():
    config = tiny_config("qwen2", max_window_layers=28)
    before = config.to_dict()
    cut_lists(config, range(4))
    settle_periods(config)
    assert config.to_dict() == before


def test_counts_of_first_layers_and_lists_of_indices_are_renumbered():
    window = {"max_window_layers": 2, "use_sliding_window": True, "sliding_window": 4}
    student = cut_by_hand(tiny_model("qwen2", **window), (0, 2, 3))
    assert student.config.max_window_layers == 1
    assert student.config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    config = tiny_config("llama", **{name: [1, 3] for name in INDEX_LISTS})
    cut_lists(config, (0, 2, 3))
    assert [vars(config)[name] for name in INDEX_LISTS] == [[2]] * len(INDEX_LISTS)


@pytest.mark.parametrize(
    ("kept", "words"),
    [
        ((0, 5, 6, 7), "layer_types of config.json and follow no rule"),
        ((0, 3, 5, 8, 10, 11), "sliding_window_pattern: 3 says the same"),
        ((0, 1, 2), ""),
    ],
)
def test_whoever_computes_another_model_is_named(kept, words):
    note = pattern_note(cut_by_hand(tiny_model("gemma3_text", **GEMMA), kept).config)
    assert words in note
    assert bool(note) == bool(words)


def test_a_family_with_a_pattern_that_no_key_states_is_named_too():
    assert pattern_note(tiny_model("gemma2").config) == ""
    assert pattern_note(cut_by_hand(tiny_model("gemma2"), (0, 1)).config) == ""
    assert "follow no rule" in pattern_note(cut_by_hand(tiny_model("gemma2"), (0, 2)).config)
