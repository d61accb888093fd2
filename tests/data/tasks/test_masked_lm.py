"""Masks: how many, where, with what, and the same ones wherever an example is met."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conversations import byte_tokenizer, encoded
from language_models import ENCODERS, language_model
from tokenizers import processors

from distill.data import Corpus, TrainingBatches, evaluation_batches
from distill.data.corpus import Examples
from distill.data.prepare import _write_examples
from distill.data.tasks.masked_lm import MaskedLM, mask
from distill.data.tasks.task import Encoder, Ragged, Settled
from distill.errors import InputError
from distill.evaluation.metrics import compute
from distill.evaluation.predict import predict
from distill.losses import LayerMap, Objective
from distill.models.forward import UNLABELLED
from distill.recipe.schema import Data, Term

TASK = MaskedLM()
SPECIAL, ORDINARY = np.array([0, 1, 2, 99]), np.arange(3, 99)


def tokenizer():
    """Bytes, with `<s>` before and `</s>` behind each text, as BERT has [CLS] and [SEP]."""
    made = byte_tokenizer(mask_token="<mask>", cls_token="<s>", sep_token="</s>")
    ids = [(name, made.convert_tokens_to_ids(name)) for name in ("<s>", "</s>")]
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ids)
    return made


def test_the_share_of_tokens_is_masked_as_bert_does():
    ids = np.random.default_rng(0).choice(ORDINARY, 40_000)
    ids[::10] = 2
    chosen, shown = mask(ids, 0.15, 99, SPECIAL, ORDINARY, (1,))
    assert chosen.sum() == round(0.15 * 36_000) and not chosen[::10].any()
    assert (shown[~chosen] == ids[~chosen]).all()
    seen, own = shown[chosen], ids[chosen]
    assert np.isclose((seen == 99).mean(), 0.8, atol=0.02)
    # A random token in 10 %, of which one in 96 is the token itself; nothing special is put in.
    assert np.isclose((seen == own).mean(), 0.1 + 0.1 / 96, atol=0.02)
    assert np.isin(seen, [*ORDINARY, 99]).all()


@pytest.mark.parametrize("length", [1, 2, 5])
def test_every_example_has_a_mask(length):
    for seed in range(20):
        chosen, _ = mask(np.full(length, 7), 0.15, 99, SPECIAL, ORDINARY, (seed,))
        assert chosen.sum() == 1


def test_long_texts_become_pieces_with_special_tokens_each():
    made, text = tokenizer(), "abcdefghijklmnop你好"
    features, encoder = encoded(TASK, made, [{"text": text}, {"text": "x"}], max_length=8)
    start, end = made.convert_tokens_to_ids(["<s>", "</s>"])
    assert features["row"] == [0, 0, 0, 0, 1] and max(map(len, features["input_ids"])) == 8
    assert all(ids[0] == start and ids[-1] == end for ids in features["input_ids"])
    inner = [token for ids in features["input_ids"][:4] for token in ids[1:-1]]
    assert made.decode(inner) == text and encoder.truncated == 0


def test_a_text_of_special_tokens_alone_is_left_out_and_counted():
    features, encoder = encoded(TASK, tokenizer(), [{"text": "</s><s>"}, {"text": "a"}], max_length=8)
    assert features["row"] == [1] and sum(encoder.notes.values()) == 1


def test_a_tokenizer_without_a_mask_token_and_rows_without_room_are_refused():
    with pytest.raises(InputError, match="mask token"):
        TASK.constants(byte_tokenizer(), Data(source="./x.jsonl", task="masked_lm"))
    with pytest.raises(InputError, match="no room beside 2 special"):
        encoded(TASK, tokenizer(), [{"text": "a"}], max_length=2)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    made, folder = tokenizer(), tmp_path_factory.mktemp("masked")
    spec = Data(source="./x.jsonl", task="masked_lm", max_length=24, mask_share=0.3)
    texts = ["a text about " + "xyz" * number for number in range(40)]
    features = TASK.encode({"text": texts}, Encoder(made, spec, Settled(TASK.head)))
    examples = _write_examples(folder / "train.arrow", iter([features]))
    splits = {"train": Examples(examples.path), "test": Examples(examples.path)}
    return Corpus(TASK, Settled(TASK.head), splits, made.pad_token_id, "", {}, TASK.constants(made, spec))


def by_example(stream):
    """What the model is shown, and the labels, of each text that is met at each step."""
    return sorted(
        (step, ids[real].tolist(), labels[real].tolist())
        for step, batches in enumerate(stream)
        for _, batch in batches
        for ids, labels, real in zip(batch["input_ids"], batch["labels"], batch["attention_mask"].bool(), strict=True)
    )


def test_ranks_micro_batches_and_resumed_runs_see_the_same_masks(corpus):
    def stream(size, start=0, rank=0, world=1, seed=5):
        return TrainingBatches(corpus, range(len(corpus.train)), 12, size, seed).stream(start, 8, rank, world)

    whole = by_example(stream(12))
    assert by_example(stream(3)) == whole
    shared = [[*one, *other] for one, other in zip(stream(3, rank=0, world=2), stream(3, rank=1, world=2), strict=True)]
    assert by_example(shared) == whole
    assert by_example(stream(12, start=5)) == [(step - 5, *rest) for step, *rest in whole if step >= 5]
    assert by_example(stream(12, seed=6)) != whole


def test_an_example_is_masked_otherwise_each_time_in_training_and_never_in_evaluations(corpus):
    pool = TrainingBatches(corpus, [3], 1, 1, 0)
    seen = {tuple(batch["input_ids"][0].tolist()) for step in pool.stream(0, 20, 0, 1) for _, batch in step}
    assert len(seen) > 10
    first, second = (
        {
            int(number): (ids[real].tolist(), labels[real].tolist())
            for batch in evaluation_batches(corpus, corpus.test, size)
            for number, ids, labels, real in zip(
                batch["examples"], batch["input_ids"], batch["labels"], batch["attention_mask"].bool(), strict=True
            )
        }
        for size in (4, 16)
    )
    assert first == second and len(first) == len(corpus.test)


def test_special_tokens_and_padding_have_no_label(corpus):
    special = torch.tensor(corpus.constants["special"])
    for batch in evaluation_batches(corpus, corpus.test, 16):
        labels = batch["labels"]
        assert not torch.isin(labels[labels != UNLABELLED], special).any()
        assert (labels[batch["attention_mask"] == 0] == UNLABELLED).all()
        assert ((labels != UNLABELLED).sum(1) >= 1).all()


@pytest.mark.parametrize("family", ENCODERS)
def test_what_is_measured_is_the_loss_that_transformers_computes(family):
    model, ids = language_model(family), Ragged(np.random.default_rng(1).integers(3, 60, 40), np.array([14, 6, 20]))
    given = {"input_ids": ids, "mask": 63, "special": [0, 1, 2, 63], "vocabulary": 64, "share": 0.3}
    batch = TASK.collate(given, 0, [(0,), (1,), (2,)])
    rows = predict(model, [batch | {"examples": torch.arange(3)}], TASK.head)
    with torch.no_grad():
        own = model(**batch).loss
    assert compute(["loss", "masked_perplexity"], rows)["loss"] == pytest.approx(float(own), rel=1e-5)
    assert rows["tokens"].tolist() == [4, 2, 6]
    objective = Objective([Term(match="labels"), Term(match="logits"), Term(match="hidden", map=[[0, 0]])], TASK.head,
        lambda _map: LayerMap(((0, 0),)))  # fmt: skip
    assert objective.counts([batch]).tolist() == [12, 12, 40]
