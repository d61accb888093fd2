"""Kill training with SIGKILL at random moments, give the same command again, and compare the final weights.

    python scripts/kill_campaign.py recipes/quickstart/recipe.yaml --kills 10
    python scripts/kill_campaign.py recipes/smoke/recipe.yaml --kills 10 training.save_every=20

Exit code 0 when the weights equal those of an uninterrupted run to the last bit, 1 when they do not.
"""

import argparse
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path


def main() -> int:
    """One uninterrupted run, one that is killed again and again, one comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/kill-campaign"))
    parser.add_argument("overrides", nargs="*", metavar="KEY.PATH=VALUE")
    options = parser.parse_intermixed_args()  # overrides may follow the options
    whole, killed = options.out / "whole", options.out / "killed"
    command = [sys.executable, "-m", "distill", "train", options.recipe, *options.overrides, "--out"]
    # The same number of threads in every run: sums over threads are rounded in another order otherwise.
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}
    subprocess.run([*command, whole], check=True, env=environment)
    shutil.rmtree(killed, ignore_errors=True)
    shutil.copytree(whole, killed)
    for made_by_training in ("checkpoints", "metrics.jsonl", "distilled", "stages/train.json"):
        path = killed / made_by_training
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    chooser, hits = random.Random(options.seed), 0
    while hits < options.kills:
        process = subprocess.Popen([*command, killed], env=environment, stderr=subprocess.PIPE, text=True)
        ended = not wait_for_training(process)
        if not ended:
            threading.Thread(target=process.stderr.read, daemon=True).start()  # or the pipe fills up
            time.sleep(chooser.uniform(0.0, 12.0))
            ended = process.poll() is not None
        process.send_signal(signal.SIGKILL)
        process.wait()
        if ended:
            print(f"training ended before kill {hits + 1}; give more steps or fewer kills")
            break
        hits += 1
        newest = max((path.name for path in (killed / "checkpoints").glob("step-*")), default="none")
        print(f"kill {hits}: newest checkpoint {newest}", flush=True)
    subprocess.run([*command, killed], check=True, env=environment)
    first, second = (digest(folder / "distilled/model.safetensors") for folder in (whole, killed))
    verdict = "equal to the last bit" if first == second else "DIFFERENT"
    print(f"{hits} kills; final weights are {verdict}: {second[:16]}")
    return 0 if first == second else 1


def wait_for_training(process: subprocess.Popen) -> bool:
    """Read the run's own lines until training starts; False when it ends before."""
    for line in process.stderr:
        if line.startswith("train: started"):
            return True
        if line.startswith("train: unchanged"):
            return False
    return False


def digest(path: Path) -> str:
    """Hex sha256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
