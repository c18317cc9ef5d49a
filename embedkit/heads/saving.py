"""Saving: a fitted head as a folder of JSON and arrays, which strangers may send."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save
from sklearn.pipeline import Pipeline

from embedkit.errors import EmbedkitError, EvaluationError
from embedkit.heads.kinds import KINDS, Kind
from embedkit.machine import available_memory
from embedkit.spec import EmbeddingSpec
from embedkit.store.durable import aside_name, naming, write_durably

Array = npt.NDArray[Any]

FORMAT, VERSION = "embedkit-head", 1
DESCRIPTION, ARRAYS = "head.json", "arrays.safetensors"
TASKS = ("class", "multi-label", "regression")
MAX_JSON_BYTES = 64 << 20  # A million class names.
MAX_NESTED = 1 << 20  # Lists and mappings, each of which takes a hundred times the bytes that it has in the file.
MAX_STEPS = 16


@dataclass(frozen=True, eq=False)
class SavedHead:
    """A head as it was saved.

    Parameters
    ----------
    estimator : estimator
        Fitted; its predictions are bit for bit those of the head that was saved.
    classes : list of str
        Names of the classes or labels, in the order of its probabilities; empty for regression.
    spec : EmbeddingSpec
        How the embeddings must be made that it is given.
    task : str
        "class", "multi-label" or "regression".
    information : dict
        JSON values for people.
    """

    estimator: Any = field(repr=False)
    classes: list[str]
    spec: EmbeddingSpec
    task: str = "class"
    information: dict[str, Any] = field(default_factory=dict, repr=False)


def save_head(
    path: str | os.PathLike[str],
    head: Any,
    *,
    classes: Sequence[str],
    spec: EmbeddingSpec,
    task: str = "class",
    information: Mapping[str, Any] | None = None,
) -> None:
    """Write a fitted head as a folder of ``head.json`` and ``arrays.safetensors``.

    Parameters
    ----------
    path : path-like
        The folder. A head that is there already is replaced; anything else is left alone.
    head : estimator
        A head of ours, or a fitted pipeline of scikit-learn's scalers and linear models.
    classes : sequence of str
        Names of the classes, one for each of the head's, in its order; empty for regression.
    spec : EmbeddingSpec
        Of the embeddings that it was fitted to.
    task : {"class", "multi-label", "regression"}, default "class"
        What it predicts.
    information : mapping, optional
        JSON values to keep with it.

    Raises
    ------
    EvaluationError
        When the head is of a kind that cannot be written, is not fitted, or does not agree with `classes` and `spec`;
        or when something else is at `path`.

    Examples
    --------
    >>> import tempfile
    >>> from embedkit import EmbeddingSpec
    >>> from embedkit.heads import load_head, logistic_regression, save_head
    >>> folder = tempfile.TemporaryDirectory()
    >>> spec = EmbeddingSpec(backbone="resnet18", weights_sha256="ab" * 32, dim=1)
    >>> head = logistic_regression(1.0).fit([[0.0], [1.0]], ["low", "high"])
    >>> save_head(f"{folder.name}/one.head", head, classes=["high", "low"], spec=spec)
    >>> load_head(f"{folder.name}/one.head").estimator.predict([[0.9]]).tolist()
    ['high']
    >>> folder.cleanup()
    """
    folder = Path(path)
    if os.path.lexists(folder) and not (folder / DESCRIPTION).is_file():
        raise EvaluationError(f"{folder} is there already and is no head; name another folder")
    arrays: dict[str, Array] = {}
    described = {
        "format": FORMAT,
        "version": VERSION,
        "task": task,
        "classes": [str(name) for name in classes],
        "spec": spec.to_dict(),
        "information": dict(information or {}),
        "estimator": _describe(head, arrays),
    }
    _rebuild(described, arrays, str(folder))  # What could not be loaded is not written.
    tensors = save({name: np.asarray(values, order="C") for name, values in arrays.items()})
    described["arrays_sha256"] = hashlib.sha256(tensors).hexdigest()
    text = json.dumps(described, indent=1, ensure_ascii=True, allow_nan=False)
    fresh = folder.parent / aside_name()
    try:
        with naming(folder):
            fresh.mkdir(parents=True)
            write_durably(fresh / ARRAYS, tensors)
            write_durably(fresh / DESCRIPTION, text.encode())
            if folder.exists():
                os.replace(fresh / ARRAYS, folder / ARRAYS)
                os.replace(fresh / DESCRIPTION, folder / DESCRIPTION)
            else:
                os.rename(fresh, folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def load_head(path: str | os.PathLike[str]) -> SavedHead:
    """Return a head that `save_head` wrote.

    Only kinds of estimators that are known here are made, from numbers and texts; nothing in the files is run.

    Parameters
    ----------
    path : path-like
        The folder.

    Returns
    -------
    SavedHead

    Raises
    ------
    EvaluationError
        When it is no head, is of a newer embedkit, or its parts contradict each other. The message names the file.
    """
    folder = Path(path)
    description, tensors = folder / DESCRIPTION, folder / ARRAYS
    try:
        if not all(stat.S_ISREG(path.stat().st_mode) for path in (description, tensors)):
            raise EvaluationError(f"{folder} is no head: {DESCRIPTION} and {ARRAYS} must be files")
        if description.stat().st_size > MAX_JSON_BYTES:
            raise EvaluationError(f"{description} is larger than {MAX_JSON_BYTES >> 20} MiB: it is no head's")
        size, free = tensors.stat().st_size, available_memory()
        if free is not None and 2 * size > free:
            raise EvaluationError(
                f"{tensors} has {size / 2**30:,.1f} GiB, which are read and copied, and this machine has "
                f"{free / 2**30:,.1f} GiB of memory left"
            )
        text = description.read_bytes()
        if text.count(b"[") + text.count(b"{") > MAX_NESTED:
            raise EvaluationError(f"{description} has more than {MAX_NESTED:,} lists and mappings: it is no head's")
        values, data = json.loads(text), tensors.read_bytes()
        arrays = load(data)
    except FileNotFoundError as error:
        raise EvaluationError(
            f"{folder} is no head: there is no file {Path(error.filename).name}; heads are written by "
            "embedkit probe --save"
        ) from error
    except OSError as error:
        raise EvaluationError(f"{folder} cannot be read: {error.strerror}") from error
    except (SafetensorError, TypeError, AttributeError, LookupError) as error:
        raise EvaluationError(f"{tensors} is damaged: {error}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, EmbedkitError):
            raise
        raise EvaluationError(f"{description} is no JSON: {error}") from error
    found = _rebuild(values, arrays, str(description))
    if values.get("arrays_sha256") != hashlib.sha256(data).hexdigest():
        raise EvaluationError(f"{tensors} is damaged, or is not the file that was written with {DESCRIPTION}")
    return found


def _describe(estimator: Any, arrays: dict[str, Array]) -> dict[str, Any]:
    """Return an estimator as JSON values, with its arrays put aside under their own names."""
    if isinstance(estimator, Pipeline):
        steps = [[str(name), _describe(step, arrays)] for name, step in estimator.steps]
        return {"kind": "Pipeline", "steps": steps}
    kind = KINDS.get(type(estimator).__name__)
    if kind is None or type(estimator) is not kind.type():
        known = ", ".join(sorted(KINDS))
        raise EvaluationError(f"a {type(estimator).__name__} cannot be saved; what can: pipelines of {known}")
    prefix = f"{len(arrays)}."  # Unlike that of any other step: arrays only become more.
    fitted: dict[str, Any] = {}
    for name in kind.fields:
        if not hasattr(estimator, name):
            raise EvaluationError(f"the {type(estimator).__name__} is not fitted: it has no {name}")
        value = getattr(estimator, name)
        if not isinstance(value, np.ndarray):
            fitted[name] = _plain(value, name)
        elif value.dtype.kind in "UO":
            fitted[name] = {"texts": [str(text) for text in value]}
        else:
            arrays[prefix + name] = value
            fitted[name] = {"array": prefix + name}
    parameters = {name: _plain(value, name) for name, value in estimator.get_params(deep=False).items()}
    return {"kind": type(estimator).__name__, "parameters": parameters, "fitted": fitted}


def _plain(value: Any, name: str) -> Any:
    """Return a scalar as a JSON value."""
    value = value.item() if isinstance(value, np.generic) else value
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise EvaluationError(f"a head cannot be saved whose {name} is a {type(value).__name__}")


def _rebuild(values: Any, arrays: dict[str, Array], where: str) -> SavedHead:
    """Return the head that JSON values and arrays describe, after checking that they agree."""
    try:
        if values["format"] != FORMAT:
            raise EvaluationError(f"{where} is no head of embedkit")
        if values["version"] != VERSION:
            raise EvaluationError(f"{where} has version {values['version']!r}; this embedkit reads {VERSION}")
        task, classes, information = values["task"], values["classes"], values["information"]
        if task not in TASKS or not isinstance(information, dict):
            raise EvaluationError(f"{where}: the task is {task!r}, not one of {', '.join(TASKS)}")
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            raise EvaluationError(f"{where}: classes must be a list of texts")
        spec = EmbeddingSpec.from_dict(values["spec"])
        sizes = {"d": spec.dim, "1": 1}
        if task != "regression":
            sizes["c"] = len(classes)
        estimator = _made(values["estimator"], arrays, sizes, where)
    except EmbedkitError as error:
        message = str(error)
        raise EvaluationError(message if message.startswith(where) else f"{where}: {message}") from error
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise EvaluationError(f"{where} lacks a part, or one is of another type: {error}") from error
    return SavedHead(estimator, classes, spec, task, information)


def _made(described: Any, arrays: dict[str, Array], sizes: dict[str, int], where: str) -> Any:
    """Return one estimator, or a pipeline of them."""
    if described["kind"] == "Pipeline":
        steps = described["steps"]
        if not 0 < len(steps) <= MAX_STEPS or any(step["kind"] == "Pipeline" for _, step in steps):
            raise EvaluationError(f"{where}: a pipeline has 1 to {MAX_STEPS} steps, and none is a pipeline")
        made = [(str(name), _made(step, arrays, sizes, where)) for name, step in steps]
        if not all(hasattr(step, "transform") for _, step in made[:-1]) or not hasattr(made[-1][1], "predict"):
            raise EvaluationError(f"{where}: the steps of a pipeline are scalers, and at its end what predicts")
        return Pipeline(made)
    kind = KINDS.get(described["kind"])
    if kind is None:
        raise EvaluationError(f"{where}: there is no kind of head {described['kind']!r}")
    parameters, fitted = described["parameters"], described["fitted"]
    estimator = kind.type()()
    if parameters.keys() != estimator.get_params(deep=False).keys() or fitted.keys() != kind.fields.keys():
        raise EvaluationError(f"{where}: a {described['kind']} has other parameters or parts in this version")
    estimator.set_params(**{name: _plain(value, name) for name, value in parameters.items()})
    for name, parameter in kind.optional.items():
        if fitted[name] is None and parameters[parameter]:
            raise EvaluationError(f"{where}: {name} is missing, and {parameter} asks for it")
    for name in kind.fields:
        setattr(estimator, name, _checked(name, fitted[name], arrays, kind, sizes, where))
    if "d" in sizes:
        estimator.n_features_in_ = sizes["d"]
    return estimator


def _checked(name: str, value: Any, arrays: dict[str, Array], kind: Kind, sizes: dict[str, int], where: str) -> Any:
    """Return one fitted part, after checking its shape against those of the others."""
    shape = kind.fields[name]
    if not isinstance(value, dict):
        if shape is not None and (value is not None or name not in kind.optional):
            raise EvaluationError(f"{where}: {name} must be an array")
        return _plain(value, name)
    if shape is None:
        raise EvaluationError(f"{where}: {name} must not be an array")
    array = arrays[value["array"]] if "array" in value else np.array([str(text) for text in value["texts"]])
    if array.dtype.kind not in ("biufU" if name == "classes_" else "biuf"):
        raise EvaluationError(f"{where}: {name} must be numbers, and has the type {array.dtype}")
    if array.ndim != len(shape):
        raise EvaluationError(f"{where}: {name} has {array.ndim} dimensions, not {len(shape)}")
    for letter, size in zip(shape, array.shape, strict=True):
        if letter == "k" and "k" not in sizes:  # Two classes need one column of weights.
            sizes["k"] = 1 if size == 1 and sizes.get("c") == 2 else sizes.get("c", size)
        if size != sizes.setdefault(letter, size):
            raise EvaluationError(f"{where}: {name} has the shape {array.shape}, which contradicts the other parts")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise EvaluationError(f"{where}: {name} has numbers that are not finite")
    if name == "codes_" and not _are_codes(array, sizes["c"]):
        raise EvaluationError(f"{where}: {name} has codes of no class")
    return array


def _are_codes(array: Array, classes: int) -> bool:
    return array.dtype.kind in "iu" and (not array.size or bool(0 <= array.min() <= array.max() < classes))
