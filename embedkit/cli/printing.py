"""What people and programs read: progress on standard error, results on standard output."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import logging
import os
import shlex
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource
from tqdm import tqdm

from embedkit.errors import EmbedkitError
from embedkit.spec import flat
from embedkit.text import counted, printable

if TYPE_CHECKING:
    from embedkit.backbones import ModelInfo
    from embedkit.extraction import Estimate, Progress
    from embedkit.finetuning.training.history import Moment
    from embedkit.index import SearchResult
    from embedkit.store import Failure, Status, Store

SHOWN_FAILURES = 3  # Of each kind.
SHOWN_KINDS = 20
WIDEST_ID = 60
SHOWN_CLASSES = 30


def notice(line: str, quiet: bool = False) -> None:
    """Print one line for people on standard error, above a progress bar where there is one."""
    if not quiet:
        tqdm.write(printable(line), file=sys.stderr)


def default_model_notice(ctx: click.Context, quiet: bool) -> None:
    """Say which backbone is used where nobody has named one, and how to choose a stronger one."""
    if ctx.get_parameter_source("model") is ParameterSource.DEFAULT:
        notice(
            f"no -m: {ctx.params['model']} is used, the small backbone that comes with embedkit; stronger ones are "
            "downloaded by name, such as -m vit_small_patch14_dinov2.lvd142m (embedkit models lists them)",
            quiet,
        )


def error_lines(error: EmbedkitError | OSError, path: Path | None = None) -> None:
    """Print on standard error what went wrong; `path` is what an error of the system is about that names no file."""
    text = str(error)
    if not isinstance(error, EmbedkitError):
        text = f"{os.fsdecode(error.filename or path or '')}: {error.strerror or error}"
    for line in f"error: {text}".splitlines():
        click.echo(printable(line), err=True)


class NoticeHandler(logging.Handler):
    """Prints what the library logs as notices."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        notice(prefix + record.getMessage())


@contextmanager
def saying_when_long(what: str, quiet: bool) -> Iterator[None]:
    """Say what is going on when it takes more than two seconds and has no bar."""
    timer = threading.Timer(2.0, notice, (what, quiet))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class CountBar:
    """A progress bar on standard error; a file or pipe there gets a line now and then."""

    unit = " models"

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self._bar: tqdm[Any] | None = None

    def __enter__(self) -> Any:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, done: int, total: int) -> None:
        """Show that `done` of `total` are done."""
        if self._bar is None:
            interval = 0.1 if sys.stderr.isatty() else 10.0
            self._bar = tqdm(
                total=total, unit=self.unit, unit_scale=self.unit == "B", disable=self.quiet, mininterval=interval,
                maxinterval=interval, dynamic_ncols=True, smoothing=0.1, initial=done,
            )  # fmt: skip
        if done < self._bar.n:
            self._bar.initial = 0
            self._bar.reset(total)  # The next of several files.
        self._bar.update(done - self._bar.n)


class SampleBar(CountBar):
    """The bar of an estimate."""

    unit = " images"


class RowBar(CountBar):
    """The bar of what copies rows."""

    unit = " rows"


class ByteBar(CountBar):
    """The bar of what reads whole stores."""

    unit = "B"


class ImageBar(CountBar):
    """The bar of an extraction, which also measures it and says what there is to do."""

    unit = " images"

    def __init__(self, quiet: bool) -> None:
        super().__init__(quiet)
        self._started = time.perf_counter()
        self.images_per_second = 0.0
        self.changes: dict[str, int] = {}

    def update(self, progress: Progress) -> None:  # type: ignore[override]
        """Show how far an extraction is."""
        if not self.changes:
            self.changes = dataclasses.asdict(progress.changes)
            self._started = time.perf_counter()
            found = {name: count for name, count in self.changes.items() if count}
            if found.keys() - {"new"}:
                notice(", ".join(f"{count:,} {name}" for name, count in found.items()), self.quiet)
        if progress.kept < progress.total:
            super().update(progress.done, progress.total)
        self.images_per_second = (progress.done - progress.kept) / max(1e-9, time.perf_counter() - self._started)
        if self._bar is not None:
            measured = progress.measured
            facts = [f"overall {measured.images_per_second:.1f}/s"]
            shares = {name: getattr(measured, name) for name in ("read", "decode", "forward", "wait", "commit")}
            facts += [f"{name} {share:.0%}" for name, share in shares.items() if share >= 0.005]
            facts += [f"{progress.failed} failed"] if progress.failed else []
            self._bar.set_postfix_str(", ".join(facts), refresh=False)


