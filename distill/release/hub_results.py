"""The figures of a release in the hub's own format, `.eval_results/*.yaml`: for datasets that have a name there."""

from __future__ import annotations

from io import StringIO

from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
from ruamel.yaml import YAML

from distill.release.evidence import Evidence

PREFIX = "hub:"


def result_files(evidence: Evidence) -> dict[str, str]:
    """Write the primary figure of the student as path -> YAML.

    The hub knows datasets by their id there. Figures on files and built-in corpora are in the card alone, and so are
    those on several sources at once.
    """
    data, score = evidence.recipe.data, evidence.score("distilled")
    split = "test" if data.origins("test") else "train"  # of which a part was held out
    sources = data.origins(split)
    if len(sources) != 1 or not sources[0].source.startswith(PREFIX) or score is None:
        return {}
    source, count = sources[0], evidence.evaluation["data"]["examples"]
    entry = EvalResultEntry(
        dataset_id=source.source.removeprefix(PREFIX),
        task_id=source.config or "default",
        value=round(score, 6),
        dataset_revision=source.revision,
        notes=f"{evidence.primary} on {count} examples of the {source.split or split} split; see evaluation.json",
    )
    stream, yaml = StringIO(), YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.dump(eval_result_entries_to_yaml([entry]), stream)
    return {f".eval_results/{source.source.rpartition('/')[2]}.yaml": stream.getvalue()}
