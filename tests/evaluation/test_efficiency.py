import json

import pytest
import torch
import transformers
from tiny import cut_by_hand, tiny_config, tiny_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from distill.evaluation import efficiency
from distill.evaluation.efficiency import (
    Line,
    add_disk_bytes,
    bytes_by_part,
    count_flops,
    count_size,
    in_bf16,
    measure_efficiency,
    peak_bytes,
)
from distill.models import family
from distill.models.cost import random_batch, random_ids, training_flops

VOCABULARY, WIDTH, MLP, LENGTH = 64, 32, 48, 8


def bert(layers, **own):
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=MLP,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=16,
        num_labels=5,
        **own,
    )
    return BertForSequenceClassification._from_config(config)


def llama(layers, **own):
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=MLP,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        **own,
    )
    return LlamaForCausalLM._from_config(config)


def layers_of(model):
    return model.bert.encoder.layer if hasattr(model, "bert") else model.model.layers


def measure(models, kind="sequence", **own):
    own = {"length": LENGTH, "batch_sizes": (1, 2), "repeats": 2, "vocabulary": VOCABULARY} | own
    return measure_efficiency(models, layers_of, kind=kind, **own)


BERT_LAYER = 4 * (WIDTH * WIDTH + WIDTH) + (WIDTH * MLP + MLP) + (MLP * WIDTH + WIDTH) + 4 * WIDTH
LLAMA_LAYER = 2 * WIDTH * WIDTH + 2 * WIDTH * WIDTH // 2 + 3 * WIDTH * MLP + 2 * WIDTH


def test_parameters_equal_a_count_by_hand():
    embeddings = (VOCABULARY + 16 + 2) * WIDTH + 2 * WIDTH
    heads = (WIDTH * WIDTH + WIDTH) + (5 * WIDTH + 5)  # pooler, classifier
    found = count_size(bert(3), layers_of)
    assert found["layer_parameters"] == 3 * BERT_LAYER
    assert found["parameters"] == embeddings + 3 * BERT_LAYER + heads
    assert found["bytes"] == 4 * found["parameters"]


def test_tied_weights_count_once():
    tied, untied = llama(1, tie_word_embeddings=True), llama(1, tie_word_embeddings=False)
    assert count_size(tied, layers_of)["parameters"] == VOCABULARY * WIDTH + LLAMA_LAYER + WIDTH
    assert count_size(untied, layers_of)["parameters"] == 2 * VOCABULARY * WIDTH + LLAMA_LAYER + WIDTH


def test_bytes_follow_the_dtype():
    assert count_size(bert(1).bfloat16(), layers_of)["bytes"] == 2 * count_size(bert(1), layers_of)["parameters"]
    assert count_size(bert(1).bfloat16(), layers_of)["dtype"] == "bfloat16"


def count(model):
    return count_flops(model.eval(), layers_of, {"input_ids": torch.ones(1, LENGTH, dtype=torch.long)})


ATTENTION = 2 * 2 * LENGTH * LENGTH * WIDTH
"""FLOPs of one layer's Q K^T and P V."""


def test_flops_equal_two_per_multiply_add_of_the_matrices():
    bert_layer = 2 * LENGTH * (4 * WIDTH * WIDTH + 2 * WIDTH * MLP) + ATTENTION
    found = count(bert(3))
    assert found["flops_counted_on"] == "fake tensors"
    assert found["layer_flops_per_example"] == 3 * bert_layer
    assert found["flops_per_example"] == 3 * bert_layer + 2 * (WIDTH * WIDTH + 5 * WIDTH)  # heads see one position

    llama_layer = 2 * LENGTH * (3 * WIDTH * WIDTH + 3 * WIDTH * MLP) + ATTENTION
    found = count(llama(2))
    assert found["flops_counted_on"] == "fake tensors"
    assert found["layer_flops_per_example"] == 2 * llama_layer
    head_and_rotary = found["flops_per_example"] - 2 * llama_layer
    assert 0 <= head_and_rotary - 2 * LENGTH * WIDTH * VOCABULARY <= 2 * LENGTH * WIDTH


def test_a_training_step_is_three_passes_of_the_student_and_one_of_the_teacher():
    student, teacher = count(bert(1))["flops_per_example"], count(bert(3))["flops_per_example"]
    assert training_flops(bert(1), bert(3), LENGTH) == (3 * student + teacher) / LENGTH
    assert training_flops(bert(1), None, LENGTH) == 3 * student / LENGTH
    assert training_flops(bert(1), bert(3), LENGTH, adapters=True) == (2 * student + teacher) / LENGTH


@pytest.mark.parametrize("build", [bert, llama])
def test_flops_do_not_depend_on_the_attention_kernel(build):
    assert count(build(2, attn_implementation="sdpa")) == count(build(2, attn_implementation="eager"))


