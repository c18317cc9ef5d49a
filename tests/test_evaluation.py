import json
import os

import numpy as np
import pytest
from sklearn.metrics import accuracy_score
from sklearn.metrics import confusion_matrix as sklearn_confusion

from embedkit.errors import EvaluationError, SpecMismatchError, StoreNotFoundError
from embedkit.evaluation import PROTOCOLS, Report, columns, probe, scoring
from embedkit.evaluation.intervals import bootstrap_interval
from embedkit.evaluation.metrics import class_accuracies, confusion_matrix
from embedkit.heads import WeightedKNN, fit_logistic
from embedkit.spec import EmbeddingSpec
from embedkit.store import Store, StoreWriter

DIM = 4


def write_store(path, x, ids, labels=None, failures=(), pool="default"):
    spec = EmbeddingSpec(backbone="resnet18", weights_sha256="ab" * 32, dim=DIM, pool=pool)
    with StoreWriter(path, spec) as writer:
        writer.append(np.asarray(x, dtype=np.float32).reshape(-1, DIM), ids, labels=labels)
        for id in failures:
            writer.fail(id, "truncated")
        writer.finalise()
    return path


def flowers(path, per_class=8, classes=("daisy", "rose", "tulip"), seed=0, **options):
    """A store with `per_class` overlapping rows of each class; class c is centred on its name, whatever its code."""
    rng = np.random.default_rng(seed)
    x, ids, labels = [], [], []
    for name in classes:
        centre = np.random.default_rng(sum(map(ord, name))).normal(size=DIM)
        x.append(centre + 0.7 * rng.normal(size=(per_class, DIM)))
        ids += [f"{name}/{row}.jpg" for row in range(per_class)]
        labels += [name] * per_class
    return write_store(path, np.concatenate(x), ids, labels, **options)


def write_split(path, rows, header=("path", "split")):
    path.write_text("\n".join(",".join(row) for row in [header, *rows]) + "\n", encoding="utf-8")
    return path


def halves(store, test="test"):
    """Assign every other row of a store to training."""
    return [(id, "train" if row % 2 else test) for row, id in enumerate(Store.open(store).ids)]


@pytest.fixture
def store(tmp_path):
    return flowers(tmp_path / "flowers.h5")


# Metrics


TRUE, PREDICTED = np.array([0, 0, 0, 1, 1, 3]), np.array([0, 0, 1, 1, 3, 3])


def test_confusion_counts_true_classes_in_rows():
    assert confusion_matrix(TRUE, PREDICTED, 4).tolist() == [[2, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0], [0, 0, 0, 1]]
    expected = sklearn_confusion(TRUE, PREDICTED, labels=range(4))
    np.testing.assert_array_equal(confusion_matrix(TRUE, PREDICTED, 4), expected)


def test_class_accuracies_are_none_for_a_class_without_rows():
    assert class_accuracies(TRUE, PREDICTED, 4) == [2 / 3, 1 / 2, None, 1.0]


def test_bootstrap_interval_agrees_with_resampling_the_rows():
    correct = np.arange(200) < 150
    rng = np.random.default_rng(1)
    literal = [correct[rng.integers(0, 200, size=200)].mean() for _ in range(5000)]
    np.testing.assert_allclose(bootstrap_interval(correct), np.quantile(literal, [0.025, 0.975]), atol=0.0101)


def test_bootstrap_interval_narrows_with_rows_and_depends_on_the_seed_alone():
    few, many = bootstrap_interval([True, False] * 10), bootstrap_interval([True, False] * 1000)
    assert few[0] < many[0] < 0.5 < many[1] < few[1]
    assert bootstrap_interval([True, False] * 10, seed=3) == bootstrap_interval([True, False] * 10, seed=3)


@pytest.mark.parametrize("right", [True, False])
def test_bootstrap_interval_has_no_width_when_all_rows_agree(right):
    assert bootstrap_interval([right] * 5) == [float(right)] * 2


# Probing two stores


