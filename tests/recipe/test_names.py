"""What a recipe lists without importing anything is what the tables of functions hold."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, get_args

import pytest

from distill.data.builtin import SOURCES
from distill.data.tasks import TASKS
from distill.evaluation.metrics import METRICS
from distill.losses import ATTENTION, HIDDEN, LOGITS, RELATION
from distill.models.layout import LAYOUTS
from distill.recipe import names
from distill.recipe.datafiles import ENDINGS, READERS
from distill.recipe.locate import TeacherSize
from distill.recipe.rules import KEEP_FIRST, first_layer_is_kept
from distill.recipe.schema import Layers, Optimization, json_schema
from distill.recipe.terms import TERM_KEYS
from distill.student.allocate import ALLOCATIONS
from distill.student.layers import LAYER_POLICIES
from distill.student.masks.masks import MASK_SCORES
from distill.student.scores import SCORES
from distill.training.optim import OPTIMIZERS, SCHEDULES

Table = Mapping[str, Callable[..., Any]]
LITERALS: list[tuple[Any, Table]] = [
    (names.LayerPolicy, LAYER_POLICIES),
    (names.Score, SCORES),
    (names.MaskScore, MASK_SCORES),
    (names.Allocation, ALLOCATIONS),
    (names.Optimizer, OPTIMIZERS),
    (names.BuiltInSource, SOURCES),
    (names.TaskName, TASKS),
    (names.Metric, METRICS),
    (names.LogitLoss, LOGITS),
    (names.HiddenLoss, HIDDEN),
    (names.AttentionLoss, ATTENTION),
    (names.RelationLoss, RELATION),
    (Optimization.model_fields["schedule"].annotation, SCHEDULES),
]


@pytest.mark.parametrize(("literal", "table"), LITERALS, ids=[",".join(table)[:40] for _, table in LITERALS])
def test_a_literal_lists_its_table(literal: Any, table: Table) -> None:
    assert get_args(literal) == tuple(table)


PARAMS: list[tuple[str, Table, set[str]]] = [
    ("layer policy", LAYER_POLICIES, {"protected"}),
    ("score", SCORES, set()),
    ("mask score", MASK_SCORES, set()),
    ("allocation", ALLOCATIONS, set()),
    ("optimizer", OPTIMIZERS, {"lr", "betas"}),
    ("loss", {**ATTENTION, **HIDDEN, **LOGITS, **RELATION}, {"temperature"}),
]
"""Kind, table, and the parameters that are keys of their own in a recipe."""


@pytest.mark.parametrize(("kind", "table", "reserved"), PARAMS, ids=[kind for kind, _, _ in PARAMS])
def test_parameters_and_their_types_are_those_of_the_functions(kind: str, table: Table, reserved: set[str]) -> None:
    found = {}
    for name, function in table.items():
        own = {
            p.name: p.annotation for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY
        }
        found |= {name: {param: kind for param, kind in own.items() if param not in reserved}}
    assert names.PARAMS[kind] == {name: own for name, own in found.items() if own}


def test_every_kind_of_parameters_is_compared_with_functions() -> None:
    assert names.PARAMS.keys() == {kind for kind, _, _ in PARAMS}


def test_every_kind_of_data_file_has_a_reader() -> None:
    assert {*READERS, ".parquet"} == set(ENDINGS)


def test_policies_that_know_protected_layers_take_them() -> None:
    assert set(names.PROTECTING) == {
        name for name, policy in LAYER_POLICIES.items() if "protected" in inspect.signature(policy).parameters
    }


def test_families_that_need_their_first_layer_are_those_whose_layout_says_so() -> None:
    assert set(KEEP_FIRST) == {name for name, layout in LAYOUTS.items() if layout.main.keep_first}
    assert not any(layout.encoder and layout.encoder.keep_first for layout in LAYOUTS.values())


@pytest.mark.parametrize("choose", sorted(set(LAYER_POLICIES) - set(names.PROTECTING)))
def test_a_policy_that_drops_a_first_layer_that_must_stay_is_known_to(choose: str) -> None:
    for layers in range(1, 13):
        for keep in range(1, layers + 1):
            if choose != "every" or layers % keep == 0:
                size = TeacherSize(layers=layers, family=KEEP_FIRST[0])
                refused = any(first_layer_is_kept(Layers(keep=keep, choose=choose), size))
                assert refused == (LAYER_POLICIES[choose](layers, keep, None)[0] != 0), (layers, keep)


def test_tasks_read_the_columns_that_a_recipe_may_name() -> None:
    assert {name: {*task().columns} for name, task in TASKS.items()} == {
        name: set(columns) for name, columns in names.TASK_COLUMNS.items()
    }


def test_tasks_measure_what_they_say() -> None:
    assert {name: task().metrics for name, task in TASKS.items()} == names.TASK_METRICS
    measured = [*names.TASK_METRICS.values(), *names.OTHER_METRICS.values(), names.TEACHER_METRICS]
    assert {metric for own in measured for metric in own} == set(METRICS)


def test_each_match_has_the_losses_of_its_table() -> None:
    tables = {"logits": LOGITS, "hidden": HIDDEN, "embeddings": HIDDEN, "output": HIDDEN}
    tables |= {"attention": ATTENTION, "relations": RELATION}
    assert {match: row.losses for match, row in TERM_KEYS.items() if row.losses} == {
        match: tuple(table) for match, table in tables.items()
    }


def test_an_editor_can_complete_every_built_in_name() -> None:
    def strings(node: Any) -> set[str]:
        if isinstance(node, dict):
            return {node["const"]} if "const" in node else set().union(*map(strings, node.values()))
        return (
            set().union(*map(strings, node)) if isinstance(node, list) else {node} if isinstance(node, str) else set()
        )

    offered = {name for definition in json_schema()["$defs"].values() for name in strings(definition["properties"])}
    assert {name for literal, _ in LITERALS for name in get_args(literal)} <= offered
