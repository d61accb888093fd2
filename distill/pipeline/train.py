"""Stage `train`: train the cut student, taught by the teacher; controls are trained by the same functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from distill.data import TrainingBatches
from distill.evaluation.arms import terms_of
from distill.evaluation.metrics import higher_is_better
from distill.evaluation.table import finite_or_none
from distill.files import content_of, fresh_folder, write_text
from distill.losses import Maps, Objective, layer_map
from distill.models.cost import matmul_rate, training_flops
from distill.models.family import use_eager_attention
from distill.models.load import folder_fingerprint
from distill.models.plan import StudentPlan
from distill.models.precision import DTYPES
from distill.models.sentence import sentence_files
from distill.pipeline.cached_columns import find_teacher
from distill.pipeline.on_policy import on_policy_for
from distill.pipeline.predictions import measure, predict_split
from distill.pipeline.session import Session
from distill.pipeline.stage import Stage, settings_of, with_version
from distill.pipeline.train_checks import check, check_labels, is_taught
from distill.ranks import process_state
from distill.recipe.schema import Optimization, Recipe, Training
from distill.student.masks.compact import compact
from distill.student.masks.masks import Masks
from distill.teacher import CachedTeacher, LiveTeacher, Mixture
from distill.training import Job, train
from distill.training.clock import Utilisation
from distill.training.setup import deal_out, horizon

Teaching = LiveTeacher | CachedTeacher | Mixture


def work(session: Session) -> None:
    """Train the student, and save it."""
    save_model(session, train_arm(session, "distilled", {}, session.folder.root), session.folder.distilled)


def train_arm(session: Session, arm: str, own: Mapping[str, Any], folder: Path) -> Any:
    """Train an arm from its start model on its own loss, and return the model.

    Args:
        session: The recipe at work.
        arm: Its name.
        own: Its own settings on top of those of `training`.
        folder: Gets the checkpoints and metrics.
    """
    recipe, objective, spec = session.recipe, objective_of(session, arm), spec_of(session, arm, own)
    mask = recipe.student.mask
    assert spec.steps is not None, "spec_of gives a length in steps"
    model = session.load(session.arm_start(arm))
    teacher = find_teacher(session, terms_of(recipe, arm), objective)
    if teacher is not None:
        objective.project(model.config.hidden_size, teacher.width)
        live = [] if isinstance(teacher, CachedTeacher) else [teacher.model]
        for each in (model, *live) if objective.student.attention else ():
            use_eager_attention(each)
    job = Job(
        arm,
        spec,
        folder,
        recipe.seed,
        with_version(arm_inputs(session, arm, [own])),
        constrain=None if mask is None else partial(Masks, spec=mask, steps=spec.steps),
        higher_is_better=higher_is_better(spec.keep_best) if spec.keep_best else True,
        continue_changed=session.continue_changed,
    )
    train_model(session, job, model, objective, teacher)
    if mask is not None and mask.compact:
        gone = compact(model, uniform=mask.compact == "uniform", multiple_of=recipe.student.mlp.multiple_of)
        session.say(f"  compact: {gone} neurons without effect are taken out")
    return model


def spec_of(session: Session, arm: str, own: Mapping[str, Any]) -> Training:
    """Return the settings of an arm's training: those of the student, and as many steps, but for its own."""
    training, given = training_of(session.recipe, arm), dict(own)
    if (epochs := given.pop("epochs", None)) is not None:
        given["steps"] = batches_of(session, arm).steps_for(epochs)
    # In steps: fewer examples may carry a label, and then the same epochs would be fewer.
    steps = given.get("steps") or steps_of(session)
    return training.model_copy(update={"epochs": None, "tokens": None, **given, "steps": steps})


def objective_of(session: Session, arm: str) -> Objective:
    """Make the loss of a trained arm."""
    maps, encoder_maps = maps_of(StudentPlan.load(session.arm_plan(arm)))
    terms, kind = terms_of(session.recipe, arm), session.corpus.head
    return Objective(terms, kind, maps, session.vocabulary, encoder_maps=encoder_maps)


def maps_of(plan: StudentPlan) -> tuple[Maps, Maps | None]:
    """Return functions from a term's `map` to layer pairs: of the main stack, and of an encoder or None."""
    main = partial(layer_map, plan=plan, student_layers=len(plan.layers), teacher_layers=plan.teacher_layers)
    if plan.encoder_layers is None or plan.teacher_encoder_layers is None:
        return main, None
    depths = (len(plan.encoder_layers), plan.teacher_encoder_layers)
    return main, lambda policy: layer_map(policy, plan, *depths, side="encoder")