def test_probe_scores_both_heads_on_the_test_rows(tmp_path):
    train, test = flowers(tmp_path / "train.h5"), flowers(tmp_path / "test.h5", per_class=5, seed=1)
    report = probe(train, test, seed=2)
    left, right = Store.open(train), Store.open(test)
    names, true = np.array(left.classes)[left.labels], np.array(right.classes)[right.labels]
    head, choice = fit_logistic(left.load(), names, seed=2)
    knn = WeightedKNN().fit(left.load(), names)
    assert report.metrics["top1"] == accuracy_score(true, head.predict(right.load()))
    assert report.metrics["knn_top1"] == accuracy_score(true, knn.predict(right.load()))
    assert report.parameters["C"] == choice["C"]
    confusion = np.array(report.metrics["confusion"])
    assert confusion.sum() == 15 and np.trace(confusion) / 15 == pytest.approx(report.metrics["top1"])
    low, high = report.metrics["top1_interval"]
    assert low <= report.metrics["top1"] <= high
    assert report.head.predict(right.load()).tolist() == [report.classes[i] for i in report.predictions["linear"]]
    assert report.predictions["ids"].tolist() == right.ids


def test_probe_takes_open_stores_as_well_as_paths(tmp_path, store):
    test = flowers(tmp_path / "test.h5", seed=1)
    assert probe(Store.open(store), Store.open(test)).to_dict() == probe(str(store), test).to_dict()


def test_probe_is_decided_by_its_inputs_and_seed(tmp_path, store):
    test = flowers(tmp_path / "test.h5", seed=1)
    assert probe(store, test, seed=4).to_dict() == probe(store, test, seed=4).to_dict()


def test_classes_are_matched_by_name_not_by_code(tmp_path):
    train = flowers(tmp_path / "train.h5", classes=("daisy", "rose", "tulip"))
    test = flowers(tmp_path / "test.h5", classes=("rose", "tulip"), seed=1)
    assert Store.open(test).labels[0] == 0 and Store.open(train).classes[0] == "daisy"
    report = probe(train, test)
    assert report.classes == ["daisy", "rose", "tulip"]
    assert report.metrics["per_class"]["daisy"] is None
    assert report.metrics["confusion"][0] == [0, 0, 0]
    assert report.metrics["top1"] > 0.5


def test_test_rows_of_unseen_classes_count_as_wrong(tmp_path):
    train = flowers(tmp_path / "train.h5", classes=("daisy", "rose"))
    test = flowers(tmp_path / "test.h5", classes=("rose", "zinnia"), seed=1)
    report = probe(train, test)
    assert report.inputs["unseen_classes"] == {"zinnia": 8}
    assert report.metrics["per_class"]["zinnia"] == 0
    assert report.metrics["top1"] <= 0.5
    assert "8 test rows of 1 classes unseen in training count as wrong" in report.to_text()


def test_test_labels_change_neither_C_nor_the_head(tmp_path, store):
    rng = np.random.default_rng(3)
    x, ids = rng.normal(size=(9, DIM)), [f"{row}.jpg" for row in range(9)]
    one = write_store(tmp_path / "one.h5", x, ids, ["daisy", "rose", "tulip"] * 3)
    other = write_store(tmp_path / "other.h5", -x, ids, ["tulip", "tulip", "unheard of"] * 3)
    left, right = probe(store, one), probe(store, other)
    assert left.parameters == right.parameters
    np.testing.assert_array_equal(left.head["regression"].coef_, right.head["regression"].coef_)
    assert left.metrics != right.metrics


def test_classes_of_one_row_are_probed(tmp_path):
    train = flowers(tmp_path / "train.h5", per_class=1)
    report = probe(train, flowers(tmp_path / "test.h5", seed=1))
    assert report.parameters["C"] == 1 and "one training row" in report.parameters["note"]
    assert report.parameters["k"] == 3


def test_stores_that_were_embedded_differently_are_refused(tmp_path, store):
    with pytest.raises(SpecMismatchError, match="cannot probe: train and test were embedded differently") as caught:
        probe(store, flowers(tmp_path / "test.h5", pool="avg"))
    assert caught.value.differences == {"pool": ("default", "avg")}


