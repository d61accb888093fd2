"""Figures in the hub's own format are written for what the hub knows, and for nothing else."""

from __future__ import annotations

from dataclasses import replace

from huggingface_hub import parse_eval_result_entries
from ruamel.yaml import YAML

from distill.recipe.schema import Source
from distill.release.hub_results import result_files


def measured_on(evidence, *sources):
    data = evidence.recipe.data.model_copy(update={"test": list(sources)})
    return replace(evidence, recipe=evidence.recipe.model_copy(update={"data": data}))


def test_a_figure_on_a_hub_dataset_is_read_back_by_the_hubs_own_library(evidence):
    source = Source(source="hub:org/reviews", config="small", revision="a" * 40)
    (path, text), *others = result_files(measured_on(evidence, source)).items()
    (entry,) = parse_eval_result_entries(YAML(typ="safe").load(text))
    assert path == ".eval_results/reviews.yaml" and not others
    assert (entry.dataset_id, entry.task_id, entry.dataset_revision) == ("org/reviews", "small", "a" * 40)
    assert entry.value == round(evidence.score("distilled"), 6)
    assert entry.notes == "accuracy on 612 examples of the test split; see evaluation.json"
    held_out = evidence.recipe.data.model_copy(update={"test": [], "source": source.source})
    (text,) = result_files(replace(evidence, recipe=evidence.recipe.model_copy(update={"data": held_out}))).values()
    assert "of the train split" in text  # no test split of the dataset was looked at


def test_files_built_in_corpora_and_several_sources_have_no_name_on_the_hub(evidence):
    assert result_files(evidence) == {}
    assert result_files(measured_on(evidence, Source(source="pydoc-topics"))) == {}
    both = [Source(source="hub:org/a"), Source(source="hub:org/b")]
    assert result_files(measured_on(evidence, *both)) == {}
