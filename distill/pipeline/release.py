"""Stage `release`: write the folder that is handed out, and prove that whoever loads it gets the same model."""

from __future__ import annotations

import importlib.util
import json
import platform
import re
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from distill import __version__
from distill.errors import DistillError
from distill.evaluation.arms import trained_arms
from distill.files import content_of, fresh_folder, read_written, write_text
from distill.models.pattern import pattern_note
from distill.models.plan import StudentPlan
from distill.models.sentence import sentence_files
from distill.pipeline.json_shapes import Evaluation, Repair, Stamp
from distill.pipeline.release_forms import check_wanted, make_forms, probe_of
from distill.pipeline.session import Session
from distill.pipeline.stage import Stage
from distill.pipeline.teachers import describe_model
from distill.ranks import process_state
from distill.recipe.load import read_released
from distill.recipe.schema import Format
from distill.release.card import render_card
from distill.release.evidence import Evidence
from distill.release.examples import card_examples
from distill.release.export import check_padding, check_release, releasable_recipe, write_checksums, write_release
from distill.release.figures import Figures
from distill.release.formats import format_of
from distill.release.hub_results import result_files
from distill.release.oldest_transformers import oldest_version
from distill.release.report import render_report
from distill.release.table import Table
from distill.release.wording import format_metric, format_percent, one_line
from distill.training import read_records
from distill.training.loop import METRICS
from distill.training.provenance import describe_changes, flatten

STAGES = (
    *("data", "teacher", "calibrate", "plan", "build", "repair", "examine", "draw", "cache", "train", "control"),
    *("seeds", "evaluate"),
)
"""Those before this one, in the order of the work."""
SHOWN = 10
"""Test examples on which student and teacher differ that the report of the run shows; no release holds texts."""
LETTERS = 240
"""Of a text."""
EMPTY = Table(("text", "true", "teacher", "student"), [])


def work(session: Session) -> None:
    """Write the folder that is handed out, and prove that whoever loads it gets the same model."""
    recipe, model = session.recipe, session.load(session.folder.distilled)
    release_format = format_of(model, recipe.release.format)
    evidence = replace(collect_evidence(session, release_format), pattern_note=pattern_note(model.config))
    before = read_release(session.folder.release)
    with fresh_folder(session.folder.release) as folder:
        forms = make_forms(session, folder, model)
        evidence = replace(evidence, evaluation=evidence.evaluation | ({"forms": forms} if forms else {}))
        report = render_report(evidence)
        texts = {
            "report.html": report,
            "plan.json": evidence.plan.to_json(),
            "recipe.yaml": evidence.recipe_text,
            "evaluation.json": json.dumps(evidence.evaluation, indent=1, allow_nan=False) + "\n",
            **result_files(evidence),
        }
        texts |= sentence_files(model, recipe.data.prompts, recipe.data.learns_from_pairs, recipe.data.max_length)
        # Documents need not be told apart: any tokens will do, as long as all loaders get the same.
        probe, beside = probe_of(session, model), session.released_preprocessors
        written = write_release(folder, model, beside, texts, evidence.auto_class, release_format)
        examples = runnable_examples(session, evidence)
        own = (evidence.auto_class, probe, release_format, session.oldest, examples, recipe.name)
        evidence = replace(evidence, printed=check_release(folder, written, *own))
        check_padding(model, written, probe)
        write_text(folder / "README.md", render_card(evidence))
        write_checksums(folder)
    write_text(session.folder.report, render_report(evidence, tabulate_disagreements(session)))
    if before is not None:
        session.say(f"  it replaces a release: {describe_difference(before, read_release(session.folder.release))}")


def runnable_examples(session: Session, evidence: Evidence) -> dict[str, str]:
    """Return the examples of the card whose packages are installed; a line names the others."""
    found = card_examples(evidence)
    for title, code in list(found.items()):
        imported = re.findall(r"^(?:from|import) (\w+)", code, re.MULTILINE)
        if missing := [name for name in imported if importlib.util.find_spec(name) is None]:
            session.say(f"  the card's example of {title} is not run, as {missing[0]} is not installed")
            del found[title]
    return found


