"""How a backbone's images are read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from embedkit.backbones.nvjpeg import DeviceDecoder
from embedkit.errors import BackboneError
from embedkit.images import Isolated, read_crop
from embedkit.spec import Preprocessing


@dataclass(frozen=True)
class Reader:
    """Reads the crops that a network sees.

    Attributes
    ----------
    preprocessing : Preprocessing
        Of what is cropped: larger than what the network sees where that is cropped once more.
    max_pixels : int
        The most pixels that an image may have.
    resizer : DeviceDecoder, optional
        What decodes JPEGs on a GPU.
    isolated : Isolated, optional
        What decodes in other processes.
    """

    preprocessing: Preprocessing
    max_pixels: int
    resizer: DeviceDecoder | None = None
    isolated: Isolated | None = None

    def __call__(self, source: Any, id: str | None) -> npt.NDArray[np.uint8]:
        """Return the crop of an image, of shape (h, w, 3)."""
        if self.isolated is not None:
            return self.isolated(source, id=id)
        return read_crop(source, self.preprocessing, id=id, max_pixels=self.max_pixels, resizer=self.resizer)

    @contextmanager
    def elsewhere(self, seconds: float) -> Iterator[Reader]:
        """Return a reader that decodes in processes of their own, which end with the context."""
        if self.resizer is not None:
            raise BackboneError('decode="gpu" cannot be isolated in processes of their own; use another way to decode')
        with Isolated(self.preprocessing, seconds=seconds, max_pixels=self.max_pixels) as isolated:
            yield replace(self, isolated=isolated)
