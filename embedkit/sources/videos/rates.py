"""Rates at which frames are taken of videos, and how the times of frames are written."""

from __future__ import annotations

import re
from fractions import Fraction
from math import ceil
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from embedkit.errors import ImageError

_NUMBER = re.compile(r"[0-9./]{1,40}(?:e[+-]?[0-9]{1,2})?")  # An exponent of nine digits would be worked out.
_MOST = 2**62


class Rate(NamedTuple):
    """Frames a second, and the decimals with which their times are written."""

    fps: Fraction
    decimals: int

    @classmethod
    def of(cls, fps: float | str | Fraction) -> Rate:
        """Return a rate whose times are written exactly where six decimals do, and in milliseconds or finer if not.

        Raises
        ------
        ImageError
            When it is no rate.
        """
        text = str(fps).strip()  # 29.97 is what it says, and not the nearest binary number.
        try:
            rate = Fraction(text) if _NUMBER.fullmatch(text) else Fraction(0)
        except (ValueError, ZeroDivisionError):
            rate = Fraction(0)
        if not Fraction(1, 86_400) <= rate <= 1000:
            reason = "fps is a number above 0, from a frame a day to 1000 a second, such as 1, 0.2 or 30000/1001"
            raise ImageError(f"--fps {text[:40]}", reason, "refused")
        exact = next((places for places in range(1, 7) if (10**places / rate).denominator == 1), None)
        return cls(rate, exact or (3 if rate <= 100 else 6))

    @property
    def unit(self) -> int:
        """Return how often a second is divided."""
        return int(10**self.decimals)

    def count(self, seconds: Fraction) -> int:
        """Return how many frames are taken of a video."""
        return max(1, ceil(seconds * self.fps))

    def times(self, count: int) -> npt.NDArray[np.int64]:
        """Return the times of the first frames in units, sorted as their texts are.

        They are rounded up, so that a player which is sent to that time shows that frame.
        """
        unit, several = self.unit * self.fps.denominator, self.fps.numerator
        fits = max(count, 1) * max(unit, several) < _MOST
        numbers: npt.NDArray[Any] = np.arange(count, dtype=np.int64 if fits else object)
        times = (-(-numbers * unit // several)).astype(np.int64)
        seconds, below = np.divmod(times, self.unit)
        digits = np.searchsorted(10 ** np.arange(1, 19, dtype=np.int64), seconds, side="right") + 1
        # A point comes before all digits, so 1.0 before 10.0, and both before 2.0.
        aligned = seconds * 10 ** (digits.max(initial=1) - digits)
        return times[np.lexsort((below, digits, aligned))]

    def text(self, time: int) -> str:
        """Return a time in seconds."""
        return f"{time // self.unit}.{time % self.unit:0{self.decimals}d}"
