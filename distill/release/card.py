"""The model card: README.md of a release, and the tables that the report shows too."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from distill.release.evidence import (
    MISSING,
    Evidence,
    dig,
    findings,
    finite,
    measured,
    megabytes,
    number,
    percent,
    plain,
    quantity,
    standard_error,
    summary,
    times,
)

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
DEFAULTS = {"labels": "the task's own", "logits": "forward_kl", "attention": "kl", "relations": "qkv"}
ARMS = {
    "teacher": "teacher",
    "cut": "cut (student before training)",
    "repaired": "repaired (cut student after repair, before training)",
    "distilled": "distilled (this model)",
    "labels_only": "labels_only (same student, no teacher)",
}
USES = {
    "AutoModelForSequenceClassification": (
        "text-classification",
        "label = model.config.id2label[model(**inputs).logits.argmax(-1).item()]",
    ),
    "AutoModelForTokenClassification": (
        "token-classification",
        "labels = [model.config.id2label[i] for i in model(**inputs).logits.argmax(-1)[0].tolist()]",
    ),
    "AutoModelForCausalLM": (
        "text-generation",
        "text = tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0], skip_special_tokens=True)",
    ),
    "AutoModelForMaskedLM": ("fill-mask", "logits = model(**inputs).logits"),
    "AutoModelForSeq2SeqLM": (
        "text2text-generation",
        "text = tokenizer.decode(model.generate(**inputs)[0], skip_special_tokens=True)",
    ),
    "AutoModelForQuestionAnswering": ("question-answering", "output = model(**inputs)"),
    "AutoModel": ("feature-extraction", "vectors = model(**inputs).last_hidden_state"),
}
"""Class of transformers -> hub task and the line that uses the model."""
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
"""What a release asks of whoever loads it."""


@dataclass(frozen=True)
class Table:
    """Rows of finished text."""

    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    text_columns: int = 1
    """The first columns hold text, the others numbers."""


def render_card(evidence: Evidence) -> str:
    """README.md of a release: metadata for the hub, then what was done, measured and left unknown."""
    # Every value printed by the template passes `inline` first: a name cannot open a tag, a table cell or a heading.
    environment = Environment(
        loader=PackageLoader("distill.release"),
        autoescape=True,
        finalize=inline,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("card.md.jinja").render(
        evidence=evidence,
        metadata=Markup(metadata(evidence).to_yaml(line_break="\n")),  # noqa: S704 (YAML quotes its own values)
        summary=summary(evidence),
        findings=findings(evidence),
        tables=tables(evidence),
        caveats=caveats(evidence),
        loading=Markup(LOADING[evidence.form]),  # noqa: S704 (our own text)
        snippet=fence(snippet(evidence), "python"),
        command=fence(evidence.command, "bash"),
        recipe=fence(evidence.recipe_text, "yaml"),
    )


def inline(value: Any) -> Markup:
    """Text as Markdown that renders as that text, on one line; Markup is already Markdown."""
    if isinstance(value, Markup):
        return value
    text = re.sub(r"([\\`*\[\]|~$#]|(?<!\w)_|_(?!\w))", r"\\\1", plain(value))
    return Markup(text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))  # noqa: S704


def fence(text: str, language: str) -> Markup:
    """A code block that its content cannot close."""
    marks = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return Markup(f"{marks}{language}\n{text.rstrip()}\n{marks}")  # noqa: S704


def snippet(evidence: Evidence) -> str:
    """Python that loads and uses the student with stock transformers, and the release's own code where it has some."""
    name = plain(evidence.auto_class)
    _, use = USES.get(name, ("", "output = model(**inputs)"))
    code = ", trust_remote_code=True" if evidence.form == "native" else ""
    text = "Paris is the [MASK] of France." if name == "AutoModelForMaskedLM" else "Some text."
    return f"""from transformers import {name}, AutoTokenizer

folder = "{evidence.recipe.name}"  # this folder, or its id on the hub
tokenizer = AutoTokenizer.from_pretrained(folder)
model = {name}.from_pretrained(folder{code})
inputs = tokenizer("{text}", return_tensors="pt")
{use}"""


