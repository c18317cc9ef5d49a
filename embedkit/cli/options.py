"""Options that several commands share, and the types they parse to."""

from __future__ import annotations

import inspect
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from embedkit.spec import BUNDLED

Command = TypeVar("Command", bound=Callable[..., Any])

FILE = click.Path(path_type=Path)


class _Numbers(click.ParamType):  # type: ignore[type-arg]  # generic in newer clicks only
    """Comma-separated numbers, such as 0.5 or 0.485,0.456,0.406."""

    name = "number[,...]"

    def __init__(self, kind: type[int] | type[float]) -> None:
        self.kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(self.kind(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is not one number or several with commas between them", param, ctx)


class _Count(click.ParamType):  # type: ignore[type-arg]
    """A number, of thousands or millions with K or M, such as 50M."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"([0-9]{1,18})([kKmM]?)", value)
        if found is None or not int(found[1]):
            self.fail(f"{value!r} is not a number such as 50000000 or 50M", param, ctx)
        return int(found[1]) * {"": 1, "k": 1_000, "m": 1_000_000}[found[2].lower()]


class _Names(click.ParamType):  # type: ignore[type-arg]
    """Comma-separated names, such as avg or layer2:avg,layer3:gem."""

    name = "name[,...]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        return value if isinstance(value, tuple) else tuple(part.strip() for part in value.split(",") if part.strip())


class _KeyValue(click.ParamType):  # type: ignore[type-arg]
    """key=value, the value read as JSON where it is JSON and as text otherwise."""

    name = "key=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Any]:
        key, equals, text = value.partition("=")
        if not equals or not key.isidentifier():
            self.fail(f"{value!r} is not of the form key=value", param, ctx)
        try:
            return key, json.loads(text)
        except ValueError:
            return key, text


class _CountOrShare(click.ParamType):  # type: ignore[type-arg]
    """A number of images, or a percentage of all."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | float:
        if isinstance(value, int | float):
            return value
        try:
            number = float(value[:-1]) / 100 if value.endswith("%") else int(value)
        except ValueError:
            number = -1
        if number < 0 or (isinstance(number, float) and number >= 1):
            self.fail(f"{value!r} is neither a number of images nor a percentage below 100 such as 1%", param, ctx)
        return number


class _Shard(click.ParamType):  # type: ignore[type-arg]
    """i/n, the i-th of n."""

    name = "i/n"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        index, _, count = value.partition("/")
        if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
            self.fail(f"{value!r} is not of the form i/n, such as 1/4, 2/4, 3/4 and 4/4", param, ctx)
        return int(index), int(count)


def _quiet(ctx: click.Context, param: click.Parameter, value: bool) -> bool:
    if value:
        logging.getLogger("embedkit").setLevel(logging.WARNING)
    return value


def _img_size(ctx: click.Context, param: click.Parameter, value: tuple[int, ...] | None) -> Any:
    return value[0] if value and len(value) == 1 else value


_BACKBONE_OPTIONS = [
    click.option("--arch", metavar="NAME", help="timm architecture of a weight file."),
    click.option(
        "--arch-kwargs", type=_KeyValue(), multiple=True, callback=lambda ctx, param, value: dict(value) or None,
        help="Keyword argument of the architecture; may be repeated.",
    ),
    click.option(
        "--img-size", type=_Numbers(int), callback=_img_size, metavar="PIXELS",
        help="Side of the crop, or HEIGHT,WIDTH.",
    ),
    click.option(
        "--preset", type=click.Choice(["default", "published"]), default="default", show_default=True,
        help="Where no option says otherwise: timm's preprocessing, or that of the published numbers.",
    ),
    click.option("--crop-pct", type=float, help="Share of the resized image that the crop keeps."),
    click.option("--crop-mode", help="center, squash or border."),
    click.option("--interpolation", help="nearest, bilinear, bicubic, lanczos, box or hamming."),
    click.option("--mean", type=_Numbers(float), help="Mean of each channel, for pixels in [0, 1]."),
    click.option("--std", type=_Numbers(float), help="Standard deviation of each channel."),
    click.option(
        "--pool", type=_Names(), default="default", show_default=True, metavar="POOL[,...]",
        help="default (the model's own), avg, max, gem, cls, flatten, none, MODULE:POOL; others are layers.",
    ),
    click.option(
        "--exif/--no-exif", default=True, show_default=True,
        help="Apply EXIF orientation; --no-exif matches most published protocols.",
    ),
    click.option(
        "--icc/--no-icc", default=False, show_default=True,
        help="Apply embedded colour profiles; --no-icc matches most published protocols.",
    ),
    click.option(
        "--truncated", type=click.Choice(["fail", "pad"]), default="fail", show_default=True,
        help="An image whose end is missing fails, or is embedded with grey or black in its place.",
    ),
    click.option(
        "--max-pixels", type=_Count(), default=178_956_970, show_default=True, metavar="COUNT",
        help="Refuse larger images before they are decoded, such as 50M.",
    ),
    click.option(
        "--decode", type=click.Choice(["standard", "exact", "fast", "gpu"]), default="standard", show_default=True,
        help="exact: timm's pixels, slower; fast: large JPEGs at a fraction of their size; gpu: JPEGs by nvJPEG.",
    ),
    click.option(
        "--precision", type=click.Choice(["fp32", "bf16", "fp16"]), default="fp32", show_default=True,
        help="Number format; half the bits move the numbers, and the run says by how much.",
    ),
    click.option(
        "--tta", type=_Names(), default=(), metavar="VIEW[,...]",
        help="Average the embeddings of more views: flip, five-crop.",
    ),
    click.option(
        "--scales", type=_Numbers(float), default=(), metavar="S[,...]",
        help="Average the embeddings of the crop at several scales, such as 1,0.7.",
    ),
]  # fmt: skip

_SOURCE_OPTIONS = {
    "files_from": click.option(
        "--files-from", metavar="LIST", help="Take the images that a file names, one a line; - reads them."
    ),
    "columns": click.option(
        "--columns", type=_KeyValue(), multiple=True, callback=lambda ctx, param, value: dict(value) or None,
        metavar="ROLE=NAME", help="Column of a table for path, id, label, split or box; may be repeated.",
    ),
    "root": click.option(
        "--root", metavar="FOLDER", help="Folder or URL that all paths in a table or a list of files are below."
    ),
    "split": click.option("--split", metavar="NAME", help="Take the rows of this split of a table or a dataset."),
    "box_format": click.option(
        "--box-format", type=click.Choice(["xyxy", "xywh"]),
        help="Boxes of a table: two corners, or a corner and a size.  [default: by the columns' names]",
    ),
    "fps": click.option(
        "--fps", metavar="RATE", help="Take so many frames a second of videos, such as 1, 0.2 or 30000/1001."
    ),
    "include": click.option(
        "--include", multiple=True, metavar="GLOB",
        help="Take only images like this: a name such as *.png, or with a slash a whole id such as cat/*.",
    ),
    "exclude": click.option("--exclude", multiple=True, metavar="GLOB", help="Leave out images like this."),
    "limit": click.option("--limit", type=click.IntRange(1), metavar="N", help="Take the first N."),
    "sample": click.option("--sample", type=click.IntRange(1), metavar="N", help="Take N at random."),
    "seed": click.option("--seed", type=int, default=0, show_default=True, help="Of --sample."),
    "shard": click.option(
        "--shard", type=_Shard(), metavar="I/N", help="Take the I-th of N shards; an image stays in its own."
    ),
    "follow_links": click.option(
        "--follow-links", is_flag=True, help="Follow symbolic links that lead out of a folder."
    ),
}  # fmt: skip

NAMES = _Names()
KEY_VALUE = _KeyValue()
NUMBERS = _Numbers(int)
COUNT_OR_SHARE = _CountOrShare()

model_option = click.option(
    "-m", "--model", default=BUNDLED, show_default=True,
    help=f"{BUNDLED} (comes with embedkit), timm name, weight file, JSON sidecar, or folder with one.",
)  # fmt: skip
device_option = click.option(
    "--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ...; only auto chooses."
)
devices_option = click.option(
    "--device", default="auto", show_default=True, metavar="NAME[,...]",
    help="auto, cpu, cuda, cuda:1, ...; several work side by side: cuda:0,cuda:1 or cuda:all.",
)  # fmt: skip
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text for people.")
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace what exists at the output.")
layer_option = click.option("--layer", metavar="NAME", help="A layer of the store instead of its embeddings.")
quiet_option = click.option(
    "-q", "--quiet", is_flag=True, callback=_quiet, help="No progress and no notices on standard error, only warnings."
)


def source_options(command: Command) -> Command:
    """Add the options of `list_images`, which `source_arguments` takes out of a command's."""
    return some_source_options(*_SOURCE_OPTIONS)(command)


def some_source_options(*names: str) -> Callable[[Command], Command]:
    """Return what adds some of the options of `list_images`, by their names there."""

    def add(command: Command) -> Command:
        for name in reversed(names):
            command = _SOURCE_OPTIONS[name](command)
        return command

    return add


def source_arguments(choices: dict[str, Any]) -> dict[str, Any]:
    """Take the arguments of `list_images` out of the values of a command's options."""
    from embedkit.sources import list_images

    names = inspect.signature(list_images).parameters.keys() - {"max_bytes"}
    return {name: choices.pop(name) for name in list(choices) if name in names}


def backbone_options(command: Command) -> Command:
    """Add the options of `Backbone.load`, whose values `backbone_arguments` makes its arguments.

    Where one is left out, what the weights were trained with holds.
    """
    for option in reversed(_BACKBONE_OPTIONS):
        command = option(command)
    return command


def backbone_arguments(
    pool: tuple[str, ...], tta: tuple[str, ...], scales: tuple[float, ...], **others: Any
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the arguments of `Backbone.load`, and the poolings that become layers."""
    if scales and 1.0 not in scales:
        raise click.UsageError("--scales must have the 1 among them: the plain crop is always embedded")
    if not pool:
        raise click.UsageError("--pool names no pooling")
    views = (*tta, *(f"scale:{scale:g}" for scale in scales if scale != 1.0))
    return {**others, "pool": pool[0], "views": views}, pool[1:]
