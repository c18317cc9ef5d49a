"""The command that measures backbones side by side."""

from __future__ import annotations

import json
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from embedkit.cli import printing
from embedkit.cli.options import FILE, device_option, json_option, quiet_option

if TYPE_CHECKING:
    from embedkit.evaluation import Suite
    from embedkit.extraction import Progress


class _Place(click.ParamType):  # type: ignore[type-arg]  # generic in newer clicks only
    """NAME=PATH."""

    name = "name=path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value
        name, equals, path = value.partition("=")
        if not equals or not path or not name.isidentifier():
            self.fail(f"{value!r} is not of the form NAME=PATH, such as DATA=/data", param, ctx)
        return name, path


class _Bars:
    """A bar for each store that is being made."""

    def __init__(self, quiet: bool) -> None:
        self.quiet, self.name = quiet, ""
        self.bar: printing.ImageBar | None = None

    def update(self, name: str, progress: Progress) -> None:
        """Show how far the extraction of one store is."""
        if name != self.name:
            self.close()
            self.name, self.bar = name, printing.ImageBar(self.quiet)
            if progress.kept < progress.total:
                printing.notice(f"{name}: extracting", self.quiet)
        if self.bar is not None:
            self.bar.update(progress)
        if progress.done == progress.total:
            self.close()  # What comes after that is the same once more, when all is written.

    def close(self) -> None:
        """Leave the bar as it is."""
        if self.bar is not None:
            self.bar.__exit__(None, None, None)
        self.bar = None


@click.command()
@click.argument("suite", type=FILE)
@click.option("-o", "--output", type=FILE, metavar="FOLDER", help="Where results are kept.  [default: runs/SUITE]")
@click.option(
    "--data", "places", type=_Place(), multiple=True, metavar="NAME=PATH",
    help="What ${NAME} in the suite stands for; may be repeated.  [default: $EMBEDKIT_NAME]",
)  # fmt: skip
@click.option("--only", metavar="PATTERN", help="Measure only cells with this in their names, or like it with * and ?.")
@click.option("--dry-run", is_flag=True, help="List the cells and what is there of them, and measure nothing.")
@device_option
@click.option("-j", "--workers", type=click.IntRange(1), help="Worker threads.  [default: one a processor]")
@json_option
@quiet_option
@click.pass_context
def bench(
    ctx: click.Context,
    /,
    suite: Path,
    output: Path | None,
    places: tuple[tuple[str, str], ...],
    only: str | None,
    dry_run: bool,
    device: str,
    workers: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure every backbone of SUITE on every data set by every protocol, and compare them.

    SUITE is a YAML file that names backbones, data sets and protocols; docs/benchmarks.md says how. Images are embedded
    into a store for each backbone and data set, and a cell is kept for each combination. What is there already and
    still true is used again, so the same command goes on where it was interrupted. A cell that fails takes no other
    along; the exit code is then 3.

    Written to the output are table.md, table.csv and report.html, one self-contained page with accuracy against speed
    and size, the classes, the worst errors and the calibration of every cell.
    """
    from embedkit.evaluation import read_suite, run_suite
    from embedkit.evaluation.bench_page import write_reports

    started = time.perf_counter()
    read = read_suite(suite, dict(places))
    folder = output or Path("runs", suite.stem)
    if dry_run:
        _list_cells(read, folder, only, as_json)
        return
    bars = _Bars(quiet)
    try:
        cells = run_suite(
            read, folder, lambda line: printing.notice(line, quiet), only=only, device=device, workers=workers,
            extracting=bars.update,
        )  # fmt: skip
    finally:
        bars.close()
    command = shlex.join(["embedkit", *sys.argv[1:]])
    shown = write_reports(read, cells, folder, command=command, seconds=time.perf_counter() - started)
    if as_json:
        for cell in cells:
            click.echo(json.dumps(cell.to_dict()))
    else:
        click.echo(shown)
    printing.notice(f"page: {folder / 'report.html'}", quiet)
    failed = [cell for cell in cells if cell.error]
    for cell in failed:
        printing.notice(f"failed: {cell.name}: {cell.error}")
    ctx.exit(3 if failed else 0)


def _list_cells(suite: Suite, folder: Path, only: str | None, as_json: bool) -> None:
    """Print the cells of a suite and what an earlier run has left of them."""
    from embedkit.evaluation.benching import chosen_plans, state_of

    plans = chosen_plans(suite, only)
    width = max(len(plan.name) for plan in plans)
    for plan in plans:
        state = state_of(folder, plan)
        if as_json:
            click.echo(json.dumps({"name": plan.name, "state": state}))
        else:
            click.echo(f"{plan.name:<{width}}  {state}")
