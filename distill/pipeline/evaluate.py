"""Stage `evaluate`: measure all arms on the held-out split, and teacher and student against the clock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from distill.data.splits import TRAINED_ON
from distill.errors import InputError
from distill.evaluation.arms import ARMS, lessons, measured_arms, not_run, rivals, title_of, trained_arms
from distill.evaluation.efficiency import add_disk_bytes, in_bf16, measure_efficiency
from distill.evaluation.harness import load_tasks, run_harness
from distill.evaluation.metrics import METRICS, find_metric, higher_is_better, measurable
from distill.evaluation.predict import Rows, column_names
from distill.evaluation.table import finite_or_none, spread_over, tabulate
from distill.files import content_of, fresh_folder, read_written, write_json
from distill.models.family import all_layers
from distill.models.forward import Capture
from distill.models.load import folder_fingerprint
from distill.models.precision import describe_precision, takes_autocast
from distill.pipeline.control import budget_of
from distill.pipeline.json_shapes import Evaluation, Examined
from distill.pipeline.predictions import load_arm, measure, predict_arms, predict_split, save_rows
from distill.pipeline.session import Session, in_precision
from distill.pipeline.stage import Stage, harness_folder, settings_of
from distill.pipeline.teachers import describe_teachers, load_teaching, read_licences
from distill.pipeline.train import mask_settings, steps_of
from distill.ranks import process_state
from distill.recipe.data import SET, SPLITS
from distill.recipe.names import TEACHER_METRICS
from distill.recipe.schema import Source
from distill.registry import find
from distill.release.export import without_folders
from distill.student.masks.sparsity import tabulate_sparsity
from distill.teacher import LiveTeacher, Mixture

COMPARED = 128
"""Examples on which the released student is measured in two precisions, where the evaluation's is not that of its
weights."""


def work(session: Session) -> None:
    """Predict on every rank; measure, time and write on the main one."""
    shares = session.shares()
    if shares is None:
        return
    teacher = load_teaching(session, Capture(stop_at_head=True), whole=True)
    recipe, corpus, steps = session.recipe, session.corpus, steps_of(session)
    rows = predict_arms(session, teacher, steps, shares)
    if not process_state().is_main_process:
        return
    with fresh_folder(session.folder.predictions) as folder:
        for split, arms in rows.items():
            for arm, columns in arms.items():
                save_rows(columns, folder / (arm if split == "test" else f"{arm}.{split}"), corpus.fingerprint)
    columns = next(iter(rows["test"].values()))
    wanted = recipe.evaluation.metrics or measurable(session.task.metrics_for(corpus.head), columns)
    names = list(dict.fromkeys([*wanted, *measurable(TEACHER_METRICS, columns)]))
    student = session.load(session.folder.distilled, session.near(teacher.model.device)).to(teacher.model.device)
    measured = tabulate_sets(session, rows, names, steps)
    table = {
        "data": describe_data(session) | {"examples": len(columns["example"])},
        "metrics": names,
        "primary": names[0],
        "higher_is_better": {name: higher_is_better(name) for name in names},
        **measured["test"],
        "sets": {
            split.removeprefix(SET): {**describe_set(session, split), **own}
            for split, own in measured.items()
            if split != "test"
        },
        "teacher": read_written(session.folder.examined, Examined),
        "precision": describe_precisions(session, teacher, student),
        "rivals": rivals(recipe),
        "taught_by": describe_teachers(session),
        "licences": read_licences(session),
        "lessons": lessons(recipe),
        "not_run": not_run(recipe),
        "efficiency": compare_speed(session, teacher.model, student) if recipe.evaluation.efficiency else None,
        "sparsity": tabulate_sparsity(student) if recipe.student.mask else None,
        "harness": run_tasks(session, teacher, steps),
    }
    write_json(session.folder.evaluation, table | compare_seeds(session, table))


def tabulate_sets(
    session: Session, rows: Mapping[str, Mapping[str, Rows]], names: Sequence[str], steps: int
) -> dict[str, dict[str, Any]]:
    """Compute the figures of every split, with the words for its arms and their budgets."""
    titles, classes = {arm: title_of(session.recipe, arm) for arm in rows["test"]}, session.corpus.classes
    budgets = {arm: budget_of(session, arm) for arm in trained_arms(session.recipe)}
    found = {split: tabulate(arms, names, steps, classes, unit_of(session), titles) for split, arms in rows.items()}
    for own in found.values():
        own["arms"] = [row | budgets.get(row["name"], {}) for row in own["arms"]]
    return found


def compare_seeds(session: Session, table: dict[str, Any]) -> dict[str, Any]:
    """Collect the figures of the arms that the other seeds measured, those that are trained; nothing with one seed."""
    tables = {session.recipe.seed: table}
    tables |= {child.recipe.seed: read_written(child.folder.evaluation, Evaluation) for child in session.children}
    if len(tables) == 1:
        return {}
    sets = {name: spread_over([own["sets"][name]["arms"] for own in tables.values()]) for name in table["sets"]}
    arms = spread_over([own["arms"] for own in tables.values()])
    return {"seeds": {"seeds": [*tables], "arms": arms, "sets": sets}}


def describe_data(session: Session) -> dict[str, Any]:
    """Name the sources, and count the examples of every split, of the test split those that there are."""
    recipe, corpus = session.recipe, session.corpus
    sources = {split: [without_folders(each.source) for each in recipe.data.origins(split)] for split in SPLITS}
    return {
        "source": ", ".join(dict.fromkeys([*sources["train"], *sources["test"]])),
        "measured_on": ", ".join(dict.fromkeys(sources["test"] or sources["train"])),
        "split": "test",
        "examples": len(corpus.test),
        "train_examples": len(corpus.train),
        "labelled": len(corpus.labelled),
        "fingerprint": corpus.fingerprint,
        "kind": corpus.head,
        "labels": corpus.settled.about,
        "summary": corpus.summary,
        "unit": unit_of(session),
    }


def unit_of(session: Session) -> str:
    """Name the unit of one row of predictions."""
    return "rows of documents" if session.task.packed else "examples"


def describe_set(session: Session, split: str) -> dict[str, Any]:
    """Name the sources of a set, count its examples, and say how much of it was trained on."""
    given, summary = session.recipe.rows, session.corpus.summary[split]

    def whole(source: Source) -> Source:
        return source.model_copy(update={"weight": 1.0, "limit": None, "split": source.split or "train"})

    trained = [whole(each) for each in given.origins("train")]
    return {
        "source": ", ".join(without_folders(each.source) for each in given.origins(split)),
        "examples": summary["examples"],
        "trained_on": {
            "same_source": any(whole(each) in trained for each in given.origins(split)),
            "rows": summary["rows"].get(TRAINED_ON, 0),
            "of": summary["used"],
        },
    }


def describe_precisions(session: Session, teacher: LiveTeacher | Mixture, student: Any) -> dict[str, Any]:
    """Say what teacher and students computed in, and where that is not what is released, measure the difference.

    The distilled student is measured once more on the first test examples, in the precision of the evaluation and in
    that of its weights, as whoever loads the release has it.
    """
    precision = session.recipe.training.precision
    found = {
        "teacher": describe_precision(teacher.model, teacher.precision),
        "students": describe_precision(student, precision),
        "released": None,
    }
    if not takes_autocast(student, precision):
        return found
    count = min(COMPARED, len(session.corpus.test))
    released: dict[str, Any] = {"dtype": describe_precision(student, "fp32"), "examples": count}
    for title, each in (("as_evaluated", precision), ("metrics", "fp32")):
        rows = predict_split(session, student, "test", precision=each, quick=True, most=COMPARED)
        released[title] = finite_or_none(measure(session, rows))
    return found | {"released": released}


def run_tasks(session: Session, teacher: LiveTeacher | Mixture, steps: int) -> dict[str, Any] | None:
    """Run the tasks of lm-evaluation-harness on every arm; None where the recipe asks for none."""
    spec, folder = session.recipe.evaluation.harness, harness_folder(session.recipe, session.base)
    if spec is None:
        return None
    arms = {}
    for arm in (arm for arm in measured_arms(session.recipe) if arm != "teachers" and ARMS[arm].start != "none"):
        session.say(f"  lm_eval: {arm}")
        arms[arm] = run_harness(load_arm(session, arm, teacher, steps).eval(), session.tokenizer, spec, folder)
    return {"lm_eval": version("lm_eval"), "limit": spec.limit, "num_fewshot": spec.num_fewshot, "arms": arms}


def compare_speed(session: Session, teacher: Any, student: Any) -> dict[str, Any]:
    """Measure size and speed of student and teacher on this rank's device; the others wait at the end of the stage."""
    models = {"teacher": teacher, "student": student}
    found = measure_efficiency(
        models | in_bf16(models),
        all_layers,
        kind=session.corpus.head,
        length=session.recipe.data.max_length,
        target_length=session.recipe.data.max_target_length,
        vocabulary=len(session.tokenizer),
    )
    add_disk_bytes(found, {"teacher": session.teacher, "student": session.folder.distilled})
    return found


