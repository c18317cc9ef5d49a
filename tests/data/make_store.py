"""Writes the store of the current schema that every later version must be able to open.

Run once for each schema, ``python tests/data/make_store.py tests/data/store-v1-kinds.h5``; never for one that is
released. What lies beside it was written by earlier versions: ``store-v1.h5``, and a part of an unfinished run, do not
have the kinds of failures.
"""

from __future__ import annotations

import sys

import numpy as np

from embedkit import EmbeddingSpec, ImageError, Store
from embedkit.store import Failures, Images, Inventory, Rows, Run

SPEC = EmbeddingSpec(backbone="resnet18", tag="golden", weights_sha256="ab" * 32, dim=3)
LAYER = EmbeddingSpec(backbone="resnet18", tag="golden", weights_sha256="ab" * 32, dim=2, pool="layer3:avg")
IDS = ["a b/1.jpg", "é/2.jpg", "é/😀.jpg"]


def main(path: str) -> None:
    bad = ImageError("a b/0.jpg", "truncated: the end is missing", "truncated")
    failures = Failures.of([bad], [5], [4])
    images = Images.of(IDS, [10, 20, 30], [1, 2, 3], [bytes([number]) * 32 for number in (1, 2, 3)])
    inventory = Inventory(
        np.array([b"a b/0.jpg", *images.ids.tolist()]), np.array([5, 10, 20, 30]), np.array([4, 1, 2, 3]),
        np.array([0, 0, 1, 1], dtype=np.int32),
        ["a b", "é"], [ImageError("z.jpg", "broken symbolic link", "missing")],
    )  # fmt: skip
    information = {"root": "/photos", "recipe": {"model": "resnet18.golden"}}
    with Run(path, SPEC, layers={"layer3:avg": LAYER}, information=information) as run:
        update = run.prepare(inventory, lambda numbers: [], part_size=lambda count: 2, batch_size=1)
        for number in update.todo:
            planned = update.plan.part(number)
            rows, failed = (np.flatnonzero(np.isin(table.ids, planned)) for table in (images, failures))
            main_rows = np.arange(9, dtype=np.float32).reshape(3, 3)[rows] / 4
            layer_rows = -np.arange(6, dtype=np.float32).reshape(3, 2)[rows]
            matrices = {"": main_rows, "layer3:avg": layer_rows}
            run.write(number, Rows(images.take(rows), failures.take(failed), matrices))
        run.finalise(update)
    print(Store.open(path).content_id)


if __name__ == "__main__":
    main(sys.argv[1])
