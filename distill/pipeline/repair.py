"""Stage `repair`: correct the cut student in closed form, and measure its held-out loss after each step."""

from __future__ import annotations

import math
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from distill.errors import InputError
from distill.files import content_of, write_json
from distill.losses import Objective
from distill.models.forward import forward, to_device
from distill.models.load import folder_fingerprint, hollow_model
from distill.models.plan import StudentPlan
from distill.models.precision import autocast_for
from distill.pipeline.session import Session, in_precision
from distill.pipeline.stage import Stage
from distill.pipeline.train import save_model
from distill.recipe.schema import Term
from distill.student.repair.steps import RepairStep, check_repair, repair_student

LOSS = Term(match="labels")
HELD_OUT_TERMS = {"loss": LOSS, "kl": Term(match="logits")}
"""Measured of a repaired student: the task's loss, and KL(teacher || student)."""
REGRESSION_TERMS = {"loss": LOSS, "teacher_mse": Term(match="logits", loss="logit_mse")}
"""The same where the student gives a number: the mean squared differences from the labels and from the teacher's."""


def check(session: Session) -> None:
    """Refuse a repair that the teacher's family does not allow, before anything is done."""
    check_repair(hollow_model(session.source, session.remote_code), session.recipe.student.repair)


def check_data(session: Session) -> None:
    """Refuse a calibration sample that leaves no example to measure a repair with."""
    examples, have = session.recipe.student.calibration.examples, len(session.corpus.train)
    if examples >= have:
        raise InputError(
            f"student.calibration.examples: {examples} takes all {have} training examples, and a "
            f"repair is measured on others; use less than {have}"
        )


def work(session: Session) -> None:
    """Repair the student, and record the errors before and after each step."""
    student, found = repair(session, session.folder.student, StudentPlan.load(session.folder.plan))
    write_json(session.folder.repair, found)
    save_model(session, student, session.folder.repaired)


def repair(session: Session, folder: Path, plan: StudentPlan) -> tuple[Any, dict[str, Any]]:
    """Repair the student that a plan cut, from its folder; returns it, on the CPU, and the record of the steps."""
    spec, corpus = session.recipe.student, session.corpus
    end = spec.calibration.examples + spec.repair.held_out
    held_out = range(spec.calibration.examples, min(end, len(corpus.train)))
    loss_and_kl = HeldOutLoss(session, held_out)
    student = session.load(folder).to(loss_and_kl.teacher.device)
    steps: list[dict[str, Any]] = [{"name": "cut", "layers": [], "notes": [], "held_out": loss_and_kl(student)}]
    sample = [*session.batches(range(spec.calibration.examples), spec.calibration.batch_size)]
    for step in repair_student(loss_and_kl.teacher.model, student, plan, sample, spec.repair):
        steps.append(_record(step) | {"held_out": loss_and_kl(student)})
        session.say(_describe(steps[-1], steps[-2]))
    return student.cpu(), {
        "format": "distill.repair/1",
        "calibration": {"examples": spec.calibration.examples},
        "held_out": {"split": "train", "examples": len(held_out), "labelled": int(loss_and_kl.counts[0])},
        "steps": steps,
    }


def inputs(session: Session) -> dict[str, Any]:
    """List student and teacher, the plan between them, both samples, and the steps."""
    spec = session.recipe.student
    return {
        "teacher": session.teacher_inputs(),
        "data": session.corpus.fingerprint,
        "student": folder_fingerprint(session.folder.student),
        "plan": content_of(session.folder.plan),
        "examples": spec.calibration.examples,
        "repair": spec.repair.model_dump(mode="json"),
        **in_precision(session.recipe.training.precision),
    }


class HeldOutLoss:
    """Task loss and difference from the teacher on training examples outside the calibration sample."""

    def __init__(self, session: Session, examples: range):
        self.batches = [*session.batches(examples, session.recipe.evaluation.batch_size)]
        self.terms = REGRESSION_TERMS if session.corpus.head == "regression" else HELD_OUT_TERMS
        self.objective = Objective(tuple(self.terms.values()), session.corpus.head, None, session.vocabulary)
        self.teacher = session.live_teacher(self.objective.teacher, whole=True)
        self.precision = session.recipe.training.precision

    @cached_property
    def counts(self) -> torch.Tensor:
        """Positions with a label, and positions where the teacher predicts."""
        return self.objective.counts(self.batches)

    @torch.no_grad()
    def __call__(self, student: Any) -> dict[str, float | None]:
        """Compute the terms, in nats per position or squared units; None without labels, or where one is not finite."""
        sums, counts = torch.zeros(len(self.terms), dtype=torch.float64), self.counts.to(student.device)
        for cpu_batch in self.batches:
            batch = to_device(cpu_batch, student.device)
            with autocast_for(student, self.precision):
                outputs = forward(student, batch, self.objective.student)
            _, terms = self.objective(outputs, self.teacher(batch), batch, counts)
            sums += terms.double().cpu()
        values = (sums / self.counts).tolist()  # 0 / 0 is NaN: nothing has a label
        pairs = zip(self.terms, values, strict=True)
        return {name: value if math.isfinite(value) else None for name, value in pairs}


def _record(step: RepairStep) -> dict[str, Any]:
    layers = [asdict(layer) for layer in step.layers]
    return {"name": step.name, "layers": layers, "notes": step.notes, "error_left": step.left}


def _describe(step: dict[str, Any], before: dict[str, Any]) -> str:
    parts = [] if step["error_left"] is None else [f"{100 * step['error_left']:.1f} % of the calibration error left"]
    titles = {"kl": "held-out KL", "teacher_mse": "held-out difference from the teacher", "loss": "held-out loss"}
    for name, title in titles.items():
        old, new = before["held_out"].get(name), step["held_out"].get(name)
        if old is not None and new is not None:
            parts.append(f"{title} {old:.4g} → {new:.4g}")
    return f"  {step['name']}: {', '.join([*parts, *step['notes']])}"


STAGE = Stage(
    "repair",
    work,
    inputs,
    lambda session: [session.folder.repaired, session.folder.repair],
    wanted=lambda recipe: recipe.student.repair.wanted,
    check=check,
    check_data=check_data,
)