def inputs(session: Session) -> dict[str, Any]:
    """List all that the evaluation reads, the figures of other seeds included."""
    seeds = {str(child.recipe.seed): content_of(child.folder.evaluation) for child in session.children}
    return own_inputs(session) | ({"seeds": seeds} if seeds else {})


def own_inputs(session: Session) -> dict[str, Any]:
    """List every arm's weights, the data and what is measured."""
    mask = mask_settings(session.recipe)
    models = [arm for arm in measured_arms(session.recipe) if ARMS[arm].start != "none"]
    return {
        "arms": {arm: folder_fingerprint(session.arm_folder(arm)) for arm in models},
        "teacher": session.teacher_inputs(),
        "data": describe_data(session),
        "sets": {split: describe_set(session, split) | {"content": own} for split, own in session.corpus.sets.items()},
        "taught_by": describe_teachers(session),
        "licences": read_licences(session),
        "examined": content_of(session.folder.examined),
        "student": folder_fingerprint(session.folder.distilled),
        "mask": {**mask, "training": settings_of(session.recipe.training)} if mask else None,
        "max_length": [session.recipe.data.max_length, session.recipe.data.max_target_length],
        "evaluation": session.recipe.evaluation.model_dump(mode="json"),
        "harness": content_of(folder) if (folder := harness_folder(session.recipe, session.base)) else None,
        **in_precision(session.recipe.training.precision),
    }


def check_names(session: Session) -> None:
    """Find every metric and task that the recipe names, the user's own included. Raises InputError where one is not."""
    for name in session.recipe.evaluation.metrics or ():
        find(METRICS, name, "evaluation.metrics: metric")
    if session.recipe.evaluation.harness is not None:
        load_tasks(session.recipe.evaluation.harness, harness_folder(session.recipe, session.base))


def check(session: Session) -> None:
    """Find every metric that the recipe names, the user's own included, and the columns that it reads.

    Raises:
        InputError: There is no such metric, or the labels do not give its columns.
    """
    task, head = session.task, session.corpus.head
    for name in session.recipe.evaluation.metrics or ():
        try:
            find_metric(name, (*column_names(head), *task.observed))
        except InputError as error:
            fix = f"the metrics of a {head} head are {', '.join(task.metrics_for(head))}"
            raise InputError(f"evaluation.metrics: {error}; {fix}") from error


STAGE = Stage(
    "evaluate",
    work,
    inputs,
    lambda session: [session.folder.evaluation, session.folder.predictions],
    together=True,
    check=check_names,
    check_data=check,
)
