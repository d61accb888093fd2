"""Chat and masked language models, from files to a release that stock transformers uses."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file
from tiny import RECIPE as TINY
from tiny import tiny_config, tiny_project
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from distill.cli import main

RECIPES = Path(__file__).parents[2] / "recipes"
SOUNDS = {"cat": "meow", "dog": "woof", "cow": "moo", "duck": "quack", "owl": "hoot", "pig": "oink"}
COLOURS = {"red": "warm", "blue": "cold", "white": "pale", "black": "dark"}
WORDS = [*SOUNDS, *SOUNDS.values(), *COLOURS, *COLOURS.values(), "user", "assistant", "says", "looks", "the", "and"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|> {{ m.role }} {{ m.content }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)
CHAT = {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>"}
MASKED = {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
RECIPE = """\
name: {task}
seed: 1
teacher:
  model: ./teacher
  init: random
  fit: {{steps: {fit}, batch_size: 16, lr: 3e-3, schedule: cosine, warmup: 0.1}}
student:
  layers: {{keep: 2, choose: even}}
  mlp: {{keep: 0.5, multiple_of: 8}}
  calibration: {{examples: 16, batch_size: 16}}
data: {{source: ./data.jsonl, task: {task}, max_length: 48, {data}}}
losses:
  - {{match: logits}}
  - {{match: hidden, weight: 0.2}}
