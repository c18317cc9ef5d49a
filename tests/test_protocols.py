import inspect

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV
from sklearn.naive_bayes import GaussianNB
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from embedkit.errors import EvaluationError
from embedkit.evaluation import PROTOCOLS, Protocol
from embedkit.evaluation.protocols import find_protocol
from embedkit.evaluation.targets import Training
from embedkit.evaluation.tuning import GRIDS, PATIENCE
from embedkit.heads import C_GRID, WeightedKNN, make_head
from embedkit.heads.folding import hold_out

CLASSES = np.array(["daisy", "rose", "tulip"])


def blobs(n=90, d=6, spread=1.5, seed=0):
    """Overlapping classes, as float32 of some scale that is not one."""
    rng = np.random.default_rng(seed)
    codes = np.arange(n) % 3
    centres = np.random.default_rng(99).normal(size=(3, d))
    return (3 * (centres[codes] + spread * rng.normal(size=(n, d)))).astype(np.float32), CLASSES[codes]


def fitted(name, rows, seed=0, head=None):
    lines = []
    return (*find_protocol(name, head).fit(rows, seed=seed, progress=lines.append), lines)


@pytest.mark.parametrize("name", sorted(PROTOCOLS))
def test_a_protocol_says_its_recipe_its_source_and_its_deviations(name):
    protocol = PROTOCOLS[name]
    text = inspect.getdoc(type(protocol))
    assert isinstance(protocol, Protocol) and vars(type(protocol))["version"] >= 1  # Its own, beside its definition.
    assert name == "default" or ("Source:" in text and "Deviations:" in text)
    with pytest.raises(AttributeError):
        protocol.k = 3


def test_unknown_protocols_and_heads_that_do_not_go_with_one_are_refused():
    with pytest.raises(EvaluationError, match="no protocol 'dino'"):
        find_protocol("dino")
    with pytest.raises(EvaluationError, match="'clip-lbfgs' has a head of its own"):
        find_protocol("clip-lbfgs", head="ridge")
    with pytest.raises(EvaluationError, match="no head 'forest'; known: 'logistic'"):
        fitted("default", Training(*blobs()), head="forest")


class Duck:
    """What a library offers that knows scikit-learn's methods, and perhaps its older mark of a kind."""

    def fit(self, X, y):
        self.classes_ = np.unique(y)
        return self

    def predict(self, X):
        return np.full(len(X), self.classes_[0])

    def get_params(self, deep=True):
        return {}


class MarkedDuck(Duck):
    _estimator_type = "classifier"


@pytest.mark.parametrize(
    "head",
    [
        GaussianNB(), Ridge(), make_pipeline(StandardScaler(), GaussianNB()), GridSearchCV(Ridge(), {"alpha": [1]}),
        MarkedDuck(),
    ],
)  # fmt: skip
def test_classifiers_and_regressors_are_heads(head):
    assert find_protocol("default", head).head is head


@pytest.mark.parametrize(
    ("head", "named"),
    [
        (GaussianNB, "the class GaussianNB"), (KMeans(), "of type KMeans"), (StandardScaler(), "type StandardScaler"),
        (make_pipeline(StandardScaler()), "of type Pipeline"), (Duck(), "of type Duck"), (3, "of type int"),
        (len, "of type builtin_function_or_method"), ([], "of type list"),
    ],
)  # fmt: skip
def test_what_is_no_head_is_refused_by_its_type(head, named):
    with pytest.raises(EvaluationError, match=f"a head is one of logistic, .* got .*{named}"):
        find_protocol("default", head)


@pytest.mark.parametrize("names", [["a", "b"], ["a", "a", "b", "b"]])
def test_rows_that_a_head_cannot_be_fitted_to_are_an_error_with_its_name(names):
    rows = Training(blobs(len(names))[0], np.array(names))
    message = "the head 'lda' cannot be fitted to 2 rows: .* more than the number of classes.* such as 'ridge'"
    with pytest.raises(EvaluationError, match=message):
        fitted("default", rows, head="lda")


def test_a_class_of_one_row_makes_lda_say_nothing():
    x, y = blobs(31)
    y = np.append(y[:30], "zinnia")
    head, choice, _ = fitted("default", Training(x, y), head="lda")  # A warning would be an error here.
    assert len(choice["losses"]) == len(GRIDS["lda"][1]) and "zinnia" in head.classes_


