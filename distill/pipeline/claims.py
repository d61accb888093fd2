"""What a release says beside the metrics of its models, derived anew: from recipe, data, weights and teacher."""

from __future__ import annotations

import copy
import importlib.util
import re
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from distill.errors import DistillError
from distill.evaluation.arms import lessons, measured_arms, not_run, rivals, title_of
from distill.evaluation.efficiency import compare_sizes, count_figures, in_bf16
from distill.evaluation.metrics import higher_is_better, measurable
from distill.evaluation.predict import Rows
from distill.evaluation.table import retain
from distill.files import read_json, sha256_of
from distill.models.family import all_layers, layers_of
from distill.models.mlp import mlps_of
from distill.models.pattern import pattern_note
from distill.models.plan import StudentPlan
from distill.models.sentence import sentence_files
from distill.pipeline.evaluate import describe_data, describe_set
from distill.pipeline.forms import measure_rounded, probe_of
from distill.pipeline.session import Session
from distill.pipeline.teachers import describe_model, describe_teachers
from distill.pipeline.verification import DIFFERS, Check, Verification
from distill.recipe.data import SET
from distill.recipe.locate import CHECKSUMS
from distill.recipe.names import TEACHER_METRICS
from distill.recipe.schema import Recipe, Teacher
from distill.release.card import render_card
from distill.release.evidence import Evidence, get_in
from distill.release.export import releasable_recipe, write_release
from distill.release.formats import format_of
from distill.release.forms import FORMS, compare_form
from distill.release.hub_results import result_files
from distill.release.report import render_report
from distill.release.wording import as_number
from distill.student import build_student
from distill.student.plan import policy_of
from distill.student.masks import sparsity_table
from distill.teacher import LiveTeacher

SIZES = (
    *("parameters", "layer_parameters", "bytes", "dtype", "flops_per_example", "layer_flops_per_example", "parts"),
)
"""Figures of a model that no clock and no other machine changes."""
OF_THE_RUN = {"## Time and memory": "", "## Versions": "", "## What was cut": "Before training, the", "## Use": "It prints"}
"""Sections of the card that say what only the run knows, from a line on, or all of it."""
OF_THE_CHART = re.compile(
    r"<figure>.*?</figure>|<p class=\"under\">No training record[^\n]*|<section>\s*<h2>Time and memory.*?</section>"
    r"|<h3>(Versions|Repair before training)</h3>.*?(?=</section>)",
    re.DOTALL,
)
"""The same of the report."""
TEXTS = ("README.md", "report.html", "plan.json", "recipe.yaml", "evaluation.json", CHECKSUMS)


def check_facts(found: Verification, session: Session, recipe: Recipe, measured: Mapping[str, Rows]) -> None:
    """Derive what recipe and data say of themselves: names of arms, rivals and metrics, and counts of rows."""
    claims, columns = found.claims, measured.get("distilled", {})
    wanted = recipe.evaluation.metrics or measurable(session.task.metrics_for(session.corpus.head), columns)
    beside = [name for name in claims["metrics"] if name in TEACHER_METRICS]
    names = list(dict.fromkeys([*wanted, *beside]))
    data = describe_data(session) | {"examples": len(next(iter(columns.values()), ()))}
    claimed = {**claims["data"], "fingerprint": data["fingerprint"]}  # which is judged by itself
    found.match("data, as counted", claimed, data)
    for name, own in (claims.get("sets") or {}).items():
        if f"{SET}{name}" in session.corpus.splits:
            facts = describe_set(session, f"{SET}{name}")
            found.match(f"rows of {name}", {key: own.get(key) for key in facts}, facts)
    facts = {
        "metrics": names,
        "primary": names[0],
        "higher_is_better": {name: higher_is_better(name) for name in names},
        "arms": {arm: title_of(recipe, arm) for arm in measured_arms(recipe)},
        "rivals": rivals(recipe),
        "lessons": lessons(recipe),
        "not_run": not_run(recipe),
        "taught_by": describe_teachers(replace(session, recipe=recipe)),
    }
    own = {**claims, "arms": {arm["name"]: arm.get("title") for arm in claims["arms"]}}
    found.match("arms, metrics and rivals", {key: own.get(key) for key in facts}, facts)
    if claims.get("harness") or recipe.evaluation.harness:
        found.leave_out("lm-evaluation-harness", "run its own command line on the folder")
    if claims.get("teacher"):
        found.leave_out("teacher, as examined", "no page shows it")


