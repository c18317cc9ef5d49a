import json

import numpy as np
import pytest
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import Ridge
from sklearn.metrics import average_precision_score, mean_absolute_error, r2_score
from sklearn.multiclass import OneVsRestClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import SVC

from embedkit.errors import EvaluationError
from embedkit.evaluation import PROTOCOLS, FittedHead, compare, probe
from embedkit.evaluation.intervals import t_interval
from embedkit.spec import EmbeddingSpec
from embedkit.store import Store, StoreWriter

DIM = 6
CLASSES = ("daisy", "rose", "tulip")


def write_store(path, x, labels=None, *, hashes=None, prefix=""):
    spec = EmbeddingSpec(backbone="resnet18", weights_sha256="ab" * 32, dim=DIM)
    ids = [f"{prefix}{row:03}.jpg" for row in range(len(x))]
    hashes = None if hashes is None else [bytes(31) + bytes([code]) for code in hashes]
    with StoreWriter(path, spec) as writer:
        writer.append(np.asarray(x, dtype=np.float32), ids, labels=labels, content_sha256=hashes)
        writer.finalise()
    return path


def rows_of(n, seed, spread=1.0):
    """Overlapping classes."""
    codes = np.arange(n) % len(CLASSES)
    centres = 2 * np.random.default_rng(99).normal(size=(len(CLASSES), DIM))
    x = centres[codes] + spread * np.random.default_rng(seed).normal(size=(n, DIM))
    return x, [CLASSES[code] for code in codes]


@pytest.fixture
def stores(tmp_path):
    """A store to train on, and one to test on."""
    return write_store(tmp_path / "train.h5", *rows_of(60, 0)), write_store(tmp_path / "test.h5", *rows_of(45, 1))


# Test rows and what is chosen


@pytest.mark.parametrize("name", sorted(PROTOCOLS))
def test_changing_the_test_labels_changes_no_choice_and_no_head(tmp_path, stores, name):
    train, test = stores
    x, labels = rows_of(45, 1)
    other = write_store(tmp_path / "other.h5", x, list(np.random.default_rng(5).permutation(labels)))
    left, right = probe(train, test, protocol=name), probe(train, other, protocol=name)
    assert left.parameters == right.parameters
    np.testing.assert_array_equal(left.predictions["predicted"], right.predictions["predicted"])
    assert left.metrics["top1"] != right.metrics["top1"]


@pytest.mark.parametrize("head", ["knn", "logistic"])
def test_changing_the_test_rows_changes_no_choice(tmp_path, stores, head):
    other = write_store(tmp_path / "other.h5", -5 * rows_of(9, 7)[0], ["rose", "daisy", "unheard of"] * 3)
    left, right = (probe(stores[0], test, head=head) for test in (stores[1], other))
    assert left.parameters == right.parameters


def test_folds_choose_within_the_other_folds(tmp_path):
    x, labels = rows_of(60, 0)
    first = probe(write_store(tmp_path / "one.h5", x, labels), folds=3, seed=1)
    inside = first.predictions["fold"] == 0
    # Labels of fold 0, turned around among its rows of one class, so that the folds stay as they are.
    changed = x.copy()
    changed[inside] = x[inside][::-1]
    second = probe(write_store(tmp_path / "two.h5", changed, labels), folds=3, seed=1)
    np.testing.assert_array_equal(first.predictions["fold"], second.predictions["fold"])
    assert first.parameters["by_fold"][0] == second.parameters["by_fold"][0]


# Reports of every protocol


@pytest.mark.parametrize("name", sorted(PROTOCOLS))
def test_every_protocol_reports_what_others_read(stores, name):
    report = probe(*stores, protocol=name, seed=3)
    metric, value, (low, high) = report.headline
    assert metric == "top1" and 0 <= low <= value <= high <= 1 and value > 0.5
    assert report.parameters["protocol"] == name and report.parameters["protocol_version"] == PROTOCOLS[name].version
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False)) == report.to_dict()
    found = report.predictions
    assert found["ids"].tolist() == Store.open(stores[1]).ids
    assert found["correct"].mean() == pytest.approx(value)
    confidence = found.get("confidence")
    assert confidence is None or (confidence.dtype == np.float32 and confidence.shape == (45,))
    assert f"{value:.4f}" in report.to_text()
    assert isinstance(report.head, FittedHead) and report.head.classes == sorted(CLASSES)
    if "shots" not in report.metrics:
        expected = np.searchsorted(report.classes, report.head.predict(Store.open(stores[1]).load()))
        np.testing.assert_array_equal(expected, found["predicted"])


