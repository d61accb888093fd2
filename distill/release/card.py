"""Render the model card: README.md of a release."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from distill.recipe.locate import GGUF
from distill.recipe.names import TEACHER_METRICS
from distill.release.budgets import budget_lines, seeds_table, seeds_title
from distill.release.evidence import Evidence, describe_origin, judge, judge_sets, summarize
from distill.release.examples import STUDENT, USES, VECTORS, card_examples
from distill.release.export import releasable_recipe
from distill.release.figures import get_in
from distill.release.tables import arms_table, tables
from distill.release.wording import as_number, format_metric, format_percent, one_line

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
MOST_PRINTED = 1000
"""Characters of what an example printed that a card shows."""
LOADING = {
    "uniform": "The folder loads with stock `transformers`; it holds no code.",
    "padded": (
        "The folder loads with stock `transformers`; it holds no code. The MLPs of this model have different widths, "
        "and stock classes know only one: zero neurons fill them up to the widest. They change nothing but size and "
        "speed, which are those of the widest layer everywhere; the figures on this card are without them."
    ),
    "native": (
        "The MLPs of this model have different widths, which `transformers` reads (`per_layer_config`) but does not "
        "build. The folder therefore holds code, a short generated file, `modeling_distill.py`; read it, and load with "
        "`trust_remote_code=True` as below, or load with `distill.load_student` and run no code of the folder. Without "
        "either, loading fails."
    ),
}
"""Instructions for whoever loads a release, by its format."""


def render_card(evidence: Evidence) -> str:
    """Render README.md: metadata for the hub, then the cut, the training, the figures and their limits."""
    shown = {title: with_output(code, evidence.printed.get(title)) for title, code in card_examples(evidence).items()}
    # Every value printed by the template passes `inline` first: a name cannot open a tag, a table cell or a heading.
    return (
        make_environment(inline)
        .get_template("card.md.jinja")
        .render(
            **context_of(evidence),
            metadata=Markup(metadata(evidence).to_yaml(line_break="\n")),  # noqa: S704 (YAML quotes its own values)
            loading=Markup(LOADING[evidence.release_format]),  # noqa: S704 (our own text)
            licences={model: name_of(own) for model, own in stated_licences(evidence).items()},
            inherited=inherited_licence(evidence),
            snippet=shown.pop(STUDENT),
            forms=shown,
            command=fence(evidence.command, "bash"),
            given=fence(releasable_recipe(evidence.recipe, defaults=False), "yaml"),
            recipe=fence(evidence.recipe_text, "yaml"),
        )
    )


def context_of(evidence: Evidence) -> dict[str, Any]:
    """Collect what card and report both show, by its name in their templates."""
    return {
        "evidence": evidence,
        "summary": summarize(evidence),
        "verdicts": [*judge(evidence), *judge_sets(evidence)],
        "tables": tables(evidence),
        "origin": describe_origin(evidence),
        "class_count": len(get_in(evidence.evaluation, "per_class", "classes", "distilled") or ()),
        "elsewhere": {
            name: {"table": arms_table(own), "trained_on": own.trained_on} for name, own in evidence.elsewhere.items()
        },
        "budgets": budget_lines(evidence),
        "seeds": seeds_table(evidence),
        "seeds_title": seeds_title(evidence),
        "caveats": caveats(evidence),
    }


@cache
def make_environment(finalize: Callable[[Any], Any] | None = None) -> Environment:
    """Make the environment of our templates; `finalize` is done to every value that they print."""
    return Environment(
        loader=PackageLoader("distill.release"),
        autoescape=True,
        finalize=finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def inline(value: Any) -> Markup:
    """Escape text as Markdown that renders as that text, on one line; Markup is already Markdown."""
    if isinstance(value, Markup):
        return value
    text = re.sub(r"([\\`*\[\]|~$#]|(?<!\w)_|_(?!\w))", r"\\\1", one_line(value))
    return Markup(text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))  # noqa: S704


def fence(text: str, language: str) -> Markup:
    """Write a code block that its content cannot close."""
    marks = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return Markup(f"{marks}{language}\n{text.rstrip()}\n{marks}")  # noqa: S704


def with_output(code: str, printed: str | None) -> Markup:
    """Write an example and below it what it printed before the release; None: it was not run."""
    example = fence(code, "python")
    if printed is None:
        return example + "\n\nThese lines were not run before the release."
    lines = [inline(line) for line in printed.strip()[:MOST_PRINTED].splitlines()]
    cut = f", of which these are the first {MOST_PRINTED} characters" * (len(printed.strip()) > MOST_PRINTED)
    # No block of code: tags would stand in it as they are.
    return Markup("{}\n\nIt prints{}:\n\n> {}").format(
        example, cut, Markup("  \n> ").join(lines or ["an empty line" if printed else "nothing"])
    )


def metadata(evidence: Evidence) -> ModelCardData:
    """Collect the YAML head of the card. Built offline: `ModelCard.validate` would ask the hub."""
    release, model = evidence.recipe.release, str(evidence.teacher["model"])
    on_hub = HUB_ID.fullmatch(model) is not None
    task, _ = USES.get(evidence.auto_class, (None, ""))
    results = eval_results(evidence, task or evidence.recipe.data.task)
    licence = {"license": release.license} if release.license else inherited_licence(evidence) or {}
    return ModelCardData(
        base_model=model if on_hub else None,
        base_model_relation="finetune" if on_hub else None,
        library_name="sentence-transformers" if evidence.auto_class == VECTORS else "transformers",
        pipeline_tag=task,
        license=licence.get("license"),
        license_name=licence.get("license_name"),
        license_link=licence.get("license_link"),
        language=release.language,
        tags=["distillation", "pruning", "distill"],
        metrics=[result.metric_type for result in results] or None,
        model_name=evidence.recipe.name if results else None,
        eval_results=results or None,
    )


def stated_licences(evidence: Evidence) -> dict[str, dict[str, str]]:
    """Licences that the cards of the models state which the student was made from, by model."""
    return dict(evidence.evaluation.get("licences") or {})


def inherited_licence(evidence: Evidence) -> dict[str, str] | None:
    """Return the licence of all models whose cards state one, where it is the same; None: there is none, or several."""
    first, *others = stated_licences(evidence).values() or [None]
    return first and ({key: one_line(text) for key, text in first.items()} if all(o == first for o in others) else None)


def name_of(licence: Mapping[str, str]) -> str:
    """Name a licence, also one that is `other`."""
    return licence.get("license_name") or licence["license"]


def eval_results(evidence: Evidence, task: str) -> list[EvalResult]:
    """Collect the distilled student's own metrics for the hub; agreement with the teacher is no result on the data."""
    data = evidence.evaluation["data"]
    names = [name for name in evidence.metric_names if name not in TEACHER_METRICS]
    values = {name: evidence.score("distilled", name) for name in names}
    return [
        EvalResult(
            task_type=one_line(task),
            dataset_type=one_line(evidence.measured_on),
            dataset_name=one_line(evidence.measured_on),
            dataset_split=one_line(data["split"]),
            dataset_args={"examples": data["examples"], "fingerprint": one_line(data["fingerprint"])},
            metric_type=one_line(name),
            metric_value=round(value, 6),
        )
        for name, value in values.items()
        if value is not None
    ]