def check_sizes(found: Verification, session: Session, student: Any, teacher: LiveTeacher | None) -> None:
    """Count parameters, bytes and FLOPs of the models that are here, and divide the claimed ones by each other."""
    models = get_in(found.claims, "efficiency", "models") or {}
    if not models:
        return
    here = {"student": student} | ({} if teacher is None else {"teacher": teacher.model})
    if session.recipe.release.format == "padded":  # whose figures are those without the zero neurons
        found.leave_out("student, sizes", "the figures are without the neurons that pad it")
        del here["student"]
    data = session.recipe.data
    lengths = {"length": data.max_length, "target_length": data.max_target_length}
    for name, model in (here | in_bf16(here)).items():
        counted = count_figures(model, all_layers, **lengths, vocabulary=len(session.tokenizer))
        claimed = {key: get_in(models, name, key) for key in SIZES if key in counted}
        found.match(f"{name}, parameters, bytes and FLOPs", claimed, {key: counted[key] for key in claimed})
    protocol = get_in(found.claims, "efficiency", "protocol") or {}
    reference = models.get(str(protocol.get("reference")), {})
    for name, own in models.items():
        ratios = get_in(found.claims, "efficiency", "ratios", name)
        if ratios is not None:
            again = compare_sizes(own, reference)
            found.match(f"{name}, ratios of sizes", {key: ratios.get(key) for key in again}, again)
    found.leave_out("times, memory and the machine", "they are those of the run")


def check_derived(found: Verification) -> None:
    """Compute anew what follows from the claimed metrics: shares of the teacher's lead, differences, and seeds."""
    sets = {f" on {name}": own for name, own in (found.claims.get("sets") or {}).items()}
    for where, claims in {"": found.claims, **sets}.items():
        arms = {arm["name"]: {name: as_number(own) for name, own in arm["metrics"].items()} for arm in claims["arms"]}
        teacher, majority = arms.get("teacher", {}), arms.get("majority", {})
        wrong = [
            arm["name"]
            for arm in claims["arms"]
            if (arm.get("retained") or {}) != retain(arms[arm["name"]], teacher, majority)
        ]
        pairs = claims.get("differences") or []
        for pair in pairs if isinstance(pairs, list) else ():
            ours, theirs = (arms.get(str(get_in(pair, side)), {}) for side in ("arm", "against"))
            for name, claimed in (get_in(pair, "metrics") or {}).items():
                sides = ours.get(name), theirs.get(name)
                again = None if sides[0] is None or sides[1] is None else sides[0] - sides[1]
                wrong += [f"less {get_in(pair, 'against')}"] if get_in(claimed, "value") != again else []
        wrong += _wrong_seeds(get_in(found.claims, "seeds", *(("sets", where[4:]) if where else ("arms",))), arms)
        same = "as the figures"
        found.agree(f"shares and differences{where}", same, ", ".join(dict.fromkeys(wrong)) or same)


def _wrong_seeds(seeds: Any, arms: Mapping[str, Mapping[str, float | None]]) -> list[str]:
    """Name the arms whose mean or range does not follow from its values by seed, or whose first value is not its own."""
    wrong = []
    for arm, metrics in (seeds or {}).items():
        for name, own in metrics.items():
            values = [as_number(value) for value in own.get("values") or ()]
            known = [value for value in values if value is not None]
            if values and len(known) == len(values):
                right = {"mean": sum(known) / len(known), "min": min(known), "max": max(known)}
                same = all(abs((as_number(own.get(key)) or 0.0) - value) < 1e-9 for key, value in right.items())
                wrong += [] if same and values[0] == arms.get(arm, {}).get(name) else [f"seeds of {arm}"]
    return wrong


