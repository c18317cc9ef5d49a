"""Writes the store of the current schema that every later version must be able to open.

Run once for each schema, ``python tests/data/make_store.py tests/data/store-v1.h5``; never for one that is released.
"""

from __future__ import annotations

import sys

import numpy as np

from embedkit import EmbeddingSpec, Store
from embedkit.store import Failures, Images, Inventory, Rows, Run

SPEC = EmbeddingSpec(backbone="resnet18", tag="golden", weights_sha256="ab" * 32, dim=3)
LAYER = EmbeddingSpec(backbone="resnet18", tag="golden", weights_sha256="ab" * 32, dim=2, pool="layer3:avg")
IDS = ["a b/1.jpg", "é/2.jpg", "é/😀.jpg"]


def main(path: str) -> None:
    images = Images.of(IDS, [10, 20, 30], [1, 2, 3], [bytes([number]) * 32 for number in (1, 2, 3)])
    inventory = Inventory(
        images.ids, images.sizes.astype(np.int64), images.mtimes_ns, np.array([0, 1, 1], dtype=np.int32),
        ["a b", "é"], [("z.jpg", "broken symbolic link")],
    )  # fmt: skip
    information = {"root": "/photos", "recipe": {"model": "resnet18.golden"}}
    with Run(path, SPEC, layers={"layer3:avg": LAYER}, information=information) as run:
        update = run.prepare(inventory, lambda numbers: [], part_size=lambda count: 2, batch_size=1)
        for number in update.todo:
            rows = np.flatnonzero(np.isin(images.ids, update.plan.part(number)))
            main_rows = np.arange(9, dtype=np.float32).reshape(3, 3)[rows] / 4
            layer_rows = -np.arange(6, dtype=np.float32).reshape(3, 2)[rows]
            run.write(number, Rows(images.take(rows), Failures.empty(), {"": main_rows, "layer3:avg": layer_rows}))
        run.finalise(update)
    print(Store.open(path).content_id)


if __name__ == "__main__":
    main(sys.argv[1])
