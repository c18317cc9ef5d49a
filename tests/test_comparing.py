from itertools import product

import numpy as np
import pytest
from scipy.stats import binomtest

from embedkit.errors import EvaluationError
from embedkit.evaluation import Report, compare, compare_all, comparison_table
from embedkit.evaluation.comparing import _sign_flip, adjust

CLASSES = ["cat", "dog"]


def report_of(correct, ids=None, true=None):
    """A report on two classes whose rows were classified correctly or not."""
    correct = np.asarray(correct)
    true = np.zeros(len(correct), dtype=int) if true is None else np.asarray(true)
    ids = np.arange(len(correct)).astype(str) if ids is None else np.asarray(ids)
    predicted = np.where(correct, true, 1 - true)
    arrays = {"ids": ids, "true": true, "predicted": predicted, "correct": correct}
    mean = float(np.mean(correct))
    return Report({"top1": mean, "top1_interval": [mean, mean]}, {"task": "class"}, {}, CLASSES, arrays)


def random_rows(n, share, seed):
    return np.random.default_rng(seed).uniform(size=n) < share


@pytest.mark.parametrize("seed", range(4))
def test_the_p_value_is_the_exact_binomial_one(seed):
    left, right = random_rows(60, 0.8, seed), random_rows(60, 0.6, seed + 100)
    found = compare(report_of(left), report_of(right))
    won, lost = int((left & ~right).sum()), int((~left & right).sum())
    assert found.p_value == pytest.approx(binomtest(won, won + lost, 0.5).pvalue)
    assert found.difference == pytest.approx(left.mean() - right.mean())
    assert found.interval[0] < found.difference < found.interval[1]
    assert found.rows == 60 and found.metric == "top1"


def test_the_interval_is_that_of_resampled_pairs():
    left, right = random_rows(200, 0.8, 1), random_rows(200, 0.7, 2)
    rng = np.random.default_rng(3)
    draws = [(left[rows].mean() - right[rows].mean()) for rows in rng.integers(0, 200, size=(4000, 200))]
    found = compare(report_of(left), report_of(right))
    np.testing.assert_allclose(found.interval, np.quantile(draws, [0.025, 0.975]), atol=0.01)


def test_equal_heads_do_not_differ_and_order_only_turns_the_sign():
    left, right = report_of(random_rows(50, 0.8, 1)), report_of(random_rows(50, 0.5, 2))
    same = compare(left, left)
    assert (same.difference, same.p_value, same.real, same.interval) == (0, 1, False, [0, 0])
    assert compare(left, right).difference == -compare(right, left).difference
    assert compare(left, right).p_value == compare(right, left).p_value


def test_rows_are_matched_by_id():
    correct = random_rows(40, 0.7, 1)
    order = np.random.default_rng(2).permutation(40)
    shuffled = report_of(correct[order], ids=order.astype(str))
    assert compare(report_of(correct), shuffled).p_value == 1


def test_few_shot_shares_are_compared_by_random_signs():
    shares = np.random.default_rng(1).integers(0, 4, size=30) / 3
    worse = np.maximum(shares - np.random.default_rng(2).integers(0, 2, size=30) / 3, 0)
    found = compare(report_of(shares), report_of(worse))
    assert found.test == "sign-flip test" and found.real
    assert found.difference == pytest.approx(float(shares.mean() - worse.mean()))


def test_the_sign_flip_test_agrees_with_all_signs():
    gains = np.array([0.4, 0.1, -0.2, 0.7, 0.3, 0.0, 0.5, -0.1])
    sums = [abs(np.dot(signs, gains)) for signs in product([-1, 1], repeat=8)]
    exact = np.mean(np.array(sums) >= gains.sum() - 1e-12)
    assert _sign_flip(gains, seed=0) == pytest.approx(exact, abs=0.02)


def numbers_of(noise, seed=0):
    rng = np.random.default_rng(seed)
    true = rng.normal(size=80)
    predicted = true + noise * np.random.default_rng(seed + 1).normal(size=80)
    r2 = 1 - np.square(true - predicted).sum() / np.square(true - true.mean()).sum()
    arrays = {"ids": np.arange(80).astype(str), "true": true, "predicted": predicted}
    return Report({"r2": float(r2), "r2_interval": [0, 1]}, {"task": "regression"}, {}, [], arrays)


def test_numbers_are_compared_by_their_squared_errors():
    good, bad, near = numbers_of(0.2), numbers_of(1.0), numbers_of(0.205)
    found = compare(good, bad)
    assert found.real and found.metric == "r2"
    assert found.difference == pytest.approx(good.metrics["r2"] - bad.metrics["r2"])
    assert found.interval[0] > 0
    assert compare(near, good).difference < 0


def labels_of(noise):
    true = np.random.default_rng(0).integers(0, 2, size=(90, 3))
    scores = true + noise * np.random.default_rng(1).normal(size=true.shape)
    arrays = {"ids": np.arange(90).astype(str), "true": true, "predicted": (scores > 0.5) * 1, "scores": scores}
    return Report({"mAP": 0.5, "mAP_interval": [0, 1]}, {"task": "multi-label"}, {}, list("abc"), arrays)


def test_labels_are_compared_by_resampling():
    found = compare(labels_of(0.2), labels_of(3.0))
    assert found.real and found.test == "paired bootstrap" and found.interval[0] > 0
    assert compare(labels_of(0.5), labels_of(0.5)).p_value == 1


def test_reports_on_other_rows_labels_or_tasks_are_refused():
    left = report_of([True, False, True])
    with pytest.raises(EvaluationError, match="3 and 2, of which 2"):
        compare(left, report_of([True, False]))
    with pytest.raises(EvaluationError, match="3 and 3, of which 1"):
        compare(left, report_of([True, False, True], ids=["a", "b", "2"]))
    with pytest.raises(EvaluationError, match="1 test rows have other labels"):
        compare(left, report_of([True, False, True], true=[0, 0, 1]))
    with pytest.raises(EvaluationError, match="a report on class cannot be compared with one on regression"):
        compare(left, numbers_of(1.0))
    with pytest.raises(EvaluationError, match="without predictions"):
        compare(left, Report({}, {}, {}, []))


def test_holms_correction_by_hand():
    assert adjust([0.01, 0.02, 0.2]) == pytest.approx([0.03, 0.04, 0.2])
    assert adjust([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert adjust([]) == []


def test_of_many_comparisons_fewer_are_real():
    reports = {f"net {i}": report_of(random_rows(300, 0.8, i)) for i in range(7)}
    found = compare_all(reports)
    assert len(found) == 21
    for (left, right), one in found.items():
        alone = compare(reports[left], reports[right])
        assert one.p_value == alone.p_value and one.adjusted_p_value >= alone.p_value
        assert one.real == (one.adjusted_p_value < 0.05)


def test_the_table_ranks_and_marks_real_differences():
    good = np.arange(400) >= 20
    reports = {
        "worst": report_of(np.arange(400) >= 120), "best": report_of(good),
        "second": report_of(good ^ (np.arange(400) == 30)),
    }  # fmt: skip
    lines = comparison_table(reports).splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["best", "second", "worst"]
    assert lines[3].endswith("*") and not lines[2].endswith("*")
    assert "-0.2500" in lines[3] and "-0.0025" in lines[2]
    assert lines[-1] == "* real at 95 %: 2 of 3 differences (McNemar's exact test, corrected by Holm)"
    assert "." in lines[6] and "-0.2500*" in "\n".join(lines[6:9])


def test_the_table_of_one_report_has_no_differences():
    assert comparison_table({"only": report_of([True, False])}).count("\n") == 2
