import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.multiclass import OneVsRestClassifier
from sklearn.preprocessing import StandardScaler

from embedkit.errors import EvaluationError
from embedkit.heads import LogisticHead, descent, design, fit_logistic, sweep_logistic
from embedkit.heads.design import Design


def problem(n, d, c, seed=0, offset=3.0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d)) * np.linspace(0.2, 3, d)
    y = (x @ rng.normal(size=(d, c)) + 2 * rng.normal(size=(n, c))).argmax(axis=1)
    return x + offset, y


@pytest.mark.parametrize("c", [2, 4])
@pytest.mark.parametrize(("n", "d"), [(200, 10), (40, 60)], ids=["more rows than dimensions", "fewer"])
@pytest.mark.parametrize("C", [1e-3, 0.1, 1.0])
def test_it_is_scikit_learns_logistic_regression(n, d, c, C):
    x, y = problem(n, d, c)
    ours = LogisticHead(C, tol=1e-6).fit(x, y)
    theirs = LogisticRegression(C=C, tol=1e-10, max_iter=10000).fit(x, y)
    assert ours.converged_ and ours.gradient_norm_ <= 1e-6
    assert ours.coef_.shape == theirs.coef_.shape
    np.testing.assert_allclose(ours.coef_, theirs.coef_, atol=2e-4)
    np.testing.assert_allclose(ours.predict_proba(x), theirs.predict_proba(x), atol=1e-4)


@pytest.mark.parametrize(("n", "d"), [(200, 10), (40, 60)])
def test_what_has_converged_has_no_larger_gradient_than_scikit_learn_allows(n, d):
    x, y = problem(n, d, 4)
    head = LogisticHead(1.0, tol=1e-3).fit(x, y)
    errors = head.predict_proba(x) - (y[:, None] == np.arange(4))
    by_weights = errors.T @ (x - x.mean(axis=0)) / n + head.coef_ / n
    largest = max(np.abs(by_weights).max(), np.abs(errors.mean(axis=0)).max())
    assert head.gradient_norm_ == pytest.approx(largest, rel=1e-2)
    assert largest <= 1.01e-3


def test_several_labels_are_one_regression_each():
    x, _ = problem(200, 8, 2, offset=0.0)
    y = (x[:, :3] + 0.3 * np.random.default_rng(1).normal(size=(200, 3)) > 0).astype(int)
    ours = LogisticHead(0.5, tol=1e-6).fit(x, y)
    theirs = OneVsRestClassifier(LogisticRegression(C=0.5, tol=1e-10)).fit(x, y)
    np.testing.assert_allclose(ours.predict_proba(x), theirs.predict_proba(x), atol=1e-5)


def test_a_sweep_finds_what_single_fits_find():
    x, y = problem(300, 12, 3)
    held = np.arange(300) % 5 == 0
    grid = [1e-4, 1e-2, 1.0]
    losses, unconverged = sweep_logistic(x, y, held, grid, tol=1e-6)
    accuracies, _ = sweep_logistic(x, y, held, grid, criterion="accuracy", tol=1e-6)
    scaler = StandardScaler().fit(x[~held])
    assert unconverged == []
    for C in grid:
        head = LogisticRegression(C=C, tol=1e-8).fit(scaler.transform(x[~held]), y[~held])
        queries = scaler.transform(x[held])
        assert losses[C] == pytest.approx(log_loss(y[held], head.predict_proba(queries)), rel=1e-5)
        assert accuracies[C] == pytest.approx(head.score(queries, y[held]), abs=1e-9)


def test_a_held_out_class_that_no_kept_row_has_is_never_right():
    x, y = problem(60, 5, 2)
    y[:6] = 7
    held = np.arange(60) < 12
    accuracies, _ = sweep_logistic(x, y, held, [0.1], criterion="accuracy")
    head = LogisticHead(0.1).fit(StandardScaler().fit_transform(x[~held]), y[~held])
    queries = StandardScaler().fit(x[~held]).transform(x[held])
    assert accuracies[0.1] == pytest.approx(np.mean(head.predict(queries) == y[held]))
    assert accuracies[0.1] <= 0.5


def test_the_choice_by_accuracy_takes_the_smaller_C_of_equals():
    x, y = problem(100, 3, 2)
    _, choice = fit_logistic(np.zeros_like(x), y, C_grid=(10.0, 0.1), criterion="accuracy")
    assert choice["C"] == 0.1 and list(choice["C_scores"]) == [0.1, 10.0]


