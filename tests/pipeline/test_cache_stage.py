"""The stage that fills the cache of a teacher: shared, made once, whole after any kill, looked at when it is read."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections import namedtuple

import pytest
from caching import EXACT, LAYERS, cached, masked_project, session_of, trained_project
from forked import Processes

import distill.pipeline.cached_inputs
from distill.cli import main
from distill.errors import InputError
from distill.evaluation.arms import terms_of
from distill.pipeline import cache
from distill.pipeline.cached_columns import find_teacher
from distill.pipeline.train import batches_for, objective_of
from distill.training.provenance import flatten

THERE = "  all of it is there, from an earlier run; the teacher is not loaded"


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """A cache for this test alone, with small shards."""
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(distill.pipeline.cached_inputs, "LEAST", 128)
    return tmp_path / "cache/teachers"


def files_in(folder):
    """Everything that is in a folder, but for the file that is locked."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "lock"}


def shards_in(root, column="last.fp32"):
    return sorted(root.glob(f"*/{column}/*.safetensors"))


def flip(path):
    """Change one byte of what a file holds."""
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def test_a_second_recipe_with_the_same_teacher_and_data_finds_the_cache(tmp_path, own_cache):
    _, lines = cached(tmp_path, trained_project, LAYERS, EXACT, "training.steps=40")
    assert len(shards_in(own_cache)) > 3 and THERE not in lines
    before = files_in(own_cache)
    rows = (tmp_path / "data.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "data.jsonl").write_text("".join(reversed(rows)))
    weights = "losses=[{match: logits, weight: 0.2}, {match: hidden, weight: 3}, {match: embeddings}]"
    other = ("training.micro_batch_size=2", "training.lr=1e-5", "evaluation.batch_size=3", "training.steps=60")
    _, lines = cached(tmp_path, trained_project, weights, EXACT, *other, run="other")
    assert THERE in lines
    assert files_in(own_cache) == before


def test_another_student_adds_only_the_layers_that_are_missing(tmp_path, own_cache):
    cached(tmp_path, trained_project, LAYERS, EXACT)
    before = files_in(own_cache)
    _, lines = cached(tmp_path, trained_project, LAYERS, EXACT, "student.layers.choose=last", run="other")
    now = files_in(own_cache)
    added = {name.split("/")[1] for name in now.keys() - before.keys()}
    assert now.items() >= before.items() and added and all(name.startswith("hidden.") for name in added)
    assert any(line.endswith("of it is missing") for line in lines)


def test_only_what_changes_the_outputs_makes_the_cache_due(tmp_path, own_cache):
    first = flatten(cache.inputs(cached(tmp_path, trained_project, LAYERS, EXACT)[0]))

    def changed(*overrides):
        now = flatten(cache.inputs(session_of(tmp_path, trained_project, *overrides)[0]))
        return {key.partition(".")[0] for key in first.keys() | now.keys() if first.get(key) != now.get(key)}

    assert changed(LAYERS.replace("match: logits", "match: logits, weight: 0.1"), EXACT, "training.lr=1") == set()
    assert changed(LAYERS, "teacher.cache={keep: hidden}") == {"kept"}
    assert changed(LAYERS, "teacher.cache={keep: topk, dtype: fp32, k: 4}") == {"kept"}
    assert changed("losses=[{match: logits}]", EXACT) == {"kept"}
    assert changed(LAYERS, EXACT, "teacher.dtype=bf16") == {"teacher"}
    assert changed(LAYERS, EXACT, "training.precision=bf16") == {"teacher"}
    first = flatten(cache.inputs(session_of(tmp_path, trained_project, LAYERS, EXACT, "teacher.dtype=fp8")[0]))
    assert changed(LAYERS, EXACT, "teacher.dtype=fp8", "teacher.fp8_max_kl=1") == {"teacher"}


def test_inputs_that_the_training_never_sees_are_not_kept(tmp_path, own_cache):
    few, _ = cached(tmp_path, trained_project, EXACT, "training.steps=1")
    entries = distill.pipeline.cached_inputs.find_entries(few, [])
    assert len(entries.examples) == 8 < len(few.corpus.train)


def test_masked_tokens_are_kept_as_the_training_will_draw_them(tmp_path, own_cache):
    session, _ = cached(tmp_path, masked_project, LAYERS, EXACT)
    entries = distill.pipeline.cached_inputs.find_entries(session, [])
    assert len(entries.examples) == 6 * 8  # every step draws anew
    more, lines = cached(tmp_path, masked_project, LAYERS, EXACT, "training.steps=7")
    assert any("seen" in line for line in lines if line.startswith("cache: runs again"))
    assert len(distill.pipeline.cached_inputs.find_entries(more, []).examples) == 7 * 8


def reading(session, steps=6):
    """What training reads, micro-batch by micro-batch."""
    kept = find_teacher(session, terms_of(session.recipe, "distilled"), objective_of(session, "distilled"))
    for step in batches_for(session, session.recipe.training, labelled=False).stream(0, steps, 0, 1):
        for _, batch in step:
            kept(batch)


def test_a_control_that_learns_for_longer_finds_its_inputs_as_well(tmp_path, own_cache):
    longer = [
        "evaluation.arms=[teacher, distilled, random_cut, labels_only]",
        "evaluation.controls.labels_only.steps=99",
    ]
    longer.append("evaluation.controls.random_cut.grid={steps: [7, 9]}")
    session, _ = cached(tmp_path, masked_project, LAYERS, EXACT, *longer)
    reading(session, steps=9)
    assert len(distill.pipeline.cached_inputs.find_entries(session, []).examples) == 9 * 8


def damage(path, how, others):
    if how == "a flipped byte":
        flip(path)
    elif how == "cut short":
        path.write_bytes(path.read_bytes()[:-100])
    elif how == "from another place":
        sha = others[1].name.partition("-")[2]
        path.unlink()
        shutil.copy(others[1], path.with_name(f"{path.name.partition('-')[0]}-{sha}"))
    else:
        path.unlink()


DAMAGE = {
    "a flipped byte": "is not what was written: its sha256 is another one",
    "cut short": "is not what was written: its sha256 is another one",
    "from another place": "belongs to",
    "gone": "this part of the cached teacher is gone",
}


@pytest.mark.parametrize("how", DAMAGE)
def test_damage_is_caught_before_it_is_read_and_the_same_command_mends_it(how, tmp_path, own_cache):
    session, _ = cached(tmp_path, trained_project, EXACT)
    before, shards = files_in(own_cache), shards_in(own_cache)
    reading(session)
    damage(shards[0], how, shards)
    with pytest.raises(InputError, match=DAMAGE[how]):
        reading(session)
    _, lines = cached(tmp_path, trained_project, EXACT)
    assert any(line.startswith("cache: runs again (gone:") for line in lines)
    assert files_in(own_cache) == before
    reading(session)


@pytest.mark.parametrize("how", [how for how in DAMAGE if how != "gone"])
def test_damage_that_the_stage_finds_is_mended_with_a_line(how, tmp_path, own_cache):
    cached(tmp_path, trained_project, EXACT)
    before, shards = files_in(own_cache), shards_in(own_cache)
    damage(shards[0], how, shards)
    _, lines = cached(tmp_path, trained_project, EXACT, run="other")
    assert any(DAMAGE[how] in line and line.endswith("; made anew") for line in lines)
    assert files_in(own_cache) == before


def test_a_cache_that_was_deleted_is_made_again(tmp_path, own_cache):
    cached(tmp_path, trained_project, EXACT)
    before = files_in(own_cache)
    shutil.rmtree(own_cache)
    _, lines = cached(tmp_path, trained_project, EXACT)
    assert any(line.startswith("cache: runs again (gone:") and " more)" in line for line in lines)
    assert files_in(own_cache) == before


def test_a_disk_that_is_too_small_is_refused_before_the_teacher_runs(tmp_path, own_cache, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(10**9, 10**9, 1000))
    with pytest.raises(InputError, match=r"teacher.cache needs .* MB more, and .*teachers has 0.0 MB free"):
        cached(tmp_path, trained_project, EXACT)
    assert not shards_in(own_cache)


def test_the_output_head_is_part_of_what_a_cache_takes(tmp_path, own_cache, monkeypatch):
    session, lines = cached(tmp_path, trained_project, EXACT)
    columns = cache.wanted_columns(session)
    sizes = cache.sizes_of(session, columns, distill.pipeline.cached_inputs.find_entries(session, columns).positions)
    assert sizes["head"] == 64 * 32 * 4 and any(", head 0.0 MB, in " in line for line in lines)
    shutil.rmtree(own_cache)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(10**9, 10**9, sum(sizes.values()) - 1))
    with pytest.raises(InputError, match=r"teacher.cache needs .* MB more"):
        cached(tmp_path, trained_project, EXACT)


