"""Suite: which backbones are measured on which data sets by which protocols, as a YAML file says it."""

from __future__ import annotations

import difflib
import inspect
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from embedkit.backbones import Backbone
from embedkit.errors import EvaluationError
from embedkit.evaluation.probing import probe
from embedkit.evaluation.protocols import PROTOCOLS

MAX_BYTES = 1 << 17  # A thousand lines; PyYAML reads a megabyte in a minute.
MAX_DEPTH = 20
MAX_CELLS = 10_000

_PLACE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_NAME = re.compile(r"[^A-Za-z0-9._+]+")
_NAME_LENGTH = 60
_FILES = (".json", ".safetensors", ".pth", ".pt", ".bin")
_HUB = ("hf-hub:", "hf_hub:")
_BACKBONE_OPTIONS = frozenset(inspect.signature(Backbone.load).parameters) - {"model", "device"}
_PROBE_OPTIONS = frozenset(inspect.signature(probe).parameters) - {
    "train", "test", "split", "train_split", "test_split", "protocol", "progress",
}  # fmt: skip


@dataclass(frozen=True)
class SuiteBackbone:
    """One backbone of a suite.

    Parameters
    ----------
    name : str
        What tables call it.
    model : str
        What `embedkit.Backbone.load` takes.
    options : mapping
        Its other arguments, such as ``{"img_size": 224}``.
    """

    name: str
    model: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SuiteData:
    """One data set of a suite.

    Parameters
    ----------
    name : str
        What tables call it.
    train : str
        The images to train on; those of all parts where there is no `test`.
    test : str, optional
        The images to test on.
    split : str, optional
        Instead of `test`: a CSV file with the columns path and split.
    train_split, test_split : str, optional
        What the split file calls the parts; see `embedkit.probe`.
    """

    name: str
    train: str
    test: str | None = None
    split: str | None = None
    train_split: str = "train"
    test_split: str | None = None


@dataclass(frozen=True)
class SuiteProtocol:
    """One protocol of a suite.

    Parameters
    ----------
    name : str
        What tables call it.
    protocol : str
        One of `embedkit.evaluation.PROTOCOLS`.
    parameters : mapping
        Other arguments of `embedkit.probe`, such as ``{"shots": [1, 5], "seeds": 3}``.
    """

    name: str
    protocol: str
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """One cell of a suite, before it is measured: its name, which is that of its files, and what it combines."""

    name: str
    backbone: SuiteBackbone
    data: SuiteData
    protocol: SuiteProtocol


@dataclass(frozen=True)
class Suite:
    """Backbones, data sets and protocols; every combination is a cell.

    Parameters
    ----------
    name : str
        The title of its report.
    backbones, data, protocols : tuple
        What is combined.
    path : Path, optional
        The file that it was read from.

    Raises
    ------
    EvaluationError
        When one of them is empty, or two have names that files could not tell apart.
    """

    name: str
    backbones: tuple[SuiteBackbone, ...]
    data: tuple[SuiteData, ...]
    protocols: tuple[SuiteProtocol, ...]
    path: Path | None = None

    def __post_init__(self) -> None:
        where = self.path or self.name
        for what, parts in (("backbones", self.backbones), ("data", self.data), ("protocols", self.protocols)):
            if not parts:
                raise EvaluationError(f"{where}: {what} is empty; name at least one")
            seen: dict[str, str] = {}
            for part in parts:
                file = file_name(part.name).casefold()
                if file in seen:
                    raise EvaluationError(
                        f"{where}: {what} has two called {seen[file]!r} and {part.name!r}, whose files would have one "
                        "name; give one of them another name"
                    )
                seen[file] = part.name
        if len(self.backbones) * len(self.data) * len(self.protocols) > MAX_CELLS:
            raise EvaluationError(f"{where}: more than {MAX_CELLS:,} cells; make several suites of it")
        for data in self.data:
            alone = data.test is None and data.split is None
            bare = [one.name for one in self.protocols if not one.parameters.get("folds")]
            if alone and bare:
                raise EvaluationError(
                    f"{where}: the data set {data.name!r} has neither test nor split, which the protocol {bare[0]!r} "
                    "needs; name one of them, or give the protocol folds: 5"
                )

    @property
    def plans(self) -> list[Plan]:
        """All cells, those of a backbone together."""
        return [
            Plan("--".join(file_name(part.name) for part in (backbone, data, protocol)), backbone, data, protocol)
            for backbone in self.backbones
            for data in self.data
            for protocol in self.protocols
        ]