class TrainingBar(CountBar):
    """The bar of an epoch after the other."""

    unit = " images"

    def update(self, moment: Moment) -> None:  # type: ignore[override]
        """Show how far a training run is."""
        super().update(moment.images, moment.total)
        if self._bar is not None:
            left = timedelta(seconds=round(moment.seconds_left))
            facts = f"epoch {moment.epoch} of {moment.epochs}, loss {moment.loss:.4f}, {left} left in all"
            self._bar.set_postfix_str(facts, refresh=False)


class StageBars:
    """A bar for each stage of a run that embeds and trains."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self._stage, self._bar = "", CountBar(quiet)

    def __enter__(self) -> StageBars:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.__exit__(kind, error, trace)

    def update(self, stage: str, state: Progress | Moment) -> None:
        """Show how far a stage is."""
        trains = hasattr(state, "epochs")
        if stage != self._stage:
            self._bar.__exit__(None, None, None)
            self._stage, self._bar = stage, TrainingBar(self.quiet) if trains else ImageBar(self.quiet)
        self._bar.update(state)  # type: ignore[call-arg, arg-type]
        done, total = (state.images, state.total) if trains else (state.done, state.total)  # type: ignore[union-attr]
        if done == total and (not trains or state.epoch == state.epochs):  # type: ignore[union-attr]
            self._bar.__exit__(None, None, None)  # What is said from here on comes below it.


def failures(store: Store, quiet: bool) -> None:
    """Print on standard error how many images of a store failed, by kind, and the first few of each."""
    if quiet or not store.failures:
        return
    kinds = _by_kind(store.failures)
    counts = ", ".join(f"{len(found):,} {kind}" for kind, found in kinds.items())
    notice(f"{len(store.failures):,} failed: {counts}")
    width = max(map(len, kinds))
    for kind, found in kinds.items():
        for failure in found[:SHOWN_FAILURES]:
            notice(f"  {kind:<{width}}  {printable(failure.id)}: {printable(failure.error)}")
    notice(f"{_listing(store.path)} lists them, and extract --retry-failed tries them again")


def failed_images(lines: Sequence[str], count: int, store: Path | None, quiet: bool) -> None:
    """Print on standard error the first of the images that a run could not read, and which command lists them all."""
    if not count:
        return
    for line in lines[:SHOWN_FAILURES]:
        notice(f"failed: {line}", quiet)
    more = count - min(count, SHOWN_FAILURES)
    if store is not None:
        notice(f"... and {more:,} more: {_listing(store)}" if more else f"{_listing(store)} lists them", quiet)
    elif more:
        notice(f"... and {more:,} more, which report.json names", quiet)


def _listing(path: Path) -> str:
    return f"embedkit info {shlex.quote(os.fspath(path))} --failures"


def _by_kind(failed: Sequence[Failure]) -> dict[str, list[Failure]]:
    """Return failures by kind, the most frequent first; what has so many kinds that nobody reads them is cut."""
    kinds: dict[str, list[Failure]] = {}
    for failure in failed:
        kinds.setdefault(failure.kind, []).append(failure)
    order = sorted(kinds, key=lambda kind: (-len(kinds[kind]), kind))
    return {kind: kinds[kind] for kind in order[:SHOWN_KINDS]}


def failure_table(store: Store, *, as_json: bool, as_csv: bool) -> None:
    """Print every failure of a store: a table, JSON lines, or CSV."""
    failed = store.failures
    if as_csv:
        print_csv(["id", "kind", "error"], ((failure.id, failure.kind, failure.error) for failure in failed))
    elif as_json:
        for failure in failed:
            click.echo(json.dumps({"id": failure.id, "kind": failure.kind, "error": failure.error}))
    else:
        width = max([len(failure.kind) for failure in failed], default=0)
        id_width = min(WIDEST_ID, max([len(printable(failure.id)) for failure in failed], default=0))
        for failure in failed:
            id, error = printable(failure.id), printable(failure.error)
            click.echo(f"{failure.kind:<{width}}  {id:<{id_width}}  {error}")


def print_csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print CSV as bytes: an id is printed as it is, whatever it holds."""
    text = io.TextIOWrapper(
        sys.stdout.buffer, encoding="utf-8", errors="surrogateescape", newline="", write_through=True
    )
    try:
        writer = csv.writer(text)
        writer.writerow(header)
        writer.writerows(rows)
    finally:
        text.detach()


