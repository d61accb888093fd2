from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import DECODERS, LAYERS, WIDTH, tiny_batch, tiny_model

from distill import load_student
from distill.errors import InputError
from distill.models.family import layers_of
from distill.models.mlp import mlps_of
from distill.models.plan import StudentPlan
from distill.recipe.schema import Student
from distill.student import build_student, calibrate, plan_student
from distill.student.plan import top_neurons


def spec(keep=2, width=0.5, **mlp):
    layers = {"keep": keep} if isinstance(keep, list) else {"keep": keep, "choose": "even"}
    return Student.model_validate({"layers": layers, "mlp": {"keep": width, "multiple_of": 8, **mlp}})


def logits(model, batch=None):
    with torch.no_grad():
        return model(**(batch or tiny_batch())).logits


def test_keeping_everything_gives_the_same_logits_to_the_last_bit(family):
    teacher = tiny_model(family)
    plan = plan_student(teacher, spec(list(range(LAYERS)), 1.0, score="magnitude"))
    student = build_student(teacher, plan)
    assert torch.equal(logits(student), logits(teacher))
    changed = {**student.config.to_dict(), "dtype": None} == {**teacher.config.to_dict(), "dtype": None}
    assert changed, "the config must be the teacher's"
    assert plan.layers[0].neurons is None


def test_a_cut_student_reloads_with_stock_loaders_and_equal_logits(family, tmp_path):
    teacher = tiny_model(family)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    plan = plan_student(teacher, spec([0, 2]), calibrate(teacher, [tiny_batch()]))
    student = build_student(teacher, plan)
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert [mlp.width for mlp in mlps_of(student)] == [WIDTH // 2] * 2
    student.save_pretrained(tmp_path)
    assert torch.equal(logits(type(teacher).from_pretrained(tmp_path)), logits(student))
    assert torch.equal(logits(load_student(tmp_path)), logits(student))


@pytest.mark.parametrize("family", DECODERS)
def test_a_cut_decoder_generates_the_same_with_and_without_cache(family):
    teacher = tiny_model(family)
    student = build_student(teacher, plan_student(teacher, spec([1, 3], score="magnitude")))
    prompt = tiny_batch(padded=False)
    with_cache, without = (
        student.generate(**prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False, use_cache=use)
        for use in (True, False)
    )
    assert torch.equal(with_cache, without)


def test_dropping_layers_is_the_teacher_with_those_layers_silenced():
    teacher = tiny_model("llama")
    student = build_student(teacher, plan_student(teacher, spec([0, 3], 1.0, score="magnitude")))
    with torch.no_grad():
        for index in (1, 2):  # pre-norm: a layer that adds nothing to the residual stream is not there
            layers_of(teacher)[index].self_attn.o_proj.weight.zero_()
            layers_of(teacher)[index].mlp.down_proj.weight.zero_()
    torch.testing.assert_close(logits(student), logits(teacher), rtol=0, atol=1e-6)


def test_removing_dead_neurons_leaves_logits_equal(family):
    teacher, sample = tiny_model(family), tiny_batch(padded=False)
    dead = torch.arange(0, WIDTH, 2)
    with torch.no_grad():
        for mlp in mlps_of(teacher):
            mlp.weight_out[..., dead] = 0
    scores = {"score": "output_norm"}
    plan = plan_student(teacher, spec(list(range(LAYERS)), 0.5, **scores), calibrate(teacher, [sample]))
    odd = list(range(1, WIDTH, 2))
    if family != "opt":  # its ReLU leaves other neurons at zero on the whole sample, too
        assert all(layer.neurons in (odd, [odd] * 4) for layer in plan.layers)
    torch.testing.assert_close(logits(build_student(teacher, plan), sample), logits(teacher, sample), rtol=0, atol=2e-6)


def test_tied_embeddings_stay_tied(tmp_path):
    teacher = tiny_model("llama", tie_word_embeddings=True)
    student = build_student(teacher, plan_student(teacher, spec(score="magnitude")))
    assert student.lm_head.weight is student.model.embed_tokens.weight
    student.save_pretrained(tmp_path)
    assert torch.equal(logits(load_student(tmp_path)), logits(student))


def test_lists_with_one_entry_per_layer_are_cut_with_the_layers(tmp_path):
    types = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    teacher = tiny_model("qwen2", layer_types=types, use_sliding_window=True, sliding_window=4)
    student = build_student(teacher, plan_student(teacher, spec([1, 2], score="magnitude")))
    assert student.config.layer_types == ["sliding_attention", "full_attention"]
    student.save_pretrained(tmp_path)  # refused by transformers when the list and the depth disagree


def test_block_influence_reads_raw_layer_outputs():
    # By hand from the layer modules themselves; `hidden_states[-1]` would be after the final norm.
    model, batch = tiny_model("llama"), tiny_batch(padded=False)
    seen = {}
    last = layers_of(model)[-1]
    handle = last.register_forward_hook(
        lambda _m, args, output: seen.update(before=args[0], after=output if torch.is_tensor(output) else output[0])
    )
    logits(model, batch)
    handle.remove()
    expected = 1 - torch.nn.functional.cosine_similarity(seen["before"], seen["after"], dim=-1).mean()
    got = calibrate(model, [batch]).block_influence()[-1]
    torch.testing.assert_close(got.float(), expected, rtol=0, atol=1e-6)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.data())