def test_failures_are_counted(tmp_path, store):
    test = flowers(tmp_path / "test.h5", failures=["rose/broken.jpg"])
    report = probe(store, test)
    assert (report.inputs["train"]["failures"], report.inputs["test"]["failures"]) == (0, 1)
    assert "1 images failed at extraction" in report.to_text()


# Probing one store with a split file


def test_a_split_file_divides_one_store(tmp_path, store):
    split = write_split(tmp_path / "split.csv", halves(store))
    report = probe(store, split=split)
    opened = Store.open(store)
    names = np.array(opened.classes)[opened.labels]
    head, _ = fit_logistic(opened.load()[1::2], names[1::2])
    assert report.metrics["top1"] == accuracy_score(names[::2], head.predict(opened.load()[::2]))
    assert report.inputs["train"]["rows"] == report.inputs["test"]["rows"] == 12
    assert report.inputs["split"] == str(split)
    assert report.predictions["ids"].tolist() == opened.ids[::2]


def test_the_order_of_the_split_file_does_not_matter(tmp_path, store):
    rows = halves(store)
    one, other = write_split(tmp_path / "a.csv", rows), write_split(tmp_path / "b.csv", rows[::-1])
    assert probe(store, split=one).metrics == probe(store, split=other).metrics


@pytest.mark.parametrize("name", ["test", "val", "validation"])
def test_the_usual_names_of_the_test_split_are_found(tmp_path, store, name):
    split = write_split(tmp_path / "split.csv", halves(store, test=name))
    assert probe(store, split=split).inputs["test"]["rows"] == 12


def test_test_wins_over_val_and_names_may_be_given(tmp_path, store):
    rows = [(id, ("train", "val", "test")[row % 3]) for row, id in enumerate(Store.open(store).ids)]
    split = write_split(tmp_path / "split.csv", rows)
    tested = [id for id, part in rows if part == "test"]
    report = probe(store, split=split)
    assert report.predictions["ids"].tolist() == tested
    assert report.inputs["left_out"] == {"not_in_split": 0, "other_splits": {"val": 8}}
    swapped = probe(store, split=split, train_split="test", test_split="train")
    assert swapped.predictions["ids"].tolist() == [id for id, part in rows if part == "train"]


def test_rows_that_the_split_does_not_mention_are_left_out_and_counted(tmp_path, store):
    split = write_split(tmp_path / "split.csv", halves(store)[:-3])
    report = probe(store, split=split)
    assert report.inputs["left_out"]["not_in_split"] == 3
    assert "3 rows of the store are not in the split file and were left out" in report.to_text()


def test_labels_of_the_split_file_win_over_the_stores(tmp_path, store):
    rows = [(id, part, "even" if row % 4 < 2 else "odd") for row, (id, part) in enumerate(halves(store))]
    split = write_split(tmp_path / "split.csv", rows, ("path", "split", "label"))
    assert probe(store, split=split).classes == ["even", "odd"]


def test_a_store_without_labels_needs_only_those_of_the_split_file(tmp_path):
    ids = [f"{row}.jpg" for row in range(8)]
    bare = write_store(tmp_path / "bare.h5", np.random.default_rng(0).normal(size=(8, DIM)), ids)
    rows = [("ab"[row % 2], id, "train" if row < 4 else "test") for row, id in enumerate(ids)]
    split = write_split(tmp_path / "split.csv", rows, ("label", "path", "split"))
    assert probe(bare, split=split).inputs["train"]["rows_per_class"] == {"a": 2, "b": 2}


def test_images_that_failed_at_extraction_may_stand_in_the_split_file(tmp_path):
    store = flowers(tmp_path / "flowers.h5", failures=["rose/broken.jpg"])
    split = write_split(tmp_path / "split.csv", [*halves(store), ("rose/broken.jpg", "train")])
    inputs = probe(store, split=split).inputs
    assert (inputs["train"]["failures"], inputs["test"]["failures"]) == (1, 0)


