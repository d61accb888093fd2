"""The task `embedding`: texts and pairs to vectors that sentence-transformers, too, gets from what is released."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import stats
from tiny import tiny_batch, tiny_config, tiny_model
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoModel, PreTrainedTokenizerFast

from distill.cli import main
from distill.data.tasks import TASKS
from distill.data.tasks.task import Encoder, Ragged, Settled
from distill.errors import InputError
from distill.evaluation.arms import controls, measured_arms, rivals
from distill.evaluation.metrics import METRICS
from distill.evaluation.predict import predict
from distill.losses import Objective
from distill.models.forward import Capture, Outputs, forward
from distill.models.sentence import LEGACY, SentenceHead, sentence_head
from distill.recipe import load_recipe
from distill.recipe.schema import Data, Term
from distill.training.step import _split

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
MEANINGS = {f"{letter}{number}": f"{letter.upper()}{number}" for letter in "abcde" for number in range(6)}
"""Words of one language, and what they are called in another."""
WORDS = [*MEANINGS, *MEANINGS.values()]
PROMPTS = {"query": "a0 b0 ", "document": "C0 "}
RECIPE = """\
name: vectors
teacher: {model: ./teacher}
student: {layers: {keep: 1}, mlp: {keep: 0.5, multiple_of: 8}}
data: {source: ./pairs.jsonl, task: embedding, columns: {text: query, pair: answer}, max_length: 16}
losses:
  - {match: output, loss: cosine}
  - {match: logits, temperature: 0.1, scale_by_temperature: false, weight: 0.1}
