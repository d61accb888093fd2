"""Each kind of head against the textbook formula of its task."""

import math

import pytest
import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForQuestionAnswering

from distill.errors import InputError
from distill.losses import LOGITS, PREDICTION_KINDS, Objective
from distill.models.forward import Capture, Outputs, forward
from distill.recipe.schema import Term

BOTH = [Term(match="labels", weight=0.5), Term(match="logits")]
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def loss_of(kind, terms, logits, labels, teacher=None):
    batch = {"attention_mask": MASK, "labels": labels}
    objective = Objective(terms, kind)
    student = logits.clone().requires_grad_()
    counts = objective.counts([batch])
    loss, _ = objective(Outputs(student), None if teacher is None else Outputs(teacher), batch, counts)
    loss.backward()
    assert student.grad.isfinite().all()
    return loss.detach(), counts.tolist(), student.grad


def kl(student, teacher):
    return LOGITS["forward_kl"](student, teacher).mean()


def test_multi_label_is_binary_cross_entropy_and_the_divergence_of_each_choice():
    logits, teacher = noise(3, 5), noise(3, 5, seed=1)
    labels = (noise(3, 5, seed=2) > 0).float()
    loss, counts, _ = loss_of("multi_label", BOTH, logits, labels, teacher)
    p, q = teacher.sigmoid(), logits.sigmoid()
    divergence = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    expected = 0.5 * functional.binary_cross_entropy_with_logits(logits, labels) + divergence
    torch.testing.assert_close(loss, expected)
    assert counts == [15, 15]
    assert loss_of("multi_label", BOTH[:1], logits, labels.index_fill(0, torch.tensor([1]), -100))[1] == [10]


def test_regression_is_squared_error_on_labels_and_teacher():
    logits, teacher, labels = noise(3, 1), noise(3, 1, seed=1), torch.tensor([0.5, -100, 2.0])
    terms = [BOTH[0], Term(match="logits", loss="logit_mse")]
    loss, counts, _ = loss_of("regression", terms, logits, labels, teacher)
    expected = 0.5 * functional.mse_loss(logits[[0, 2], 0], labels[[0, 2]]) + functional.mse_loss(logits, teacher)
    torch.testing.assert_close(loss, expected)
    assert counts == [2, 3]
    with pytest.raises(InputError, match="logit_mse"):
        Objective(BOTH, "regression")


def test_token_classification_is_about_the_token_itself():
    logits, teacher = noise(3, 4, 5), noise(3, 4, 5, seed=1)
    labels = torch.tensor([[1, -100, 2, 0], [3, 4, -100, -100], [-100, 0, 0, 1]])  # the last is padding with a label
    loss, counts, gradient = loss_of("token", BOTH, logits, labels, teacher)
    real, labelled = MASK.bool(), (labels != -100) & MASK.bool()
    expected = 0.5 * functional.cross_entropy(logits[labelled], labels[labelled]) + kl(logits[real], teacher[real])
    torch.testing.assert_close(loss, expected)
    assert counts == [7, 9] and gradient[~real].eq(0).all()


def test_an_answer_starts_and_ends_at_real_tokens():
    logits, teacher, labels = noise(3, 2, 4), noise(3, 2, 4, seed=1), torch.tensor([[0, 2], [1, 1], [-100, 2]])
    loss, counts, gradient = loss_of("span", BOTH, logits, labels, teacher)
    hidden = (MASK == 0)[:, None]
    own, theirs = (side.masked_fill(hidden, -torch.inf) for side in (logits, teacher))
    chosen = labels != -100
    expected = 0.5 * functional.cross_entropy(own[chosen], labels[chosen]) + kl(own, theirs)
    torch.testing.assert_close(loss, expected)
    assert counts == [5, 6] and gradient.masked_select(hidden).eq(0).all()


def test_a_question_answering_model_gives_both_ends():
    config = AutoConfig.for_model("bert", vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                  num_attention_heads=2)  # fmt: skip
    model = AutoModelForQuestionAnswering.from_config(config).eval()
    batch = {"input_ids": torch.ones(3, 4, dtype=torch.int64), "attention_mask": MASK}
    output = model(**batch)
    found = forward(model, batch, Capture(stop_at_head=True)).logits
    assert torch.equal(found, torch.stack([output.start_logits, output.end_logits], 1))


@pytest.mark.parametrize("kind", ["masked_token", "seq2seq"])
def test_masked_and_target_tokens_are_those_with_a_label(kind):
    logits, teacher = noise(3, 4, 5), noise(3, 4, 5, seed=1)
    labels = torch.tensor([[1, -100, 2, 0], [3, -100, -100, -100], [-100, -100, 0, -100]])
    loss, counts, _ = loss_of(kind, BOTH, logits, labels, teacher)
    chosen = labels != -100
    expected = 0.5 * functional.cross_entropy(logits[chosen], labels[chosen]) + kl(logits[chosen], teacher[chosen])
    torch.testing.assert_close(loss, expected)
    assert counts == [5, 5]


