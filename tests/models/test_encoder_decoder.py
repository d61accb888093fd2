"""Both stacks of an encoder-decoder: what its decoder reads, what is captured of each, and what terms compare."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import transformers
from tiny import LAYERS, SEQ2SEQ, cut_by_hand, tiny_config, tiny_inputs, tiny_model

from distill.errors import InputError
from distill.losses import LayerMap, Objective, label_loss, layer_map
from distill.losses.kinds import PREDICTION_KINDS
from distill.models.forward import Capture, forward, run_base, with_decoder_inputs
from distill.recipe.schema import Term
from distill.student import calibrate
from distill.student.calibration.collect import StatisticsRequest
from distill.student.draw import exact_plan


def batch_for(model):
    """Source and labels, as a task gives them: the second target has two tokens of padding, the first a gap."""
    given = tiny_inputs(model)
    labels = given.pop("decoder_input_ids").clone()
    labels[0, 1] = -100
    labels[1, 3:] = -100
    return {**given, "labels": labels}


def classifier(family):
    torch.manual_seed(0)
    config = tiny_config(family, num_labels=3)
    return transformers.AutoModelForSequenceClassification.from_config(config).eval()


def classes_for(model):
    """Texts that end with the end token, which these heads look for, and a class each."""
    batch = tiny_inputs(model)
    del batch["decoder_input_ids"]
    last = batch["attention_mask"].sum(1) - 1
    batch["input_ids"][torch.arange(3), last] = model.config.eos_token_id
    return {**batch, "labels": torch.tensor([0, 2, 1])}


@pytest.mark.parametrize("family", SEQ2SEQ)
@torch.no_grad()
def test_the_decoder_reads_the_labels_shifted_as_the_model_itself_shifts_them(family):
    model = tiny_model(family)
    batch = batch_for(model)
    own = {name: tensor for name, tensor in batch.items() if name != "labels"}
    expected = model(**own, labels=batch["labels"]).logits
    logits = forward(model, batch, Capture()).logits
    assert torch.allclose(logits[0], expected[0], atol=1e-6)
    assert torch.allclose(logits[1, :3], expected[1, :3], atol=1e-6)
    read = with_decoder_inputs(model, batch)
    assert read["decoder_attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0], [1] * 5]
    assert with_decoder_inputs(model, read) == read  # what is given stays


@pytest.mark.parametrize("family", SEQ2SEQ)
@torch.no_grad()
def test_each_stack_is_captured_by_itself(family):
    model = tiny_model(family)
    batch = tiny_inputs(model)
    found = forward(model, batch, Capture(hidden=[-1, 1], encoder_hidden=[-1, 1]))
    outputs = model(**batch, output_hidden_states=True)
    for own, all_states in (
        (found.hidden, outputs.decoder_hidden_states),
        (found.encoder_hidden, outputs.encoder_hidden_states),
    ):
        assert sorted(own) == [-1, 1]
        for layer, states in own.items():
            assert torch.equal(states, all_states[layer + 1])


@pytest.mark.parametrize("family", ["t5", "t5-gated", "bart"])
def test_a_classifier_is_calibrated_on_what_its_head_makes_the_decoder_read(family):
    model = classifier(family)
    batch = classes_for(model)
    seen = []
    handle = model.base_model.decoder.register_forward_pre_hook(
        lambda _module, _given, named: seen.append(named["input_ids"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**{name: tensor for name, tensor in batch.items() if name != "labels"})
    run_base(model, [batch], [], lambda _batch: None)
    handle.remove()
    assert torch.equal(*seen)
    wanted = StatisticsRequest(gradients=True, losses_without=("main", "encoder"))
    statistics = calibrate(model, [batch], wanted, label_loss("sequence"))
    real = int(batch["attention_mask"].sum())
    assert statistics.sums["main.tokens"] == statistics.sums["encoder.tokens"] == real


def test_target_texts_are_calibrated_from_their_labels_alone():
    model = tiny_model("t5")
    batch = batch_for(model)
    wanted = StatisticsRequest(gradients=True)
    statistics = calibrate(model, [batch], wanted, label_loss("seq2seq"))
    assert statistics.sums["main.tokens"] == 13
    given = calibrate(model, [with_decoder_inputs(model, batch)], wanted, label_loss("seq2seq"))
    assert all(torch.equal(total, given.sums[name]) for name, total in statistics.sums.items())


def objective_for(terms, depth, encoder_depth):
    maps, encoder_maps = (
        partial(layer_map, plan=None, student_layers=layers, teacher_layers=LAYERS) for layers in (depth, encoder_depth)
    )
    return Objective(terms, "seq2seq", maps, encoder_maps=encoder_maps)


@pytest.mark.parametrize("family", ["t5", "bart", "whisper"])
@torch.no_grad()
def test_a_term_on_both_stacks_is_the_mean_of_one_on_each(family):
    teacher = tiny_model(family)
    student = cut_by_hand(teacher, (0, 3), [24], encoder=(1, 2, 3)) if family == "t5" else tiny_model(family, seed=1)
    depths = (2, 3) if family == "t5" else (LAYERS, LAYERS)
    batch = batch_for(teacher)
    objective = objective_for([Term(match="hidden", map="last", weight=2.0)], *depths)
    assert objective.names == ["hidden.mse.encoder", "hidden.mse.decoder"]
    own, target = (
        forward(model, batch, capture)
        for model, capture in ((student, objective.student), (teacher, objective.teacher))
    )
    loss, sums = objective(own, target, batch, objective.counts([batch]))
    real = PREDICTION_KINDS["seq2seq"].source(batch)
    targets = batch["labels"] != -100
    encoder = (own.encoder_hidden[depths[1] - 1] - target.encoder_hidden[3])[real].square().mean()
    decoder = (own.hidden[depths[0] - 1] - target.hidden[3])[targets].square().mean()
    assert loss.item() == pytest.approx((encoder + decoder).item(), rel=1e-5)
    assert (sums / objective.counts([batch])).tolist() == pytest.approx([encoder.item(), decoder.item()], rel=1e-5)
    assert objective.counts([batch]).tolist() == [int(real.sum()), 12]


def test_one_stack_can_be_named_and_pairs_must_be_of_one():
    def names(*terms):
        return objective_for(terms, LAYERS, LAYERS).names

    assert names(Term(match="hidden", stack="encoder", map=[(0, 1)])) == ["hidden.mse.encoder"]
    assert names(Term(match="embeddings", stack="decoder")) == ["embeddings.mse.decoder"]
    assert names(Term(match="embeddings")) == ["embeddings.mse.encoder", "embeddings.mse.decoder"]
    with pytest.raises(InputError, match=r"losses\.0\.map: the pairs may be of either stack; add stack"):
        names(Term(match="hidden", map=[(0, 1)]))
    with pytest.raises(InputError, match=r"losses\.0\.stack: the teacher is not an encoder-decoder"):
        Objective([Term(match="hidden", stack="encoder")], "sequence", lambda _policy: LayerMap(((0, 0),)))


def test_the_plan_maps_each_stack_to_the_layers_it_came_from():
    plan = exact_plan(tiny_model("bart"), {"main": [1, 3], "encoder": [0, 2, 3]})
    assert layer_map("plan", plan, 2, LAYERS).pairs == ((0, 1), (1, 3))
    assert layer_map("plan", plan, 3, LAYERS, side="encoder").pairs == ((0, 0), (1, 2), (2, 3))
    assert layer_map("span", plan, 3, LAYERS, side="encoder").pairs == ((0, 1), (1, 2), (2, 3))
