"""What a release says beside the metrics of its models, derived anew: from recipe, data, weights and teacher."""

from __future__ import annotations

import copy
import importlib.util
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from distill.errors import DistillError
from distill.evaluation.arms import lessons, measured_arms, not_run, rivals, title_of
from distill.evaluation.efficiency import compare_sizes, count_figures, device_name, in_bf16
from distill.evaluation.metrics import higher_is_better, measurable
from distill.evaluation.predict import Rows
from distill.evaluation.table import retain
from distill.models.family import all_layers, layers_of
from distill.models.mlp import mlps_of
from distill.models.plan import StudentPlan
from distill.pipeline.evaluate import describe_data, describe_set
from distill.pipeline.release_forms import measure_rounded, probe_of
from distill.pipeline.session import Session
from distill.pipeline.teachers import describe_teachers
from distill.pipeline.verification import Verification
from distill.recipe.data import SET
from distill.recipe.names import TEACHER_METRICS
from distill.recipe.schema import Recipe
from distill.release.figures import get_in
from distill.release.forms import FORMS, compare_form
from distill.release.wording import as_number
from distill.student.layers import policy_of
from distill.student.masks.sparsity import tabulate_sparsity
from distill.teacher import LiveTeacher

OF_THE_TEACHER = re.compile(r"[,;] [^,;]*\bthe teacher\b")
"""Starts what the words for labels say of the config of a teacher, whose place the release has here."""
SIZES = ("parameters", "layer_parameters", "bytes", "dtype", "flops_per_example", "layer_flops_per_example", "parts")
"""Figures of a model that no clock and no other machine changes."""


def check_facts(found: Verification, session: Session, recipe: Recipe, measured: Mapping[str, Rows]) -> None:
    """Derive what recipe and data say of themselves: names of arms, rivals and metrics, and counts of rows."""
    claims, columns = found.claims, measured.get("distilled", {})
    wanted = recipe.evaluation.metrics or measurable(session.task.metrics_for(session.corpus.head), columns)
    beside = [name for name in claims["metrics"] if name in TEACHER_METRICS]
    names = list(dict.fromkeys([*wanted, *beside]))
    data = describe_data(session) | {"examples": len(next(iter(columns.values()), ()))}
    claimed = {**claims["data"], "fingerprint": data["fingerprint"]}  # which is judged by itself
    sides = [{**each, "labels": OF_THE_TEACHER.split(str(each.get("labels")))[0]} for each in (claimed, data)]
    found.match("data, as counted", *sides)
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
    if claims.get("licences"):
        found.leave_out("licences of the models", "their cards are not here")
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
    read = partial(count_figures, length=data.max_length, target_length=data.max_target_length)
    for name, model in (here | in_bf16(here)).items():
        counted = read(model, all_layers, vocabulary=len(session.tokenizer))
        claimed = {key: get_in(models, name, key) for key in SIZES if key in counted}
        found.match(f"{name}, parameters, bytes and FLOPs", claimed, {key: counted[key] for key in claimed})
    protocol = get_in(found.claims, "efficiency", "protocol") or {}
    reference = models.get(str(protocol.get("reference")), {})
    for name, own in models.items():
        ratios = get_in(found.claims, "efficiency", "ratios", name)
        if ratios is not None:
            known = {key: value for key, value in own.items() if as_number(value) and as_number(reference.get(key))}
            again = compare_sizes(known, reference)
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
    """Name the arms whose mean or range does not follow from the values by seed, or whose first is not their own."""
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
        there = [teacher.model.config.model_type, len(layers_of(teacher.model))]
        found.match("plan, the teacher", [plan.model_type, plan.teacher_layers], there)


def check_forms(found: Verification, session: Session, recipe: Recipe, student: Any) -> None:
    """Run every other form of the student in its runtime, where that is installed, and compare it with the student."""
    forms = found.claims.get("forms") or {}
    rows = {form.title: (name, form) for name in recipe.release.also for form in FORMS[name]}
    found.match("forms", [*forms], [*rows])
    device = next(student.parameters()).device
    here = get_in(found.claims, "efficiency", "protocol", "device") == device_name(device)
    model = copy.deepcopy(student).float().cpu()
    for title, (name, form) in rows.items():
        if missing := [each for each in form.packages if importlib.util.find_spec(each) is None]:
            found.leave_out(f"form {title}", f"{missing[0]} is not installed")
            continue
        try:
            again: dict[str, Any] = compare_form(name, form, found.folder, model, probe_of(session, model))
            if here and form.ask is not None and (ask := form.ask(found.folder / form.path, model)) is not None:
                again["test"] = measure_rounded(session, model, ask)
        except (DistillError, OSError, ValueError) as error:
            found.agree(f"form {title}", "as the student", str(error))
            continue
        if form.ask is not None and not here:
            found.leave_out(f"form {title}, its metrics", "other processors round 8 bits in another way")
        keys = [key for key in ("path", "bytes", "largest", "test") if key in again]
        claimed = {key: get_in(forms, title, key) for key in keys}
        found.match(f"form {title}", claimed, {key: again[key] for key in keys})


def check_sparsity(found: Verification, recipe: Recipe, student: Any) -> None:
    """Count the zeros of a student that was masked."""
    if recipe.student.mask and recipe.release.format == "padded":
        found.leave_out("zeros in the MLPs", "the figures are without the neurons that pad it")
    elif recipe.student.mask:
        found.match("zeros in the MLPs", found.claims.get("sparsity"), tabulate_sparsity(student))
