"""Stage `train`: train the cut student, taught by the teacher; controls are trained by the same functions."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object

from distill.data import TrainingBatches, evaluation_batches, observe_batch
from distill.errors import InputError
from distill.evaluation.arms import ARMS, controls, measured_arms
from distill.evaluation.metrics import compute, higher_is_better, measurable
from distill.evaluation.predict import column_names, merge_rows, predict
from distill.evaluation.table import finite_or_none
from distill.files import content_of, fresh_folder, write_text
from distill.losses import MATCHES, PREDICTION_KINDS, LayerMap, Maps, Objective, Policy, layer_map
from distill.models.cost import matmul_rate, training_flops
from distill.models.family import use_eager_attention
from distill.models.fp8 import fault_of
from distill.models.load import folder_fingerprint, hollow_model
from distill.models.plan import StudentPlan
from distill.models.precision import DTYPES
from distill.models.sentence import sentence_files
from distill.pipeline.fp8 import quantise_teacher
from distill.pipeline.session import Session
from distill.pipeline.stage import Stage, settings_of, with_version
from distill.ranks import process_state
from distill.recipe.schema import Optimization, Recipe, Term, Training
from distill.registry import is_reference
from distill.student.masks import compact_trained, mask_settings, masks_for
from distill.teacher import LiveTeacher
from distill.training import Job, train
from distill.training.optim import find_optimizer
from distill.training.setup import check_launch_keeps, deal_out, horizon
from distill.training.tracking import check_trackers


def work(session: Session) -> None:
    """Train the student, and save it."""
    save_model(session, train_arm(session, "distilled", {}, session.folder.root), session.folder.distilled)


def train_arm(session: Session, arm: str, own: Mapping[str, Any], folder: Path) -> Any:
    """Train an arm from its start on its own terms, with its own settings beside those of `training`; gives the model.

    Checkpoints and metrics go into the folder.
    """
    recipe, plan, spec = session.recipe, StudentPlan.load(session.arm_plan(arm)), spec_of(session, arm, own)
    assert spec.steps is not None, "spec_of gives a length in steps"
    maps, encoder_maps = maps_of(plan)
    kind, vocabulary = session.corpus.head, session.vocabulary
    objective = Objective(terms_of(recipe, arm), kind, maps, vocabulary, encoder_maps=encoder_maps)
    model = ARMS[arm].prepare(recipe, session.load(session.arm_start(arm)), spec.steps)
    teacher = session.live_teacher(objective.teacher) if objective.needs_teacher else None
    if teacher is not None and recipe.teacher.dtype == "fp8":
        quantise_teacher(session, teacher.model)
    if teacher is not None:
        objective.project(model.config.hidden_size, teacher.model.config.hidden_size)
        for each in (model, teacher.model) if objective.student.attention else ():
            use_eager_attention(each)
    job = Job(
        arm,
        spec,
        folder,
        recipe.seed,
        with_version(arm_inputs(session, arm, [own])),
        constrain=partial(masks_for, recipe, steps=spec.steps),
        higher_is_better=higher_is_better(spec.keep_best) if spec.keep_best else True,
        continue_changed=session.continue_changed,
    )
    train_model(session, job, model, objective, teacher)
    compact_trained(recipe, model, session.say)
    return model


def spec_of(session: Session, arm: str, own: Mapping[str, Any]) -> Training:
    """Return the settings of an arm's training: those of the student, and as many steps, but for its own."""
    training, given = session.recipe.training, dict(own)
    if (epochs := given.pop("epochs", None)) is not None:
        labelled = not is_taught(terms_of(session.recipe, arm))
        given["steps"] = batches_for(session, training, labelled=labelled).steps_for(epochs)
    # In steps: fewer examples may carry a label, and then the same epochs would be fewer.
    steps = given.get("steps") or steps_of(session)
    return training.model_copy(update={"epochs": None, "tokens": None, **given, "steps": steps})


