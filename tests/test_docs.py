from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import click
import pytest

from embedkit.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def test_the_command_reference_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None and spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == generate.render(), "run: make docs"


@pytest.mark.parametrize("name", sorted(main.commands))
def test_every_command_and_option_is_documented(name: str) -> None:
    assert f"## embedkit {name}\n" in (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    command = main.commands[name]
    assert command.help
    for parameter in command.params:
        assert not isinstance(parameter, click.Option) or parameter.help, f"{name} {parameter.opts}"


def test_the_commands_of_the_readme_exist_with_their_options() -> None:
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("embedkit ")]
    assert len(lines) >= 6
    for line in lines:
        _, name, *arguments = shlex.split(line)
        known = {option for parameter in main.commands[name].params for option in parameter.opts}
        assert {argument for argument in arguments if argument.startswith("-")} <= known, line


def test_the_python_of_the_readme_runs(readme_world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    snippets = blocks("python")
    assert snippets
    scope: dict[str, object] = {}
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), scope)
    printed = capsys.readouterr().out
    assert "(24, 1024) ['cat', 'dog'] []" in printed
    assert re.search(r"^1 (1\.0|0\.99999)\d* cat/1.jpg cat$", printed, flags=re.MULTILINE)
    assert scope["vectors"].shape == (2, 1024)  # type: ignore[attr-defined]


def test_the_four_lines_of_the_format_page_read_a_store(readme_world: Path, tiny_backbone: Path) -> None:
    import embedkit as ek

    store = ek.extract("photos", "photos.h5", ek.Backbone.load(tiny_backbone))
    scope: dict[str, object] = {}
    for snippet in blocks("python", (ROOT / "docs" / "store-format.md").read_text(encoding="utf-8")):
        exec(compile(snippet, "store-format.md", "exec"), scope)
    assert list(scope["ids"]) == store.ids  # type: ignore[call-overload]
    assert (scope["mapped"] == store.load()).all()  # type: ignore[attr-defined]
    scope["file"].close()  # type: ignore[attr-defined]
