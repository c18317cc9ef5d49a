import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from embedkit.errors import FinetuneError
from embedkit.finetuning.comparison import BeforeAfter, Change, classifier_report, compare_stores, retrieval_within
from embedkit.index import retrieval_report
from embedkit.spec import EmbeddingSpec
from embedkit.store import Store, StoreWriter

CLASSES = ["cat", "dog", "eel"]
N, DIM = 180, 12


def codes() -> npt.NDArray[np.int64]:
    return np.arange(N) % 3


def write_store(path: Path, separation: float, *, weights: str, seed: int = 0) -> Store:
    """Write a store whose classes lie `separation` standard deviations apart."""
    x = separation * np.eye(DIM)[codes()] + np.random.default_rng(seed).normal(size=(N, DIM))
    spec = EmbeddingSpec(backbone="resnet18", weights_sha256=weights * 32, dim=DIM)
    with StoreWriter(path, spec) as writer:
        ids = [f"{row:03}.jpg" for row in range(N)]
        writer.append(x.astype(np.float32), ids, labels=[CLASSES[code] for code in codes()])
        writer.finalise()
    return Store.open(path)


@pytest.fixture
def split(tmp_path: Path) -> str:
    rows = [f"{row:03}.jpg,{CLASSES[row % 3]},{'train' if row < 90 else 'val'}" for row in range(N)]
    (tmp_path / "split.csv").write_text("path,label,split\n" + "\n".join(rows) + "\n")
    return str(tmp_path / "split.csv")


def test_a_better_backbone_is_said_to_help_and_each_difference_is_tested(tmp_path: Path, split: str) -> None:
    before, after = write_store(tmp_path / "a.h5", 1.0, weights="ab"), write_store(tmp_path / "b.h5", 4.0, weights="cd")
    steps: list[str] = []
    found = compare_stores(before, after, split, ("train", "val", "val"), progress=steps.append)
    assert [change.name for change in found.changes] == ["linear probe", "k-NN", "recall@1", "mAP@R"]
    assert all(change.real and change.difference > 0 and change.interval[0] > 0 for change in found.changes)
    assert all(change.rows == 90 and change.p_value <= change.adjusted_p_value for change in found.changes)
    assert [change.test for change in found.changes][1:] == ["McNemar's exact test"] * 2 + ["sign-flip test"]
    assert found.verdict == "fine-tuning helped: linear probe, k-NN, recall@1, mAP@R rose"
    assert found.chosen_on and "chosen too: that flatters" in found.caveat and len(steps) == 2
    harmed = compare_stores(after, before, split, ("train", "val", "val"))
    assert harmed.verdict.startswith("fine-tuning did harm: ") and harmed.changes[0].difference < 0


def test_no_difference_is_said_to_be_none(tmp_path: Path, split: str) -> None:
    before, after = (
        write_store(tmp_path / f"{weights}.h5", 2.5, weights=weights, seed=seed)
        for seed, weights in enumerate(("ab", "cd"))
    )
    found = compare_stores(before, after, split, ("train", "dev", "val"))
    assert not any(change.real for change in found.changes)
    assert found.verdict.startswith("fine-tuning did not help; linear probe, k-NN")
    assert found.caveat == "90 images of val, which nothing was chosen on"
    assert "did not help" in found.to_text() and "*" not in found.to_text()


def test_the_trained_head_is_compared_with_the_frozen_probe(tmp_path: Path, split: str) -> None:
    before, true = write_store(tmp_path / "a.h5", 1.0, weights="ab"), codes()[90:]
    ids = [f"{row:03}.jpg" for row in range(90, N)][::-1]  # In another order than the store's.
    trained = classifier_report(ids, true[::-1], np.eye(3)[true[::-1]], CLASSES)
    assert trained.metrics["top1"] == 1.0 and trained.metrics["confusion"] == (30 * np.eye(3)).tolist()
    found = compare_stores(before, None, split, ("train", "val", "val"), trained=trained)
    (change,) = found.changes
    assert change.name == "classifier" and change.after == 1.0 and change.before == found.before.metrics["top1"]  # type: ignore[union-attr]
    assert change.real and found.after is trained
    values = found.to_dict()
    assert values["changes"][0]["real"] is True and values["chosen_on"] is True


