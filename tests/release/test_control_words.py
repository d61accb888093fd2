"""What card and report say of controls: what was not run, what it means to be no better, budgets, and other seeds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from made_figures import difference

from distill.evaluation.arms import ARMS
from distill.release.budgets import budget_lines, seeds_table, seeds_title
from distill.release.card import render_card
from distill.release.evidence import Evidence, judge, summarize
from distill.release.report import render_report


def changed(evidence: Evidence, **more: Any) -> Evidence:
    return replace(evidence, evaluation=evidence.evaluation | more)


def with_arm(evidence: Evidence, name: str, accuracy: float) -> Evidence:
    """With one more rival that has this accuracy."""
    arm = {"name": name, "title": name, "steps": 300, "lr": 1e-3, "metrics": {"accuracy": accuracy}, "retained": {}}
    return changed(evidence, arms=[*evidence.evaluation["arms"], arm], rivals={name: f"words for {name}"})


def test_what_was_not_run_is_named(evidence: Evidence) -> None:
    left = {"random_cut": "a student cut at random", "majority": "no answer is the most frequent one"}
    card = render_card(changed(evidence, not_run=left))
    line = (
        "**Note.** Not run: random_cut (a student cut at random), majority (no answer is the most frequent one). "
        "What the student adds over these is not known."
    )
    assert line in card
    assert "Not run" not in render_card(changed(evidence, not_run={})) + render_card(evidence)


@pytest.mark.parametrize("accuracy", [0.7608, 0.9])
def test_a_random_cut_that_is_as_good_makes_the_scores_worth_nothing(evidence: Evidence, accuracy: float) -> None:
    lessons = {name: arm.lesson for name, arm in ARMS.items()}
    (verdict,) = judge(changed(with_arm(evidence, "random_cut", accuracy), lessons=lessons))
    assert not verdict.good and "does not beat random_cut, words for random_cut" in verdict.text
    assert verdict.text.endswith(" So the choice of layers and neurons by their scores is worth nothing here.")


LESSONS = {"random_cut": "the choice is worth nothing here"}


def test_a_tie_is_no_proof_of_worth_either(evidence: Evidence) -> None:
    (verdict,) = judge(changed(with_arm(evidence, "random_cut", 0.755), lessons=LESSONS))
    assert not verdict.good
    assert "is not shown" in verdict.text
    assert verdict.text.endswith("As far as it tells, the choice is worth nothing here.")


def seeds(ours: list[float | None], theirs: list[float | None]) -> dict[str, Any]:
    def spread(values: list[float | None]) -> dict[str, Any]:
        return {"accuracy": {"values": values, "mean": 0.75, "min": 0.5, "max": 1.0}}

    return {"seeds": [3, 4], "arms": {"distilled": spread(ours), "random_cut": spread(theirs)}, "sets": {}}


@pytest.mark.parametrize(
    ("ours", "theirs", "good", "words"),
    [
        ([0.75, 0.5], [0.5, 0.375], True, "by 18.8 points: accuracy 62.5 % against 43.8 % on average over 2 seeds"),
        ([0.75, 0.5], [0.5, 0.625], False, "with 1 of the seeds only: accuracy 62.5 % against 56.2 % on average"),
        ([0.5, 0.5], [0.75, 0.5], False, "2 seeds (-25.0 points, +0.0 points). So the choice is worth nothing here."),
        ([0.5, None], [0.75, 0.5], False, "has no figure: what distillation adds over it is unknown."),
    ],
)
def test_over_seeds_the_student_is_compared_with_the_rival_of_the_same_seed(
    evidence: Evidence, ours: list[float | None], theirs: list[float | None], good: bool, words: str
) -> None:
    own = changed(with_arm(evidence, "random_cut", 0.1), seeds=seeds(ours, theirs), lessons=LESSONS)
    own = changed(own, differences=[difference("random_cut", accuracy=(0.66, 0.6, 0.7))])
    (verdict,) = judge(own)
    assert verdict.good is good and words in verdict.text
    gain = "better than words for random_cut by 66.0 points [60.0, 70.0]"
    assert (gain if good else "a gain over words for random_cut is not shown by every seed") in summarize(own)


def test_a_gain_with_every_seed_is_not_shown_where_the_examples_do_not_show_it(evidence: Evidence) -> None:
    own = changed(with_arm(evidence, "random_cut", 0.1), seeds=seeds([0.75, 0.5], [0.5, 0.375]), lessons=LESSONS)
    own = changed(own, differences=[difference("random_cut", accuracy=(0.25, -0.02, 0.4))])
    (verdict,) = judge(own)
    assert not verdict.good and "is not shown: accuracy 62.5 % against 43.8 % on average over 2 seeds" in verdict.text
    assert (
        "that of the released seed is a gain of 25.0 points [-2.0, 40.0], an interval that contains 0" in verdict.text
    )
    assert "better than" not in summarize(own)


@pytest.mark.parametrize(
    ("rounds", "words"),
    [
        (
            {"median": 1.8, "min": 0.62, "max": 3.79},
            "a throughput that is not shown to differ from the teacher's (0.62x",
        ),
        ({"median": 1.8, "min": 1.62, "max": 1.9}, "1.80x (1.62 to 1.90) the teacher's throughput"),
    ],
)
def test_a_throughput_is_claimed_where_every_round_shows_it(
    evidence: Evidence, rounds: dict[str, float], words: str
) -> None:
    measured = evidence.evaluation["efficiency"]
    ratios = measured["ratios"] | {"student": measured["ratios"]["student"] | {"throughput": rounds}}
    assert words in summarize(changed(evidence, efficiency=measured | {"ratios": ratios}))


def test_a_rival_that_no_seed_changes_is_compared_with_every_seed(evidence: Evidence) -> None:
    own = changed(evidence, seeds=seeds([0.5, 0.2], [0.1, 0.1]), rivals={"cut": "before training"})
    (verdict,) = judge(own)  # the cut student has 0.2319
    assert "with 1 of the seeds only" in verdict.text


def test_mean_and_range_over_seeds_are_on_card_and_report(evidence: Evidence) -> None:
    own = changed(evidence, seeds=seeds([0.5, 1.0], [0.5, 1.0]))
    assert seeds_title(own) == "Mean (lowest to highest) of 2 seeds, 3, 4; released is that of seed 3"
    assert seeds_table(own).rows[0][:2] == ("distilled (this model)", "75.0 % (50.0 % to 100.0 %)")
    for text in (render_card(own), render_report(own)):
        assert "75.0 % (50.0 % to 100.0 %)" in text and "released is that of seed 3" in text
    assert "2 seeds after one teacher; other texts were not tried." in render_card(own)
    assert not seeds_table(evidence).rows and not seeds_title(evidence)


def test_the_budget_of_each_training_is_stated_and_how_it_was_chosen(evidence: Evidence) -> None:
    tried = [
        {"lr": 1e-4, "metrics": {"accuracy": 0.5}, "tokens": 600},
        {"lr": 1e-3, "metrics": {"accuracy": 0.75}, "tokens": 600},
    ]
    search = {"by": "accuracy", "split": "validation", "tried": tried, "chosen": 1}
    arms = [arm | {"lr": 1e-3, "tokens": 81_580, "search": None} for arm in evidence.evaluation["arms"][2:3]]
    arms += [arm | {"lr": 1e-3, "tokens": 600, "search": search} for arm in evidence.evaluation["arms"][3:]]
    own = changed(evidence, arms=[*evidence.evaluation["arms"][:2], *arms])
    assert budget_lines(own) == [
        "distilled: 300 steps, peak learning rate 0.001, 81.6 k tokens.",
        "labels_only: 300 steps, peak learning rate 0.001, 600 tokens; the best accuracy on the validation split of 2 "
        "settings (lr 0.0001: 50.0 %, lr 0.001: 75.0 %), which saw 1.2 k tokens in all.",
    ]
    for line in budget_lines(own):
        assert line in render_card(own).replace("\\", "") and line in render_report(own)


def test_shares_in_brackets_are_explained_where_there_are_any(evidence: Evidence) -> None:
    note = "share of the teacher's lead over the majority, (arm - majority) / (teacher - majority)"
    assert note in render_card(evidence)
    none = [arm | {"retained": {}} for arm in evidence.evaluation["arms"]]
    assert note not in render_card(changed(evidence, arms=none))