training: {{steps: {steps}, batch_size: 16, lr: 3e-3, schedule: cosine}}
evaluation: {{batch_size: 32, arms: [teacher, cut, distilled], efficiency: true}}
release: {{license: apache-2.0}}
"""


def save_teacher(folder, family, **names):
    marks = sorted({"[PAD]", "[UNK]", *names.values()})
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*marks, *WORDS])}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if "cls_token" in names:
        ids = [(names[name], words.token_to_id(names[name])) for name in ("cls_token", "sep_token")]
        words.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ids)
    given = {"pad_token": "[PAD]", "unk_token": "[UNK]", **names}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=64, **given)
    tokenizer.chat_template = TEMPLATE if family == "llama" else None
    tokenizer.save_pretrained(folder)
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 48, "pad_token_id": tokenizer.pad_token_id}
    sizes |= {"initializer_range": 0.1, "hidden_dropout_prob": 0.0}  # it learns in seconds
    sizes |= {"intermediate_size": 96, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    tiny_config(family, **sizes).save_pretrained(folder)


def project(folder, family, task, rows, fit, steps, data="limit: 10000", **names):
    save_teacher(folder / "teacher", family, **names)
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = RECIPE.format(task=task, fit=fit, steps=steps, data=data)
    (folder / "recipe.yaml").write_text(recipe)
    assert main(["run", str(folder / "recipe.yaml"), "--out", str(folder / "run")]) == 0
    found = json.loads((folder / "run/evaluation.json").read_text())
    return {arm["name"]: arm["metrics"] for arm in found["arms"]}, found["data"]


def with_stock_transformers(code):
    """What a fresh process prints that has no distill."""
    script = f"import sys; sys.modules['distill'] = None\nfrom transformers import pipeline\n{code}"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment
    ).stdout


@pytest.mark.slow
def test_bits_per_byte_are_measured_in_training_too_and_over_every_byte_of_the_test(tmp_path):
    plain = TINY.replace("task: classification, labelled: 24", "task: causal_lm, test: ./test.jsonl")
    path = tiny_project(tmp_path, plain.replace("log_every: 2}", "log_every: 2, keep_best: bits_per_byte}"), "llama")
    texts = ["red cat runs fast " * 6, "blue dog", "green fish  sleeps there"]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert main(["evaluate", str(path), "evaluation.efficiency=false", "--out", str(tmp_path / "run")]) == 0
    looks = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert all(look["metrics"]["bits_per_byte"] > 0 for look in looks if look["event"] == "evaluate")
    rows = load_file(tmp_path / "run/predictions/teacher.safetensors")
    assert rows["text_bytes"].sum() == sum(len(text.encode()) for text in texts)


def conversations():
    chooser, rows = random.Random(0), []
    for _ in range(400):
        messages = []
        for _ in range(chooser.randint(1, 3)):
            colour, animal = chooser.choice(list(COLOURS)), chooser.choice(list(SOUNDS))
            messages.append({"role": "user", "content": f"the {colour} {animal}"})
            messages.append({"role": "assistant", "content": f"says {SOUNDS[animal]} and looks {COLOURS[colour]}"})
        rows.append({"messages": messages})
    return rows


def readme_recipe(number, folder):
    """Write a recipe of the README in a folder."""
    readme = (RECIPES.parent / "README.md").read_text(encoding="utf-8")
    recipe = re.findall(r"^```yaml\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)[number]
    (folder / "recipe.yaml").write_text(recipe)
    return str(folder / "recipe.yaml")


@pytest.mark.slow
def test_the_readmes_recipe_for_a_classifier_of_ones_own_runs(tmp_path):
    tiny_project(tmp_path)
    (tmp_path / "teacher").rename(tmp_path / "our-bert")
    rows = map(json.loads, (tmp_path / "data.jsonl").read_text().splitlines())
    lines = [f"{row['label']},{row['text']}\n" for row in rows]
    (tmp_path / "tickets.csv").write_text("".join(["queue,body\n", *lines]))
    smaller = ["teacher.init=random", "teacher.fit={steps: 12, lr: 3e-3}", "student.layers.keep=2"]
    smaller += ["student.mlp.multiple_of=8", "data.max_length=64", "evaluation.efficiency=false"]
    assert main(["run", readme_recipe(1, tmp_path), *smaller, "--out", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run/release/config.json").read_text())["num_hidden_layers"] == 2


@pytest.mark.slow
def test_the_readmes_recipe_for_a_chat_model_of_ones_own_runs(tmp_path):
    save_teacher(tmp_path / "our-chat-model", "llama", **CHAT)
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in conversations()))
    smaller = ["teacher.init=random", "teacher.fit={steps: 20, lr: 3e-3}", "student.layers.keep=2"]
    smaller += ["training.steps=4", "data.max_length=48", "evaluation.efficiency=false"]
    assert main(["run", readme_recipe(2, tmp_path), *smaller, "--out", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run/release/config.json").read_text())["num_hidden_layers"] == 2


@pytest.mark.slow
def test_a_chat_model_is_cut_taught_and_released_with_its_template(tmp_path):
    arms, data = project(tmp_path, "llama", "chat", conversations(), 120, 120, **CHAT)
    assert arms["teacher"]["perplexity"] < 1.1
    assert arms["distilled"]["kl"] < arms["cut"]["kl"] / 4
    assert arms["distilled"]["perplexity"] < arms["cut"]["perplexity"]
    assert data["unit"] == "rows of documents" and data["summary"]["train"]["filled"] > 0.75  # 4 turns of 14 tokens
    card = (tmp_path / "run/release/README.md").read_text()
    assert "pipeline_tag: text-generation" in card and "tokenizer.apply_chat_template(" in card
    assert "\nIt prints" in card
    talk = [{"role": "user", "content": "the black owl"}]
    own = "max_new_tokens=20, do_sample=False"  # by itself the pipeline draws its tokens
    said = with_stock_transformers(
        f"said = pipeline('text-generation', {str(tmp_path / 'run/release')!r}, {own})({talk})\n"
        "print(said[0]['generated_text'][-1]['content'].strip())"
    )
    assert said.strip() == "says hoot and looks dark"  # and then its turn ends


def sentences():
    chooser, rows = random.Random(0), []
    for _ in range(600):
        words = []
        for _ in range(chooser.randint(1, 2)):
            colour, animal = chooser.choice(list(COLOURS)), chooser.choice(list(SOUNDS))
            words += ["the", colour, animal, "says", SOUNDS[animal], "and", "looks", COLOURS[colour]]
        rows.append({"text": " ".join(words)})
    return rows


@pytest.mark.slow
def test_a_masked_language_model_is_cut_taught_and_released(tmp_path):
    arms, _ = project(tmp_path, "bert", "masked_lm", sentences(), 250, 150, data="mask_share: 0.2", **MASKED)
    assert arms["teacher"]["masked_perplexity"] < 1.5
    assert arms["distilled"]["kl"] < arms["cut"]["kl"] / 4
    assert arms["distilled"]["masked_perplexity"] < arms["cut"]["masked_perplexity"]
    card = (tmp_path / "run/release/README.md").read_text()
    assert "pipeline_tag: fill-mask" in card and "tokenizer.mask_token" in card and "\nIt prints" in card
    said = with_stock_transformers(
        f"fill = pipeline('fill-mask', {str(tmp_path / 'run/release')!r})\n"
        "print(fill('the black owl says [MASK] and looks dark')[0]['token_str'])"
    )
    assert said.strip() == "hoot"


@pytest.mark.slow
def test_the_recipe_for_prose_runs(tmp_path):
    few = ["teacher.fit.steps=3", "training.steps=3", "data.limit=24", "evaluation.arms=[teacher, cut, distilled]"]
    assert main(["run", str(RECIPES / "masked-lm/recipe.yaml"), *few, "--out", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run/release/model.safetensors").exists()
