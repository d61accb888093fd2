"""Tiny projects of every task whose teacher is cached, and the losses that they give."""

from __future__ import annotations

import json
import random

import torch
from conversations import TEMPLATES, save_tokenizer
from tiny import RECIPE, tiny_config, tiny_model, tiny_project

from distill.models.forward import forward
from distill.pipeline import VERBS, RunDir, Session, run_stages
from distill.pipeline.train import batches_for
from distill.recipe import load_recipe

FIT = ["teacher.init=random", "teacher.fit={steps: 2, batch_size: 8, lr: 1e-3}"]
EXACT = "teacher.cache={keep: hidden, dtype: fp32}"
LAYERS = "losses=[{match: labels}, {match: logits}, {match: hidden}, {match: embeddings}]"


def language_project(folder, family="llama", task="causal_lm"):
    text = RECIPE.replace("task: classification, labelled: 24, max_length: 16", f"task: {task}, max_length: 24")
    return tiny_project(folder, text, family)


def trained_project(folder):
    """One whose teacher has its weights already, so that they depend on nothing else."""
    recipe = language_project(folder)
    tiny_model("llama", pad_token_id=0).save_pretrained(folder / "teacher")
    text = recipe.read_text().split("  init: random")
    recipe.write_text(text[0] + text[1].split("\n", 2)[2])
    return recipe


def masked_project(folder):
    recipe = language_project(folder, "bert", "masked_lm")
    tokenizer = folder / "teacher/tokenizer_config.json"
    tokenizer.write_text(json.dumps({**json.loads(tokenizer.read_text()), "mask_token": "[UNK]"}))
    return recipe


def chat_project(folder):
    recipe = language_project(folder, "llama", "chat")
    save_tokenizer(folder / "teacher", TEMPLATES["chatml"])
    tiny_config("llama", pad_token_id=0, vocab_size=300).save_pretrained(folder / "teacher")
    chooser, rows = random.Random(0), []
    for number in range(60):
        turns = [("user", f"say {number}"), ("assistant", "x" * chooser.randint(1, 6))] * chooser.randint(1, 2)
        rows.append({"messages": [{"role": role, "content": content} for role, content in turns]})
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe.write_text(recipe.read_text().replace("max_length: 24", "max_length: 64"))
    return recipe


def tags_project(folder):
    recipe = tiny_project(folder, RECIPE.replace("task: classification, labelled: 24", "task: token_classification"))
    rows = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    tagged = [{"tokens": row["text"].split(), "tags": ["O"] * len(row["text"].split())} for row in rows]
    tagged[0]["tags"][0] = "B-THING"
    tagged[1]["tags"][0] = "B-THING"
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tagged))
    return recipe


def numbers_project(folder):
    recipe = tiny_project(folder, RECIPE.replace("labelled: 24, ", ""), "llama")
    rows = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    lines = [json.dumps({"text": row["text"], "label": 0.5 + len(row["text"])}) + "\n" for row in rows]
    (folder / "data.jsonl").write_text("".join(lines))
    return recipe


def session_of(folder, make, *overrides, run="run"):
    """A recipe at work, made where it is not there yet, and the list of what it says."""
    recipe = make(folder) if not (folder / "recipe.yaml").exists() else folder / "recipe.yaml"
    fit, lines = [] if make is trained_project else FIT, []
    settings = [*fit, "training.steps=6", "training.batch_size=8", "training.micro_batch_size=4", *overrides]
    loaded = load_recipe(recipe, settings)
    return Session(loaded, folder, RunDir(folder / run), lines.append, accept_weak_teacher=True), lines


def cached(folder, make, *overrides, run="run"):
    """A session whose cache is filled, and what it said."""
    session, lines = session_of(folder, make, *overrides, run=run)
    run_stages(session, VERBS["cache"])
    return session, lines


def losses_of(session, teacher, objective, steps=4):
    """The mean of every term over the micro-batches of some steps, of a student far from its teacher."""
    student, rows = session.load(session.arm_start("distilled")), []
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    batches = batches_for(session, session.recipe.training, labelled=False)
    objective.project(student.config.hidden_size, teacher.width)
    for step in batches.stream(0, steps, 0, 1):
        for _, batch in step:
            counts = objective.counts([batch])
            with torch.no_grad():
                own = forward(student, batch, objective.student)
                rows.append(objective(own, teacher(batch), batch, counts)[1] / counts.clamp(min=1))
    return torch.stack(rows)
