"""Stores as data frames and Arrow tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from embedkit.errors import MissingExtraError

if TYPE_CHECKING:
    import pandas

    from embedkit.store.reader import Store


def to_pandas(store: Store, *, embeddings: bool = False) -> pandas.DataFrame:
    """Return a data frame indexed by id; see `Store.to_pandas`."""
    try:
        import pandas
    except ImportError as error:
        raise MissingExtraError("pandas", "pandas") from error
    columns: dict[str, Any] = {}
    if store.labels is not None:
        columns["label"] = pandas.Categorical.from_codes(store.labels, store.classes)
    columns["size"] = store.images.sizes
    columns["modified"] = pandas.to_datetime(store.images.mtimes_ns, utc=True)
    columns["content_sha256"] = [digest.tobytes().hex() for digest in store.images.content_sha256]
    frame = pandas.DataFrame(columns, index=pandas.Index(store.ids, name="id", dtype=object))
    if not embeddings:
        return frame
    names = [f"e{column}" for column in range(store.dim)]
    return frame.join(pandas.DataFrame(store.load(), index=frame.index, columns=names))
