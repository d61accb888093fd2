"""What `validate` learns from the first bytes of the files that a recipe names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from bad_recipes import GOOD
from teacher_files import BERT, weights
from tiny import DECODERS, ENCODERS, NO_ROW, SEQ2SEQ, tiny_model

from distill.errors import InputError, Problem, RecipeError
from distill.recipe import load_recipe
from distill.recipe.headers import look_at_folder
from distill.recipe.locate import TeacherSize
from distill.recipe.rules import patterns_match
from distill.recipe.schema import Training, json_schema
from distill.recipe.weights import parameter_names, read_headers
from distill.recipe.yaml import read_text

Write = Callable[..., Path]
ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "recipes").glob("*/recipe.yaml"))


def problems(path: Path) -> list[Problem]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    return caught.value.problems


def one(path: Path) -> tuple[str, str]:
    (problem,) = problems(path)
    return problem.key, f"{problem.message} {problem.fix}"


HEADED = ["bert." + name for name in BERT] + ["classifier.weight"]


@pytest.mark.parametrize("stored", [BERT, HEADED], ids=["base model", "with a head"])
def test_patterns_that_match_a_parameter_are_accepted(stored: list[str], write: Write, folder: Path) -> None:
    (folder / "teacher/model.safetensors").write_bytes(weights(stored))
    patterns = [
        "*.embeddings.*",
        "bert.embeddings.*",
        "*.LayerNorm.weight",
        "*.dense.*",
        "classifier.*",
        "*embed*",
        "*",
    ]
    load_recipe(write(GOOD.replace("  lr: 3e-4", f"  freeze: {patterns}")))


@pytest.mark.parametrize("stored", [BERT, HEADED], ids=["base model", "with a head"])
def test_adapters_of_linear_maps_that_are_not_there_are_named(stored: list[str], write: Write, folder: Path) -> None:
    (folder / "teacher/model.safetensors").write_bytes(weights(stored))
    text = GOOD.replace("lr: 2e-4}", "lora: {targets: [dense, '*.v_proj'], also: ['*Norm*', '*nrom*']}}")
    text = text.replace("multiple_of: 64}", "multiple_of: 64}\n  mask: {sparsity: 0.5}")
    found = problems(write(text.replace("  lr: 3e-4", "  lora: {targets: [quarry]}")))
    keys = ["teacher.fit.lora.targets.1", "teacher.fit.lora.also.1", "training.lora", "training.lora.targets.0"]
    assert [problem.key for problem in found] == keys
    assert "'*.v_proj' matches no linear map of the teacher" in found[0].message
    assert "masks choose among weights that learn" in found[2].message


@pytest.mark.parametrize("stored", [BERT, HEADED], ids=["base model", "with a head"])
def test_patterns_that_match_nothing_are_named(stored: list[str], write: Write, folder: Path) -> None:
    (folder / "teacher/model.safetensors").write_bytes(weights(stored))
    text = GOOD.replace("lr: 2e-4}", "freeze: ['*.attn.*']}")
    text = text.replace("multiple_of: 64}", "multiple_of: 64}\n  mask: {sparsity: 0.5, only: ['*.up_proj.*']}")
    text = text.replace("  lr: 3e-4", "  freeze: ['*.embeddings.*', '*.embedings.*']\n  only: ['*.mpl.*']")
    found = problems(write(text))
    keys = ["teacher.fit.freeze.0", "student.mask.only.0", "training.freeze.1", "training.only.0"]
    assert [problem.key for problem in found] == keys
    assert all("matches no parameter of the teacher" in problem.message for problem in found)


FAMILIES = ["bert", "distilbert", "modernbert", "gpt2", "llama", "mixtral", "t5", "marian", "whisper"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_of_a_model_is_found_in_its_file_and_in_that_of_its_base(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    spec = Training(steps=1, freeze=[name for name, _ in model.named_parameters()])
    for part, folder in ((model, tmp_path / "whole"), (model.base_model, tmp_path / "base")):
        part.save_pretrained(folder)
        size = TeacherSize(tensors=parameter_names(read_headers(folder)))
        assert [mistake.message for mistake in patterns_match(None, spec, None, size, own=size)] == []


def test_experts_are_computed_together_so_their_names_say_nothing(write: Write, folder: Path) -> None:
    (folder / "teacher/model.safetensors").write_bytes(
        weights([f"model.layers.{layer}.mlp.experts.0.up_proj.weight" for layer in range(6)])
    )
    load_recipe(write(GOOD.replace("  lr: 3e-4", "  freeze: ['*.experts.gate_up_proj']")))


def test_names_are_read_from_every_shard(write: Write, folder: Path) -> None:
    shards = {"a.weight": "one.safetensors", "b.weight": "two.safetensors"}
    (folder / "teacher/model.safetensors").unlink()
    for name, file in shards.items():
        (folder / "teacher" / file).write_bytes(weights([name]))
    (folder / "teacher/model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    text = GOOD.replace("  lr: 3e-4", "  freeze: [b.weight, c.weight]")
    assert one(write(text))[0] == "training.freeze.1"
    (folder / "teacher/two.safetensors").unlink()
    key, message = one(write(text))
    assert key == "teacher.model" and "names two.safetensors, which does not exist" in message
    outside = {"weight_map": {"a.weight": "../one.safetensors"}}
    (folder / "teacher/model.safetensors.index.json").write_text(json.dumps(outside))
    assert "../one.safetensors, which does not lie in the folder itself" in one(write(text))[1]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"\x01\x02", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0f\nsize 9\n", "is a pointer of Git LFS"),
        ((1 << 60).to_bytes(8, "little") + b"{}", "asks for a header of 1,152,921,504,606,846,976 bytes and has 10"),
        ((2).to_bytes(8, "little") + b"{", "it is broken or was not copied whole"),
        ((2).to_bytes(8, "little") + b"{x", "its header is not that of a safetensors file"),
        ((2).to_bytes(8, "little") + b"[]", "its header is not that of a safetensors file"),
        ((7).to_bytes(8, "little") + b'{"a":1}', "its header is not that of a safetensors file"),
        ((50_000).to_bytes(8, "little") + b"[" * 50_000, "its header is not that of a safetensors file"),
        (weights(BERT, data=b"1234"), "it was not copied whole"),
    ],
)
def test_broken_weights_are_refused_before_anything_is_loaded(
    content: bytes, words: str, write: Write, folder: Path
) -> None:
    (folder / "teacher/model.safetensors").write_bytes(content)
    key, message = one(write())
    assert key == "teacher.model" and words in message
    load_recipe(write(GOOD.replace("fit: {", "init: random\n  fit: {")))  # where no weights are read


def test_a_broken_config_of_generation_is_refused(write: Write, folder: Path) -> None:
    (folder / "teacher/generation_config.json").write_text("{")
    key, message = one(write())
    assert key == "teacher.model" and "generation_config.json" in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            "says quantized with gptq; such weights cannot be cut",
        ),
        ({"num_hidden_layers": 10_000_000}, "num_hidden_layers 10,000,000; no model is larger than 10,000"),
        ({"vocab_size": 10**12}, "vocab_size 1,000,000,000,000"),
        ({"hidden_size": 2e9}, "hidden_size"),
        ({"intermediate_size": 10**9}, "intermediate_size"),
    ],
)
def test_a_config_that_cannot_be_worked_with_is_refused(
    change: dict[str, Any], words: str, write: Write, folder: Path
) -> None:
    path = folder / "teacher/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    key, message = one(write())
    assert key == "teacher.model" and words in message


LAYER_2 = [name for name in BERT if ".layer.2." in name]
LAST = [name for name in BERT if ".layer.5." in name]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (weights([f"_orig_mod.{name}" for name in BERT]), "the name of every tensor begins with '_orig_mod.'"),
        (weights([f"module.{name}" for name in BERT]), "the name of every tensor begins with 'module.'"),
        (weights([name for name in BERT if name not in LAYER_2]), "no tensor belongs to layer 2 of encoder.layer"),
        (weights([name for name in BERT if name not in LAST]), "says 6 layers, and no tensor belongs to layer 5"),
        (weights(BERT, shape=[90, 384]), "vocab_size 100, and embeddings.word_embeddings.weight has 90 rows"),
        (weights([BERT[-1], *BERT[:-1]], dtype="U8", shape=[8, 8]), "holds quantized weights"),
        (weights(["encoder.layer.0.attention.self.query.qweight", *BERT]), "holds quantized weights"),
    ],
)
def test_weights_that_are_not_those_of_the_config_are_refused(
    content: bytes, words: str, write: Write, folder: Path
) -> None:
    path = folder / "teacher/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 100}))
    load_recipe(write())
    (folder / "teacher/model.safetensors").write_bytes(content)
    key, message = one(write())
    assert key == "teacher.model" and words in message


@pytest.mark.parametrize("family", [*DECODERS, *ENCODERS, *SEQ2SEQ, *NO_ROW])
def test_nothing_is_wrong_with_a_model_as_transformers_saves_it(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    for part, folder in ((model, tmp_path / "whole"), (model.base_model, tmp_path / "base")):
        part.save_pretrained(folder)
        assert look_at_folder(folder, weights=True)[1] == []
        size = look_at_folder(folder, weights=True)[0]
        assert (size.layers, size.vocabulary) == (model.config.num_hidden_layers, 64) or family in SEQ2SEQ


def test_a_folder_without_weights_or_with_an_adapter_alone_is_refused(write: Write, folder: Path) -> None:
    (folder / "teacher/model.safetensors").unlink()
    assert "has no weights that are read" in one(write())[1]
    load_recipe(write(GOOD.replace("fit: {", "init: random\n  fit: {")))
    (folder / "teacher/pytorch_model.bin").write_bytes(b"")
    (folder / "teacher/optimizer.pt").write_bytes(b"")
    assert "has no weights that are read" in one(write())[1]
    assert "but pytorch_model.bin: load it with transformers, and save_pretrained" in one(write())[1]
    (folder / "teacher/config.json").unlink()
    (folder / "teacher/adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    assert "holds an adapter for org/base (adapter_config.json)" in one(write())[1]


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (("checkpoint-500/config.json", "checkpoint-1000/config.json"), "as ./teacher/checkpoint-1000"),
        (("model.gguf",), "as ./teacher/model.gguf"),
        (("modules.json", "0_Transformer/config.json"), 'with "path": "" for it in modules.json'),
    ],
)
def test_a_model_in_a_place_of_its_own_is_named(files: tuple[str, ...], words: str, write: Write, folder: Path) -> None:
    (folder / "teacher/config.json").unlink()
    for name in files:
        (folder / "teacher" / name).parent.mkdir(exist_ok=True)
        (folder / "teacher" / name).write_text("{}")
    assert words in one(write())[1]


@pytest.mark.parametrize("vocab", [{"a": 0, "b": 100}, [["x", -1.0]] * 101])
def test_a_tokenizer_with_more_words_than_embeddings_is_refused(vocab: Any, write: Write, folder: Path) -> None:
    path = folder / "teacher/config.json"
    sizes = json.loads(path.read_text())
    # A token that was added beyond them may go unused; which ones the data has, is seen when it is read.
    added = {"model": {"vocab": vocab}, "added_tokens": [{"id": 200, "content": "<x>"}]}
    (folder / "teacher/tokenizer.json").write_text(json.dumps(added))
    path.write_text(json.dumps(sizes | {"vocab_size": 101}))
    load_recipe(write())
    path.write_text(json.dumps(sizes | {"vocab_size": 100}))
    assert "tokenizer.json has words up to id 100, and config.json says vocab_size 100" in one(write())[1]


DATA = GOOD.replace("source: stdlib-docstrings", "source: ./dataENDING")


@pytest.mark.parametrize(
    ("ending", "content", "key", "words"),
    [
        (".csv", None, "data.source", "there is no file"),
        (".xlsx", "x", "data.source", "none of the known endings .jsonl"),
        (".csv", "", "data.source", "is empty"),
        (".csv", "body,label\nhello,a\n", "data.source", "no column 'text'; it has 'body', 'label'"),
        (".csv", '\ufeff"text",class\nhello,a\n', "data.source", "no column 'label'; it has 'text', 'class'"),
        (
            ".jsonl",
            '{"text": "a", "class": "b"}\n\n{"text": "a"}\n',
            "data.source",
            "no column 'label'; it has 'text', 'class'",
        ),
        (".jsonl", '{"text": "a"\n', "data.source", "cannot read"),
        (".jsonl", "3\n", "data.source", "line 1 is no object"),
        (".txt", "one\ntwo\n", "data.source", "no column 'label'; it has 'text'"),
        (".parquet", "text,label\n", "data.source", "not a parquet file"),
        (".parquet", "PAR1 and no end", "data.source", "is cut off"),
        (".csv", b"text,l\xffbel\n", "data.source", "after line 0 it is not utf-8"),
    ],
)
def test_a_data_file_is_looked_at(
    ending: str, content: str | bytes | None, key: str, words: str, write: Write, folder: Path
) -> None:
    if content is not None:
        (folder / f"data{ending}").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert one(write(DATA.replace("ENDING", ending)))[0] == key
    assert words in one(write(DATA.replace("ENDING", ending)))[1]


@pytest.mark.parametrize(
    ("ending", "content"),
    [
        (".csv", "id,text,label\n1,hello,a\n"),
        (".jsonl", '{"text": "unlabelled"}\n' * 50 + '{"text": "a", "label": "b"}\n'),
        (".json", '[{"text": "a", "label": "b"}]'),
        (".parquet", "PAR1 ... PAR1"),
    ],
)
def test_a_data_file_with_its_columns_is_accepted(ending: str, content: str, write: Write, folder: Path) -> None:
    (folder / f"data{ending}").write_text(content)
    load_recipe(write(DATA.replace("ENDING", ending)))


def test_a_language_model_needs_no_labels(write: Write, folder: Path) -> None:
    (folder / "data.txt").write_text("one\ntwo\n")
    path = folder / "teacher/config.json"
    path.write_text(path.read_text().replace('"bert"', '"llama"'))
    text = DATA.replace("task: classification\n  labelled: 160", "task: causal_lm").replace(
        "accuracy, f1_macro", "perplexity"
    )
    load_recipe(write(text.replace("ENDING", ".txt")))


@pytest.mark.parametrize(
    ("old", "new", "key", "words"),
    [
        ("f1_macro", "perplexity", "evaluation.metrics.1", "task: classification has no such metric as perplexity"),
        ("  lr: 3e-4", "  keep_best: kl\n  evaluate_every: 5", "training.keep_best", "as kl during training"),
        ("match: hidden, loss: mse, map: plan", "match: output", "losses.2.match", "makes none"),
        (
            "  lr: 3e-4",
            "  warmup: 50\n  steps: 40\n  epochs: null",
            "training.warmup",
            "longer than the training of 40",
        ),
        ("{epochs: 2,", "{steps: 20, warmup: 21,", "teacher.fit.warmup", "longer than the training of 20"),
    ],
)
def test_what_the_task_or_the_training_does_not_have(old: str, new: str, key: str, words: str, write: Write) -> None:
    text = GOOD.replace("  epochs: 3\n", "") if "epochs: null" in new else GOOD
    found, message = one(write(text.replace(old, new)))
    assert found == key and words in message


def test_a_pipe_is_no_recipe_and_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "recipe.yaml")
    code = "import sys; from distill.cli import main; sys.exit(main(['validate', sys.argv[1]]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "recipe.yaml")],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2 and "not a regular file" in done.stderr
    with pytest.raises(InputError, match="not a regular file"):
        load_recipe(tmp_path / "recipe.yaml")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.parent.name)
def test_shipped_recipes_point_to_the_schema_and_read_alike_everywhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# yaml-language-server: $schema=../recipe.schema.json\n")
    assert yaml.safe_load(text) == read_text(text, "here").data


def test_the_shipped_schema_is_what_the_command_prints() -> None:
    assert json.loads((ROOT / "recipes/recipe.schema.json").read_text(encoding="utf-8")) == json_schema()