def test_a_class_whose_every_row_is_held_out_is_named():
    x, names = blobs(10)[0], np.array(["many"] * 9 + ["one\n"])
    took = [seed for seed in range(40) if hold_out(10, 0.1, seed)[9]]
    assert 0 < len(took) < 20
    with pytest.raises(
        EvaluationError, match=r"held out, no row is left to fit to of 'one\\+n' \(1 row\): give .*'default'"
    ):
        fitted("dinov2-logreg", Training(x, names), seed=took[0])
    other = next(seed for seed in range(40) if seed not in took)
    assert fitted("dinov2-logreg", Training(x, names), seed=other)[1]["held_out_rows"] == 1
    for name in ("default", "clip-lbfgs"):
        assert fitted(name, Training(x, names), seed=took[0])[0].classes_.tolist() == ["many", "one\n"]


# dino-knn


def dino_votes(x, codes, queries, k, temperature):
    """The votes of DINO's eval_knn.py, row by row: exp(s / T) of the k most similar."""
    unit, queries = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (x, queries))
    similar = queries @ unit.T
    nearest = np.argsort(-similar, axis=1)[:, :k]
    weights = np.exp(np.take_along_axis(similar, nearest, axis=1) / temperature)
    return np.stack([(weights * (codes[nearest] == code)).sum(axis=1) for code in range(codes.max() + 1)], axis=1)


def dinov2_votes(x, codes, queries, k, temperature, most=200):
    """The votes of DINOv2's eval/knn.py: a softmax over the `most` similar, cut off at k."""
    unit, queries = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (x, queries))
    similar = queries @ unit.T
    nearest = np.argsort(-similar, axis=1)[:, :most]
    weights = softmax(np.take_along_axis(similar, nearest, axis=1) / temperature, axis=1)[:, :k]
    nearest = nearest[:, :k]
    return np.stack([(weights * (codes[nearest] == code)).sum(axis=1) for code in range(codes.max() + 1)], axis=1)


@pytest.mark.parametrize("k", [1, 10, 20, 100])
def test_dinos_votes_and_dinov2s_rank_classes_alike_and_as_ours(k):
    rng = np.random.default_rng(k)
    x, queries = rng.normal(size=(300, 8)), rng.normal(size=(40, 8))
    codes = rng.integers(0, 7, size=300)
    first, second = dino_votes(x, codes, queries, k, 0.07), dinov2_votes(x, codes, queries, k, 0.07)
    ours = WeightedKNN(k=k, temperature=0.07).fit(x, codes).predict_proba(queries)
    np.testing.assert_allclose(first / first.sum(axis=1, keepdims=True), ours, atol=1e-9)
    np.testing.assert_allclose(second / second.sum(axis=1, keepdims=True), ours, atol=1e-9)
    ranks = [np.argsort(-votes.round(12), axis=1, kind="stable") for votes in (ours, first / first.sum(1)[:, None])]
    np.testing.assert_array_equal(*ranks)
    assert (second.sum(axis=1) < 1 - 1e-6).any() or k > 99


def test_dino_knn_reports_every_k_and_chooses_none():
    rows = Training(*blobs())
    head, choice, _ = fitted("dino-knn", rows)
    assert choice == {"head": "knn", "chosen": {"k": 20, "T": 0.07}}
    queries = blobs(seed=5)[0]
    jury = PROTOCOLS["dino-knn"].jury(head, rows, queries)
    assert list(jury.beside) == ["10", "100", "200"] and head.k == 20
    for k, known in {20: jury.main, 10: jury.beside["10"], 100: jury.beside["100"]}.items():
        expected = WeightedKNN(k=k).fit(rows.x, rows.y)
        np.testing.assert_array_equal(known.predict(jury.questions), expected.predict(queries))
        few = jury.questions[7:12]
        np.testing.assert_allclose(known.predict_proba(few), expected.predict_proba(queries[7:12]), atol=1e-6)


# dinov2-logreg and clip-lbfgs


def test_dinov2_tries_45_values_on_a_tenth_and_refits_to_all():
    rows = Training(*blobs(150))
    head, choice, lines = fitted("dinov2-logreg", rows)
    grid = [float(C) for C in choice["C_scores"]]
    np.testing.assert_allclose(grid, 10 ** np.linspace(-6, 5, 45))
    assert choice["held_out_rows"] == 15 and len(lines) == 45
    best = max(choice["C_scores"].values())
    assert choice["C"] == min(C for C, score in choice["C_scores"].items() if score == best)
    reference = LogisticRegression(C=choice["C"], max_iter=5000, tol=1e-8).fit(rows.x.astype(np.float64), rows.y)
    queries = blobs(200, seed=3)[0]
    assert np.mean(head.predict(queries) == reference.predict(queries.astype(np.float64))) >= 0.995


