"""The task `embedding` from pairs of texts to a release whose vectors sentence-transformers, too, gets."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from embeddings import FIT, PROMPTS, RECIPE, SPECIALS, WORDS, project, word_tokenizer
from made_data import small_minilm
from safetensors.numpy import load_file as load_arrays
from safetensors.torch import load_file
from tiny import tiny_model

from distill.cli import main
from distill.data import TASKS, load_corpus
from distill.evaluation.arms import controls, measured_arms, not_run, rivals
from distill.models.sentence import SentenceHead, sentence_head
from distill.recipe import load_recipe
from distill.recipe.locate import teacher_folder


def evaluated(run):
    found = json.loads((run / "evaluation.json").read_text())
    return {arm["name"]: arm["metrics"] for arm in found["arms"]}, found


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vectors")
    recipe = project(folder, head=SentenceHead(("mean",), normalize=True, max_length=32, prompts=PROMPTS))
    assert main(["run", str(recipe), *FIT, "--out", str(folder / "run")]) == 0
    return folder / "run"


@pytest.mark.slow
def test_distillation_brings_vectors_near_the_teachers_and_keeps_what_it_finds(run):
    arms, found = evaluated(run)
    assert found["primary"] == "mrr_at_10" and list(arms) == ["teacher", "cut", "distilled", "labels_only"]
    assert arms["teacher"]["cosine_to_teacher"] == pytest.approx(1) and arms["teacher"]["neighbours_kept"] == 1
    assert arms["teacher"]["mrr_at_10"] > 0.5  # 0.02 by chance
    for metric in ("mrr_at_10", "ndcg_at_10", "cosine_to_teacher", "neighbours_kept"):
        assert arms["distilled"][metric] > arms["cut"][metric], metric
    assert arms["distilled"]["cosine_to_teacher"] > 0.95
    assert arms["distilled"]["cosine_to_teacher"] > arms["labels_only"]["cosine_to_teacher"] + 0.1


USED = """
import json, sys, warnings
folder, texts, kind = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
if kind == "sentence_transformers":
    from sentence_transformers import SentenceTransformer
    model = SentenceTransformer(folder, device="cpu")
    vectors = [model.encode_query([texts[0]])[0], model.encode_document([texts[1]])[0]]
else:
    import torch
    from transformers import AutoModel, AutoTokenizer
    model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = json.load(open(folder + "/config_sentence_transformers.json"))["prompts"]
    given = [prompts["query"] + texts[0], prompts["document"] + texts[1]]
    with torch.no_grad():
        states = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0] for text in given]
    vectors = [(state.mean(0) / state.mean(0).norm()).numpy() for state in states]