def test_split_files_of_spreadsheets_and_odd_file_names_are_read(tmp_path):
    names = ["a,b.jpg", "back\\slash.jpg", os.fsdecode(b"latin\xe9.jpg"), "é.jpg", 'quo"te.jpg', "line\nbreak.jpg"]
    store = write_store(tmp_path / "odd.h5", np.random.default_rng(0).normal(size=(6, DIM)), names, ["a", "b"] * 3)
    text = "path,split\r\n"
    for row, name in enumerate(names):
        quoted = name.replace('"', '""')
        text += f'"{quoted}",{"train" if row < 4 else "test"}\r\n'
    split = tmp_path / "split.csv"
    split.write_bytes(b"\xef\xbb\xbf" + os.fsencode(text) + b"\r\n")
    report = probe(store, split=split)
    assert sorted(report.predictions["ids"].tolist()) == sorted(names[4:])
    json.dumps(report.to_dict())


# Errors


def refuses(match, *arguments, **options):
    with pytest.raises(EvaluationError, match=match):
        probe(*arguments, **options)


def test_unknown_protocols_are_refused_with_the_known_ones(store):
    refuses("no protocol 'clip'; known: 'bigvision-fewshot', 'clip-lbfgs', 'default', ", store, store, protocol="clip")


def test_negative_seeds_are_refused(store):
    refuses("seed must not be negative", store, store, seed=-1)


def test_exactly_one_of_test_store_and_split_file_is_needed(store):
    refuses("got neither", store)
    refuses("got both", store, store, split="split.csv")


def test_a_missing_store_is_named(tmp_path):
    with pytest.raises(StoreNotFoundError, match=r"nowhere\.h5"):
        probe(tmp_path / "nowhere.h5", tmp_path / "nowhere.h5")


def test_stores_without_labels_are_refused(tmp_path, store):
    bare = write_store(tmp_path / "bare.h5", np.eye(DIM), list("abcd"))
    refuses(r"bare.h5 has no labels; .* one folder per class", store, bare)


def test_unlabelled_rows_are_counted_and_named(tmp_path, store):
    partly = write_store(tmp_path / "partly.h5", np.eye(DIM), list("abcd"), ["rose", None, None, "daisy"])
    refuses(r"partly.h5: 2 rows have no label: 'b', 'c'; ", store, partly)
    refuses(r"partly.h5: 2 rows have no label: 'b', 'c'; ", partly, store)


def test_unlabelled_rows_that_are_not_used_do_not_matter(tmp_path):
    x = np.random.default_rng(0).normal(size=(6, DIM))
    store = write_store(tmp_path / "partly.h5", x, list("abcdef"), ["x", "y", "x", "y", None, None])
    split = write_split(tmp_path / "split.csv", [("a", "train"), ("b", "train"), ("c", "test"), ("d", "test")])
    assert probe(store, split=split).inputs["left_out"]["not_in_split"] == 2


