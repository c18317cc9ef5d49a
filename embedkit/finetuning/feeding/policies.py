"""Policy: timm's RandAugment, AutoAugment and AugMix, drawn from a generator of one's own.

timm draws from the generators that the whole process shares. Here they are seeded, drawn from and put back under a
lock, so that an image's chances depend on nothing else. What was drawn is done after that, by many threads at once.
"""

from __future__ import annotations

import random as shared
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt

from embedkit.backbones import import_timm
from embedkit.errors import FinetuneError
from embedkit.spec import Preprocessing

Pixels = npt.NDArray[np.uint8]

_TRANSLATED = 0.45  # Of the shorter side, at most, as in timm's training script.
_DRAWS_WHILE_IT_WORKS = ("GaussianBlurRand",)
_lock = threading.Lock()


class Policy:
    """One of timm's policies for crops of one kind.

    Parameters
    ----------
    text : str
        As timm's ``--aa`` takes it, such as ``rand-m9-mstd0.5``.
    preprocessing : Preprocessing
        Of the crops: the mean fills what is moved in, and half of the side is the furthest that is moved.

    Raises
    ------
    FinetuneError
        When timm does not understand the text.

    Examples
    --------
    >>> import numpy as np
    >>> from embedkit import Preprocessing
    >>> from embedkit.finetuning.feeding.policies import Policy
    >>> policy = Policy("rand-m9-mstd0.5", Preprocessing(img_size=(32, 32)))
    >>> policy(np.zeros((32, 32, 3), dtype=np.uint8), np.random.default_rng(0)).shape
    (32, 32, 3)
    """

    def __init__(self, text: str, preprocessing: Preprocessing) -> None:
        self._chain: list[Callable[[Any], Any]] = []
        try:
            self._transform = _transform(text, preprocessing)
        except (AssertionError, ValueError, KeyError) as error:
            raise FinetuneError(f"timm does not understand --aa {text!r}: {error}") from error
        operations = _operations(self._transform)
        is_chain = all(each.name not in _DRAWS_WHILE_IT_WORKS for each in operations)
        if is_chain:
            for each in operations:
                each.aug_fn = partial(self._note, each.aug_fn)

    def __call__(self, crop: Pixels, random: np.random.Generator) -> Pixels:
        """Return a varied copy of a crop (h, w, 3)."""
        from torchvision.transforms.v2.functional import to_pil_image

        image = to_pil_image(np.ascontiguousarray(crop))
        with _seeded(random):
            varied = self._transform(image)
            chain, self._chain = self._chain, []
        for function in chain:
            varied = function(varied)
        return np.asarray(varied)

    def _note(self, function: Callable[..., Any], image: Any, *arguments: Any, **settings: Any) -> Any:
        """Remember what is to be done, and leave it for later."""
        self._chain.append(lambda image: function(image, *arguments, **settings))
        return image


@lru_cache(8)
def policy_of(text: str, preprocessing: Preprocessing) -> Policy:
    """Return the policy of a text, the same one every time."""
    return Policy(text, preprocessing)


def _transform(text: str, preprocessing: Preprocessing) -> Any:
    import_timm()  # It makes torchvision importable beside any torch.
    from timm.data import auto_augment
    from timm.data.transforms import str_to_pil_interp

    mode = "bilinear" if preprocessing.interpolation == "bilinear" else "bicubic"
    settings = {
        "translate_const": int(_TRANSLATED * min(preprocessing.img_size)),
        "img_mean": tuple(min(255, round(255 * value)) for value in preprocessing.mean),
        # Named, because timm would draw one of two while it works.
        "interpolation": str_to_pil_interp(mode),  # type: ignore[no-untyped-call]
    }
    if text.startswith("rand"):
        return auto_augment.rand_augment_transform(text, settings)
    if text.startswith("augmix"):
        return auto_augment.augment_and_mix_transform(text, settings)
    return auto_augment.auto_augment_transform(text, settings)


def _operations(transform: Any) -> list[Any]:
    """Return the operations that a transform does one after the other; none where it does otherwise."""
    name = type(transform).__name__
    if name == "RandAugment":
        return list(transform.ops)
    return [each for operations in transform.policy for each in operations] if name == "AutoAugment" else []


@contextmanager
def _seeded(random: np.random.Generator) -> Iterator[None]:
    """Seed the generators that all share, alone, and put them back as they were."""
    seed = int(random.integers(2**32))
    with _lock:
        python, numpy = shared.getstate(), np.random.get_state()
        shared.seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            shared.setstate(python)
            np.random.set_state(numpy)
