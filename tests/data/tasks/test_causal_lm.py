"""Documents of language models: what stands around them, how rows are filled, and that none sees another."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conversations import byte_tokenizer, encoded
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import DECODERS, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from distill.data import Corpus, collate
from distill.data.packing import cut_documents, pack
from distill.data.prepare import _packed, _write_examples
from distill.data.tasks.causal_lm import CausalLM, limits, share_bytes
from distill.data.tasks.task import Settled
from distill.errors import InputError
from distill.evaluation.formulas import bits_per_byte
from distill.evaluation.predict import predict
from distill.losses import Objective
from distill.models.family import layers_of, tells_documents_apart
from distill.models.forward import Capture, forward
from distill.models.layout import LAYOUTS
from distill.recipe.schema import Term
from distill.training.learner import gradient_checkpointing

TASK = CausalLM()
PACKING = [family for family in DECODERS if LAYOUTS[family].packs]
BOTH, NO_END, ONE = ("<s>", "</s>"), ("<s>", None), ("|", "|")


@pytest.mark.parametrize(
    ("names", "written", "stream"),
    [
        (BOTH, "$A", "red cat </s> <s> red </s> cat </s>"),
        (BOTH, "<s> $A", "<s> red cat </s> <s> red </s> <s> cat </s>"),
        (BOTH, "<s> $A </s>", "<s> red cat </s> <s> red </s> <s> cat </s>"),
        (BOTH, "$A </s>", "red cat </s> <s> red </s> cat </s>"),
        (NO_END, "$A", "red cat <s> red"),
        (NO_END, "<s> $A", "<s> red cat <s> red <s> cat"),
        (ONE, "$A", "red cat | | red | cat |"),
        (ONE, "| $A", "| red cat | | red | | cat |"),
        (ONE, "| $A |", "| red cat | | red | | cat |"),
    ],
)
def test_documents_have_what_the_tokenizer_writes_with_one_start_and_one_end_each(names, written, stream):
    start, end = names
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["red", "cat", *sorted({start, end or start})])}))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ids = [(token, words.token_to_id(token)) for token in {start, end or start}]
    words.post_processor = processors.TemplateProcessing(single=written, special_tokens=ids)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token=start, eos_token=end)
    texts = ["red cat", f"{start} red", f"cat {end}" if end else "cat"]  # some texts bring a token of their own
    features, encoder = encoded(TASK, tokenizer, [{"text": text} for text in texts])
    written_out = " ".join(tokenizer.convert_ids_to_tokens(np.concatenate(features["input_ids"]).tolist()))
    assert written_out == stream
    # `cat` alone, with neither start nor end, predicts nothing.
    assert sum(encoder.notes.values()) == (names == NO_END and written == "$A") == 3 - len(features["row"])


@pytest.mark.parametrize("adds", [False, True])
def test_llama_tokenizers_start_documents_where_they_say_so(adds):
    words = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>", "▁", "a", "b"])}
    tokenizer = LlamaTokenizer(vocab=words, merges=[], add_bos_token=adds)
    features, _ = encoded(TASK, tokenizer, [{"text": "ab"}])
    ids = features["input_ids"][0]
    assert (ids[0] == 1) == adds and ids[-1] == 2 and ids.count(1) == adds


def test_the_end_token_within_a_document_does_not_divide_it():
    tokenizer = byte_tokenizer()
    features, _ = encoded(TASK, tokenizer, [{"text": "ab</s>cd"}])
    assert tokenizer.decode(features["input_ids"][0]) == "ab</s>cd</s>"


@pytest.mark.parametrize(
    ("ids", "document"),
    [([1, 1, 5, 2, 2, 2], [1, 5, 2]), ([5], [5, 2]), ([2, 2], [2]), ([1], [1, 2]), ([], [2]), ([1, 1], [1, 2])],
)
def test_start_and_end_stand_there_once(ids, document):
    first, last, end = limits(ids, 1, 2)
    assert [*ids[first:last], *end] == document


def test_rows_that_are_too_short_to_predict_in_are_refused():
    with pytest.raises(InputError, match="3 or more tokens"):
        encoded(TASK, byte_tokenizer(), [{"text": "a"}], max_length=2)


LENGTHS = st.lists(st.integers(2, 90), min_size=1, max_size=60)


@given(LENGTHS, st.integers(3, 40))
@example([41], 40)
@example([2, 4, 7], 3)
def test_packing_keeps_every_token_once_in_its_order_and_leaves_no_token_alone(lengths, size):
    pieces = cut_documents(np.array(lengths), size)
    for document, length in enumerate(lengths):
        own = pieces[pieces[:, 0] == document]
        assert own[0, 1] == 0 and own[-1, 2] == length and (own[1:, 1] == own[:-1, 2]).all()
    widths = pieces[:, 2] - pieces[:, 1]
    assert (widths >= 2).all() and (widths <= size).all()
    rows = pack(widths, size)
    assert sorted(piece for row in rows for piece in row) == list(range(len(pieces)))
    assert all(widths[row].sum() <= size for row in rows)


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.sampled_from([64, 128, 512]), st.floats(0.6, 2.0), st.floats(0.1, 0.5))
def test_rows_are_full_with_many_documents_of_random_lengths(seed, size, spread, median):
    drawn = np.random.default_rng(seed).lognormal(np.log(size * median), spread, 3000)
    lengths = drawn.astype(np.int64).clip(2, 20 * size)
    pieces = cut_documents(lengths, size)
    rows = pack(pieces[:, 2] - pieces[:, 1], size)
    assert lengths.sum() / (len(rows) * size) >= 0.98


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@given(TEXT, st.lists(st.integers(0, 30), max_size=8), st.integers(0, 3))
def test_the_bytes_of_a_text_are_shared_out_to_the_last_one(text, ends, more):
    ends = [min(end, len(text)) for end in ends]
    shared = share_bytes(text, ends or None, max(1, len(ends) + more))
    assert shared.sum() == len(text.encode()) and (shared >= 0).all()
    assert len(shared) == max(1, len(ends) + more)


def test_a_token_has_the_bytes_it_stands_for():
    # `a`, ` b`, the two tokens of `é`, the four of an emoji, and the end token.
    assert share_bytes("a bé🙂", [1, 3, 4, 4, 5, 5, 5, 5], 9).tolist() == [1, 2, 2, 0, 4, 0, 0, 0, 0]
    assert share_bytes("red  cat ", [3, 8], 3).tolist() == [3, 6, 0]


def documents(tmp_path, texts, size, packs):
    """The corpus of some texts, packed or one document a row."""
    tokenizer = byte_tokenizer()
    features, encoder = encoded(TASK, tokenizer, [{"text": text} for text in texts], measured=True, max_length=size)
    whole = _write_examples(tmp_path / f"{packs}.documents.arrow", iter([features]))
    rows = _write_examples(tmp_path / f"{packs}.arrow", _packed(whole, size, packs))
    return Corpus(TASK, Settled(TASK.head), {"train": rows, "test": rows}, tokenizer.pad_token_id, "", {}), encoder


def test_the_bytes_of_a_split_are_exact_where_documents_are_cut(tmp_path):
    texts = ["é" * 30, "plain", "你好 สวัสดี 🙂" * 7, "x", "abc</s></s>", "  two  "]
    for packs in (True, False):
        corpus, _ = documents(tmp_path, texts, 16, packs)
        everything = collate(corpus, corpus.test, range(len(corpus.test)))
        seen = TASK.observe(None, None, everything, corpus.test.take(range(len(corpus.test))))["text_bytes"]
        assert sum(seen) == sum(len(text.encode()) for text in texts)


def test_bits_per_byte_are_those_of_the_whole_text():
    # 3 nats over 4 bytes, and 1 over 2: 4 / (ln 2 · 6).
    assert bits_per_byte(np.array([3.0, 1.0]), np.array([4, 2])) == pytest.approx(0.9618, abs=1e-4)


def family_model(family, attention="sdpa"):
    changes = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0} if family == "gpt2" else {}
    model = tiny_model(family, vocab_size=300, **changes)
    if attention == "sdpa" and not model._supports_sdpa:
        assert model.config._attn_implementation == "eager", f"{family} has one kind of attention"
    else:
        model.set_attn_implementation(attention)
    return model


TEXTS = [
    "once upon a time",
    "a",
    "there was a much longer document than a row, which goes on",
    "xy",
    "end</s>in it",
    "z",
]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The same documents in packed rows and one a row."""
    folder = tmp_path_factory.mktemp("packed")
    packed, single = (documents(folder, TEXTS, 24, packs)[0] for packs in (True, False))
    assert len(packed.train) < len(single.train)
    return [collate(corpus, corpus.train, range(len(corpus.train))) for corpus in (packed, single)]


