"""Options that several commands share, and the types they parse to."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

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
    click.option("--crop-pct", type=float, help="Share of the resized image that the crop keeps."),
    click.option("--crop-mode", help="center, squash or border."),
    click.option("--interpolation", help="nearest, bilinear, bicubic, lanczos, box or hamming."),
    click.option("--mean", type=_Numbers(float), help="Mean of each channel, for pixels in [0, 1]."),
    click.option("--std", type=_Numbers(float), help="Standard deviation of each channel."),
    click.option(
        "--pool", default="default", show_default=True,
        help="default (the model's own), avg, max, cls or flatten.",
    ),
    click.option(
        "--exif/--no-exif", default=True, show_default=True,
        help="Apply EXIF orientation; --no-exif matches most published protocols.",
    ),
]  # fmt: skip

device_option = click.option(
    "--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ...; only auto chooses."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text for people.")
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace what exists at the output.")
layer_option = click.option("--layer", metavar="NAME", help="A layer of the store instead of its embeddings.")
quiet_option = click.option(
    "-q", "--quiet", is_flag=True, callback=_quiet, help="No progress and no notices on standard error, only warnings."
)


def backbone_options(command: Command) -> Command:
    """Add the options of `Backbone.load`; where one is left out, what the weights were trained with holds."""
    for option in reversed(_BACKBONE_OPTIONS):
        command = option(command)
    return command