def metadata(evidence: Evidence) -> ModelCardData:
    """The YAML head of the card. Built offline: `ModelCard.validate` would ask the hub."""
    release, model = evidence.recipe.release, str(evidence.teacher["model"])
    on_hub = HUB_ID.fullmatch(model) is not None
    task, _ = USES.get(evidence.auto_class, (None, ""))
    results = eval_results(evidence, task or evidence.recipe.data.task)
    return ModelCardData(
        base_model=model if on_hub else None,
        base_model_relation="finetune" if on_hub else None,
        library_name="transformers",
        pipeline_tag=task,
        license=release.license,
        language=release.language,
        tags=["distillation", "pruning", "distill"],
        metrics=[result.metric_type for result in results] or None,
        model_name=evidence.recipe.name if results else None,
        eval_results=results or None,
    )


def eval_results(evidence: Evidence, task: str) -> list[EvalResult]:
    """The distilled student's own metrics; agreement with the teacher is no result on the data and stays out."""
    data = evidence.evaluation["data"]
    values = {name: evidence.score("distilled", name) for name in evidence.evaluation["metrics"]}
    return [
        EvalResult(
            task_type=plain(task),
            dataset_type=plain(data["source"]),
            dataset_name=plain(data["source"]),
            dataset_split=plain(data["split"]),
            dataset_args={"examples": data["examples"], "fingerprint": plain(data["fingerprint"])},
            metric_type=plain(name),
            metric_value=round(value, 6),
        )
        for name, value in values.items()
        if value is not None
    ]


def caveats(evidence: Evidence) -> list[str]:
    """What the figures do not say."""
    data, score = evidence.evaluation["data"], evidence.score("distilled")
    error = None if score is None else standard_error(evidence, score)
    notes = [
        f"Measured on {data['examples']} examples of the {data['split']} split of {data['source']} with one seed; "
        "other texts and seeds were not tried.",
        f"Texts longer than {evidence.recipe.data.max_length} tokens were cut or split.",
        "The student inherits the biases and mistakes of its teacher, and cutting can add its own.",
    ]
    if error is not None:
        notes.insert(1, f"One standard error of its {evidence.primary} is {100 * error:.1f} points.")
    if evidence.teacher.get("fitted"):
        notes.append(
            "The teacher was fitted on this recipe's own labels first: shares of the teacher's score refer to that "
            "fitted teacher, not to a published one."
        )
    if evidence.evaluation.get("efficiency"):
        notes.append("Speed is that of the machine named here; only sizes and FLOPs carry over to others.")
    return notes


def tables(evidence: Evidence) -> dict[str, Table]:
    """Every table of the card and of the report, by name."""
    plan = evidence.plan
    choices = [(key, choice.asked, choice.got, choice.reason or MISSING) for key, choice in plan.choices.items()]
    layers = [
        (
            str(i),
            str(layer.teacher_layer),
            f"{layer.teacher_width} → {layer.width}",
            percent(layer.width / layer.teacher_width),
        )
        for i, layer in enumerate(plan.layers)
    ]
    return {
        "arms": arms_table(evidence),
        "choices": Table(("what", "asked", "got", "why they differ"), choices, text_columns=4),
        "layers": Table(("student layer", "from teacher layer", "MLP width", "neurons kept"), layers, text_columns=0),
        "repair": repair_table(evidence),
        "losses": losses_table(evidence),
        "training": Table(("setting", "value"), training_rows(evidence), text_columns=2),
        "efficiency": efficiency_table(evidence),
        "versions": Table(("", "version"), [(key, str(value)) for key, value in evidence.environment.items()], 2),
    }


def arms_table(evidence: Evidence) -> Table:
    """All arms and all metrics; in brackets what an arm retains of the teacher's value."""
    names = evidence.metric_names
    arrows = {True: " ↑", False: " ↓"}
    titles = [name + arrows.get(evidence.evaluation["higher_is_better"].get(name), "") for name in names]
    rows = []
    for arm, record in evidence.arms.items():
        cells = []
        for name in names:
            retained = evidence.retained(arm, name)
            share = "" if retained is None else f" ({percent(retained)})"
            cells.append(measured(name, record["metrics"].get(name)) + share)
        rows.append((ARMS.get(arm, arm), str(record.get("steps") or MISSING), *cells))
    return Table(("arm", "steps", *titles), rows)