def test_empty_labels_in_the_split_file_are_counted_and_named(tmp_path, store):
    rows = [(id, part, "" if row == 3 else "ab"[row % 4 // 2]) for row, (id, part) in enumerate(halves(store))]
    split = write_split(tmp_path / "split.csv", rows, ("path", "split", "label"))
    refuses(r"split.csv: 1 rows have no label: 'daisy/3.jpg'; fill in", store, split=split)


def test_empty_stores_are_refused(tmp_path, store):
    empty = write_store(tmp_path / "empty.h5", np.empty((0, DIM)), [])
    refuses("empty.h5: .* the store is empty", store, empty)
    refuses("empty.h5: .* the store is empty", empty, split=write_split(tmp_path / "split.csv", halves(store)))


def test_training_on_one_class_is_refused(tmp_path, store):
    roses = flowers(tmp_path / "roses.h5", classes=("rose",))
    refuses("roses.h5: all 8 training rows are of the class 'rose'", roses, store)


def test_embeddings_that_are_not_finite_are_counted(tmp_path, store):
    x = np.eye(DIM)
    x[1, 2], x[3, 0] = 123, 456
    broken = write_store(tmp_path / "broken.h5", x, list("abcd"), ["rose", "daisy"] * 2)
    data = broken.read_bytes()  # By hand: no writer writes such numbers.
    for finite, other in ((123, np.nan), (456, np.inf)):
        data = data.replace(np.float32(finite).tobytes(), np.float32(other).tobytes())
    broken.write_bytes(data)
    refuses(r"broken.h5: 2 embeddings have values that are not finite, such as those of 'b', 'd'", store, broken)


def test_paths_that_the_store_lacks_are_counted_and_named(tmp_path, store):
    extra = [(f"lily/{row}.jpg", "train") for row in range(5)]
    split = write_split(tmp_path / "split.csv", [*halves(store), *extra])
    expected = r"5 of 17 paths of the split 'train' in .*split.csv are not in .*flowers.h5: "
    refuses(expected + r"'lily/0.jpg', 'lily/1.jpg', 'lily/2.jpg', \.\.\.; .*like 'daisy/0.jpg'", store, split=split)


def test_a_path_in_two_splits_is_refused(tmp_path, store):
    split = write_split(tmp_path / "split.csv", [*halves(store), ("daisy/0.jpg", "train")])
    refuses(r"split.csv, line 26: 'daisy/0.jpg' is listed twice, in 'test' and 'train'", store, split=split)


def test_a_path_with_two_labels_is_refused(tmp_path, store):
    rows = [("daisy/0.jpg", "train", "a"), ("daisy/0.jpg", "train", "b")]
    split = write_split(tmp_path / "split.csv", rows, ("path", "split", "label"))
    refuses("listed twice, in the labels 'a' and 'b'", store, split=split)


def test_a_path_listed_twice_alike_counts_once(tmp_path, store):
    rows = halves(store)
    split = write_split(tmp_path / "split.csv", [*rows, rows[0]])
    assert probe(store, split=split).inputs["test"]["rows"] == 12


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "first line must name one column path, .* found an empty line"),
        ("file,split\na,train\n", "found 'file', 'split'"),
        ("path,split,split\na,train,test\n", "found 'path', 'split', 'split'"),
        ("path,split\n", "has a header and no rows"),
        ("path,split\na,b,train\n", "line 2: 3 values for 2 columns"),
        ("path,split\na\n", "line 2: 1 values for 2 columns"),
        ("path,split\n,train\n", "line 2: an empty path"),
        ("path,split\na,\n", "line 2: an empty split"),
        ("path,split\n" + "a" * 140_000 + ",train\n", "is not a CSV file: field larger than"),
        ("path,split\na,test\n", "no rows of the split 'train'; the file has 'test' \\(1 rows\\)"),
        ("path,split\na,train\nb,dev\n", "no split named test, val, validation; .*'dev' \\(1 rows\\)"),
    ],
)
def test_a_bad_split_file_is_named_with_what_is_wrong(tmp_path, store, text, match):
    split = tmp_path / "split.csv"
    split.write_text(text)
    refuses(f"split.csv.*{match}", store, split=split)


def test_a_split_file_that_cannot_be_read_is_named(tmp_path, store):
    refuses(r"split file .*nowhere.csv cannot be read: No such file", store, split=tmp_path / "nowhere.csv")


def test_named_splits_must_exist_and_differ(tmp_path, store):
    split = write_split(tmp_path / "split.csv", halves(store))
    refuses("no rows of the split 'dev'", store, split=split, test_split="dev")
    refuses("train and test are both the split 'train'", store, split=split, test_split="train")


def test_a_split_whose_images_all_failed_is_refused(tmp_path):
    store = flowers(tmp_path / "flowers.h5", failures=["lost.jpg"])
    rows = [(id, "train") for id in Store.open(store).ids]
    split = write_split(tmp_path / "split.csv", [*rows, ("lost.jpg", "test")])
    refuses("all 1 images of the split 'test' in .* failed at extraction", store, split=split)


# Reports


def test_to_dict_holds_json_values_only(tmp_path, store):
    values = probe(store, flowers(tmp_path / "test.h5", seed=1)).to_dict()
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    assert sorted(values) == ["classes", "inputs", "metrics", "parameters"]
    tried, left_out = values["parameters"]["C_losses"], values["parameters"]["C_not_tried"]
    assert [*map(float, tried), *left_out] == list(PROTOCOLS["default"].C_grid)
    assert values["inputs"]["digest"] == Store.open(store).digest
    assert values["inputs"]["train"]["content_id"] == Store.open(store).content_id


