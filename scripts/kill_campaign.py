"""Kill training with SIGKILL again and again, give the same command each time, and compare the final weights.

    python scripts/kill_campaign.py recipes/smoke/recipe.yaml --kills 100 --in-saves 50
    python scripts/kill_campaign.py recipes/smoke/recipe.yaml --in-saves 50 training.save_every=5
    python scripts/kill_campaign.py recipes/smoke/recipe.yaml --in-saves 50 --plain

`--kills` are at random moments of training, `--in-saves` at random moments between the start of a save and the
publication of its checkpoint, which is written behind training. A kill counts as one in saving only where the save had
begun and its end was not told; others that were meant for a save come on top, and
are counted apart. Whenever training comes to its end, its weights are compared with those of an uninterrupted run, and
it starts anew until all kills are spent. `--plain` does the same to a bare loop around `accelerator.save_state`, for
comparison.

Prints one JSON object. Exit code 0 when every training ended at the same weights to the last bit and the newest
published checkpoint was intact after every kill, 1 otherwise.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from zipfile import BadZipFile, ZipFile

# The same number of threads in every run: sums over threads are rounded in another order otherwise.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
MADE_BY_TRAINING = ("checkpoints", "metrics.jsonl", "distilled", "stages/train.json", "plain")
Notify = Callable[[str], None]


def main() -> int:
    """Run once without interruption, then kill until all kills are spent."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--in-saves", type=int, default=0)
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/kill-campaign"))
    parser.add_argument("overrides", nargs="*", metavar="KEY.PATH=VALUE")
    options = parser.parse_intermixed_args()  # overrides may follow the options
    campaign = Campaign(options)
    moments = ["training"] * options.kills + ["saving"] * options.in_saves
    campaign.chooser.shuffle(moments)
    for moment in moments:
        campaign.kill(moment)
    campaign.finish()
    print(json.dumps(campaign.counts, indent=1))
    lost = ("newest checkpoint unusable", "ended at other weights", "could not continue")
    return 1 if any(campaign.counts[name] for name in lost) else 0


class Campaign:
    """The run that is killed, and what became of it."""

    def __init__(self, options: argparse.Namespace):
        import distill.pipeline  # noqa: F401  # once, so that a forked run starts at once

        self.work = plain_run if options.plain else distill_run
        self.usable = plain_usable if options.plain else usable
        self.arguments = [options.recipe, *options.overrides]
        self.chooser, self.counts = random.Random(options.seed), Counter()
        self.killed, whole = options.out / "killed", options.out / "whole"
        for folder in (whole, self.killed):
            shutil.rmtree(folder, ignore_errors=True)
        options.out.mkdir(parents=True, exist_ok=True)
        self.log = options.out / "log"
        built = Run(lambda notify: distill_run([*self.arguments, "--out", str(whole)], notify, "build"), self.log)
        assert built.ended() == 0, "the uninterrupted run failed, see the log"
        shutil.copytree(whole, self.killed)
        start = time.monotonic()
        run = self.start(whole)
        run.wait_for("training")
        self.seconds = -time.monotonic()
        assert run.ended() == 0, "the uninterrupted run failed, see the log"
        self.seconds += time.monotonic()
        self.save_seconds = run.slowest_save
        self.expected = digest(whole)
        print(f"uninterrupted: {time.monotonic() - start:.1f} s, slowest save {self.save_seconds:.3f} s", flush=True)

    def start(self, folder: Path) -> "Run":
        """Give the command."""
        return Run(lambda notify: self.work([*self.arguments, "--out", str(folder)], notify), self.log)

    def kill(self, moment: str) -> None:
        """Give the command and kill it, again until it was at such a moment."""
        missed = True
        while missed:
            run = self.start(self.killed)
            if not (self.reached(run, moment) and run.kill()):
                self.compare(run.ended())
                continue
            missed = moment == "saving" and not run.saving
            self.counts["kills that missed the save" if missed else f"kills in {moment}"] += 1
            if not self.usable(self.killed):
                self.counts["newest checkpoint unusable"] += 1

    def reached(self, run: "Run", moment: str) -> bool:
        """Wait until a random part of that moment has passed; False when the run ended before it."""
        saving = moment == "saving"
        if not run.wait_for(moment, self.chooser.randrange(3) if saving else 0):
            return False
        span = self.save_seconds if saving else 0.6 * self.seconds
        time.sleep(self.chooser.uniform(0, 1.2 * span))  # longer than any save yet: none has an end that is never hit
        return True

    def finish(self) -> None:
        """Let the last one come to its end."""
        self.compare(self.start(self.killed).ended())

    def compare(self, code: int) -> None:
        """Compare the weights of a training that came to its end, and remove what it made."""
        if code:
            self.counts["could not continue"] += 1
        else:
            same = digest(self.killed) == self.expected
            self.counts["ended at the same weights" if same else "ended at other weights"] += 1
        for name in MADE_BY_TRAINING:
            path = self.killed / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


