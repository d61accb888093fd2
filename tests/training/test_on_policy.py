"""A student that learns from its own answers: what is written when, what is learned of it, and what is counted."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pytest
import torch
from accelerate import Accelerator, DistributedType
from conversations import TEMPLATES, byte_tokenizer
from forked import Processes
from running import MADE_FROM, published
from safetensors.torch import load_file, save_file
from tiny import tiny_model

from distill.data import TASKS, TrainingBatches
from distill.data.prepare import prepare
from distill.data.rows import Order
from distill.errors import InputError
from distill.losses import LayerMap, Objective
from distill.models.generate import Writing
from distill.recipe.schema import Data, Mask, Term, Training
from distill.student.masks.masks import Masks
from distill.teacher import LiveTeacher
from distill.training import Job, read_records, train
from distill.training.on_policy import OnPolicy
from distill.training.setup import check_launch_keeps

TOKENIZER = byte_tokenizer(TEMPLATES["chatml"], eos_token="<|im_end|>", pad_token="<s>")
END, PADDING = TOKENIZER.eos_token_id, TOKENIZER.pad_token_id
LOGITS = [Term(match="logits"), Term(match="hidden", weight=0.1, map=[(1, 1)])]
OWN = {"share": 1.0, "max_new_tokens": 6}


def chat_corpus(folder):
    """28 conversations of which the last answer is written anew; of each some 35 tokens."""
    folder.mkdir(exist_ok=True)
    rows = [{"prompt": f"{a}{b}?"[:4], "completion": f"{b}{a}"[: 2 + a % 3]} for a in range(7) for b in range(4, 8)]
    for name, own in (("train", rows), ("test", [{"prompt": "?", "completion": "!"}])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    spec = Data(train="./train.jsonl", test="./test.jsonl", task="chat", max_length=56)
    return prepare(Order(TASKS["chat"](), spec, TOKENIZER, 0, folder), folder)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return chat_corpus(tmp_path_factory.mktemp("chat") / "data")


def llama(seed, **changes):
    return tiny_model("llama", seed, vocab_size=len(TOKENIZER) + 5, initializer_range=0.2, **changes)


def one_pair(_policy):
    return LayerMap(((1, 1),))


@dataclass(frozen=True)
class Slow(Writing):
    """It takes its time."""

    def __call__(self, model, prompts):
        time.sleep(0.2)
        return super().__call__(model, prompts)


@dataclass(frozen=True)
class Small(Writing):
    """It has memory for two prompts."""

    def __call__(self, model, prompts):
        if len(prompts) > 2:
            raise torch.OutOfMemoryError("not enough")
        return super().__call__(model, prompts)


def writing_of(own, kind=Writing):
    ends, vocabulary = frozenset({END}), len(TOKENIZER)
    return kind(own["max_new_tokens"], own.get("temperature", 1.0), ends, PADDING, length=56, vocabulary=vocabulary)


def policy(corpus, share=1.0, seed=0, own=OWN, kind=Writing, precision="fp32"):
    if corpus is None:
        return OnPolicy(share, precision, seed, None, None, None)
    answers = partial(corpus.task.with_answers, padding=PADDING)
    return OnPolicy(share, precision, seed, corpus.task.prompts, writing_of(own, kind), answers)


def run(corpus, folder, own=OWN, terms=LOGITS, kind=Writing, model=None, job=None, **spec):
    """Train a llama on a teacher of other weights; returns (model, what was said)."""
    usual = {"steps": 6, "batch_size": 8, "micro_batch_size": 4, "lr": 1e-3, "save_every": 2, "log_every": 1}
    spec = Training(**usual | {"on_policy": own} | spec)
    model = model or llama(0, attention_dropout=0.3)
    objective = Objective(terms, "next_token", one_pair, len(TOKENIZER))
    teacher = LiveTeacher(llama(1), objective.teacher, torch.device("cpu"))
    batches = TrainingBatches(corpus, range(len(corpus.train)), spec.batch_size, spec.micro_batch_size, 0)
    said = []
    on_policy = policy(corpus, own["share"], 0, own, kind, spec.precision)
    job = Job("test", spec, folder, 0, MADE_FROM, **job or {})
    train(job, model, objective, teacher, batches, on_policy=on_policy, say=said.append)
    return model, said


def sha256_of(model):
    content = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        content.update(name.encode() + tensor.numpy().tobytes())
    return content.hexdigest()


def seeded(*numbers):
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


def first_step(corpus):
    batches = TrainingBatches(corpus, range(len(corpus.train)), 8, 4, 0)
    return next(batches.stream(0, 1, 0, 1))


def logits_of(model, ids):
    with torch.no_grad():
        return model(ids[None]).logits[0, :-1, : len(TOKENIZER)].log_softmax(-1)


def by_hand(corpus, terms_of):
    """Answer the prompts of the first step one by one, with the seeds as they are documented.

    Sums over both micro-batches of what `terms_of(student's, teacher's log-probabilities [T, V])` gives for an answer.
    """
    student, teacher, sums, answers = llama(0), llama(1), 0.0, []
    for number, batch in first_step(corpus):
        prompts = corpus.task.prompts(batch)
        seeded(0, 0, number, 0, 1)
        for prompt, answer in zip(prompts, writing_of(OWN)(student, prompts), strict=True):
            ids, first = torch.cat([prompt, answer]), len(prompt) - 1
            sums = sums + terms_of(logits_of(student, ids)[first:], logits_of(teacher, ids)[first:])
            answers.append(answer)
    return sums, answers


def test_the_loss_of_a_step_is_the_mean_over_what_the_student_has_written(corpus, tmp_path):
    def divergence(student, teacher):
        return (teacher.exp() * (teacher - student)).sum()

    total, answers = by_hand(corpus, divergence)
    tokens = sum(map(len, answers))
    run(corpus, tmp_path, terms=[Term(match="logits")], model=llama(0), steps=1)
    (record,) = read_records(tmp_path / "metrics.jsonl")
    assert record["terms"]["logits.forward_kl"] == pytest.approx(total.item() / tokens, rel=1e-5)
    own = record["on_policy"]
    assert (own["share"], own["answers"], own["tokens"]) == (1.0, len(answers), tokens)
    assert own["mean_tokens"] == pytest.approx(tokens / len(answers), abs=1e-4) and own["short_share"] == 0
    assert own["ended_share"] == pytest.approx(
        sum(int(answer[-1]) == END for answer in answers) / len(answers), abs=1e-4
    )
    prompts = sum(len(prompt) for _, batch in first_step(corpus) for prompt in corpus.task.prompts(batch))
    assert record["tokens"] == prompts + tokens


def test_dropout_is_off_while_the_student_writes_and_on_while_it_learns(corpus, tmp_path):
    _, answers = by_hand(corpus, lambda *_: 0.0)
    model, seen = llama(0, attention_dropout=0.3), []
    model.model.layers[0].register_forward_pre_hook(lambda module, _inputs: seen.append(module.training))
    run(corpus, tmp_path, model=model, steps=1)
    record = read_records(tmp_path / "metrics.jsonl")[-1]
    assert record["on_policy"]["tokens"] == sum(map(len, answers))
    assert seen[-2:] == [True, True] and not any(seen[:-2]) and len(seen) > 4


def test_labels_are_learned_of_the_data_alone_and_counted_so(corpus, tmp_path):
    own = {"share": 0.5, "max_new_tokens": 6}
    terms = [Term(match="labels"), Term(match="logits")]
    on_policy = policy(None, share=0.5)
    step = next(step for step in range(50) if [on_policy.chosen(step, number) for number in (0, 1)] == [True, False])
    run(corpus, tmp_path, own, terms, model=llama(0), lr=1e-30, weight_decay=0, steps=step + 1)
    record = read_records(tmp_path / "metrics.jsonl")[-1]
    batches = TrainingBatches(corpus, range(len(corpus.train)), 8, 4, 0)
    batch = next(batches.stream(step, step + 1, 0, 1))[1][1]
    with torch.no_grad():
        logits = llama(0)(batch["input_ids"], position_ids=batch.get("position_ids"), attention_mask=None).logits
    logits = logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten(), ignore_index=-100)
    assert record["terms"]["labels"] == pytest.approx(expected.item(), rel=1e-4)
    assert record["on_policy"]["share"] == 0.5
    both = [[on_policy.chosen(step, number) for number in (0, 1)] for step in range(60)]
    none = next(step for step, chosen in enumerate(both) if all(chosen))
    run(corpus, tmp_path / "none", own, terms, model=llama(0), steps=none + 1)
    assert read_records(tmp_path / "none/metrics.jsonl")[-1]["terms"]["labels"] is None


def test_the_coin_follows_from_seed_step_and_number_and_falls_as_often_as_asked():
    for share in (0.25, 1.0):
        own = policy(None, share=share, seed=7)
        found = [own.chosen(step, number) for step in range(1000) for number in range(4)]
        assert sum(found) / 4000 == pytest.approx(share, abs=0.02)
    half = policy(None, share=0.5, seed=7)
    assert [half.chosen(step, 0) for step in range(40)] != [half.chosen(step, 1) for step in range(40)]
    assert [half.chosen(step, 0) for step in range(40)] != [replace(half, seed=8).chosen(s, 0) for s in range(40)]


def test_a_micro_batch_of_the_data_is_left_alone_and_random_streams_are_where_they_were(corpus):
    on_policy, numbered, model = policy(corpus), first_step(corpus), llama(0)
    before = torch.get_rng_state()
    written = on_policy(model, numbered, 0, 1)
    assert torch.equal(torch.get_rng_state(), before) and "written" in written[0][1]
    assert replace(on_policy, share=1e-9)(model, numbered, 0, 1) == numbered
    split = on_policy(model, numbered, 0, 2)  # two calls for each micro-batch, as little memory asks for
    assert [batch["input_ids"].shape[0] for _, batch in split] == [batch["input_ids"].shape[0] for _, batch in written]
    assert not torch.equal(split[0][1]["input_ids"], written[0][1]["input_ids"])


def test_a_killed_training_goes_on_to_the_same_bits(corpus, tmp_path):
    own = {"share": 0.5, "max_new_tokens": 8, "temperature": 0.7}
    whole, _ = run(corpus, tmp_path / "whole", own, steps=8)
    run(corpus, tmp_path / "parts", own, steps=8)
    for newer in published(tmp_path / "parts/checkpoints")[1:]:
        shutil.rmtree(newer)
    model, said = run(corpus, tmp_path / "parts", own, steps=8)
    assert "continuing after step" in " ".join(said)
    assert sha256_of(model) == sha256_of(whole)
    figures = [
        [{**record["on_policy"], "seconds": 0} for record in read_records(tmp_path / name / "metrics.jsonl")]
        for name in ("whole", "parts")
    ]
    assert figures[0] == figures[1] and len(figures[0]) == 8 and sum(each["answers"] for each in figures[0]) > 0


def train_on_a_rank(folder):
    model, _ = run(chat_corpus(folder.parent / f"data-{time.monotonic_ns()}"), folder, {**OWN, "share": 0.6})
    save_file(model.state_dict(), folder / f"{torch.distributed.is_initialized()}.safetensors")


@pytest.mark.slow
def test_two_ranks_write_and_learn_what_one_does(tmp_path):
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        started = Processes(tmp_path / f"{ranks}.log", train_on_a_rank, folder, ranks=ranks)
        assert started.wait() == [0] * ranks, started.said
    one, two = (load_file(next((tmp_path / name).glob("*.safetensors"))) for name in ("1", "2"))
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=0, atol=1e-5, msg=name)
    first, second = (read_records(tmp_path / name / "metrics.jsonl") for name in ("1", "2"))
    for one, two in zip(first, second, strict=True):
        assert one["on_policy"] | {"seconds": 0} == two["on_policy"] | {"seconds": 0} and one["tokens"] == two["tokens"]


def test_no_speed_counts_the_seconds_in_which_the_student_writes(corpus, tmp_path):
    start = time.monotonic()
    run(corpus, tmp_path, kind=Slow, steps=4)
    wall = time.monotonic() - start
    records = read_records(tmp_path / "metrics.jsonl")
    writing = sum(record["on_policy"]["seconds"] for record in records)
    assert writing >= 4 * 2 * 0.2
    assert writing + sum(8 / record["examples_per_s"] for record in records) < wall


def test_where_memory_runs_out_while_it_writes_fewer_prompts_are_answered_at_once(corpus, tmp_path):
    _, said = run(corpus, tmp_path, kind=Small, steps=2)
    assert [line for line in said if "OUT OF MEMORY in step 1: micro-batches of up to 4 examples are halved" in line]
    records = [record["on_policy"] for record in read_records(tmp_path / "metrics.jsonl")]
    assert [(own["share"], own["answers"]) for own in records] == [(1.0, 8), (1.0, 8)]


MASK = Mask(sparsity=0.5, schedule="cubic", end=0.5, every=2)


@pytest.mark.parametrize(
    "spec",
    [
        {"weights": "bf16", "precision": "bf16"},
        {"precision": "bf16", "ema": 0.9, "ema_release": True},
        {"lora": {"rank": 2}},
        {"gradient_checkpointing": True},
        pytest.param({"compile": True}, marks=pytest.mark.filterwarnings("ignore")),  # torch's compiler warns
        {"on_policy": {**OWN, "temperature": 0.0}},
    ],
    ids=str,
)
def test_it_goes_with_every_other_way_to_train(corpus, tmp_path, monkeypatch, spec):
    monkeypatch.setattr("distill.training.compiled.BACKEND", lambda graph, _inputs: graph.forward)
    start = sha256_of(llama(0))
    own = spec.get("on_policy", OWN)
    model, said = run(corpus, tmp_path, own, **spec, steps=3)
    records = read_records(tmp_path / "metrics.jsonl")
    assert all(record["on_policy"]["share"] == 1 for record in records) and records[-1]["skipped"] == 0
    assert sha256_of(model) != start and [line for line in said if "cannot be compiled" in line] == []
    assert model.generation_config.eos_token_id == 2  # as it was


def test_masked_weights_stay_masked_in_what_writes(corpus, tmp_path):
    shares = []
    job = {"constrain": lambda student: Masks(student, MASK, 6)}
    model = llama(0)

    def look(module, _inputs):
        if not module.training:
            shares.append((module.mlp.up_proj.weight == 0).float().mean().item())

    model.model.layers[0].register_forward_pre_hook(look)
    run(corpus, tmp_path, model=model, job=job)
    assert shares[0] < 0.3 < 0.45 < shares[-1]


def test_prompts_with_little_room_and_answers_without_a_prompt_are_counted(corpus, tmp_path):
    run(corpus, tmp_path, {"share": 1.0, "max_new_tokens": 40}, steps=1)
    assert read_records(tmp_path / "metrics.jsonl")[-1]["on_policy"]["short_share"] == 1
    numbered, on_policy = first_step(corpus), policy(corpus)
    first = numbered[0][1]
    whole = {**first, "learned": torch.ones_like(first["learned"])}
    assert on_policy(llama(0), [(0, whole)], 0, 1) == [
        (0, whole)
    ]  # nothing to write for: those of the data are learned
    whole["learned"] = torch.cat([whole["learned"][:1], first["learned"][1:]])
    ((_, written),) = on_policy(llama(0), [(0, whole)], 0, 1)
    assert len(written["input_ids"]) == len(first["input_ids"]) - 1
    found = on_policy.read(Accelerator(cpu=True))
    assert (found["share"], found["answers"], found["left_out"]) == (0.5, 3, 1)
    assert on_policy.read(Accelerator(cpu=True))["mean_tokens"] is None  # since the last look


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_sharded_weights_cannot_write(kind):
    with pytest.raises(
        InputError, match=r"training\.on_policy does not go with .*: to write, a rank needs all weights"
    ):
        check_launch_keeps(Training(steps=1, on_policy=OWN), kind)