def test_reports_of_two_heads_are_compared(stores):
    left, right = probe(*stores), probe(*stores, protocol="dino-knn")
    found = compare(left, right)
    assert found.difference == pytest.approx(left.metrics["top1"] - right.metrics["top1"])
    np.testing.assert_array_equal(left.predictions["knn"], right.predictions["predicted"])


def test_dino_knn_reports_the_accuracy_of_every_k(stores):
    report = probe(*stores, protocol="dino-knn")
    assert list(report.metrics["by_k"]) == ["10", "20", "100", "200"]
    assert report.metrics["by_k"]["20"] == report.metrics["top1"]
    assert "k = 100" in report.to_text()


def test_an_estimator_of_scikit_learn_is_a_head(stores):
    report = probe(*stores, head=KNeighborsClassifier(3))
    train, test = (Store.open(path) for path in stores)
    names = np.array(train.classes)[train.labels]
    expected = KNeighborsClassifier(3).fit(train.load(), names).predict(test.load())
    assert [report.classes[code] for code in report.predictions["predicted"]] == expected.tolist()
    assert report.parameters["head"] == "KNeighborsClassifier"
    assert "KNeighborsClassifier top1" in report.to_text()


# Few-shot


def test_scores_of_pairs_of_classes_rank_nothing(tmp_path):
    x = np.random.default_rng(0).normal(size=(64, DIM))
    store = write_store(tmp_path / "store.h5", x, [f"class {row % 8}" for row in range(64)])
    assert "top5" not in probe(store, folds=2, head=SVC(decision_function_shape="ovo")).metrics
    metrics = probe(store, folds=2, head=SVC()).metrics
    assert metrics["top5"] >= metrics["top1"]


def test_few_shot_reports_the_mean_and_students_interval_over_seeds(stores):
    report = probe(*stores, shots=[4, 1, 2], seeds=3, seed=7)
    shots = report.metrics["shots"]
    assert list(shots) == ["1", "2", "4"] and [one["rows"] for one in shots.values()] == [3, 6, 12]
    for one in shots.values():
        assert len(one["values"]) == 3 and one["top1"] == pytest.approx(np.mean(one["values"]))
        np.testing.assert_allclose(one["top1_interval"], np.clip(t_interval(one["values"]), 0, 1))
    assert report.metrics["top1"] == shots["4"]["top1"]
    assert set(np.unique((report.predictions["correct"] * 3).round(6))) <= {0, 1, 2, 3}
    assert report.parameters["shots"] == [1, 2, 4] and report.parameters["seeds"] == 3
    assert "4-shot top1" in report.to_text()
    assert np.sum(report.metrics["confusion"]) == 3 * 45


def test_few_shot_runs_are_repeated_by_their_seed_and_share_it_between_backbones(stores):
    one = probe(*stores, shots=2, seeds=2, seed=1)
    assert one.to_dict() == probe(*stores, shots=(2,), seeds=2, seed=1).to_dict()
    assert one.metrics["shots"]["2"]["values"][1] == probe(*stores, shots=2, seeds=1, seed=2).metrics["top1"]


def test_shots_beyond_a_class_take_all_its_rows(stores):
    report = probe(*stores, shots=1000, seeds=1)
    assert report.metrics["shots"]["1000"]["rows"] == 60
    assert report.metrics["top1"] == probe(*stores).metrics["top1"]


# Folds


def test_folds_score_every_row_by_a_head_that_did_not_see_it(tmp_path):
    # Labels of chance: a head that saw a row would know its label.
    rng = np.random.default_rng(0)
    labels = rng.choice(CLASSES, size=90)
    store = write_store(tmp_path / "chance.h5", rng.normal(size=(90, DIM)), labels.tolist())
    report = probe(store, folds=5, head=KNeighborsClassifier(1))
    assert report.metrics["top1"] < 0.6
    assert len(report.predictions["predicted"]) == 90 and report.parameters["folds"] == 5
    known = report.head.predict(Store.open(store).load())
    np.testing.assert_array_equal(known, labels)  # The head that is returned knows all rows.
    x = Store.open(store).load()
    for fold in range(5):
        inside = report.predictions["fold"] == fold
        head = KNeighborsClassifier(1).fit(x[~inside], labels[~inside])
        expected = np.searchsorted(sorted(CLASSES), head.predict(x[inside]))
        np.testing.assert_array_equal(report.predictions["predicted"][inside], expected)


