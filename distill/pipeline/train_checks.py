"""Checks of the stages `train` and `control` before hours are spent: names, devices, labels."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch

from distill.errors import InputError
from distill.evaluation.arms import controls, measured_arms, terms_of
from distill.evaluation.metrics import measurable
from distill.evaluation.predict import column_names
from distill.losses import MATCHES, PREDICTION_KINDS, LayerMap, Objective
from distill.losses.mapping import Policy
from distill.models.fp8 import fault_of
from distill.models.load import hollow_model
from distill.pipeline.session import Session
from distill.ranks import process_state
from distill.recipe.schema import Optimization, Recipe, Term
from distill.registry import is_reference
from distill.training.optim import try_optimizer
from distill.training.setup import check_launch_keeps, deal_out
from distill.training.tracking import check_trackers


def one_pair(_policy: Policy) -> LayerMap:
    """Stand in for the pairs of layers where only names and parameters are looked at."""
    return LayerMap(((0, 0),))


def check(session: Session) -> None:
    """Find every loss, optimizer and tracker that the recipe names, and what they need, before hours are spent.

    Raises:
        InputError: A name leads nowhere, its params do not fit, or a package or a device is missing.
    """
    recipe, task, state = session.recipe, session.task, process_state()
    try_terms(recipe, task.head)
    for index, term in enumerate(recipe.losses):
        fits = MATCHES[term.match].fits_teacher
        if fits and term.params and not is_reference(term.loss or ""):
            fits(hollow_model(session.source, session.remote_code), term.params, f"losses.{index}.params")
    check_optimization("training", recipe.training, task.head)
    teachers = {key.removesuffix(".model"): one for key, one in recipe.models.items() if key != "student.from"}
    for key, one in teachers.items():
        check_dtype(f"{key}.dtype", one.dtype, state.device)
        if one.fit is not None:
            check_optimization(f"{key}.fit", one.fit, task.head)
        if one.device == "sharded" and state.num_processes == 1:
            raise InputError(f"{key}.device: sharded spreads the teacher over several processes, and there is one")
    check_trackers(recipe.training.trackers)
    if recipe.training.on_policy is not None and not task.prompted:  # a task of the user's own
        raise InputError(f"training.on_policy: task {task.name} does not say what is a prompt: its `prompted` is False")
    if recipe.training.keep_best not in (None, *task.metrics):  # of a task of the user's own
        raise InputError(f"training.keep_best: {recipe.training.keep_best} is not one of {', '.join(task.metrics)}")


def check_optimization(key: str, spec: Optimization, head: str) -> None:
    """Refuse a training, of the section `key`, that this machine and this launch cannot do, with an InputError."""
    try:
        try_optimizer(spec, process_state().device)
    except InputError as error:
        raise InputError(f"{key}.{error}") from error
    deal_out(spec, key)
    check_launch_keeps(spec, key=key)
    if spec.lora is not None and importlib.util.find_spec("peft") is None:
        raise InputError(f"{key}.lora needs peft: pip install 'distill[lora]'")
    if process_state().device.type == "cpu":
        if spec.precision == "fp16":
            raise InputError(f"{key}.precision: fp16 needs a GPU; use bf16 or fp32")
        if spec.head_precision == "tf32":
            raise InputError(f"{key}.head_precision: tf32 needs a GPU; use bf16 or fp32")
    if spec.head_precision != "auto" and not PREDICTION_KINDS[head].vocabulary:
        raise InputError(f"{key}.head_precision: is for language models; a head of classes is always fp32; remove it")


def check_dtype(key: str, dtype: str, device: torch.device) -> None:
    """Refuse a teacher in 8 bits where a package or the GPU for it is missing. Raises InputError with the key."""
    if dtype == "int8" and importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(f"{key}: int8 needs bitsandbytes: pip install 'distill[int8]'")
    if dtype == "int8" and device.type != "cuda":
        raise InputError(f"{key}: int8 needs a GPU; use bf16")
    if dtype == "fp8" and (fault := fault_of(device)):
        raise InputError(f"{key}: fp8 {fault}; use bf16")


def try_terms(recipe: Recipe, head: str) -> None:
    """Resolve the terms of a recipe for a kind of predictions. Raises InputError where they do not go together."""
    both = any(term.stack for term in recipe.losses)
    Objective(recipe.losses, head, one_pair, encoder_maps=one_pair if both else None)


def check_labels(session: Session) -> None:
    """Refuse to learn from labels where no training example has one; the last to do so may be trained after hours.

    Raises:
        InputError: With everything in the recipe that learns from labels.
    """
    recipe = session.recipe
    try_terms(recipe, session.corpus.head)
    _check_keep_best(session)
    if recipe.teacher.dtype == "fp8" and session.corpus.head == "regression":
        key = f"{session.teacher_key}.dtype"
        raise InputError(f"{key}: what fp8 changes is judged by KL, which numbers do not have; use bf16")
    if session.corpus.labelled:
        return
    learners = [f"{session.teacher_key}.fit"] if recipe.teacher.fit else []
    terms = [index for index, term in enumerate(recipe.losses) if not is_taught([term])]
    learners += [f"losses.{index} (match: {recipe.losses[index].match})" for index in terms]
    from_labels = [arm for arm in controls(recipe) if not is_taught(terms_of(recipe, arm))]
    from_labels += ["majority"] if "majority" in measured_arms(recipe) else []
    learners += [f"evaluation.arms ({arm})" for arm in from_labels]
    if learners:
        raise InputError(
            f"data: no training example has a label, and these learn from labels: {', '.join(learners)}; "
            f"give labels to some training rows under data, or leave these out of the recipe"
        )


def _check_keep_best(session: Session) -> None:
    """Refuse to keep the best model by a metric that the labels do not have, or that is not measured in training."""
    best, head, task = session.recipe.training.keep_best, session.corpus.head, session.task
    columns = (*column_names(head), *(task.observed if task.observed_in_training else ()))
    if best is not None and not measurable([best], columns):
        fix = ", ".join(measurable(task.metrics_for(head), columns))
        raise InputError(f"training.keep_best: {best} is not measured of a {head} head during training; use {fix}")


def is_taught(terms: Sequence[Term]) -> bool:
    """Tell whether a loss has a term that compares with the teacher."""
    return any(MATCHES[term.match].needs_teacher for term in terms)
