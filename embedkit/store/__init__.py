"""The store: one HDF5 file of ids, embeddings, labels and the spec that produced them.

Row i of every dataset is the same image. The format is described in ``docs/store-format.md``; a finished store is
never written to again, only replaced by a rename.
"""

from embedkit.store.reader import Failure, Store
from embedkit.store.writer import StoreWriter, refuse_existing

__all__ = ["Failure", "Store", "StoreWriter", "refuse_existing"]