def test_byte_identical_pictures_lie_in_one_fold(tmp_path):
    rng = np.random.default_rng(0)
    x = np.repeat(rng.normal(size=(40, DIM)), 2, axis=0)
    labels = np.repeat(rng.choice(CLASSES, size=40), 2).tolist()
    hashes = np.repeat(np.arange(1, 41), 2)
    known = probe(write_store(tmp_path / "known.h5", x, labels, hashes=hashes), folds=4, head=KNeighborsClassifier(1))
    unknown = probe(write_store(tmp_path / "unknown.h5", x, labels), folds=4, head=KNeighborsClassifier(1))
    fold = known.predictions["fold"].reshape(40, 2)
    assert (fold[:, 0] == fold[:, 1]).all()
    assert unknown.metrics["top1"] > known.metrics["top1"] + 0.2


def test_folds_of_a_split_files_training_part_leave_the_test_part_alone(tmp_path, stores):
    split = tmp_path / "split.csv"
    split.write_text("path,split\n" + "".join(f"{row:03}.jpg,{'test' if row < 20 else 'train'}\n" for row in range(60)))
    report = probe(stores[0], split=split, folds=4)
    assert report.predictions["ids"].tolist() == [f"{row:03}.jpg" for row in range(20, 60)]
    assert "each by the fold of 4 without it" in report.to_text()


# Several labels an image


def labelled(n, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, DIM))
    has = x[:, :3] + 0.4 * rng.normal(size=(n, 3)) > 0
    return x, [";".join(np.array(CLASSES)[row]) for row in has], has


def multi_label_split(tmp_path, n=120, tested=40):
    x, names, has = labelled(n, 0)
    store = write_store(tmp_path / "tags.h5", x)
    lines = [f"{row:03}.jpg,{'test' if row < tested else 'train'},{names[row]}" for row in range(n)]
    split = tmp_path / "tags.csv"
    split.write_text("path,split,label\n" + "\n".join(lines) + "\n")
    return store, split, x.astype(np.float32), has, tested


def test_labels_of_an_image_are_scored_by_mean_average_precision(tmp_path):
    store, split, x, has, tested = multi_label_split(tmp_path)
    report = probe(store, split=split, target="multi-label")
    found = report.predictions
    assert report.task == "multi-label" and report.classes == list(CLASSES) == report.head.classes
    np.testing.assert_array_equal(found["true"], has[:tested])
    expected = average_precision_score(has[:tested], found["scores"], average=None)
    np.testing.assert_allclose(list(report.metrics["per_class"].values()), expected)
    assert report.metrics["mAP"] == pytest.approx(expected.mean()) and report.metrics["mAP"] > 0.8
    assert report.metrics["mAP_interval"][0] < report.metrics["mAP"] <= report.metrics["mAP_interval"][1]
    assert report.inputs["train"]["rows_per_class"]["rose"] == has[tested:, 1].sum()
    assert "linear mAP" in report.to_text() and "precision" in report.to_text()
    np.testing.assert_array_equal(report.head.predict(x[:tested]), found["predicted"])


def test_labels_of_a_store_are_taken_apart(tmp_path):
    x, names, has = labelled(80, 0)
    names = [name or "none" for name in names]
    store = write_store(tmp_path / "tags.h5", x, names)
    split = tmp_path / "split.csv"
    split.write_text("path,split\n" + "".join(f"{row:03}.jpg,{'test' if row < 30 else 'train'}\n" for row in range(80)))
    report = probe(store, split=split, target="multi-label", head=OneVsRestClassifier(KNeighborsClassifier(5)))
    assert report.classes == ["daisy", "none", "rose", "tulip"]
    np.testing.assert_array_equal(report.predictions["true"][:, 0], has[:30, 0])


def test_a_label_that_training_lacks_is_never_predicted_and_counted(tmp_path):
    store, split, *_ = multi_label_split(tmp_path)
    split.write_text(split.read_text().replace("000.jpg,test,", "000.jpg,test,zinnia;"))
    report = probe(store, split=split, target="multi-label")
    column = report.classes.index("zinnia")
    assert report.inputs["unseen_classes"] == {"zinnia": 1}
    assert not report.predictions["predicted"][:, column].any()
    assert report.metrics["per_class"]["zinnia"] == pytest.approx(1 / 40)


