"""Reading a recipe: strictness, overrides, messages, and the way back to YAML."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from bad_recipes import GOOD, SYNTAX, UNKNOWN_KEYS, WHOLE_FILES, WRONG_VALUES, Bad, says
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from distill.errors import InputError, Problem, RecipeError
from distill.recipe import Recipe, load_recipe
from distill.recipe.load import dump, fingerprint, read_released
from distill.recipe.yaml import MAX_DEPTH, read_text

Write = Callable[..., Path]


def problems(path: Path, *overrides: str) -> list[Problem]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return caught.value.problems


def recipe_data(**changes: Any) -> dict[str, Any]:
    data = read_text(GOOD, "good").data
    return {**data, **changes}


def test_a_good_recipe_loads(write: Write) -> None:
    recipe = load_recipe(write())
    assert (recipe.training.lr, recipe.student.layers.keep, recipe.losses[1].params) == (3e-4, 3, {"beta": 0.5})


@pytest.mark.parametrize("case", UNKNOWN_KEYS + WRONG_VALUES + SYNTAX, ids=lambda case: f"{case.key} {case.words}"[:70])
def test_a_mistake_is_named_with_its_place(case: Bad, write: Write) -> None:
    path = write(case.text)
    (problem,) = problems(path)
    assert problem.where.startswith(f"{path}:{case.line}:")
    assert problem.key == case.key
    assert says(f"{problem.message} {problem.fix}", case.words), str(problem)


@pytest.mark.parametrize(
    ("content", "line", "words"), [case[1:] for case in WHOLE_FILES], ids=[c[0] for c in WHOLE_FILES]
)
def test_a_file_that_is_no_recipe_is_refused(content: bytes, line: int, words: str, folder: Path) -> None:
    path = folder / "recipe.yaml"
    path.write_bytes(content)
    (problem,) = problems(path)
    assert problem.where.startswith(f"{path}:{line}:")
    assert words in problem.message


@pytest.mark.parametrize("name", ["missing.yaml", "."])
def test_a_file_that_cannot_be_read_is_an_input_error(name: str, folder: Path) -> None:
    with pytest.raises(InputError, match="cannot read the recipe"):
        load_recipe(folder / name)


def test_three_mistakes_give_one_message(write: Write) -> None:
    text = GOOD.replace("  labelled:", "  labeled:").replace("size: 32", "size: many").replace("keep: 3,", "keep: 9,")
    path = write(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    message = str(caught.value)
    assert says(message, f"3 problems {path}:7:18: student.layers.keep: keeps 9 layers, the teacher has 6 1 to 6")
    assert says(message, f"{path}:12:3: data.labeled: unknown key fix: did you mean 'labelled'?")
    assert says(message, f"{path}:19:15: training.batch_size: expected a whole number, got the text many")
    assert [problem.key for problem in caught.value.problems] == sorted(
        ["student.layers.keep", "data.labeled", "training.batch_size"],
        key=lambda key: message.index(f": {key}: "),
    )


def test_the_keys_inside_of_a_misspelt_section_are_checked(write: Write) -> None:
    found = problems(write(GOOD.replace("training:", "trainin:").replace("size: 32", "sise: 32").replace("3e-4", "0")))
    assert [problem.key for problem in found] == ["trainin", "training.batch_sise", "training.lr"]


def test_missing_sections_are_all_named(write: Write) -> None:
    found = problems(write("name: tiny\n"))
    assert {problem.key for problem in found} == {"teacher", "student", "data", "losses", "training"}


def test_places_count_characters_from_one(write: Write) -> None:
    path = write("\ufeff" + GOOD.replace("name: tiny", "name: é é").replace("\n", "\r\n"))
    assert [problem.where for problem in problems(path)] == [f"{path}:1:7"]


@pytest.mark.parametrize("value", ["1e-4", "'1e-4'", ".0001", "1.0E-4", "0.0001"])
def test_numbers_are_read_however_they_are_written(value: str, write: Write) -> None:
    assert load_recipe(write(GOOD.replace("3e-4", value))).training.lr == 1e-4


@pytest.mark.parametrize("value", ["yes", "no", "on", "2026-01-01", "1_000", "12:30:00"])
def test_yaml_1_1_words_stay_text(value: str, write: Write) -> None:
    assert load_recipe(write(GOOD.replace("apache-2.0", value))).release.license == value


class TestOverrides:
    def test_values_are_set_along_dotted_paths(self, write: Write) -> None:
        changes = ["losses.0.weight=0.5", "training.lr=1e-3", "student.layers.keep=[0, 5]", "data.labelled=", "seed=7"]
        recipe = load_recipe(write(), changes)
        assert recipe.losses[0].weight == 0.5
        assert (recipe.training.lr, recipe.student.layers.keep, recipe.data.labelled) == (1e-3, [0, 5], None)

    def test_sections_are_made_on_the_way(self, write: Write) -> None:
        recipe = load_recipe(write(GOOD.replace("  fit: {epochs: 2, lr: 2e-4}\n", "")), ["teacher.fit.steps=3"])
        assert recipe.teacher.fit is not None
        assert recipe.teacher.fit.steps == 3

    def test_the_last_of_two_holds(self, write: Write) -> None:
        assert load_recipe(write(), ["seed=1", "seed=2"]).seed == 2

    @pytest.mark.parametrize(
        ("override", "key", "words"),
        [
            ("training.lr=abc", "training.lr", "expected a number"),
            ("training.lr", "training.lr", "expected key.path=value"),
            ("=3", "", "expected key.path=value"),
            ("training..lr=3", "training..lr", "expected key.path=value"),
            ("training.rl=3", "training.rl", "unknown key"),
            ("trainin.warmup=3", "trainin", "unknown key did you mean 'training'"),
            ("losses.9.weight=1", "losses.9.weight", "'9' is not an item of losses 0 to 2"),
            ("losses.first.weight=1", "losses.first.weight", "'first' is not an item"),
            ("seed.x=1", "seed.x", "seed is a value"),
            ("seed=[1", "seed", "not valid YAML"),
            ("seed=&a 1", "seed", "the anchor &a"),
            ("student.mlp.params={a: 1, a: 2}", "student.mlp.params", "given twice"),
            ("data.source=a: b", "data.source", "must be a plain value"),
            ("training.steps=5", "training.steps", "both given or set it to null"),
            ("student.layers={keep: 9}", "student.layers.keep", "the teacher has 6"),
            ("student.layers=null", "student.layers", "missing, and from is not given either"),
        ],
    )
    def test_a_wrong_one_is_named(self, override: str, key: str, words: str, write: Write) -> None:
        (problem,) = problems(write(), override)
        assert (problem.where, problem.key) == (f"override {override!r}", key)
        assert says(f"{problem.message} {problem.fix}", words), str(problem)

    def test_problems_of_overrides_follow_those_of_the_file(self, write: Write) -> None:
        found = problems(write(GOOD.replace("batch_size: 32", "batch_size: 0")), "seed=x", "name=.")
        assert [problem.key for problem in found] == ["training.batch_size", "seed", "name"]

    def test_a_key_of_the_file_can_be_unset(self, write: Write) -> None:
        assert load_recipe(write(), ["training.epochs=null", "training.steps=5"]).training.steps == 5


TEXT = st.text(st.characters(blacklist_categories=["Cs", "Cc"]), min_size=1)
PARAMS = st.dictionaries(
    TEXT,
    st.one_of(TEXT, st.booleans(), st.integers(-(2**70), 2**70), st.floats(allow_nan=False, allow_infinity=False)),
)
TRICKY = st.sampled_from(
    ["1e-4", "0x1F", "0o7", "yes", "null", "~", "- a", "a: b", "# x", "2026-01-01", "<<", "*a", "1_0"]
)


@given(text=st.one_of(TEXT, TRICKY), params=PARAMS, lr=st.floats(1e-300, 1e300), keep=st.floats(0.05, 1))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_written_recipe_loads_back_equal(
    text: str, params: dict[str, Any], lr: float, keep: float, write: Write
) -> None:
    recipe = Recipe.model_validate(
        recipe_data(
            student={"layers": {"keep": [0, 2]}, "mlp": {"keep": keep, "score": "mine:f", "params": params}},
            training={"steps": 3, "lr": lr},
            release={"license": text},
        )
    )
    again = load_recipe(write(dump(recipe)))
    assert again == recipe
    assert dump(again) == dump(recipe)
    assert load_recipe(write(dump(recipe, defaults=False))) == recipe


def test_a_written_recipe_gives_every_key(write: Write) -> None:
    written = read_text(dump(load_recipe(write())), "dump").data
    assert list(written) == list(Recipe.fields_by_key())
    assert written["training"]["schedule"] == "cosine"
    assert written["training"]["steps"] is None


def test_fingerprints_do_not_depend_on_the_order_of_keys(write: Write) -> None:
    recipe = load_recipe(write())
    data = json.loads(recipe.training.model_dump_json())
    assert fingerprint(recipe.training) == fingerprint(dict(reversed(data.items())))
    assert fingerprint([recipe.data, recipe.training]) != fingerprint([recipe.training, recipe.data])
    assert fingerprint({"seed": 0}) != fingerprint({"seed": 1})


def test_loading_needs_no_torch_and_warns_of_nothing(write: Write) -> None:
    code = f"""
