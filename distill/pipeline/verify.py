"""The verb `verify`: measure a release again, and say of every figure whether it comes out as claimed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from distill.errors import InputError
from distill.evaluation.efficiency import count_size
from distill.evaluation.metrics import measurable
from distill.evaluation.predict import Rows
from distill.evaluation.table import retain, tabulate
from distill.files import read_written
from distill.models.family import all_layers
from distill.models.forward import Capture
from distill.models.load import teacher_path
from distill.models.precision import DTYPES
from distill.pipeline import data
from distill.pipeline.folder import RunDir
from distill.pipeline.inspect import model_folder
from distill.pipeline.json_shapes import Evaluation
from distill.pipeline.predictions import predict_split
from distill.pipeline.session import Session
from distill.pipeline.stage import run_stages
from distill.ranks import process_state
from distill.recipe.data import SET
from distill.recipe.load import read_released
from distill.recipe.locate import CHECKSUMS, is_path
from distill.recipe.names import TEACHER_METRICS
from distill.recipe.schema import Recipe, Teacher
from distill.release.card import inline
from distill.release.checksums import changed_files, listed_files
from distill.release.figures import Figures, get_in
from distill.release.table import Table
from distill.release.tables import arms_table
from distill.release.wording import as_number, format_number
from distill.teacher import LiveTeacher

ROUNDING = 1e-4
"""Other processors sum in another order: figures that differ by less, of the value or of 1, are the same."""
SHIFT = 0.1
"""Of its width, by which an interval may have moved: a slow machine has time for fewer draws."""
SAME, WITHIN, DIFFERS = "the same", "within its interval", "DIFFERS"
SIZES = ("parameters", "layer_parameters", "bytes")


@dataclass(frozen=True)
class Check:
    """Something that a release claims, and what was found."""

    what: str
    claimed: str
    found: str
    verdict: str


@dataclass
class Verification:
    """A release under examination, and the checks so far."""

    folder: Path
    claims: dict[str, Any]
    """Content of its evaluation.json."""
    checks: list[Check] = field(default_factory=list)

    @property
    def faults(self) -> int:
        """Number of claims that do not hold."""
        return sum(check.verdict == DIFFERS for check in self.checks)

    def compare(self, what: str, claimed: Any, found: Any, interval: Any = None, drawn: Any = None) -> None:
        """Judge a figure: the same but for rounding, inside its claimed interval, or different.

        Args:
            what: The figure, in words.
            claimed: As the release says it.
            found: As it came out.
            interval: As claimed.
            drawn: As it came out. The same interval around a figure far from it is a figure that somebody edited, and
                another one around the same figure an interval that somebody did.
        """
        own, other = as_number(claimed), as_number(found)
        ends = [[as_number(get_in(each, side)) for side in ("low", "high")] for each in (interval, drawn)]
        if own is None or other is None:
            verdict = SAME if own == other else DIFFERS
        elif math.isclose(own, other, rel_tol=ROUNDING, abs_tol=ROUNDING if abs(own) < 1 else 0):
            verdict = SAME if drawn is None or _near(*ends) else DIFFERS
        else:
            low, high = ends[0]
            inside = low is not None and high is not None and low <= other <= high
            width = 0.0 if None in ends[1] else float(ends[1][1] or 0) - float(ends[1][0] or 0)
            edited = abs(own - other) > SHIFT * width > 0 and _near(*ends)
            verdict = WITHIN if inside and not edited else DIFFERS
        shown = [f" [{format_number(low)}, {format_number(high)}]" if low is not None else "" for low, high in ends]
        self.checks.append(Check(what, format_number(claimed) + shown[0], format_number(found) + shown[1], verdict))

    def agree(self, what: str, claimed: str, found: str) -> None:
        """Judge a fact that is either as claimed or not."""
        self.checks.append(Check(what, claimed[:20], found[:20], SAME if claimed == found else DIFFERS))

    def leave_out(self, what: str, reason: str) -> None:
        """Name a claim that was not looked at, and why."""
        self.checks.append(Check(what, "", "", f"not checked: {reason}"))

    def table(self) -> Table:
        """Tabulate all checks."""
        rows = [(check.what, check.claimed, check.found, check.verdict) for check in self.checks]
        return Table(("what", "claimed", "found", "verdict"), rows, text_columns=4)


def _near(claimed: Sequence[float | None], drawn: Sequence[float | None]) -> bool:
    """Tell whether two intervals are the same, but for the number of draws that there was time for."""
    if None in (*claimed, *drawn):
        return [*claimed] == [*drawn]
    (low, high), (own_low, own_high) = [float(end or 0) for end in claimed], [float(end or 0) for end in drawn]
    return max(abs(low - own_low), abs(high - own_high)) <= SHIFT * (own_high - own_low)


def verify_release(
    folder: Path,
    scratch: Path,
    rows: Path | None = None,
    teacher: str | None = None,
    say: Callable[[str], None] = lambda _line: None,
) -> Verification:
    """Check the files of a release, prepare its data anew, measure its model on them, and compare.

    Args:
        folder: The release. None of its code is run.
        scratch: An empty folder for the prepared data.
        rows: Folder with the data files that the recipe names, where it names any.
        teacher: Folder or package of the teacher that the figures compare with; None: the recipe's, where it was
            not fitted and is on this machine.
        say: Gets the lines of the stage `data`.

    Raises:
        InputError: The folder is no release, or the data are not there.
    """
    found = Verification(folder, read_claims(folder))
    _check_files(found)
    recipe = read_released(folder / "recipe.yaml")
    session = _session_for(recipe, folder, scratch, rows, say)
    run_stages(session, [data.STAGE])
    if recipe.routes:
        found.leave_out("data, as tokens", "each row names its teacher, and these are not here")
    else:
        found.agree("data, as tokens", str(get_in(found.claims, "data", "fingerprint")), session.corpus.fingerprint)
    student = session.load(folder, process_state().device).eval()
    taught_by, reason = _teacher_for(session, recipe, teacher)
    _check_figures(found, session, student, taught_by, reason)
    sizes = get_in(found.claims, "efficiency", "models", "student")
    if recipe.release.format != "padded":  # whose figures are those without the zero neurons
        counted = count_size(student, all_layers)
        for name in SIZES if sizes else ():
            found.compare(f"student, {name}", get_in(sizes, name), counted[name])
    _check_card(found)
    _check_derived(found)
    return found


def read_claims(folder: Path) -> dict[str, Any]:
    """Read what a release claims of itself. Raises InputError where it claims nothing."""
    path = folder / "evaluation.json"
    if not path.is_file():
        raise InputError(f"{folder} holds no evaluation.json, so it is no release of distill that could be verified")
    return dict(read_written(path, Evaluation, "no release of distill has it so"))


def _check_files(found: Verification) -> None:
    """Compare the files of a release with its own list of checksums."""
    changed = changed_files(found.folder)
    for name, (claimed, own) in changed.items():
        found.checks.append(Check(f"file {name}", claimed[:20], own[:20], DIFFERS))
    if not changed:
        found.checks.append(Check(f"{len(listed_files(found.folder))} files", CHECKSUMS, CHECKSUMS, SAME))


def _session_for(recipe: Recipe, folder: Path, scratch: Path, rows: Path | None, say: Callable[[str], None]) -> Session:
    """Open the recipe of a release with the release in the place of every model: its tokenizer, config and classes."""
    named = [each.source for split in recipe.rows.splits for each in recipe.rows.origins(split)]
    if rows is None and (missing := [name for name in dict.fromkeys(named) if is_path(name)]):
        raise InputError(f"{folder}: it was measured on {', '.join(missing)}: give the folder with --data")
    teacher = Teacher(model=str(folder.absolute()))
    student = recipe.student
    if student.given is not None:
        student = student.model_copy(update={"from_": teacher.model, "revision": None, "sha256": None})
    recipe = recipe.model_copy(update={"teacher_": teacher, "teachers": [], "student": student})
    return Session(recipe, (rows or folder).absolute(), RunDir(scratch), say)


def _teacher_for(session: Session, recipe: Recipe, given: str | None) -> tuple[LiveTeacher | None, str]:
    """Load the teacher that the figures compare with; or None, and why not."""
    own = recipe.teacher
    if recipe.mixes:
        return None, "was compared with a mixture of teachers"
    if given is None and own.fit is not None:
        return None, "needs the fitted teacher, --teacher FOLDER"
    try:
        folder = teacher_path(own, session.base) if given is None else model_folder(given, "--teacher")
    except InputError as error:
        if given is not None:
            raise
        return None, f"needs the teacher, --teacher FOLDER ({error})"
    model = session.load(folder, process_state().device)
    model.to(DTYPES.get(own.dtype, model.dtype))
    return LiveTeacher(model, Capture(stop_at_head=True), process_state().device, session.precision_of(own)), ""


def _check_figures(
    found: Verification, session: Session, student: Any, teacher: LiveTeacher | None, reason: str
) -> None:
    """Measure the student, and the teacher where it is there, on every split that has figures."""
    sets = {f"{SET}{name}": own["arms"] for name, own in (found.claims.get("sets") or {}).items()}
    for split, arms in {"test": found.claims["arms"], **sets}.items():
        if split not in session.corpus.splits:
            found.agree(f"rows of {split.removeprefix(SET)}", "measured", "no set of its recipe")
            continue
        models = {"distilled": student, **({} if teacher is None else {"teacher": teacher.model})}
        measured = {
            name: predict_split(session, model, split, teacher=teacher, precision=session.recipe.training.precision)
            for name, model in models.items()
        }
        for arm in arms:
            _compare_arm(found, split, arm, measured.get(arm["name"]), reason)


def _compare_arm(found: Verification, split: str, arm: Mapping[str, Any], columns: Rows | None, reason: str) -> None:
    title = arm["name"] if split == "test" else f"{arm['name']} on {split.removeprefix(SET)}"
    if columns is None:
        found.leave_out(title, reason if arm["name"] == "teacher" else "not released")
        return
    names = measurable(list(arm["metrics"]), columns)
    again = tabulate({str(arm["name"]): columns}, names, 0)["arms"][0] if names else {}
    for name, claimed in arm["metrics"].items():
        if name in names:
            ends = [get_in(each, "intervals", name) for each in (arm, again)]
            found.compare(f"{title}, {name}", claimed, again["metrics"][name], *ends)
        else:
            found.leave_out(f"{title}, {name}", reason if name in TEACHER_METRICS else "it needs other columns")


def _check_card(found: Verification) -> None:
    """Compare the card's table of arms, and the figures in its head, which the hub shows, with evaluation.json."""
    path, figures = found.folder / "README.md", Figures(found.claims)
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for table in map(arms_table, (figures, *figures.elsewhere.values())):
        for row in table.rows:
            there = "|" + "".join(f" {inline(cell)} |" for cell in row) in text
            found.agree(f"card, row of {row[0]}", "as evaluation.json", "as evaluation.json" if there else "otherwise")
    found.leave_out("card, what its examples print", "no code of a release is run")
    metrics = figures.arms.get("distilled", {}).get("metrics", {})
    head = ModelCard(text, ignore_metadata_errors=True).data
    for result in getattr(head, "eval_results", None) or []:
        found.compare(f"card head, {result.metric_type}", result.metric_value, metrics.get(result.metric_type))


def _check_derived(found: Verification) -> None:
    """Compute anew what follows from the claimed metrics: shares of the teacher's lead, and differences of arms."""
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
        same = "as the figures"
        found.agree(f"shares and differences{where}", same, ", ".join(dict.fromkeys(wrong)) or same)
