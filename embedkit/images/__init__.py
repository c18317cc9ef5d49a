"""What to read, and how bytes become pixels; the only room that uses Pillow."""

from embedkit.images.decoding import read_bytes, read_image, thumbnail
from embedkit.images.listing import SUFFIXES, ImageFile, Listing, inside, list_files, list_images, status_of
from embedkit.images.pixels import CROP_MODES, DECODERS, INTERPOLATIONS, crop, read_crop

__all__ = [
    "CROP_MODES",
    "DECODERS",
    "INTERPOLATIONS",
    "SUFFIXES",
    "ImageFile",
    "Listing",
    "crop",
    "inside",
    "list_files",
    "list_images",
    "read_bytes",
    "read_crop",
    "read_image",
    "status_of",
    "thumbnail",
]