import sys
from distill.recipe.load import load_recipe
load_recipe({str(write())!r})
heavy = {{"torch", "transformers", "huggingface_hub", "datasets", "accelerate", "numpy"}} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


@pytest.mark.parametrize("content", [b"a: [" * 200_000, b"[1, " * 200_000, b"# " + b"x" * 900_000 + b"\n&a 1"])
def test_a_large_file_is_refused_at_its_first_fault(content: bytes, folder: Path) -> None:
    """The work is counted in events of the parser: a time would depend on how busy the machine is."""
    (folder / "recipe.yaml").write_bytes(content)
    taken: list[object] = []
    parse = YAML.parse

    def counted(self: YAML, stream: str) -> Iterator[object]:
        for event in parse(self, stream):
            taken.append(event)
            yield event

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(YAML, "parse", counted)
        problems(folder / "recipe.yaml")
    assert len(taken) <= 2 * MAX_DEPTH + 4


@given(st.text(st.sampled_from("ab: \n-[]{}#&*!|>'\"%@`,?\t\\u0x1e.~<=\r"), max_size=60))
@settings(max_examples=500, deadline=None)
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        read_text(text, "any")
    except RecipeError as error:
        assert error.problems[0].where.startswith("any:")


def test_a_released_recipe_that_is_a_list_is_refused_with_its_place(tmp_path):
    (tmp_path / "recipe.yaml").write_text("- name: a\n")
    with pytest.raises(RecipeError, match=r"recipe.yaml:1:1: recipe: a recipe is a section of keys"):
        read_released(tmp_path / "recipe.yaml")
