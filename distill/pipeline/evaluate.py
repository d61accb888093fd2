"""Stage `evaluate`: measure all arms on the held-out split, and teacher and student against the clock."""

from __future__ import annotations

from typing import Any

from distill.data import evaluation_batches
from distill.evaluation.arms import arm_row, measured, with_retained
from distill.evaluation.efficiency import add_disk_bytes, measure_efficiency
from distill.evaluation.metrics import HIGHER_IS_BETTER, METRICS, compute
from distill.evaluation.predict import predict
from distill.files import write_json
from distill.models.family import layers_of
from distill.models.forward import Capture
from distill.models.load import folder_fingerprint
from distill.pipeline.session import Session
from distill.pipeline.stage import Stage, results, settings_of
from distill.pipeline.train import steps_of
from distill.ranks import process_state
from distill.registry import find
from distill.release.export import without_folders
from distill.student.masks import mask_settings, mask_untrained, sparsity_table


def work(session: Session) -> None:
    """Measure all arms on the held-out split, and teacher and student against the clock."""
    recipe, corpus = session.recipe, session.corpus
    teacher = session.live_teacher(Capture(stop_at_head=True), whole=True)
    rows, horizon = [], steps_of(session, recipe.training)
    for arm in session.arms:
        model = session.load(session.arm_folder(arm)).to(process_state().device)
        steps = 0 if arm in ("teacher", "cut", "repaired") else horizon
        if not steps and arm != "teacher":
            mask_untrained(recipe, model, horizon)
        batches = evaluation_batches(corpus, corpus.test, recipe.evaluation.batch_size)
        columns = predict(model, batches, corpus.task.head, teacher, session.vocabulary)
        metrics = compute(session.metrics, columns)
        rows.append(arm_row(arm, steps, measured(metrics)))
    efficiency, student = None, session.load(session.folder.distilled)
    if recipe.evaluation.efficiency:
        efficiency = measure_efficiency(
            {"teacher": teacher.model, "student": student.to(teacher.model.device)},
            layers_of,
            kind=corpus.task.head,
            length=recipe.data.max_length,
            vocabulary=len(session.tokenizer),
            device=teacher.model.device,
        )
        add_disk_bytes(efficiency, {"teacher": session.teacher, "student": session.folder.distilled})
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
    write_json(session.folder.evaluation, table)


def inputs(session: Session) -> dict[str, Any]:
    """Every arm's weights, the data and what is measured."""
    spec, training = session.recipe.evaluation, session.recipe.training
    return {
        "arms": {arm: folder_fingerprint(session.arm_folder(arm)) for arm in session.arms},
        "teacher": session.teacher_inputs(),
        "data": session.corpus.fingerprint,
        "student": folder_fingerprint(session.folder.distilled),
        "mask": [mask_settings(session.recipe), settings_of(training)] if session.recipe.student.mask else None,
        "max_length": session.recipe.data.max_length,
        "evaluation": spec.model_dump(mode="json"),
    }


def check(session: Session) -> None:
    """Find every metric that the recipe names, the user's own included."""
    for name in session.recipe.evaluation.metrics or ():
        find(METRICS, name, "metric")


STAGE = Stage("evaluate", work, inputs, results(lambda run: run.evaluation), check=check)
