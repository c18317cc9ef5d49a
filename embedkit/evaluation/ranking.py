"""Ranking: every layer and pooling of a store probed, and which of them are really better."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from embedkit.errors import EvaluationError
from embedkit.evaluation.columns import align_columns
from embedkit.evaluation.comparing import LEVEL, Comparison, adjust, compare
from embedkit.evaluation.probing import probe
from embedkit.evaluation.reports import Report
from embedkit.store import Store
from embedkit.text import printable

CHOSEN = "chosen on these very test rows, so its number is a little too high: choose on one part, and report another"


@dataclass(frozen=True, eq=False)
class RankedLayer:
    """One layer in a ranking.

    Parameters
    ----------
    name : str
        Of the layer, or the pooling of the store's own embeddings.
    layer : str or None
        What `Store.open` calls it; None for the store's own embeddings.
    dim : int
        Width of the embedding.
    report : Report
        Its probe.
    comparison : Comparison, optional
        The best one's metric minus this one's, its p-value corrected for all layers; None for the best itself.
    """

    name: str
    layer: str | None
    dim: int
    report: Report = field(repr=False)
    comparison: Comparison | None


@dataclass(frozen=True, eq=False)
class Ranking:
    """The layers of a store by what can be read off them, the best first.

    Parameters
    ----------
    layers : list of RankedLayer
        The best first.
    """

    layers: list[RankedLayer]

    @property
    def best(self) -> RankedLayer:
        """The first layer."""
        return self.layers[0]

    def to_dict(self) -> dict[str, Any]:
        """Return the ranking as JSON values, with each layer's metrics and how the best is to be read."""
        return {
            "note": f"the best was {CHOSEN}",
            "layers": [
                {
                    "name": one.name,
                    "layer": one.layer,
                    "dim": one.dim,
                    "metrics": one.report.to_dict()["metrics"],
                    "comparison": None if one.comparison is None else asdict(one.comparison),
                }
                for one in self.layers
            ],
        }

    def to_text(self) -> str:
        """Return the ranking as a table for a terminal."""
        metric = self.best.report.headline[0]
        rows = [["layer", "width", metric, "95 % interval", "behind the best", "p"]]
        for one in self.layers:
            _, value, (low, high) = one.report.headline
            row = [printable(one.name), str(one.dim), f"{value:.4f}", f"[{low:.4f}, {high:.4f}]"]
            if one.comparison is None:
                rows.append([*row, "", ""])
                continue
            mark = "*" if one.comparison.real else ""
            rows.append([*row, f"{one.comparison.difference:.4f}{mark}", f"{one.comparison.adjusted_p_value:.2g}"])
        return "\n".join(
            [
                *align_columns(rows, "<>><<>"),
                "* behind the best by more than chance, all layers taken together.",
                f"The best was {CHOSEN}.",
            ]
        )


def rank_layers(
    train: str | os.PathLike[str],
    test: str | os.PathLike[str] | None = None,
    *,
    progress: Callable[[str], None] | None = None,
    **arguments: Any,
) -> Ranking:
    """Probe every layer of a store in the same way, and rank them with paired tests.

    Parameters
    ----------
    train : path-like
        A store with layers, such as ``extract --layers avg,layer3:gem`` makes.
    test : path-like, optional
        A store with the same layers.
    progress : callable, optional
        Called with one line of text at each step.
    **arguments
        As for `embedkit.evaluation.probe`, such as `split`, `protocol` and `head`.

    Returns
    -------
    Ranking
        The test of each layer is against the best one, on the same test rows, by `compare`; its p-values are corrected
        for the number of layers by Holm's method.

    Raises
    ------
    EvaluationError
        When the store has no layers, the test store lacks one of them, or as `probe`.

    Examples
    --------
    >>> from embedkit.evaluation.ranking import rank_layers
    >>> ranking = rank_layers("photos.h5", split="split.csv")  # doctest: +SKIP
    >>> ranking.best.name  # doctest: +SKIP
    'blocks.5:avg'
    """
    say = progress or (lambda line: None)
    stores = [Store.open(path) for path in (train, test) if path is not None]
    names: list[str | None] = [None, *stores[0].layers]
    if len(names) == 1:
        raise EvaluationError(
            f"{stores[0].path} has no layers to rank; extract with --layers, such as --layers avg,gem"
        )
    for store in stores[1:]:
        missing = stores[0].layers.keys() - store.layers.keys()
        if missing:
            raise EvaluationError(f"{store.path} lacks layers of {stores[0].path}: {', '.join(sorted(missing))}")
    found = []
    for number, name in enumerate(names, start=1):
        opened = [Store.open(store.path, layer=name) for store in stores]
        label = opened[0].spec.pool
        say(f"layer {number} of {len(names)}: {label}, {opened[0].dim} numbers a row")
        report = probe(*opened, **arguments)
        found.append(RankedLayer(label, name, opened[0].dim, report, None))
    found.sort(key=lambda one: -one.report.headline[1])
    comparisons = [compare(found[0].report, one.report, seed=arguments.get("seed", 0)) for one in found[1:]]
    adjusted = adjust([comparison.p_value for comparison in comparisons])
    compared = [
        replace(one, comparison=replace(comparison, adjusted_p_value=p, real=p < 1 - LEVEL))
        for one, comparison, p in zip(found[1:], comparisons, adjusted, strict=True)
    ]
    return Ranking([found[0], *compared])