def check_plan(
    found: Verification, recipe: Recipe, plan: StudentPlan, student: Any, teacher: LiveTeacher | None
) -> None:
    """Compare the plan with the recipe's policies, and with the depths and widths of the models that are here."""
    spec, padded = recipe.student, recipe.release.format == "padded"
    if plan.given is None:
        own = [plan.layer_policy, plan.mlp_score, plan.mlp_allocation]
        allocation = "explicit" if isinstance(spec.mlp.keep, list) else spec.mlp.allocate
        found.match("plan, policies", own, [policy_of(spec.depth), spec.mlp.score, allocation])
    found.match("plan, layers of the student", len(plan.layers), len(layers_of(student)))
    if not padded and not (spec.mask and spec.mask.compact):
        found.match("plan, widths of the student", plan.widths, [mlp.width for mlp in mlps_of(student, "main")])
    if teacher is None:
        found.leave_out("plan, layers and widths of the teacher", "needs the teacher, --teacher FOLDER")
    else:
        own = {"type": plan.model_type, "layers": plan.teacher_layers}
        found.match(
            "plan, the teacher",
            own,
            {"type": teacher.model.config.model_type, "layers": len(layers_of(teacher.model))},
        )


def check_pages(found: Verification, session: Session, recipe: Recipe, plan: StudentPlan, student: Any) -> None:
    """Write card, report and results anew from the claims, and compare, but for what only the run knows."""
    evidence = evidence_of(found, session, recipe, plan, student)
    card = found.folder / "README.md"
    if card.is_file():
        sides = [_lines_known(text) for text in (_text_of(card), render_card(evidence))]
        _compare_lines(found, "card", *sides)
    found.leave_out("card, what its examples print", "no code of a release is run")
    if (found.folder / "report.html").is_file():
        texts = [_text_of(found.folder / "report.html"), render_report(evidence)]
        _compare_lines(found, "report", *([line for line in OF_THE_CHART.sub("", text).splitlines() if line.strip()] for text in texts))
        found.leave_out("report, its charts", "records of the training are not in the release")
    found.agree("recipe.yaml", _text_of(found.folder / "recipe.yaml"), evidence.recipe_text)


def evidence_of(found: Verification, session: Session, recipe: Recipe, plan: StudentPlan, student: Any) -> Evidence:
    """Put a release's claims together as its run did, without what only the run knows."""
    given, unequal = recipe.student.given, len({*plan.widths}) > 1
    padded = recipe.release.format == "padded"
    return Evidence(
        recipe=recipe,
        recipe_text=releasable_recipe(recipe),
        plan=plan,
        evaluation=found.claims,
        records={},
        teacher={**describe_model(recipe.teacher), "model_type": plan.model_type, "fitted": recipe.teacher.fit is not None},
        student={**describe_model(given), "model_type": plan.given.model_type} if given and plan.given else {},
        environment={},
        auto_class=session.task.auto_class,
        release_format=("padded" if unequal else "uniform") if padded else format_of(student, recipe.release.format),
        sample=session.task.sample,
        pattern_note=pattern_note(student.config),
    )


def _text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _lines_known(card: str) -> list[str]:
    """Select the lines of a card that do not depend on what only the run knows."""
    kept, section, skipping = [], "", False
    for line in card.splitlines():
        if line.startswith("## "):
            section, skipping = line, OF_THE_RUN.get(line) == ""
        start = OF_THE_RUN.get(section)
        if section == "## Use":  # each example is followed by what it printed
            skipping = line.startswith((">", "It prints", "These lines were not run"))
        elif start and line.startswith(start):
            skipping = True
        if line.strip() and not skipping:
            kept.append(line)
    return kept


def _compare_lines(found: Verification, what: str, claimed: list[str], own: list[str]) -> None:
    """Judge a page by its first line that is another."""
    pairs = ((one or "", other or "") for one, other in zip_longest(claimed, own))
    first = next((pair for pair in pairs if pair[0] != pair[1]), None)
    if first is None:
        found.agree(what, "as the figures", "as the figures")
        return
    at = next((place for place, both in enumerate(zip(*first, strict=False)) if len({*both}) > 1), 0)
    found.agree(f"{what}, a line", *(each[max(0, at - 20) :] for each in first))


