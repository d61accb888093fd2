"""Stages `train` and `control`: train the cut student, taught by the teacher or on labels alone."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object

from distill.data import TrainingBatches, evaluation_batches
from distill.data.tasks import Task
from distill.errors import InputError
from distill.evaluation.arms import ARMS, LABELS_ONLY, controls
from distill.evaluation.metrics import HIGHER_IS_BETTER, compute
from distill.evaluation.predict import merge_rows, predict
from distill.evaluation.table import finite_or_none
from distill.files import content_of, fresh_folder
from distill.losses import LayerMap, Objective, layer_map
from distill.models.cost import matmul_rate, training_flops
from distill.models.family import layers_of
from distill.models.forward import relation_widths
from distill.models.load import folder_fingerprint, hollow_model
from distill.models.plan import StudentPlan
from distill.pipeline.session import DTYPES, Session
from distill.pipeline.stage import Stage, results, settings_of, with_version
from distill.ranks import process_state
from distill.recipe.schema import Optimization, Recipe, Term, Training
from distill.student.masks import compact_trained, mask_settings, masks_for
from distill.teacher import LiveTeacher
from distill.training import Job, make_accelerator, train
from distill.training.optim import find_optimizer
from distill.training.setup import horizon
from distill.training.tracking import check_trackers


def distil(session: Session) -> None:
    """Train the student on everything that the recipe's loss asks for."""
    job = job_for(session, "distilled", session.recipe.training)
    train_arm(session, job)


def train_controls(session: Session) -> None:
    """Train every control arm for as many steps: what distillation has to beat."""
    spec = session.recipe.training
    if spec.steps is None:  # fewer examples may carry a label, and then the same epochs would be fewer steps
        spec = spec.model_copy(update={"epochs": None, "tokens": None, "steps": steps_of(session, spec)})
    for arm in controls(session.recipe):
        train_arm(session, job_for(session, arm, spec))


def arm_inputs(session: Session, arm: str) -> dict[str, Any]:
    """List what a trained arm is made of: its start, data, settings, and what it learns from the teacher."""
    recipe, terms = session.recipe, terms_of(session.recipe, arm)
    own = {
        "student": folder_fingerprint(session.arm_start(arm)),
        "mask": mask_settings(recipe),
        "data": session.corpus.fingerprint,
        "training": settings_of(recipe.training),
        "seed": recipe.seed,
    }
    if tuple(terms) == LABELS_ONLY:
        return own  # the teacher has no say
    return {
        **own,
        "teacher": folder_fingerprint(session.teacher),
        "plan": content_of(session.folder.plan),
        "losses": [term.model_dump(mode="json") for term in terms],
        "teacher_dtype": recipe.teacher.dtype,
    }


def terms_of(recipe: Recipe, arm: str) -> Sequence[Term]:
    """Return the loss of a trained arm."""
    terms = ARMS[arm].terms
    assert terms is not None, f"{arm} is not trained"
    return terms(recipe)


def check_training(recipe: Recipe, task: Task) -> None:
    """Find what the trainings of a recipe need, before hours are spent.

    Raises:
        InputError: Something is not installed, or there is no such thing.
    """
    for key, spec in (("training", recipe.training), ("teacher.fit", recipe.teacher.fit)):
        if spec is not None:
            find_optimizer(spec)
            if spec.precision == "fp16" and process_state().device.type == "cpu":
                raise InputError(f"{key}.precision: fp16 needs a GPU; use bf16 or fp32")
    check_trackers(recipe.training.trackers)
    if recipe.training.keep_best not in (None, *task.metrics):
        raise InputError(f"training.keep_best: {recipe.training.keep_best} is not one of {', '.join(task.metrics)}")
    if recipe.teacher.dtype == "int8":
        if importlib.util.find_spec("bitsandbytes") is None:
            raise InputError("teacher.dtype: int8 needs bitsandbytes: pip install 'distill[int8]'")
        if process_state().device.type != "cuda":
            raise InputError("teacher.dtype: int8 needs a GPU; use bf16")
    if recipe.teacher.device == "sharded" and process_state().num_processes == 1:
        raise InputError("teacher.device: sharded spreads the teacher over several processes, and there is one")


def job_for(session: Session, arm: str, spec: Training) -> Job:
    """Describe the training of an arm."""
    return Job(
        arm,
        spec,
        session.train_folder(arm),
        session.recipe.seed,
        with_version(arm_inputs(session, arm)),
        spec.log_every,
        spec.evaluate_every,
        constrain=partial(masks_for, session.recipe, steps=steps_of(session, session.recipe.training)),
        keep_best=(spec.keep_best, HIGHER_IS_BETTER.get(spec.keep_best, True)) if spec.keep_best else None,
        trackers=tuple(spec.trackers),
        continue_changed=session.continue_changed,
    )


def train_arm(session: Session, job: Job) -> None:
    """Train the arm that a job is called after, and save it."""
    arm, recipe, decided = job.title, session.recipe, StudentPlan.load(session.folder.plan)
    maps = partial(layer_map, plan=decided, student_layers=len(decided.layers), teacher_layers=decided.teacher_layers)
    objective = Objective(terms_of(recipe, arm), session.corpus.task.head, maps, session.vocabulary)
    steps = steps_of(session, recipe.training)
    teacher, model = None, ARMS[arm].prepare(recipe, session.load(session.arm_start(arm)), steps)
    if objective.needs_teacher:
        teacher = session.live_teacher(objective.teacher)
        objective.project(model.config.hidden_size, teacher.model.config.hidden_size)
        for each in (model, teacher.model) if objective.student.attention else ():
            each.set_attn_implementation("eager")  # the only one that keeps the probabilities
    train_model(session, job, model, objective, teacher)
    compact_trained(recipe, model, session.say)
    save_model(session, model, session.arm_folder(arm))