def test_a_label_that_the_other_folds_lack_scores_nothing(tmp_path):
    """scikit-learn gives such a label one column of probabilities, that of not having it."""
    x, names, _ = labelled(60, 0)
    names = [f"{name};rare" if row == 7 else f"{name};other" for row, name in enumerate(names)]
    store = write_store(tmp_path / "tags.h5", x, names)
    report = probe(store, folds=5, target="multi-label", head=RandomForestClassifier(5, random_state=0))
    rare, fold = report.classes.index("rare"), report.predictions["fold"]
    assert not report.predictions["scores"][fold == fold[7], rare].any()
    assert report.predictions["scores"][fold == fold[7], report.classes.index("other")].mean() > 0.9


# Numbers


def regression_split(tmp_path, n=120, tested=40):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, DIM))
    y = 5 + x @ np.arange(1, DIM + 1) + 0.5 * rng.normal(size=n)
    lines = [f"{row:03}.jpg,{'test' if row < tested else 'train'},{y[row]!r}" for row in range(n)]
    split = tmp_path / "numbers.csv"
    split.write_text("path,split,target\n" + "\n".join(line.replace("np.float64(", "").rstrip(")") for line in lines))
    return write_store(tmp_path / "numbers.h5", x), split, x.astype(np.float32), y, tested


def test_numbers_are_scored_by_r2_and_mean_absolute_error(tmp_path):
    store, split, x, y, tested = regression_split(tmp_path)
    report = probe(store, split=split, target="regression", head=Ridge(1.0))
    expected = Ridge(1.0).fit(x[tested:], y[tested:]).predict(x[:tested])
    assert report.metrics["r2"] == pytest.approx(r2_score(y[:tested], expected))
    assert report.metrics["mae"] == pytest.approx(mean_absolute_error(y[:tested], expected))
    assert report.metrics["r2_interval"][0] < report.metrics["r2"] < report.metrics["r2_interval"][1]
    np.testing.assert_allclose(report.predictions["predicted"], expected, rtol=1e-6)
    assert report.classes == [] and report.headline[0] == "r2" and "Ridge mae" in report.to_text()
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["inputs"]["train"]["targets"]["mean"]
    poor = probe(store, split=split, target="regression", head=Ridge(1e4))
    assert compare(report, poor).real and compare(report, poor).metric == "r2"


def test_numbers_are_cross_validated(tmp_path):
    store, split, *_ = regression_split(tmp_path)
    report = probe(store, split=split, target="regression", head=Ridge(1.0), folds=4)
    assert len(report.predictions["predicted"]) == 80 and report.metrics["r2"] > 0.9


# Leaks


def test_leaks_are_counted_and_dropped_on_demand(tmp_path):
    x, labels = rows_of(40, 0)
    queries, names = rows_of(20, 1)
    queries[:3] = x[:3]
    train = write_store(tmp_path / "train.h5", x, labels, hashes=np.arange(1, 41))
    test = write_store(tmp_path / "test.h5", queries, names, hashes=np.r_[[1, 2, 3], np.arange(101, 118)])
    kept, dropped = probe(train, test), probe(train, test, drop_leaks=True)
    assert kept.inputs["leaks"]["exact_pairs"] == 3 and kept.inputs["leaks"]["dropped"] == 0
    assert kept.inputs["train"]["rows"] == 40
    rows = kept.inputs["leaks"]["train_rows"]
    assert rows >= 3 and dropped.inputs["leaks"]["dropped"] == rows and dropped.inputs["train"]["rows"] == 40 - rows
    assert f"--drop-leaks leaves {rows} training rows out" in kept.to_text()
    assert f"{rows} training rows were left out" in dropped.to_text()


# Options that make no sense together


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"folds": 1}, "at least two folds"),
        ({"folds": 3, "shots": 2}, "shots go with classes and without folds"),
        ({"folds": 100}, "cannot be divided into 100 folds"),
        ({"folds": 3, "protocol": "mteb-image"}, "'mteb-image' fits to a few rows and has no folds"),
        ({"folds": 3, "drop_leaks": True}, "drop_leaks goes without them"),
        ({"folds": 3, "shots": 2}, "shots go with classes and without folds"),
        ({"test_split": "val"}, "name parts of a split file"),
        ({"train_split": "trian"}, "name parts of a split file"),
        ({"target": "colour"}, "no target 'colour'; known: 'class', 'multi-label', 'regression'"),
        ({"target": "regression"}, "pass a split file with a column target"),
        ({"target": "multi-label", "protocol": "dino-knn"}, "'dino-knn' is for classes"),
        ({"shots": 0}, "at least 1; got 0"),
        ({"shots": []}, "at least 1; got"),
        ({"seeds": 3}, "go with shots; got 3"),
        ({"head": "ridge", "protocol": "clip-lbfgs"}, "has a head of its own"),
    ],
)
def test_options_that_make_no_sense_are_refused(stores, options, match):
    arguments = stores[:1] if "folds" in options else stores
    with pytest.raises(EvaluationError, match=match):
        probe(*arguments, **options)