def fill(recipe, run, *overrides):
    """Fill a cache by the command line, as a process of its own."""
    distill.pipeline.cached_inputs.LEAST = 64
    settings = ["training.steps=60", EXACT, *overrides, "--out", str(run), "--accept-weak-teacher"]
    raise SystemExit(main(["cache", str(recipe), *settings]))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_cache_that_was_killed_again_and_again_is_the_one_that_never_was(ranks, tmp_path):
    recipe, chooser, killed = trained_project(tmp_path), random.Random(ranks), 0

    def start(name):
        return Processes(
            tmp_path / f"log-{name}",
            fill,
            recipe,
            tmp_path / name,
            ranks=ranks,
            DISTILL_CACHE=str(tmp_path / f"c-{name}"),
        )

    whole = start("whole")
    assert whole.wait() == [0] * ranks, whole.said
    expected = files_in(tmp_path / "c-whole/teachers")
    shards = len(shards_in(tmp_path / "c-whole/teachers"))
    assert shards >= 15
    for goal in sorted(chooser.sample(range(1, shards), 3)):
        running = start("killed")
        while len(shards_in(tmp_path / "c-killed/teachers")) < goal and running.each[0].is_alive():
            time.sleep(0.001)
        killed += running.each[0].is_alive()
        running.kill()
        assert files_in_whole(tmp_path / "c-killed/teachers").items() <= expected.items(), "what is there is whole"
    last = start("killed")
    assert last.wait() == [0] * ranks, last.said
    assert killed and files_in(tmp_path / "c-killed/teachers") == expected


