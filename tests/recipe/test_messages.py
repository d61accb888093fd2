"""Keys of other tools, misspelt keys and wrong indentation: one mistake is one problem with one right answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from bad_recipes import GOOD, MLP, Bad, says

from distill.errors import Problem, RecipeError
from distill.recipe import load_recipe
from distill.recipe.foreign import ADVICE, RENAMED, UNSUPPORTED
from distill.recipe.schema import Data, Evaluation, Optimization, Recipe, Teacher, Term, Training
from distill.recipe.student import Layers, Mlp, Student
from distill.recipe.terms import TERM_KEYS

Write = Callable[..., Path]


def problems(path: Path) -> list[Problem]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    return caught.value.problems


FOREIGN = [
    Bad("  lr: 3e-4", "  learning_rate: 3e-4", 20, "training.learning_rate", "unknown key did you mean 'lr'"),
    Bad("  lr: 3e-4", "  learning-rate: 3e-4", 20, "training.learning-rate", "did you mean 'lr'"),
    Bad("  epochs: 3", "  num_train_epochs: 3", 18, "training.num_train_epochs", "did you mean 'epochs'"),
    Bad("  epochs: 3", "  num_epochs: 3", 18, "training.num_epochs", "did you mean 'epochs'"),
    Bad("  epochs: 3", "  max_steps: 300", 18, "training.max_steps", "did you mean 'steps'"),
    Bad("  batch_size: 32", "  per_device_train_batch_size: 8", 19, "training.per_device_train_batch_size",
        "did you mean 'micro_batch_size'"),
    Bad("  lr: 3e-4", "  warmup_ratio: 0.1", 20, "training.warmup_ratio", "did you mean 'warmup'"),
    Bad("  lr: 3e-4", "  lr_scheduler_type: linear", 20, "training.lr_scheduler_type", "did you mean 'schedule'"),
    Bad("  lr: 3e-4", "  bf16: true", 20, "training.bf16", "unknown key write precision: bf16"),
    Bad("  lr: 3e-4", "  gradient_accumulation_steps: 4", 20, "training.gradient_accumulation_steps",
        "micro_batch_size"),
    Bad("seed: 0", "output_dir: out", 2, "output_dir", "--out FOLDER"),
    Bad("seed: 0", "alpha: 0.5", 2, "alpha", "weight"),
    Bad("  lr: 3e-4", "  kd_weight: 0.5", 20, "training.kd_weight", "weight"),
    Bad("seed: 0", "learning_rate: 3e-4", 2, "learning_rate", "belongs under training: as lr:"),
    Bad("  model: ./teacher", "  model_name_or_path: ./teacher", 4, "teacher.model_name_or_path",
        "did you mean 'model'"),
    Bad("  lr: 3e-4", "  lora: {r: 8}", 20, "training.lora.r", "write lora: {rank: 16"),
    Bad("  lr: 3e-4", "  peft: {}", 20, "training.peft", "write lora: {rank: 16"),
    Bad("  lr: 3e-4", "  qlora: {}", 20, "training.qlora", "not supported"),
    Bad("  mlp: {", "  heads: {keep: 4}\n  mlp: {", 8, "student.heads", "not supported"),
    Bad("  mlp: {", "  vocabulary: {keep: 0.5}\n  mlp: {", 8, "student.vocabulary", "not supported"),
    Bad("  lr: 3e-4", "  seq_kd: true", 20, "training.seq_kd", "not supported"),
    Bad("  lr: 3e-4", "  lmbda: 0.5", 20, "training.lmbda", "write on_policy: {share: 0.5"),
    Bad("seed: 0", "quantization: int8", 2, "quantization", "not supported"),
    Bad("seed: 0", "deepspeed: ds.json", 2, "deepspeed", "accelerate launch"),
]  # fmt: skip


@pytest.mark.parametrize("case", FOREIGN, ids=lambda case: f"{case.key} {case.words}"[:70])
def test_a_key_of_another_tool_is_translated_and_reported_once(case: Bad, write: Write) -> None:
    path = write(case.text)
    (problem,) = problems(path)
    assert (problem.where.startswith(f"{path}:{case.line}:"), problem.key) == (True, case.key), str(problem)
    assert says(f"{problem.message} {problem.fix}", case.words), str(problem)


def test_translations_lead_to_keys_of_a_recipe_and_hide_none() -> None:
    sections = (Recipe, Teacher, Data, Term, Training, Evaluation, Student, Layers, Mlp)
    ours = {key for section in sections for key in section.model_fields}
    assert set(RENAMED.values()) <= ours
    assert ours - set(TERM_KEYS) == ours - set(TERM_KEYS) - {*RENAMED, *ADVICE, *UNSUPPORTED}
    assert not {*RENAMED} & {*ADVICE} and not {*RENAMED, *ADVICE} & {*UNSUPPORTED}


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("  labelled: 160", "  labeled: many", "data.labeled"),
        ("  epochs: 3", "  epoch: three", "training.epoch"),
        ("match: labels,", "mach: [labels],", "losses.0.mach"),
        ("  model: ./teacher", "  modell: 3", "teacher.modell"),
        ("keep: 0.5", "kep: [[1]]", "student.mlp.kep"),
        ("  epochs: 3", "  learning_rate: [1]\n  epochs: 3", "training.learning_rate"),
    ],
)
def test_no_rename_is_proposed_whose_value_would_not_fit(old: str, new: str, key: str, write: Write) -> None:
    (problem,) = problems(write(GOOD.replace(old, new)))
    assert problem.key == key and "did you mean" not in problem.fix, str(problem)


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("keep: 3,", "kep: 9,", "student.layers.kep"),  # the teacher has 6
        ("  batch_size: 32", "  batch_sise: 0", "training.batch_sise"),
        ("  epochs: 3", "  epoch: 3", "training.epoch"),  # nothing is missing
        ("seed: 0", "max_length: 0", "max_length"),
        ("match: labels,", "macth: labels,", "losses.0.macth"),
        (MLP, "keep: 1.0, scoer: taylor_", "student.mlp.scoer"),
    ],
)
def test_the_value_of_a_misspelt_key_is_not_judged(old: str, new: str, key: str, write: Write) -> None:
    assert [problem.key for problem in problems(write(GOOD.replace(old, new)))] == [key]


def test_a_file_without_its_folder_is_told_how_to_write_it(write: Write) -> None:
    (problem,) = problems(write(GOOD.replace("stdlib-docstrings", "tickets.csv")))
    assert (problem.key, problem.fix) == ("data.source", "write ./tickets.csv")
    (problem,) = problems(write(GOOD.replace("stdlib-docstrings", "https://example.org/tickets.csv")))
    assert (problem.key, problem.fix) == ("data.source", "")  # no file of that name would ever be there


def test_keys_of_an_empty_section_were_meant_to_be_in_it(write: Write) -> None:
    indented = "  epochs: 3\n  batch_size: 32\n  lr: 3e-4"
    found = problems(write(GOOD.replace(indented, indented.replace("  ", ""))))
    assert [(problem.key, problem.where.rsplit(":", 2)[1]) for problem in found] == [
        ("epochs", "18"),
        ("batch_size", "19"),
        ("lr", "20"),
    ]
    for problem in found:
        assert says(f"{problem.message} {problem.fix}", "indented wrongly training: has nothing in it spaces")


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("losses:\n", "  losses:\n", "data.losses"),
        ("release: {license", "  release: {license", "evaluation.release"),
        ("  layers: {keep", "  data:\n    source: pydoc-topics\n  layers: {keep", "student.data"),
    ],
)
def test_a_section_inside_of_another_is_named_as_indented(old: str, new: str, key: str, write: Write) -> None:
    text = GOOD.replace(old, new)
    if key == "student.data":
        text = text.replace("data:\n  source: stdlib-docstrings\n  task: classification\n  labelled: 160\n", "")
    (first, *others) = problems(write(text))
    assert first.key == key and says(f"{first.message} {first.fix}", "indented wrongly at the top of the recipe")
    assert all(other.key == "data.task" for other in others)  # that one is missing indeed


def test_a_rule_speaks_although_other_sections_are_wrong(write: Write) -> None:
    text = GOOD.replace("match: labels, weight: 0.3", "match: labels, loss: jsd").replace("keep: 3,", "keep: 9,")
    text = text.replace("batch_size: 32", "batch_size: x").replace("seed: 0", "seed: x")
    assert [problem.key for problem in problems(write(text))] == [
        "seed",
        "student.layers.keep",
        "losses.0.loss",
        "training.batch_size",
    ]


def test_sections_made_in_python_keep_their_rules() -> None:
    with pytest.raises(ValueError, match="temperature: has no effect with match: hidden"):
        Term(match="hidden", temperature=2.0)
    with pytest.raises(ValueError, match=r"none of epochs, steps and tokens.*micro_batch_size: batch_size 32"):
        Optimization(micro_batch_size=5)
    with pytest.raises(ValueError, match="keep: the list names no layer"):
        Student.model_validate({"layers": {"keep": []}})
