"""Every table of the model card and of the report, as rows of finished text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distill.losses import MATCHES
from distill.models.plan import StudentPlan
from distill.recipe.jsonrows import LISTED
from distill.recipe.on_policy import OnPolicy
from distill.recipe.schema import Schedule
from distill.recipe.sections import Lora
from distill.recipe.terms import TERM_KEYS
from distill.release.evidence import Evidence
from distill.release.figures import Figures, get_in
from distill.release.sizes import bytes_table, efficiency_table, speed_table
from distill.release.table import Table
from distill.release.wording import (
    MISSING,
    as_number,
    format_count,
    format_interval,
    format_megabytes,
    format_metric,
    format_number,
    format_paired,
    format_percent,
    format_seconds,
    format_size,
)

MANY_CLASSES = 10
"""Of more classes the worst and the best are shown, half of the number each; evaluation.json has all."""


def tables(evidence: Evidence) -> dict[str, Table]:
    """Build every table of the card and of the report, by name."""
    outcomes = evidence.plan.outcomes
    choices = [(key, choice.asked, choice.got, choice.reason or MISSING) for key, choice in outcomes.items()]
    return {
        "arms": arms_table(evidence),
        "differences": differences_table(evidence),
        "harness": harness_table(evidence),
        "classes": classes_table(evidence),
        "confusion": confusion_table(evidence),
        "choices": Table(("what", "asked", "got", "why they differ"), choices, text_columns=4),
        "layers": layers_table(evidence.plan),
        "repair": repair_table(evidence),
        "losses": losses_table(evidence),
        "training": Table(("setting", "value"), training_rows(evidence), text_columns=2),
        "data": data_table(evidence),
        "efficiency": efficiency_table(evidence),
        "speed": speed_table(evidence),
        "bytes": bytes_table(evidence),
        "forms": forms_table(evidence),
        "stages": stages_table(evidence),
        "versions": Table(("", "version"), [(key, str(value)) for key, value in evidence.environment.items()], 2),
    }


def layers_table(plan: StudentPlan) -> Table:
    """Tabulate the layers of a student, with the neurons kept; of one that was given, what they are paired with."""
    rows = []
    for index, layer in enumerate(plan.layers):
        cells = (f"{layer.teacher_width} → {layer.width}", format_percent(layer.width / layer.teacher_width))
        rows.append((str(index), str(layer.teacher_layer), *((str(layer.width), "") if plan.given else cells)))
    origin, kept = ("paired with teacher layer", "") if plan.given else ("from teacher layer", "neurons kept")
    return Table(("student layer", origin, "MLP width", kept), rows, text_columns=0)


def arms_table(figures: Figures) -> Table:
    """Tabulate all arms and all metrics, with intervals; in brackets what an arm retains of the teacher's lead."""
    names, higher = figures.metric_names, figures.evaluation["higher_is_better"]
    titles = [name + {True: " ↑", False: " ↓"}.get(higher.get(name), "") for name in names]
    rows = []
    for arm, record in figures.arms.items():
        cells = []
        for name in names:
            retained = figures.retained(arm, name)
            share = "" if retained is None else f" ({format_percent(retained)})"
            interval = format_interval(name, figures.interval(arm, name))
            cells.append(format_metric(name, record["metrics"].get(name)) + interval + share)
        trained = (str(record.get("steps") or MISSING), format_number(record.get("lr")))
        rows.append((figures.title(arm), *trained, *cells))
    return Table(("arm", "steps", "lr", *titles), rows)


def differences_table(evidence: Evidence) -> Table:
    """Tabulate what the distilled student has more than every other arm, on the same draws of rows."""
    pairs = {pair["against"]: pair["metrics"] for pair in evidence.evaluation.get("differences") or []}
    names = [name for name in evidence.metric_names if any(name in own for own in pairs.values())]
    rows = []
    for other, own in pairs.items():
        cells = (format_paired(name, own.get(name) or {}) or MISSING for name in names)
        rows.append((f"distilled less {other}", *cells))
    return Table(("difference", *names), rows)


