"""Where a training crop lies in its image: drawn once, and cut out in one resampling."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from embedkit.finetuning.feeding.augmentation import Augmentation
from embedkit.images import frame_of
from embedkit.spec import Preprocessing

Pixels = npt.NDArray[np.uint8]

_TRIES = 10
_MARGIN = 2.0  # A JPEG is decoded at no less than this many pixels for each of the crop, as the fast decoder does.


@dataclass(frozen=True)
class View:
    """A crop of one image.

    Attributes
    ----------
    box : tuple of float
        Top, left, bottom and right, as shares of the image's height and width.
    turn : tuple of float
        What is done about the box's centre: the four numbers of a matrix from places in the crop, in its pixels, to
        places in the box at the same scale, row by row, and the shift after it, x and y.
    mirrored, flipped : bool
        Left for right, and top for bottom.
    """

    box: tuple[float, float, float, float]
    turn: tuple[float, float, float, float, float, float] = (1.0, 0.0, 0.0, 1.0, 0.0, 0.0)
    mirrored: bool = False
    flipped: bool = False

    @property
    def is_straight(self) -> bool:
        """Whether the crop is a box of whole pixels' rows and columns inside of the image."""
        inside = min(self.box) >= 0 and max(self.box) <= 1
        return self.turn == (1.0, 0.0, 0.0, 1.0, 0.0, 0.0) and inside


def draw_view(
    height: int, width: int, preprocessing: Preprocessing, augmentation: Augmentation, random: np.random.Generator
) -> View:
    """Draw where the training crop of an image lies.

    Parameters
    ----------
    height, width : int
        Of the upright image, in pixels.
    preprocessing : Preprocessing
        Its frame is what is varied where nothing is cut at random.
    augmentation : Augmentation
        How far it is varied.
    random : numpy Generator
        What the chances are drawn from.
    """
    if augmentation.crops:
        box = _random_box(height, width, augmentation, random)
    else:
        box = frame_of(height, width, preprocessing)
    mirrored = random.random() < augmentation.hflip
    flipped = random.random() < augmentation.vflip
    if not augmentation.moves:
        return View(box, mirrored=mirrored, flipped=flipped)
    angle, shear = (math.radians(random.uniform(-most, most)) for most in (augmentation.rotation, augmentation.shear))
    zoom = random.uniform(1 - augmentation.zoom, 1 + augmentation.zoom)
    down, across = (random.uniform(-augmentation.shift, augmentation.shift) * side for side in preprocessing.img_size)
    cos, sin, slant = math.cos(angle) / zoom, math.sin(angle) / zoom, math.tan(shear)
    return View(box, (cos, cos * slant - sin, sin, sin * slant + cos, across, down), mirrored, flipped)


def enough_for(view: View, height: int, width: int, preprocessing: Preprocessing) -> tuple[int, int]:
    """Return the height and width of an image that hold a view in full sharpness."""
    top, left, bottom, right = view.box
    factor = _MARGIN / min(1.0, _scale(view))  # A crop that is zoomed in needs more.
    tall, wide = preprocessing.img_size
    return min(height, math.ceil(factor * tall / (bottom - top))), min(width, math.ceil(factor * wide / (right - left)))


def take_view(pixels: Pixels, view: View, preprocessing: Preprocessing) -> Pixels:
    """Cut a view out of an image.

    A straight view is cut and resized by one antialiased filter. Another one is first resized to the scale of the
    crop, where that is smaller, and then sampled once, whatever it is made of: turned and sheared one after the other,
    it would be blurred by each. Beyond the image lies its mirror image; around a crop with borders, the mean.

    Parameters
    ----------
    pixels : array of shape (h, w, 3)
        uint8, upright, at any scale.
    view : View
        What `draw_view` drew for this image.
    preprocessing : Preprocessing
        Its `img_size` and `interpolation`.

    Returns
    -------
    array of shape (h, w, 3)
        uint8, with (h, w) == `preprocessing.img_size`.
    """
    crop = _straight(pixels, view, preprocessing) if view.is_straight else _turned(pixels, view, preprocessing)
    if view.flipped:
        crop = crop[::-1]
    return crop[:, ::-1] if view.mirrored else crop