def maps_of(plan: StudentPlan) -> tuple[Maps, Maps | None]:
    """Make what turns a term's `map` into layer pairs: of the only or second stack, and of an encoder before it."""
    main = partial(layer_map, plan=plan, student_layers=len(plan.layers), teacher_layers=plan.teacher_layers)
    if plan.encoder_layers is None or plan.teacher_encoder_layers is None:
        return main, None
    depths = (len(plan.encoder_layers), plan.teacher_encoder_layers)
    return main, lambda policy: layer_map(policy, plan, *depths, side="encoder")


def train_model(session: Session, job: Job, model: Any, objective: Objective, teacher: LiveTeacher | None) -> None:
    """Train a model in place; it comes back on the CPU, in the dtype it had."""
    batches = batches_for(session, job.spec, labelled=not objective.needs_teacher)
    measured, dtype = partial(measure_held_out, session, precision=job.spec.precision), model.dtype
    model.float()  # AdamW's small steps would be lost in half-precision weights; of `weights: bf16` masters follow
    measure = peak_measurement(session, job, model, teacher)
    train(
        replace(job, peak_tokens_per_second=measure and measure(), measure_peak=measure),
        model,
        objective,
        teacher,
        batches,
        evaluate=measured if session.corpus.validation else None,
        say=session.say,
    )
    model.to(device="cpu", dtype=dtype)


def terms_of(recipe: Recipe, arm: str) -> Sequence[Term]:
    """Return the loss of a trained arm."""
    terms = ARMS[arm].terms
    assert terms is not None, f"{arm} is not trained"
    return terms(recipe)


def is_taught(terms: Sequence[Term]) -> bool:
    """Tell whether a loss has a term that compares with the teacher."""
    return any(MATCHES[term.match].needs_teacher for term in terms)


def steps_of(session: Session) -> int:
    """Count the optimizer steps of the student's training."""
    recipe = session.recipe
    return horizon(recipe.training, batches_for(session, recipe.training, labelled=not is_taught(recipe.losses)))


def batches_for(session: Session, spec: Optimization, *, labelled: bool) -> TrainingBatches:
    """Make the micro-batches of a training, of the labelled examples alone or of all."""
    corpus = session.corpus
    # Without teacher terms an unlabelled example would be a wasted forward pass.
    pool = corpus.labelled if labelled else range(len(corpus.train))
    sizes = spec.batch_size, deal_out(spec)[0]
    return TrainingBatches(corpus, pool, *sizes, session.recipe.seed, session.recipe.data.max_length)


def peak_measurement(session: Session, job: Job, model: Any, teacher: LiveTeacher | None) -> Callable[[], float] | None:
    """Make what measures the tokens per second of a training at an MFU of 1; None where nothing counts its products."""
    spec, state = session.recipe.teacher, process_state()
    if teacher is not None and (spec.dtype in ("int8", "fp8") or spec.device != "same"):
        return None
    adapters = job.spec.lora is not None
    flops = training_flops(model, teacher and teacher.model, session.recipe.data.max_length, adapters=adapters)
    device, dtype = state.device, DTYPES[job.spec.precision]
    return lambda: matmul_rate(device, dtype) * state.num_processes / flops


def measure_held_out(
    session: Session, model: Any, stopped: Callable[[], bool], precision: str = "fp32"
) -> dict[str, float | None]:
    """Compute the task's metrics on the validation split, shared out over the ranks; none once `stopped` says so."""
    corpus, state = session.corpus, process_state()
    size, examples = session.recipe.evaluation.batch_size, corpus.validation
    assert examples is not None, "nothing is measured during training without a validation split"
    batches = evaluation_batches(corpus, examples, size, state.process_index, state.num_processes)
    wanted = takewhile(lambda _batch: not stopped(), batches)
    observe = partial(observe_batch, corpus, examples) if corpus.task.observed_in_training else None
    vocabulary = session.vocabulary
    rows = predict(model, wanted, corpus.head, vocabulary=vocabulary, observe=observe, precision=precision)
    columns = merge_rows(gather_object([rows]))
    columns = dict(corpus.task.finish(columns, corpus.settled)) if columns else {}
    names = measurable(metrics_in_training(session), columns)
    return finite_or_none(compute(names, columns)) if columns else {}


