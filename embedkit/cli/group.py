"""The command group: what every command has in common."""

from __future__ import annotations

import errno
import logging
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import click

from embedkit import __version__
from embedkit.cli.benching import bench
from embedkit.cli.commands import info, models
from embedkit.cli.diagnosis import doctor
from embedkit.cli.distilling import distill
from embedkit.cli.duplicates import dedupe
from embedkit.cli.extraction import extract
from embedkit.cli.finetuning import finetune
from embedkit.cli.predicting import predict
from embedkit.cli.printing import NoticeHandler, error_lines
from embedkit.cli.probing import probe
from embedkit.cli.searching import build_index, search
from embedkit.cli.stores import export_store, import_store, merge, select, status, verify
from embedkit.cli.structure import cluster_store, outliers, retrieve
from embedkit.errors import EmbedkitError


class _Group(click.Group):
    """Turns our errors and the system's into one message and exit code 1, and Ctrl-C into exit code 130."""

    def invoke(self, ctx: click.Context) -> Any:
        log, handler = logging.getLogger("embedkit"), NoticeHandler()
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        ctx.call_on_close(lambda: log.removeHandler(handler))
        ctx.call_on_close(_interruptible())
        try:
            return super().invoke(ctx)
        except EmbedkitError as error:
            error_lines(error)
            ctx.exit(1)
        except OSError as error:
            if error.filename is None or error.errno == errno.EPIPE:
                raise  # Not about a file that the user named.
            error_lines(error)
            ctx.exit(1)
        except KeyboardInterrupt as interruption:
            click.echo("; ".join(["interrupted", *map(str, interruption.args)]), err=True)
            ctx.exit(130)


def _interruptible() -> Callable[[], None]:
    """Let the first Ctrl-C end what runs in good order, and the second at once; return how it was before."""
    if threading.current_thread() is not threading.main_thread():
        return lambda: None

    def interrupt(number: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, lambda number, frame: os._exit(130))  # A store survives that at any moment.
        click.echo("\nfinishing what is being written; Ctrl-C once more stops at once", err=True)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)

    def restore() -> None:
        signal.signal(signal.SIGINT, before)

    return restore


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="embedkit")
def main() -> None:
    """Turn folders of images into embeddings, and make them useful.

    Results go to standard output, progress and notices to standard error. Exit codes: 0 done, 1 a named error, 2 wrong
    usage, 3 finished but some images failed.
    """


for _command in (
    extract, info, status, verify, merge, select, export_store, import_store, build_index, search, dedupe, retrieve,
    outliers, cluster_store, probe, predict, bench, finetune, distill, models, doctor,
):  # fmt: skip
    main.add_command(_command)
