"""What several processes hold, what would make a training fit, and the table of `distill plan`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_rehearsal import LABELS, LOGITS, count, rehearsal
from tiny import tiny_model

from distill.errors import InputError
from distill.models.family import all_layers
from distill.models.memory import Peak
from distill.pipeline.resources import advise_all, changes, peak_of, share_out
from distill.pipeline.trainings import Work, countable, full_batch
from distill.recipe.schema import Student
from distill.recipe.sections import Lora

CPU, GPU = torch.device("cpu"), torch.device("cuda")
PEAK = Peak({"weights": 400, "gradients": 400, "optimizer": 800, "teacher": 600, "activations": 50}, "the loss")


def layer_bytes():
    return 4 * count(all_layers(tiny_model("bert"))[0])


def test_data_parallel_processes_keep_the_gradients_twice():
    shared = share_out(PEAK, rehearsal(), world=2, sharding=False)
    assert shared.parts == {**PEAK.parts, "gradients": 400 + 4 * count(tiny_model("bert"))}
    assert share_out(PEAK, rehearsal(), world=1, sharding=False) == PEAK


def test_shards_are_shares_and_whole_layers_while_they_run():
    taught = replace(rehearsal(terms=(LOGITS,), taught=True), teacher_device="sharded")
    shared = share_out(PEAK, taught, world=4, sharding=True)
    assert shared.parts == {
        "weights": 100 + 2 * layer_bytes(),
        "gradients": 100 + layer_bytes(),
        "optimizer": 200,
        "average": 0,
        "teacher": 150 + 2 * layer_bytes(),
        "activations": 50,
    }


def test_what_makes_it_fit_is_tried_in_order_until_it_does():
    training = rehearsal(terms=(LABELS, LOGITS), taught=True, rows=8, length=32)
    labels = [label for label, _ in changes(training, GPU, 1)]
    assert labels == [
        "training.micro_batch_size: 1",
        "training.gradient_checkpointing: true",
        "training.weights: bf16, training.precision: bf16",
        "training.optimizer: adamw_8bit",
        "training.lora: {rank: 16}",
        "teacher.dtype: bf16",
        "teacher.dtype: int8",
        "teacher.cache: {keep: hidden}",
    ]
    full = peak_of(training, CPU)
    halved = peak_of(training.with_rows(4), CPU)
    (advice,) = advise_all([Work(training, 1, 256)], [full], CPU, halved.total)
    assert advice.table.rows == [("training.micro_batch_size: 4", advice.table.rows[0][1], "yes")]
    assert not list(advise_all([Work(training, 1, 256)], [full], CPU, full.total))  # to the last byte


def test_each_change_takes_something_off_what_is_left():
    training = rehearsal(terms=(LABELS, LOGITS), taught=True, rows=8, length=32)
    before = peak_of(training, GPU).total
    for label, changed in changes(training, GPU, 1):
        total = peak_of(changed, GPU).total
        # Tensors as small as these have fp32 moments under adamw_8bit, and adapters of rank 16 are as large as they.
        assert total < before or "8bit" in label or "lora" in label, label
        before = total


def test_what_nothing_makes_fit_is_said():
    training = rehearsal(rows=2)
    *_, advice = advise_all([Work(training, 1, 4)], [peak_of(training, CPU)], CPU, 1000)
    assert advice.table.rows[-1][2] == "no" and "does not fit" in advice.note


def test_vectors_are_compared_within_the_micro_batch_which_stays():
    batch = {"input_ids": torch.ones(4, 8, dtype=torch.int64), "labels": torch.arange(4) // 2}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    training = replace(rehearsal(rows=4), kind="embedding", batch=batch)
    assert not any("micro_batch_size" in label for label, _ in changes(training, CPU, 10**12))


def test_what_fake_tensors_cannot_do_is_said_in_place_of_a_number():
    class Curious(torch.nn.Module):
        def forward(self, states):
            return states if states.sum().item() > 0 else -states

    def make():
        model = tiny_model("bert")
        model.classifier = torch.nn.Sequential(Curious(), model.classifier)
        return model

    reason = peak_of(replace(rehearsal(), build=make), CPU)
    assert isinstance(reason, str) and reason.startswith("not predicted: the model does not run on fake tensors")


def test_a_size_alone_needs_no_calibration():
    spec = Student.model_validate(
        {"layers": {"keep": 2, "choose": "greedy_loss"}, "mlp": {"keep": 0.5, "score": "taylor"}}
    )
    own = countable(spec)
    assert (own.layers.keep, own.layers.choose, own.mlp.keep, own.mlp.score) == (2, "even", 0.5, "random")
    with pytest.raises(InputError, match="measured"):
        countable(
            spec.model_copy(
                update={"target": Student.model_validate({"layers": {"keep": 2}, "target": {"latency": 0.5}}).target}
            )
        )


@pytest.mark.parametrize(
    "kind", ["sequence", "token", "span", "multi_label", "regression", "masked_token", "next_token"]
)
def test_a_full_batch_has_labels_of_its_kind(kind):
    batch = full_batch(tiny_model("bert"), kind, 4, 8, 0.25)
    shapes = {"sequence": (4,), "span": (4, 2), "multi_label": (4, 3), "regression": (4,)}
    assert batch["labels"].shape == shapes.get(kind, (4, 8))
    assert batch["attention_mask"].all()
    if kind == "masked_token":
        assert int((batch["labels"] != -100).sum()) == 4 * 2


def test_on_a_cpu_the_copy_of_a_checkpoint_counts():
    """Weights of 4 bytes and moments of 8 for each parameter; of adapters these alone."""
    whole = rehearsal()
    peak = peak_of(whole, CPU)
    assert peak.parts["copy"] == peak.parts["weights"] + peak.parts["optimizer"] > 0
    adapted = peak_of(whole.with_spec(lora=Lora(rank=2)), CPU)
    assert 0 < adapted.parts["copy"] < adapted.parts["weights"]
