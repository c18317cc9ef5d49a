import hashlib
import json
import os
import random

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer, StandardScaler

from embedkit import EmbeddingSpec
from embedkit.errors import EmbedkitError, EvaluationError, SpecMismatchError
from embedkit.evaluation.predicting import predict
from embedkit.heads import HEADS, LeastSquares, load_head, logistic_regression, make_head, save_head
from embedkit.store import StoreWriter

SPEC = EmbeddingSpec(backbone="resnet18", weights_sha256="ab" * 32, dim=4)
NAMES = ["ant", "bee", "cat"]


def rows(n=60, seed=0):
    return np.random.default_rng(seed).normal(size=(n, 4)).astype(np.float32)


def named(x, c=3):
    return np.array(NAMES)[(x[:, :c] + 0.1).argmax(axis=1)]


def outputs(head, x):
    names = [name for name in ("predict", "predict_proba", "decision_function") if hasattr(head, name)]
    return {name: getattr(head, name)(x) for name in names}


def same(head, loaded, x):
    for name, values in outputs(head, x).items():
        np.testing.assert_array_equal(outputs(loaded, x)[name], values)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("name", HEADS)
def test_a_loaded_head_predicts_bit_for_bit_the_same(tmp_path, name, classes):
    x, queries = rows(), rows(30, seed=1)
    head = make_head(name).fit(x, named(x, classes))
    save_head(tmp_path / "a.head", head, classes=NAMES[:classes], spec=SPEC, information={"protocol": "default"})
    loaded = load_head(tmp_path / "a.head")
    same(head, loaded.estimator, queries)
    assert (loaded.classes, loaded.spec, loaded.task) == (NAMES[:classes], SPEC, "class")
    assert loaded.information == {"protocol": "default"}


@pytest.mark.parametrize("name", ["logistic", "ridge", "knn", "mlp"])
def test_heads_of_several_labels_are_saved(tmp_path, name):
    x, queries = rows(), rows(30, seed=1)
    head = make_head(name, task="multi-label").fit(x, (x[:, :3] > 0).astype(int))
    save_head(tmp_path / "a.head", head, classes=NAMES, spec=SPEC, task="multi-label")
    same(head, load_head(tmp_path / "a.head").estimator, queries)


@pytest.mark.parametrize("name", ["ridge", "knn", "mlp"])
def test_heads_of_numbers_are_saved(tmp_path, name):
    x, queries = rows(), rows(30, seed=1)
    head = make_head(name, task="regression").fit(x, x[:, 0] * 3 + 1)
    save_head(tmp_path / "a.head", head, classes=[], spec=SPEC, task="regression")
    same(head, load_head(tmp_path / "a.head").estimator, queries)


@pytest.mark.parametrize(
    "head", [make_pipeline(StandardScaler(), LogisticRegression()), make_pipeline(Normalizer(), LeastSquares(1.0))]
)
def test_other_linear_pipelines_are_saved(tmp_path, head):
    x = rows()
    save_head(tmp_path / "a.head", head.fit(x, named(x)), classes=NAMES, spec=SPEC)
    same(head, load_head(tmp_path / "a.head").estimator, rows(9, seed=1))


def test_what_cannot_be_saved_is_refused_by_name(tmp_path):
    x = rows()
    forest = RandomForestClassifier(n_estimators=2, random_state=0).fit(x, named(x))
    with pytest.raises(EvaluationError, match="a RandomForestClassifier cannot be saved"):
        save_head(tmp_path / "a.head", forest, classes=NAMES, spec=SPEC)
    with pytest.raises(EvaluationError, match="the StandardScaler is not fitted"):
        save_head(tmp_path / "a.head", logistic_regression(1.0), classes=NAMES, spec=SPEC)
    with pytest.raises(EvaluationError, match="contradicts"):
        save_head(tmp_path / "a.head", make_head("mean").fit(x, named(x)), classes=NAMES[:2], spec=SPEC)
    assert list(tmp_path.iterdir()) == []


def saved(folder):
    x = rows()
    save_head(folder, make_head("knn").fit(x, named(x)), classes=NAMES, spec=SPEC)
    return folder / "head.json", folder / "arrays.safetensors"


def test_a_head_may_be_replaced_and_nothing_else(tmp_path):
    saved(tmp_path / "a.head")
    saved(tmp_path / "a.head")
    (tmp_path / "photos").mkdir()
    with pytest.raises(EvaluationError, match="photos is there already and is no head"):
        saved(tmp_path / "photos")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.head", "photos"]