training: {steps: 120, batch_size: 32, micro_batch_size: 16, lr: 5e-3, log_every: 60}
evaluation: {batch_size: 16, efficiency: false}
release: {license: apache-2.0}
"""
FIT = ("teacher.init=random", "teacher.fit={steps: 150, batch_size: 32, lr: 3e-3}")


def word_tokenizer(words=WORDS, splits=" "):
    found = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*SPECIALS, *words])}, unk_token="[UNK]"))
    found.pre_tokenizer = pre_tokenizers.Split(Regex(splits), "removed" if splits == " " else "isolated")
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=found, model_max_length=64, **names)


def project(folder, recipe=RECIPE, head=None):
    """A recipe beside its teacher and pairs of a text and its translation, in another order."""
    config = tiny_config("bert", vocab_size=len(SPECIALS) + len(WORDS), pad_token_id=0, initializer_range=0.1)
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(folder / "teacher")
    word_tokenizer().save_pretrained(folder / "teacher")
    for name, text in ((head or SentenceHead(normalize=True)).files(config.hidden_size)).items():
        (folder / "teacher" / name).parent.mkdir(exist_ok=True)
        (folder / "teacher" / name).write_text(text)
    chooser = random.Random(0)
    texts = [chooser.sample(list(MEANINGS), chooser.randint(3, 6)) for _ in range(600)]
    rows = [
        {"query": " ".join(text), "answer": " ".join(MEANINGS[word] for word in chooser.sample(text, len(text)))}
        for text in texts
    ]
    lines = [json.dumps({**row, "grade": len(row["answer"]) / 10}) + "\n" for row in rows]
    (folder / "pairs.jsonl").write_text("".join(lines))
    (folder / "recipe.yaml").write_text(recipe)
    return folder / "recipe.yaml"


def evaluated(run):
    found = json.loads((run / "evaluation.json").read_text())
    return {arm["name"]: arm["metrics"] for arm in found["arms"]}, found


# ---- a whole run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vectors")
    recipe = project(folder, head=SentenceHead(("mean",), normalize=True, max_length=32, prompts=PROMPTS))
    assert main(["run", str(recipe), *FIT, "--out", str(folder / "run")]) == 0
    return folder / "run"


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
    from safetensors.numpy import load_file

    corpus = json.loads((run / "data/corpus.json").read_text())["summary"]["test"]
    assert corpus["notes"] == {f"prompt {text!r}, put in front of texts": corpus["used"] for text in PROMPTS.values()}
    measured = load_file(run / "predictions/distilled.safetensors")
    rows = [json.loads(line) for line in (run.parent / "pairs.jsonl").read_text().splitlines()]
    tokenizer = word_tokenizer()
    from distill.data import load_corpus

    ids, first = (load_corpus(run / "data", TASKS["embedding"]()).test.take([0])[name] for name in ("input_ids", "first"))
    row = next(
        row
        for row in rows
        if tokenizer(PROMPTS["query"] + row["query"])["input_ids"] == ids.flat[: first[0]].tolist()
        and tokenizer(PROMPTS["document"] + row["answer"])["input_ids"] == ids.flat[first[0] :].tolist()
    )
    asked = json.dumps([row["query"], row["answer"]])
    command = [sys.executable, "-I", "-c", USED, str(run / "release"), asked, kind]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = np.array(json.loads(done.stdout.splitlines()[-1]))
    expected = np.stack([measured["embeddings"][0], measured["pair_embeddings"][0]])
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_release_says_how_its_vectors_are_made(run):
    release = run / "release"
    assert sentence_head(release) == SentenceHead(("mean",), True, max_length=32, prompts=PROMPTS)
    sums = (release / "SHA256SUMS").read_text()
    assert "  1_Pooling/config.json\n" in sums and "  modules.json\n" in sums
    card = (release / "README.md").read_text()
    assert "library_name: sentence-transformers" in card and "pipeline_tag: sentence-similarity" in card
    assert 'SentenceTransformer(folder)' in card


def test_the_pooler_that_no_vector_reads_stays_the_teachers(run):
    from safetensors.torch import load_file

    before, after = (load_file(run / name / "model.safetensors") for name in ("student", "distilled"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert "pooler.dense.weight" in before and not any(name.startswith("pooler.") for name in changed)
    assert "embeddings.word_embeddings.weight" in changed


# ---- texts alone, and rated pairs


def test_texts_alone_are_learnt_from_the_teacher_and_have_no_control(tmp_path, capsys):
    alone = RECIPE.replace("columns: {text: query, pair: answer}", "columns: {text: answer}")
    recipe = project(tmp_path, alone.replace("steps: 120", "steps: 30"))
    (tmp_path / "teacher/modules.json").unlink()
    asked = load_recipe(recipe)
    assert measured_arms(asked) == ["teacher", "cut", "distilled"] and controls(asked) == [] and list(rivals(asked)) == ["cut"]
    assert main(["evaluate", str(recipe), "--out", str(tmp_path / "run")]) == 0
    assert "no modules.json: a text's vector is the mean of its last hidden states" in capsys.readouterr().err
    arms, found = evaluated(tmp_path / "run")
    assert found["primary"] == "cosine_to_teacher" and found["metrics"] == ["cosine_to_teacher", "neighbours_kept"]
    assert arms["distilled"]["cosine_to_teacher"] > arms["cut"]["cosine_to_teacher"]


def test_rated_pairs_are_measured_by_spearman(tmp_path):
    rated = RECIPE.replace("pair: answer}", "pair: answer, score: grade}").replace("steps: 120", "steps: 2")
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
        ("data.max_length=40", "settings cut texts to 32"),
    ],
)
def test_what_an_embedding_does_not_have_is_refused(override, words, tmp_path, capsys):
    alone = RECIPE.replace("columns: {text: query, pair: answer}", "columns: {text: query}")
    recipe = project(tmp_path, alone, SentenceHead(max_length=32))
    assert main(["train", str(recipe), override, "--out", str(tmp_path / "run")]) == 2
    assert words in " ".join(capsys.readouterr().err.split())


def test_a_metric_of_vectors_is_none_of_classes(tmp_path, capsys):
    other = RECIPE.replace("task: embedding, columns: {text: query, pair: answer}",
                           "task: classification, columns: {text: query, label: answer}")  # fmt: skip
    recipe = project(tmp_path, other.replace("match: output, loss: cosine", "match: logits"))
    assert main(["validate", str(recipe), "evaluation.metrics=[neighbours_kept]"]) == 2
    assert "task: classification has no such metric as neighbours_kept" in capsys.readouterr().err


# ---- examples and batches


def encode(rows, tokenizer=None, **spec):
    columns = {name: name for name in rows}
    data = Data(source="./x.jsonl", task="embedding", columns=columns, max_length=spec.pop("max_length", 16), **spec)
    encoder = Encoder(tokenizer or word_tokenizer(), data, Settled("embedding"))
    return TASKS["embedding"]().encode(rows, encoder), encoder


def batch_of(features):
    def arranged(values):
        if isinstance(values[0], list):
            return Ragged(np.array([item for each in values for item in each]), np.array([len(each) for each in values]))
        return np.array(values)

    return TASKS["embedding"]().collate({name: arranged(values) for name, values in features.items()}, 0, [])


def test_both_texts_of_a_pair_stand_one_after_the_other_under_one_label():
    features, _ = encode({"text": ["a0 a1", "b0"], "pair": ["a2", "b1 b2 b3"]})
    assert features["input_ids"] == [[4, 5, 6], [10, 11, 12, 13]] and features["first"] == [2, 1]
    batch = batch_of(features)
    assert batch["input_ids"].tolist() == [[4, 5, 0], [6, 0, 0], [10, 0, 0], [11, 12, 13]]
    assert batch["attention_mask"].sum(1).tolist() == [2, 1, 1, 3]
    assert batch["labels"].tolist() == [0, 0, 1, 1] and batch["texts"].tolist() == [2, 2]


def test_texts_without_a_pair_or_with_a_rated_one_have_no_label():
    alone, rated = {"text": ["a0", "b0"]}, {"text": ["a0"], "pair": ["b0"], "score": [0.5]}
    batch = batch_of(encode(alone)[0])
    assert batch["labels"].tolist() == [-100, -100] and batch["texts"].tolist() == [1, 1]
    batch = batch_of(encode(rated)[0])
    assert batch["labels"].tolist() == [-100, -100] and batch["scores"].tolist() == [0.5]


def test_each_text_is_cut_on_its_own_and_counted():
    features, encoder = encode({"text": ["a0 a1 a2", "a0"], "pair": ["b0", "b0 b1 b2 b3"]}, max_length=2)
    assert [len(ids) for ids in features["input_ids"]] == [3, 3] and encoder.truncated == 2


def test_prompts_of_the_recipe_stand_in_front_of_their_side():
    features, encoder = encode({"text": ["a0"], "pair": ["b0"]}, prompts={"pair": "c0 "})
    assert features["input_ids"] == [[4, 16, 10]] and encoder.notes == {"prompt 'c0 ', put in front of texts": 1}


def test_scripts_without_spaces_are_encoded():
    characters = word_tokenizer("数据库连接到服务器", splits=".")
    features, _ = encode({"text": ["数据库"], "pair": ["连接到服务器"]}, characters)
    assert features["first"] == [3] and len(features["input_ids"][0]) == 9 and 1 not in features["input_ids"][0]


def test_half_a_batch_keeps_the_texts_of_an_example_together():
    features, _ = encode({"text": ["a0", "b0", "c0"], "pair": ["a1", "b1", "c1"]})
    batch = batch_of(features)
    pieces = [piece for _, piece in _split([(7, batch)], 2)]
    assert [piece["labels"].tolist() for piece in pieces] == [[0, 0, 1, 1], [2, 2]]
    assert [piece["input_ids"].tolist() for piece in pieces] == [[[4], [5], [10], [11]], [[16], [17]]]


@pytest.mark.parametrize(("value", "words"), [("high", "could not"), (True, "no number"), (float("nan"), "finite")])
def test_a_score_is_a_number(value, words):
    read = TASKS["embedding"]().columns["score"].read
    assert read("0.5") == 0.5 and read(3) == 3.0
    with pytest.raises(ValueError, match=words):
        read(value)


# ---- loss and predictions


def test_labels_are_learnt_by_telling_the_partner_among_the_others():
    vectors = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 2.0], [-1.0, 0.0], [1.0, 1.0]])
    batch = {"attention_mask": torch.ones(5, 2), "labels": torch.tensor([0, 0, 1, 1, -100])}
    objective = Objective([Term(match="labels")], "embedding")
    counts = objective.counts([batch])
    loss, _ = objective(Outputs(vectors), None, batch, counts)
    half = math.sqrt(0.5)
    cosines = {0: [0.6, 0.0, -1.0, half], 1: [0.6, 0.8, -0.6, 1.4 * half], 2: [0.0, 0.8, 0.0, half],
               3: [-1.0, -0.6, 0.0, -half]}  # fmt: skip
    partner = {0: 0, 1: 0, 2: 2, 3: 2}
    expected = [math.log(sum(math.exp((c - row[partner[k]]) / 0.05) for c in row)) for k, row in cosines.items()]
    assert counts.tolist() == [4] and loss.item() == pytest.approx(sum(expected) / 4, rel=1e-5)


def test_the_columns_of_a_pair_are_the_vectors_of_its_texts():
    model, teacher = (AutoModel.from_config(tiny_config("bert", num_hidden_layers=2)).eval() for _ in range(2))
    model.sentence_head = teacher.sentence_head = SentenceHead(("cls",))
    batch = tiny_batch(rows=4) | {"labels": torch.tensor([0, 0, 1, 1]), "texts": torch.tensor([2, 2])}
    batch["examples"] = torch.tensor([9, 8])
    rows = predict(model, [batch], "embedding", lambda given: forward(teacher, given, Capture()))
    with torch.no_grad():
        own, theirs = (each(batch["input_ids"], batch["attention_mask"])[0][:, 0].numpy() for each in (model, teacher))
    assert rows["example"].tolist() == [8, 9]
    np.testing.assert_allclose(rows["embeddings"], own[[2, 0]], atol=1e-6)
    np.testing.assert_allclose(rows["pair_embeddings"], own[[3, 1]], atol=1e-6)
    np.testing.assert_allclose(rows["teacher_embeddings"], theirs[[2, 0]], atol=1e-6)
    cosines = (own * theirs).sum(1) / np.linalg.norm(own, axis=1) / np.linalg.norm(theirs, axis=1)
    assert rows["teacher_cosine"] == pytest.approx([cosines[2:].mean(), cosines[:2].mean()], rel=1e-5)


# ---- metrics


def angles(*degrees):
    return np.array([[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in degrees])


def test_metrics_of_retrieval_follow_from_the_rank_of_each_pair():
    texts, pairs = angles(0, 90, 180), 5 * angles(10, 80, 15)  # own pair: first, first, second
    assert METRICS["mrr_at_10"](texts, pairs) == pytest.approx((1 + 1 + 1 / 2) / 3)
    assert METRICS["ndcg_at_10"](texts, pairs) == pytest.approx((1 + 1 + 1 / math.log2(3)) / 3)
    assert METRICS["recall_at_10"](texts, pairs) == 1
    many = np.concatenate([angles(50), angles(*range(1, 11))])
    alone = np.concatenate([angles(0), angles(*range(1, 11))])
    assert METRICS["recall_at_10"](alone, many) == pytest.approx(10 / 11)  # the first text finds its pair at place 11


def test_a_pair_that_others_equal_comes_last_among_them():
    assert METRICS["mrr_at_10"](angles(0, 0), angles(5, 5)) == 0.5
    assert METRICS["mrr_at_10"](np.zeros((3, 2)), np.zeros((3, 2))) == pytest.approx(1 / 3)  # a model that says nothing


def test_spearman_is_that_of_scipy():
    generator = np.random.default_rng(0)
    left, right = generator.integers(0, 5, 50) / 4, generator.integers(0, 9, 50) / 3
    assert METRICS["spearman"](left, right) == pytest.approx(stats.spearmanr(left, right).statistic)
    assert math.isnan(METRICS["spearman"](np.ones(3), np.arange(3)))


def test_neighbours_are_counted_among_the_ten_nearest_others():
    own = angles(*range(0, 48, 4))
    assert METRICS["neighbours_kept"](own, 3 * own) == 1
    turned = own.copy()
    turned[[0, -1]] = turned[[-1, 0]]  # each of the twelve has one other that is not among its ten
    ten = [set(np.argsort(-(own @ own[k]))[1:11]) for k in range(12)]
    moved = [set([j for j in np.argsort(-(turned @ turned[k])) if j != k][:10]) for k in range(12)]
    expected = np.mean([len(a & b) / 10 for a, b in zip(ten, moved, strict=True)])
    assert METRICS["neighbours_kept"](turned, own) == pytest.approx(expected) and expected < 1
    assert METRICS["neighbours_kept"](angles(0, 90), angles(0, 90)) == 1


# ---- folders of sentence-transformers

STATES = torch.tensor([[[1.0, -2.0], [3.0, 4.0], [50.0, 60.0]], [[2.0, 2.0], [0.0, 1.0], [4.0, -3.0]]])
MASK = torch.tensor([[1, 1, 0], [1, 1, 1]])
BY_HAND = {
    "cls": [[1, -2], [2, 2]],
    "max": [[3, 4], [4, 2]],
    "mean": [[2, 1], [2, 0]],
    "mean_sqrt_len_tokens": [[4 / 2**0.5, 2 / 2**0.5], [6 / 3**0.5, 0]],
    "weightedmean": [[7 / 3, 2], [14 / 6, -5 / 6]],
    "lasttoken": [[3, 4], [4, -3]],
}


@pytest.mark.parametrize("mode", LEGACY)
def test_each_way_of_pooling_by_hand(mode):
    torch.testing.assert_close(SentenceHead((mode,))(STATES, MASK), torch.tensor(BY_HAND[mode], dtype=torch.float32))


def test_ways_of_pooling_stand_side_by_side_and_are_normalised_together():
    found = SentenceHead(("cls", "mean"), normalize=True)(STATES, MASK)
    torch.testing.assert_close(found[0], torch.tensor([1.0, -2.0, 2.0, 1.0]) / 10**0.5)


def written(folder, head=SentenceHead(), **changes):
    folder.mkdir(exist_ok=True)
    for name, text in (head.files(8) | changes).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize(
    "head",
    [
        SentenceHead(),
        SentenceHead(("cls", "lasttoken"), normalize=True, lower=True, max_length=7, similarity="dot"),
        SentenceHead(prompts={"query": "q: ", "document": ""}, default_prompt="query"),
    ],
)
def test_a_head_that_is_written_is_read_as_the_same(head, tmp_path):
    assert sentence_head(written(tmp_path, head)) == head


def test_the_form_that_sentence_transformers_writes_today_is_read(tmp_path):
    now = {"embedding_dimension": 8, "pooling_mode": ["cls", "max"], "include_prompt": True}
    modules = json.loads(SentenceHead().files(8)["modules.json"])
    modules[1]["type"] = "sentence_transformers.sentence_transformer.modules.pooling.Pooling"
    changes = {"1_Pooling/config.json": json.dumps(now), "modules.json": json.dumps(modules)}
    assert sentence_head(written(tmp_path, **changes)).modes == ("cls", "max")


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("modules.json", {"type": "sentence_transformers.models.Dense", "path": "2_Dense"}, "a module Dense after"),
        ("modules.json", {"type": "custom.Reader", "path": "2_Reader"}, "a module custom.Reader"),
        ("modules.json", {"type": "sentence_transformers.models.Normalize", "path": "../x"}, "is no folder beside it"),
        ("1_Pooling/config.json", {"pooling_mode": "median"}, "unknown pooling 'median'"),
        ("1_Pooling/config.json", {"pooling_mode": ["max", "cls"]}, "the order of max, cls cannot be kept"),
        ("1_Pooling/config.json", {"include_prompt": False}, "prompts that are not pooled"),
        ("sentence_bert_config.json", {"query_expansion": {"token": "x"}}, "query_expansion cannot be kept"),
        ("sentence_bert_config.json", {"max_seq_length": "7"}, "max_seq_length is no whole number"),
        ("config_sentence_transformers.json", {"prompts": ["x"]}, "a prompt is no text"),
    ],
)
def test_what_cannot_be_kept_of_a_folder_is_refused(name, change, words, tmp_path):
    head = SentenceHead(prompts={"query": "q: "})
    content = json.loads(head.files(8)[name])
    content = [*content, {"idx": 2, "name": "2", **change}] if name == "modules.json" else content | change
    with pytest.raises(InputError, match=words):
        sentence_head(written(tmp_path, head, **{name: json.dumps(content)}))


def test_prompts_follow_the_side_of_a_retrieval_and_the_default_elsewhere():
    head = SentenceHead(prompts={"query": "q: ", "passage": "p: ", "own": "o: "}, default_prompt="own")
    assert [head.prompt(side, True) for side in ("text", "pair")] == ["q: ", "p: "]
    assert [head.prompt(side, False) for side in ("text", "pair")] == ["o: ", "o: "]
    changed = head.with_prompts({"pair": "d: "}, True)
    assert changed.prompts == {"query": "q: ", "own": "o: ", "document": "d: "}
    assert head.with_prompts({"text": "t: "}, False).prompt("pair", False) == "t: "


def test_vectors_of_a_decoder_are_those_of_its_last_tokens():
    config = tiny_config("llama", num_hidden_layers=2)
    model = AutoModel.from_config(config).eval()
    model.sentence_head = SentenceHead(("lasttoken",))
    batch = tiny_batch()
    found = forward(model, batch, Capture(stop_at_head=True)).logits
    lengths = batch["attention_mask"].sum(1)
    alone = [model(batch["input_ids"][row : row + 1, :length])[0][0, -1] for row, length in enumerate(lengths)]
    torch.testing.assert_close(found, torch.stack(alone))


def test_an_encoder_decoder_has_no_vectors(tmp_path, capsys):
    recipe = project(tmp_path)
    tiny_model("t5", vocab_size=len(SPECIALS) + len(WORDS)).save_pretrained(tmp_path / "teacher")
    assert main(["train", str(recipe), "--out", str(tmp_path / "run")]) == 2
    assert "the vectors of an encoder-decoder (t5) cannot be distilled" in " ".join(capsys.readouterr().err.split())
