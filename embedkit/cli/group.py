"""The command group: what every command has in common."""

from __future__ import annotations

import errno
import logging
from typing import Any

import click

from embedkit import __version__
from embedkit.cli.commands import extract, info, models, probe, search
from embedkit.cli.printing import NoticeHandler, error_lines
from embedkit.cli.stores import export_store, import_store, merge, select, status, verify
from embedkit.errors import EmbedkitError


class _Group(click.Group):
    """Turns our errors and the system's into one message and exit code 1, and Ctrl-C into exit code 130."""

    def invoke(self, ctx: click.Context) -> Any:
        log, handler = logging.getLogger("embedkit"), NoticeHandler()
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        ctx.call_on_close(lambda: log.removeHandler(handler))
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
        except KeyboardInterrupt:
            click.echo("\ninterrupted; a store appears only when it is whole, and what is computed is kept", err=True)
            ctx.exit(130)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="embedkit")
def main() -> None:
    """Turn folders of images into embeddings, and make them useful.

    Results go to standard output, progress and notices to standard error. Exit codes: 0 done, 1 a named error, 2 wrong
    usage, 3 finished but some images failed.
    """


for _command in (
    extract, info, status, verify, merge, select, export_store, import_store, search, probe, models,
):  # fmt: skip
    main.add_command(_command)
