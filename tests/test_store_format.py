"""The format is the product: other programs read it, and old files open forever."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import h5py
import numpy as np
import pytest

from embedkit import EmbeddingSpec, ImageError, Store
from embedkit.store import Failure, Inventory, Run, StoreWriter, verify

DATA = Path(__file__).parent / "data"
GOLDEN = DATA / "store-v1.h5"
IDS = ["a b/1.jpg", "é/2.jpg", "é/😀.jpg"]
EMBEDDINGS = np.arange(9, dtype=np.float32).reshape(3, 3) / 4
LAYER = -np.arange(6, dtype=np.float32).reshape(3, 2)


def test_a_store_of_schema_1_opens() -> None:
    store = Store.open(GOLDEN)
    assert store.content_id == "bf82fa0d3de73585cd2ba92bb0db78e4723129b30b777e4721d9876b7dcd8319"
    assert store.ids == IDS and store.classes == ["a b", "é"] and store.labels is not None
    assert store.labels.tolist() == [0, 1, 1] and np.array_equal(store.embeddings, EMBEDDINGS)
    assert store.images.sizes.tolist() == [10, 20, 30] and store.images.mtimes_ns.tolist() == [1, 2, 3]
    assert [digest.tobytes() for digest in store.content_sha256] == [bytes([number]) * 32 for number in (1, 2, 3)]
    assert store.failures == [Failure("z.jpg", "broken symbolic link", "unknown")]
    assert (store.spec.backbone, store.spec.tag, store.dim, store.root) == ("resnet18", "golden", 3, Path("/photos"))
    layer = Store.open(GOLDEN, layer="layer3:avg")
    assert np.array_equal(layer.load(), LAYER) and layer.spec.pool == "layer3:avg" and layer.ids == IDS
    assert verify(GOLDEN) == []


def test_a_store_that_has_kinds_of_failures_opens() -> None:
    store = Store.open(DATA / "store-v1-kinds.h5")
    assert store.content_id == Store.open(GOLDEN).content_id and verify(store) == []
    assert store.ids == IDS and np.array_equal(store.embeddings, EMBEDDINGS)
    assert store.failures == [
        Failure("a b/0.jpg", "truncated: the end is missing", "truncated"),
        Failure("z.jpg", "broken symbolic link", "missing"),
    ]
    assert store.failed.sizes.tolist() == [5, 0] and store.failed.mtimes_ns.tolist() == [4, 0]


def inventory(store: Store, *failures: ImageError, more: tuple[bytes, ...] = ()) -> Inventory:
    """Return the images of a store, as they were then, and some of size and time 0."""
    ids = np.array([*store.images.ids.tolist(), *more])
    sizes, times = (
        np.append(column, np.zeros(len(more), column.dtype)) for column in (store.images.sizes, store.images.mtimes_ns)
    )
    labels = None if store.labels is None else np.append(store.labels, [-1] * len(more)).astype(np.int32)
    return Inventory(ids, sizes.astype(np.int64), times, labels, store.classes, failures)


def update(path: Path, spec: EmbeddingSpec, layers: dict[str, EmbeddingSpec], there: Inventory) -> bool:
    """Bring a store up to date with images that are all known, and return whether it changed."""
    information = {"root": "/photos", "recipe": {"model": "resnet18.golden"}}
    with Run(path, spec, layers=layers, information=information) as run:
        planned = run.prepare(there, lambda numbers: [], part_size=lambda count: 8, batch_size=4)
        assert planned.todo == []
        return run.finalise(planned)


def test_a_store_without_kinds_stays_as_it_is_until_more_is_known(tmp_path: Path) -> None:
    shutil.copy(GOLDEN, tmp_path / "s.h5")
    store = Store.open(tmp_path / "s.h5")
    assert not update(store.path, store.spec, store.layers, inventory(store, more=(b"z.jpg",)))
    assert store.path.read_bytes() == GOLDEN.read_bytes()
    missing = ImageError("z.jpg", "broken symbolic link", "missing")
    assert update(store.path, store.spec, store.layers, inventory(store, missing))
    mended = Store.open(store.path)
    assert mended.failures == [Failure("z.jpg", "broken symbolic link", "missing")]
    assert mended.content_id == store.content_id and verify(mended) == []


def test_a_run_goes_on_from_a_part_without_kinds(tmp_path: Path) -> None:
    (part,) = DATA.glob("part-*.h5")
    (tmp_path / "s.h5.parts").mkdir()
    shutil.copy(part, tmp_path / "s.h5.parts")
    there = Inventory(np.array([b"a.jpg", b"b.jpg", b"c.jpg"]), np.array([10, 20, 30]), np.array([1, 2, 3]))
    assert update(tmp_path / "s.h5", Store.open(GOLDEN).spec, {}, there)
    store = Store.open(tmp_path / "s.h5")
    assert store.ids == ["a.jpg", "c.jpg"] and np.array_equal(store.embeddings, EMBEDDINGS[:2])
    assert store.failures == [Failure("b.jpg", "truncated: the end is missing", "unknown")] and verify(store) == []
    assert os.listdir(tmp_path) == ["s.h5"]


def test_a_store_without_failures_is_the_file_that_it_was_before_kinds(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "s.h5", Store.open(GOLDEN).spec) as writer:
        writer.append(EMBEDDINGS, IDS)
        writer.finalise()
    with h5py.File(tmp_path / "s.h5") as file:
        assert set(file["failures"]) == {"ids", "errors", "sizes", "mtimes_ns"}


def test_pyfive_reads_it() -> None:
    pyfive = pytest.importorskip("pyfive")
    with pyfive.File(str(GOLDEN)) as file:
        assert np.array_equal(file["embeddings"][:], EMBEDDINGS) and np.array_equal(file["layers/layer3:avg"][:], LAYER)
        assert [id if isinstance(id, str) else id.decode() for id in file["ids"][:]] == IDS
        assert int(file.attrs["schema_version"]) == 1


@pytest.mark.filterwarnings("ignore")  # PyTables finds the name of a layer unusual, and says so.
def test_pytables_reads_it() -> None:
    tables = pytest.importorskip("tables")
    with tables.open_file(GOLDEN) as file:
        assert np.array_equal(file.root.embeddings[:], EMBEDDINGS)
        assert [id.decode() for id in file.root.ids[:]] == IDS
        assert file.root._v_attrs.schema_version == 1


def test_h5dump_reads_it() -> None:
    h5dump = shutil.which("h5dump")
    if h5dump is None:
        pytest.skip("h5dump is not installed (Debian: hdf5-tools)")
    done = subprocess.run([h5dump, "-y", "-d", "/embeddings", GOLDEN], capture_output=True, text=True, check=True)
    numbers = re.findall(r"[\d.]+(?=[,\n])", done.stdout.partition("DATA {")[2].partition("}")[0])
    assert [float(number) for number in numbers] == EMBEDDINGS.reshape(-1).tolist()
    header = subprocess.run([h5dump, "-H", GOLDEN], capture_output=True, text=True, check=True).stdout
    assert "H5T_IEEE_F32LE" in header and "content_id" in header