def test_clips_search_halves_its_steps_around_the_best():
    rows = Training(*blobs(150))
    head, choice, _ = fitted("clip-lbfgs", rows)
    tried = np.log10(list(choice["C_scores"]))
    assert set(range(-6, 7, 2)) <= set(tried.round(9))
    assert len(tried) <= 7 + 2 * 4 and tried.min() >= -6 and tried.max() <= 6
    np.testing.assert_allclose(tried * 8, (tried * 8).round(), atol=1e-6)  # Eight steps a decade.
    steps = np.abs(tried - np.log10(choice["C"]))
    assert np.isclose(steps, 0.125).any()
    assert choice["C_scores"][choice["C"]] == max(choice["C_scores"].values())
    assert choice["held_out_rows"] == 30
    reference = LogisticRegression(C=choice["C"], max_iter=5000, tol=1e-8).fit(rows.x.astype(np.float64), rows.y)
    queries = blobs(200, seed=3)[0]
    assert np.mean(head.predict(queries) == reference.predict(queries.astype(np.float64))) >= 0.995


# bigvision-fewshot and mteb-image


def big_vision_scores(x, codes, queries, l2=2.0**10, bias=100.0):
    """big_vision's recipe written down from its description, by the eigenvectors of x x' or x' x."""
    x, queries = x.astype(np.float64), queries.astype(np.float64)
    mean, std = x.mean(axis=0), x.std(axis=0) + 1e-5
    x, queries = (np.hstack([(rows - mean) / std, np.full((len(rows), 1), bias)]) for rows in (x, queries))
    y = 2.0 * np.eye(codes.max() + 1)[codes] - 1
    if len(x) >= x.shape[1]:
        values, vectors = np.linalg.eigh(x.T @ x)
        weights = (vectors / (values + l2)) @ (vectors.T @ (x.T @ y))
    else:
        values, vectors = np.linalg.eigh(x @ x.T)
        weights = x.T @ ((vectors / (values + l2)) @ (vectors.T @ y))
    return queries @ weights


@pytest.mark.parametrize("n", [6, 12, 90])
def test_least_squares_is_big_visions_ridge_with_more_rows_or_more_dimensions(n):
    x, y = blobs(n, d=10)
    queries = blobs(50, d=10, seed=1)[0]
    expected = big_vision_scores(x, np.searchsorted(CLASSES, y), queries)
    head, choice, _ = fitted("bigvision-fewshot", Training(x, y))
    np.testing.assert_allclose(head.decision_function(queries), expected, rtol=1e-3, atol=1e-4)
    assert head.predict(queries).tolist() == CLASSES[expected.argmax(axis=1)].tolist()
    assert choice["chosen"] == {"l2": 1024.0}
    assert PROTOCOLS["bigvision-fewshot"].shots == (1, 5, 10, 25) and PROTOCOLS["bigvision-fewshot"].seeds == 3


def test_mteb_is_scikit_learns_regression_with_too_few_iterations():
    x, y = blobs(48, d=40)
    head, choice, _ = fitted("mteb-image", Training(x, y))
    queries = blobs(60, d=40, seed=2)[0]
    reference = LogisticRegression(max_iter=100).fit(x, y)
    assert np.mean(head.predict(queries) == reference.predict(queries)) >= 0.95
    assert choice["C"] == 1.0 and choice["converged"] in (True, False)
    assert PROTOCOLS["mteb-image"].shots == (16,) and PROTOCOLS["mteb-image"].seeds == 5


# default


def test_default_takes_any_estimator_and_leaves_it_as_it_is():
    rows, mine = Training(*blobs()), GaussianNB(var_smoothing=0.1)
    head, choice, _ = fitted("default", rows, head=mine)
    assert choice == {"head": "GaussianNB"} and not hasattr(mine, "classes_")
    np.testing.assert_array_equal(head.predict(rows.x), GaussianNB(var_smoothing=0.1).fit(*blobs()).predict(rows.x))


