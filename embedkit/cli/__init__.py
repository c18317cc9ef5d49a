"""The command line: parse, call one library function, print."""

from embedkit.cli.group import main

__all__ = ["main"]
