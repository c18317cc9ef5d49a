"""What an unfinished run computes, and the note in which it says so."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from embedkit.errors import SpecMismatchError
from embedkit.spec import EmbeddingSpec, canonical_json
from embedkit.store import durable
from embedkit.store import format as schema
from embedkit.store.assembling import Header

RUN_FORMAT = "embedkit-run"
NOTE = "run.json"

log = logging.getLogger("embedkit")


@dataclass(frozen=True)
class Plan:
    """Which images are computed, in which parts: part ``first + i`` is the i-th slice of the sorted ids.

    It does not say on how many processors or machines, and the finished store does not depend on `part_size`.
    """

    first: int
    part_size: int
    batch_size: int
    ids: npt.NDArray[Any]

    @property
    def parts(self) -> range:
        """Numbers of the parts."""
        return range(self.first, self.first + -(-len(self.ids) // self.part_size))

    def part(self, number: int) -> npt.NDArray[Any]:
        """Return the ids of one part."""
        start = (number - self.first) * self.part_size
        return self.ids[start : start + self.part_size]


NO_PLAN = Plan(0, 1, 1, np.empty(0, dtype="S1"))


def run_digest(spec: EmbeddingSpec, layers: Mapping[str, EmbeddingSpec]) -> str:
    """Return the digest of all specs of a store: that of its embeddings when it has no layers."""
    if not layers:
        return spec.digest
    named = sorted([name, layer.digest] for name, layer in layers.items())
    return hashlib.sha256(canonical_json([spec.digest, named]).encode()).hexdigest()


Specs = tuple[EmbeddingSpec, Mapping[str, EmbeddingSpec]]


def require_same_specs(message: str, left: Specs, right: Specs) -> None:
    """Raise SpecMismatchError unless two stores have the same embeddings and layers."""
    left[0].require_same(right[0], message)
    if run_digest(*left) != run_digest(*right):
        raise SpecMismatchError(message, {"layers": (sorted(left[1]), sorted(right[1]))})


def read_note(folder: Path) -> dict[str, Any] | None:
    """Return what an unfinished run says of itself; None where there is none, or none that can be read."""
    path = folder / NOTE
    try:
        note = json.loads(path.read_bytes())
        if note["format"] != RUN_FORMAT or note["schema_version"] != schema.SCHEMA_VERSION:
            raise ValueError(f"it is {note['format']!r}, schema {note['schema_version']}")
        _check_note(note)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        log.warning("%s cannot be read and is made again; whole parts are still used: %s", path, error)
        return None
    return dict(note)


_FIELDS = {
    "run_id": str, "created": str, "digest": str, "identity": dict, "layers": dict, "information": dict, "plan": dict,
}  # fmt: skip
_PLAN_FIELDS = {"first": int, "part_size": int, "batch_size": int, "count": int, "ids": str, "ids_sha256": str}


def _check_note(note: Mapping[str, Any]) -> None:
    for fields, values in ((_FIELDS, note), (_PLAN_FIELDS, note["plan"])):
        for name, kind in fields.items():
            if type(values[name]) is not kind:
                raise ValueError(f"its {name} is {values[name]!r}, expected {kind.__name__}")
    plan = note["plan"]
    if min(plan["first"], plan["count"]) < 0 or min(plan["part_size"], plan["batch_size"]) < 1:
        raise ValueError(
            f"its plan begins at {plan['first']} and has {plan['count']} images in parts of "
            f"{plan['part_size']} and batches of {plan['batch_size']}"
        )


def read_plan(folder: Path, note: Mapping[str, Any]) -> Plan:
    """Return the plan that a note names; an empty one when its ids are lost, for parts know their own."""
    values = note["plan"]
    try:
        ids = (folder / os.path.basename(values["ids"])).read_bytes()
        if hashlib.sha256(ids).hexdigest() != values["ids_sha256"]:
            raise ValueError("its ids do not match their hash")
        return Plan(values["first"], values["part_size"], values["batch_size"], np.array(ids.split(b"\0")))
    except (OSError, ValueError) as error:
        log.warning("the plan in %s is lost and made again; whole parts are still used: %s", folder, error)
        return NO_PLAN


def write_note(folder: Path, header: Header, base: str | None, plan: Plan) -> None:
    """Write a plan down, durably: first its ids, then the note that names them."""
    ids = b"\0".join(plan.ids.tolist())
    sha256 = hashlib.sha256(ids).hexdigest()
    name = f"ids-{plan.first:06}-{sha256[:16]}"
    note = {
        "format": RUN_FORMAT,
        "schema_version": schema.SCHEMA_VERSION,
        "run_id": header.run_id,
        "created": header.created,
        "digest": run_digest(header.spec, header.layers),
        "identity": header.spec.to_dict(),
        "layers": {layer: spec.to_dict() for layer, spec in header.layers.items()},
        "information": dict(header.information),
        "base": base,
        "plan": {
            "first": plan.first, "part_size": plan.part_size, "batch_size": plan.batch_size, "count": len(plan.ids),
            "ids": name, "ids_sha256": sha256,
        },
    }  # fmt: skip
    for target, data in ((name, ids), (NOTE, canonical_json(note).encode())):
        with durable.aside(folder) as path:
            durable.write_durably(path, data)
            durable.publish_over(path, folder / target)
