"""The state of a run after an epoch: one file of tensors and JSON, whole or absent."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer

from embedkit.errors import FinetuneError
from embedkit.store.durable import ASIDE, aside, publish_made

FORMAT, VERSION = "embedkit-training", 1
LAST = "last.safetensors"
_COUNTERS = ("step", "lookahead_step")  # All that updates move in an optimiser's group; the recipe decides the rest.
_MOST_STEPS = 1 << 53
_SHOWN = 8  # Fields of two runs that differ.


def state_folder(folder: str | os.PathLike[str]) -> Path:
    """Return where a run keeps its state."""
    return Path(folder) / "state"


def save_state(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write a state in place of the one that is there: after a power cut, one of the two is there and whole.

    Parameters
    ----------
    path : Path
        A file in a folder that exists.
    tensors : mapping of str to Tensor
        On any device.
    facts : mapping of str to JSON values
        Everything else.

    Raises
    ------
    FinetuneError
        When the file cannot be written; the state that was there still is.
    """
    text = json.dumps({"format": FORMAT, "version": VERSION, **facts})
    seen: set[int] = set()
    values = {name: _alone(value.detach().cpu().contiguous(), seen) for name, value in tensors.items()}
    with aside(path.parent) as fresh:
        try:
            save_file(values, fresh, metadata={"embedkit": text})
        except SafetensorError as error:
            raise FinetuneError(f"{path} cannot be written: {error}; mend that and run the same command") from error
        publish_made(fresh, path)


def _alone(value: Tensor, seen: set[int]) -> Tensor:
    """Return a tensor that shares no memory with those seen: the format has no names for one thing."""
    place = value.untyped_storage().data_ptr()
    if place in seen:
        return value.clone()
    seen.add(place)
    return value


def load_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the facts of a state.

    Raises
    ------
    FinetuneError
        When the file is no state, is damaged, is of a newer embedkit, or the system does not let it be read.
    """
    facts = load_facts(path)
    with _explaining(path), safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118


def load_facts(path: Path) -> dict[str, Any]:
    """Return the facts of a state alone, however large it is; raise as `load_state` does."""
    with _explaining(path), safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get("embedkit", "")
        facts = json.loads(text)
        if not isinstance(facts, dict) or facts.get("format") != FORMAT:
            raise ValueError("it is not the state of a training run")
        if facts.get("version") != VERSION:
            raise ValueError(f"its version is {facts.get('version')!r}, and this embedkit reads {VERSION}")
        if not isinstance(facts.get("identity"), dict):
            raise ValueError("it does not say what run it is of")
        return facts


@contextmanager
def _explaining(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise FinetuneError(
            f"{path} cannot be read ({error}); remove the folder {path.parent} to begin the run again"
        ) from error


def check_identity(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise FinetuneError, naming what differs, unless a state belongs to the run that was asked for."""
    left, right = _flat(found), _flat(wanted)
    differing = sorted(name for name in left.keys() | right.keys() if left.get(name) != right.get(name))
    if differing:
        shown = "".join(
            f"\n  {name}: {left.get(name)!r} there, {right.get(name)!r} now" for name in differing[:_SHOWN]
        ) + (f"\n  and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else "")
        raise FinetuneError(
            f"{path.parent.parent} holds an unfinished run of other settings; give another folder, or remove "
            f"{path.parent} to give that run up; these differ:{shown}"
        )


def forget(folder: str | os.PathLike[str]) -> None:
    """Remove the state of a run that is done with."""
    shutil.rmtree(state_folder(folder), ignore_errors=True)


def best_path(folder: Path, epoch: int) -> Path:
    """Return where the weights of an epoch are kept while it is the best one."""
    return folder / f"best-{epoch}.safetensors"


def remove_leftovers(folder: Path, best_epoch: int) -> None:
    """Remove what a killed write left, and the weights of epochs that are no longer the best."""
    for path in folder.iterdir():
        best = re.fullmatch(r"best-(\d+)\.safetensors", path.name)
        if path.name.startswith(ASIDE) or (best and int(best[1]) != best_epoch):
            path.unlink(missing_ok=True)


def pack_optimiser(optimiser: Optimizer) -> tuple[dict[str, Tensor], Any]:
    """Return an optimiser's tensors by name, and everything else of its state as JSON values that say where they go.

    Raises
    ------
    FinetuneError
        When it keeps what is neither a tensor nor a JSON value.
    """
    tensors: dict[str, Tensor] = {}
    return tensors, _packed(optimiser.state_dict(), tensors, type(optimiser).__name__)


def unpack_optimiser(optimiser: Optimizer, tensors: Mapping[str, Tensor], packed: Any) -> None:
    """Give an optimiser the state that `pack_optimiser` took from one with the same groups."""
    moved = {"params", *_COUNTERS}
    settings = [{name: value for name, value in group.items() if name not in moved} for group in optimiser.param_groups]
    optimiser.load_state_dict(_unpacked(packed, tensors))
    for group, own in zip(optimiser.param_groups, settings, strict=True):
        counters = {name: _counted(name, group[name]) for name in _COUNTERS if name in group}
        parameters = group["params"]
        group.clear()
        group.update(params=parameters, **own, **counters)  # The recipe's say, whatever the file's is.
    for parameter, values in optimiser.state.items():
        for name, value in values.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                # In the parameter's memory format, as the optimiser would have made it: another order of additions
                # would be another result.
                values[name] = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)


def _counted(name: str, value: Any) -> int | Tensor:
    """Return a counter as it was read; raise ValueError where it counts nothing."""
    number = value.item() if isinstance(value, Tensor) else value
    if isinstance(number, bool) or not isinstance(number, int | float) or not 0 <= number <= _MOST_STEPS:
        raise ValueError(f"an optimiser's {name} must be a number of updates, and is {number!r}")
    return value if isinstance(value, Tensor) else int(value)


def _packed(value: Any, tensors: dict[str, Tensor], owner: str) -> Any:
    if isinstance(value, Tensor):
        name = f"optimiser.{len(tensors)}"
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        # As pairs: keys are numbers too.
        return {"pairs": [[key, _packed(each, tensors, owner)] for key, each in value.items()]}
    if isinstance(value, tuple | list):
        return {"tuple" if isinstance(value, tuple) else "list": [_packed(each, tensors, owner) for each in value]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise FinetuneError(
        f"the optimiser {owner} keeps a {type(value).__name__}, which cannot be saved for a resumed run; try another"
    )


def _unpacked(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "pairs" in value:
        return {key: _unpacked(each, tensors) for key, each in value["pairs"]}
    if "tuple" in value:
        return tuple(_unpacked(each, tensors) for each in value["tuple"])
    return [_unpacked(each, tensors) for each in value["list"]]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in json.loads(json.dumps(values)).items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
