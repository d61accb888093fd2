"""Stage `evaluate`: measure all arms on the held-out split, and teacher and student against the clock."""

from __future__ import annotations

from functools import partial
from typing import Any

from accelerate.utils import gather_object
from safetensors.numpy import save_file

from distill.data import evaluation_batches
from distill.evaluation.arms import ARMS, measured_arms, rivals
from distill.evaluation.efficiency import add_disk_bytes, measure_efficiency
from distill.evaluation.metrics import find_metric, higher_is_better, measurable
from distill.evaluation.predict import Rows, column_names, compare, merge_rows, predict
from distill.evaluation.recorded import record_teacher
from distill.evaluation.table import tabulate_arms
from distill.files import fresh_folder, write_json
from distill.models.family import layers_of
from distill.models.forward import Batch, Capture, Outputs
from distill.models.load import folder_fingerprint
from distill.pipeline.session import Session
from distill.pipeline.stage import Stage, settings_of
from distill.pipeline.train import steps_of
from distill.ranks import process_state
from distill.recipe.data import SPLITS
from distill.recipe.names import TEACHER_METRICS
from distill.release.export import without_folders
from distill.student.masks import mask_settings, sparsity_table
from distill.teacher import LiveTeacher


def work(session: Session) -> None:
    """Predict on every rank; measure, time and write on the main one."""
    shares = session.shares()
    if shares is None:
        return
    teacher = session.live_teacher(Capture(stop_at_head=True), whole=True)
    recipe, corpus, steps = session.recipe, session.corpus, steps_of(session)
    rows = predict_arms(session, teacher, steps, *shares)
    if not process_state().is_main_process:
        return
    with fresh_folder(session.folder.predictions) as folder:
        for arm, columns in rows.items():
            numbers = {name: values for name, values in columns.items() if values.dtype.kind != "U"}
            save_file(numbers, folder / f"{arm}.safetensors", {"data": corpus.fingerprint})
            if texts := {name: values.tolist() for name, values in columns.items() if name not in numbers}:
                write_json(folder / f"{arm}.json", texts)
    columns = next(iter(rows.values()))
    own = recipe.evaluation.metrics or measurable(session.task.metrics, columns)
    names = list(dict.fromkeys([*own, *measurable(TEACHER_METRICS, columns)]))
    student = session.load(session.folder.distilled)
    sources = {without_folders(each.source): None for split in SPLITS for each in recipe.data.origins(split)}
    data = {"source": ", ".join(sources), "split": "test", "examples": len(corpus.test)}
    data |= {"train_examples": len(corpus.train), "labelled": len(corpus.labelled), "fingerprint": corpus.fingerprint}
    data |= {"summary": corpus.summary}
    table = {
        "data": data,
        "metrics": names,
        "primary": names[0],
        "higher_is_better": {name: higher_is_better(name) for name in names},
        "arms": tabulate_arms(rows, names, steps),
        "rivals": rivals(recipe),
        "efficiency": compare_speed(session, teacher.model, student) if recipe.evaluation.efficiency else None,
        "sparsity": sparsity_table(recipe, student),
    }
    write_json(session.folder.evaluation, table)


def predict_arms(session: Session, teacher: LiveTeacher, steps: int, rank: int, ranks: int) -> dict[str, Rows]:
    """Predict the test split with every arm, batches shared out over the ranks; every rank gets all rows.

    Args:
        session: The recipe at work.
        teacher: Runs once over the split, for all arms.
        steps: Length of the training, which decides how an untrained arm is masked.
        rank: Of those that take part.
        ranks: Number of those that take part.
    """
    corpus, rows = session.corpus, {}

    def observe(model: Any, outputs: Outputs, batch: Batch) -> dict[str, Any]:
        return corpus.task.observe(model, outputs, batch, corpus.test.take(batch["examples"].tolist()))

    with record_teacher(teacher, session.folder.root / f".teacher-{rank}") as recording:
        for arm in measured_arms(session.recipe):
            if arm == "teacher":
                ask = partial(compare, recording, teacher.model)
            else:
                model = session.load(session.arm_folder(arm)).to(teacher.device)
                ask = partial(predict, model if ARMS[arm].terms else ARMS[arm].prepare(session.recipe, model, steps))
            batches = evaluation_batches(corpus, corpus.test, session.recipe.evaluation.batch_size, rank, ranks)
            own = [ask(batches, corpus.head, recording, session.vocabulary, observe)]
            rows[arm] = merge_rows(gather_object(own) if ranks > 1 else own)
    return rows


def compare_speed(session: Session, teacher: Any, student: Any) -> dict[str, Any]:
    """Measure size and speed of student and teacher on this rank's device; the others wait at the end of the stage."""
    found = measure_efficiency(
        {"teacher": teacher, "student": student.to(teacher.device)},
        layers_of,
        kind=session.corpus.head,
        length=session.recipe.data.max_length,
        vocabulary=len(session.tokenizer),
        device=teacher.device,
    )
    add_disk_bytes(found, {"teacher": session.teacher, "student": session.folder.distilled})
    return found


def inputs(session: Session) -> dict[str, Any]:
    """List every arm's weights, the data and what is measured."""
    mask = mask_settings(session.recipe)
    return {
        "arms": {arm: folder_fingerprint(session.arm_folder(arm)) for arm in measured_arms(session.recipe)},
        "teacher": session.teacher_inputs(),
        "data": session.corpus.fingerprint,
        "student": folder_fingerprint(session.folder.distilled),
        "mask": {**mask, "training": settings_of(session.recipe.training)} if mask else None,
        "max_length": session.recipe.data.max_length,
        "evaluation": session.recipe.evaluation.model_dump(mode="json"),
    }


def check(session: Session) -> None:
    """Find every metric that the recipe names, the user's own included, and the columns that it reads.

    Raises:
        InputError: There is no such metric, or the task does not give its columns.
    """
    for name in session.recipe.evaluation.metrics or ():
        find_metric(name, (*column_names(session.corpus.head), *session.task.observed))


STAGE = Stage(
    "evaluate",
    work,
    inputs,
    lambda session: [session.folder.evaluation, session.folder.predictions],
    together=True,
    check_data=check,
)
