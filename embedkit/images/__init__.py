"""What to read, and how bytes become pixels; the only room that uses Pillow."""

from embedkit.images.decoding import read_bytes, read_image, thumbnail
from embedkit.images.listing import SUFFIXES, ImageFile, Listing, inside, list_images
from embedkit.images.pixels import CROP_MODES, INTERPOLATIONS, crop

__all__ = [
    "CROP_MODES",
    "INTERPOLATIONS",
    "SUFFIXES",
    "ImageFile",
    "Listing",
    "crop",
    "inside",
    "list_images",
    "read_bytes",
    "read_image",
    "thumbnail",
]