def describe_cuts(evidence: Evidence) -> str:
    """Say how many texts were longer than an example may be."""
    length, splits = evidence.recipe.data.max_length, evidence.evaluation["data"].get("summary") or {}
    counts = [
        f"{own['truncated']:,} of the {name} split ({format_percent(own['truncated_share'])})"
        for name, own in splits.items()
    ]
    if not any(own["truncated"] for own in splits.values()):
        return f"Examples have up to {length} tokens; " + ("no text was cut." if splits else "longer texts were cut.")
    return f"Texts longer than {length} tokens were cut: {', '.join(counts)}."


def describe_precision(evidence: Evidence) -> str:
    """Say what the models computed in, and what that changes in the figures of what is released; empty: not known."""
    found = evidence.evaluation.get("precision")
    if not found:
        return ""
    teacher, students, released = (found[name] for name in ("teacher", "students", "released"))
    text = f"The models computed in {students}" + (f", the teacher in {teacher}." if teacher != students else ".")
    name = evidence.primary if evidence.primary in (released or {}).get("metrics", {}) else None
    values = [as_number(get_in(released, title, name)) for title in ("metrics", "as_evaluated")] if name else [None]
    if None in values:
        return text
    own, evaluated = (format_metric(str(name), value) for value in values if value is not None)
    return (
        f"{text} On the first {released['examples']} examples the released weights give {name} {own} in "
        f"{released['dtype']}, and {evaluated} as computed here."
    )


