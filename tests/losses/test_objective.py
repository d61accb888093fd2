from math import log

import pytest
import torch
from torch.nn import functional

from distill.errors import InputError
from distill.losses import Objective, layer_map
from distill.models.forward import Capture, Outputs
from distill.recipe.schema import Term

B, L, V, D = 6, 5, 7, 4
LENGTHS = [5, 3, 4, 5, 2, 0]  # the last example is nothing but padding
TERMS = [
    Term(match="labels", weight=0.3),
    Term(match="logits", loss="forward_kl", temperature=2.0),
    Term(match="hidden", loss="cosine", map=[(0, 1), (1, 3)], weight=0.5),
]
both_heads = pytest.mark.parametrize("head", ["sequence", "next_token"])


def maps(policy):
    return layer_map(policy, None, student_layers=2, teacher_layers=4)


def outputs(head, layers, seed):
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(*((B, V) if head == "sequence" else (B, L, V)), generator=draw)
    return Outputs(logits, {layer: torch.randn(B, L, D, generator=draw) for layer in layers})


def sample(head):
    """Student, teacher and batch; the student's tensors are leaves, so that their gradients can be read."""
    student, teacher = outputs(head, [0, 1], seed=0), outputs(head, [1, 3], seed=1)
    for leaf in leaves(student):
        leaf.requires_grad_()
    mask = (torch.arange(L) < torch.tensor(LENGTHS)[:, None]).long()
    labels = torch.randint(V, (B, L), generator=torch.Generator().manual_seed(2)).masked_fill(mask == 0, -100)
    labels[1] = -100
    labels = labels[:, 0] if head == "sequence" else labels
    return student, teacher, {"attention_mask": mask, "labels": labels}


def leaves(result):
    return [result.logits, *result.hidden.values()]


def mapped(function, result):
    return Outputs(function(result.logits), {layer: function(state) for layer, state in result.hidden.items()})