def test_a_sweep_by_log_loss_ends_where_it_only_gets_worse():
    x, y = problem(60, 30, 3)
    held = np.arange(60) % 3 == 0
    grid = tuple(float(C) for C in 10.0 ** np.arange(-4, 6))
    _, choice = fit_logistic(x, y, held_out=held, C_grid=grid)
    every, _ = sweep_logistic(x, y, held, grid)
    tried = list(choice["C_losses"])
    assert [*tried, *choice["C_not_tried"]] == list(grid) and choice["C_not_tried"]
    assert choice["C"] == min(every, key=every.get) == tried[-4]
    _, by_accuracy = fit_logistic(x, y, held_out=held, C_grid=grid, criterion="accuracy")
    assert list(by_accuracy["C_scores"]) == list(grid) and by_accuracy["C_not_tried"] == []


def test_rows_to_hold_out_may_be_named():
    x, y = problem(100, 3, 2)
    held = np.arange(100) < 30
    _, choice = fit_logistic(x, y, held_out=held, C_grid=(0.1, 1.0))
    assert choice["held_out_rows"] == 30
    assert choice["C_losses"] == sweep_logistic(x, y, held, (0.1, 1.0))[0]


def test_fit_logistic_without_a_scaler_takes_rows_as_they_are():
    x, y = problem(150, 6, 3)
    head, choice = fit_logistic(x, y, standardise=False, C_grid=(0.01, 0.1), tol=1e-6)
    assert list(head.named_steps) == ["regression"]
    expected = LogisticRegression(C=choice["C"], tol=1e-10, max_iter=1000).fit(x, y)
    np.testing.assert_allclose(head.predict_proba(x), expected.predict_proba(x), atol=1e-5)


def test_a_large_mean_costs_no_digits():
    x, y = problem(150, 6, 3, offset=0.0)
    near, far = LogisticHead(1.0, tol=1e-6).fit(x, y), LogisticHead(1.0, tol=1e-6).fit(x + 1e5, y)
    np.testing.assert_allclose(near.coef_, far.coef_, atol=1e-3)


def test_a_fit_that_did_not_converge_says_so():
    x, y = problem(150, 6, 3)
    with pytest.warns(ConvergenceWarning, match="after 2 steps"):
        head = LogisticHead(100.0, max_iter=2).fit(x, y)
    assert not head.converged_ and head.n_iter_ == 2 and head.gradient_norm_ > head.tol


@pytest.mark.parametrize("device", ["cpu", "cpu:0"])
def test_the_device_is_torchs(device):
    x, y = problem(60, 4, 3)
    np.testing.assert_allclose(
        LogisticHead(0.1, device=device).fit(x, y).coef_, LogisticHead(0.1).fit(x, y).coef_, atol=1e-6
    )


@pytest.mark.parametrize("device", ["abacus", "meta", *([] if torch.cuda.is_available() else ["cuda"])])
def test_a_device_that_is_not_there_is_an_error(device):
    if device == "meta":
        pytest.skip("torch has it, and nothing can be computed there")
    with pytest.raises(EvaluationError, match="cannot be fitted on the device"):
        LogisticHead(device=device).fit(np.eye(2), [0, 1])


@pytest.mark.parametrize(("n", "d"), [(50, 6), (6, 20)])
def test_a_design_loses_nothing(n, d):
    x = problem(n, d, 2)[0].astype(np.float32)
    made = Design.of(x, np.arange(n), standardise=True, device="cpu")
    z = StandardScaler().fit_transform(x.astype(float))
    np.testing.assert_allclose((made.rows @ made.directions.T).numpy(), z, atol=1e-4)
    np.testing.assert_allclose((made.directions.T @ made.directions).numpy(), np.eye(made.rows.shape[1]), atol=1e-4)
    np.testing.assert_allclose(made.rows.square().mean(dim=0).numpy(), made.spectrum.numpy(), atol=1e-3)


def test_wide_designs_do_without_eigenvectors(monkeypatch):
    x, y = problem(80, 12, 3)
    usual = LogisticHead(0.1, tol=1e-6).fit(x, y)
    monkeypatch.setattr(design, "WIDEST", 5)
    np.testing.assert_allclose(LogisticHead(0.1, tol=1e-6).fit(x, y).coef_, usual.coef_, atol=1e-4)


def test_blocks_change_nothing(monkeypatch):
    x, y = problem(300, 6, 3)
    usual = LogisticHead(0.1, tol=1e-6).fit(x, y)
    monkeypatch.setattr(design, "ROWS", 32)
    monkeypatch.setattr(descent, "ROWS", 17)
    np.testing.assert_allclose(LogisticHead(0.1, tol=1e-6).fit(x, y).coef_, usual.coef_, atol=1e-4)