def test_only_families_that_tell_documents_apart_share_rows():
    assert set(DECODERS) - set(PACKING) == {"opt"}
    assert not tells_documents_apart(tiny_model("opt").config)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", PACKING)
def test_packed_rows_have_the_losses_and_gradients_of_one_document_a_row(both, family, attention):
    model = family_model(family, attention)
    objective = Objective([Term(match="labels")], "next_token")
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            gradient_checkpointing(model, "enable")({"use_reentrant": False})
        for batch in both:
            counts = objective.counts([batch])
            outputs = forward(model.train(), batch, objective.student)
            _, sums = objective(outputs, None, batch, torch.ones_like(counts))
            loss, _ = objective(outputs, None, batch, counts)
            parameters = [own for own in model.parameters() if own.requires_grad]
            slopes = torch.autograd.grad(loss, parameters, allow_unused=True)
            norm = sum(float(slope.square().sum()) for slope in slopes if slope is not None)
            found.append((int(counts), float(sums), norm))
    for count, total, norm in found[1:]:
        assert (count, total) == pytest.approx(found[0][:2], rel=1e-6)
        assert norm == pytest.approx(found[0][2], rel=1e-4)


@pytest.mark.parametrize("family", PACKING)
def test_packed_rows_are_measured_as_one_document_a_row(both, family):
    model, columns = family_model(family), []
    for batch in both:
        rows = predict(model, [batch | {"examples": torch.arange(len(batch["labels"]))}], "next_token")
        columns.append({name: rows[name].sum() for name in ("nll", "tokens", "correct")})
    assert columns[0] == pytest.approx(columns[1], rel=1e-6)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", PACKING)
