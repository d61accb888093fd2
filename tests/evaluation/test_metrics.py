import math
import subprocess
import sys

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sklearn_metrics

from distill.errors import InputError
from distill.evaluation.metrics import LOWER_IS_BETTER, METRICS, columns_of, compute
from distill.recipe.names import GENERATED_METRICS


def array(*values):
    return np.array(values)


@pytest.mark.parametrize("seed", range(5))
def test_classification_metrics_equal_those_of_scikit_learn(seed):
    random = np.random.default_rng(seed)
    references, predictions = random.integers(0, 6, 200), random.integers(0, 6, 200)
    found = compute(["accuracy", "f1_macro"], {"references": references, "predictions": predictions})
    assert found["accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(references, predictions))
    assert found["f1_macro"] == pytest.approx(sklearn_metrics.f1_score(references, predictions, average="macro"))


@pytest.mark.parametrize(
    ("references", "predictions"),
    [
        (array(0, 0, 1, 1), array(0, 0, 0, 0)),  # class 1 is never predicted
        (array(0, 0, 0, 0), array(0, 0, 7, 7)),  # class 7 is never true
        (array(1, 2, 3), array(4, 5, 6)),  # nothing in common
        (array(-3, 9, 9), array(-3, 9, 100)),
        (array("json", "email", "json"), array("json", "json", "xml")),
    ],
)
def test_f1_counts_classes_that_are_only_predicted_or_only_true_as_scikit_learn_does(references, predictions):
    expected = sklearn_metrics.f1_score(references, predictions, average="macro", zero_division=0)
    columns = {"references": references, "predictions": predictions}
    assert compute(["f1_macro"], columns)["f1_macro"] == pytest.approx(expected)


def test_all_metrics_by_hand_in_one_call():
    columns = {
        "references": array(0, 1, 1, 2),
        "predictions": array(0, 1, 2, 2),
        "agreed": array(1, 3, 0, 0),
        "nll": array(2.0, 4.0, 0.0, 0.0),  # two texts of 1 and 3 tokens: 6 / 4, not the mean of 2 and 4 / 3
        "tokens": array(1, 3, 0, 0),
        "correct": array(1, 0, 0, 0),
        "kl_sum": array(0.75, 0.75, 0.0, 0.0),
        "positions": array(2, 4, 0, 0),
        "answers": array("Ada", "in the north", "", "Bob"),
        "gold": array('["ada", "Bob"]', '["the north"]', "[]", "[]"),
        "none_class": array(1, 1, 1, 1),
        "confidence": array(0.9, 0.5, 0.5, 0.5),  # bins of 1/15: 1 - 0.9 in one, (0 - 1.5) / 3 in the other
        "values": array(1.0, 2.0, 4.0, 5.0),
        "targets": array(1.0, 3.0, 3.0, 5.0),
        "teacher_values": array(1.0, 2.0, 4.0, 3.0),
        "entities_found": array(1, 0, 2, 0),
        "entities_predicted": array(1, 1, 2, 0),
        "entities_true": array(2, 0, 2, 1),
        "text_bytes": array(3, 9, 0, 0),
        "embeddings": (vectors := np.eye(4)),
        "pair_embeddings": vectors[[0, 1, 3, 2]],  # the last two find their pair among those that say nothing: last
        "teacher_embeddings": vectors,
        "teacher_cosine": array(1.0, 1.0, 0.5, 0.5),
    }
    found = compute([name for name in METRICS if name not in GENERATED_METRICS], columns)
    assert found == pytest.approx(
        {
            "accuracy": 3 / 4,
            "f1_macro": (1 + 2 / 3 + 2 / 3) / 3,
            "agreement": 4 / 6,
            "perplexity": math.exp(1.5),
            "token_accuracy": 1 / 4,
            "kl": 1.5 / 6,
            "loss": 1.5,
            "exact_match_answer": (1 + 0 + 1 + 0) / 4,
            "f1_answer": (1 + 2 / 3 + 1 + 0) / 4,
            "f1_relations": (1 + 2 / 3) / 2,
            "f1_micro": 3 / 4,
            "matthews": (3 * 4 - 5) / math.sqrt((16 - 6) * (16 - 6)),  # true 1, 2, 1 times; predicted 1, 1, 2 times
            "ece": (0.1 + 1.5) / 4,
            "mse": (1 + 1) / 4,
            "rmse": math.sqrt(1 / 2),
            "pearson": (2 * 2 + 2 * 2) / math.sqrt((4 + 1 + 1 + 4) * (4 + 4)),
            "spearman": (1.5 * 1.5 + 1.5 * 1.5) / math.sqrt((2 * 1.5**2 + 2 * 0.5**2) * 2 * 1.5**2),
            "teacher_mse": 4 / 4,
            "entity_f1": 2 * 3 / (4 + 5),
            "entity_precision": 3 / 4,
            "entity_recall": 3 / 5,
            "bits_per_byte": 6 / (12 * math.log(2)),
            "masked_perplexity": math.exp(1.5),
            "masked_accuracy": 1 / 4,
            "mrr_at_10": (1 + 1 + 1 / 4 + 1 / 4) / 4,
            "ndcg_at_10": (1 + 1 + 2 / math.log2(5)) / 4,
            "recall_at_10": 1.0,
            "cosine_to_teacher": 0.75,
            "neighbours_kept": 1.0,
        }
    )
    assert {type(value) for value in found.values()} == {float}


@pytest.mark.parametrize("seed", range(3))
def test_sets_classes_and_numbers_are_measured_as_scikit_learn_and_scipy_do(seed):
    random = np.random.default_rng(seed)
    true, ours = random.integers(0, 2, (2, 50, 4))
    found = compute(["accuracy", "f1_micro", "f1_macro"], {"references": true, "predictions": ours})
    expected = {f"f1_{mean}": sklearn_metrics.f1_score(true, ours, average=mean) for mean in ("micro", "macro")}
    assert found == pytest.approx({"accuracy": sklearn_metrics.accuracy_score(true, ours), **expected})
    classes = {"references": random.integers(0, 5, 80), "predictions": random.integers(0, 5, 80)}
    expected = sklearn_metrics.matthews_corrcoef(classes["references"], classes["predictions"])
    assert compute(["matthews"], classes)["matthews"] == pytest.approx(expected)
    numbers = {"values": random.integers(0, 9, 30) / 2, "targets": random.normal(size=30)}
    for name, function in (("pearson", stats.pearsonr), ("spearman", stats.spearmanr)):
        assert compute([name], numbers)[name] == pytest.approx(function(numbers["values"], numbers["targets"])[0])


def test_a_class_that_no_set_has_on_either_side_is_left_out_of_the_mean():
    true, ours = array([1, 0, 0], [1, 1, 0]), array([1, 0, 0], [0, 1, 0])
    assert compute(["f1_macro"], {"references": true, "predictions": ours})["f1_macro"] == (2 / 3 + 1) / 2
    empty = {"references": array([0, 0]), "predictions": array([0, 0])}
    assert math.isnan(compute(["f1_macro"], empty)["f1_macro"])


def test_correlations_of_constants_have_no_value_and_spans_that_nobody_has_count_as_seqeval_counts_them():
    constant = {"values": array(2.0, 2.0), "targets": array(1.0, 3.0)}
    assert all(math.isnan(value) for value in compute(["pearson", "spearman"], constant).values())
    assert compute(["matthews"], {"references": array(0, 1), "predictions": array(1, 1)})["matthews"] == 0
    none = {f"entities_{name}": array(0, 0) for name in ("found", "predicted", "true")}
    assert set(compute(["entity_f1", "entity_precision", "entity_recall"], none).values()) == {0.0}


def test_the_last_bin_of_the_calibration_error_holds_certainty():
    columns = {"confidence": array(1.0, 14 / 15, 0.0), "correct": array(1, 0, 0)}
    assert compute(["ece"], columns)["ece"] == pytest.approx((29 / 15 - 1) / 3)


def test_totals_are_summed_in_double_precision():
    nll = np.concatenate([[2.0**24], np.ones(1000)]).astype(np.float32)  # float32 cannot count on from 2^24
    assert compute(["loss"], {"nll": nll, "tokens": np.ones(1001, dtype=np.int64)})["loss"] == (2**24 + 1000) / 1001


def test_what_has_no_finite_value_is_inf_or_nan():
    assert compute(["perplexity"], {"nll": array(1e5), "tokens": array(1)})["perplexity"] == math.inf
    empty_texts = {"nll": array(0.0), "correct": array(0), "tokens": array(0)}
    assert all(math.isnan(value) for value in compute(["perplexity", "loss", "token_accuracy"], empty_texts).values())


def test_a_direction_is_that_of_a_metric_of_the_table():
    assert set(LOWER_IS_BETTER) < METRICS.keys()


def bias(predictions, references, *, power=1):
    return abs(predictions - references).mean() ** power


def test_a_users_own_function_is_named_by_module_and_function(monkeypatch):
    monkeypatch.setitem(sys.modules, "their_metrics", sys.modules[__name__])
    columns = {"predictions": array(1.5, 2.0), "references": array(1.0, 1.0)}
    assert columns_of(bias) == ("predictions", "references")
    assert compute(["their_metrics:bias"], columns) == {"their_metrics:bias": 0.75}


def test_what_a_users_own_function_returns_must_be_a_number(monkeypatch):
    monkeypatch.setitem(sys.modules, "their_metrics", sys.modules[__name__])
    monkeypatch.setattr(sys.modules[__name__], "each", lambda agreed: agreed == 1, raising=False)
    with pytest.raises(InputError, match=r"evaluation\.metrics: their_metrics:each returned array.*not a number"):
        compute(["their_metrics:each"], {"agreed": array(1, 2)})


@pytest.mark.parametrize(
    ("names", "columns", "message"),
    [
        (["agreement"], {"agreed": array(1)}, "'agreement' needs the columns agreed, positions"),
        (["accuracy", "loss"], {"predictions": array(1), "references": array(1)}, "'loss' .* there is no nll, tokens"),
        (["accuracy"], {"predictions": array(), "references": array()}, "at least one: .*'predictions': 0"),
        (["accuracy"], {"predictions": array(1, 2), "references": array(1)}, "one row per example.*'references': 1"),
        (["acuracy"], {}, "did you mean 'accuracy'"),
    ],
)
def test_unusable_input_is_explained(names, columns, message):
    with pytest.raises(InputError, match=message):
        compute(names, columns)


def test_the_table_is_importable_without_the_slow_packages():
    code = "import sys, distill.evaluation.metrics; print(*{'torch', 'evaluate', 'datasets'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "\n"


def test_nothing_is_read_from_or_written_to_the_working_folder_and_the_cache(tmp_path, monkeypatch):
    import evaluate

    work, cache, temporary = (tmp_path / name for name in ("work", "cache", "temporary"))
    for script in (work / "accuracy" / "accuracy.py", temporary / "keep"):
        script.parent.mkdir(parents=True)
        script.write_text("raise SystemExit('evaluate.load would run this file')")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(work)
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(cache))
    compute(["accuracy"], {"predictions": array(1), "references": array(1)})
    assert sorted(tmp_path.rglob("*")) == before


def test_a_broken_student_gets_no_figure_that_a_working_one_could_have():
    values, right = array(0.5, math.nan, 0.25), array(1.0, 2.0, 3.0)
    assert math.isnan(METRICS["spearman"](values, right)) and math.isnan(METRICS["spearman"](right, values))
    assert math.isnan(METRICS["ece"](values, right))
    broken, vectors = np.full((30, 2), math.nan), np.ones((30, 2))
    for name in ("recall_at_10", "mrr_at_10", "ndcg_at_10"):
        assert METRICS[name](broken, vectors) == 0
