"""Every way to run a network gives the same numbers, and one that does not is never used."""

from __future__ import annotations

import importlib.util
import logging
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from embedkit import Backbone, BackboneError, Preprocessing
from embedkit.backbones import ENGINES, import_timm
from embedkit.backbones.choosing import choose
from embedkit.backbones.engines import eager
from embedkit.backbones.network import Network, check_views
from embedkit.backbones.pooling import Taps, pooled

needs_openvino = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="the extra openvino is absent")
EXACT = ["graph", pytest.param("openvino", marks=needs_openvino)]
LONG = 10_000_000


def network(name: str = "test_resnet", size: int = 64, views: tuple[str, ...] = (), **options: Any) -> Network:
    torch.manual_seed(0)
    model = import_timm().create_model(name, num_classes=0, **options).eval().requires_grad_(False)
    return Network(model, Preprocessing(img_size=(size, size)), ("default", "avg"), views).eval()


def crops(count: int = 8, size: int = 64) -> list[npt.NDArray[np.uint8]]:
    return list(np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8))


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize(("arch", "size"), [("test_resnet", 64), ("test_vit", 160), ("test_efficientnet", 64)])
def test_every_engine_returns_the_numbers_of_eager(name: str, arch: str, size: int) -> None:
    net, images = network(arch, size), crops(11, size)
    expected, found = eager(net, 4)(images), ENGINES[name](net, 4)(images)
    for left, right in zip(found, expected, strict=True):
        assert left.dtype == np.float32 and left.shape == (11, right.shape[1])
        np.testing.assert_allclose(left, right, atol=1e-5 * np.abs(right).max())