def test_embeddings_are_compared_by_their_similarities_and_themselves():
    own, teacher = noise(3, 6), noise(3, 8, seed=1)
    cosines = [functional.cosine_similarity(side[:, None], side[None], dim=-1) for side in (own, teacher)]
    off = [side[~torch.eye(3, dtype=torch.bool)].view(3, 2) / 0.1 for side in cosines]
    term = Term(match="logits", temperature=0.1, scale_by_temperature=False)
    loss, counts, _ = loss_of("embedding", [term], own, torch.zeros(3), teacher)
    torch.testing.assert_close(loss, kl(*off))
    assert counts == [3]
    loss, _, _ = loss_of("embedding", [Term(match="output", loss="cosine")], own, torch.zeros(3), teacher[:, :6])
    torch.testing.assert_close(loss, 1 - functional.cosine_similarity(own, teacher[:, :6]).mean())


def test_labels_are_learnt_by_telling_the_partner_among_the_others():
    vectors = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 2.0], [-1.0, 0.0], [1.0, 1.0]])
    batch = {"attention_mask": torch.ones(5, 2), "labels": torch.tensor([0, 0, 1, 1, -100])}
    objective = Objective([Term(match="labels")], "embedding")
    counts = objective.counts([batch])
    loss, _ = objective(Outputs(vectors), None, batch, counts)
    half = math.sqrt(0.5)
    cosines = {0: [0.6, 0.0, -1.0, half], 1: [0.6, 0.8, -0.6, 1.4 * half], 2: [0.0, 0.8, 0.0, half],
               3: [-1.0, -0.6, 0.0, -half]}  # fmt: skip
    partner = {0: 0, 1: 0, 2: 2, 3: 2}
    expected = [math.log(sum(math.exp((c - row[partner[k]]) / 0.05) for c in row)) for k, row in cosines.items()]
    assert counts.tolist() == [4] and loss.item() == pytest.approx(sum(expected) / 4, rel=1e-5)


def test_terms_that_a_head_has_nothing_for_are_refused():
    with pytest.raises(InputError, match="sentence embeddings"):
        Objective([Term(match="output")], "sequence")


@pytest.mark.parametrize("kind", sorted(set(PREDICTION_KINDS) - {"regression", "embedding"}))
def test_a_head_without_anything_valid_is_a_zero(kind):
    shape = {"sequence": (3, 5), "multi_label": (3, 5), "span": (3, 2, 4)}.get(kind, (3, 4, 5))
    labels = torch.full({"sequence": (3,), "span": (3, 2), "multi_label": (3, 5)}.get(kind, (3, 4)), -100)
    batch = {"attention_mask": torch.zeros(3, 4), "labels": labels}
    objective, student = Objective(BOTH, kind), noise(*shape).requires_grad_()
    loss, sums = objective(Outputs(student), Outputs(noise(*shape)), batch, objective.counts([batch]))
    loss.backward()
    assert loss == 0 and not sums.any() and student.grad.eq(0).all()


SHAPES = {"sequence": (3, 5), "multi_label": (3, 5), "regression": (3, 1), "span": (3, 2, 4), "embedding": (3, 6)}


@pytest.mark.parametrize("kind", PREDICTION_KINDS)
def test_gradients_in_float64_are_derivatives(kind):
    shape = SHAPES.get(kind, (3, 4, 5))
    labels = {
        "sequence": torch.tensor([1, -100, 4]),
        "multi_label": (noise(3, 5, seed=2) > 0).double(),
        "regression": torch.tensor([0.5, -100, 2.0], dtype=torch.float64),
        "span": torch.tensor([[0, 2], [1, 1], [-100, 2]]),
        "embedding": torch.zeros(3),
    }.get(kind, torch.tensor([[1, -100, 2, 0], [3, 4, -100, -100], [0, 0, 1, -100]]))
    terms = {
        "regression": [BOTH[0], Term(match="logits", loss="logit_mse")],
        "embedding": [Term(match="logits", temperature=0.5), Term(match="output", loss="cosine")],
    }.get(kind, BOTH)
    batch, teacher = {"attention_mask": MASK, "labels": labels}, Outputs(noise(*shape, seed=1).double())
    objective = Objective(terms, kind)
    counts = objective.counts([batch])

    def value(logits):
        return objective(Outputs(logits), teacher, batch, counts)[0]

    assert torch.autograd.gradcheck(value, (noise(*shape).double().requires_grad_(),))
