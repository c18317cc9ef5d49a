"""The format is the product: other programs read it, and old files open forever."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from embedkit import Store
from embedkit.store import verify

GOLDEN = Path(__file__).parent / "data" / "store-v1.h5"
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
    assert [(failure.id, failure.error) for failure in store.failures] == [("z.jpg", "broken symbolic link")]
    assert (store.spec.backbone, store.spec.tag, store.dim, store.root) == ("resnet18", "golden", 3, Path("/photos"))
    layer = Store.open(GOLDEN, layer="layer3:avg")
    assert np.array_equal(layer.load(), LAYER) and layer.spec.pool == "layer3:avg" and layer.ids == IDS
    assert verify(GOLDEN) == []


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
