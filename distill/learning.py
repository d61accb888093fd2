"""How a stage trains a model: data, objective, teacher and constraint put together for the training package."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object

from distill.data import TrainingBatches, evaluation_batches
from distill.data.tasks import Task
from distill.errors import InputError
from distill.evaluation.arms import measured
from distill.evaluation.metrics import HIGHER_IS_BETTER, compute
from distill.evaluation.predict import gathered, predict
from distill.losses import Objective, layer_map
from distill.masking import compact_trained, masks_for
from distill.models.cost import matmul_rate, training_flops
from distill.models.layout import layers_of
from distill.models.plan import StudentPlan
from distill.recipe.schema import Optimization, Recipe, Term, Training
from distill.rundir import TrainDir, fresh_folder
from distill.session import Session
from distill.teacher import OnlineTeacher
from distill.training import Job, make_accelerator, train
from distill.training.guards import processes
from distill.training.optimizers import find_optimizer
from distill.training.setup import freeze, horizon
from distill.training.sharding import shard
from distill.training.tracking import check_trackers

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def check_training(recipe: Recipe, task: Task) -> None:
    """Find what the trainings of a recipe need, before hours are spent.

    Raises:
        InputError: Something is not installed, or there is no such thing.
    """
    for spec in (recipe.training, recipe.teacher.fit):
        if spec is not None:
            find_optimizer(spec)
    check_trackers(recipe.training.trackers)
    if recipe.training.keep_best not in (None, *task.metrics):
        raise InputError(f"training.keep_best: {recipe.training.keep_best} is not one of {', '.join(task.metrics)}")
    if recipe.teacher.dtype == "int8":
        if importlib.util.find_spec("bitsandbytes") is None:
            raise InputError("teacher.dtype: int8 needs bitsandbytes: pip install 'distill[int8]'")
        if processes().device.type != "cuda":
            raise InputError("teacher.dtype: int8 needs a GPU; use bf16")
    if recipe.teacher.device == "sharded" and processes().num_processes == 1:
        raise InputError("teacher.device: sharded spreads the teacher over several processes, and there is one")


def placed_teacher(session: Session, objective: Objective) -> OnlineTeacher:
    """The teacher where and in what the recipe wants it."""
    spec, device = session.recipe.teacher, processes().device
    if spec.dtype == "int8":
        model = session.load(session.teacher, int8_on=device)
    else:
        model = session.load(session.teacher)
        model.to(DTYPES.get(spec.dtype, model.dtype))
    if spec.device == "sharded":
        model = shard(model.requires_grad_(False).to(device), layers_of(model))
    return OnlineTeacher(model, objective.teacher, torch.device("cpu") if spec.device == "cpu" else device)


def job_for(recipe: Recipe, title: str, spec: Training, folder: TrainDir, inputs: str) -> Job:
    """The training of a student."""
    return Job(
        title,
        spec,
        folder,
        recipe.seed,
        inputs,
        spec.log_every,
        spec.evaluate_every,
        keep_best=(spec.keep_best, HIGHER_IS_BETTER.get(spec.keep_best, True)) if spec.keep_best else None,
        trackers=tuple(spec.trackers),
    )


def train_arm(session: Session, job: Job, terms: Sequence[Term], result: Path) -> None:
    """Train the student on some terms, and save it as `result`."""
    decided = StudentPlan.load(session.run.plan)
    maps = partial(layer_map, plan=decided, student_layers=len(decided.layers), teacher_layers=decided.teacher_layers)
    objective = Objective(terms, session.corpus.task.head, maps, session.vocabulary)
    teacher, model = None, session.load(session.start)
    if objective.needs_teacher:
        teacher = placed_teacher(session, objective)
        objective.project(model.config.hidden_size, teacher.model.config.hidden_size)
        for each in (model, teacher.model) if objective.student.attention else ():
            each.set_attn_implementation("eager")  # the only one that keeps the probabilities
        freeze(model, job.spec.freeze, job.spec.only)
        partly = any(not parameter.requires_grad for parameter in model.parameters())
        # Autocast, or another device, would compute the student's layers otherwise.
        if partly and job.spec.precision == "fp32" and session.recipe.teacher.device == "same":
            session.say(f"  layers run once for teacher and student: {teacher.share(model, objective.student)}")
    job = replace(job, constraint=masks_for(session.recipe, model, steps_of(session, session.recipe.training)))
    train_model(session, job, model, objective, teacher)
    compact_trained(session.recipe, model, session.say)
    save_model(session, model, result)


def train_model(session: Session, job: Job, model: Any, objective: Objective, teacher: OnlineTeacher | None) -> None:
    """Train a model in place; it comes back on the CPU, in the dtype it had."""
    batches = batches_for(session, job.spec, labelled=not objective.needs_teacher)
    dtype = model.dtype
    model.float()  # AdamW's small steps would be lost in half-precision weights; autocast gives the speed
    accelerator = make_accelerator(job.spec, batches, job.trackers, job.folder.root)
    train(
        replace(job, limit=limit_of(session, job, model, teacher)),
        model,
        objective,
        teacher,
        batches,
        accelerator,
        evaluate=partial(held_out, session),
        say=session.say,
    )
    model.to(device="cpu", dtype=dtype)


def limit_of(session: Session, job: Job, model: Any, teacher: OnlineTeacher | None) -> float | None:
    """Tokens per second of a training whose time all goes into matrix products; None where they cannot be counted."""
    spec = session.recipe.teacher
    if teacher is not None and (spec.dtype == "int8" or spec.device != "same"):
        return None
    rate = matmul_rate(processes().device, DTYPES[job.spec.precision]) * processes().num_processes
    return float(rate / training_flops(model, teacher and teacher.model, session.recipe.data.max_length))


def batches_for(session: Session, spec: Optimization, *, labelled: bool) -> TrainingBatches:
    """The micro-batches of a training, of the labelled examples alone or of all."""
    corpus = session.corpus
    # Without teacher terms an unlabelled example would be a wasted forward pass.
    pool = corpus.labelled if labelled else range(len(corpus.train))
    micro = spec.micro_batch_size or max(1, spec.batch_size // processes().num_processes)
    return TrainingBatches(corpus, pool, spec.batch_size, micro, session.recipe.seed)


def steps_of(session: Session, spec: Optimization) -> int:
    """Optimizer steps of the student's training."""
    labelled = all(term.match == "labels" for term in session.recipe.losses)
    return horizon(spec, batches_for(session, spec, labelled=labelled))


def held_out(session: Session, model: Any, stopped: Callable[[], bool]) -> dict[str, float | None]:
    """The task's metrics on the test split, shared out over the processes; none once `stopped` says so."""
    corpus, state = session.corpus, processes()
    size = session.recipe.evaluation.batch_size
    batches = evaluation_batches(corpus, corpus.test, size, state.process_index, state.num_processes)
    wanted = takewhile(lambda _batch: not stopped(), batches)
    columns = predict(model, wanted, corpus.task.head, vocabulary=session.vocabulary)
    if state.num_processes > 1:
        columns = gathered(columns, gather_object)
    if not columns:
        return {}
    return measured(compute(corpus.task.metrics, columns))


def save_model(session: Session, model: Any, folder: Path) -> None:
    """Save a model and the tokenizer, from the main process."""
    if processes().is_main_process:
        with fresh_folder(folder) as temporary:
            model.save_pretrained(temporary)
            session.tokenizer.save_pretrained(temporary)