def test_a_training_part_of_leaks_alone_is_refused(stores):
    with pytest.raises(EvaluationError, match="every training row shows a picture of the test part"):
        probe(stores[0], stores[0], drop_leaks=True)


def test_folds_and_a_test_store_exclude_each_other(stores):
    with pytest.raises(EvaluationError, match="folds cross-validate one store"):
        probe(*stores, folds=3)


@pytest.mark.parametrize("value", ["", "many", "nan", "inf"])
def test_targets_that_are_no_numbers_are_named_with_their_line(tmp_path, stores, value):
    split = tmp_path / "split.csv"
    split.write_text(f"path,split,target\n000.jpg,train,1\n001.jpg,test,{value}\n")
    with pytest.raises(EvaluationError, match=rf"split.csv, line 3: the target '{value}' is not a finite number"):
        probe(stores[0], split=split, target="regression")


def test_a_path_with_two_targets_is_refused(tmp_path, stores):
    split = tmp_path / "split.csv"
    split.write_text("path,split,target\n000.jpg,train,1\n000.jpg,train,2\n")
    with pytest.raises(EvaluationError, match=r"listed twice, in the targets 1\.0 and 2\.0"):
        probe(stores[0], split=split, target="regression")


def test_targets_without_spread_and_labels_without_rows_are_refused(tmp_path, stores):
    split = tmp_path / "split.csv"
    rows = [(row, "test" if row < 20 else "train") for row in range(60)]
    split.write_text("path,split,target\n" + "".join(f"{row:03}.jpg,{part},{part == 'train'}\n" for row, part in rows))
    split.write_text(split.read_text().replace("True", "1").replace("False", "7"))
    with pytest.raises(EvaluationError, match="all 20 test targets are 7; R2 needs two"):
        probe(stores[0], split=split, target="regression", head=Ridge())
    split.write_text("path,split,label\n" + "".join(f"{row:03}.jpg,{part},{'a' * (row > 30)}\n" for row, part in rows))
    with pytest.raises(EvaluationError, match="none of 20 test rows has a label"):
        probe(stores[0], split=split, target="multi-label")


# Devices


@pytest.mark.parametrize(
    "arguments",
    [{}, {"protocol": "dinov2-logreg"}, {"protocol": "clip-lbfgs"}, {"head": "mlp"}, {"folds": 2}, {"shots": 3}],
    ids=str,
)
def test_a_device_reaches_the_head(stores, arguments):
    train, test = stores
    report = probe(train, None if "folds" in arguments else test, device="cpu:0", **arguments)
    estimator = report.head.estimator
    head = estimator[-1] if hasattr(estimator, "steps") else estimator
    assert head.device == report.parameters["device"] == "cpu:0"


@pytest.mark.parametrize("arguments", [{}, {"protocol": "clip-lbfgs"}, {"head": "mlp"}], ids=str)
def test_a_device_that_is_not_there_is_not_replaced(stores, arguments):
    with pytest.raises(EvaluationError, match="cannot be fitted on the device 'cuda:77'"):
        probe(*stores, device="cuda:77", **arguments)


@pytest.mark.parametrize(
    "arguments", [{"head": "ridge"}, {"protocol": "dino-knn"}, {"protocol": "mteb-image"}], ids=str
)
def test_a_head_of_the_cpu_refuses_another_device(stores, arguments):
    with pytest.raises(EvaluationError, match="fitted on the CPU, not on 'cuda'; a device goes with logistic"):
        probe(*stores, device="cuda", **arguments)


def test_a_single_label_is_refused_with_what_to_do(tmp_path):
    store = Store.open(multi_label_split(tmp_path)[0])
    split = tmp_path / "single.csv"
    rows = [f"{id},{'train' if row % 2 else 'test'},{'cat' if row % 3 else ''}" for row, id in enumerate(store.ids)]
    split.write_text("\n".join(["path,split,label", *rows]) + "\n")
    with pytest.raises(EvaluationError, match="have the label 'cat' or none, and no other; probe it"):
        probe(store, split=split, target="multi-label")