def estimate_text(found: Estimate) -> str:
    """Return what an extraction would find, take and need, for people."""

    def counts(values: Mapping[str, int]) -> str:
        shown = ", ".join(f"{count:,} {printable(name) or 'without a suffix'}" for name, count in values.items())
        return shown or "none"

    lines = [
        ("images", f"{found.images:,}, {_bytes(found.image_bytes)}; {counted(found.ignored, 'other file')}"),
        ("named", counts(found.suffixes)),
        ("labels", counted(len(found.labels), "class") if found.labels else "none"),
        ("refused", counts(found.failures)),
        ("store has", f"{found.unchanged:,} of them already; {found.deleted:,} of its rows would go"),
        ("sample", f"{found.sampled:,} read: {counts(found.formats)}; failed: {counts(found.sample_failures)}"),
        ("pixels", f"{found.pixels[0]:,} to {found.pixels[2]:,}, median {found.pixels[1]:,}"),
        ("speed", f"{found.images_per_second:.1f} images/s; a long run may find a faster engine"),
        ("time", f"about {timedelta(seconds=max(1, round(found.seconds)))}" if found.seconds else "nothing to compute"),
        ("store", f"about {_bytes(found.store_bytes)}"),
        ("space", f"{_bytes(found.needed_bytes)} needed until it is finished, {_bytes(found.free_bytes)} free"),
    ]
    if found.memory_bytes is not None:
        lines.append(("memory", f"about {_bytes(found.memory_bytes)}"))
    return "\n".join(f"{name:<10} {text}" for name, text in lines)


