"""A step with the teacher live, from cached hidden states, and from its cached most likely tokens, in turns.

    python scripts/benchmarks/cached_teacher.py
    python scripts/benchmarks/cached_teacher.py --hidden 512 --ffn 1376 --rounds 10
    python scripts/benchmarks/cached_teacher.py --match-layers

Teacher and student (half of its layers) are random Llamas over 8,192 tokens, which a tokenizer has learned from the
help of Python itself; rows hold whole documents. The caches are filled by the stage, in a folder that is
removed at the end.
fp32, one thread, CPU time, so that other work on the machine changes little: each round takes one step of every arm,
and the median over rounds of the ratios within a round counts. The loader, which reads the cache, is part of a step.

    step       seconds, the median; rel: over the live one of the same round
    bytes      on disk per token of the training data
    reading    tokens per second that the cache gives, files open, and how many times the speed of training that is
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
VOCABULARY, LENGTH = 8192, 256
RECIPE = """
name: cached
teacher: {{model: ./teacher{cache}}}
student: {{layers: {{keep: {keep}, choose: even}}, calibration: {{examples: 8, batch_size: 8}}}}
data: {{source: pydoc-topics, task: causal_lm, max_length: {length}}}
losses: [{{match: logits}}{more}]
training: {{steps: {steps}, batch_size: 8, lr: 1e-5}}
evaluation: {{batch_size: 8}}
"""
ARMS = {
    "live": "",
    "hidden, fp32": ", cache: {keep: hidden, dtype: fp32}",
    "hidden, bf16": ", cache: {keep: hidden}",
    "topk, k 16": ", cache: {keep: topk, k: 16}",
    "topk, k 64": ", cache: {keep: topk}",
}


def main() -> None:
    """Fill a cache for each arm, then take their steps in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--ffn", type=int, default=688)
    parser.add_argument("--layers", type=int, default=8, help="of the teacher; the student has half")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--match-layers", action="store_true", help="compare the outputs of mapped layers as well")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DISTILL_CACHE"] = f"{folder}/cache"
        measure(Path(folder), options)


def write_teacher(folder: Path, options: argparse.Namespace) -> None:
    """A random Llama and the tokenizer of its vocabulary."""
    from pydoc_data.topics import topics

    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ByteLevelBPETokenizer()
    words.train_from_iterator(topics.values(), VOCABULARY, special_tokens=["<pad>", "</s>"], show_progress=False)
    names = {"pad_token": "<pad>", "eos_token": "</s>", "model_max_length": 2 * LENGTH}
    PreTrainedTokenizerFast(tokenizer_object=words._tokenizer, **names).save_pretrained(folder)
    sizes = {"hidden_size": options.hidden, "intermediate_size": options.ffn, "num_hidden_layers": options.layers}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 2 * LENGTH}
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes, **heads, **ids)).save_pretrained(folder)


def measure(folder: Path, options: argparse.Namespace) -> None:
    """Print the table."""
    import torch
    import transformers

    from distill.pipeline import VERBS, RunDir, Session, run_stages
    from distill.recipe import load_recipe

    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    write_teacher(folder / "teacher", options)
    more, keep = ", {match: hidden}" if options.match_layers else "", options.layers // 2
    arms, known, steps = {}, set(), options.rounds + 1
    for name, cache in ARMS.items():
        text = RECIPE.format(cache=cache, keep=keep, length=LENGTH, more=more, steps=steps)
        (folder / "recipe.yaml").write_text(text)
        run = RunDir(folder / "run")
        recipe = load_recipe(folder / "recipe.yaml")
        session = Session(recipe, folder, run, lambda _line: None, accept_weak_teacher=True)
        run_stages(session, VERBS["cache"])
        files = {*folder.glob("cache/teachers/*/*/*")} - known
        known |= files
        arms[name] = Arm(session, steps, sum(path.stat().st_size for path in files))
    for arm in arms.values():  # files are opened and looked at, and everything is warm
        arm.reading_rate()
        arm.step()
    rounds = [{name: arm.step() for name, arm in arms.items()} for _ in range(options.rounds)]
    tokens = sum(int(batch["attention_mask"].sum()) for batch in arms["live"].batches())
    per_step = tokens / steps
    print(f"{tokens} tokens in {steps} steps, {options}")
    print(f"{'arm':<14}{'step':>8}{'rel':>7}{'tokens/s':>10}{'bytes':>8}{'reading':>12}{'times':>8}")
    for name, arm in arms.items():
        step = statistics.median(each[name] for each in rounds)
        rel = statistics.median(each[name] / each["live"] for each in rounds)
        rate = arm.reading_rate()
        reading = f"{rate:>10.0f}/s{rate * step / per_step:>7.0f}x" if rate else f"{'-':>12}{'-':>8}"
        size = f"{arm.bytes / tokens:.0f}" if arm.bytes else "-"
        print(f"{name:<14}{step:>8.3f}{rel:>7.2f}{per_step / step:>10.0f}{size:>8}{reading}", flush=True)


class Arm:
    """One student with its teacher."""

    def __init__(self, session, steps: int, kept: int):
        import torch

        from distill.evaluation.arms import terms_of
        from distill.pipeline.cached_columns import find_teacher
        from distill.pipeline.train import objective_of
        from distill.training.model import DistillModel

        self.bytes, self.session, self.number = kept, session, steps
        objective = objective_of(session, "distilled")
        self.teacher = find_teacher(session, terms_of(session.recipe, "distilled"), objective)
        self.model = DistillModel(session.load(session.arm_start("distilled")), objective).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5)

    def batches(self, extend=None):
        """The batch of every step."""
        from distill.pipeline.train import batches_for

        batches = batches_for(self.session, self.session.recipe.training, labelled=False)
        for ((_, batch),) in replace(batches, extend=extend).stream(0, self.number, 0, 1):
            yield batch

    def step(self) -> float:
        """Take one step, its batch included; returns its CPU seconds."""
        start = time.process_time()
        batch = next(self.steps)
        loss, _ = self.model(batch, self.teacher(batch), self.model.objective.counts([batch]))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.process_time() - start

    def reading_rate(self) -> float | None:
        """Tokens per second of looking up and copying what the cache has; None of a live teacher."""
        from distill.teacher import CachedTeacher

        cached = isinstance(self.teacher, CachedTeacher)
        self.steps = self.batches(self.teacher.add if cached else None)
        tokens, seconds = 0, 0.0
        for batch in self.batches() if cached else ():
            began = time.process_time()
            self.teacher.add(batch)
            seconds += time.process_time() - began
            tokens += int(batch["attention_mask"].sum())
        return tokens / seconds if cached else None


if __name__ == "__main__":
    main()