def learn(objective, student, teacher, batch, sizes=(B,)):
    """One optimizer step over micro-batches of these sizes: the loss, the sums and the gradients."""
    for leaf in leaves(student):
        leaf.grad = None
    cuts = [slice(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(len(sizes))]
    batches = [{key: value[cut] for key, value in batch.items()} for cut in cuts]
    counts = objective.counts(batches)
    loss, sums = torch.zeros(()), torch.zeros(len(objective.names))
    for cut, micro_batch in zip(cuts, batches, strict=True):
        part, part_sums = objective(
            mapped(lambda x, cut=cut: x[cut], student), mapped(lambda x, cut=cut: x[cut], teacher), micro_batch, counts
        )
        part.backward()
        loss, sums = loss + part.detach(), sums + part_sums
    return loss, sums, [leaf.grad for leaf in leaves(student)]


# One loss however the examples are dealt out


@both_heads
@pytest.mark.parametrize("sizes", [(3, 3), (1, 2, 3), (5, 1), (2, 0, 4), (1, 1, 1, 1, 1, 1)])
def test_every_split_in_micro_batches_has_the_same_loss_and_gradient(head, sizes):
    objective = Objective(TERMS, head, maps)
    whole = learn(objective, *sample(head))
    split = learn(objective, *sample(head), sizes)
    torch.testing.assert_close(split, whole, rtol=1e-6, atol=1e-9)


def test_the_loss_of_a_sequence_head_is_the_textbook_formula():
    student, teacher, batch = sample("sequence")
    loss, _, gradients = learn(Objective(TERMS, "sequence", maps), student, teacher, batch)
    real, tokens = slice(0, 5), batch["attention_mask"].bool()
    cross_entropy = functional.cross_entropy(student.logits, batch["labels"])
    own, theirs = ((side.logits[real] / 2).log_softmax(-1) for side in (student, teacher))
    kl = 4 * functional.kl_div(own, theirs, reduction="batchmean", log_target=True)
    pairs = [(student.hidden[s][tokens], teacher.hidden[t][tokens]) for s, t in [(0, 1), (1, 3)]]
    distance = torch.stack([1 - functional.cosine_similarity(*pair, dim=-1) for pair in pairs]).mean()
    expected = 0.3 * cross_entropy + kl + 0.5 * distance
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(gradients, list(torch.autograd.grad(expected, leaves(student))))


def test_counts_come_from_the_batches_alone():
    for head, expected in [("sequence", [4, 5, 19]), ("next_token", [12, 14, 19])]:
        batch = sample(head)[2]  # next_token: a text of n tokens makes n - 1 predictions; text 1 has no labels
        counts = Objective(TERMS, head, maps).counts([batch, batch])
        assert counts.dtype == torch.int64 and counts.tolist() == [2 * count for count in expected]


def test_no_batches_count_as_nothing():
    assert Objective(TERMS, "sequence", maps).counts([]).tolist() == [0, 0, 0]


# Shift and masks


def test_a_position_predicts_the_next_label_and_the_last_predicts_nothing():
    logits = torch.tensor([[[1 / 4, 3 / 4], [1 / 2, 1 / 2], [1e-3, 1.0]]]).log()
    batch = {"attention_mask": torch.ones(1, 3), "labels": torch.tensor([[0, 1, 0]])}
    objective = Objective([Term(match="labels")], "next_token")
    loss, sums = objective(Outputs(logits), None, batch, objective.counts([batch]))
    assert sums.item() == pytest.approx(log(4 / 3) + log(2))  # label 1 at position 0, label 0 at position 1
    assert loss.item() == pytest.approx((log(4 / 3) + log(2)) / 2)


def test_a_packed_document_does_not_predict_the_next_document():
    student, teacher, batch = sample("next_token")
    batch = {"attention_mask": torch.ones(B, L), "labels": torch.zeros(B, L, dtype=torch.int64)}
    packed = batch | {"document_ids": torch.tensor([[0, 0, 1, 1, 1]]).expand(B, L)}
    objective = Objective(TERMS[:2], "next_token")
    assert objective.counts([batch]).tolist() == [4 * B, 4 * B]
    assert objective.counts([packed]).tolist() == [3 * B, 3 * B]
    gradient = learn(objective, student, teacher, packed)[2][0]
    assert gradient[:, [1, 4]].eq(0).all() and gradient[:, [0, 2, 3]].ne(0).any(-1).all()


@both_heads
@pytest.mark.parametrize("left", [False, True])
def test_padding_has_no_effect_and_no_gradient_whatever_it_holds(head, left):
    objective = Objective(TERMS, head, maps)
    student, teacher, batch = sample(head)
    loss, sums, gradients = learn(objective, student, teacher, batch)

    def pad(tensor, value):
        extra = tensor.new_full((B, 3, *tensor.shape[2:]), value)
        return torch.cat([extra, tensor] if left else [tensor, extra], 1)

    def pad_positions(tensor):
        return pad(tensor.detach(), float("nan")).requires_grad_() if tensor.ndim == 3 else tensor

    batch = {key: pad(value, -100 * (key == "labels")) if value.ndim == 2 else value for key, value in batch.items()}
    padded = learn(objective, mapped(pad_positions, student), mapped(pad_positions, teacher), batch)
    torch.testing.assert_close(padded[:2], (loss, sums))
    for gradient, before in zip(padded[2], gradients, strict=True):
        torch.testing.assert_close(gradient, pad(before, 0) if gradient.ndim == 3 else before)


def test_unlabelled_examples_learn_from_the_teacher_alone():
    batch = {"attention_mask": torch.ones(2, 3), "labels": torch.tensor([-100, 1])}
    student, teacher = Outputs(torch.zeros(2, 2, requires_grad=True)), Outputs(torch.tensor([[3.0, 0], [0, 0]]))
    objective = Objective([Term(match="labels"), Term(match="logits")], "sequence")
    counts = objective.counts([batch])
    objective(student, teacher, batch, counts)[0].backward()
    assert counts.tolist() == [1, 2]
    probability = torch.tensor([3.0, 0]).softmax(-1)
    # KL: (S - T) / 2 positions; labels: (S - one-hot) / 1 label
    torch.testing.assert_close(student.logits.grad, torch.stack([(0.5 - probability) / 2, torch.tensor([0.5, -0.5])]))


# A step without any valid position


@both_heads
@pytest.mark.parametrize("terms", [TERMS, TERMS[:1], TERMS[1:2], TERMS[2:]])
def test_nothing_valid_gives_zero_and_zero_gradients_even_with_infinite_logits(head, terms):
    student, teacher, batch = sample(head)
    with torch.no_grad():
        student.logits.fill_(torch.inf)
    batch = {"attention_mask": torch.zeros(B, L), "labels": torch.full_like(batch["labels"], -100)}
    objective = Objective(terms, head, maps)
    loss, sums, gradients = learn(objective, student, teacher, batch)
    assert loss == 0 and not sums.any()
    reached = [gradients[0]] if len(terms) == 1 and terms[0].match != "hidden" else gradients
    assert all(gradient.eq(0).all() for gradient in reached)


# Scales, weights and reports


def test_temperature_squared_is_applied_unless_it_is_switched_off():
    student, teacher, batch = sample("sequence")
    terms = [Term(match="logits", temperature=3.0, scale_by_temperature=scale) for scale in (True, False)]
    _, sums, _ = learn(Objective(terms, "sequence"), student, teacher, batch)
    assert sums[0] == 9 * sums[1] > 0


def test_sums_are_detached_fp32_and_without_weight():
    student, _, batch = sample("sequence")
    terms = [Term(match="labels", weight=0.0), Term(match="labels", weight=2.0)]
    objective = Objective(terms, "sequence")
    loss, sums = objective(student, None, batch, objective.counts([batch]))
    assert sums.dtype == torch.float32 and not sums.requires_grad
    assert sums[0] == sums[1] and loss.item() == pytest.approx(2 * sums[0].item() / 4)


@both_heads
def test_a_student_that_equals_its_teacher_has_nothing_to_learn_from_it(head):
    teacher, _, batch = sample(head)
    names = ["forward_kl", "reverse_kl", "jsd", "skew_forward_kl"]
    terms = [Term(match="logits", loss=name, temperature=2.0) for name in names]
    terms += [Term(match="hidden", loss=name, map=[(0, 0), (1, 1)]) for name in ("mse", "cosine")]
    loss, sums, _ = learn(Objective(terms, head, maps), teacher, teacher, batch)
    assert loss == 0 and not sums.any()


def test_the_teacher_gets_no_gradient():
    student, teacher, batch = sample("sequence")
    for leaf in leaves(teacher):
        leaf.requires_grad_()
    learn(Objective(TERMS, "sequence", maps), student, teacher, batch)
    assert all(leaf.grad is None for leaf in leaves(teacher))


@both_heads
def test_classes_beyond_the_vocabulary_have_no_effect_on_logits_terms(head):
    student, teacher, batch = sample(head)
    objective = Objective(TERMS[1:2], head, vocabulary=V)
    expected = learn(objective, student, teacher, batch)
    wide, wider = (
        Outputs(functional.pad(side.logits.detach(), (0, extra), value=1e4).requires_grad_())
        for side, extra in [(student, 2), (teacher, 3)]
    )
    loss, _, (gradient,) = learn(objective, wide, wider, batch)
    assert loss == expected[0] and gradient[..., V:].eq(0).all()
    torch.testing.assert_close(gradient[..., :V], expected[2][0])


def test_low_precision_outputs_give_an_fp32_loss():
    student, teacher, batch = sample("next_token")
    half = [mapped(lambda x: x.detach().bfloat16().requires_grad_(), side) for side in (student, teacher)]
    loss, _, gradients = learn(Objective(TERMS, "next_token", maps), *half, batch)
    assert loss.dtype == torch.float32 and {gradient.dtype for gradient in gradients} == {torch.bfloat16}


# What a recipe can say


def test_names_are_unique_and_needs_are_known_before_the_first_step():
    hidden = Term(match="hidden", map=[(1, 3), (0, 3)])
    own = Term(match="hidden", loss="distill.losses.hidden:cosine", map="last")
    objective = Objective([Term(match="labels"), Term(match="logits"), hidden, hidden, own], "sequence", maps)
    assert objective.names == ["labels", "logits.forward_kl", "hidden.mse", "hidden.mse.2", "hidden.cosine"]
    assert (objective.student.hidden, objective.teacher.hidden) == ([0, 1], [3])
    assert objective.needs_teacher


def test_each_match_captures_the_layers_that_it_compares():
    pairs = [(0, 1), (1, 3)]
    states = [Term(match="hidden", map=pairs), Term(match="embeddings")]
    attention = [Term(match="attention", map=pairs[:1]), Term(match="relations", map=pairs[1:])]
    objective = Objective([Term(match="labels"), *states, *attention], "next_token", maps)
    assert objective.student == Capture([-1, 0, 1], attention=[0], relations=[1], stop_at_head=True)
    assert objective.teacher == Capture([-1, 1, 3], attention=[1], relations=[3], stop_at_head=True)
    assert Objective([Term(match="output")], "embedding").student == Capture()


@pytest.mark.parametrize(("match", "teacher"), [("labels", False), ("logits", True), ("hidden", True)])
def test_each_kind_of_term_says_what_it_needs(match, teacher):
    objective = Objective([term for term in TERMS if term.match == match], "sequence", maps)
    assert objective.needs_teacher == teacher


@pytest.mark.parametrize(
    ("term", "message"),
    [
        (Term(match="logits", loss="jsd", params={"beta": 1.5}), r"losses\.0\.params: beta must be between 0 and 1"),
    ],
)
def test_a_wrong_term_is_refused_before_any_work(term, message):
    with pytest.raises(InputError, match=message):
        Objective([term], "sequence", maps)


def test_a_missing_teacher_is_an_error_and_not_a_zero():
    student, _, batch = sample("sequence")
    objective = Objective(TERMS[1:2], "sequence")
    with pytest.raises(ValueError, match="need a teacher's outputs"):
        objective(student, None, batch, objective.counts([batch]))


# Schedules


def test_weight_temperature_and_parameters_follow_the_progress_of_the_training():
    student, teacher, batch = sample("sequence")
    moving = [
        Term(match="hidden", map="last", weight=2.0, schedule={"weight": 0.0, "start": 0.25, "end": 0.75}),
        Term(match="logits", temperature=3.0, schedule={"temperature": 1.0, "shape": "cosine"}),
        Term(match="logits", loss="jsd", params={"beta": 0.2}, schedule={"params": {"beta": 0.8}, "weight": 3.0}),
    ]
    half = (1 - 2**-0.5) / 2  # of a cosine, at a quarter of the way
    whole = Objective(moving, "sequence", maps)
    for progress, weight, temperature, beta, other in [
        (0.0, 2.0, 3.0, 0.2, 1.0), (0.25, 2.0, 3 - 2 * half, 0.35, 1.5), (0.5, 1.0, 2.0, 0.5, 2.0),
        (0.75, 0.0, 1 + 2 * half, 0.65, 2.5), (1.0, 0.0, 1.0, 0.8, 3.0),
    ]:  # fmt: skip
        fixed = [
            Term(match="hidden", map="last", weight=weight),
            Term(match="logits", temperature=temperature),
            Term(match="logits", loss="jsd", params={"beta": beta}, weight=other),
        ]
        results = []
        for objective, at in ((whole, progress), (Objective(fixed, "sequence", maps), 0.0)):
            results.append(objective(student, teacher, batch, objective.counts([batch]), at))
        torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    ("term", "message"),
    [
        (
            Term(match="logits", loss="jsd", params={"beta": 0.5}, schedule={"params": {"beta": 1.5}}),
            "beta must be between 0 and 1",
        ),
    ],
)
def test_a_schedule_that_cannot_be_followed_is_refused(term, message):
    with pytest.raises(InputError, match=message):
        Objective([term], "sequence", maps)


# Students of another width


def test_a_projection_brings_the_student_to_the_width_of_its_teacher():
    student, teacher, batch = sample("sequence")
    wide = Outputs(teacher.logits, {layer: functional.pad(state, (0, 2)) for layer, state in student.hidden.items()})
    terms = [Term(match="hidden", map=[(0, 0), (1, 1)]), Term(match="hidden", loss="cosine", map=[(1, 1)])]
    objective = Objective(terms, "sequence", maps)
    with pytest.raises(ValueError, match="project"):
        objective(student, wide, batch, objective.counts([batch]))
    objective.project(D, D + 2)
    assert sorted(objective.projections) == ["0:0", "1:1"]
    loss, _ = objective(student, wide, batch, objective.counts([batch]))
    assert loss == 0  # it starts as the identity
    objective.projections["1:1"].weight.data.add_(0.1)
    objective(student, wide, batch, objective.counts([batch]))[0].backward()
    assert objective.projections["1:1"].weight.grad.ne(0).any()


def test_equal_widths_need_no_projection():
    objective = Objective(TERMS, "sequence", maps)
    objective.project(D, D)
    assert not len(objective.projections)