def metrics_in_training(session: Session) -> list[str]:
    """List what is measured on the validation split: the metrics of the kind of predictions, and `keep_best`."""
    best = session.recipe.training.keep_best
    return list(dict.fromkeys([*session.task.metrics_for(session.corpus.head), *([best] if best else [])]))


def save_model(session: Session, model: Any, folder: Path) -> None:
    """Save a model, its tokenizer and what else its task has, from the main rank."""
    if process_state().is_main_process:
        with fresh_folder(folder) as temporary:
            model.save_pretrained(temporary)
            for name, text in sentence_files(model).items():
                write_text(temporary / name, text)
            for each in session.preprocessors:
                each.save_pretrained(temporary)


def arm_inputs(session: Session, arm: str, tries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """List what a trained arm is made of: its start, data, settings and loss, and the teacher where the loss has it.

    Args:
        session: The recipe at work.
        arm: Its name.
        tries: Its own settings beside those of `training`, one or all of which the best is kept.
    """
    recipe, terms = session.recipe, terms_of(session.recipe, arm)
    own = {
        "student": folder_fingerprint(session.arm_start(arm)),
        "mask": mask_settings(recipe),
        "data": session.corpus.fingerprint,
        "training": settings_of(recipe.training),
        "losses": [term.model_dump(mode="json") for term in terms],
        "seed": recipe.seed,
    }
    if PREDICTION_KINDS[session.corpus.head].vectors:  # each text is compared with the others of its forward pass
        own["micro_batch_size"] = deal_out(recipe.training)[0]
    own |= {"own": [dict(each) for each in tries]} if [*tries] != [{}] else {}
    taught_by = {"teacher": session.teacher_inputs(), "plan": content_of(session.arm_plan(arm))}
    return own | taught_by if is_taught(terms) else own


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
    if recipe.teacher.fit is not None:
        check_optimization("teacher.fit", recipe.teacher.fit, task.head)
    check_trackers(recipe.training.trackers)
    if recipe.training.keep_best not in (None, *task.metrics):  # of a task of the user's own
        raise InputError(f"training.keep_best: {recipe.training.keep_best} is not one of {', '.join(task.metrics)}")
    check_dtype(recipe.teacher.dtype, state.device)
    if recipe.teacher.device == "sharded" and state.num_processes == 1:
        raise InputError("teacher.device: sharded spreads the teacher over several processes, and there is one")


def check_optimization(key: str, spec: Optimization, head: str) -> None:
    """Refuse a training, of the section `key`, that this machine and this launch cannot do, with an InputError."""
    find_optimizer(spec)
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


def check_dtype(dtype: str, device: torch.device) -> None:
    """Refuse a teacher in 8 bits where a package or the GPU for it is missing. Raises InputError."""
    if dtype == "int8" and importlib.util.find_spec("bitsandbytes") is None:
        raise InputError("teacher.dtype: int8 needs bitsandbytes: pip install 'distill[int8]'")
    if dtype == "int8" and device.type != "cuda":
        raise InputError("teacher.dtype: int8 needs a GPU; use bf16")
    if dtype == "fp8" and (fault := fault_of(device)):
        raise InputError(f"teacher.dtype: fp8 {fault}; use bf16")


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
        raise InputError("teacher.dtype: what fp8 changes is judged by KL, which numbers do not have; use bf16")
    if session.corpus.labelled:
        return
    learners = ["teacher.fit"] if recipe.teacher.fit else []
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


STAGE = Stage(
    "train",
    work,
    partial(arm_inputs, arm="distilled", tries=[{}]),
    lambda session: [session.folder.distilled],
    together=True,
    check=check,
    check_data=check_labels,
)