class Run:
    """A forked process that tells when it trains and when it saves."""

    def __init__(self, work: Callable[[Notify], int], log: Path):
        self.reading, writing = os.pipe()
        self.slowest_save = 0.0
        self.saving = False
        """True when the last that was told is the start of a save; after `kill`: when that was inside one."""
        self.code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            with open(log, "a") as file:
                os.dup2(file.fileno(), 2)
            try:
                os._exit(work(lambda text: os.write(writing, f"{text}\n".encode()) and None))
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        os.close(writing)
        self.lines = os.fdopen(self.reading)

    def wait_for(self, moment: str, skip: int = 0) -> bool:
        """Wait for that moment, after so many that are let through; False when the end came first."""
        for line in self.lines:
            self._note(line)
            if line.strip() == moment:
                if not skip:
                    return True
                skip -= 1
        return False

    def kill(self) -> bool:
        """Send SIGKILL, and read what it told before; False when the process had come to its end before."""
        os.kill(self.pid, signal.SIGKILL)
        return self.ended() == -signal.SIGKILL

    def ended(self) -> int:
        """Wait for the exit code."""
        if self.code is None:
            for line in self.lines:
                self._note(line)
            self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            self.lines.close()
        return self.code

    def _note(self, line: str) -> None:
        word, _, seconds = line.strip().partition(" ")
        if word == "saved":
            self.slowest_save = max(self.slowest_save, float(seconds))
        if word in ("saving", "saved"):
            self.saving = word == "saving"


def telling(function: Callable, notify: Notify) -> Callable:
    """Wrap a function that saves, to say when it starts and how long it took."""

    def wrapped(*arguments, **named):
        notify("saving")
        start = time.monotonic()
        result = function(*arguments, **named)
        notify(f"saved {time.monotonic() - start}")
        return result

    return wrapped


def distill_run(arguments: list[str], notify: Notify, verb: str = "train") -> int:
    """Run the command line in this process."""
    import distill.pipeline.train
    from distill.cli import main as command_line
    from distill.training.flight import Flight
    from distill.training.writer import CheckpointWriter

    train, save, write = distill.pipeline.train.train, CheckpointWriter.save, Flight.run
    began = 0.0

    def told(*given, **named):
        notify("training")
        return train(*given, **named)

    def begun(*given, **named):
        nonlocal began
        notify("saving")
        began = time.monotonic()
        save(*given, **named)

    def published(flight):
        write(flight)
        notify(f"saved {time.monotonic() - began}")

    distill.pipeline.train.train = told
    CheckpointWriter.save, Flight.run = begun, published
    return command_line([verb, *arguments])


def usable(folder: Path) -> bool:
    """Tell whether the newest published checkpoint is intact, or there is none yet."""
    from distill.training.checkpoint import fault_of

    newest = max((folder / "checkpoints").glob("step-*"), default=None)
    return newest is None or fault_of(newest) is None


def plain_run(arguments: list[str], notify: Notify) -> int:
    """Train the same student for as many steps in a bare loop, with at most two checkpoints of Accelerate's own."""
    import torch
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration
    from transformers import AutoModel

    from distill.recipe import load_recipe

    spec, folder = load_recipe(arguments[0], arguments[1:-2]).training, Path(arguments[-1])
    automatic = ProjectConfiguration(str(folder / "plain"), automatic_checkpoint_naming=True, total_limit=2)
    accelerator = Accelerator(project_config=automatic)
    torch.manual_seed(0)
    model = AutoModel.from_pretrained(folder / "student").train()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True))
    numbers = sorted(int(path.name.split("_")[1]) for path in (folder / "plain/checkpoints").glob("checkpoint_*"))
    if numbers:
        accelerator.load_state()
        accelerator.project_configuration.iteration = numbers[-1] + 1
    notify("training")
    done = (numbers[-1] + 1) * spec.save_every if numbers else 0
    save = telling(accelerator.save_state, notify)
    for step in range(done, spec.steps):
        ids = torch.randint(5, 60, (8, 16), generator=torch.Generator().manual_seed(step))
        accelerator.backward(model(input_ids=ids).last_hidden_state.square().mean())
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % spec.save_every == 0:
            save()
    accelerator.save_model(model, folder / "distilled")
    return 0


def plain_usable(folder: Path) -> bool:
    """Tell whether every file of the newest checkpoint can be read; what torch saved is a zip, whose sums say so."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    newest = max((folder / "plain/checkpoints").glob("*"), key=lambda path: int(path.name[11:]), default=None)
    if newest is None:
        return True
    try:
        load_file(newest / "model.safetensors")
        return all(ZipFile(newest / name).testzip() is None for name in ("optimizer.bin", "random_states_0.pkl"))
    except (OSError, SafetensorError, BadZipFile):
        return False


def digest(folder: Path) -> str:
    """Return the hex sha256 of the trained weights."""
    return hashlib.sha256((folder / "distilled/model.safetensors").read_bytes()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
