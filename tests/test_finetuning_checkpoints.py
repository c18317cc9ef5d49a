"""The state of a run on disk: whole or absent, and never taken for another's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from embedkit.errors import FinetuneError
from embedkit.finetuning.training.checkpoints import (
    LAST,
    check_identity,
    forget,
    load_facts,
    load_state,
    pack_optimiser,
    remove_leftovers,
    save_state,
    state_folder,
    unpack_optimiser,
)
from embedkit.finetuning.training.history import EpochRow, History


def test_a_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    weights = torch.rand(4, 3, 2, 2).to(memory_format=torch.channels_last)
    tensors = {"a": weights, "tied": weights, "b": torch.arange(3), "c": torch.tensor(0.1, dtype=torch.float64)}
    facts = {"identity": {}, "rate": 0.1, "text": "ä", "none": None, "large": 2**60}
    save_state(tmp_path / LAST, tensors, facts)
    found, read = load_state(tmp_path / LAST)
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in tensors.items())
    assert {name: read[name] for name in facts} == facts
    assert [path.name for path in tmp_path.iterdir()] == [LAST]


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ("", "cannot be read"),
        ("{", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("[]", "not the state of a training run"),
        (json.dumps({"format": "embedkit-training", "version": 2}), "its version is 2, and this embedkit reads 1"),
        (json.dumps({"format": "embedkit-training", "version": 1}), "does not say what run it is of"),
    ],
    ids=["none", "broken", "deep", "other", "newer", "anonymous"],
)
def test_a_file_that_is_no_state_is_refused_with_what_to_do(tmp_path: Path, facts: str, reason: str) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / LAST, metadata={"embedkit": facts})
    with pytest.raises(FinetuneError, match=reason) as caught:
        load_state(tmp_path / LAST)
    assert f"remove the folder {tmp_path}" in str(caught.value)


def test_a_full_disk_leaves_the_state_that_was_there(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="this system has no limit of a file's length")
    save_state(tmp_path / LAST, {"a": torch.zeros(1)}, {"identity": {"epoch": 1}})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(FinetuneError, match=r"last\.safetensors cannot be written"):
            save_state(tmp_path / LAST, {"a": torch.zeros(4096)}, {"identity": {"epoch": 2}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert load_facts(tmp_path / LAST)["identity"] == {"epoch": 1}
    assert [path.name for path in tmp_path.iterdir()] == [LAST]


@pytest.mark.parametrize("data", [b"", b"\x80\x04pickle", b"\xff" * 64], ids=["empty", "pickle", "large header"])
def test_bytes_of_something_else_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / LAST).write_bytes(data)
    with pytest.raises(FinetuneError, match=r"last\.safetensors cannot be read"):
        load_state(tmp_path / LAST)


def test_what_differs_between_two_runs_is_named_and_no_more(tmp_path: Path) -> None:
    path = tmp_path / "run" / "state" / LAST
    check_identity(path, {"a": {"b": [1, 2]}}, {"a": {"b": (1, 2)}})
    with pytest.raises(FinetuneError) as caught:
        check_identity(path, {"a": {"b": 1, "c": 2}, "gone": 1}, {"a": {"b": 1, "c": 3}, "new": "x"})
    assert str(caught.value).splitlines()[1:] == [
        "  a.c: 2 there, 3 now", "  gone: 1 there, None now", "  new: None there, 'x' now",
    ]  # fmt: skip
    assert str(path.parent.parent) in str(caught.value) and f"remove {path.parent}" in str(caught.value)
    many: dict[str, Any] = {f"field{number:02}": number for number in range(20)}
    with pytest.raises(FinetuneError, match="and 12 more"):
        check_identity(path, many, {})


def test_leftovers_are_removed_and_the_best_is_kept(tmp_path: Path) -> None:
    for name in (".tmp-host-1-abc", "best-1.safetensors", "best-2.safetensors", LAST, "mine.txt"):
        (tmp_path / name).write_bytes(b"")
    remove_leftovers(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best-2.safetensors", LAST, "mine.txt"]


def test_forgetting_a_run_removes_its_state_and_nothing_else(tmp_path: Path) -> None:
    state_folder(tmp_path).mkdir()
    (state_folder(tmp_path) / LAST).write_bytes(b"")
    (tmp_path / "epochs.csv").write_text("")
    forget(tmp_path)
    forget(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["epochs.csv"]


def test_an_optimiser_goes_on_as_if_it_had_never_stopped() -> None:
    def layers() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        module = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
        return module, torch.optim.AdamW(module.parameters(), lr=0.1, amsgrad=True)

    def step(module: nn.Module, optimiser: torch.optim.Optimizer) -> None:
        optimiser.zero_grad()
        module(torch.ones(2, 3, 8, 8)).square().mean().backward()
        optimiser.step()

    (one, optimiser), (other, resumed) = layers(), layers()
    step(one, optimiser)
    tensors, packed = pack_optimiser(optimiser)
    other.load_state_dict(one.state_dict())
    unpack_optimiser(resumed, {name: value.clone() for name, value in tensors.items()}, json.loads(json.dumps(packed)))
    for left, right in zip(one.parameters(), other.parameters(), strict=True):
        assert resumed.state[right]["exp_avg"].stride() == optimiser.state[left]["exp_avg"].stride()
    assert resumed.param_groups[0]["betas"] == (0.9, 0.999)
    step(one, optimiser)
    step(other, resumed)
    assert all(torch.equal(left, right) for left, right in zip(one.parameters(), other.parameters(), strict=True))


def test_what_the_recipe_says_of_a_group_is_not_read_from_a_file() -> None:
    def optimiser() -> torch.optim.Optimizer:
        group = {"params": [nn.Parameter(torch.ones(2))], "name": "head", "base_lr": 0.1, "weight_decay": 0.5}
        return torch.optim.AdamW([group], lr=0.1)

    packed = json.dumps(pack_optimiser(optimiser())[1])
    for change in (
        ('"base_lr", 0.1', '"base_lr", "much"'),
        ('"base_lr"', '"other"'),
        ('"weight_decay", 0.5', '"a", 1'),
    ):
        assert change[0] in packed
        found = optimiser()
        unpack_optimiser(found, {}, json.loads(packed.replace(*change)))
        assert [found.param_groups[0][name] for name in ("name", "base_lr", "weight_decay")] == ["head", 0.1, 0.5]


@pytest.mark.parametrize(
    "change",
    [('"betas", {"tuple": [0.9, 0.999]}', '"betas", "x"'), ('"eps", 1e-08', '"eps", null'), ('"foreach"', '"other"')],
)
def test_an_optimisers_hyperparameters_are_not_read_from_a_file(change: tuple[str, str]) -> None:
    def optimiser() -> torch.optim.Optimizer:
        return torch.optim.AdamW([nn.Parameter(torch.ones(2))], lr=0.1)

    packed = json.dumps(pack_optimiser(optimiser())[1])
    assert change[0] in packed
    found = optimiser()
    unpack_optimiser(found, {}, json.loads(packed.replace(*change)))
    found.param_groups[0]["params"][0].grad = torch.ones(2)
    found.step()
    fresh = optimiser().param_groups[0]
    assert {name: value for name, value in found.param_groups[0].items() if name != "params"} == {
        name: value for name, value in fresh.items() if name != "params"
    }


@pytest.mark.parametrize("step", ['"x"', "null", "-1", "true", "1e400", "1" + "0" * 30])
def test_a_counter_that_counts_nothing_is_refused(step: str) -> None:
    optimiser = torch.optim.SGD([{"params": [nn.Parameter(torch.ones(2))], "step": 3}], lr=0.1)
    packed = json.dumps(pack_optimiser(optimiser)[1])
    unpack_optimiser(optimiser, {}, json.loads(packed.replace('"step", 3', '"step", 4')))
    assert optimiser.param_groups[0]["step"] == 4
    with pytest.raises(ValueError, match="an optimiser's step must be a number of updates"):
        unpack_optimiser(optimiser, {}, json.loads(packed.replace('"step", 3', f'"step", {step}')))


@pytest.mark.parametrize(
    "changes", [{"metrics": {"top1": "<b>"}}, {"metrics": "x"}, {"rates": None}, {"seconds": None}, {"loss": "low"}]
)
def test_a_history_of_other_things_than_numbers_is_refused(changes: dict[str, Any]) -> None:
    history = History((EpochRow(1, 0.5, {"top1": 0.25}, {"head": 0.1}, 8, 0, 1.5, 4),), 1)
    values = json.loads(json.dumps(history.to_dict()))
    assert History.from_dict(values) == history
    with pytest.raises((TypeError, ValueError, AttributeError)):
        History.from_dict({**values, "epochs": [{**values["epochs"][0], **changes}]})


def test_an_optimiser_that_keeps_what_no_file_can_is_refused() -> None:
    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    optimiser.param_groups[0]["hook"] = print
    with pytest.raises(FinetuneError, match="SGD keeps a builtin_function_or_method"):
        pack_optimiser(optimiser)
