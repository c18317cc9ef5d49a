"""The store: one HDF5 file of ids, embeddings, labels and the spec that produced them.

Row i of every dataset is the same image. The format is described in ``docs/store-format.md``; a finished store is
never written to again, only replaced by a rename.
"""

from embedkit.store.combining import ON_CONFLICT, matching, merge, named, select
from embedkit.store.exporting import export
from embedkit.store.importing import import_embeddings
from embedkit.store.parts import PartWriter, Rows
from embedkit.store.reader import Store
from embedkit.store.runs import Run
from embedkit.store.status import Status
from embedkit.store.tables import Failure, Failures, Images, Inventory
from embedkit.store.updates import Changes, Update
from embedkit.store.verification import Problem, verify
from embedkit.store.writer import StoreWriter, refuse_existing

__all__ = [
    "ON_CONFLICT", "Changes", "Failure", "Failures", "Images", "Inventory", "PartWriter", "Problem", "Rows", "Run",
    "Status", "Store", "StoreWriter", "Update", "export", "import_embeddings", "matching", "merge", "named",
    "refuse_existing", "select", "verify",
]  # fmt: skip
