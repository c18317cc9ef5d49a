"""A page of samples: what an augmentation makes of some images, so that a person sees whether it goes too far."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from embedkit.errors import FinetuneError, ImageError
from embedkit.evaluation.bench_page import page_style
from embedkit.evaluation.cell_details import name, text
from embedkit.evaluation.cells import write_whole
from embedkit.extraction.computing import read_entry
from embedkit.finetuning.feeding.augmentation import Augmentation
from embedkit.finetuning.feeding.feed import chances_of
from embedkit.finetuning.feeding.mixing import mix_batch
from embedkit.finetuning.feeding.transforms import read_variant
from embedkit.finetuning.recipe import Recipe
from embedkit.images import MAX_PIXELS, read_crop, read_image, thumbnail
from embedkit.sources import Entry
from embedkit.spec import Preprocessing

Pixels = npt.NDArray[np.uint8]

IMAGES = 6
VARIANTS = 7
_SIDE = 144
_STYLE = """
.row { display: grid; gap: .4rem; grid-template-columns: repeat(8, minmax(64px, 1fr)); margin: 0 0 1rem; }
.plain img { outline: 2px solid currentColor; outline-offset: -2px; }
"""
# What says how, rather than what.
_NOT_ALONE = ("crop_ratio", "mixup", "cutmix", "mix_prob", "mixup_off_epoch")


class _Sample(NamedTuple):
    """An image, read once and shown often."""

    row: int
    entry: Entry
    data: Any


def write_samples(
    page: Path,
    entries: Sequence[Entry],
    preprocessing: Preprocessing,
    recipe: Recipe,
    *,
    codes: npt.NDArray[np.int64] | None = None,
    max_pixels: int = MAX_PIXELS,
) -> None:
    """Write a page of some images as the evaluation sees them, and of variants as the training does.

    Parameters
    ----------
    page : Path
        The HTML file, which needs no other and asks no network. One that is there is replaced.
    entries : sequence of Entry
        The training images.
    preprocessing : Preprocessing
        The backbone's.
    recipe : Recipe
        Its `augmentation`; its `seed` draws the images, and their variants as in the first epochs of a
        run on these entries.
    codes : array of shape (n,), optional
        int64, the class of each entry: every class is shown before any is shown twice.
    max_pixels : int, default 178956970
        Larger images are refused.

    Raises
    ------
    ImageError
        When none of the images that were drawn can be read.
    FinetuneError
        When the page cannot be written.

    Examples
    --------
    >>> write_samples(Path("samples.html"), listing.files, backbone.preprocessing, Recipe())  # doctest: +SKIP
    """
    samples = _chosen(entries, codes, recipe.seed)
    parts = [
        _together(samples, preprocessing, recipe, max_pixels), _mixed(samples, preprocessing, recipe, max_pixels),
        _alone(max(samples, key=_colourfulness), preprocessing, recipe, max_pixels),
    ]  # fmt: skip
    augmentation = recipe.augmentation
    chosen = [each.name for each in fields(augmentation) if _differs(augmentation, each.name)]
    about = ", ".join(f"{each} {_shown(getattr(augmentation, each))}" for each in chosen) or "nothing is varied"
    height, width = preprocessing.img_size
    html = (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8">\n<title>Samples of an augmentation</title>\n'
        f'<meta name="viewport" content="width=device-width">\n<link rel="icon" href="data:,">\n'
        f"<style>{page_style()}{_STYLE}</style>\n<header><h1>Samples of an augmentation</h1>"
        f"<p class=soft>{text(about)}; {height} x {width} px, seed {recipe.seed}. "
        "The framed pictures are what the evaluation sees, without chance.</p></header>\n"
        + "\n".join(part for part in parts if part)
    )
    try:
        write_whole(page, html.encode("utf-8", "backslashreplace"))
    except OSError as error:
        reason = error.strerror or error
        raise FinetuneError(f"{page} cannot be written: {reason}; name a file in a folder that exists") from error


def _chosen(entries: Sequence[Entry], codes: npt.NDArray[np.int64] | None, seed: int) -> list[_Sample]:
    """Draw images that can be read, of as many classes as possible."""
    order = np.random.default_rng(seed).permutation(len(entries))
    if codes is not None:
        _, firsts = np.unique(codes[order], return_index=True)
        rest = np.setdiff1d(np.arange(len(order)), firsts)
        order = order[np.concatenate([np.sort(firsts), rest])]
    samples: list[_Sample] = []
    failure = ImageError("images", "there are none", "missing")
    for row in order[: 4 * IMAGES].tolist():
        try:
            data = read_entry(entries[row])
            read_crop(data, Preprocessing(img_size=(8, 8)), id=entries[row].id)
            samples.append(_Sample(row, entries[row], data))
        except ImageError as error:
            failure = error
        if len(samples) == IMAGES:
            break
    if not samples:
        raise failure
    return samples


def _together(samples: Sequence[_Sample], preprocessing: Preprocessing, recipe: Recipe, max_pixels: int) -> str:
    """Return a row of each image: the evaluation's crop, and the first epochs' variants."""
    rows = []
    for sample in samples:
        plain = read_crop(sample.data, preprocessing, id=sample.entry.id, max_pixels=max_pixels)
        variants = _variants(sample, preprocessing, recipe.augmentation, recipe.seed, max_pixels)
        label = f"{name(sample.entry.label)}: " if sample.entry.label else ""
        rows.append(
            f"<p class=soft>{label}{text(sample.entry.id)}</p>"
            f"<div class=row>{_figure(plain, kind='plain')}{''.join(_figure(each) for each in variants)}</div>"
        )
    return f"<h2>All together</h2>{''.join(rows)}"


def _mixed(samples: Sequence[_Sample], preprocessing: Preprocessing, recipe: Recipe, max_pixels: int) -> str:
    """Return a batch of these images, mixed by each of the ways that are on."""
    parts = []
    crops = [next(_variants(each, preprocessing, recipe.augmentation, recipe.seed, max_pixels)) for each in samples]
    names = [each.entry.label or each.entry.id for each in samples]
    for kind in ("mixup", "cutmix"):
        if not getattr(recipe.augmentation, kind) or len(samples) < 2 or not recipe.augmentation.mixes:
            continue
        only = replace(recipe.augmentation, mixup=0.0, cutmix=0.0, mix_prob=1.0)
        only = replace(only, **{kind: getattr(recipe.augmentation, kind)})
        figures = []
        for draw in range(2):
            pixels = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2)
            own = torch.arange(len(crops))
            mixed, targets = mix_batch(pixels, own, len(crops), only, np.random.default_rng([recipe.seed, draw]))
            assert targets is not None
            for picture, shares in zip(mixed.permute(0, 2, 3, 1).numpy(), targets.tolist(), strict=True):
                said = sorted(
                    ((share, names[place]) for place, share in enumerate(shares) if share >= 0.005), reverse=True
                )
                figures.append(_figure(picture, " + ".join(f"{share:.2f} {name(each)}" for share, each in said)))
        parts.append(f"<h2>{name(kind)}</h2><div class=row>{''.join(figures)}</div>")
    return "".join(parts)


def _alone(sample: _Sample, preprocessing: Preprocessing, recipe: Recipe, max_pixels: int) -> str:
    """Return one image varied by one setting at a time."""
    augmentation, rows = recipe.augmentation, []
    for each in fields(augmentation):
        if each.name in _NOT_ALONE or not _differs(augmentation, each.name):
            continue
        value = getattr(augmentation, each.name)
        only = Augmentation(**{each.name: value}, crop_ratio=augmentation.crop_ratio)
        variants = list(_variants(sample, preprocessing, only, recipe.seed, max_pixels))
        plain = read_crop(sample.data, preprocessing, id=sample.entry.id, max_pixels=max_pixels)
        rows.append(
            f"<p class=soft>{name(each.name)} {text(_shown(value))}</p>"
            f"<div class=row>{_figure(plain, kind='plain')}{''.join(_figure(each) for each in variants)}</div>"
        )
    return f"<h2>One at a time</h2>{''.join(rows)}" if len(rows) > 1 else ""


def _variants(
    sample: _Sample, preprocessing: Preprocessing, augmentation: Augmentation, seed: int, max_pixels: int
) -> Iterator[Pixels]:
    for number in range(1, VARIANTS + 1):
        random = chances_of(seed, number, sample.row)
        yield read_variant(
            sample.data, preprocessing, augmentation, random, id=sample.entry.id, max_pixels=max_pixels
        )  # fmt: skip


def _colourfulness(sample: _Sample) -> float:
    """Return how far the channels of an image lie apart: on a grey one, changed colours cannot be seen."""
    crop = read_crop(sample.data, Preprocessing(img_size=(32, 32)), id=sample.entry.id)
    return float(np.ptp(crop.astype(np.int16), axis=2).mean())


def _differs(augmentation: Augmentation, setting: str) -> bool:
    return bool(getattr(augmentation, setting) != getattr(Augmentation, setting))


def _shown(value: Any) -> str:
    return " to ".join(f"{each:g}" for each in value) if isinstance(value, tuple) else str(value)


def _figure(crop: Pixels, caption: str = "", kind: str = "varied") -> str:
    """Return a crop as HTML; the caption is HTML already."""
    picture = base64.b64encode(thumbnail(read_image(np.ascontiguousarray(crop)), _SIDE)).decode()
    said = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f'<figure class={kind}><img alt="" src="data:image/jpeg;base64,{picture}">{said}</figure>'