def _bytes(count: int) -> str:
    """Return a number of bytes with three digits or so."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000  # type: ignore[assignment]
    return f"{count:,.3g} TB"


def extraction_line(store: Store, seconds: float, images_per_second: float) -> str:
    """Return the one line that sums up an extraction."""
    parts = [f"{counted(len(store), 'image')} x {store.dim} {store.dtype.name}"]
    if store.classes:
        parts.append(counted(len(store.classes), "class"))
    if store.layers:
        parts.append(counted(len(store.layers), "layer"))
    parts.append(f"{len(store.failures):,} failed")
    parts.append(f"{seconds:.1f} s ({images_per_second:.1f} images/s)" if images_per_second else "nothing to compute")
    return f"{printable(os.fspath(store.path))}: {', '.join(parts)}"


def store_line(store: Store) -> str:
    """Return the one line that says what a new store holds."""
    classes = f", {counted(len(store.classes), 'class')}" if store.classes else ""
    return f"{printable(os.fspath(store.path))}: {len(store):,} x {store.dim} {store.dtype.name}{classes}"


def status_line(path: Path, status: Status) -> str:
    """Return what `embedkit status` shows to people."""
    text = f"{printable(os.fspath(path))}: {status.state}"
    if status.state in ("busy", "unfinished"):
        text += f" ({status.committed:,} of {status.planned:,} images are safe"
        if status.pid:
            text += f"; process {status.pid} on {printable(str(status.host))} since {printable(str(status.since))}"
        text += ")"
    if status.rows is not None:
        text += f"; the store has {status.rows:,} rows"
    return text


def info_text(store: Store) -> str:
    """Return what `embedkit info` shows to people."""
    summary = store.summary()
    spec, information = summary["spec"], summary["information"]
    lines = [
        f"{printable(summary['path'])}",
        f"  rows       {summary['rows']:,} x {summary['dim']} {summary['dtype']} ({summary['bytes'] / 1e6:,.1f} MB)",
        f"  backbone   {printable(store.spec.name_of(store.recipe))}",
        f"  made       {printable(str(information.get('created', 'unknown')))}",
        f"  root       {printable(str(information.get('root', 'unknown')))}",
        f"  digest     {printable(summary['digest'])}",
        f"  content    {printable(summary['content_id'])}",
        *_parent_lines(information.get("parent")),
        *_class_lines(summary["classes"]),
        *(["  layers"] if summary["layers"] else []),
        *(f"    {dim:>9,}  {printable(name)}" for name, dim in summary["layers"].items()),
        *_failure_lines(store),
        "  spec",
        *(f"    {printable(field):<29}{printable(json.dumps(value))}" for field, value in flat(spec).items()),
        "  read it without embedkit",
        "    import h5py",
        f"    file = h5py.File({printable(os.path.basename(summary['path']))!r}, 'r')",
        "    ids = file['ids'].asstr()[:]",
        "    embeddings = file['embeddings'][:]  # row i is ids[i]",
    ]
    return "\n".join(lines)


def _parent_lines(parent: Any) -> list[str]:
    """Return which store another one descends from, as it says itself."""
    if not isinstance(parent, dict):
        return []
    path, content = (printable(str(parent.get(name, "unknown"))) for name in ("path", "content_id"))
    return [f"  parent     {path}", f"             content {content}"]


def _class_lines(classes: dict[str, int]) -> list[str]:
    if not classes:
        return ["  classes    none"]
    lines = [f"  classes    {len(classes)}"]
    lines += [f"    {count:>9,}  {printable(name)}" for name, count in list(classes.items())[:SHOWN_CLASSES]]
    more = len(classes) - SHOWN_CLASSES
    return [*lines, f"    ... and {more} more (--json has all)"] if more > 0 else lines


def _failure_lines(store: Store) -> list[str]:
    lines, shown = [f"  failures   {len(store.failures):,}"], 0
    for kind, found in _by_kind(store.failures).items():
        some = found[:SHOWN_FAILURES]
        lines.append(f"    {len(found):>9,}  {kind}")
        lines += [f"               {printable(failure.id)}: {printable(failure.error)}" for failure in some]
        shown += len(some)
    more = len(store.failures) - shown
    return [*lines, f"    ... and {more:,} more (--failures lists them)"] if more > 0 else lines


def row_of(store: Store, id: str) -> int:
    """Return the row of an id, or say how to find ids."""
    try:
        return store.index_of(id)
    except KeyError:
        example = f", such as {store.ids[0]!r}" if len(store) else ""
        raise click.UsageError(
            f"{store.path} has no id {id!r}; ids are paths relative to the folder{example}"
        ) from None


def search_result(result: SearchResult, names: Sequence[str], *, as_json: bool, plain: bool) -> None:
    """Print neighbours: a table, JSON lines, or paths."""
    for number, name in enumerate(names):
        hits = result.hits(number)
        if plain:
            for hit in hits:  # As bytes: a path is printed as it is, whatever it holds.
                click.echo(os.fsencode(hit.path or hit.id))
        elif as_json:
            for hit in hits:
                values = dataclasses.asdict(hit) | {"path": None if hit.path is None else os.fspath(hit.path)}
                click.echo(json.dumps({"query": name, **values}))
        else:
            width = max([len(hit.label or "") for hit in hits], default=0)
            click.echo(f"{printable(name)}")
            if not hits:
                click.echo("      nothing found")
            for hit in hits:
                click.echo(
                    f"{hit.rank:>4}  {hit.score:.4f}  {printable(hit.label or ''):<{width}}  {printable(hit.id)}"
                )


def model_table(models: Sequence[ModelInfo], *, as_json: bool) -> None:
    """Print models: a table or JSON lines."""
    if as_json:
        for model in models:
            click.echo(json.dumps(dataclasses.asdict(model)))
        return
    width = max(len(model.name) for model in models)
    click.echo(f"{'name':<{width}}  {'parameters':>11}  {'pixels':>6}  {'width':>5}")
    for model in models:
        parameters = "-" if model.parameters is None else f"{model.parameters / 1e6:.1f} M"
        click.echo(f"{model.name:<{width}}  {parameters:>11}  {model.img_size or '-':>6}  {model.dim or '-':>5}")
