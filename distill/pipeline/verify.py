"""The verb `verify`: measure a release again, and say of every figure whether it comes out as claimed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from distill.errors import InputError
from distill.evaluation.metrics import measurable
from distill.evaluation.predict import Rows
from distill.evaluation.table import tabulate
from distill.files import read_written
from distill.models.forward import Capture
from distill.models.load import teacher_path
from distill.models.plan import StudentPlan
from distill.models.precision import DTYPES
from distill.pipeline import claims, data, rewriting
from distill.pipeline.evaluate import unit_of
from distill.pipeline.folder import RunDir
from distill.pipeline.inspect import model_folder
from distill.pipeline.json_shapes import Evaluation
from distill.pipeline.predictions import predict_split
from distill.pipeline.session import Session
from distill.pipeline.stage import run_stages
from distill.pipeline.verification import DIFFERS, SAME, Check, Verification
from distill.ranks import process_state
from distill.recipe.data import SET
from distill.recipe.load import read_released
from distill.recipe.locate import CHECKSUMS, is_path
from distill.recipe.names import TEACHER_METRICS
from distill.recipe.schema import Recipe, Teacher
from distill.recipe.teachers import Member
from distill.registry import is_reference
from distill.release.checksums import changed_files, listed_files
from distill.release.figures import get_in
from distill.teacher import LiveTeacher


def verify_release(
    folder: Path,
    scratch: Path,
    rows: Path | None = None,
    teacher: str | None = None,
    say: Callable[[str], None] = lambda _line: None,
    *,
    run_functions: bool = False,
) -> Verification:
    """Check the files of a release, prepare its data anew, measure its model on them, and compare.

    Args:
        folder: The release. None of its code is run.
        scratch: An empty folder for the prepared data.
        rows: Folder with the data files that the recipe names, where it names any.
        teacher: Folder or package of the teacher that the figures compare with; None: the recipe's, where it was
            not fitted and is on this machine.
        say: Gets the lines of the stage `data`.
        run_functions: Call the functions that the recipe names for its data and metrics.

    Raises:
        InputError: The folder is no release, or the data are not there.
    """
    found = Verification(folder, read_claims(folder))
    _check_files(found)
    recipe = read_released(folder / "recipe.yaml")
    named = [each.source for split in recipe.rows.splits for each in recipe.rows.origins(split)]
    named += [*(recipe.evaluation.metrics or ()), *found.claims["metrics"]]
    calls = [name for name in named if is_reference(name)]
    if calls and not run_functions:
        raise InputError(f"{folder}: its recipe names functions, {', '.join(calls)}; add --run-functions to call them")
    session = _prepare_data(found, _session_for(recipe, folder, scratch, rows, say), recipe)
    student = session.load(folder, process_state().device).eval()
    taught_by, reason = _teacher_for(session, recipe, teacher)
    found.exact = recipe.training.precision == "fp32" and get_in(found.claims, "precision", "students") == "float32"
    measured = _check_figures(found, session, student, taught_by, reason)
    claims.check_facts(found, session, recipe, measured)
    claims.check_sizes(found, session, student, taught_by)
    claims.check_derived(found)
    if (folder / "plan.json").is_file():  # said already where it is missing
        plan = StudentPlan.load(folder / "plan.json")
        claims.check_plan(found, recipe, plan, student, taught_by)
        rewriting.check_pages(found, session, recipe, plan, student)
        rewriting.check_written(found, session, recipe, plan, student, taught_by, reason)
    claims.check_sparsity(found, recipe, student)
    claims.check_forms(found, session, recipe, student)
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
    here, student = str(folder.absolute()), recipe.student
    # Who teaches which rows decides how they are packed; and classes are in the order of a teacher that was not fitted.
    several = [Member(model=here, fit=one.fit, weight=one.weight, sources=one.sources) for one in recipe.teachers]
    teacher = None if several else Teacher(model=here, fit=recipe.teacher.fit)
    if student.given is not None:
        student = student.model_copy(update={"from_": here, "revision": None, "sha256": None})
    recipe = recipe.model_copy(update={"teacher_": teacher, "teachers": several, "student": student})
    return Session(recipe, (rows or folder).absolute(), RunDir(scratch), say)


def _prepare_data(found: Verification, session: Session, recipe: Recipe) -> Session:
    """Prepare the data, and compare them with those of the run; returns the session that has them."""
    claimed = get_in(found.claims, "data", "fingerprint")
    run_stages(session, [data.STAGE])
    if session.corpus.fingerprint != claimed and session.task.packed and len(recipe.models) > 1:
        # A model that is not here may be of a family that cannot tell the documents of a row apart.
        apart = replace(session, packs=False, folder=RunDir(session.folder.root / "unpacked"))
        run_stages(apart, [data.STAGE])
        session = apart if apart.corpus.fingerprint == claimed else session
    found.agree("data, as tokens", str(claimed), session.corpus.fingerprint)
    return session


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
) -> dict[str, Rows]:
    """Measure the student, and the teacher where it is there, on every split that has figures; returns the test rows.

    With the metrics their intervals, the figures of classes, and the student's difference from the teacher are judged.
    """
    named = {arm["name"] for arm in found.claims["arms"]}
    models = {"distilled": student, **({"teacher": teacher.model} if teacher and "teacher" in named else {})}
    sets = {f"{SET}{name}": own for name, own in (found.claims.get("sets") or {}).items()}
    rows: dict[str, Rows] = {}
    for split, claimed in {"test": found.claims, **sets}.items():
        if split not in session.corpus.splits:
            found.agree(f"rows of {split.removeprefix(SET)}", "measured", "no set of its recipe")
            continue
        precision = session.recipe.training.precision
        measured = {
            name: predict_split(session, model, split, teacher=teacher, precision=precision)
            for name, model in models.items()
        }
        rows = rows or measured
        _compare_split(found, session, split, claimed, measured, reason)
    return rows


def _compare_split(
    found: Verification, session: Session, split: str, claimed: Any, measured: dict[str, Rows], reason: str
) -> None:
    where, before = "" if split == "test" else f" on {split.removeprefix(SET)}", found.within
    exact = get_in(found.claims, "precision", "teacher") == "float32"
    names = list(found.claims["metrics"])
    for columns in measured.values():
        names = measurable(names, columns)
    again = tabulate(measured, names, 0, session.corpus.classes, unit_of(session))
    arms = {arm["name"]: arm for arm in again["arms"]}
    for arm in claimed["arms"]:
        title = f"{arm['name']}{where}"
        if arm["name"] not in arms:
            found.leave_out(title, reason if arm["name"] == "teacher" else "not released")
            continue
        for name, value in arm["metrics"].items():
            if name in names:
                own = arms[arm["name"]]
                ends = [get_in(each, "intervals", name) for each in (arm, own)]
                smooth = name if exact or not (arm["name"] == "teacher" or name in TEACHER_METRICS) else ""
                found.compare(f"{title}, {name}", value, own["metrics"][name], ends[0], ends[1], smooth)
            else:
                found.leave_out(f"{title}, {name}", reason if name in TEACHER_METRICS else "it needs other columns")
    found.match(f"what was drawn{where}", claimed.get("drawn"), again["drawn"])
    if found.within > before:
        found.leave_out(f"classes and differences{where}", "the metrics moved within their intervals")
        return
    for kind, own in (again["per_class"] or {}).items():
        for name, figures in own.items():
            found.match(f"{kind} of {name}{where}", get_in(claimed, "per_class", kind, name), figures)
    for pair in again["differences"]:
        pairs = [each for each in claimed.get("differences") or () if get_in(each, "against") == pair["against"]]
        own = {name: get_in(pairs[0], "metrics", name) for name in pair["metrics"]} if pairs else None
        found.match(f"distilled less {pair['against']}{where}", own, pair["metrics"])
