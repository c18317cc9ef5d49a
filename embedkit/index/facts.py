"""Facts: what an index says of itself in its JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from embedkit.index.choosing import Measurement
from embedkit.index.exact import METRICS
from embedkit.spec import EmbeddingSpec

MOST_EFFORT, MOST_REFINE = 1 << 20, 1000  # Far beyond what is ever chosen: a file may say anything.


@dataclass(frozen=True)
class Facts:
    """What an index was built from, and what it was measured to do.

    Attributes
    ----------
    store : str
        Where its store was.
    layer : str or None
        Which of the store's layers it holds.
    spec : EmbeddingSpec
        What the embeddings were made with.
    content_id : str
        Of the store.
    rows : int
        Of the store.
    metric, factory : str
        As in `Index.build`.
    expansion : (int, float) or None
        Neighbours and alpha of a query expansion.
    chosen : Measurement or None
        What it was measured to do.
    measurements : tuple of Measurement
        Everything that was tried.
    """

    store: str
    layer: str | None
    spec: EmbeddingSpec
    content_id: str
    rows: int
    metric: str
    factory: str
    expansion: tuple[int, float] | None
    chosen: Measurement | None
    measurements: tuple[Measurement, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values, with the digest of the spec for whoever reads them."""
        return dataclasses.asdict(self) | {"spec": self.spec.to_dict(), "digest": self.spec.digest}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Facts:
        """Return the facts that JSON values hold, which may come from a stranger.

        Raises
        ------
        KeyError, TypeError, ValueError
            When they are none.
        """
        expansion, chosen = values["expansion"], values["chosen"]
        if expansion is not None:
            count, alpha = expansion
            expansion = (_whole(count, 1), _number(alpha))
        metric = _text(values["metric"])
        if metric not in METRICS or (expansion is not None and metric != "cosine"):
            raise ValueError(f"metric {metric!r}")
        return cls(
            store=_text(values["store"]),
            layer=None if values["layer"] is None else _text(values["layer"]),
            spec=EmbeddingSpec.from_dict(values["spec"]),
            content_id=_text(values["content_id"]),
            rows=_whole(values["rows"], 0),
            metric=metric,
            factory=_text(values["factory"]),
            expansion=expansion,
            chosen=None if chosen is None else _measurement(chosen),
            measurements=tuple(map(_measurement, values["measurements"])),
        )


def _measurement(values: Mapping[str, Any]) -> Measurement:
    found = Measurement(**values)
    _text(found.factory)
    if found.effort is not None:
        _whole(found.effort, 1, MOST_EFFORT)
    _whole(found.refine, 1, MOST_REFINE)
    for count in (found.rows, found.queries):
        _whole(count, 0)
    for number in (found.ann_recall, found.queries_per_second, found.seconds, found.bytes_per_row, found.build_seconds):
        _number(number)
    return found


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.80} instead of text")
    return value


def _whole(value: Any, least: int, most: int = 1 << 62) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"{value!r:.80} instead of a whole number from {least} to {most}")
    return value


def _number(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < math.inf:
        raise ValueError(f"{value!r:.80} instead of a number of 0 or more")
    return float(value)