def part(rows_per_class):
    rows = {"rows": sum(rows_per_class.values()), "classes": len(rows_per_class), "rows_per_class": rows_per_class}
    return {"path": "pets.h5", "content_id": "", "failures": 0, **rows}


def report_of(confusion, classes):
    confusion = np.asarray(confusion)
    tested = dict(zip(classes, confusion.sum(axis=1).tolist(), strict=True))
    accuracies = (confusion.diagonal() / confusion.sum(axis=1)).tolist()
    metrics = {"top1": 0.75, "top1_interval": [0.25, 1.0], "knn_top1": 0.5, "knn_top1_interval": [0.0, 1.0]}
    per_class = dict(zip(classes, accuracies, strict=True))
    inputs = {"train": part(dict.fromkeys(classes, 3)), "test": part(tested), "unseen_classes": {}}
    return Report(
        metrics={**metrics, "per_class": per_class, "confusion": confusion.tolist()},
        parameters={"C": 0.1, "converged": True, "k": 6, "temperature": 0.07},
        inputs={**inputs, "left_out": {"not_in_split": 0, "other_splits": {}}},
        classes=list(classes),
    )


def test_text_is_a_calm_table():
    assert report_of([[1, 1], [0, 10]], ["cat", "dog"]).to_text() == (
        "            accuracy  95 % interval\nlinear top1    0.7500  [0.2500, 1.0000]  C = 0.1\n"
    ).replace("            accuracy", "             accuracy") + (
        "k-NN top1      0.5000  [0.0000, 1.0000]  k = 6, T = 0.07\n"
        "\n"
        "train  6 rows, 2 classes  pets.h5\n"
        "test   12 rows, 2 classes  pets.h5\n"
        "\n"
        "class  accuracy  train rows  test rows\n"
        "cat      0.5000           3          2\n"
        "dog      1.0000           3         10\n"
        "\n"
        "true \\ predicted     0   1\n"
        "cat               0  1   1\n"
        "dog               1  .  10\n"
    )


def test_text_of_many_classes_shows_the_worst_and_says_so():
    confusion = 5 * np.eye(30, dtype=int)
    confusion[7, 3], confusion[7, 7] = 4, 1
    text = report_of(confusion, [f"class {code:02}" for code in range(30)]).to_text()
    lines = text.splitlines()
    assert lines[lines.index("class     accuracy  train rows  test rows") + 1].startswith("class 07    0.2000")
    assert "(the 20 classes of lowest accuracy, of 30)" in lines
    assert "class 07  class 03           4" in lines
    assert "(the 1 most frequent confusions; the matrix of 30 classes is in the JSON report)" in lines
    assert len(lines) < 40


def test_text_is_aligned_with_wide_and_combining_characters():
    lines = report_of(np.eye(3, dtype=int), ["猫", "e\u0301", "dog"]).to_text().splitlines()
    table = lines[lines.index("class  accuracy  train rows  test rows") + 1 :][:3]
    assert [line[: line.index("1.0000")] for line in table] == ["猫       ", "e\u0301        ", "dog      "]


def test_class_names_cannot_drive_the_terminal():
    text = report_of(np.eye(2, dtype=int), ["red\x1b[31m\n", "a\u202eb\udce9"]).to_text()
    assert "red\\x1b[31m\\n" in text and "a\\u202eb\\udce9" in text
    assert all(char.isprintable() or char == "\n" for char in text)


def test_long_class_names_are_cut():
    assert columns.short_name("x" * 100) == "x" * 37 + "..."


def test_the_confusion_matrix_is_left_out_beyond_a_limit(tmp_path, store, monkeypatch):
    monkeypatch.setattr(scoring, "CONFUSION_CLASSES", 2)
    report = probe(store, flowers(tmp_path / "test.h5", seed=1))
    assert report.metrics["confusion"] is None
    assert "predicted" not in report.to_text()


def test_probe_reports_progress(tmp_path, store):
    lines = []
    report = probe(store, flowers(tmp_path / "test.h5", seed=1), progress=lines.append)
    begun = lines.index("reading 24 training and 24 test rows")
    assert len(lines[begun:]) == 2 + len(report.parameters["C_losses"])
