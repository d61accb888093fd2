"""The story of each verb, from a recipe to a released student. Stages meet only in the run folder."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from functools import partial
from pathlib import Path

import accelerate
import torch
import transformers
from accelerate.utils import reduce

from distill import __version__
from distill.data import collate, evaluation_batches
from distill.evaluation.arms import arm_row, measured, with_retained
from distill.evaluation.efficiency import add_disk_bytes, measure_efficiency
from distill.evaluation.metrics import HIGHER_IS_BETTER, compute
from distill.evaluation.predict import predict
from distill.learning import job_for, save_model, steps_of, train_arm, train_model
from distill.losses import Objective, label_loss
from distill.masking import mask_untrained, sparsity_table
from distill.models.layout import layers_of
from distill.models.load import load_model, random_model
from distill.models.outputs import Wanted
from distill.models.plan import StudentPlan
from distill.provenance import (
    build_inputs,
    calibration_inputs,
    control_inputs,
    evaluation_inputs,
    identity,
    plan_inputs,
    release_inputs,
    repair_inputs,
    teacher_inputs,
    training_inputs,
)
from distill.recipe.schema import Format, Recipe, Term
from distill.release.card import render_card
from distill.release.evidence import Evidence
from distill.release.export import check_padding, check_release, releasable_recipe, without_folders, write_release
from distill.release.formats import format_of
from distill.release.report import render_report
from distill.repairs import repaired
from distill.rundir import RunDir, fresh_folder, write_json, write_text
from distill.session import Session, Stage
from distill.student import (
    Statistics,
    build_student,
    calibrate,
    check_target,
    plan_student,
    wanted_statistics,
)
from distill.teacher import OnlineTeacher
from distill.training import Job, read_records
from distill.training.guards import processes

LABELS_ONLY = (Term(match="labels"),)


def fit_teacher(session: Session) -> None:
    """Fine-tune the teacher on the recipe's labels, so that it has something to teach about them."""
    spec = session.recipe.teacher.fit
    assert spec is not None, "the stage is not wanted without `teacher.fit`"
    if session.recipe.teacher.init == "random":
        model = random_model(session.source, session.head, session.recipe.seed, session.remote_code)
    else:
        seed, code = session.recipe.seed, session.remote_code
        model = load_model(session.source, session.head, new_head=True, random_seed=seed, remote_code=code)
    check_target(model, session.recipe.student)
    job = Job("teacher", spec, session.run.fit, session.recipe.seed, identity(teacher_inputs(session)))
    train_model(session, job, model, Objective(LABELS_ONLY, session.corpus.task.head), None)
    save_model(session, model, session.run.teacher)


def calibrate_teacher(session: Session) -> None:
    """One pass of the teacher over a sample, shared out over the processes; every score reads its result."""
    student, corpus, state = session.recipe.student, session.corpus, processes()
    spec = student.calibration
    sample = range(min(spec.examples, len(corpus.train)))
    starts = sample[:: spec.batch_size][state.process_index :: state.num_processes]
    batches = (collate(corpus, corpus.train, sample[start : start + spec.batch_size]) for start in starts)
    teacher = session.load(session.teacher).to(state.device)
    check_target(teacher, student)
    added = partial(reduce, reduction="sum")
    statistics = calibrate(teacher, batches, wanted_statistics(student), label_loss(corpus.task.head), added)
    if state.is_main_process:
        statistics.save(session.run.calibration)


def plan(session: Session) -> None:
    """Decide which layers and neurons the student keeps."""
    statistics = Statistics.load(session.run.calibration)
    teacher = session.load(session.teacher).to(processes().device)
    decided = plan_student(teacher, session.recipe.student, statistics)
    write_text(session.run.plan, decided.to_json())
    for key, choice in decided.choices.items():
        reason = f" ({choice.reason})" if choice.reason else ""
        session.say(f"  {key}: asked {choice.asked}, got {choice.got}{reason}")


def build(session: Session) -> None:
    """Cut the student."""
    student = build_student(session.load(session.teacher), StudentPlan.load(session.run.plan))
    format_of(student, session.recipe.release.format)  # refused before it is trained
    save_model(session, student, session.run.student)


def repair(session: Session) -> None:
    """Correct the cut student in closed form, and measure what each step is worth."""
    model, found = repaired(session)
    write_json(session.run.repair, found)
    save_model(session, model, session.run.repaired)


def distil(session: Session) -> None:
    """Train the student on everything that the recipe's loss asks for."""
    recipe, inputs = session.recipe, identity(training_inputs(session))
    job = job_for(recipe, "distilled", recipe.training, session.run.training, inputs)
    train_arm(session, job, recipe.losses, session.run.distilled)


def train_control(session: Session) -> None:
    """Train the same student for the same steps on labels alone: what distillation has to beat."""
    recipe, arm, spec = session.recipe, "labels_only", session.recipe.training
    if spec.steps is None:  # fewer examples carry a label, so the same epochs would be fewer steps
        spec = spec.model_copy(update={"epochs": None, "tokens": None, "steps": steps_of(session, spec)})
    job = job_for(recipe, arm, spec, session.run.control(arm), identity(control_inputs(session)))
    train_arm(session, job, LABELS_ONLY, session.run.control_model(arm))