def read_release(folder: Path) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Read settings and evaluation of a release; None where there is none that can be read."""
    try:
        settings = read_released(folder / "recipe.yaml").model_dump(mode="json", by_alias=True)
        return flatten(settings), read_written(folder / "evaluation.json", Evaluation)
    except DistillError:
        return None


def describe_difference(before: Any, now: Any) -> str:
    """Say which keys of the recipe changed between two releases, from what to what, and the student's figure."""
    (old, old_table), (new, table) = before, now
    keys = describe_changes(old, new) or "the same recipe"
    metric = table["primary"]
    own = [format_metric(metric, Figures(each).score("distilled", metric)) for each in (old_table, table)]
    return f"{keys}; {metric} {' → '.join(own)}"


def tabulate_disagreements(session: Session) -> Table:
    """List test examples on which student and teacher answer differently, those first of which the teacher is surest.

    Each has the truth and both answers with their probabilities; nothing is listed where an example has no class.
    """
    paths = [session.folder.predictions / f"{arm}.safetensors" for arm in ("teacher", "distilled")]
    if session.corpus.head != "sequence" or not all(path.is_file() for path in paths):
        return EMPTY
    teacher, student = map(load_file, paths)
    differ = np.flatnonzero(teacher["predictions"] != student["predictions"])
    chosen = differ[np.argsort(-teacher["confidence"][differ], kind="stable")][:SHOWN]
    names, rows = session.corpus.classes, []
    for row in chosen.tolist():
        ids = session.corpus.test[int(student["example"][row])]
        text = one_line(session.tokenizer.decode(ids, skip_special_tokens=True))
        answers = [
            f"{names[int(own['predictions'][row])]} ({format_percent(own['confidence'][row].item())})"
            for own in (teacher, student)
        ]
        cut = text if len(text) <= LETTERS else f"{text[: LETTERS - 1]}…"
        rows.append((cut, names[int(student["references"][row])], *answers))
    return Table(EMPTY.head, rows, text_columns=4)


def collect_evidence(session: Session, release_format: Format = "uniform") -> Evidence:
    """Read the results of a finished run that card, report and the printed tables show."""
    recipe, spec, run = session.recipe, session.recipe.teacher, session.folder
    plan, given = StudentPlan.load(run.plan), recipe.student.given
    stamps = {name: read_written(run.stamp(name), Stamp) for name in STAGES if run.stamp(name).is_file()}
    return Evidence(
        recipe=recipe,
        recipe_text=releasable_recipe(recipe),
        plan=plan,
        repair=read_written(run.repair, Repair) if recipe.student.repair.wanted else None,
        evaluation=read_written(run.evaluation, Evaluation),
        records={arm: read_records(session.train_folder(arm) / METRICS) for arm in trained_arms(recipe)},
        teacher={**describe_model(spec), "model_type": plan.model_type, "fitted": spec.fit is not None},
        student={**describe_model(given), "model_type": plan.given.model_type} if given and plan.given else {},
        environment={
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "accelerate")},
            "distill": __version__,
            "device": str(process_state().device.type),
            "processes": process_state().num_processes,
            **({"loaded with transformers too": oldest_version()} if session.oldest else {}),
        },
        stages=[
            {"stage": name, **{key: own[key] for key in ("seconds", "peak_bytes")}} for name, own in stamps.items()
        ],
        fit=read_records(run.fit / METRICS) if spec.fit else [],
        auto_class=session.task.auto_class,
        release_format=release_format,
        sample=session.task.sample,
    )


def inputs(session: Session) -> dict[str, Any]:
    """List the distilled student, its evidence and the recipe."""
    run, recipe = session.folder, session.recipe
    files = {"student": run.distilled, "plan": run.plan, "evaluation": run.evaluation}
    files |= {f"metrics.{arm}": session.train_folder(arm) / METRICS for arm in trained_arms(recipe)}
    files |= {"repair": run.repair} if recipe.student.repair.wanted else {}
    # What was checked is on the card: a release that is not checked again loses it.
    checked = {"check_oldest": oldest_version()} if session.oldest else {}
    settings = {"recipe": recipe.model_dump(mode="json"), **checked}
    return {name: content_of(path) for name, path in files.items()} | settings


STAGE = Stage(
    "release", work, inputs, lambda session: [session.folder.release, session.folder.report], check=check_wanted
)