def test_a_head_that_is_not_there_says_how_to_get_one(tmp_path):
    with pytest.raises(
        EvaluationError, match=r"there is no file head\.json; heads are written by embedkit probe --save"
    ):
        load_head(tmp_path / "a.head")


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (["format"], "other", "is no head of embedkit"),
        (["version"], 2, "has version 2"),
        (["task"], "ranking", "the task is 'ranking'"),
        (["task"], ["class"], "the task is"),
        (["classes"], "ant", "classes must be a list of texts"),
        (["classes"], ["ant"], "codes of no class"),
        (["spec", "dim"], 5, "contradicts the other parts"),
        (["spec"], [], "lacks a part|incomplete"),
        (["information"], None, "the task is|lacks"),
        (["estimator", "kind"], "os.system", "there is no kind of head 'os.system'"),
        (["estimator", "kind"], ["Pipeline"], "lacks a part"),
        (["estimator", "parameters"], {"k": 1, "__class__": "x"}, "has other parameters or parts"),
        (["estimator", "fitted", "predict"], 3, "has other parameters or parts"),
        (["estimator", "fitted", "codes_"], 3, "codes_ must be an array"),
        (["estimator", "fitted", "codes_"], {"array": "none"}, "lacks a part"),
        (["estimator", "fitted", "codes_"], {"texts": ["a"] * 60}, "codes_ must be numbers"),
        (["estimator"], {"kind": "Pipeline", "steps": []}, "a pipeline has 1 to 16 steps"),
        (["estimator"], {"kind": "Pipeline", "steps": 3}, "lacks a part"),
    ],
)  # fmt: skip
def test_a_description_that_contradicts_itself_is_refused(tmp_path, place, value, message):
    description, _ = saved(tmp_path / "a.head")
    values = json.loads(description.read_text())
    inner = values
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = value
    description.write_text(json.dumps(values))
    with pytest.raises(EvaluationError, match=message) as caught:
        load_head(tmp_path / "a.head")
    assert str(description) in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "3", "{", "[" * 100_000, "\ufeff{}"])
def test_what_is_no_description_is_refused(tmp_path, text):
    description, _ = saved(tmp_path / "a.head")
    description.write_text(text)
    with pytest.raises(EvaluationError, match=r"head\.json"):
        load_head(tmp_path / "a.head")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_damaged_arrays_are_refused(tmp_path, keep):
    _, tensors = saved(tmp_path / "a.head")
    tensors.write_bytes(tensors.read_bytes()[:keep])
    with pytest.raises(EvaluationError, match=r"arrays\.safetensors is damaged"):
        load_head(tmp_path / "a.head")


def test_codes_of_no_class_and_numbers_that_are_not_finite_are_refused(tmp_path):
    _, tensors = saved(tmp_path / "a.head")
    good = load_file(tensors)
    for change, message in (({"0.codes_": good["0.codes_"] + 3}, "codes of no class"),
                            ({"0.embeddings_": good["0.embeddings_"] * np.float32("nan")}, "not finite"),
                            ({"0.codes_": good["0.codes_"][:5]}, "contradicts")):  # fmt: skip
        save_file({**good, **change}, tensors)
        with pytest.raises(EvaluationError, match=message):
            load_head(tmp_path / "a.head")


def test_arrays_of_another_head_are_refused(tmp_path):
    _, tensors = saved(tmp_path / "a.head")
    data = bytearray(tensors.read_bytes())
    data[-1] ^= 1
    tensors.write_bytes(data)
    with pytest.raises(EvaluationError, match=r"arrays\.safetensors is damaged, or is not the file"):
        load_head(tmp_path / "a.head")


@pytest.mark.parametrize("name", ["head.json", "arrays.safetensors"])
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_only_files_are_read(tmp_path, name):
    saved(tmp_path / "a.head")
    (tmp_path / "a.head" / name).unlink()
    os.mkfifo(tmp_path / "a.head" / name)
    with pytest.raises(EvaluationError, match=r"a\.head is no head: .* must be files"):
        load_head(tmp_path / "a.head")
    (tmp_path / "a.head" / name).unlink()
    (tmp_path / "a.head" / name).symlink_to("/dev/zero")
    with pytest.raises(EvaluationError, match="must be files"):
        load_head(tmp_path / "a.head")


def test_what_would_fill_the_memory_is_refused_unread(tmp_path):
    description, tensors = saved(tmp_path / "a.head")
    whole = description.read_bytes()
    description.write_bytes(b"[" + b"[]," * (2 << 20) + b"[]]")
    with pytest.raises(EvaluationError, match="lists and mappings: it is no head's"):
        load_head(tmp_path / "a.head")
    os.truncate(description, 65 << 20)
    with pytest.raises(EvaluationError, match="larger than 64 MiB"):
        load_head(tmp_path / "a.head")
    description.write_bytes(whole)
    os.truncate(tensors, 1 << 43)  # Eight TiB of nothing.
    with pytest.raises(EvaluationError, match=r"arrays\.safetensors has 8,192\.0 GiB"):
        load_head(tmp_path / "a.head")