def harness_table(evidence: Evidence) -> Table:
    """Tabulate the figures of lm-evaluation-harness with one standard error, an arm a column; empty without any."""
    arms = get_in(evidence.evaluation, "harness", "arms") or {}
    found: dict[tuple[str, str], dict[str, str]] = {}
    for arm, figures in arms.items():
        for own in figures:
            error = "" if own["stderr"] is None else f" ± {format_number(own['stderr'])}"
            found.setdefault((own["task"], own["metric"]), {})[arm] = format_number(own["value"]) + error
    rows = [(*key, *(cells.get(arm, MISSING) for arm in arms)) for key, cells in found.items()]
    return Table(("task", "metric", *arms), rows, text_columns=2)


def classes_table(evidence: Evidence) -> Table:
    """Tabulate the classes, of many the worst and the best: F1 of teacher and student, and what they are taken for."""
    found = evidence.evaluation.get("per_class") or {"classes": {}, "confusion": {}}
    ours, theirs = (found["classes"].get(arm, {}) for arm in ("distilled", "teacher"))
    names = sorted({**theirs, **ours}, key=lambda name: get_in(ours, name, "f1") or 0.0)
    if len(names) > MANY_CLASSES:
        names = [*names[: MANY_CLASSES // 2], *names[-MANY_CLASSES // 2 :]]
    rows = []
    for name in names:
        own, other = ours.get(name, {}), theirs.get(name, {})
        wrong = [pair for pair in found["confusion"].get("distilled", []) if pair[0] == name != pair[1]]
        taken = f"{wrong[0][1]} ({wrong[0][2]})" if wrong else MISSING
        scores = [format_percent(each.get("f1")) + format_interval("f1", each) for each in (other, own)]
        shares = [format_percent(own.get(key)) for key in ("precision", "recall")]
        rows.append((name, taken, str(own.get("true", other.get("true", 0))), *scores, *shares))
    head = ("class", "most often taken for", "examples", "F1 of the teacher", "F1", "precision", "recall")
    return Table(head, rows, text_columns=2)


def confusion_table(evidence: Evidence) -> Table:
    """Tabulate true against predicted classes of the student; of many classes the most frequent mistakes."""
    pairs = get_in(evidence.evaluation, "per_class", "confusion", "distilled") or []
    names = sorted({name for pair in pairs for name in pair[:2]})
    if len(names) > MANY_CLASSES:
        wrong = [pair for pair in pairs if pair[0] != pair[1]][:MANY_CLASSES]
        return Table(("true", "predicted", "times"), [(*pair[:2], str(pair[2])) for pair in wrong], text_columns=2)
    counts = {(true, predicted): times for true, predicted, times in pairs}
    rows = [(name, *(str(counts.get((name, other), 0)) for other in names)) for name in names]
    return Table(("true, predicted:", *names), rows)


def repair_table(evidence: Evidence) -> Table:
    """Tabulate what each step of the repair gained, on the calibration sample and on held-out training examples."""
    steps = (evidence.repair or {}).get("steps", [])
    number = any("teacher_mse" in (get_in(step, "held_out") or {}) for step in steps)
    compared, title = ("teacher_mse", "held-out difference from the teacher") if number else ("kl", "held-out KL")
    rows = []
    for before, step in zip([None, *steps], steps, strict=False):
        cells = [str(step["name"]), ", ".join(step["notes"]) or MISSING, format_percent(step.get("error_left"))]
        for name in (compared, "loss"):
            old, new = (as_number(get_in(each, "held_out", name)) for each in (before, step))
            gained = "" if old is None or new is None else f" ({old - new:+.3g} gained)"
            cells.append(format_number(new) + gained)
        rows.append(tuple(cells))
    return Table(("step", "not done", "calibration error left", title, "held-out loss"), rows, text_columns=2)


def stages_table(evidence: Evidence) -> Table:
    """Tabulate time and memory of every stage."""
    rows = [(str(s["stage"]), format_seconds(s["seconds"]), format_size(s["peak_bytes"])) for s in evidence.stages]
    return Table(("stage", "time", "memory at its peak"), rows)


def losses_table(evidence: Evidence) -> Table:
    """Tabulate the terms of the training loss, with the changes of their schedules."""
    rows = []
    for term in evidence.recipe.losses:
        match, ends, settings = MATCHES[term.match], term.schedule or Schedule.model_construct(), []
        if "temperature" in TERM_KEYS[term.match].keys:
            scaled = "" if term.scale_by_temperature else ", not multiplied by temperature²"
            settings.append(f"temperature {format_change(term.temperature, ends.temperature)}{scaled}")
        if "map" in TERM_KEYS[term.match].keys:
            settings.append(f"map {term.map if isinstance(term.map, str) else [list(pair) for pair in term.map]}")
        if term.stack:
            settings.append(f"of the {term.stack}")
        settings += [f"{key} {format_change(value, ends.params.get(key))}" for key, value in term.params.items()]
        if term.schedule:
            span = f"{format_percent(ends.start)} to {format_percent(ends.end)}"
            settings.append(f"{ends.shape} from {span} of the steps")
        loss, weight = term.loss or match.default or "the task's own", format_change(term.weight, ends.weight)
        rows.append((term.match, match.compares, loss, ", ".join(settings) or MISSING, weight))
    return Table(("match", "compares", "loss", "settings", "weight"), rows, text_columns=4)


def format_change(start: Any, end: Any) -> str:
    """Format a setting, and the value at the end of its schedule where it has one."""
    first = format_number(start) if type(start) is float else str(start)
    return first if end is None else f"{first} to {format_number(end)}"


def data_table(evidence: Evidence) -> Table:
    """Tabulate the rows of every split: read, left out by reason, used, cut; and its classes."""
    splits = evidence.evaluation["data"].get("summary") or {}
    reasons = dict.fromkeys(reason for own in splits.values() for reason in own["rows"] if reason != "read")
    classes = [*dict.fromkeys(name for own in splits.values() for name in own["classes"])]
    paths: dict[str, tuple[str, ...]] = {
        "rows read": ("rows", "read"),
        **{reason.replace("_", " "): ("rows", reason) for reason in reasons},
        "examples": ("examples",),
        "with a label": ("labelled",),
        "tokens": ("tokens",),
        "tokens of an example: median": ("lengths", "median"),
        "longest": ("lengths", "longest"),
        "cut to that length": ("truncated",),
        **{f"class {name}": ("classes", name) for name in classes[:LISTED]},
    }
    counts = {name: [get_in(own, *path) for own in splits.values()] for name, path in paths.items()}
    rows = [(name, *(MISSING if each is None else f"{each:,}" for each in own)) for name, own in counts.items()]
    if len(classes) > LISTED:
        rows.append((f"and {len(classes) - LISTED} more classes", *("" for _ in splits)))
    if splits:
        rows.append(("unknown tokens", *(format_percent(own["unknown_share"]) for own in splits.values())))
    return Table(("", *splits), rows if splits else [])


def training_rows(evidence: Evidence) -> list[tuple[str, ...]]:
    """List how long, how fast and on what the student learned."""
    training, data, teacher = evidence.recipe.training, evidence.evaluation["data"], evidence.teacher
    fitted = ", fitted on this data first" if teacher.get("fitted") else ""
    tokens = as_number(get_in(evidence.arms, "distilled", "tokens"))
    rows = {
        "teacher": f"{teacher['model']} ({teacher['model_type']}{fitted})",
        **{f"teacher {number}": teacher_line(own) for number, own in enumerate(evidence.teachers, start=1)},
        "teacher revision": teacher.get("revision"),
        "teacher sha256": teacher.get("sha256"),
        "student from": evidence.student.get("model"),
        "student revision": evidence.student.get("revision"),
        "student sha256": evidence.student.get("sha256"),
        "steps": get_in(evidence.arms, "distilled", "steps") or training.steps,
        "tokens": None if tokens is None else format_count(tokens),
        "batch size": training.batch_size,
        "learning rate": f"{format_number(training.lr)}, {training.schedule}, warmup {format_number(training.warmup)}",
        "weight decay": format_number(training.weight_decay),
        "optimizer": None if training.optimizer == "adamw" else training.optimizer,
        "precision": training.precision,
        "weights": "bf16, with fp32 masters" if training.weights == "bf16" else None,
        "adapters": None if training.lora is None else adapters_line(training.lora),
        "on-policy": None if training.on_policy is None else on_policy_line(training.on_policy),
        **mask_rows(evidence),
        "seed": evidence.recipe.seed,
        "data": f"{data['source']}, fingerprint {data['fingerprint']}",
        "training examples": f"{data['train_examples']}, labelled: {data.get('labelled', 'all')}",
        "test examples": data["examples"],
    }
    return [(key, str(value)) for key, value in rows.items() if value is not None]


def teacher_line(own: Mapping[str, Any]) -> str:
    """Name one of several teachers, with its weight and the sources that it teaches."""
    sources = f", on {', '.join(own['sources'])}" if own["sources"] else ""
    pins = "".join(f", {name} {own[name]}" for name in ("revision", "sha256") if own[name])
    return f"{own['model']}, weight {format_number(own['weight'])}{sources}{pins}"


def on_policy_line(own: OnPolicy) -> str:
    """Say how much of what the student learned from it wrote itself."""
    share = f"{format_percent(own.share)} of the micro-batches, drawn by lot"
    limits = f"up to {own.max_new_tokens} tokens at temperature {format_number(own.temperature)}"
    return f"{share}: answers that the student wrote, {limits}, scored by the teacher"


def adapters_line(lora: Lora) -> str:
    """Say which adapters learned in place of the weights."""
    targets = lora.targets if isinstance(lora.targets, str) else ", ".join(lora.targets)
    also = f"; beside them {', '.join(lora.also)}" if lora.also else ""
    return f"LoRA, rank {lora.rank}, alpha {format_number(lora.alpha)}, on {targets}{also}; merged into the weights"


def mask_rows(evidence: Evidence) -> dict[str, str]:
    """List what was masked, and the zeros and widths that the student has; empty without a mask."""
    spec, found = evidence.recipe.student.mask, evidence.evaluation.get("sparsity")
    if spec is None or not found:
        return {}
    amount, when = format_percent(spec.sparsity), ""
    if spec.sparsity is None:
        amount = f"below {format_number(spec.threshold)} x the mean"
    if spec.schedule == "cubic":
        when = f" from {format_percent(spec.begin)} to {format_percent(spec.end)} of the steps"
    return {
        "mask": f"{amount} of each MLP, per {spec.per} by {spec.score}, {spec.schedule}{when}",
        "zeros in the MLPs": format_percent(found["zeros"]),
        **({"MLP widths, compacted": ", ".join(map(str, found["widths"]))} if spec.compact else {}),
    }


def forms_table(evidence: Evidence) -> Table:
    """Tabulate the other forms of the release: size, difference from the student, and what rounding costs."""
    rows, metric = [], evidence.primary
    for title, form in (evidence.evaluation.get("forms") or {}).items():
        scores = [as_number(get_in(form, "test", side, metric)) for side in ("student", "metrics")]
        kept = MISSING if None in scores else " → ".join(format_metric(metric, score) for score in scores)
        difference = f"{form['difference']:.2g} of {form['largest']:.2g}"
        agreed = format_percent(get_in(form, "test", "metrics", "agreement"))
        rows.append((title, form["path"], form["runtime"], format_megabytes(form["bytes"]), difference, kept, agreed))
    head = ("form", "file", "runtime", "size", "difference of outputs", f"{metric}, student → form", "agreement")
    return Table(head, rows, text_columns=3)