def _random_box(
    height: int, width: int, augmentation: Augmentation, random: np.random.Generator
) -> tuple[float, float, float, float]:
    """Draw the box of RandomResizedCrop (Szegedy et al., Going Deeper with Convolutions, 2014), in whole pixels."""
    narrow, wide = augmentation.crop_ratio
    for _ in range(_TRIES):
        area = height * width * random.uniform(*augmentation.crop_scale)
        ratio = math.exp(random.uniform(math.log(narrow), math.log(wide)))
        down, across = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < down <= height and 0 < across <= width:
            top, left = random.integers(height - down + 1), random.integers(width - across + 1)
            return _shares(int(top), int(left), down, across, height, width)
    # No such box fits into a long and thin image: the largest in its middle does.
    ratio = min(max(width / height, narrow), wide)
    down, across = min(height, max(1, round(width / ratio))), min(width, max(1, round(height * ratio)))
    return _shares((height - down) // 2, (width - across) // 2, down, across, height, width)


def _scale(view: View) -> float:
    """Return how far apart neighbours in the crop lie in the box; below 1 where it is zoomed in."""
    a, b, c, d = view.turn[:4]
    return math.sqrt(abs(a * d - b * c))


def _shares(top: int, left: int, down: int, across: int, height: int, width: int) -> tuple[float, float, float, float]:
    return top / height, left / width, (top + down) / height, (left + across) / width


def _straight(pixels: Pixels, view: View, preprocessing: Preprocessing) -> Pixels:
    height, width = pixels.shape[:2]
    top, left = round(view.box[0] * height), round(view.box[1] * width)
    bottom, right = max(round(view.box[2] * height), top + 1), max(round(view.box[3] * width), left + 1)
    return _resize(pixels[top:bottom, left:right], preprocessing.img_size, preprocessing.interpolation)


def _turned(pixels: Pixels, view: View, preprocessing: Preprocessing) -> Pixels:
    """Sample a view that lies askew, or partly outside of the image."""
    (height, width), (tall, wide) = pixels.shape[:2], preprocessing.img_size
    top, left, bottom, right = view.box
    # From the crop's coordinates in [-1, 1] to pixels of the image: (x, y) = matrix (u, v) + centre.
    scale = np.diag([(right - left) * width / wide, (bottom - top) * height / tall])
    matrix = scale @ np.reshape(view.turn[:4], (2, 2)) @ np.diag([wide / 2, tall / 2])
    centre = scale @ np.array(view.turn[4:]) + [(left + right) * width / 2, (top + bottom) * height / 2]
    # Only what the crop can see is resized: the reach of its corners, a pixel more, inside of the image.
    reach = np.abs(matrix).sum(axis=1) + 2
    x0, y0 = np.clip(np.floor(centre - reach), 0, [width - 1, height - 1]).astype(int)
    x1, y1 = np.clip(np.ceil(centre + reach), [x0 + 1, y0 + 1], [width, height]).astype(int)
    part = pixels[y0:y1, x0:x1]
    shrink = np.maximum(1, np.diag(scale) * _scale(view))  # Across and down.
    size = (max(1, round(part.shape[0] / shrink[1])), max(1, round(part.shape[1] / shrink[0])))
    part = _resize(part, size, preprocessing.interpolation)
    half = np.array([(x1 - x0) / 2, (y1 - y0) / 2])
    offset = (centre - [x0, y0]) / half - 1
    theta = torch.tensor(np.column_stack([matrix / half[:, None], offset]), dtype=torch.float32)
    return _sampled(part, theta, preprocessing)


def _sampled(part: Pixels, theta: torch.Tensor, preprocessing: Preprocessing) -> Pixels:
    tall, wide = preprocessing.img_size
    planes = torch.from_numpy(np.require(part, requirements=["C", "W"])).permute(2, 0, 1).unsqueeze(0).float()
    grid = functional.affine_grid(theta.unsqueeze(0), [1, 3, tall, wide], align_corners=False)
    mode = "bilinear" if preprocessing.interpolation == "bilinear" else "bicubic"
    if preprocessing.crop_mode == "border":
        mean = 255 * torch.tensor(preprocessing.mean).view(-1, 1, 1)
        found = mean + _grid_sample(planes - mean, grid, mode, "zeros")
    else:
        found = _grid_sample(planes, grid, mode, "reflection")
    return np.asarray(found[0].round_().clamp_(0, 255).to(torch.uint8).permute(1, 2, 0).numpy())


def _grid_sample(planes: torch.Tensor, grid: torch.Tensor, mode: str, beyond: str) -> torch.Tensor:
    return functional.grid_sample(planes, grid, mode=mode, padding_mode=beyond, align_corners=False)


def _resize(pixels: Pixels, size: tuple[int, int], interpolation: str) -> Pixels:
    """Resize by an antialiased filter; those that torch lacks are replaced by the one that is most like them."""
    if pixels.shape[:2] == size:
        return pixels
    planes = torch.from_numpy(np.require(pixels, requirements=["C", "W"])).permute(2, 0, 1).unsqueeze(0)
    mode = "bilinear" if interpolation in ("bilinear", "box", "hamming", "nearest") else "bicubic"
    resized = functional.interpolate(planes, size=size, mode=mode, antialias=True)
    return np.asarray(resized[0].permute(1, 2, 0).numpy())