def test_what_is_captured_of_packed_rows_is_that_of_the_documents(both, family, attention):
    model = family_model(family, attention)
    last = len(layers_of(model)) - 1
    maps = [last] if attention == "eager" else []
    with torch.no_grad():
        packed, single = (
            forward(model, batch, Capture(hidden=[-1, 0, last], attention=maps, relations=[last])) for batch in both
        )
    numbers, positions = both[0]["document_ids"], both[0]["position_ids"]
    real = both[0]["attention_mask"].bool()
    # Each document of the packed rows, and the row that it has for itself.
    alone = {tuple(ids[mask.bool()].tolist()): row for row, (ids, mask) in enumerate(
        zip(both[1]["input_ids"], both[1]["attention_mask"], strict=True)
    )}  # fmt: skip
    for row, ids in enumerate(both[0]["input_ids"]):
        for number in numbers[row][real[row]].unique():
            here = (numbers[row] == number) & real[row]
            length, other = int(here.sum()), alone[tuple(ids[here].tolist())]
            assert positions[row][here].tolist() == list(range(length))
            pairs = [(packed.hidden[layer], single.hidden[layer]) for layer in packed.hidden]
            pairs += list(zip(packed.relations[last], single.relations[last], strict=True))
            for one, two in pairs:
                torch.testing.assert_close(one[row, here], two[other, :length], atol=1e-5, rtol=1e-4)
            if maps:
                own = packed.attention[last][row][:, here]
                assert not own[..., ~here].any()
                torch.testing.assert_close(own[..., here], single.attention[last][other][:, :length, :length])
