"""Pages and files of a release, written anew from its claims and from the teacher, and compared."""

from __future__ import annotations

import re
import tempfile
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from distill import __version__
from distill.errors import InputError
from distill.files import read_json, sha256_of
from distill.models.mlp import placed_mlps
from distill.models.pattern import pattern_note
from distill.models.plan import StudentPlan
from distill.models.sentence import sentence_files
from distill.pipeline.session import Session
from distill.pipeline.teachers import describe_model
from distill.pipeline.verification import DIFFERS, Check, Verification
from distill.recipe.locate import CHECKSUMS
from distill.recipe.schema import Recipe, Teacher
from distill.release.card import render_card
from distill.release.evidence import Evidence
from distill.release.export import releasable_recipe, write_release
from distill.release.figures import get_in
from distill.release.formats import format_of
from distill.release.forms import FORMS
from distill.release.hub_results import result_files
from distill.release.report import render_report
from distill.release.wording import one_line
from distill.student import build_student
from distill.training.provenance import flatten

OF_THE_RUN = {
    "## Time and memory": "",
    "## Versions": "",
    "## What was cut": "Before training, the",
    "## Use": "It prints",
}
"""Sections of the card that say what only the run knows, all of it or from a line on; so do the outputs in `## Use`."""
OF_THE_PAGE = {
    "<figure>": "</figure>",
    '<p class="under">No training record': "</p>",
    **dict.fromkeys(("<h2>Time and memory</h2>", "<h3>Versions</h3>", "<h3>Repair before training</h3>"), "</section>"),
}
"""The same of the report, from here to there."""
REWRITTEN = ("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens")
"""Keys that transformers writes otherwise when it writes a tokenizer again; the tokens are in tokenizer.json."""
TEXTS = ("README.md", "report.html", "plan.json", "recipe.yaml", "evaluation.json", CHECKSUMS)


def check_pages(found: Verification, session: Session, recipe: Recipe, plan: StudentPlan, student: Any) -> None:
    """Write card, report and results anew from the claims, and compare, but for what only the run knows."""
    evidence = evidence_of(found, session, recipe, plan, student)
    card = found.folder / "README.md"
    by = re.search(r"^\| distill \| (\S+) \|$", _text_of(card) if card.is_file() else "", re.MULTILINE)
    if by and by[1] != __version__:  # which has other words for the same figures
        reason = f"distill {one_line(by[1])} wrote them, and this is {__version__}"
        found.leave_out("card, report and recipe.yaml, line by line", reason)
        return
    if card.is_file():
        sides = [_lines_known(text) for text in (_text_of(card), render_card(evidence))]
        _compare_lines(found, "card", *sides)
    found.leave_out("card, what its examples print", "no code of a release is run")
    if (found.folder / "report.html").is_file():
        pages = [_text_of(found.folder / "report.html"), render_report(evidence)]
        lines = [_lines_of_page(page) for page in pages]
        _compare_lines(found, "report", *lines)
        found.leave_out("report, its charts", "records of the training are not in the release")
    found.agree("recipe.yaml", _text_of(found.folder / "recipe.yaml"), evidence.recipe_text)


def evidence_of(found: Verification, session: Session, recipe: Recipe, plan: StudentPlan, student: Any) -> Evidence:
    """Put a release's claims together as its run did, without what only the run knows."""
    given, fitted = recipe.student.given, recipe.teacher.fit is not None
    padded = recipe.release.format == "padded" and _was_unequal(found, recipe, plan, student)
    return Evidence(
        recipe=recipe,
        recipe_text=releasable_recipe(recipe),
        plan=plan,
        evaluation=found.claims,
        records={},
        teacher={**describe_model(recipe.teacher), "model_type": plan.model_type, "fitted": fitted},
        student={**describe_model(given), "model_type": plan.given.model_type} if given and plan.given else {},
        environment={},
        auto_class=session.task.auto_class,
        release_format="padded" if padded else format_of(student, recipe.release.format),
        sample=session.task.sample,
        pattern_note=pattern_note(student.config),
    )


