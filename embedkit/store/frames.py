"""Stores as data frames and Arrow tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from embedkit.store.exporting import arrow_batches, arrow_schema, optional

if TYPE_CHECKING:
    import pandas
    import pyarrow

    from embedkit.store.reader import Store

_BATCH_BYTES = 64 << 20


def to_pandas(store: Store, *, embeddings: bool = False) -> pandas.DataFrame:
    """Return a data frame indexed by id; see `Store.to_pandas`."""
    frames = optional("pandas", "pandas", "pandas")
    columns: dict[str, Any] = {}
    if store.labels is not None:
        columns["label"] = frames.Categorical.from_codes(store.labels, store.classes)
    columns["size"] = store.images.sizes
    columns["modified"] = frames.to_datetime(store.images.mtimes_ns, utc=True)
    columns["content_sha256"] = [digest.tobytes().hex() for digest in store.images.content_sha256]
    frame: pandas.DataFrame = frames.DataFrame(columns, index=frames.Index(store.ids, name="id", dtype=object))
    if not embeddings:
        return frame
    names = [f"e{column}" for column in range(store.dim)]
    return frame.join(frames.DataFrame(store.load(), index=frame.index, columns=names))


def to_arrow(store: Store) -> pyarrow.Table:
    """Return an Arrow table; see `Store.to_arrow`."""
    arrow = optional("pyarrow", "pyarrow", "parquet")
    columns = arrow_schema(arrow, store, "Arrow")
    batches = arrow_batches(arrow, store, columns, _BATCH_BYTES, lambda done, total: None)
    return arrow.Table.from_batches(batches, schema=columns)