@pytest.mark.parametrize(
    ("step", "part", "value", "message"),
    [
        (0, "mean_", None, "mean_ is missing, and with_mean asks for it"),
        (0, "mean_", {"texts": ["a", "b", "c", "d"]}, "mean_ must be numbers"),
        (1, "coef_", None, "coef_ must be an array"),
    ],
)
def test_parts_that_a_head_cannot_do_without_are_refused(tmp_path, step, part, value, message):
    x = rows()
    head = make_pipeline(StandardScaler(), LogisticRegression()).fit(x, named(x))
    save_head(tmp_path / "a.head", head, classes=NAMES, spec=SPEC)
    description = tmp_path / "a.head" / "head.json"
    values = json.loads(description.read_text())
    values["estimator"]["steps"][step][1]["fitted"][part] = value
    description.write_text(json.dumps(values))
    with pytest.raises(EvaluationError, match=message):
        load_head(tmp_path / "a.head")


def test_scalers_that_do_nothing_are_saved(tmp_path):
    x = rows()
    head = make_pipeline(StandardScaler(with_mean=False, with_std=False), LogisticRegression()).fit(x, named(x))
    save_head(tmp_path / "a.head", head, classes=NAMES, spec=SPEC)
    same(head, load_head(tmp_path / "a.head").estimator, rows(9, seed=1))


# Whatever a stranger does to the two files.

WRONG = [
    None,
    True,
    -1,
    10**30,
    1e308,
    "x",
    [],
    {},
    [1],
    {"texts": ["a"]},
    {"texts": 5},
    {"array": 3},
    {"array": ["x"]},
]
SHAPES = [[10**9, 10**9], [0], [], [2**62, 4], [1] * 100, ["a"], None, -1, [-1, 4], [4, -1]]
TYPES = ["BF16", "F8_E4M3", "F16", "I64", "BOOL", "F64", "C64", "none", 3]


def places(value, at=()):
    """Yield the path to each value within a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        yield (*at, key)
        yield from places(one, (*at, key))


def flipped(chance, data):
    data = bytearray(data)
    for _ in range(chance.choice([1, 1, 3, 20])):
        data[chance.randrange(min(len(data), chance.choice([8, 400, 1 << 30])))] ^= 1 << chance.randrange(8)
    return bytes(data)


def other_value(chance, text):
    values = json.loads(text)
    *before, last = chance.choice(list(places(values)))
    inner = values
    for key in before:
        inner = inner[key]
    inner[last] = chance.choice(WRONG)
    return json.dumps(values).encode()


def other_header(chance, data):
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    key = chance.choice(["shape", "data_offsets", "dtype"])
    chance.choice(list(header.values()))[key] = chance.choice(TYPES if key == "dtype" else SHAPES)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[end:]


@pytest.mark.parametrize("name", HEADS)
def test_a_damaged_head_is_refused_by_name_or_answers(tmp_path, name):
    x, chance, refused = rows(), random.Random(name), 0
    store = tmp_path / "new.h5"
    with StoreWriter(store, SPEC) as writer:
        writer.append(rows(3, seed=1), ["a.jpg", "b.jpg", "c.jpg"])
        writer.finalise()
    save_head(tmp_path / "a.head", make_head(name).fit(x, named(x)), classes=NAMES, spec=SPEC)
    description, tensors = tmp_path / "a.head" / "head.json", tmp_path / "a.head" / "arrays.safetensors"
    text, data = description.read_bytes(), tensors.read_bytes()
    for _ in range(120):
        new_text, new_data = text, data
        way = chance.randrange(5)
        if way == 0:
            new_text = flipped(chance, text)
        elif way == 1:
            new_data = flipped(chance, data)
        elif way == 2:
            new_text, new_data = (one[: chance.randrange(len(one))] for one in (text, data))
        elif way == 3:
            new_text = other_value(chance, text)
        else:
            new_data = other_header(chance, data)
        if chance.random() < 0.7:  # By somebody who knows the hash.
            new_text = new_text.replace(*(hashlib.sha256(one).hexdigest().encode() for one in (data, new_data)))
        description.write_bytes(new_text)
        tensors.write_bytes(new_data)
        try:
            head = load_head(tmp_path / "a.head")
        except EmbedkitError as error:
            assert "a.head" in str(error)
            refused += 1
            continue
        try:
            assert len(list(predict(head, store))) == 3
        except (SpecMismatchError, EvaluationError) as error:
            assert "the head" in str(error)
    assert 60 < refused < 120
