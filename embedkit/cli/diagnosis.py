"""The command that looks at the machine."""

from __future__ import annotations

import dataclasses
import json

import click

from embedkit.cli.options import json_option
from embedkit.text import printable

_WIDTH = 18


@click.command()
@json_option
@click.pass_context
def doctor(ctx: click.Context, /, as_json: bool) -> None:
    """Look at this machine and try embedkit on it.

    Versions, processor, GPUs, memory, disks, locks and the hub, and a small extraction from beginning to end: about
    ten seconds, without a network where there is none. What is not right comes with what to do about it. The exit code
    is 1 when something fails; warnings leave it 0.
    """
    from embedkit.diagnosis import examine

    states = []
    for finding in examine():
        states.append(finding.state)
        if as_json:
            click.echo(json.dumps(dataclasses.asdict(finding)))
            continue
        click.echo(printable(f"{finding.state:<4}  {finding.name:<{_WIDTH}}  {finding.found}"))
        if finding.advice:
            click.echo(printable(f"{'':<{_WIDTH + 6}}  -> {finding.advice}"))
    if not as_json:
        click.echo(f"{states.count('ok')} ok, {states.count('warn')} to look at, {states.count('fail')} failed")
    ctx.exit(1 if "fail" in states else 0)
