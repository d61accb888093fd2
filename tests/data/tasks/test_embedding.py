"""Texts and pairs as examples and batches."""

from __future__ import annotations

import numpy as np
import pytest
from embeddings import word_tokenizer

from distill.data.tasks import TASKS
from distill.data.tasks.task import Encoder, Ragged, Settled
from distill.recipe.schema import Data
from distill.training.step import _split


def encode(rows, tokenizer=None, **spec):
    columns = {name: name for name in rows}
    data = Data(source="./x.jsonl", task="embedding", columns=columns, max_length=spec.pop("max_length", 16), **spec)
    encoder = Encoder(tokenizer or word_tokenizer(), data, Settled("embedding"))
    return TASKS["embedding"]().encode(rows, encoder), encoder


def batch_of(features):
    def arranged(values):
        if isinstance(values[0], list):
            return Ragged(
                np.array([item for each in values for item in each]), np.array([len(each) for each in values])
            )
        return np.array(values)

    return TASKS["embedding"]().collate({name: arranged(values) for name, values in features.items()}, 0, [])


def test_both_texts_of_a_pair_stand_one_after_the_other_under_one_label():
    features, _ = encode({"text": ["a0 a1", "b0"], "pair": ["a2", "b1 b2 b3"]})
    assert features["input_ids"] == [[4, 5, 6], [10, 11, 12, 13]] and features["first"] == [2, 1]
    batch = batch_of(features)
    assert batch["input_ids"].tolist() == [[4, 5, 0], [6, 0, 0], [10, 0, 0], [11, 12, 13]]
    assert batch["attention_mask"].sum(1).tolist() == [2, 1, 1, 3]
    assert batch["labels"].tolist() == [0, 0, 1, 1] and batch["texts"].tolist() == [2, 2]


def test_texts_without_a_pair_or_with_a_rated_one_have_no_label():
    alone, rated = {"text": ["a0", "b0"]}, {"text": ["a0"], "pair": ["b0"], "score": [0.5]}
    batch = batch_of(encode(alone)[0])
    assert batch["labels"].tolist() == [-100, -100] and batch["texts"].tolist() == [1, 1]
    batch = batch_of(encode(rated)[0])
    assert batch["labels"].tolist() == [-100, -100] and batch["scores"].tolist() == [0.5]


def test_each_text_is_cut_on_its_own_and_counted():
    features, encoder = encode({"text": ["a0 a1 a2", "a0"], "pair": ["b0", "b0 b1 b2 b3"]}, max_length=2)
    assert [len(ids) for ids in features["input_ids"]] == [3, 3] and encoder.truncated == 2


def test_prompts_of_the_recipe_stand_in_front_of_their_side():
    features, encoder = encode({"text": ["a0"], "pair": ["b0"]}, prompts={"pair": "c0 "})
    assert features["input_ids"] == [[4, 16, 10]] and encoder.notes == {"prompt 'c0 ', put in front of texts": 1}


def test_texts_that_begin_with_their_prompt_are_counted():
    _, encoder = encode({"text": ["c0 a0", "a0"]}, prompts={"text": "c0 "})
    assert encoder.notes["texts that begin with 'c0' before it is put in front of them"] == 1


def test_texts_of_which_nothing_is_written_are_counted():
    _, encoder = encode({"text": ["a0", ""]})
    assert encoder.notes == {"texts of which the tokenizer writes nothing": 1}


def test_scripts_without_spaces_are_encoded():
    characters = word_tokenizer("数据库连接到服务器", splits=".")
    features, _ = encode({"text": ["数据库"], "pair": ["连接到服务器"]}, characters)
    assert features["first"] == [3] and len(features["input_ids"][0]) == 9 and 1 not in features["input_ids"][0]


def test_half_a_batch_keeps_the_texts_of_an_example_together():
    features, _ = encode({"text": ["a0", "b0", "c0"], "pair": ["a1", "b1", "c1"]})
    batch = batch_of(features)
    pieces = [piece for _, piece in _split([(7, batch)], 2)]
    assert [piece["labels"].tolist() for piece in pieces] == [[0, 0, 1, 1], [2, 2]]
    assert [piece["input_ids"].tolist() for piece in pieces] == [[[4], [5], [10], [11]], [[16], [17]]]


@pytest.mark.parametrize(("value", "words"), [("high", "could not"), (True, "no number"), (float("nan"), "finite")])
def test_a_score_is_a_number(value, words):
    read = TASKS["embedding"]().columns["score"].read
    assert read("0.5") == 0.5 and read(3) == 3.0
    with pytest.raises(ValueError, match=words):
        read(value)