def test_ties_keep_the_lower_neuron(values, data):
    width = data.draw(st.integers(1, len(values)))
    kept = top_neurons(torch.tensor(values, dtype=torch.float64), width) or list(range(len(values)))
    assert kept == sorted(sorted(range(len(values)), key=lambda i: (-values[i], i))[:width])


def test_plan_round_trips_as_json_and_maps_layers(tmp_path):
    plan = plan_student(tiny_model("bert"), spec([1, 3], score="magnitude"))
    (tmp_path / "plan.json").write_text(plan.to_json())
    assert StudentPlan.load(tmp_path / "plan.json") == plan
    assert plan.layer_map == [(0, 1), (1, 3)]
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(InputError, match="not a student plan"):
        StudentPlan.load(tmp_path / "plan.json")


def test_rounding_is_reported_as_asked_and_got():
    plan = plan_student(tiny_model("bert"), spec(2, 0.45, score="magnitude"))
    choice = plan.choices["student.mlp.keep"]
    assert (choice.asked, choice.got) == ("0.45 of 48", "16 of 48") and "multiple of 8" in choice.reason


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (spec(5, score="magnitude"), "the teacher has 4"),
        (spec([0, 4], score="magnitude"), "layer 4 does not exist"),
        (spec([2, 0], score="magnitude"), "ascending"),
        (spec([1, 1], score="magnitude"), "once each"),
        (spec(2, 49, score="magnitude"), "the teacher's MLP has 48"),
        (spec(2, 7, score="magnitude"), "rounds down to 0"),
        (spec(2, score="activation"), "needs calibration"),
        (spec(2, score="activatoin"), "activation"),
    ],
)
def test_an_impossible_request_is_one_clear_error(request_, words):
    with pytest.raises(InputError, match=words):
        plan_student(tiny_model("bert"), request_)


def test_a_score_of_ones_own_is_one_function(tmp_path, monkeypatch):
    (tmp_path / "my_scores.py").write_text(
        "def first(layer, statistics, *, offset: int = 0):\n"
        "    import torch\n"
        "    return -torch.arange(layer.weight_out.shape[1]).float().sub(offset).abs()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    plan = plan_student(tiny_model("bert"), spec([0], 8, score="my_scores:first", params={"offset": 10}))
    assert plan.layers[0].neurons == [6, 7, 8, 9, 10, 11, 12, 13]


@pytest.mark.slow
def test_a_student_loads_in_a_process_without_distill(tmp_path):
    teacher = tiny_model("llama")
    build_student(teacher, plan_student(teacher, spec(score="magnitude"))).save_pretrained(tmp_path)
    code = (
        "import sys, transformers; m = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]);"
        "assert 'distill' not in sys.modules and m.config.num_hidden_layers == 2"
    )
    subprocess.run([sys.executable, "-I", "-c", code, str(tmp_path)], check=True)