def files_in_whole(folder):
    """The finished files; one that was being written when the process was killed has another name."""
    return {name: content for name, content in files_in(folder).items() if not name.rpartition("/")[2].startswith(".")}


def test_two_runs_at_once_fill_one_cache_between_them(tmp_path):
    recipe = trained_project(tmp_path)
    each = [
        Processes(tmp_path / f"log{n}", fill, recipe, tmp_path / f"run{n}", DISTILL_CACHE=str(tmp_path / "c"))
        for n in "12"
    ]
    assert [process.wait() for process in each] == [[0], [0]], [process.said for process in each]
    alone = Processes(tmp_path / "log3", fill, recipe, tmp_path / "run3", DISTILL_CACHE=str(tmp_path / "d"))
    assert alone.wait() == [0], alone.said
    assert files_in(tmp_path / "c/teachers") == files_in(tmp_path / "d/teachers")


def trained(recipe, run, *overrides):
    raise SystemExit(main(["train", str(recipe), *overrides, "--out", str(run), "--accept-weak-teacher"]))


@pytest.mark.slow
def test_one_process_live_and_two_from_the_cache_train_alike(tmp_path):
    recipe, losses = trained_project(tmp_path), {}
    settings = [LAYERS, "training.steps=50", "training.log_every=1", "training.save_every=0"]
    half = ["teacher.cache={}"]
    for name, ranks, own in (("live", 1, []), ("one", 1, [EXACT]), ("two", 2, [EXACT]), ("half", 2, half)):
        given = [recipe, tmp_path / name, *settings, *own]
        started = Processes(tmp_path / f"{name}.log", trained, *given, ranks=ranks, DISTILL_CACHE=str(tmp_path / "c"))
        assert started.wait() == [0] * ranks, started.said
        rows = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        losses[name] = [row["loss"] for row in rows if row["event"] == "train"]
    assert len(losses["live"]) == 50
    for name, tolerance in (("one", 1e-6), ("two", 1e-6), ("half", 1e-3)):
        assert losses[name] == pytest.approx(losses["live"], abs=tolerance), name