class Peeking(nn.Module):
    """Reads a value, which fake tensors do not have."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)])

    def forward(self, input_ids):
        hidden = input_ids[..., None].float().expand(-1, -1, WIDTH)
        return self.layers[1](self.layers[0](hidden)) if input_ids.sum().item() > 0 else hidden


def test_flops_of_a_model_that_reads_values_are_counted_on_a_real_pass():
    ids = torch.ones(1, LENGTH, dtype=torch.long)
    found = count_flops(Peeking(), lambda model: model.layers[:1], {"input_ids": ids})
    one_layer = 2 * LENGTH * WIDTH * WIDTH
    assert found == {
        "flops_per_example": 2 * one_layer,
        "layer_flops_per_example": one_layer,
        "flops_counted_on": "a real pass",
    }


def test_half_the_layers_are_half_the_layer_flops():
    result = measure({"teacher": llama(4), "student": llama(2)}, kind="next_token")
    ratios, models = result["ratios"]["student"], result["models"]
    assert list(result["ratios"]) == ["student"]
    assert ratios["layer_flops"] == ratios["layer_parameters"] == 0.5
    assert ratios["flops"] == models["student"]["flops_per_example"] / models["teacher"]["flops_per_example"]
    assert 0.5 < ratios["flops"] < 1
    assert 0.5 < ratios["parameters"] < 1


def test_the_result_is_json_with_its_protocol_and_positive_times():
    result = measure({"teacher": bert(2), "student": bert(1), "smallest": bert(1).bfloat16()})
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    protocol = {"kind": "sequence", "batch_size": 2, "length": LENGTH, "rounds": 2, "reference": "teacher"}
    assert protocol.items() <= result["protocol"].items()
    assert result["protocol"]["dtype"] == "bfloat16, float32"
    assert result["protocol"]["threads"] == torch.get_num_threads()
    for model in result["models"].values():
        assert 0 < model["latency_ms"]["p50"] <= model["latency_ms"]["p90"]
        assert model["throughput"] == model["throughputs"]["2"] > 0 < model["throughputs"]["1"]
    for ratio in result["ratios"].values():
        for key in ("latency", "throughput"):
            assert 0 < ratio[key]["min"] <= ratio[key]["median"] <= ratio[key]["max"]


class Recorder(nn.Module):
    """Writes down each of its passes and the shape of its input."""

    def __init__(self, name, log):
        super().__init__()
        self.name, self.log, self.layers = name, log, nn.ModuleList([nn.Linear(1, 1)])

    def forward(self, input_ids):
        self.log.append((self.name, tuple(input_ids.shape), input_ids.sum()))
        return self.layers[0](input_ids[..., None].float())


def test_models_run_in_turns_on_the_same_ids():
    log = []
    models = {"a": Recorder("a", log), "b": Recorder("b", log)}
    measure_efficiency(
        models,
        lambda model: model.layers,
        kind="sequence",
        length=4,
        repeats=3,
        vocabulary=9,
        batch_sizes=[2],
    )
    timed = [name for name, shape, _ in log if shape == (2, 4)]
    # for the memory; warm-up; then rounds, in which each turn begins with a pass that is not timed
    assert timed == ["a", "b"] + ["a", "a", "b", "b"] + ["a", "a", "b", "b"] * 3
    sums = [int(total) for _, shape, total in log if shape == (2, 4)]
    assert len(set(sums)) == 1


def test_weights_and_random_state_are_untouched():
    model = bert(1).eval()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(7)
    measure({"teacher": model})
    after = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(after, torch.rand(3))
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_ids_avoid_padding_and_use_the_whole_vocabulary():
    ids = random_ids(8, (50, 10), llama(1, pad_token_id=3))
    assert sorted(set(ids.flatten().tolist())) == [0, 1, 2, 4, 5, 6, 7]


def test_bytes_on_disk_are_those_of_the_weight_files(tmp_path):
    for name, length in (("teacher", 100), ("student", 40)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(bytes(length))
        (tmp_path / name / "config.json").write_text("{}")
    result = {"models": {"teacher": {}, "student": {}}, "ratios": {"student": {}}}
    add_disk_bytes(result, {name: tmp_path / name for name in ("teacher", "student")})
    assert result["models"] == {"teacher": {"disk_bytes": 100}, "student": {"disk_bytes": 40}}
    assert result["ratios"] == {"student": {"disk_bytes": 0.4}}


@pytest.mark.parametrize(("name", "reads"), [("t5", {"length": 12}), ("whisper", {"frames": 128})])
def test_both_stacks_of_an_encoder_decoder_are_counted_and_timed(name, reads):
    models = {"teacher": tiny_model(name), "student": cut_by_hand(tiny_model(name), (0, 1))}
    result = measure_efficiency(
        models, family.all_layers, kind="seq2seq", length=12, target_length=5, batch_sizes=[2], repeats=2, vocabulary=60
    )
    assert {**reads, "target_length": 5}.items() <= result["protocol"].items()
    stacks = [family.layers_of(models["student"], side) for side in ("encoder", "main")]
    layers = sum(p.numel() for stack in stacks for p in stack.parameters())
    assert result["models"]["student"]["layer_parameters"] == layers
    assert 0.4 < result["ratios"]["student"]["layer_flops"] < 0.6


def test_a_head_of_classes_feeds_its_decoder_by_itself():
    model = transformers.AutoModelForSequenceClassification.from_config(tiny_config("bart", num_labels=3)).eval()
    batch = random_batch(model, (3, 9), 60)
    assert list(batch) == ["input_ids"]
    assert (batch["input_ids"] == 2).sum(1).tolist() == [1, 1, 1]  # each text ends once
    assert model(**batch).logits.shape == (3, 3)


def test_bytes_are_found_where_they_are():
    parts = bytes_by_part(bert(3), layers_of)
    norms = 2 * WIDTH * (1 + 2 * 3)
    attention, mlp = 4 * (WIDTH * WIDTH + WIDTH), WIDTH * MLP + MLP + MLP * WIDTH + WIDTH
    assert parts == {
        "embeddings": 4 * (VOCABULARY + 16 + 2) * WIDTH,
        "attention": 4 * 3 * attention,
        "mlp": 4 * 3 * mlp,
        "head": 4 * (5 * WIDTH + 5),
        "other": 4 * (norms + WIDTH * WIDTH + WIDTH),  # the pooler belongs to the base model
    }
    assert sum(parts.values()) == count_size(bert(3), layers_of)["bytes"]
    tied, untied = (bytes_by_part(llama(1, tie_word_embeddings=tie), layers_of) for tie in (True, False))
    assert (tied["head"], untied["head"]) == (0, 4 * VOCABULARY * WIDTH) and tied["embeddings"] == untied["embeddings"]
    assert tied["attention"] == 4 * 3 * WIDTH * WIDTH and tied["mlp"] == 4 * 3 * WIDTH * MLP


@pytest.mark.parametrize("name", ["gpt2", "t5", "modernbert", "mixtral"])
def test_the_neurons_of_every_family_are_in_its_mlp(name):
    model = tiny_model(name)
    parts = bytes_by_part(model, family.all_layers)
    inside = {id(p): p for layer in family.all_layers(model) for p in layer.parameters()}
    neurons = 0
    for side in family.layout_of(model).sides:
        for layer in family.layers_of(model, side):
            names = {tensor for mlp in family.layout_of(model).stack(side).mlps for tensor in mlp.axis.tensors}
            neurons += sum(4 * p.numel() for name, p in layer.named_parameters() if name in names)
    assert 0 < neurons <= parts["mlp"] < neurons * 1.1
    assert parts["attention"] + parts["mlp"] <= 4 * sum(p.numel() for p in inside.values())


def test_peak_memory_is_what_is_alive_at_once():
    rows = torch.zeros(10, 4)
    wide, narrow = nn.Linear(4, 100, bias=False), nn.Linear(100, 2, bias=False)

    def run():
        with torch.no_grad():
            return narrow(wide(rows))

    known = [rows, wide.weight, narrow.weight]
    # The wide result lives until the narrow one is there.
    assert peak_bytes(run, known) == 4 * (10 * 4 + 4 * 100 + 100 * 2 + 10 * 100 + 10 * 2)


def test_a_language_model_is_timed_at_writing_and_an_encoder_is_not():
    models = {"teacher": llama(2).eval(), "student": llama(1).eval()}
    result = measure(models | in_bf16(models), kind="next_token")
    assert list(result["models"]) == ["teacher", "student", "teacher, bf16", "student, bf16"]
    for model in result["models"].values():
        assert model["prefill"] > 0 and (model["decode"] is None or model["decode"] > 0)
    assert result["models"]["student, bf16"]["bytes"] * 2 == result["models"]["student"]["bytes"]
    assert next(models["student"].parameters()).dtype == torch.float32
    assert "decode" not in measure({"teacher": bert(1).eval()})["models"]["teacher"]


def test_another_form_of_a_model_is_one_more_line_of_the_same_table():
    seen = []
    form = Line(
        lambda batch: seen.append(tuple(batch["input_ids"].shape)), {"parameters": 7, "bytes": 9, "dtype": "int8"}
    )
    result = measure({"teacher": bert(1).eval(), "student, int8": form})
    assert {(1, LENGTH), (2, LENGTH)} == {*seen}
    found = result["models"]["student, int8"]
    assert found["bytes"] == 9 and found["throughput"] > 0 and "flops_per_example" not in found
    assert result["ratios"]["student, int8"]["bytes"] == 9 / result["models"]["teacher"]["bytes"]
    assert result["protocol"]["dtype"] == "float32, int8"


def test_a_batch_that_would_take_too_long_is_left_out_and_named(monkeypatch):
    monkeypatch.setattr(efficiency, "PATIENCE", 1e-9)
    result = measure({"teacher": bert(1).eval()}, batch_sizes=(1, 2, 4))
    assert result["protocol"]["left_out"] == [2, 4] and result["protocol"]["batch_sizes"] == [1]
    assert list(result["models"]["teacher"]["throughputs"]) == ["1"]
    assert result["protocol"]["rounds"] == 2
    assert result["protocol"]["fewer_rounds"] == "1 of one example, 1 of batch 1"


def test_the_protocol_names_no_fewer_rounds_where_there_was_time_for_all():
    assert "fewer_rounds" not in measure({"teacher": bert(1).eval()})["protocol"]