def _was_unequal(found: Verification, recipe: Recipe, plan: StudentPlan, student: Any) -> bool:
    """Tell whether layers that share a key of the config differed in width, before zero neurons made them alike."""
    placed = placed_mlps(student)
    widths = {(side, index): layer.width for side, _, _ in placed for index, layer in enumerate(plan.stack(side))}
    if recipe.student.mask and recipe.student.mask.compact:  # what the mask took is not in the plan
        matrices = (found.claims.get("sparsity") or {}).get("matrices") or ()
        widths |= {(each["side"], each["layer"]): each["neurons"] for each in matrices}
    keys = {(mlp.axis.config_key, widths.get((side, index))) for side, index, mlp in placed}
    return len(keys) > len({key for key, _ in keys})


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


def _lines_of_page(page: str) -> list[str]:
    """Select the same lines of a report."""
    for start, end in OF_THE_PAGE.items():
        first, *rest = page.split(start)
        page = first + "".join(each.partition(end)[2] for each in rest)
    return [line for line in page.splitlines() if line.strip() and line not in ("<section>", "</section>")]


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
    found: Verification, session: Session, recipe: Recipe, plan: StudentPlan, student: Any, teacher: Any, reason: str
) -> None:
    """Write the release's other files anew, and compare: configs, tokenizer, templates, code, and that none was added.

    They are written from the teacher and the plan where the teacher is here, else from the release itself, which shows
    what does not belong there and not what was changed.
    """
    model, beside = student, session
    whole = teacher is not None and plan.given is None and not (recipe.student.mask and recipe.student.mask.compact)
    if teacher is not None and whole:
        try:
            model = build_student(teacher.model, plan).to(next(student.parameters()).dtype)
        except InputError as error:
            found.agree("plan", "of this teacher", str(error))
            return
        folder = str(teacher.model.config._name_or_path)
        beside = replace(session, recipe=session.recipe.model_copy(update={"teacher_": Teacher(model=folder)}))
    evidence = evidence_of(found, session, recipe, plan, student)
    files = sentence_files(student, recipe.data.prompts, recipe.data.learns_from_pairs, recipe.data.max_length)
    with tempfile.TemporaryDirectory() as scratch:
        again, of = Path(scratch), "teacher" if whole else "release"
        shape, beside_it = evidence.release_format, beside.released_preprocessors
        write_release(again, model, beside_it, files, session.task.auto_class, shape)
        written = {str(file.relative_to(again)) for file in again.rglob("*") if file.is_file()}
        _compare_names(found, recipe, {*written, *result_files(evidence)})
        versions = [get_in(read_json(each / "config.json"), "transformers_version") for each in (found.folder, again)]
        if versions[0] != versions[1]:
            found.leave_out("configs and tokenizer", "written by transformers {}, and this is {}".format(*versions))
            return
        for name in sorted(written):
            copies = [name, *(f"{root}/{name}" for root in form_folders(recipe) if name.startswith("tokenizer"))]
            for copied in copies if not name.endswith(".safetensors") else ():
                if (found.folder / copied).is_file():
                    wrong = ", ".join(_changed_keys(found.folder / copied, again / name))
                    found.agree(f"{copied}, as written from the {of}", "as written", wrong or "as written")
    if not whole:
        why = reason or "the student was not cut from it alone"
        found.leave_out("configs, tokenizer and templates as the teacher's", why)


def _changed_keys(claimed: Path, own: Path) -> list[str]:
    """Name the keys in which two JSON files differ, or the file where it is none."""
    if sha256_of(claimed) == sha256_of(own):
        return []
    if claimed.suffix != ".json":
        return [claimed.name]
    sides = [flatten({claimed.name: read_json(each)}) for each in (claimed, own)]
    keys = {**sides[0], **sides[1]}
    return [
        key.removeprefix(f"{claimed.name}.")
        for key in keys
        if sides[0].get(key) != sides[1].get(key) and not key.removeprefix(f"{claimed.name}.").startswith(REWRITTEN)
    ]


def form_folders(recipe: Recipe) -> set[str]:
    """Return the folders of a release in which its other forms lie."""
    return {form.path.split("/")[0] for name in recipe.release.also for form in FORMS[name]}


def _compare_names(found: Verification, recipe: Recipe, names: set[str]) -> None:
    """Name whatever lies in a release and is no part of one, empty folders too."""
    roots = form_folders(recipe)
    known = {*names, *TEXTS}
    folders = {str(parent) for name in known for parent in Path(name).parents}
    for path in sorted(found.folder.rglob("*")):
        name = str(path.relative_to(found.folder))
        if name.split("/")[0] not in roots and not name.endswith(".safetensors") and name not in known | folders:
            found.checks.append(Check(f"file {name}", "in the release", "no part of one", DIFFERS))