def evaluate(session: Session) -> None:
    """Measure all arms on the held-out split, and teacher and student against the clock."""
    recipe, corpus = session.recipe, session.corpus
    teacher = OnlineTeacher(session.load(session.teacher), Wanted(stop_at_head=True), processes().device)
    rows, horizon = [], steps_of(session, recipe.training)
    for arm in session.arms:
        model = session.load(session.arm_folder(arm)).to(teacher.model.device)
        steps = 0 if arm in ("teacher", "cut", "repaired") else horizon
        if not steps and arm != "teacher":
            mask_untrained(recipe, model, horizon)
        batches = evaluation_batches(corpus, corpus.test, recipe.evaluation.batch_size)
        columns = predict(model, batches, corpus.task.head, teacher, session.vocabulary)
        metrics = compute(session.metrics, columns)
        rows.append(arm_row(arm, steps, measured(metrics)))
    efficiency, student = None, session.load(session.run.distilled)
    if recipe.evaluation.efficiency:
        efficiency = measure_efficiency(
            {"teacher": teacher.model, "student": student.to(teacher.model.device)},
            layers_of,
            kind=corpus.task.head,
            length=recipe.data.max_length,
            vocabulary=len(session.tokenizer),
            device=teacher.model.device,
        )
        add_disk_bytes(efficiency, {"teacher": session.teacher, "student": session.run.distilled})
    data = {"source": without_folders(recipe.data.source), "split": "test", "examples": len(corpus.test)}
    data |= {"train_examples": len(corpus.train), "labelled": len(corpus.labelled), "fingerprint": corpus.fingerprint}
    table = {
        "data": data,
        "metrics": session.metrics,
        "primary": session.metrics[0],
        "higher_is_better": {name: HIGHER_IS_BETTER.get(name, True) for name in session.metrics},
        "arms": with_retained(rows, session.metrics),
        "efficiency": efficiency,
        "sparsity": sparsity_table(recipe, student),
    }
    write_json(session.run.evaluation, table)


def release(session: Session) -> None:
    """Write the folder that is handed out, and prove that whoever loads it gets the same model."""
    model = session.load(session.run.distilled)
    evidence = _evidence(session, format_of(model, session.recipe.release.format))
    report = render_report(evidence)
    texts = {
        "README.md": render_card(evidence),
        "report.html": report,
        "plan.json": evidence.plan.to_json(),
        "recipe.yaml": evidence.recipe_text,
        "evaluation.json": session.run.evaluation.read_text(encoding="utf-8"),
    }
    probe = collate(session.corpus, session.corpus.test, range(min(8, len(session.corpus.test))))
    probe.pop("labels")
    with fresh_folder(session.run.release) as folder:
        written = write_release(folder, model, session.tokenizer, texts, evidence.auto_class, evidence.form)
        check_release(folder, written, evidence.auto_class, probe, evidence.form)
        check_padding(model, written, probe)
    write_text(session.run.report, report)


# --- what they share -------------------------------------------------------------------------------------------------


def _evidence(session: Session, form: Format) -> Evidence:
    recipe, spec = session.recipe, session.recipe.teacher
    return Evidence(
        recipe=recipe,
        recipe_text=releasable_recipe(recipe),
        plan=StudentPlan.load(session.run.plan),
        repair=json.loads(session.run.repair.read_text(encoding="utf-8")) if recipe.student.repair.wanted else None,
        evaluation=json.loads(session.run.evaluation.read_text(encoding="utf-8")),
        metrics=read_records(session.run.training.metrics),
        control_metrics=read_records(session.run.control("labels_only").metrics) if _wants_control(recipe) else [],
        teacher={
            "model": without_folders(spec.model),
            "revision": spec.revision,
            "sha256": spec.sha256,
            "model_type": StudentPlan.load(session.run.plan).model_type,
            "fitted": spec.fit is not None,
        },
        environment={
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "accelerate": accelerate.__version__,
            "distill": __version__,
            "device": str(processes().device.type),
            "processes": processes().num_processes,
        },
        auto_class=session.corpus.task.auto_class,
        form=form,
    )


def _wants_control(recipe: Recipe) -> bool:
    return "labels_only" in recipe.evaluation.arms


def _results(*paths: Callable[[RunDir], Path]) -> Callable[[RunDir], list[Path]]:
    return lambda run: [path(run) for path in paths]


TEACHER = Stage(
    "teacher", fit_teacher, teacher_inputs, _results(lambda run: run.teacher),
    wanted=lambda recipe: recipe.teacher.fit is not None, together=True,
)  # fmt: skip
CALIBRATE = Stage(
    "calibrate", calibrate_teacher, calibration_inputs, _results(lambda run: run.calibration), together=True
)
PLAN = Stage("plan", plan, plan_inputs, _results(lambda run: run.plan))
BUILD = Stage("build", build, build_inputs, _results(lambda run: run.student))
REPAIR = Stage(
    "repair", repair, repair_inputs, _results(lambda run: run.repaired, lambda run: run.repair),
    wanted=lambda recipe: recipe.student.repair.wanted,
)  # fmt: skip
TRAIN = Stage("train", distil, training_inputs, _results(lambda run: run.distilled), together=True)
CONTROL = Stage(
    "control", train_control, control_inputs, _results(lambda run: run.control_model("labels_only")),
    wanted=_wants_control, together=True,
)  # fmt: skip
EVALUATE = Stage("evaluate", evaluate, evaluation_inputs, _results(lambda run: run.evaluation))
RELEASE = Stage("release", release, release_inputs, _results(lambda run: run.release, lambda run: run.report))

STORY = (TEACHER, CALIBRATE, PLAN, BUILD, REPAIR, TRAIN, CONTROL, EVALUATE, RELEASE)
LAST = {"plan": PLAN, "build": REPAIR, "train": TRAIN, "evaluate": EVALUATE, "release": RELEASE, "run": RELEASE}
VERBS: dict[str, tuple[Stage, ...]] = {verb: STORY[: STORY.index(last) + 1] for verb, last in LAST.items()}
"""Each verb brings everything before it up to date; what is unchanged is skipped."""