def test_a_mixed_outcome_names_what_rose_and_what_fell() -> None:
    def change(name: str, before: float, after: float, p_value: float) -> Change:
        return Change(name, before, after, [0.0, 0.0], p_value, p_value, "a test", 10)

    mixed = [change("k-NN", 0.5, 0.9, 0.001), change("recall@1", 0.9, 0.5, 0.001), change("mAP@R", 0.5, 0.6, 0.2)]
    verdict = BeforeAfter(mixed, "val", chosen_on=False).verdict
    assert verdict == ("fine-tuning helped in part: k-NN rose, recall@1 fell; mAP@R: no difference larger than chance")


def test_retrieval_within_a_part_is_that_of_the_report(tmp_path: Path) -> None:
    store = write_store(tmp_path / "a.h5", 1.5, weights="ab")
    found = retrieval_within(store.load(), codes())
    expected = retrieval_report(store, exclude_self=True, ks=[1]).metrics
    assert found["recall@1"].mean() == pytest.approx(expected["recall@1"])
    assert found["mAP@R"].mean() == pytest.approx(expected["mAP@R"])


def test_retrieval_leaves_out_classes_of_one_image() -> None:
    x = np.array([[1, 0], [1, 0.1], [0, 1], [0, 0]], dtype=np.float32)
    found = retrieval_within(x, np.array([0, 0, 1, 2]))
    assert found["rows"].tolist() == [0, 1] and found["recall@1"].tolist() == [1, 1]
    assert not len(retrieval_within(x, np.arange(4))["recall@1"])


def test_a_comparison_is_read_again_and_a_strange_one_is_refused(tmp_path: Path, split: str) -> None:
    before, after = write_store(tmp_path / "a.h5", 1.0, weights="ab"), write_store(tmp_path / "b.h5", 4.0, weights="cd")
    found = compare_stores(before, after, split, ("train", "val", "val"))
    again = BeforeAfter.from_dict(json.loads(json.dumps(found.to_dict())))
    assert again.to_text() == found.to_text() and again.changes == found.changes
    strange = found.to_dict()["changes"][0] | {"name": "k-NN\x1b[31m"}
    shown = BeforeAfter.from_dict({"changes": [strange], "part": "val", "chosen_on": False}).to_text()
    assert "\x1b" not in shown and r"k-NN\x1b[31m" in shown
    for wrong in ({}, {"changes": [1]}, {"changes": [{**strange, "interval": 3}], "part": "", "chosen_on": 1}):
        with pytest.raises(FinetuneError, match="not the comparison of a run"):
            BeforeAfter.from_dict(wrong)


def test_an_image_that_cannot_be_read_again_is_compared_in_no_measure(tmp_path: Path, split: str) -> None:
    before, whole = write_store(tmp_path / "a.h5", 1.0, weights="ab"), write_store(tmp_path / "b.h5", 4.0, weights="cd")
    ids = [id for id in whole.ids if id != "100.jpg"]
    with StoreWriter(tmp_path / "c.h5", whole.spec) as writer:
        writer.append(whole.rows(ids=ids), ids, labels=[CLASSES[int(id[:3]) % 3] for id in ids])
        writer.fail("100.jpg", "it is gone")
        writer.finalise()
    scores = np.eye(3)[[int(id[:3]) % 3 for id in ids[90:]]]
    trained = classifier_report(ids[90:], scores.argmax(axis=1), scores, CLASSES)
    for left, right in ((before, Store.open(tmp_path / "c.h5")), (Store.open(tmp_path / "c.h5"), before)):
        found = compare_stores(left, right, split, ("train", "val", "val"), trained=trained)
        assert [(change.name, change.rows) for change in found.changes] == [
            (name, 89) for name in ("classifier", "linear probe", "k-NN", "recall@1", "mAP@R")
        ]
    assert found.before is not None
    hit = dict(zip(found.before.predictions["ids"].tolist(), found.before.predictions["correct"].tolist(), strict=True))
    assert found.changes[0].before == pytest.approx(np.mean([hit[id] for id in ids[90:]]))
