import numpy as np
import pytest
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler, normalize
from sklearn.svm import LinearSVC
from sklearn.utils.estimator_checks import check_estimator, estimator_checks_generator

from embedkit.errors import EvaluationError
from embedkit.heads import (
    HEADS,
    LabelKNN,
    LogisticHead,
    MeanHead,
    MLPHead,
    MLPRegressor,
    RidgeHead,
    RidgeRegressor,
    WeightedKNNRegressor,
    make_head,
    ridge_sweep,
    stream_ridge,
)

ESTIMATORS = [
    LogisticHead(), RidgeHead(), RidgeRegressor(), WeightedKNNRegressor(), LabelKNN(), MeanHead(), MLPHead(hidden=32),
    MLPRegressor(hidden=32),
]  # fmt: skip


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda estimator: type(estimator).__name__)
def test_heads_are_scikit_learn_estimators(estimator):
    # A check that needs an uninstalled package is skipped with a warning; failures still raise.
    check_estimator(estimator, on_skip=None)


# A pipeline of scikit-learn fits the steps that it was given and not clones of them.
IN_PLACE = {"check_estimators_overwrite_params", "check_dont_overwrite_parameters"}


@pytest.mark.parametrize("name", ["logistic", "svm"])
def test_pipelines_pass_what_pipelines_can(name):
    for estimator, check in estimator_checks_generator(make_head(name), mark="skip"):
        if check.func.__name__ not in IN_PLACE and "array_api" not in check.func.__name__:
            check(estimator)


def rows(n, d, seed=0, dtype=np.float64):
    return (np.random.default_rng(seed).normal(size=(n, d)) * np.arange(1, d + 1) + 5).astype(dtype)


def blobs(counts, dim=6, spread=1.0, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(counts)), counts)
    x = 3 * rng.normal(size=(len(counts), dim))[labels] + spread * rng.normal(size=(len(labels), dim))
    return x.astype(np.float32), np.array([f"class {code}" for code in labels])


def several(x, c, seed=0):
    return (x @ np.random.default_rng(seed).normal(size=(x.shape[1], c)) > 0).astype(np.uint8)


@pytest.mark.parametrize("n", [50, 8], ids=["more rows than dimensions", "fewer"])
@pytest.mark.parametrize("regularisation", [0.1, 1000.0])
def test_ridge_solves_the_normal_equations(n, regularisation):
    x = rows(n, 12)
    codes = np.arange(n) % 3
    z = StandardScaler().fit_transform(x)
    y = np.where(codes[:, None] == np.arange(3), 1.0, -1.0)
    weights = np.linalg.solve(z.T @ z + regularisation * np.eye(12), z.T @ (y - y.mean(axis=0)))
    head = RidgeHead(regularisation).fit(x, codes)
    queries = rows(9, 12, seed=1)
    expected = (queries - x.mean(axis=0)) / x.std(axis=0) @ weights + y.mean(axis=0)
    np.testing.assert_allclose(head.decision_function(queries), expected, atol=1e-8)


@pytest.mark.parametrize("n", [50, 8])
def test_ridge_for_numbers_is_scikit_learns(n):
    x, y = rows(n, 12), np.random.default_rng(1).normal(size=n)
    scaler = StandardScaler().fit(x)
    expected = Ridge(alpha=3.0).fit(scaler.transform(x), y)
    queries = rows(9, 12, seed=1)
    found = RidgeRegressor(3.0).fit(x, y).predict(queries)
    np.testing.assert_allclose(found, expected.predict(scaler.transform(queries)), atol=1e-8)


def test_ridge_streams_blocks_to_the_same_heads():
    x, y = blobs([30, 30, 30])
    blocks = [(x[start : start + 7], y[start : start + 7]) for start in range(0, len(x), 7)]
    heads = stream_ridge(iter(blocks), np.unique(y).tolist(), [1.0, 50.0])
    for regularisation, head in heads.items():
        np.testing.assert_allclose(head.coef_, RidgeHead(regularisation).fit(x, y).coef_, rtol=1e-5)


def test_streamed_ridge_refuses_a_label_that_was_not_announced():
    with pytest.raises(EvaluationError, match="'c' is not among the classes"):
        stream_ridge([(np.eye(2), ["a", "c"])], ["a", "b"], [1.0])


def test_ridge_keeps_its_digits_where_the_mean_is_large():
    x, y = blobs([30, 30])
    far = x.astype(np.float64) + 1e6
    assert np.array_equal(RidgeHead(1.0).fit(far, y).predict(far), RidgeHead(1.0).fit(x, y).predict(x))


