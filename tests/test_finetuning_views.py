"""Views: the squares that teacher and student look at together."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from embedkit.errors import FinetuneError, ImageError
from embedkit.finetuning.distillation.views import list_views, square_of
from embedkit.images import Region, read_crop, upright_size
from embedkit.sources import list_images, list_memory
from embedkit.spec import Preprocessing


def test_one_view_is_the_listing_itself(photos: Path) -> None:
    listing = list_images(photos)
    assert list_views(listing, 1) is listing


def test_views_come_one_after_the_other_and_the_first_is_the_whole_image(photos: Path) -> None:
    listing = list_images(photos)
    views = list_views(listing, 3)
    ids = [view.id for view in views.files]
    assert len(ids) == 72
    assert ids == sorted(ids)
    assert ids[0] == "00/" + listing.files[0].id and ids[24] == "01/" + listing.files[0].id
    assert views.files[0].read() == listing.files[0].read()
    assert views.files[24].label == listing.files[0].label
    assert views.classes == listing.classes


def test_squares_are_drawn_by_seed_number_and_id_alone_and_stay_inside(photos: Path) -> None:
    one, again = (list_views(list_images(photos), 2).files[24 + 5].read() for _ in range(2))
    other = list_views(list_images(photos), 2, seed=1).files[24 + 5].read()
    assert isinstance(one, Region) and isinstance(again, Region) and isinstance(other, Region)
    assert one == again
    assert one.box != other.box
    sides = []
    for number in range(1, 99):
        left, top, side = square_of("cat/1.jpg", (96, 72), number, 0.25, 0)
        assert left >= 0 and top >= 0 and left + side <= 96 and top + side <= 72
        sides.append(side)
    assert min(sides) >= 36 and max(sides) <= 72
    assert len(set(sides)) > 20


def test_a_view_shows_the_same_square_to_networks_of_all_sizes() -> None:
    gradient = np.linspace(0, 255, 256).astype(np.uint8)
    pixels = np.stack([*np.meshgrid(gradient, gradient), np.zeros((256, 256), np.uint8)], axis=-1)
    view = list_views(list_memory([pixels]), 2, smallest=0.3).files[1].read()
    large, small = (read_crop(view, Preprocessing(img_size=(side, side), crop_pct=1.0)) for side in (224, 96))
    assert np.abs(large.mean((0, 1)) - small.mean((0, 1))).max() < 1


def test_the_square_of_a_box_lies_within_the_box() -> None:
    class Box:
        id, label = "a.jpg", None

        def status(self) -> tuple[int, int]:
            return 1, 1

        def read(self) -> Region:
            return Region(b"whole", (10, 20, 50, 40))

    from embedkit.sources import Listing

    view = list_views(Listing(Path("x"), [Box()], [], [], 0), 2).files[1].read()
    assert isinstance(view, Region)
    left, top, right, bottom = view.box
    assert 10 <= left < right <= 50 and 20 <= top < bottom <= 40
    assert right - left == bottom - top


def test_upright_size_follows_the_orientation() -> None:
    image, file = Image.new("RGB", (60, 40)), io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    for format in ("JPEG", "PNG"):
        file = io.BytesIO()
        image.save(file, format=format, exif=exif)
        assert upright_size(file.getvalue()) == (40, 60)
    assert upright_size(b"no image") is None


def test_what_cannot_be_opened_is_left_to_the_decoder(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"no image")
    view = list_views(list_images(tmp_path), 2).files[1]
    with pytest.raises(ImageError, match=r"a\.jpg"):
        read_crop(view.read(), Preprocessing(), id=view.id)


@pytest.mark.parametrize("views, smallest", [(0, 0.5), (100, 0.5), (2, 0.0), (2, 1.5)])
def test_views_that_make_no_sense_are_refused(photos: Path, views: int, smallest: float) -> None:
    with pytest.raises(FinetuneError, match="views"):
        list_views(list_images(photos), views, smallest)
