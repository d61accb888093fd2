"""bf16 weights with fp32 masters, with moments in bf16 or in 8 bits: the training that fp32 weights have."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch
from launched import launched
from running import LABELS, dropped, published, run
from safetensors.torch import load_file
from test_masked_training import CUBIC, alive
from test_masked_training import run as run_masked
from tiny import tiny_model

from distill.errors import InputError
from distill.losses import Objective
from distill.models.forward import Capture, forward
from distill.recipe.schema import Training
from distill.teacher import LiveTeacher
from distill.training import masters, read_records
from distill.training.masters import MasterAdamW, Masters, cut_dithered, join, split
from distill.training.optim import make_optimizer
from distill.training.setup import check_launch_keeps
from distill.training.shards import read

BF16 = {"weights": "bf16", "precision": "bf16"}


def stepped(kind, weights, grads, **options):
    """Step with fp32 weights ("fp32"), bf16 weights alone ("plain") or with masters; returns (fp32 weights, state)."""
    start, rest = (
        split(weights)
        if kind == "masters"
        else (weights.to(getattr(torch, "float32" if kind == "fp32" else "bfloat16")), None)
    )
    parameter = torch.nn.Parameter(start.clone())
    if kind == "masters":
        optimizer = MasterAdamW([{"params": [parameter]}], {parameter: rest}, **options)
    else:
        optimizer = torch.optim.AdamW([parameter], fused=True, **options)
    for grad in grads:
        parameter.grad = grad.to(parameter.dtype)
        optimizer.step()
    state = optimizer.state[parameter]
    whole = join(parameter.detach(), state["rest"]) if kind == "masters" else parameter.detach().float()
    return whole, state


def test_a_master_is_split_into_bf16_and_a_rest_and_put_together_exactly():
    torch.manual_seed(0)
    values = torch.cat([torch.randn(10_000) * 10.0**power for power in (-30, -3, 0, 20)])
    weight, rest = split(values)
    assert weight.dtype == torch.bfloat16 and rest.dtype == torch.int16
    assert torch.equal(join(weight, rest), values)
    nearest = (values.bfloat16().float() - values).abs()
    assert torch.equal((weight.float() - values).abs(), nearest)  # ties may go the other way, and are as near


def test_a_weight_that_was_set_to_zero_is_zero_whatever_its_rest_was():
    weight, rest = split(torch.tensor([1.0039, -1.0039, 3e-9]))
    assert rest[0] != 0 and (join(torch.zeros_like(weight), rest) == 0).all()


def test_dithered_rounding_is_right_on_average_and_to_a_neighbour():
    value = torch.tensor([1 + 3 / 1024])  # bf16 has 1 and 1 + 8/1024 there: up in 3 of 8 cases
    steps = torch.arange(1, 1001, dtype=torch.float64)
    dithers = ((steps * masters.GOLDEN) % 2**16).to(torch.int32)
    rounded = torch.stack([cut_dithered(value, dither) for dither in dithers]).float().squeeze(1)
    assert set(rounded.tolist()) == {1.0, 1 + 8 / 1024}
    for run_of_100 in rounded.split(100):  # not only in the long run
        assert float((run_of_100 > 1).float().mean()) == pytest.approx(3 / 8, abs=0.03)
    assert cut_dithered(torch.tensor([1.5, -2.0, 0.0]), torch.tensor(65535, dtype=torch.int32)).tolist() == [1.5, -2, 0]


@pytest.mark.parametrize("lr", [1e-3, 1e-6])
def test_masters_follow_fp32_training_where_bf16_weights_alone_stand_still(lr):
    torch.manual_seed(0)
    weights, mean = torch.randn(2000), torch.randn(2000)
    grads = [(0.3 * mean + torch.randn(2000)).bfloat16() for _ in range(300)]
    whole, state = stepped("fp32", weights, grads, lr=lr)
    own, own_state = stepped("masters", weights, grads, lr=lr)
    plain, _ = stepped("plain", weights, grads, lr=lr)
    travelled = (whole - weights).norm()
    assert (own - whole).norm() < 0.02 * travelled
    assert (plain - whole).norm() > 0.8 * travelled
    for moment in ("exp_avg", "exp_avg_sq"):
        assert own_state[moment].dtype == torch.bfloat16
        assert (own_state[moment].float() - state[moment]).norm() < 0.04 * state[moment].norm()


def test_a_second_moment_decays_as_in_fp32_where_one_rounded_to_the_nearest_stays():
    torch.manual_seed(0)
    weights, grads = torch.randn(500), [torch.randn(500), *[torch.zeros(500)] * 1000]
    expected = stepped("fp32", weights, grads, lr=1e-3)[1]["exp_avg_sq"]
    own = stepped("masters", weights, grads, lr=1e-3)[1]["exp_avg_sq"].float() / expected
    plain = stepped("plain", weights, grads, lr=1e-3)[1]["exp_avg_sq"].float() / expected
    assert own.mean() == pytest.approx(1, abs=0.02) and own.min() > 0.9 and own.max() < 1.1
    assert plain.mean() > 2  # 0.999 ** 1000 is 0.37


def test_a_parameter_and_its_gradient_take_ten_bytes():
    weight, rest = split(torch.randn(4096))
    parameter = torch.nn.Parameter(weight)
    optimizer = MasterAdamW([{"params": [parameter]}], {parameter: rest}, lr=1e-3)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    held = [parameter, parameter.grad, *optimizer.state[parameter].values()]
    assert sum(tensor.nbytes for tensor in held) == 10 * 4096 + 4  # and a step count


def test_a_step_that_the_device_skips_changes_no_bit():
    torch.manual_seed(0)
    weight, rest = split(torch.randn(100))
    parameter = torch.nn.Parameter(weight)
    optimizer = MasterAdamW([{"params": [parameter]}], {parameter: rest}, lr=1e-3)
    for bad, grad in ((1, float("nan")), (0, 0.5), (1, float("inf")), (1, 1.0)):
        parameter.grad = torch.full_like(parameter, grad)
        optimizer.found_inf = torch.tensor(float(bad))
        before = [tensor.clone() for tensor in (parameter, *optimizer.state.get(parameter, {}).values())]
        optimizer.step()
        after = [parameter, *optimizer.state[parameter].values()]
        assert not bad or all(torch.equal(a, b) for a, b in zip(before, after, strict=False))
        assert torch.isfinite(join(parameter.detach(), optimizer.state[parameter]["rest"])).all()
    assert optimizer.state[parameter]["step"] == 1


def test_small_and_large_parameters_are_stepped_alike_and_each_by_its_own_count(monkeypatch):
    torch.manual_seed(0)
    shapes = [(3,), (5, 7), (40, 40), (2, 2, 2)]
    weights = [torch.randn(shape) for shape in shapes]
    results = []
    for size in (2**20, 64, 1):
        monkeypatch.setitem(masters.CHUNK, "cpu", size)
        torch.manual_seed(1)
        halves = [split(weight) for weight in weights]
        parameters = [torch.nn.Parameter(half) for half, _ in halves]
        rests = {parameter: rest for parameter, (_, rest) in zip(parameters, halves, strict=True)}
        optimizer = MasterAdamW(
            [{"params": parameters[:2]}, {"params": parameters[2:], "weight_decay": 0.0}], rests, lr=1e-2
        )
        for step in range(4):
            for number, parameter in enumerate(parameters):
                grad = torch.randn(parameter.shape).bfloat16()
                parameter.grad = None if (number, step) in ((1, 0), (3, 2)) else grad  # a layer that is left out
            optimizer.step()
        results.append([join(p.detach(), optimizer.state[p]["rest"]) for p in parameters])
        assert [int(optimizer.state[p]["step"]) for p in parameters] == [4, 3, 4, 3]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=1e-6)
    torch.manual_seed(1)
    whole = [torch.nn.Parameter(weight.clone()) for weight in weights]
    reference = torch.optim.AdamW(
        [{"params": whole[:2]}, {"params": whole[2:], "weight_decay": 0.0}], lr=1e-2, fused=True
    )
    for step in range(4):
        for number, parameter in enumerate(whole):
            grad = torch.randn(parameter.shape).bfloat16().float()
            parameter.grad = None if (number, step) in ((1, 0), (3, 2)) else grad
        reference.step()
    torch.testing.assert_close(results[0], [p.detach() for p in whole], rtol=0, atol=3e-4)  # 4 steps of up to 1e-2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of what it does itself
def test_the_compiled_step_computes_the_same():
    torch.manual_seed(0)
    weight, rest = split(torch.randn(1000))
    moments = [torch.randn(1000).bfloat16(), torch.rand(1000).bfloat16()]
    group = {"lr": 1e-3, "weight_decay": 0.1, "betas": (0.9, 0.999), "eps": 1e-8}
    settings = masters._settings(group, torch.tensor(5.0), torch.ones(()))
    both = []
    for step in (masters.step_in_place, torch.compile(masters.step_in_place, dynamic=True)):
        own = [tensor.clone() for tensor in (weight, rest, *moments)]
        step(own, torch.linspace(-1, 1, 1000).bfloat16(), *settings)
        both.append([join(own[0], own[1]), own[2].float(), own[3].float()])
    torch._dynamo.utils.counters.clear()
    for size in (7, 4096):  # other sizes and numbers need no other graph
        parts = [tensor[:1].repeat(size) for tensor in (weight, rest, *moments)]
        step(parts, torch.ones(size, dtype=torch.bfloat16), 2 * settings[0], settings[1])
    assert not torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch.testing.assert_close(both[0], both[1], rtol=2**-7, atol=1e-6)
    assert not torch.equal(both[0][0], join(weight, rest))


def test_without_a_compiler_the_step_is_taken_all_the_same_and_says_so(monkeypatch):
    def fail(*_):
        raise RuntimeError("no compiler\nat all")

    weight, rest = split(torch.randn(10))
    parameter = torch.nn.Parameter(weight)
    optimizer = MasterAdamW([{"params": [parameter]}], {parameter: rest}, lr=1e-2)
    optimizer._take_step = fail
    monkeypatch.setattr(masters._Compiled, "failed", False)
    parameter.grad = torch.ones_like(parameter)
    with pytest.warns(UserWarning, match=r"is not compiled, which is slower: RuntimeError: no compiler$"):
        optimizer.step()
    assert optimizer.state[parameter]["step"] == 1 and masters._Compiled.failed


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("weights", [{}, BF16], ids=["fp32", "bf16"])
def test_a_resumed_training_is_bitwise_the_uninterrupted_one(optimizer, weights, corpus, tmp_path):
    def trained(folder):  # with matrices of the 4,096 weights from which on moments have 8 bits
        model = tiny_model("bert", intermediate_size=160, num_labels=len(corpus.classes), **dropped(0.1))
        teacher = tiny_model("bert", seed=1, hidden_size=48)
        return run(corpus, folder, model=model, wide=teacher, optimizer=optimizer, ema=0.9, **weights)

    whole, _ = trained(tmp_path / "whole")
    trained(tmp_path / "parts")
    shutil.rmtree(published(tmp_path / "parts/checkpoints")[-1])
    model, said = trained(tmp_path / "parts")
    assert "continuing after step 4" in said[0]
    for a, b in zip(whole.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)
    checkpoints = [read(published(tmp_path / name / "checkpoints")[-1]) for name in ("whole", "parts")]
    for file in checkpoints[0]:
        for name, tensor in checkpoints[0][file].items():
            assert tensor.dtype == checkpoints[1][file][name].dtype and torch.equal(tensor, checkpoints[1][file][name])
    kinds = {tensor.dtype for name, tensor in checkpoints[0]["optimizer"].items() if "projections" not in name}
    assert (torch.int16 in kinds) == bool(weights) and (torch.uint8 in kinds) == (optimizer == "adamw_8bit")
    assert all(tensor.dtype == torch.float32 for tensor in checkpoints[0]["ema"].values())


def test_training_follows_that_of_fp32_weights_and_hands_back_fp32_masters(corpus, tmp_path):
    losses, students = [], []
    for name, spec in (("fp32", {"precision": "bf16"}), ("bf16", BF16)):
        model, _ = run(corpus, tmp_path / name, steps=40, dropout=0.0, lr=3e-3, log_every=1, save_every=0, **spec)
        losses.append([record["loss"] for record in read_records(tmp_path / f"{name}/metrics.jsonl")])
        students.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert losses[0][-1] < 0.6 * losses[0][0]
    assert losses[1] == pytest.approx(losses[0], abs=0.05)
    assert (students[1] != students[1].bfloat16().float()).float().mean() > 0.9


def test_frozen_weights_are_handed_back_bit_for_bit(corpus, tmp_path):
    before = {name: tensor.clone() for name, tensor in tiny_model("bert", **dropped(0.1)).state_dict().items()}
    model, _ = run(corpus, tmp_path, freeze=["*.embeddings.*"], **BF16)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (".embeddings." in name), name


def test_the_average_of_the_weights_is_taken_of_the_masters(corpus, tmp_path):
    fp32, _ = run(corpus, tmp_path / "fp32", lr=1e-5, ema=0.5, ema_release=True, dropout=0.0, precision="bf16")
    bf16, _ = run(corpus, tmp_path / "bf16", lr=1e-5, ema=0.5, ema_release=True, dropout=0.0, **BF16)
    start = tiny_model("bert", **dropped(0.0))
    moved, apart = 0.0, 0.0
    tensors = (model.state_dict().values() for model in (fp32, bf16, start))
    for a, b, c in zip(*tensors, strict=True):
        moved, apart = moved + float((a - c).square().sum()), apart + float((a - b).square().sum())
    assert 0 < apart < 0.1 * moved  # rounded to bf16 they would not have moved at all


def test_masked_weights_stay_zero(corpus, tmp_path):
    model, masked = run_masked(corpus, tmp_path, CUBIC, **BF16)
    assert masked.masks and alive(model, masked) == 0
    state = read(sorted((tmp_path / "checkpoints").glob("step-*"))[-1])
    for name, mask in masked.masks.items():
        assert (join(state["model"][f"student.{name}"], state["optimizer"][f"student.{name}/rest"])[mask] == 0).all()


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "mixtral", "t5-gated", "bart"])
def test_every_form_of_model_trains_in_bf16_and_is_evaluated(family):
    model = tiny_model(family).float()
    kept = Masters(model, set())
    spec = Training(steps=1, lr=1e-3, **BF16)
    optimizer = make_optimizer(model, spec, kept.rests)
    kept.optimizer = optimizer
    ids = torch.arange(1, 25).view(3, 8)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    losses = []
    objective = Objective(LABELS, "seq2seq" if model.config.is_encoder_decoder else "next_token")
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = objective(forward(model, batch, objective.student), None, batch, objective.counts([batch]))
        loss.backward()
        assert all(p.grad is None or p.grad.dtype == torch.bfloat16 for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    LiveTeacher(model, Capture(), torch.device("cpu"))(batch)  # without autocast
    kept.restore(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp-bf16", "ddp-eight"])
def test_two_processes_train_as_one_does(kind, tmp_path):
    launched(1, tmp_path / "one", kind)
    launched(2, tmp_path / "two", kind)
    first, second = (load_file(tmp_path / name / "final.safetensors") for name in ("one", "two"))
    apart = torch.cat([(first[name] - second[name]).flatten() for name in first])
    assert apart.abs().max() < 5e-3 and apart.square().mean().sqrt() < 5e-4  # 12 steps of 1e-3, gradients in bf16


@pytest.mark.parametrize(("kind", "words"), [("FSDP", "weights: bf16"), ("DEEPSPEED", "weights: bf16")])
def test_launches_that_shard_are_refused_with_what_to_do(kind, words, monkeypatch):
    check_launch_keeps(Training(steps=1, **BF16))
    monkeypatch.setenv(f"ACCELERATE_USE_{kind}", "true")
    with pytest.raises(InputError, match=rf"training\.{words} does not go with .* launch it with DDP"):
        check_launch_keeps(Training(steps=1, **BF16))
    with pytest.raises(InputError, match="adamw_8bit does not go with"):
        check_launch_keeps(Training(steps=1, optimizer="adamw_8bit"))
    check_launch_keeps(Training(steps=1))


def test_bitsandbytes_is_imported_without_the_code_that_it_would_fetch(tmp_path):
    # In a new interpreter, with a `kernels` that says when it is asked.
    (tmp_path / "kernels.py").write_text("def get_kernel(*_, **__):\n    print('FETCHED')\n")
    code = "from distill.models.quantised import import_bitsandbytes as f; print(f()); import kernels, bitsandbytes"
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    assert done.stdout == "True\n" and "Failed to load" not in done.stderr
