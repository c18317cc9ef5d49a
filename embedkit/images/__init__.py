"""How bytes become pixels; the only room that uses Pillow."""

from embedkit.images.decoding import BYTES_A_PIXEL, MAX_BYTES, TRUNCATED, read_bytes, read_image, thumbnail
from embedkit.images.formats import FORMATS, MAX_PIXELS
from embedkit.images.inspection import Header, read_header, upright_size
from embedkit.images.isolation import Isolated
from embedkit.images.pixels import CROP_MODES, DECODERS, INTERPOLATIONS, crop, frame_of, read_crop
from embedkit.images.regions import Data, Region
from embedkit.images.scales import read_scaled

__all__ = [
    "BYTES_A_PIXEL",
    "CROP_MODES",
    "DECODERS",
    "FORMATS",
    "INTERPOLATIONS",
    "MAX_BYTES",
    "MAX_PIXELS",
    "TRUNCATED",
    "Data",
    "Header",
    "Isolated",
    "Region",
    "crop",
    "frame_of",
    "read_bytes",
    "read_crop",
    "read_header",
    "read_image",
    "read_scaled",
    "thumbnail",
    "upright_size",
]