def repair_table(evidence: Evidence) -> Table:
    """What each step of the repair was worth, on the calibration sample and on held-out training examples."""
    steps = (evidence.repair or {}).get("steps", [])
    rows = []
    for before, step in zip([None, *steps], steps, strict=False):
        cells = []
        for name in ("kl", "loss"):
            old, new = finite(dig(before, "held_out", name)), finite(dig(step, "held_out", name))
            gained = "" if old is None or new is None else f" ({old - new:+.3g} gained)"
            cells.append(number(new) + gained)
        notes = ", ".join(step["notes"]) or MISSING
        rows.append((str(step["name"]), notes, percent(step.get("error_left")), *cells))
    return Table(("step", "not done", "calibration error left", "held-out KL", "held-out loss"), rows, text_columns=2)


def losses_table(evidence: Evidence) -> Table:
    """The terms of the training loss."""
    rows = []
    for term in evidence.recipe.losses:
        default = DEFAULTS.get(term.match, "mse")
        details = [f"temperature {number(term.temperature)}"] if term.match == "logits" else []
        details += [f"map {term.map}"] if term.match in ("hidden", "attention", "relations") else []
        details += [f"{key} {value}" for key, value in term.params.items()]
        rows.append((term.match, term.loss or default, ", ".join(details) or MISSING, number(term.weight)))
    return Table(("match", "loss", "settings", "weight"), rows, text_columns=3)


def training_rows(evidence: Evidence) -> list[tuple[str, ...]]:
    """How long, how fast and on what the student learned."""
    training, data, teacher = evidence.recipe.training, evidence.evaluation["data"], evidence.teacher
    fitted = ", fitted on this data first" if teacher.get("fitted") else ""
    rows = {
        "teacher": f"{teacher['model']} ({teacher['model_type']}{fitted})",
        "teacher revision": teacher.get("revision"),
        "teacher sha256": teacher.get("sha256"),
        "steps": dig(evidence.arms, "distilled", "steps") or training.steps,
        "batch size": training.batch_size,
        "learning rate": f"{number(training.lr)}, {training.schedule}, warmup {number(training.warmup)}",
        "weight decay": number(training.weight_decay),
        "precision": training.precision,
        **mask_rows(evidence),
        "seed": evidence.recipe.seed,
        "data": f"{data['source']}, fingerprint {data['fingerprint']}",
        "training examples": f"{data['train_examples']}, labelled: {data.get('labelled', 'all')}",
        "test examples": data["examples"],
    }
    return [(key, str(value)) for key, value in rows.items() if value is not None]


def mask_rows(evidence: Evidence) -> dict[str, str]:
    """What was masked, and the zeros and widths that the student has; empty without a mask."""
    spec, found = evidence.recipe.student.mask, evidence.evaluation.get("sparsity")
    if spec is None or not found:
        return {}
    amount = f"below {number(spec.threshold)} x the mean" if spec.sparsity is None else percent(spec.sparsity)
    cubic = f" from {percent(spec.begin)} to {percent(spec.end)} of the steps" if spec.schedule == "cubic" else ""
    rows = {
        "mask": f"{amount} of each MLP, per {spec.per} by {spec.score}, {spec.schedule}{cubic}",
        "zeros in the MLPs": percent(found["zeros"]),
    }
    return rows | ({"MLP widths, compacted": ", ".join(map(str, found["widths"]))} if spec.compact else {})


def efficiency_table(evidence: Evidence) -> Table:
    """Size and speed of every measured model; empty when nothing was measured."""
    efficiency = evidence.evaluation.get("efficiency") or {}
    models, ratios = list(efficiency.get("models", {})), list(efficiency.get("ratios", {}))
    rows = [
        (
            label,
            *(write(evidence.efficiency(model, *path)) for model in models),
            *(times(evidence.ratio(key, model)) for model in ratios),
        )
        for label, path, key, write in (
            ("parameters", ("parameters",), "parameters", quantity),
            ("parameters in layers", ("layer_parameters",), "layer_parameters", quantity),
            ("weights", ("bytes",), "bytes", megabytes),
            ("on disk", ("disk_bytes",), "disk_bytes", megabytes),
            ("FLOPs per example", ("flops_per_example",), "flops", lambda value: quantity(value, "kMGT")),
            ("latency p50, ms", ("latency_ms", "p50"), "latency", number),
            ("latency p95, ms", ("latency_ms", "p95"), "", number),
            ("throughput, examples/s", ("throughput",), "throughput", number),
        )
    ]
    return Table(("", *models, *(f"{model} ÷ teacher" for model in ratios)), rows if models else [])
