"""The trainings of a recipe, to be rehearsed: models without weights, and the batches that they will read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from distill.data import TrainingBatches, collate
from distill.data.batches import micro_batches, step_indices
from distill.data.tasks.task import Settled
from distill.errors import InputError
from distill.evaluation.arms import LABELS_ONLY, terms_of, trained_arms, tries_of
from distill.losses import PREDICTION_KINDS
from distill.models.cost import random_ids
from distill.models.forward import UNLABELLED, Batch
from distill.models.load import ModelHead, random_model
from distill.models.plan import StudentPlan
from distill.models.precision import DTYPES
from distill.pipeline.rehearsal import EIGHT_BITS, Rehearsal
from distill.pipeline.session import Session
from distill.pipeline.train import batches_for, batches_of, fit_of, maps_of, spec_of, training_of
from distill.pipeline.train_checks import is_taught
from distill.recipe.schema import Student, Teacher, Training
from distill.student import build_student, plan_student
from distill.student.given import describe_student
from distill.training.setup import deal_out, horizon

LOOK = 200
"""Steps whose batches are looked at."""


@dataclass(frozen=True)
class Work:
    """One training with the amount of its work."""

    rehearsal: Rehearsal
    steps: int | None
    """Optimizer steps, of all settings and seeds that it is done with; None: not known without the data."""
    tokens: float
    """Real tokens of a step, over all processes."""
    usual: Batch | None = None
    """A micro-batch as they usually are, for the time."""
    share: float = 1.0
    """Padded tokens of a mean micro-batch, as a share of those of the usual one."""


def works_of(session: Session) -> list[Work]:
    """List the trainings of a run, in their order."""
    recipe, plan = session.recipe, StudentPlan.load(session.folder.plan)
    models = Models(session, session.teacher, session.head, session.corpus.head, plan, session.vocabulary)
    works = []
    if recipe.teacher.fit is not None:
        batches = batches_for(session, fit_of(recipe), labelled=True)
        works.append(_work(session, models.fit, batches, horizon(fit_of(recipe), batches)))
    for arm in trained_arms(recipe):
        lengths = [spec_of(session, arm, own).steps or 0 for own in tries_of(recipe, arm)]  # all have one
        work = _work(session, partial(models.arm, arm), batches_of(session, arm), lengths[0])
        works.append(replace(work, steps=sum(lengths) * recipe.evaluation.seeds))
    return works


def _work(session: Session, make: Callable[[Batch], Rehearsal], batches: TrainingBatches, steps: int) -> Work:
    """Find the batches of a training: the widest for the memory, a usual one for the time."""
    corpus, lengths, groups, real = session.corpus, batches.corpus.train.lengths, [], 0
    looked = min(steps, LOOK)
    for step in range(looked):
        chosen = step_indices(batches.pool, batches.batch_size, batches.seed, step)
        groups += micro_batches(chosen, lengths, batches.micro_batch_size)
        real += int(lengths[chosen].sum())
    padded = [len(group) * int(lengths[group].max()) for group in groups]
    mean = sum(padded) / len(padded)
    usual = min(range(len(groups)), key=lambda number: abs(padded[number] - mean))
    widest, typical = (collate(corpus, corpus.train, groups[number]) for number in (padded.index(max(padded)), usual))
    return Work(make(widest), steps, real / looked, typical, mean / padded[usual])


def hollow_works(session: Session) -> list[Work]:
    """List the trainings of a recipe without data and weights: every micro-batch is full of longest texts."""
    recipe, task = session.recipe, session.task
    settled = Settled(task.head, tuple(map(str, recipe.data.classes or ())))
    pooled = PREDICTION_KINDS[task.head].vectors
    head = ModelHead(task.auto_class, settled.classes, None, task.model_settings(settled), pooled)
    meta = hollow(session, session.source, head)
    if recipe.student.given is None:
        plan = plan_student(meta, countable(recipe.student))
    else:
        plan = describe_student(meta, hollow(session, session.folder_of("student.from"), head))
    models = Models(session, session.source, head, task.head, plan)
    makers: list[tuple[Callable[[Batch], Rehearsal], Training, list[dict[str, Any]]]] = []
    if recipe.teacher.fit is not None:
        makers.append((models.fit, fit_of(recipe), [{}]))
    for arm in trained_arms(recipe):
        makers.append((partial(models.arm, arm), recipe.training, tries_of(recipe, arm) * recipe.evaluation.seeds))
    works = []
    for make, spec, tries in makers:
        batch = full_batch(meta, task.head, deal_out(spec)[0], recipe.data.max_length, recipe.data.mask_share)
        per_step = spec.batch_size * recipe.data.max_length
        usual = spec.steps or (-(-spec.tokens // per_step) if spec.tokens else None)
        lengths = [own.get("steps", None if "epochs" in own else usual) for own in tries]
        works.append(Work(make(batch), None if None in lengths else sum(length or 0 for length in lengths), per_step))
    return works


def countable(spec: Student) -> Student:
    """Return a `student` section of the same size that can be planned without calibration.

    Raises:
        InputError: Its size has to be measured.
    """
    if spec.target is not None and spec.target.kind == "latency":
        raise InputError("--memory: student.target.latency has to be measured; plan without --memory")
    update: dict[str, Any] = {}
    for key in ("layers", "encoder_layers"):
        own = getattr(spec, key)
        if own is not None and isinstance(own.keep, int):
            update[key] = own.model_copy(update={"choose": "even", "params": {}, "protect_first": 0, "protect_last": 0})
    mlp = {"score": "random", "params": {}, "allocate": "uniform", "allocate_params": {}}
    if spec.mlp.allocate == "threshold":
        raise InputError("--memory: student.mlp.allocate: threshold needs a calibration; plan without --memory")
    return spec.model_copy(update={**update, "mlp": spec.mlp.model_copy(update=mlp)})


def full_batch(model: Any, kind: str, rows: int, length: int, share: float) -> Batch:
    """Make a micro-batch of texts of full length, with the labels of a kind of predictions.

    Args:
        model: Says what it reads; needs no weights.
        kind: A name from `PREDICTION_KINDS`.
        rows: Examples.
        length: Tokens of each.
        share: Of the tokens that are masked, in a masked language model.
    """
    ids = random_ids(model.config.vocab_size, (rows, length), model)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.main_input_name != "input_ids":
        sound = (rows, model.config.num_mel_bins, 2 * model.config.max_source_positions)
        batch = {model.main_input_name: torch.zeros(sound)}
    labels = {
        "token": torch.zeros_like(ids),
        "span": ids.new_zeros(rows, 2),
        "multi_label": ids.new_zeros(rows, getattr(model.config, "num_labels", 2)),
        "regression": torch.zeros(rows),
        "embedding": torch.arange(rows) // 2,
        "masked_token": ids.where(torch.arange(length) < share * length, UNLABELLED),
        **dict.fromkeys(("next_token", "seq2seq"), ids),
    }
    return {**batch, "labels": labels.get(kind, ids.new_zeros(rows))}


def hollow(session: Session, folder: Path, head: ModelHead) -> Any:
    """Make the model of a folder's config without weights, on the meta device, in the dtype that it is stored in."""
    with torch.device("meta"):
        return random_model(folder, head, 0, session.remote_code)


