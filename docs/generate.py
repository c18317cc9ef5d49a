"""Writes docs/cli.md from the commands' own --help."""

from __future__ import annotations

from pathlib import Path

import click

from embedkit.cli import main

_HEAD = """# Command line

Written by `make docs` from the commands' own `--help`; a test keeps it so.
"""


def render() -> str:
    """Return the text of docs/cli.md."""
    parts = [_HEAD, _section("embedkit", main)]
    parts += [_section(f"embedkit {name}", command) for name, command in sorted(main.commands.items())]
    return "\n".join(parts)


def _section(name: str, command: click.Command) -> str:
    # A context of its own, so that neither the terminal's width nor the program's name changes the text.
    context = click.Context(command, info_name=name, terminal_width=100, max_content_width=100)
    context.help_option_names = ["-h", "--help"]
    return f"## {name}\n\n```\n{command.get_help(context).rstrip()}\n```\n"


if __name__ == "__main__":
    Path(__file__).with_name("cli.md").write_text(render(), encoding="utf-8")
