import inspect
import warnings

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from embedkit import heads
from embedkit.errors import EvaluationError
from embedkit.heads import WeightedKNN, fit_logistic, logistic_regression, neighbours, penalties
from embedkit.heads.folding import hold_out
from embedkit.heads.neighbours import KnownNeighbours


def blobs(counts, dim=6, spread=1.0, seed=0):
    rng = np.random.default_rng(seed)
    centres = 3 * rng.normal(size=(len(counts), dim))
    labels = np.repeat(np.arange(len(counts)), counts)
    x = centres[labels] + spread * rng.normal(size=(len(labels), dim))
    return x.astype(np.float32), np.array([f"class {code}" for code in labels])


def test_knn_is_a_scikit_learn_classifier():
    # A check that needs an uninstalled package is skipped with a warning; failures still raise.
    check_estimator(WeightedKNN(), on_skip=None)


def literal_votes(train, codes, queries, k, temperature):
    votes = np.zeros((len(queries), codes.max() + 1))
    for i, query in enumerate(queries):
        similarity = [query @ row / np.linalg.norm(query) / np.linalg.norm(row) for row in train]
        for j in np.argsort(similarity)[::-1][:k]:
            votes[i, codes[j]] += np.exp(similarity[j] / temperature)
    return votes / votes.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("k", [1, 3, 20, 1000])
def test_knn_votes_follow_the_formula(k):
    rng = np.random.default_rng(1)
    train, queries = rng.normal(size=(60, 5)), rng.normal(size=(9, 5))
    codes = rng.integers(0, 4, size=60)
    head = WeightedKNN(k=k, temperature=0.2).fit(train, codes)
    expected = literal_votes(train, codes, queries, k, 0.2)
    np.testing.assert_allclose(head.predict_proba(queries), expected, rtol=1e-9)
    assert head.predict(queries).tolist() == expected.argmax(axis=1).tolist()


def test_knn_gives_the_same_votes_in_small_blocks(monkeypatch):
    rng = np.random.default_rng(2)
    train, queries, codes = rng.normal(size=(50, 4)), rng.normal(size=(23, 4)), rng.integers(0, 3, size=50)
    head = WeightedKNN(k=10).fit(train, codes)
    whole = head.predict_proba(queries)
    monkeypatch.setattr(neighbours, "QUERY_BLOCK", 5)
    monkeypatch.setattr(neighbours, "GALLERY_BLOCK", 7)
    np.testing.assert_allclose(head.predict_proba(queries), whole, rtol=1e-9)


def test_knn_weighs_one_near_neighbour_above_two_far_ones():
    train = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    query = np.array([[1.0, 0.1]])
    assert WeightedKNN(k=3, temperature=0.07).fit(train, ["near", "far", "far"]).predict(query).tolist() == ["near"]
    assert WeightedKNN(k=3, temperature=100).fit(train, ["near", "far", "far"]).predict(query).tolist() == ["far"]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_knn_search_equals_sorting_all_similarities(dtype):
    random = np.random.default_rng(3)
    train, queries = random.normal(size=(90, 6)).astype(dtype), random.normal(size=(11, 6)).astype(dtype)
    head = WeightedKNN(k=4).fit(train, np.arange(90) % 3)
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (queries, train)]
    similar = unit[0] @ unit[1].T
    for k in (1, 4, 90, 200):
        scores, rows = head.search(queries, k)
        np.testing.assert_array_equal(rows, np.argsort(-similar, axis=1)[:, :k])
        np.testing.assert_allclose(scores, -np.sort(-similar, axis=1)[:, :k], rtol=1e-5, atol=1e-6)
        assert scores.dtype == dtype
    assert head.search(queries)[1].shape == (11, 4)


def test_knn_survives_a_temperature_at_which_exp_overflows():
    head = WeightedKNN(k=2, temperature=1e-6).fit(np.eye(2, dtype=np.float32), ["a", "b"])
    assert head.predict_proba(np.array([[1.0, 0.5]], dtype=np.float32)).tolist() == [[1.0, 0.0]]


def test_knn_takes_zero_vectors_as_similar_to_nothing():
    head = WeightedKNN(k=3).fit(np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), ["a", "b", "b"])
    np.testing.assert_allclose(head.predict_proba(np.zeros((1, 2))), [[1 / 3, 2 / 3]])


def test_knn_keeps_float32():
    x, y = blobs([10, 10])
    head = WeightedKNN().fit(x, y)
    assert head.embeddings_.dtype == np.float32
    assert head.predict_proba(x).dtype == np.float32
    np.testing.assert_allclose(head.predict_proba(x).sum(axis=1), 1, rtol=1e-6)


def test_knn_leaves_its_training_rows_alone():
    x, y = blobs([4, 4])
    before = x.copy()
    WeightedKNN().fit(x, y).predict(x)
    np.testing.assert_array_equal(x, before)


@pytest.mark.parametrize("settings", [{"k": 0}, {"temperature": 0.0}, {"temperature": float("nan")}])
def test_knn_refuses_senseless_settings(settings):
    with pytest.raises(EvaluationError, match="k must be at least 1 and temperature above 0"):
        WeightedKNN(**settings).fit(np.eye(2), [0, 1])


def test_the_scaler_keeps_float32():
    x, y = blobs([20, 20])
    head = logistic_regression(0.1).fit(x, y)
    assert head["scaler"].transform(x).dtype == np.float32
    assert head["regression"].decision_function(head["scaler"].transform(x)).shape == (40,)