def check_written(
    found: Verification,
    session: Session,
    recipe: Recipe,
    plan: StudentPlan,
    student: Any,
    teacher: LiveTeacher | None,
    reason: str,
) -> None:
    """Write the release's other files anew, and compare: configs, tokenizer, templates, code, and that none was added.

    They are written from the teacher and the plan where the teacher is here, else from the release itself, which shows
    what does not belong there and not what was changed.
    """
    model, beside = student, session
    whole = teacher is not None and plan.given is None and not (recipe.student.mask and recipe.student.mask.compact)
    if teacher is not None and whole:
        model = build_student(teacher.model, plan).to(next(student.parameters()).dtype)
        folder = str(teacher.model.config._name_or_path)
        beside = replace(session, recipe=session.recipe.model_copy(update={"teacher_": Teacher(model=folder)}))
    shape = evidence_of(found, session, recipe, plan, student).release_format
    files = sentence_files(student, recipe.data.prompts, recipe.data.learns_from_pairs, recipe.data.max_length)
    with tempfile.TemporaryDirectory() as scratch:
        again = Path(scratch)
        write_release(again, model, beside.released_preprocessors, files, session.task.auto_class, shape)
        written = {str(file.relative_to(again)) for file in again.rglob("*") if file.is_file()}
        _compare_names(found, recipe, plan, written, {*result_files(evidence_of(found, session, recipe, plan, student))})
        own, theirs = (get_in(read_json(each / "config.json"), "transformers_version") for each in (again, found.folder))
        if own != theirs:
            found.leave_out("configs and tokenizer", f"they were written by transformers {theirs}, and this is {own}")
            return
        for name in sorted(written):
            if not name.endswith(".safetensors") and (found.folder / name).is_file():
                sums = [sha256_of(each / name) for each in (found.folder, again)]
                found.agree(f"{name}, as written from the {'teacher' if whole else 'release'}", *sums)
    if not whole:
        found.leave_out("configs, tokenizer and templates as the teacher's", reason or "the student was not cut from it")


def _compare_names(found: Verification, recipe: Recipe, plan: StudentPlan, written: set[str], results: set[str]) -> None:
    """Name whatever lies in a release and is no part of one, empty folders too."""
    roots = {form.path.split("/")[0] for name in recipe.release.also for form in FORMS[name]}
    known = {*written, *TEXTS, *results}
    folders = {str(parent) for name in known for parent in Path(name).parents}
    for path in sorted(found.folder.rglob("*")):
        name = str(path.relative_to(found.folder))
        if name.split("/")[0] not in roots and not name.endswith(".safetensors") and name not in known | folders:
            found.checks.append(Check(f"file {name}", "in the release", "no part of one", DIFFERS))


def check_forms(found: Verification, session: Session, recipe: Recipe, student: Any) -> None:
    """Run every other form of the student in its runtime, where that is installed, and compare it with the student."""
    forms = found.claims.get("forms") or {}
    rows = {form.title: (name, form) for name in recipe.release.also for form in FORMS[name]}
    found.match("forms", [*forms], [*rows])
    model = copy.deepcopy(student).float().cpu()
    for title, (name, form) in rows.items():
        if missing := [each for each in form.packages if importlib.util.find_spec(each) is None]:
            found.leave_out(f"form {title}", f"{missing[0]} is not installed")
            continue
        try:
            again: dict[str, Any] = compare_form(name, form, found.folder, model, probe_of(session, model))
            if form.ask is not None and (ask := form.ask(found.folder / form.path, model)) is not None:
                again["test"] = measure_rounded(session, model, ask)
        except (DistillError, OSError, ValueError) as error:
            found.agree(f"form {title}", "as the student", str(error))
            continue
        keys = [key for key in ("path", "bytes", "largest", "test") if key in again]
        found.match(f"form {title}", {key: get_in(forms, title, key) for key in keys}, {key: again[key] for key in keys})


def check_sparsity(found: Verification, recipe: Recipe, student: Any) -> None:
    """Count the zeros of a student that was masked."""
    if recipe.student.mask and recipe.release.format != "padded":
        found.match("zeros in the MLPs", found.claims.get("sparsity"), sparsity_table(recipe, student))