def describe_intervals(evidence: Evidence) -> str:
    """Say how the intervals were made, and which figures have none; empty where there are none at all."""
    drawn = evidence.evaluation.get("drawn")
    if not drawn:
        return ""
    missing: dict[str, list[str]] = {}
    for arm in evidence.arms:
        for metric in evidence.metric_names:
            own = evidence.interval(arm, metric)
            if own and own.get("low") is None:
                missing.setdefault(str(own.get("note")), []).append(f"{metric} of {arm}")
    without = "".join(f" Without one: {', '.join(names)} ({note})." for note, names in missing.items())
    return (
        f"In square brackets: intervals of {drawn['level']:.0%}, from drawing the {drawn['number']:,} {drawn['unit']} "
        f"anew, the same ones for every arm; other seeds of the training are not in them.{without}"
    )


def caveats(evidence: Evidence) -> list[str]:
    """List the limits of the figures."""
    data = evidence.evaluation["data"]
    unit = data.get("unit", "examples")
    seeds = get_in(evidence.evaluation, "seeds", "seeds")
    tried = f"{len(seeds)} seeds after one teacher; other texts" if seeds else "one seed; other texts and seeds"
    notes = [
        f"Measured on {data['examples']} {unit} of the {data['split']} split of {evidence.measured_on} with {tried} "
        "were not tried.",
        describe_cuts(evidence),
        "The student inherits the biases and mistakes of its teacher, and cutting can add its own.",
    ]
    if said := describe_precision(evidence):
        notes.insert(1, said)
    if said := describe_intervals(evidence):
        notes.insert(1, said)
    if all(own.trained_on for own in evidence.elsewhere.values()):
        notes.append(
            "What is kept of the teacher on texts of other kinds was not measured (`evaluation.sets` in the recipe)."
        )
    if evidence.teacher.get("fitted"):
        notes.append(
            "The teacher was fitted on this recipe's own labels first: shares of the teacher's score refer to that "
            "fitted teacher, not to a published one."
        )
    if (cache := evidence.recipe.teacher.cache) is not None and cache.keep == "topk":
        notes.append(
            f"Of the teacher's predictions the student saw the {cache.k} most likely tokens and the probability of "
            "all others together."
        )
    if evidence.teachers:
        notes.append(
            f"{len(evidence.teachers)} teachers taught: agreement and KL are against their mixture, as it taught each "
            f"example; shares in brackets, and losses on layers, refer to the first one alone."
        )
    if str(evidence.teacher["model"]).endswith(GGUF):
        notes.append(
            "The teacher was a quantised GGUF file: what was cut and taught are its dequantised weights, and shares of "
            "the teacher's score refer to those, not to the model that was quantised."
        )
    if evidence.pattern_note:
        notes.append(evidence.pattern_note)
    if evidence.evaluation.get("efficiency"):
        notes.append("Speed is that of the machine named here; only sizes and FLOPs carry over to others.")
    return notes
