"""RunFolder: what lies where in the folder of a run, and whose run it is."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from embedkit.errors import FinetuneError
from embedkit.evaluation.cells import write_whole
from embedkit.finetuning.recipe import Recipe
from embedkit.sources import Entry
from embedkit.spec import flat
from embedkit.store.locking import Lock, parts_folder

FORMAT, VERSION = "embedkit-finetuning", 1
MAX_JSON_BYTES = 64 << 20
SHOWN = 8

# Everything that a run writes; nothing else is ever removed.
_FILES = (
    "recipe.json", "split.csv", "before.h5", "after.h5", "epochs.csv", "report.json", "report.html", "backbone.json",
    "config.json", "model.safetensors",
)  # fmt: skip
_FOLDERS = ("state", "head", "before.h5.parts", "after.h5.parts", "tensorboard")


class RunFolder:
    """The folder of a run.

    Parameters
    ----------
    path : path-like
        It need not exist.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.recipe, self.split = self.path / "recipe.json", self.path / "split.csv"
        self.before, self.after = self.path / "before.h5", self.path / "after.h5"
        self.report, self.page = self.path / "report.json", self.path / "report.html"
        self.head = self.path / "head"

    def lock(self) -> Lock:
        """Return the lock that one process at a time may hold; entering it raises StoreBusyError while another does."""
        return Lock(parts_folder(Path(os.path.abspath(self.path))))

    @property
    def finished(self) -> bool:
        """Whether the run that was begun here has come to its end."""
        return self.report.is_file()

    def claim(
        self, recipe: Recipe, identity: Mapping[str, Any], *, overwrite: bool = False,
        inputs: Iterable[str | os.PathLike[str]] = (),
    ) -> None:  # fmt: skip
        """Take the folder for a run, or find that it is this run's already.

        Parameters
        ----------
        recipe : Recipe
            Every setting.
        identity : mapping of str to str
            What else decides the weights: digests of the backbone and the images.
        overwrite : bool, default False
            Whether another run that is there is removed.
        inputs : sequence of path-like
            What the run begins with.

        Raises
        ------
        FinetuneError
            When the folder holds another run, naming the settings that differ, something else than a run, or what
            would have to be removed and is begun with.
        """
        if self.path.is_file():
            raise FinetuneError(f"{self.path} is a file; name a folder, which need not exist")
        wanted = {"identity": dict(identity), "recipe": recipe.to_dict()}
        ours = self.recipe.is_file()
        if ours:
            differing = self._differences(wanted)
            if not overwrite:
                self._refuse(differing)
            if not differing and not (overwrite and self.finished):
                return  # This very run, which goes on.
            self._require_apart(inputs)
            self._clear()
        strange = sorted(name for name in self._names() if not name.startswith("."))
        if strange and not ours:
            raise FinetuneError(
                f"{self.path} holds something else than a run, such as {strange[0]!r}; name another folder"
            )
        self.path.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"format": FORMAT, "version": VERSION, **wanted}, indent=1)
        write_whole(self.recipe, text.encode())

    def write_report(self, values: Mapping[str, Any], page: str) -> None:
        """Write the report, first as a page and then as JSON, which ends the run."""
        write_whole(self.page, page.encode("utf-8", "backslashreplace"))
        write_whole(self.report, json.dumps(values, indent=1, allow_nan=False).encode("utf-8", "backslashreplace"))

    def read_report(self) -> dict[str, Any]:
        """Return what `write_report` wrote."""
        return read_object(self.report)

    def _names(self) -> list[str]:
        return os.listdir(self.path) if self.path.is_dir() else []

    def _differences(self, wanted: Mapping[str, Any]) -> list[str]:
        """Return lines that say what is otherwise in the run that lies here."""
        advice = f"name another folder, or remove {self.path} yourself if nothing but a run is in it"
        found = read_object(self.recipe, advice)
        left, right = (flat({name: one.get(name) or {} for name in wanted}) for one in (found, wanted))
        return [
            f"\n  {name}: {left.get(name)!r} there, {right.get(name)!r} now"
            for name in sorted(left.keys() | right.keys())
            if left.get(name) != right.get(name)
        ]

    def _refuse(self, differing: list[str]) -> None:
        if not differing:
            return
        more = f"\n  and {len(differing) - SHOWN} more" if len(differing) > SHOWN else ""
        state = "a finished run" if self.finished else "an unfinished run"
        raise FinetuneError(
            f"{self.path} holds {state} of other settings; name another folder, or replace it with --overwrite; "
            f"these differ:{''.join(differing[:SHOWN])}{more}"
        )

    def _require_apart(self, inputs: Iterable[str | os.PathLike[str]]) -> None:
        own = self.path.resolve()
        for one in inputs:
            place = Path(one).resolve()
            if place.exists() and (place == own or own in place.parents):
                raise FinetuneError(
                    f"--overwrite would remove {os.fspath(one)!r}, which this run begins with; name another folder"
                )

    def _clear(self) -> None:
        """Remove a run, and nothing that is none; its split, which may be the one that was asked for, is replaced."""
        for name in _FOLDERS:
            if (self.path / name).is_dir() and not (self.path / name).is_symlink():
                shutil.rmtree(self.path / name)
        for name in (*_FILES[2:], _FILES[0]):  # What says whose folder it is, last.
            (self.path / name).unlink(missing_ok=True)


def images_sha256(entries: Iterable[Entry]) -> str:
    """Return a hash of what images are called and of how many bytes they have: another one is another run."""
    digest = hashlib.sha256()
    for entry in entries:
        digest.update(f"{entry.id}\0{entry.status()[0]}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def read_object(path: Path, advice: str = "name another folder") -> dict[str, Any]:
    """Return the JSON object of a file that a run wrote.

    Parameters
    ----------
    path : Path
        The file.
    advice : str, default "name another folder"
        What to do where it is damaged.

    Raises
    ------
    FinetuneError
        When there is none, it is too large, or it is no such object. The file may come from a stranger.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"{path.stat().st_size:,} bytes are too many")
        values = json.loads(path.read_bytes())
        if not isinstance(values, dict):
            raise ValueError("it holds no object")
        if path.name == "recipe.json" and (values.get("format"), values.get("version")) != (FORMAT, VERSION):
            raise ValueError(f"it is of the format {values.get('format')!r}, version {values.get('version')!r}")
        return values
    except OSError as error:
        raise FinetuneError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise FinetuneError(f"{path} is not what a run writes: {error}; {advice}") from error
