"""Kill a run with SIGKILL while it fills the cache of its teacher, again and again, and compare the files at the end.

    python scripts/kill_caching.py recipes/smoke/recipe.yaml --kills 20 'teacher.cache={keep: topk}'

The first run is not interrupted. Then the same command is killed at random moments of the stage `cache`, each time at
another one, and given again; whenever it comes to its end, its files are compared with those of the first run and the
cache is emptied, until all kills are spent. Shards are small (--tokens), so that there are many.

Prints one JSON object. Exit code 0 when every cache ended with the same files, byte by byte, and after every kill each
published file was one of them; 1 otherwise.
"""

import argparse
import json
import os
import random
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

from kill_campaign import Notify, Run


def main() -> int:
    """Run once without interruption, then kill until all kills are spent."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a shard")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/kill-caching"))
    parser.add_argument("overrides", nargs="*", metavar="KEY.PATH=VALUE")
    options = parser.parse_intermixed_args()
    import distill.pipeline  # noqa: F401  # once, so that a forked run starts at once

    shutil.rmtree(options.out, ignore_errors=True)
    options.out.mkdir(parents=True)
    chooser, counts, log = random.Random(options.seed), Counter(), options.out / "log"
    arguments = [options.recipe, *options.overrides, "--out", str(options.out / "run")]
    whole = Run(lambda notify: fill(arguments, options.out / "whole", options.tokens, notify), log)
    assert whole.wait_for("caching"), "the uninterrupted run failed, see the log"
    seconds = -time.monotonic()
    assert whole.ended() == 0, "the uninterrupted run failed, see the log"
    seconds += time.monotonic()
    expected = files_in(options.out / "whole")
    print(f"uninterrupted: {seconds:.1f} s, {len(expected)} files", flush=True)
    killed, left = options.out / "killed", options.kills
    while True:
        (options.out / "run/stages/cache.json").unlink(missing_ok=True)
        run = Run(lambda notify: fill(arguments, killed, options.tokens, notify), log)
        if left and run.wait_for("caching"):
            time.sleep(chooser.uniform(0, 0.3 * seconds))
            if run.kill():
                left -= 1
                counts["kills"] += 1
                whole_so_far = files_in(killed).items() <= expected.items()
                counts["published files were whole" if whole_so_far else "published files were not whole"] += 1
                continue
        same = run.ended() == 0 and files_in(killed) == expected and not [*killed.rglob(".*.tmp")]
        counts["ended with the same files" if same else "ended with other files"] += 1
        shutil.rmtree(killed / "teachers", ignore_errors=True)
        if not left:
            break
    print(json.dumps(counts, indent=1))
    return 1 if counts["ended with other files"] or counts["published files were not whole"] else 0


def fill(arguments: list[str], cache: Path, tokens: int, notify: Notify) -> int:
    """Run the command line in this process, with a cache of its own."""
    os.environ["DISTILL_CACHE"] = str(cache)
    import distill.pipeline.cache
    import distill.pipeline.cached_inputs
    from distill.cli import main as command_line

    distill.pipeline.cached_inputs.MOST = tokens
    plain = distill.pipeline.cache.Filling.fill

    def told(filling) -> None:
        notify("caching")
        plain(filling)

    distill.pipeline.cache.Filling.fill = told
    return command_line(["cache", *arguments])


def files_in(cache: Path) -> dict[str, bytes]:
    """Read the published files of the teachers in a cache."""
    files = (cache / "teachers").rglob("*.safetensors")
    return {str(path.relative_to(cache)): path.read_bytes() for path in files}


if __name__ == "__main__":
    sys.exit(main())