def test_ridge_sweep_predicts_what_single_fits_predict():
    x, y = blobs([20, 20, 20], spread=4.0)
    held = np.arange(len(x)) % 4 == 0
    for value, found in ridge_sweep(x, y, held, [0.1, 100.0]).items():
        assert found.tolist() == RidgeHead(value).fit(x[~held], y[~held]).predict(x[held]).tolist()
    targets = x @ np.arange(6.0)
    for value, found in ridge_sweep(x, targets, held, [0.1, 100.0], task="regression").items():
        expected = RidgeRegressor(value).fit(x[~held], targets[~held]).predict(x[held])
        np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_the_nearest_mean_is_that_of_rows_at_unit_length():
    x, y = blobs([9, 5, 7], spread=3.0)
    means = np.stack([normalize(x[y == name]).mean(axis=0) for name in np.unique(y)])
    expected = np.unique(y)[(normalize(x) @ normalize(means).T).argmax(axis=1)]
    assert MeanHead().fit(x, y).predict(x).tolist() == expected.tolist()


def test_the_nearest_mean_streams():
    x, y = blobs([9, 5, 7])
    head = MeanHead()
    for start in range(0, len(x), 4):
        head.partial_fit(x[start : start + 4], y[start : start + 4], classes=np.unique(y))
    np.testing.assert_allclose(head.sums_, MeanHead().fit(x, y).sums_, rtol=1e-6)


def test_the_nearest_mean_refuses_blocks_without_classes():
    with pytest.raises(EvaluationError, match="needs all classes"):
        MeanHead().partial_fit(np.eye(2), [0, 1])
    with pytest.raises(EvaluationError, match="2 is not among the classes"):
        MeanHead().partial_fit(np.eye(2), [0, 2], classes=[0, 1])


@pytest.mark.parametrize("name", HEADS)
def test_every_head_tells_separate_classes_apart(name):
    x, y = blobs([40, 40, 40])
    head = make_head(name).fit(x[::2], y[::2])
    assert np.mean(head.predict(x[1::2]) == y[1::2]) > 0.95


@pytest.mark.parametrize("name", ["logistic", "ridge", "knn", "mlp"])
def test_heads_predict_several_labels_a_row(name):
    x = np.random.default_rng(0).normal(size=(400, 5)).astype(np.float32)
    y = several(x, 4)
    head = make_head(name, task="multi-label").fit(x[:300], y[:300])
    found = head.predict(x[300:])
    assert found.shape == (100, 4) and set(np.unique(found)) <= {0, 1}
    assert np.mean(found == y[300:]) > 0.85
    scores = (head.predict_proba if hasattr(head, "predict_proba") else head.decision_function)(x[300:])
    assert scores.shape == (100, 4)
    if hasattr(head, "predict_proba"):
        np.testing.assert_array_equal(scores > 0.5, found)


@pytest.mark.parametrize(("name", "least"), [("ridge", 0.99), ("knn", 0.5), ("mlp", 0.9)])
def test_heads_predict_numbers(name, least):
    x = np.random.default_rng(0).normal(size=(400, 5)).astype(np.float32)
    y = x @ np.arange(1.0, 6.0) + 7
    parameters = {"regularisation": 0.1} if name == "ridge" else {}
    head = make_head(name, task="regression", **parameters).fit(x[:300], y[:300])
    assert head.score(x[300:], y[300:]) > least


def test_a_perceptron_is_decided_by_its_random_state():
    x, y = blobs([20, 20], spread=4.0)
    first, second, other = (MLPHead(hidden=8, random_state=seed).fit(x, y).predict_proba(x) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first, other)


def test_linear_heads_are_scikit_learns_on_standardised_rows():
    x, y = blobs([20, 20, 20], spread=4.0)
    z = StandardScaler().fit_transform(x)
    svm = LinearSVC(C=0.5, dual="auto", random_state=0, max_iter=5000).fit(z, y)
    lda = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.3).fit(z, y)
    assert make_head("svm", C=0.5).fit(x, y).predict(x).tolist() == svm.predict(z).tolist()
    assert make_head("lda", shrinkage=0.3).fit(x, y).predict(x).tolist() == lda.predict(z).tolist()


def test_make_head_names_what_there_is():
    with pytest.raises(EvaluationError, match="there is no head 'forest'; known: 'logistic', 'ridge'"):
        make_head("forest")
    with pytest.raises(EvaluationError, match="'svm' does not do regression; these do: ridge, knn, mlp"):
        make_head("svm", task="regression")
    with pytest.raises(EvaluationError, match="there is no task 'ranking'"):
        make_head("svm", task="ranking")
    with pytest.raises(EvaluationError, match="'mean' has other parameters"):
        make_head("mean", k=3)


@pytest.mark.parametrize("name", ["logistic", "ridge", "mlp"])
def test_a_matrix_of_other_values_than_0_and_1_is_refused(name):
    with pytest.raises(ValueError, match=r"0 and 1|not supported"):
        make_head(name, task="multi-label").fit(np.eye(3), np.array([[0, 2], [1, 0], [0, 1]]))


@pytest.mark.parametrize("head", [RidgeHead(-1.0), RidgeRegressor(float("nan")), MLPHead(hidden=0), LogisticHead(C=0)])
def test_heads_refuse_senseless_settings(head):
    with pytest.raises(EvaluationError, match="must be"):
        head.fit(np.eye(4), [0, 1, 0, 1])