assert "distill" not in sys.modules
print(json.dumps([vector.tolist() for vector in vectors]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sentence_transformers", "transformers"])
def test_the_release_gives_others_the_vectors_that_the_run_measured(run, kind):
    summary = json.loads((run / "data/corpus.json").read_text())["summary"]["test"]
    notes = {f"prompt {text!r}, put in front of texts": summary["used"] for text in PROMPTS.values()}
    notes["texts that begin with 'C0' before it is put in front of them"] = 5  # of the words that texts are made of
    assert summary["notes"] == notes
    example = load_corpus(run / "data", TASKS["embedding"]()).test.take([0])
    sides = np.split(example["input_ids"].flat, example["first"])
    prompted = word_tokenizer().batch_decode(sides)
    texts = [text.removeprefix(prompt) for text, prompt in zip(prompted, PROMPTS.values(), strict=True)]
    assert all(len(text) < len(given) for text, given in zip(texts, prompted, strict=True))
    command = [sys.executable, "-I", "-c", USED, str(run / "release"), json.dumps(texts), kind]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = np.array(json.loads(done.stdout.splitlines()[-1]))
    measured = load_arrays(run / "predictions/distilled.safetensors")
    expected = np.stack([measured["embeddings"][0], measured["pair_embeddings"][0]])
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.slow
def test_the_release_says_how_its_vectors_are_made(run):
    release = run / "release"
    assert sentence_head(release) == SentenceHead(("mean",), True, max_length=16, prompts=PROMPTS)
    sums = (release / "SHA256SUMS").read_text()
    assert "  1_Pooling/config.json\n" in sums and "  modules.json\n" in sums
    card = (release / "README.md").read_text()
    assert "library_name: sentence-transformers" in card and "pipeline_tag: sentence-similarity" in card
    assert "SentenceTransformer(folder)" in card and "It prints:\n\n> (1, 32) \\[" in card


@pytest.mark.slow
def test_the_pooler_that_no_vector_reads_stays_the_teachers(run):
    before, after = (load_file(run / name / "model.safetensors") for name in ("student", "distilled"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert "pooler.dense.weight" in before and not any(name.startswith("pooler.") for name in changed)
    assert "embeddings.word_embeddings.weight" in changed


def test_texts_alone_are_learnt_from_the_teacher_and_have_no_control(tmp_path, capsys):
    alone = RECIPE.replace("columns: {text: query, pair: answer}", "columns: {text: answer}")
    recipe = project(tmp_path, alone.replace("steps: 100", "steps: 30"))
    (tmp_path / "teacher/modules.json").unlink()
    asked = load_recipe(recipe)
    assert (
        measured_arms(asked) == ["teacher", "cut", "distilled"]
        and controls(asked) == []
        and list(rivals(asked)) == ["cut"]
        and not_run(asked)["labels_only"] == "the texts have no labels"
        and not_run(asked)["majority"] == "no answer is the most frequent one in task: embedding"
    )
    assert main(["evaluate", str(recipe), "--out", str(tmp_path / "run")]) == 0
    assert "no modules.json: a text's vector is the mean of its last hidden states" in capsys.readouterr().err
    arms, found = evaluated(tmp_path / "run")
    assert found["primary"] == "cosine_to_teacher" and found["metrics"] == ["cosine_to_teacher", "neighbours_kept"]
    assert arms["distilled"]["cosine_to_teacher"] > arms["cut"]["cosine_to_teacher"]


def test_rated_pairs_are_measured_by_spearman(tmp_path):
    rated = RECIPE.replace("pair: answer}", "pair: answer, score: grade}").replace("steps: 100", "steps: 2")
    assert main(["evaluate", str(project(tmp_path, rated)), "--out", str(tmp_path / "run")]) == 0
    arms, found = evaluated(tmp_path / "run")
    assert found["metrics"] == ["spearman", "cosine_to_teacher", "neighbours_kept"]
    assert -1 <= arms["teacher"]["spearman"] <= 1


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("losses.0={match: labels}", "losses.0.match: learns that text and pair belong together"),
        ("teacher.fit={steps: 1}", "teacher.fit: learns that text and pair belong together"),
        ("evaluation.arms=[distilled, labels_only]", "evaluation.arms.1: learns that text and pair"),
        ("evaluation.metrics=[mrr_at_10]", "mrr_at_10 needs a pair without a score"),
        ("evaluation.metrics=[spearman]", "spearman needs a score"),
        ("evaluation.metrics=[accuracy]", "task: embedding has no such metric as accuracy"),
        ("training={steps: 2, evaluate_every: 1, keep_best: ndcg_at_10}", "ndcg_at_10 needs a pair"),
        ("data.columns={text: query, score: grade}", "a score is that of a text and its pair"),
        ("data.prompts={pair: x}", "pair is no column with a prompt of its own here"),
        ("data.labelled=5", "data.labelled: has no effect with task: embedding"),
        ("student.mlp.score=taylor", "reads gradients of the loss of single examples"),
        ("student.calibration.gradients=true", "an embedding has no loss of single examples"),
        ("data.max_length=40", "settings cut texts to 32"),
    ],
)
def test_what_an_embedding_does_not_have_is_refused(override, words, tmp_path, capsys):
    alone = RECIPE.replace("columns: {text: query, pair: answer}", "columns: {text: query}")
    recipe = project(tmp_path, alone, SentenceHead(max_length=32))
    assert main(["train", str(recipe), override, "--out", str(tmp_path / "run")]) == 2
    assert words in " ".join(capsys.readouterr().err.split())


def test_classes_have_no_vectors_to_compare(tmp_path, capsys):
    other = RECIPE.replace("task: embedding, columns: {text: query, pair: answer}",
                           "task: classification, columns: {text: query, label: answer}")  # fmt: skip
    assert main(["validate", str(project(tmp_path, other))]) == 2
    assert "match: output compares sentence embeddings, and task: classification makes none" in capsys.readouterr().err


def test_a_metric_of_vectors_is_none_of_classes(tmp_path, capsys):
    other = RECIPE.replace("task: embedding, columns: {text: query, pair: answer}",
                           "task: classification, columns: {text: query, label: answer}")  # fmt: skip
    recipe = project(tmp_path, other.replace("match: output, loss: cosine", "match: logits"))
    assert main(["validate", str(recipe), "evaluation.metrics=[neighbours_kept]"]) == 2
    assert "task: classification has no such metric as neighbours_kept" in capsys.readouterr().err


def test_an_encoder_decoder_has_no_vectors(tmp_path, capsys):
    recipe = project(tmp_path)
    tiny_model("t5", vocab_size=len(SPECIALS) + len(WORDS)).save_pretrained(tmp_path / "teacher")
    assert main(["train", str(recipe), "--out", str(tmp_path / "run")]) == 2
    assert "the vectors of an encoder-decoder (t5) cannot be distilled" in " ".join(capsys.readouterr().err.split())


MINILM = Path(__file__).parents[2] / "recipes/embedding-minilm/recipe.yaml"


@pytest.mark.slow
def test_the_recipe_of_minilm_runs_on_a_tiny_teacher_of_the_same_form(tmp_path):
    package = teacher_folder(load_recipe(MINILM).teacher.model, tmp_path)
    tiny = [*small_minilm(tmp_path), "data.limit=120", "evaluation.efficiency=false"]
    few = ["training.steps=3", "training.batch_size=8"]
    assert main(["run", str(MINILM), *tiny, *few, "--out", str(tmp_path / "run")]) == 0
    arms, found = evaluated(tmp_path / "run")
    assert found["primary"] == "cosine_to_teacher" and arms.keys() == {"teacher", "cut", "distilled", "labels_only"}
    limited = replace(sentence_head(package), max_length=load_recipe(MINILM).data.max_length)
    assert sentence_head(tmp_path / "run/release") == limited