def train_model(session: Session, job: Job, model: Any, objective: Objective, teacher: LiveTeacher | None) -> None:
    """Train a model in place; it comes back on the CPU, in the dtype it had."""
    batches = batches_for(session, job.spec, labelled=not objective.needs_teacher)
    dtype = model.dtype
    model.float()  # AdamW's small steps would be lost in half-precision weights; autocast gives the speed
    accelerator = make_accelerator(job.spec, batches, job.trackers, job.folder.root)
    train(
        replace(job, peak_tokens_per_second=peak_tokens_per_second(session, job, model, teacher)),
        model,
        objective,
        teacher,
        batches,
        accelerator,
        evaluate=partial(held_out, session),
        say=session.say,
    )
    model.to(device="cpu", dtype=dtype)


def peak_tokens_per_second(session: Session, job: Job, model: Any, teacher: LiveTeacher | None) -> float | None:
    """Compute the speed of a training at an MFU of 1; None where its matrix products cannot be counted."""
    spec = session.recipe.teacher
    if teacher is not None and (spec.dtype == "int8" or spec.device != "same"):
        return None
    rate = matmul_rate(process_state().device, DTYPES[job.spec.precision]) * process_state().num_processes
    return float(rate / training_flops(model, teacher and teacher.model, session.recipe.data.max_length))


def batches_for(session: Session, spec: Optimization, *, labelled: bool) -> TrainingBatches:
    """The micro-batches of a training, of the labelled examples alone or of all."""
    corpus = session.corpus
    # Without teacher terms an unlabelled example would be a wasted forward pass.
    pool = corpus.labelled if labelled else range(len(corpus.train))
    micro = spec.micro_batch_size or max(1, spec.batch_size // process_state().num_processes)
    return TrainingBatches(corpus, pool, spec.batch_size, micro, session.recipe.seed)


def steps_of(session: Session, spec: Optimization) -> int:
    """Optimizer steps of the student's training."""
    labelled = all(term.match == "labels" for term in session.recipe.losses)
    return horizon(spec, batches_for(session, spec, labelled=labelled))


def held_out(session: Session, model: Any, stopped: Callable[[], bool]) -> dict[str, float | None]:
    """The task's metrics on the test split, shared out over the processes; none once `stopped` says so."""
    corpus, state = session.corpus, process_state()
    size = session.recipe.evaluation.batch_size
    batches = evaluation_batches(corpus, corpus.test, size, state.process_index, state.num_processes)
    wanted = takewhile(lambda _batch: not stopped(), batches)
    rows = predict(model, wanted, corpus.task.head, vocabulary=session.vocabulary)
    columns = merge_rows(gather_object([rows]))
    return finite_or_none(compute(corpus.task.metrics, columns)) if columns else {}


def save_model(session: Session, model: Any, folder: Path) -> None:
    """Save a model and the tokenizer, from the main process."""
    if process_state().is_main_process:
        with fresh_folder(folder) as temporary:
            model.save_pretrained(temporary)
            session.tokenizer.save_pretrained(temporary)


def check(session: Session) -> None:
    """Find every loss, optimizer and tracker that the recipe names, and what they need, before hours are spent.

    Raises:
        InputError: A name leads nowhere, its params do not fit, or a package is missing.
    """
    recipe, task = session.recipe, session.task
    Objective(recipe.losses, task.head, lambda _policy: LayerMap(((0, 0),)))
    check_training(recipe, task)
    check_relation_heads(session)


def check_labels(session: Session) -> None:
    """Refuse to learn from labels where no training example has one; the last to do so may be trained after hours.

    Raises:
        InputError: With everything in the recipe that learns from labels.
    """
    recipe = session.recipe
    if session.corpus.labelled:
        return
    learners = ["teacher.fit"] if recipe.teacher.fit else []
    terms = [index for index, term in enumerate(recipe.losses) if term.match == "labels"]
    learners += [f"losses.{index} (match: labels)" for index in terms]
    taught = [arm for arm in controls(recipe) if any(term.match == "labels" for term in terms_of(recipe, arm))]
    learners += [f"evaluation.arms ({arm})" for arm in taught]
    if learners:
        raise InputError(
            f"data: no training example has a label, and these learn from labels: {', '.join(learners)}; "
            f"give labels to some training examples in {recipe.data.source}, or leave these out of the recipe"
        )


def check_relation_heads(session: Session) -> None:
    """Refuse relation heads that do not divide the teacher's queries, keys or values; the student's are as wide.

    Raises:
        InputError: They do not divide one of these widths.
    """
    asked = {
        f"losses.{index}.params.heads": int(term.params["heads"])  # a whole number, as `Objective` has checked
        for index, term in enumerate(session.recipe.losses)
        if term.match == "relations" and "heads" in term.params and ":" not in (term.loss or "")
    }
    if not asked:
        return
    model = hollow_model(session.source, session.remote_code)
    widths = sorted({width for layer in range(len(layers_of(model))) for width in relation_widths(model, layer)})
    for key, heads in asked.items():
        for width in widths:
            if width % heads:
                raise InputError(f"{key}: {heads} does not divide {width}, a width of the teacher's attention")


STAGE = Stage(
    "train",
    distil,
    partial(arm_inputs, arm="distilled"),
    results(lambda run: run.distilled),
    together=True,
    check=check,
    check_data=check_labels,
)
CONTROL = Stage(
    "control",
    train_controls,
    lambda session: {arm: arm_inputs(session, arm) for arm in controls(session.recipe)},
    lambda run: run.trained_controls(),
    wanted=lambda recipe: bool(controls(recipe)),
    together=True,
)