def file_name(name: str) -> str:
    """Return a name with only what every file system takes.

    Examples
    --------
    >>> from embedkit.evaluation.suites import file_name
    >>> file_name("DINOv2 S/14")
    'DINOv2-S-14'
    """
    return _NAME.sub("-", name).strip("-.")[:_NAME_LENGTH].rstrip("-.") or "unnamed"


def read_suite(path: str | os.PathLike[str], places: Mapping[str, str | os.PathLike[str]] | None = None) -> Suite:
    """Read a suite from a YAML file.

    Paths are relative to the file's folder. ``${NAME}`` in a path is what `places` says, or else the environment
    variable ``EMBEDKIT_NAME``, so that a suite names no machine's folders.

    Parameters
    ----------
    path : path-like
        The file.
    places : mapping, optional
        ``{name: folder}`` for the names in ``${}``.

    Returns
    -------
    Suite

    Raises
    ------
    EvaluationError
        When the file cannot be read or is not YAML, has a key that is not known (with the nearest that is), lacks one,
        or has a value of the wrong kind. The message says the line.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> from embedkit.evaluation import read_suite
    >>> folder = tempfile.TemporaryDirectory()
    >>> text = "{backbones: [resnet18.a1_in1k], data: [{images: pets, split: pets.csv}], protocols: [default]}"
    >>> path = pathlib.Path(folder.name, "pets.yaml")
    >>> _ = path.write_text(text)
    >>> [plan.name for plan in read_suite(path).plans]
    ['resnet18.a1_in1k--pets--default']
    >>> folder.cleanup()
    """
    path = Path(path)
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read(MAX_BYTES + 1)
        if len(text) > MAX_BYTES:
            raise EvaluationError(f"{path} is larger than a suite may be, {MAX_BYTES:,} bytes")
        return _Reading(path, text, {name: os.fspath(place) for name, place in (places or {}).items()}).suite()
    except OSError as error:
        raise EvaluationError(f"the suite {path} cannot be read: {error.strerror or error}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise EvaluationError(f"the suite {path} is not a YAML file: {error}") from error


class _Reading:
    """Turns the nodes of one YAML file, which know their lines, into a suite."""

    def __init__(self, path: Path, text: str, places: Mapping[str, str]) -> None:
        self.path, self.places = path, places
        self._refuse_knots(text)
        self._loader = yaml.SafeLoader(text)
        self.root = self._loader.get_single_node()

    def _refuse_knots(self, text: str) -> None:
        """Refuse what makes a small file large or endless."""
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or depth > MAX_DEPTH:
                found = "aliases (*name)" if depth <= MAX_DEPTH else f"more than {MAX_DEPTH} levels"
                line = event.start_mark.line + 1
                raise EvaluationError(f"{self.path}, line {line}: a suite has no {found}; write it out")

    def fail(self, node: Any, message: str) -> EvaluationError:
        """Return an error that says where."""
        return EvaluationError(f"{self.path}, line {node.start_mark.line + 1}: {message}")

    def suite(self) -> Suite:
        if self.root is None:
            raise EvaluationError(f"{self.path} is empty; a suite names backbones, data and protocols")
        values = self.mapping(self.root, {"name", "backbones", "data", "protocols"}, "a suite")
        for name in ("backbones", "data", "protocols"):
            if name not in values:
                raise self.fail(self.root, f"a suite names {name}, and this one does not")
        name = self.text(values["name"], "name") if "name" in values else self.path.stem
        return Suite(
            name,
            tuple(self.backbone(node) for node in self.items(values["backbones"], "backbones")),
            tuple(self.data(node) for node in self.items(values["data"], "data")),
            tuple(self.protocol(node) for node in self.items(values["protocols"], "protocols")),
            self.path,
        )

    def backbone(self, node: Any) -> SuiteBackbone:
        if isinstance(node, yaml.ScalarNode):
            model, values = node, {}
        else:
            values = self.mapping(node, {"name", "model", *_BACKBONE_OPTIONS}, "a backbone")
            model = self.required(node, values, "model", "a backbone")
        given = self.text(model, "model")
        found = self.model(model, given)
        stem = Path(given).stem if given.endswith(_FILES) else Path(given).name
        name = self.text(values["name"], "name") if "name" in values else stem
        options = {key: self.plain(value) for key, value in values.items() if key in _BACKBONE_OPTIONS}
        return SuiteBackbone(name, found, options)

    def data(self, node: Any) -> SuiteData:
        known = {"name", "images", "train", "test", "split", "train_split", "test_split"}
        values = self.mapping(node, known, "a data set")
        if ("images" in values) == ("train" in values):
            raise self.fail(node, "a data set has either images, with split, or train and test")
        for one, other in (("images", "test"), ("train", "split")):
            if one in values and other in values:
                raise self.fail(
                    values[other], f"{other} does not go with {one}; write images and split, or train and test"
                )
        if "train" in values:
            self.required(node, values, "test", "a data set with train")
        for key in ("train_split", "test_split"):
            if key in values and "split" not in values:
                raise self.fail(values[key], f"{key} names a part of a split file, and there is no split")
        train = values.get("images", values.get("train"))
        places = {key: self.place(values[key], key) for key in ("test", "split") if key in values}
        parts = {key: self.text(values[key], key) for key in ("train_split", "test_split") if key in values}
        found = self.place(train, "images")
        name = self.text(values["name"], "name") if "name" in values else Path(found).name
        return SuiteData(name, found, **places, **parts)

    def protocol(self, node: Any) -> SuiteProtocol:
        if isinstance(node, yaml.ScalarNode):
            protocol, values = node, {}
        else:
            values = self.mapping(node, {"name", "protocol", *_PROBE_OPTIONS}, "a protocol")
            protocol = self.required(node, values, "protocol", "a protocol")
        given = self.text(protocol, "protocol")
        if given not in PROTOCOLS:
            raise self.fail(protocol, f"there is no protocol {given!r}{_nearest(given, PROTOCOLS)}")
        name = self.text(values["name"], "name") if "name" in values else given
        parameters = {key: self.plain(value) for key, value in values.items() if key in _PROBE_OPTIONS}
        return SuiteProtocol(name, given, parameters)

    def mapping(self, node: Any, known: Iterable[str], what: str) -> dict[str, Any]:
        """Return the nodes of a mapping by their keys, all of them known."""
        if not isinstance(node, yaml.MappingNode):
            raise self.fail(node, f"{what} is a mapping of keys to values, such as name: text")
        values: dict[str, Any] = {}
        for key_node, value in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else "?"
            if key not in known:
                raise self.fail(key_node, f"{what} has no key {key!r}{_nearest(key, known)}")
            if key in values:
                raise self.fail(key_node, f"{key} is there twice; keep one")
            values[key] = value
        return values

    def required(self, node: Any, values: Mapping[str, Any], key: str, what: str) -> Any:
        if key not in values:
            raise self.fail(node, f"{what} names its {key}, and this one does not")
        return values[key]

    def items(self, node: Any, key: str) -> list[Any]:
        if not isinstance(node, yaml.SequenceNode):
            raise self.fail(node, f"{key} is a list; begin each with a dash")
        items: list[Any] = node.value
        return items

    def text(self, node: Any, key: str) -> str:
        value = self.plain(node)
        if not isinstance(value, str) or not value.strip():
            raise self.fail(node, f"{key} is a text; got {value!r}")
        return value

    def plain(self, node: Any) -> Any:
        """Return the JSON value of a node."""
        try:
            value = self._loader.construct_object(node, deep=True)
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError, KeyError) as error:  # Also of what only looks like a date or a number.
            raise self.fail(node, f"a value is a text, a number, a list or a mapping: {error}") from error
        return value

    def model(self, node: Any, given: str) -> str:
        """Return a timm name as it is, and a path as one that holds anywhere."""
        is_path = ("/" in given or given.endswith(_FILES)) and not given.startswith(_HUB)
        return os.fspath(self.path.parent.absolute() / self.filled(node, given)) if is_path else given

    def place(self, node: Any, key: str) -> str:
        """Return where images or a split are: a path that holds anywhere, or a URL or dataset as it is."""
        given = self.filled(node, self.text(node, key))
        if "://" in given or given.startswith("dataset:"):
            return given
        return os.path.normpath(self.path.parent.absolute() / os.path.expanduser(given))

    def filled(self, node: Any, text: str) -> str:
        def folder(match: re.Match[str]) -> str:
            name = match[1]
            found = self.places.get(name) or os.environ.get(f"EMBEDKIT_{name.upper()}")
            if not found:
                raise self.fail(
                    node, f"nothing says where {match[0]} is: add --data {name}=FOLDER, or set EMBEDKIT_{name.upper()}"
                )
            return os.path.abspath(found)

        return _PLACE.sub(folder, text)


def _nearest(name: str, known: Iterable[str]) -> str:
    names = sorted(known)
    found = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else f"; known are {', '.join(names)}"
