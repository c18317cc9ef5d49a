import numpy as np
import pytest
import torch
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from scipy import stats
from sklearn.metrics import (
    average_precision_score,
    balanced_accuracy_score,
    mean_absolute_error,
    r2_score,
    top_k_accuracy_score,
)

from embedkit.evaluation import metrics
from embedkit.evaluation.intervals import bootstrap_interval, resampled_interval, t_interval
from embedkit.evaluation.scoring import score_classes, score_labels, score_numbers
from embedkit.heads import WeightedKNN


@pytest.mark.parametrize("seed", range(5))
def test_average_precisions_are_scikit_learns_ties_included(seed):
    rng = np.random.default_rng(seed)
    true = rng.integers(0, 2, size=(50, 4))
    scores = rng.normal(size=(50, 4)).round(1 if seed % 2 else 6)
    expected = average_precision_score(true, scores, average=None)
    np.testing.assert_allclose(metrics.average_precisions(true, scores), expected, rtol=1e-12)


def test_average_precision_of_a_label_that_no_row_has_is_not_a_number():
    assert np.isnan(metrics.average_precisions(np.zeros((3, 1)), np.arange(3.0)[:, None])).all()


def test_average_precision_of_rows_that_count_several_times_is_that_of_their_copies():
    rng = np.random.default_rng(1)
    true, scores, counts = rng.integers(0, 2, size=20), rng.normal(size=20).round(1), rng.integers(0, 4, size=20)
    expected = average_precision_score(np.repeat(true, counts), np.repeat(scores, counts))
    assert metrics.weighted_average_precision(true, scores, counts[None].astype(float))[0] == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(5))
def test_r2_and_mae_are_scikit_learns(seed):
    rng = np.random.default_rng(seed)
    true, counts = rng.normal(size=30), rng.integers(1, 4, size=30)
    predicted = true + rng.normal(size=30)
    assert metrics.r2(true, predicted) == pytest.approx(r2_score(true, predicted))
    assert metrics.mean_absolute_error(true, predicted) == pytest.approx(mean_absolute_error(true, predicted))
    weighted = metrics.r2(true, predicted, counts[None].astype(float))
    assert weighted[0] == pytest.approx(r2_score(true, predicted, sample_weight=counts))


def test_ranks_give_scikit_learns_top_k():
    rng = np.random.default_rng(2)
    true, scores = rng.integers(0, 8, size=60), rng.normal(size=(60, 8))
    for k in (1, 3, 5):
        expected = top_k_accuracy_score(true, scores, k=k, labels=range(8))
        assert (metrics.rank_of_true(scores, true) < k).mean() == pytest.approx(expected)
    assert (metrics.rank_of_true(scores, np.full(60, -1)) == 8).all()
    assert ((metrics.rank_of_true(np.ones((1, 3)), np.array([2])) == 0) == (np.ones((1, 3)).argmax() == 2)).all()


def test_mean_class_accuracy_is_scikit_learns_balanced_accuracy():
    rng = np.random.default_rng(3)
    true, predicted = rng.integers(0, 5, size=80), rng.integers(0, 5, size=80)
    found = score_classes({"true": true, "predicted": predicted, "correct": true == predicted}, list("abcde"), seed=0)
    assert found["mean_class_accuracy"] == pytest.approx(balanced_accuracy_score(true, predicted))
    assert "top5" not in found and "ece" not in found


def test_one_nearest_neighbour_is_pytorch_metric_learnings_precision_at_1():
    rng = np.random.default_rng(4)
    x, queries = rng.normal(size=(80, 6)), rng.normal(size=(50, 6))
    y, true = rng.integers(0, 4, size=80), rng.integers(0, 4, size=50)
    unit, unit_queries = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (x, queries))
    found = WeightedKNN(k=1).fit(x, y).predict(queries)
    for by_class in (False, True):
        calculator = AccuracyCalculator(
            include=("precision_at_1",), k=1, avg_of_avgs=by_class, device=torch.device("cpu")
        )
        expected = calculator.get_accuracy(unit_queries, true, unit, y)["precision_at_1"]
        scored = score_classes({"true": true, "predicted": found, "correct": found == true}, list("abcd"), seed=0)
        assert scored["mean_class_accuracy" if by_class else "top1"] == pytest.approx(expected)


def test_calibration_error_is_the_literal_sum_over_bins():
    rng = np.random.default_rng(5)
    confidence = rng.uniform(size=200)
    correct = rng.uniform(size=200) < confidence**2
    literal = 0.0
    for low in range(15):
        inside = (confidence > low / 15) & (confidence <= (low + 1) / 15)
        if inside.any():
            literal += inside.mean() * abs(confidence[inside].mean() - correct[inside].mean())
    assert metrics.calibration_error(confidence, correct) == pytest.approx(literal)
    assert metrics.calibration_error(np.array([0.0, 1.0]), np.array([False, True])) == 0


def test_student_intervals_are_scipys():
    values = [0.71, 0.74, 0.69, 0.73, 0.70]
    expected = stats.t.interval(0.9, 4, loc=np.mean(values), scale=stats.sem(values))
    assert t_interval(values, level=0.9) == pytest.approx(list(expected))


def test_resampling_in_blocks_agrees_with_the_binomial_bootstrap():
    correct = np.arange(300) < 200
    found = resampled_interval(lambda weights: weights @ correct / 300, 300, resamples=4000)
    np.testing.assert_allclose(found, bootstrap_interval(correct), atol=0.006)


def test_intervals_of_labels_and_numbers_hold_the_value():
    rng = np.random.default_rng(6)
    true = rng.integers(0, 2, size=(120, 3))
    labels = score_labels({"true": true, "scores": true + rng.normal(size=true.shape)}, list("abc"), seed=0)
    assert labels["mAP_interval"][0] < labels["mAP"] < labels["mAP_interval"][1]
    assert labels["mAP"] == pytest.approx(np.mean(list(labels["per_class"].values())))
    numbers = rng.normal(size=120)
    scored = score_numbers({"true": numbers, "predicted": numbers + rng.normal(size=120) / 2}, seed=0)
    assert scored["r2_interval"][0] < scored["r2"] < scored["r2_interval"][1] < 1
    assert scored["mae_interval"][0] < scored["mae"] < scored["mae_interval"][1]