@pytest.mark.parametrize("name", ["eager", *EXACT])
def test_no_bit_depends_on_the_neighbours_in_a_pass_or_on_the_thread(name: str) -> None:
    images = crops(24)
    engine = ENGINES[name](network(), 8)
    expected = engine(images)[0]
    orders = [np.random.default_rng(seed).permutation(24)[: 3 + seed] for seed in range(20)]
    with ThreadPoolExecutor(4, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for order, found in zip(
            orders, pool.map(lambda order: engine([images[k] for k in order])[0], orders), strict=True
        ):
            assert np.array_equal(found, expected[order])


def test_a_short_job_waits_for_no_compiler_and_a_long_one_gets_the_fastest() -> None:
    net, images = network(), crops()
    short = choose(net, images, 100)
    assert short.engine.name == "eager" and [trial.engine for trial in short.trials] == ["eager"]
    assert short.reason == "short job"
    long = choose(net, images, LONG)
    assert {"eager", "graph"} <= {trial.engine for trial in long.trials} and long.reason == "fastest"
    good = [trial for trial in long.trials if not trial.dropped]
    assert all(trial.min_cosine >= 0.99999 and trial.seconds > 0 for trial in good)
    assert long.engine.name in {trial.engine for trial in good}
    assert choose(net, [], LONG).engine.name == "eager"


def test_an_engine_that_breaks_on_a_network_is_left_out_with_a_line(caplog: pytest.LogCaptureFixture) -> None:
    # The fused graph cannot hold the shifted windows of this transformer.
    net = network("swin_tiny_patch4_window7_224", 224, embed_dim=24, depths=(1, 1), num_heads=(1, 2))
    with caplog.at_level(logging.INFO, "embedkit"):
        choice = choose(net, crops(2, 224), LONG, batch_size=2)
    dropped = {trial.engine: trial.dropped for trial in choice.trials if trial.dropped}
    if "graph" not in dropped:
        pytest.skip("this version of torch can fuse it")
    assert choice.engine.name != "graph" and "engine graph is left out: RuntimeError" in caplog.text
    with pytest.raises(BackboneError, match="the engine graph cannot run this backbone: RuntimeError"):
        choose(net, crops(2, 224), LONG, batch_size=2, engine="graph")


def test_an_engine_with_other_numbers_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    net, images = network(), crops()
    monkeypatch.setitem(ENGINES, "graph", lambda net, size, precision: eager(network("test_resnet"), size, "bf16"))
    choice = choose(net, images, LONG)
    assert next(trial for trial in choice.trials if trial.engine == "graph").dropped.startswith("its embeddings differ")
    assert choice.engine.name != "graph"


def test_half_precision_says_how_far_it_is_from_full() -> None:
    net, images = network(), crops()
    for precision in ("bf16", "fp16"):
        choice = choose(net, images, 100, precision=precision)
        assert 0.99 < choice.trial.min_cosine <= choice.trial.mean_cosine < 1
        assert choice.engine(images)[0].dtype == np.float32
    assert next(net.parameters()).dtype == torch.float32


def test_engines_that_are_not_there_say_so() -> None:
    with pytest.raises(BackboneError, match="unknown engine 'warp'; choose auto or one of eager, graph"):
        choose(network(), crops(), 1, engine="warp")
    if importlib.util.find_spec("openvino") is None:
        with pytest.raises(BackboneError, match=r"embedkit\[openvino\]"):
            choose(network(), crops(), 1, engine="openvino")


def test_weights_that_give_no_numbers_are_an_error() -> None:
    net = network()
    for weight in net.parameters():
        weight.fill_(float("nan"))
    with pytest.raises(BackboneError, match="infinities or NaN for real pixels"):
        choose(net, crops(), LONG)


def test_views_are_averaged() -> None:
    plain, images = network(), np.stack(crops())

    def embed(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        return eager(plain, 8)(list(pixels))[0]

    flipped = eager(network(views=("flip",)), 8)(list(images))[0]
    np.testing.assert_allclose(flipped, (embed(images) + embed(images[:, :, ::-1])) / 2, atol=1e-5)
    scaled = eager(network(views=("scale:0.5",)), 8)(list(images))[0]
    assert scaled.shape == flipped.shape and not np.allclose(scaled, embed(images), atol=1e-3)
    whole = np.stack(crops(8, 73))  # floor(64 / 0.875)
    cuts = [whole[:, top : top + 64, left : left + 64] for top, left in ((4, 4), (0, 0), (0, 9), (9, 0), (9, 9))]
    five = eager(network(views=("five-crop",)), 8)(list(whole))[0]
    np.testing.assert_allclose(five, np.mean([embed(cut) for cut in cuts], axis=0), atol=1e-5)
    for views in (["spin"], ["scale:9"], ["scale:x"], ["flip", "flip"]):
        with pytest.raises(ValueError, match=r"is no view|twice"):
            check_views(views)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_freed_memory_is_kept_only_while_it_is_used() -> None:
    script = """
import ctypes, resource, sys
from embedkit.backbones.allocator import kept_memory
libc = ctypes.CDLL("libc.so.6")
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, (ctypes.c_void_p,)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        block = libc.malloc(48 << 20)
        ctypes.memset(block, 1, 48 << 20)
        libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
outside = faults()
with kept_memory():
    with kept_memory():
        faults()
    inside = faults()
print(outside, inside, faults())
"""
    for setting, kept in (("", True), ("system", False)):
        environment = {"EMBEDKIT_MALLOC": setting, "PYTHONPATH": ":".join(sys.path)}
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True
        )
        outside, inside, after = map(int, done.stdout.split())
        assert (inside < outside / 10) == kept and after > outside / 2


def test_runs_side_by_side_leave_torch_as_it_was(tiny_backbone: Path) -> None:
    torch.set_num_threads(2)
    images = crops(40)
    with ThreadPoolExecutor(3) as pool:
        backbones = list(pool.map(lambda _: Backbone.load(tiny_backbone), range(3)))
        found = list(pool.map(lambda backbone: backbone.embed(images, batch_size=4), backbones))
        list(pool.map(lambda backbone: backbone.choose_engine(images, 1, engine="graph"), backbones))
    assert np.array_equal(found[0], found[1]) and np.array_equal(found[0], found[2])
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == torch.get_num_threads() == 2
    assert not torch.jit.onednn_fusion_enabled()  # type: ignore[no-untyped-call]


def test_a_large_batch_is_timed_whole_and_an_engine_is_built_once(tiny_backbone: Path) -> None:
    backbone = Backbone.load(tiny_backbone)
    choices = [backbone.choose_engine(crops(4), LONG, batch_size=32, engine="graph") for _ in range(2)]
    assert choices[0].engine is choices[1].engine
    eager_trial, graph_trial = choices[0].trials
    assert 32 / eager_trial.seconds == pytest.approx(eager_trial.images_per_second)
    assert graph_trial.seconds > 0


def test_a_module_is_pooled_as_it_returns_before_the_next_one_works_in_place() -> None:
    torch.manual_seed(0)
    model = import_timm().create_model("resnet18", num_classes=0).eval().requires_grad_(False)
    net = Network(model, Preprocessing(img_size=(64, 64)), ("bn1:avg", "layer1.0.bn2:avg", "default")).eval()
    kept: dict[str, torch.Tensor] = {}
    for name in ("bn1", "layer1.0.bn2"):
        hook = lambda module, inputs, output, name=name: kept.__setitem__(name, output.clone())  # noqa: E731
        model.get_submodule(name).register_forward_hook(hook)
    found = eager(net, 8)(crops())
    for name, embeddings in zip(("bn1", "layer1.0.bn2"), found, strict=False):
        np.testing.assert_allclose(embeddings, kept[name].mean((2, 3)).numpy(), atol=1e-5)


def test_tokens_before_the_class_token_are_all_kept() -> None:
    torch.manual_seed(0)
    model = import_timm().create_model("test_vit", num_classes=0).eval().requires_grad_(False)
    pools = ("patch_embed:none", "blocks.0:none", "none", "patch_embed:avg")
    net = Network(model, Preprocessing(img_size=(160, 160)), pools).eval()
    found = eager(net, 2)(crops(2, 160))
    patches, width = model.patch_embed.num_patches, model.num_features
    assert [embeddings.shape[1] for embeddings in found[:3]] == [patches * width] * 3
    np.testing.assert_allclose(found[0].reshape(2, patches, width).mean(1), found[3], atol=1e-5)


def test_gem_of_half_precision_is_finite() -> None:
    model = torch.nn.Module()
    large = torch.full((1, 2, 3, 3), 300.0, dtype=torch.float16)
    np.testing.assert_allclose(pooled_map(model, large, "gem"), 300.0, rtol=1e-3)


def pooled_map(model: torch.nn.Module, features: torch.Tensor, pool: str) -> Any:
    model.forward_features = lambda pixels: features  # type: ignore[assignment]
    return pooled(model, features, [pool], Taps(model, [pool]))[0].numpy()