def train_model(session: Session, job: Job, model: Any, objective: Objective, teacher: Teaching | None) -> None:
    """Train a model in place; it comes back on the CPU, in the dtype it had."""
    batches = batches_for(session, job.spec, labelled=not objective.needs_teacher)
    live = None if isinstance(teacher, CachedTeacher) else teacher
    if isinstance(teacher, CachedTeacher):
        batches = replace(batches, extend=teacher.add)
    measured, dtype = partial(measure_held_out, session, precision=job.spec.precision), model.dtype
    model.float()  # AdamW's small steps would be lost in half-precision weights; of `weights: bf16` masters follow
    train(
        replace(job, utilisation=utilisation_of(session, job.spec, model, live)),
        model,
        objective,
        teacher,
        batches,
        on_policy=on_policy_for(session, job.spec, model),
        evaluate=measured if session.corpus.validation else None,
        say=session.say,
    )
    model.to(device="cpu", dtype=dtype)


def fit_of(recipe: Recipe) -> Training:
    """Return the settings of the teacher's own training, `teacher.fit`."""
    assert recipe.teacher.fit is not None, "nothing is fitted without `teacher.fit`"
    return Training(**recipe.teacher.fit.model_dump(exclude_unset=True))


def training_of(recipe: Recipe, arm: str) -> Training:
    """Return the settings of a trained arm; where no teacher scores them, it writes no answers."""
    taught = is_taught(terms_of(recipe, arm))
    return recipe.training if taught else recipe.training.model_copy(update={"on_policy": None})


def steps_of(session: Session) -> int:
    """Count the optimizer steps of the student's training."""
    return horizon(session.recipe.training, batches_of(session, "distilled"))


def batches_of(session: Session, arm: str) -> TrainingBatches:
    """Make the micro-batches of an arm's training."""
    labelled = not is_taught(terms_of(session.recipe, arm))
    return batches_for(session, session.recipe.training, labelled=labelled)


def batches_for(session: Session, spec: Optimization, *, labelled: bool) -> TrainingBatches:
    """Make the micro-batches of a training, of the labelled examples alone or of all."""
    corpus = session.corpus
    # Without teacher terms an unlabelled example would be a wasted forward pass.
    pool = corpus.labelled if labelled else range(len(corpus.train))
    sizes = spec.batch_size, deal_out(spec)[0]
    return TrainingBatches(corpus, pool, *sizes, session.recipe.seed, session.recipe.data.max_length)


def utilisation_of(
    session: Session, spec: Training, model: Any, teacher: LiveTeacher | Mixture | None
) -> Utilisation | None:
    """Measure how fast a training would be at an MFU of 1; None where nothing counts its matrix products."""
    section, state = session.recipe.teacher, process_state()
    if teacher is not None and (section.dtype in ("int8", "fp8") or section.device != "same"):
        return None
    if isinstance(teacher, Mixture):
        return None
    adapters = spec.lora is not None
    flops = training_flops(model, teacher and teacher.model, session.recipe.data.max_length, adapters=adapters)

    def peak() -> float:
        return float(matmul_rate(state.device, DTYPES[spec.precision]) * state.num_processes / flops)

    return Utilisation(peak, session.say)


def measure_held_out(
    session: Session, model: Any, stopped: Callable[[], bool], precision: str = "fp32"
) -> dict[str, float | None]:
    """Compute the task's metrics on the validation split, shared out over the ranks; none once `stopped` says so."""
    state = process_state()
    shares = state.process_index, state.num_processes
    rows = predict_split(session, model, "validation", shares, quick=True, stopped=stopped, precision=precision)
    return finite_or_none(measure(session, rows, session.recipe.training.keep_best))


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
        tries: Its own settings on top of those of `training`; of several sets the best one is kept.
    """
    recipe, terms = session.recipe, terms_of(session.recipe, arm)
    own = {
        "student": folder_fingerprint(session.arm_start(arm)),
        "mask": mask_settings(recipe),
        "data": session.corpus.fingerprint,
        "training": settings_of(training_of(recipe, arm)),
        "losses": [term.model_dump(mode="json") for term in terms],
        "seed": recipe.seed,
    }
    if session.kind.vectors:  # each text is compared with the others of its forward pass
        own["micro_batch_size"] = deal_out(recipe.training)[0]
    own |= {"own": [dict(each) for each in tries]} if [*tries] != [{}] else {}
    taught_by = {"teacher": session.teaching_inputs(), "plan": content_of(session.arm_plan(arm))}
    if recipe.teacher.cache is not None:
        taught_by["cache"] = recipe.teacher.cache.model_dump(mode="json", exclude={"layers"})
    return own | taught_by if is_taught(terms) else own


def mask_settings(recipe: Recipe) -> dict[str, Any] | None:
    """Select the keys of the recipe that decide which weights a training masks; None without a mask."""
    mask = recipe.student.mask
    # `multiple_of` says how far `compact` may go.
    return {**mask.model_dump(mode="json"), "multiple_of": recipe.student.mlp.multiple_of} if mask else None


STAGE = Stage(
    "train",
    work,
    partial(arm_inputs, arm="distilled", tries=[{}]),
    lambda session: [session.folder.distilled],
    together=True,
    check=check,
    check_data=check_labels,
)