@dataclass(frozen=True)
class Models:
    """Makes the trainings of a recipe, whose models have no weights."""

    session: Session
    folder: Path
    """Holds the teacher's config."""
    head: ModelHead
    kind: str
    """Kind of predictions."""
    plan: StudentPlan
    vocabulary: int | None = None
    """Entries of the vocabulary that are tokens."""

    def whole(self) -> Any:
        """Make the teacher in the dtype that it is stored in."""
        return hollow(self.session, self.folder, self.head)

    def student(self) -> Any:
        """Make the student as it is trained."""
        if self.plan.given is not None:
            return hollow(self.session, self.session.folder_of("student.from"), self.head).float()
        with torch.device("meta"):
            return build_student(self.whole(), self.plan).float()

    def teaching(self, teacher: Teacher, folder: Path) -> Any:
        """Make a teacher as it computes; one in 8 bits has its linear maps in bf16 here, which `Rehearsal` converts."""
        model = hollow(self.session, folder, self.head)
        return model.to(torch.bfloat16 if teacher.dtype in EIGHT_BITS else DTYPES.get(teacher.dtype, model.dtype))

    def fit(self, batch: Batch) -> Rehearsal:
        """Rehearse the teacher's own fit."""
        spec = fit_of(self.session.recipe)
        passes = deal_out(spec, "teacher.fit")[1]
        return Rehearsal("teacher.fit", spec, lambda: self.whole().float(), None, LABELS_ONLY, self.kind, batch, passes)

    def arm(self, arm: str, batch: Batch) -> Rehearsal:
        """Rehearse the training of an arm."""
        recipe, terms = self.session.recipe, terms_of(self.session.recipe, arm)
        spec, (maps, encoder_maps) = training_of(recipe, arm), maps_of(self.plan)
        own = Rehearsal(arm, spec, self.student, None, terms, self.kind, batch, deal_out(spec)[1], maps, encoder_maps)
        own = replace(own, vocabulary=self.vocabulary)
        if not is_taught(terms):
            return own
        first, beside = recipe.teacher, [pair for pair in self.session.teachers[1:] if pair[0].device == "same"]
        return replace(
            own,
            teacher=partial(self.teaching, first, self.folder),
            teacher_dtype=first.dtype,
            teacher_device=first.device,
            cached=first.cache,
            beside=[partial(self.teaching, *pair) for pair in beside],
        )