def test_fit_logistic_is_the_refit_of_the_best_C_on_all_rows():
    x, y = blobs([30, 30, 30], spread=3.0)
    head, choice = fit_logistic(x, y, tol=1e-6)
    losses = choice["C_losses"]
    assert (*losses, *choice["C_not_tried"]) == heads.C_GRID
    assert choice["C"] == min(C for C in losses if losses[C] == min(losses.values()))
    assert choice["held_out_rows"] == 18
    assert choice["converged"] is True
    expected = make_pipeline(StandardScaler(), LogisticRegression(C=choice["C"], tol=1e-10)).fit(x.astype(float), y)
    np.testing.assert_allclose(head["regression"].coef_, expected[-1].coef_, atol=1e-3)
    np.testing.assert_allclose(head.predict_proba(x), expected.predict_proba(x), atol=1e-4)
    np.testing.assert_allclose(head["scaler"].mean_, expected[0].mean_, rtol=1e-9)
    np.testing.assert_allclose(head["scaler"].var_, expected[0].var_, rtol=1e-9)


def test_fit_logistic_scores_each_C_on_rows_that_neither_scaler_nor_regression_saw():
    x, y = blobs([25, 25, 25], spread=4.0)
    _, choice = fit_logistic(x, y, C_grid=(1e-3, 1e-1), seed=3, tol=1e-6)
    held_out = hold_out(len(y), 0.2, 3, strata=np.unique(y, return_inverse=True)[1])
    for C, loss in choice["C_losses"].items():
        cold = logistic_regression(C, tol=1e-6).fit(x[~held_out], y[~held_out])
        assert loss == pytest.approx(log_loss(y[held_out], cold.predict_proba(x[held_out])), rel=1e-5)


def test_fit_logistic_prefers_the_smaller_C_of_equals():
    # Rows without any information: every C predicts the shares of the classes.
    x, y = np.zeros((20, 3), dtype=np.float32), np.repeat(["a", "b"], 10)
    _, choice = fit_logistic(x, y, C_grid=(10.0, 0.5, 1.0))
    assert len(set(choice["C_losses"].values())) == 1
    assert choice["C"] == 0.5


def test_fit_logistic_is_decided_by_its_seed():
    x, y = blobs([20, 20], spread=4.0)
    assert fit_logistic(x, y, seed=5)[1] == fit_logistic(x, y, seed=5)[1]


def test_held_out_rows_are_a_share_of_every_class_and_never_all_of_it():
    labels = np.array(["big"] * 50 + ["two"] * 2 + ["one"] + ["three"] * 3)
    np.random.default_rng(0).shuffle(labels)
    held_out = hold_out(len(labels), 0.2, 0, strata=np.unique(labels, return_inverse=True)[1])
    assert {name: int(held_out[labels == name].sum()) for name in ("big", "two", "one", "three")} == {
        "big": 10,
        "two": 1,
        "one": 0,
        "three": 1,
    }
    assert not np.array_equal(held_out, hold_out(len(labels), 0.2, 1, strata=np.unique(labels, return_inverse=True)[1]))


def test_fit_logistic_copes_with_a_class_of_one_row():
    x, y = blobs([12, 12, 1])
    head, choice = fit_logistic(x, y)
    assert head.classes_.tolist() == ["class 0", "class 1", "class 2"]
    assert choice["held_out_rows"] == 4


def test_fit_logistic_says_when_there_was_nothing_to_choose_C_by():
    x, y = blobs([1, 1, 1])
    head, choice = fit_logistic(x, y)
    assert choice["C"] == 1
    assert choice["C_losses"] == {}
    assert "every class has one training row" in choice["note"]
    assert head.predict(x).tolist() == y.tolist()


def test_fit_logistic_records_instead_of_warning_that_it_did_not_converge():
    x, y = blobs([30, 30, 30], spread=4.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, choice = fit_logistic(x, y, C_grid=(1.0, 10.0), max_iter=1)
    assert choice["converged"] is False
    assert choice["C_not_converged"] == [1.0, 10.0]


def test_fit_lets_other_warnings_through():
    class Grumbling:
        def fit(self, x, y):
            warnings.warn("something else", UserWarning, stacklevel=1)

    with pytest.warns(UserWarning, match="something else"), warnings.catch_warnings():
        warnings.simplefilter("always")
        assert penalties.fit_quietly(Grumbling(), None, None)


def test_fit_logistic_reports_progress():
    x, y = blobs([10, 10])
    lines = []
    fit_logistic(x, y, C_grid=(0.1, 1.0), progress=lines.append)
    assert [line.split(":")[0] for line in lines] == ["C = 0.1", "C = 1"]


@pytest.mark.parametrize("options", [{"fraction": 0}, {"fraction": 1}, {"C_grid": ()}, {"C_grid": (0.0, 1.0)}])
def test_fit_logistic_refuses_senseless_settings(options):
    x, y = blobs([4, 4])
    with pytest.raises(EvaluationError, match="fraction must lie between 0 and 1"):
        fit_logistic(x, y, **options)


def test_fit_logistic_refuses_a_single_class():
    x, y = blobs([4])
    with pytest.raises(EvaluationError, match="at least two classes"):
        fit_logistic(x, y)


def test_default_grid_is_the_signatures():
    assert inspect.signature(fit_logistic).parameters["C_grid"].default == heads.C_GRID


def test_labels_of_known_neighbours_do_not_depend_on_the_blocks(monkeypatch):
    rng = np.random.default_rng(0)
    head = WeightedKNN(k=5).fit(rng.normal(size=(60, 4)), np.arange(60) % 7)
    queries = rng.normal(size=(23, 4))
    known = KnownNeighbours(head, *head.search(queries), k=5)
    expected = head.predict(queries)
    for votes in (1, 7 * 4, 1 << 24):
        monkeypatch.setattr("embedkit.heads.neighbours._VOTES", votes)
        np.testing.assert_array_equal(known.predict(np.arange(23)), expected)
        assert known.predict(np.arange(0)).shape == (0,)
