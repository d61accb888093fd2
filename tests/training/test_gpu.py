"""On a GPU: the same results as on a CPU, and what only happens there. Skipped where there is none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from running import run
from safetensors.torch import load_file
from tiny import RECIPE, tiny_batch, tiny_model, tiny_project

from distill.cli import main
from distill.evaluation.predict import predict
from distill.losses import Objective, layer_map
from distill.models.forward import Outputs, forward, to_device
from distill.models.fp8 import CAPABILITY, Fp8Linear, fault_of
from distill.models.head import OutputHead
from distill.models.load import ModelHead, load_model, random_model
from distill.ranks import process_state
from distill.recipe.schema import Term
from distill.student import calibrate
from distill.student.calibration.collect import StatisticsRequest
from distill.training.model import DistillModel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("default"),  # torch speaks of what a card could do besides
]
ROOT = Path(__file__).parents[2]
CAUSAL = ModelHead("AutoModelForCausalLM")


def gpu():
    return process_state().device


def batches_of(model):
    batch = tiny_batch(rows=8)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return [{**batch, "labels": labels, "examples": torch.arange(8)}]


@pytest.mark.slow
def test_a_recipe_in_bf16_goes_to_a_gated_release(tmp_path):
    settings = ["training.precision=bf16", "teacher.fit.precision=bf16", "teacher.fit.steps=60", "training.steps=30"]
    recipe = str(ROOT / "recipes/smoke/recipe.yaml")
    assert main(["run", recipe, "--out", str(tmp_path / "run"), *settings]) == 0
    table = json.loads((tmp_path / "run/evaluation.json").read_text())
    arms = {arm["name"]: arm["metrics"] for arm in table["arms"]}
    assert table["precision"]["students"] == "bf16 autocast over float32 weights"
    assert arms["teacher"]["kl"] == 0 and arms["distilled"]["kl"] < arms["cut"]["kl"]
    released = table["precision"]["released"]
    assert released["metrics"]["perplexity"] == pytest.approx(released["as_evaluated"]["perplexity"], rel=0.02)
    assert (tmp_path / "run/release/model.safetensors").is_file()


@pytest.mark.slow
def test_a_recipe_with_repairs_is_measured(tmp_path):
    text = RECIPE.replace("  calibration:", "  repair: {bias: true, refit: true}\n  calibration:")
    tiny_project(tmp_path, text)
    settings = ["student.mlp.score=output_change", "student.calibration.gram=true", "evaluation.efficiency=false"]
    assert main(["evaluate", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "run"), *settings]) == 0
    steps = json.loads((tmp_path / "run/repair.json").read_text())["steps"]
    assert [step["name"] for step in steps] == ["cut", "bias", "refit"]
    assert steps[-1]["held_out"]["kl"] < steps[0]["held_out"]["kl"]


TERMS = [
    Term(match="labels", weight=0.3),
    Term(match="logits", temperature=2.0),
    Term(match="logits", loss="jsd"),
    Term(match="hidden", loss="cosine", map=[(0, 0), (1, 3)]),
]


def step_on(device):
    """The loss, its terms and all gradients of one step."""
    student, teacher = tiny_model("llama", num_hidden_layers=2).to(device), tiny_model("llama", seed=1).to(device)
    objective = Objective(TERMS, "next_token", lambda policy: layer_map(policy, None, 2, 4))
    (cpu_batch,) = batches_of(student)
    batch = to_device(cpu_batch, device)
    with torch.no_grad():
        target = forward(teacher, batch, objective.teacher)
    loss, sums = DistillModel(student, objective).train()(batch, target, objective.counts([batch]))
    loss.backward()
    return [tensor.detach().cpu() for tensor in (loss, sums, *(each.grad for each in student.parameters()))]


def test_the_objective_is_that_of_a_cpu():
    for found, expected in zip(step_on(gpu()), step_on(torch.device("cpu")), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-4), (torch.bfloat16, 0.02)])
def test_the_gradient_of_a_head_is_that_of_float64_but_for_its_operands(dtype, error):
    torch.manual_seed(0)
    rows, weight = torch.randn(1, 513, 256), torch.randn(4096, 256) / 16
    theirs = weight + 0.3 * torch.randn(4096, 256) / 16
    batch = {"attention_mask": torch.ones(1, 513, dtype=torch.int64), "labels": torch.zeros(1, 513, dtype=torch.int64)}
    batch = to_device(batch, gpu())
    objective = Objective([Term(match="logits")], "next_token")
    heads = [OutputHead(each.to(gpu(), dtype).requires_grad_(each is weight)) for each in (weight, theirs)]
    own, teacher = (Outputs(None, last=rows.to(gpu(), dtype), head=head) for head in heads)
    loss, _ = objective(own, teacher, batch, objective.counts([batch]))
    loss.backward()
    exact, (p, q) = rows[0, :-1].double(), [rows[0, :-1].double() @ each.double().T for each in (theirs, weight)]
    slope = (q.softmax(-1) - p.softmax(-1)) / 512  # of KL(teacher ‖ student) by the student's logits
    expected = slope.T @ exact
    assert (heads[0].weight.grad.cpu().double() - expected).norm() <= error * expected.norm()


def test_a_training_continues_from_its_checkpoint(corpus, tmp_path):
    whole, _ = run(corpus, tmp_path / "whole", precision="bf16")
    run(corpus, tmp_path / "again", precision="bf16")
    shutil.rmtree(tmp_path / "again/checkpoints/step-00000006")
    again, said = run(corpus, tmp_path / "again", precision="bf16")
    assert any("continuing after step 4" in line for line in said)
    for name, tensor in whole.state_dict().items():  # sums of embeddings' gradients come in any order
        torch.testing.assert_close(again.cpu().state_dict()[name], tensor.cpu(), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_compiled_layers_compute_the_same(corpus, tmp_path):
    losses = []
    for name, compiled in (("plain", False), ("compiled", True)):
        run(corpus, tmp_path / name, dropout=0.0, steps=4, compile=compiled, log_every=1)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses.append([record["loss"] for record in map(json.loads, lines) if record["event"] == "train"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.parametrize(("precision", "error"), [("fp32", 1e-4), ("bf16", 0.02)])
def test_predictions_and_statistics_are_those_of_a_cpu(precision, error):
    model, batches = tiny_model("llama"), batches_of(None)
    wanted = StatisticsRequest(gram=True)
    expected = predict(model, batches, "next_token"), calibrate(model, batches, wanted)
    model.to(gpu())
    rows = predict(model, batches, "next_token", precision=precision)
    assert (rows["tokens"] == expected[0]["tokens"]).all()
    assert rows["nll"] == pytest.approx(expected[0]["nll"], rel=error)
    for name, total in calibrate(model, batches, wanted, precision=precision).sums.items():
        assert (total - expected[1].sums[name]).norm() <= 3 * error * total.norm() + 1e-9, name


def test_weights_are_drawn_and_read_where_they_are_used(tmp_path):
    tiny_project(tmp_path, family="llama")
    first, again = (random_model(tmp_path / "teacher", CAUSAL, 1, device=gpu()) for _ in range(2))
    assert {tensor.device.type for tensor in (*first.parameters(), *first.buffers())} == {gpu().type}
    for one, other in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    spread = first.model.layers[0].mlp.up_proj.weight.std().item()
    assert spread == pytest.approx(first.config.initializer_range, rel=0.1)
    first.cpu().save_pretrained(tmp_path / "saved")
    read = load_model(tmp_path / "saved", CAUSAL, device=gpu())
    assert {tensor.device.type for tensor in (*read.parameters(), *read.buffers())} == {gpu().type}
    stored = load_file(tmp_path / "saved/model.safetensors")
    assert all(torch.equal(read.state_dict()[name].cpu(), tensor) for name, tensor in stored.items())


def test_products_in_8_bits_are_those_that_a_cpu_emulates():
    torch.manual_seed(0)
    linear, states = torch.nn.Linear(64, 128).bfloat16(), torch.randn(3, 7, 64).bfloat16()
    expected = Fp8Linear(linear)(states)
    if fault := fault_of(gpu()):
        assert gpu().type == "cpu" or torch.cuda.get_device_capability() < CAPABILITY, fault
        return
    found = Fp8Linear(linear.to(gpu()))(states.to(gpu())).cpu()
    torch.testing.assert_close(found.float(), expected.float(), rtol=2e-2, atol=2e-2)
