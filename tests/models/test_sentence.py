"""Vectors of texts are made, and their folders read and written, as sentence-transformers does it."""

from __future__ import annotations

import json

import pytest
import torch
from tiny import ENCODERS, tiny_batch, tiny_config
from transformers import AutoModel

from distill.errors import InputError
from distill.models.forward import Capture, forward
from distill.models.load import folder_fingerprint
from distill.models.sentence import LEGACY, SentenceHead, sentence_head, unused_parameters

STATES = torch.tensor([[[1.0, -2.0], [3.0, 4.0], [50.0, 60.0]], [[2.0, 2.0], [0.0, 1.0], [4.0, -3.0]]])
MASK = torch.tensor([[1, 1, 0], [1, 1, 1]])
BY_HAND = {
    "cls": [[1, -2], [2, 2]],
    "max": [[3, 4], [4, 2]],
    "mean": [[2, 1], [2, 0]],
    "mean_sqrt_len_tokens": [[4 / 2**0.5, 2 / 2**0.5], [6 / 3**0.5, 0]],
    "weightedmean": [[7 / 3, 2], [14 / 6, -5 / 6]],
    "lasttoken": [[3, 4], [4, -3]],
}


@pytest.mark.parametrize("mode", LEGACY)
def test_each_way_of_pooling_by_hand(mode):
    torch.testing.assert_close(SentenceHead((mode,))(STATES, MASK), torch.tensor(BY_HAND[mode], dtype=torch.float32))


def test_ways_of_pooling_stand_side_by_side_and_are_normalised_together():
    found = SentenceHead(("cls", "mean"), normalize=True)(STATES, MASK)
    torch.testing.assert_close(found[0], torch.tensor([1.0, -2.0, 2.0, 1.0]) / 10**0.5)


def written(folder, head, **changes):
    for name, text in (head.files(8) | changes).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize(
    "head",
    [
        SentenceHead(),
        SentenceHead(("cls", "lasttoken"), normalize=True, lower=True, max_length=7, similarity="dot"),
        SentenceHead(prompts={"query": "q: ", "document": ""}, default_prompt="query"),
    ],
)
def test_a_head_that_is_written_is_read_as_the_same(head, tmp_path):
    assert sentence_head(written(tmp_path, head)) == head


def test_the_form_that_sentence_transformers_writes_today_is_read(tmp_path):
    now = {"embedding_dimension": 8, "pooling_mode": ["cls", "max"], "include_prompt": True}
    modules = json.loads(SentenceHead().files(8)["modules.json"])
    modules[1]["type"] = "sentence_transformers.sentence_transformer.modules.pooling.Pooling"
    changes = {"1_Pooling/config.json": json.dumps(now), "modules.json": json.dumps(modules)}
    assert sentence_head(written(tmp_path, SentenceHead(), **changes)).modes == ("cls", "max")


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("modules.json", {"type": "sentence_transformers.models.Dense", "path": "2_Dense"}, "a module Dense after"),
        ("modules.json", {"type": "custom.Reader", "path": "2_Reader"}, "a module custom.Reader"),
        ("modules.json", {"type": "sentence_transformers.models.Normalize", "path": "../x"}, "is no folder beside it"),
        ("1_Pooling/config.json", {"pooling_mode": "median"}, "unknown pooling 'median'"),
        ("1_Pooling/config.json", {"pooling_mode": ["max", "cls"]}, "the order of max, cls cannot be kept"),
        ("1_Pooling/config.json", {"pooling_mode_mean_tokens": False}, "unknown pooling 'none'"),
        ("1_Pooling/config.json", {"include_prompt": False}, "prompts that are not pooled"),
        ("sentence_bert_config.json", {"query_expansion": {"token": "x"}}, "query_expansion cannot be kept"),
        ("sentence_bert_config.json", {"max_seq_length": "7"}, "max_seq_length is no whole number"),
        ("config_sentence_transformers.json", {"prompts": ["x"]}, "a prompt is no text"),
    ],
)
def test_what_cannot_be_kept_of_a_folder_is_refused(name, change, words, tmp_path):
    head = SentenceHead(prompts={"query": "q: "})
    content = json.loads(head.files(8)[name])
    content = [*content, {"idx": 2, "name": "2", **change}] if name == "modules.json" else content | change
    with pytest.raises(InputError, match=words):
        sentence_head(written(tmp_path, head, **{name: json.dumps(content)}))


def test_a_transformer_without_the_pooling_beside_it_is_refused(tmp_path):
    (tmp_path / "0_Transformer").mkdir()
    (tmp_path / "modules.json").write_text("[]")
    with pytest.raises(InputError, match="whose pooling would be lost"):
        sentence_head(tmp_path / "0_Transformer")


def test_prompts_of_a_recipe_that_the_teacher_would_not_pool_are_refused():
    with pytest.raises(InputError, match=r"data\.prompts: the teacher does not pool prompts"):
        SentenceHead(include_prompt=False).with_prompts({"text": "q: "}, False)


def test_prompts_follow_the_side_of_a_retrieval_and_the_default_elsewhere():
    head = SentenceHead(prompts={"query": "q: ", "passage": "p: ", "own": "o: "}, default_prompt="own")
    assert [head.prompt(side, True) for side in ("text", "pair")] == ["q: ", "p: "]
    assert [head.prompt(side, False) for side in ("text", "pair")] == ["o: ", "o: "]
    changed = head.with_prompts({"pair": "d: "}, True)
    assert changed.prompts == {"query": "q: ", "own": "o: ", "document": "d: "}
    assert head.with_prompts({"text": "t: "}, False).prompt("pair", False) == "t: "


def test_vectors_of_a_decoder_are_those_of_its_last_tokens():
    config = tiny_config("llama", num_hidden_layers=2)
    model = AutoModel.from_config(config).eval()
    model.sentence_head = SentenceHead(("lasttoken",))
    batch = tiny_batch()
    found = forward(model, batch, Capture(stop_at_head=True)).logits
    lengths = batch["attention_mask"].sum(1)
    alone = [model(batch["input_ids"][row : row + 1, :length])[0][0, -1] for row, length in enumerate(lengths)]
    torch.testing.assert_close(found, torch.stack(alone))


@pytest.mark.parametrize("family", [*ENCODERS, "llama", "gpt2", "qwen3"])
def test_every_parameter_but_those_named_unused_learns_from_vectors(family):
    model = AutoModel.from_config(tiny_config(family, num_hidden_layers=2))
    assert not unused_parameters(model)  # nothing is known of what a model without vectors puts out
    model.sentence_head = SentenceHead(normalize=True)
    vectors = forward(model, tiny_batch(), Capture()).logits
    vectors[:, 0].sum().backward()
    silent = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert silent == set(unused_parameters(model))


def test_another_way_of_pooling_makes_another_folder(tmp_path):
    before = folder_fingerprint(written(tmp_path, SentenceHead()))
    assert folder_fingerprint(written(tmp_path, SentenceHead(("cls",)))) != before