def test_default_chooses_the_k_of_a_k_nn_head_on_held_out_rows():
    head, choice, lines = fitted("default", Training(*blobs()), head="knn")
    assert choice["head"] == "knn" and choice["criterion"] == "error" and choice["held_out_rows"] == 18
    assert head.k == choice["chosen"]["k"] == min(choice["losses"], key=choice["losses"].__getitem__)
    assert len(lines) == len(choice["losses"]) + 1


def test_ridge_is_chosen_from_one_sweep_as_from_single_fits():
    rows = Training(*blobs())
    head, choice, _ = fitted("default", rows, head="ridge")
    held = hold_out(90, 0.2, 0, strata=rows.strata)
    for value, loss in choice["losses"].items():
        single = make_head("ridge", regularisation=value).fit(rows.x[~held], rows.y[~held])
        assert loss == pytest.approx(np.mean(single.predict(rows.x[held]) != rows.y[held]))
    least = min(choice["losses"].values())
    assert choice["chosen"]["regularisation"] == max(v for v, loss in choice["losses"].items() if loss == least)
    assert head.regularisation == choice["chosen"]["regularisation"]


@pytest.mark.parametrize("name", ["svm", "lda", "mean", "mlp"])
def test_every_head_has_a_name(name):
    rows = Training(*blobs())
    head, choice, _ = fitted("default", rows, head=name)
    assert choice["head"] == name and np.mean(head.predict(rows.x) == rows.y) > 0.7
    assert choice["chosen"].keys() <= head.get_params().keys() or name in ("svm", "lda")


@pytest.mark.parametrize("name", ["ridge", "knn"])
def test_numbers_and_labels_are_tuned_by_their_own_losses(name):
    x, _ = blobs()
    numbers, labels = x @ np.arange(6.0), (x[:, :3] > 0).astype(np.uint8)
    assert fitted("default", Training(x, numbers, "regression"), head=name)[1]["criterion"] == "squared error"
    assert fitted("default", Training(x, labels, "multi-label"), head=name)[1]["criterion"] == "1 - mAP"


def test_default_predicts_numbers_by_ridge_regression():
    x, _ = blobs()
    assert fitted("default", Training(x, x @ np.arange(6.0), "regression"))[1]["head"] == "ridge"
    with pytest.raises(EvaluationError, match="take the head ridge, knn or mlp"):
        fitted("default", Training(x, x[:, 0], "regression"), head="logistic")


def test_default_says_when_there_was_nothing_to_choose_by():
    x, y = blobs(3)
    assert "every class has one training row" in fitted("default", Training(x, y), head="knn")[1]["note"]


@pytest.mark.parametrize("name", ["default", "dinov2-logreg", "clip-lbfgs"])
def test_copies_are_never_on_both_sides_of_a_choice(name):
    # Each row twice, with labels of chance: were copies split, a head could look them up and weak penalties would win.
    rng = np.random.default_rng(0)
    x = np.repeat(rng.normal(size=(60, 80)).astype(np.float32), 2, axis=0)
    y = np.repeat(rng.choice(CLASSES, size=60), 2)
    groups = np.repeat(np.arange(60), 2)
    scores = {}
    for known in (True, False):
        choice = fitted(name, Training(x, y, groups=groups if known else None))[1]
        found = choice.get("C_scores") or {C: -loss for C, loss in choice["C_losses"].items()}
        scores[known] = max(found.values())
    assert scores[False] > scores[True]
    assert name == "default" or scores[True] < 0.6 < scores[False]


def test_the_grid_of_the_default_protocol_is_the_heads():
    assert PROTOCOLS["default"].C_grid == C_GRID


def test_a_support_vector_machine_stops_trying_where_it_only_gets_worse():
    rows = Training(*blobs(300, spread=3))
    head, choice, lines = fitted("default", rows, head="svm")
    losses = list(choice["losses"].values())
    best = losses.index(min(losses))
    assert choice["chosen"] == {"C": list(choice["losses"])[best]} == {"C": head["svm"].C}
    tried = GRIDS["svm"][1][: len(losses)]
    assert tuple(choice["losses"]) == tried and len(lines) == len(tried) + 1
    worse = [loss > min(losses[: number + 1]) for number, loss in enumerate(losses)]
    assert len(tried) == len(GRIDS["svm"][1]) or worse[-PATIENCE["svm"] :] == [True] * PATIENCE["svm"]
