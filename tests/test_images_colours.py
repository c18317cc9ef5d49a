"""Every mode, bit depth and profile, against references made with numpy alone."""

from __future__ import annotations

import colorsys
import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from embedkit import ImageError, Preprocessing
from embedkit.images import DECODERS, crop, read_crop, read_image

RANDOM = np.random.default_rng(0)


def levels(*shape: int) -> Any:
    return RANDOM.integers(0, 256, shape, dtype=np.uint8)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def rgb(source: Any, **options: Any) -> Any:
    image = read_image(source, **options)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def grey(values: Any) -> Any:
    return np.repeat(np.asarray(values)[..., None], 3, axis=2).astype(int)


def over_white(colours: Any, alpha: Any) -> Any:
    share = alpha[..., None] / 255
    return colours * share + 255 * (1 - share)


def by_colorsys(hsv: Any) -> Any:
    return np.array([[[255 * c for c in colorsys.hsv_to_rgb(*(p / 255))] for p in row] for row in hsv])


def from_inks(inks: Any) -> Any:
    return (255 - inks[..., :3].astype(float)) * (255 - inks[..., 3:]) / 255


def from_ycc(ycc: Any) -> Any:
    y, cb, cr = (ycc[..., at].astype(float) for at in range(3))
    red, blue = y + 1.402 * (cr - 128), y + 1.772 * (cb - 128)
    return np.clip(np.stack([red, (y - 0.299 * red - 0.114 * blue) / 0.587, blue], axis=-1), 0, 255)


XYZ_TO_LINEAR = np.linalg.inv(  # sRGB's primaries, adapted to D50 as profiles are
    np.array([[0.4360747, 0.3850649, 0.1430804], [0.2225045, 0.7168786, 0.0606169], [0.0139322, 0.0971045, 0.7141733]])
)


def in_srgb(xyz: Any) -> Any:
    linear = np.clip(xyz @ XYZ_TO_LINEAR.T, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def from_lab(lab: Any) -> Any:
    f_y = (lab[..., 0] / 255 * 100 + 16) / 116
    f = np.stack([f_y + (lab[..., 1] - 128.0) / 500, f_y, f_y - (lab[..., 2] - 128.0) / 200], axis=-1)
    return in_srgb(np.array([0.9642, 1, 0.8249]) * np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)))


def test_modes_without_transparency_are_the_numbers_that_they_stand_for() -> None:
    single, three, four = levels(9, 7), levels(9, 7, 3), levels(9, 7, 4)
    cases: dict[str, tuple[Any, Any, int]] = {
        "1": (Image.fromarray(single > 99), grey((single > 99) * 255), 0),
        "L": (Image.fromarray(single), grey(single), 0),
        "RGB": (Image.fromarray(three), three, 0),
        "RGBX": (Image.frombytes("RGBX", (7, 9), four.tobytes()), four[..., :3], 0),
        "CMYK": (Image.frombytes("CMYK", (7, 9), four.tobytes()), from_inks(four), 1),
        "YCbCr": (Image.frombytes("YCbCr", (7, 9), three.tobytes()), from_ycc(three), 1),
        "HSV": (Image.frombytes("HSV", (7, 9), three.tobytes()), by_colorsys(three), 1.5),
    }
    for mode, (image, expected, tolerance) in cases.items():
        assert image.mode == mode
        np.testing.assert_allclose(rgb(image), expected, atol=tolerance, err_msg=mode)
    muted = np.clip(three, [110, 118, 118], [200, 138, 138]).astype(np.uint8)  # Inside of sRGB: nothing is clipped.
    found = rgb(Image.frombytes("LAB", (7, 9), (muted ^ np.array([0, 128, 128], np.uint8)).tobytes()))
    assert Image.new("LAB", (1, 1), (0, 128, 128)).tobytes() == b"\0\0\0"  # The bytes of a and b are signed.
    np.testing.assert_allclose(found, from_lab(muted), atol=2)


@pytest.mark.parametrize("mode", ["LA", "La", "RGBA", "RGBa", "PA"])
def test_modes_with_alpha_lie_over_white(mode: str) -> None:
    colours, alpha = levels(9, 7, 3), levels(9, 7)
    alpha[0], alpha[1] = 0, 255
    if mode[0] == "L":
        colours = np.repeat(colours[..., :1], 3, axis=2)
    if mode == "PA":
        image = Image.frombytes("PA", (7, 9), np.stack([levels(9, 7) % 4, alpha], axis=-1).tobytes())
        palette = levels(4, 3)
        image.putpalette(palette.tobytes())
        colours = palette[np.asarray(image)[..., 0]]
    else:
        straight = np.dstack([colours[..., :1] if mode[0] == "L" else colours, alpha])
        image = Image.frombytes(mode.upper(), (7, 9), straight.tobytes()).convert(mode)
    assert image.mode == mode
    found, expected = rgb(image), over_white(colours.astype(float), alpha)
    np.testing.assert_allclose(found, expected, atol=1.5 if mode[-1] == "a" else 1)
    assert (found[0] == 255).all() and (found[1] == colours[1]).all()


def test_palettes_opaque_and_with_one_or_many_transparent_colours() -> None:
    palette, indices = levels(4, 3), levels(9, 7) % 4
    image = Image.frombytes("P", (7, 9), indices.tobytes())
    image.putpalette(palette.tobytes())
    colours, opaque = palette[indices].astype(float), np.full((9, 7), 255)
    for kind in ("PNG", "GIF", "BMP", "TIFF"):
        np.testing.assert_array_equal(rgb(encoded(image, kind)), colours)
    alphas = np.array([255, 0, 128, 255])
    for kind, given, alpha in (
        ("PNG", bytes(alphas.tolist()), alphas[indices]),
        ("PNG", 2, np.where(indices == 2, 0, opaque)),
        ("GIF", 2, np.where(indices == 2, 0, opaque)),
    ):
        data = encoded(image, kind, transparency=given)
        np.testing.assert_allclose(rgb(data), over_white(colours, alpha), atol=1)
    quartets = np.dstack([palette[None], alphas[None].astype(np.uint8)])
    image.putpalette(quartets.tobytes(), "RGBA")
    np.testing.assert_allclose(rgb(image), over_white(colours, alphas[indices]), atol=1)


def png(samples: Any, depth: int, colour: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """Return a PNG of samples of shape (h, w, c), written bit by bit."""
    height, width, _ = samples.shape
    bits = (samples[..., None] >> np.arange(depth)[::-1]) & 1
    rows = np.packbits(bits.reshape(height, -1).astype(np.uint8), axis=1)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)), *chunks]
    parts += [(b"IDAT", zlib.compress(raw)), (b"IEND", b"")]
    blocks = (struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(blocks)


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_grey_pngs_of_every_bit_depth_with_and_without_a_transparent_level(depth: int) -> None:
    top = 2**depth - 1
    samples = RANDOM.integers(0, top + 1, (9, 13, 1))
    samples[0, :2, 0] = 0, top
    expected = grey(np.floor(samples[..., 0] * 255 / top + 0.5))
    np.testing.assert_array_equal(rgb(png(samples, depth, 0)), expected)
    for level in (0, 1, top):
        found = rgb(png(samples, depth, 0, (b"tRNS", struct.pack(">H", level))))
        np.testing.assert_array_equal(found, np.where(samples == level, 255, expected))


def test_colour_pngs_of_both_bit_depths_and_palettes_of_all_four() -> None:
    for depth, shift in ((8, 0), (16, 8)):  # Of 16 bits of colour Pillow decodes the upper eight.
        samples = RANDOM.integers(0, 2**depth, (9, 13, 4))
        colours, alpha = samples[..., :3] >> shift, samples[..., 3] >> shift
        np.testing.assert_array_equal(rgb(png(samples[..., :3], depth, 2)), colours)
        np.testing.assert_allclose(rgb(png(samples, depth, 6)), over_white(colours, alpha), atol=1)
        np.testing.assert_allclose(
            rgb(png(samples[..., :2], depth, 4)), over_white(grey(colours[..., 0]), colours[..., 1]), atol=1
        )
        found = rgb(png(samples[..., :3], depth, 2, (b"tRNS", struct.pack(">HHH", *samples[2, 3, :3]))))
        assert (found[2, 3] == 255).all() and (found != colours).any(axis=2).sum() == 1
    for depth in (1, 2, 4, 8):
        palette, samples = levels(2**depth, 3), RANDOM.integers(0, 2**depth, (9, 13, 1))
        found = rgb(png(samples, depth, 3, (b"PLTE", palette.tobytes())))
        np.testing.assert_array_equal(found, palette[samples[..., 0]])


def tiff(pixels: Any, depth: int, photometric: int, order: str = "<", form: int = 1) -> bytes:
    """Return a TIFF without compression, written byte by byte; `form` is 1 for integers and 3 for floats."""
    height, width, channels = pixels.shape
    body = np.packbits(pixels[..., 0].astype(np.uint8), axis=1).tobytes() if depth == 1 else pixels.tobytes()
    entries = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, channels, depth), (259, 3, 1, 1)]
    entries += [(262, 3, 1, photometric), (273, 4, 1, 300), (277, 3, 1, channels), (278, 4, 1, height)]
    entries += [(279, 4, 1, len(body)), (339, 3, channels, form)]
    table, beside = b"", b""
    for tag, kind, count, value in entries:
        if kind == 3 and count > 2:
            inline = struct.pack(order + "I", 200 + len(beside))
            beside += struct.pack(order + "H", value) * count
        else:
            inline = struct.pack(order + ("H" * count if kind == 3 else "I"), *[value] * count).ljust(4, b"\0")
        table += struct.pack(order + "HHI", tag, kind, count) + inline
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, len(entries)) + table + bytes(4)
    return (head.ljust(200, b"\0") + beside).ljust(300, b"\0") + body


@pytest.mark.parametrize("order", ["<", ">"])
def test_tiffs_of_every_bit_depth_and_byte_order(order: str) -> None:
    wide = RANDOM.integers(0, 65536, (9, 16, 3)).astype(order + "u2")
    one = wide[..., :1]
    np.testing.assert_array_equal(rgb(tiff(wide, 16, 2, order)), wide >> 8)
    rounded = grey(np.floor(one[..., 0] / 257 + 0.5))
    np.testing.assert_array_equal(rgb(tiff(one, 16, 1, order)), rounded)
    if order == "<":  # Pillow knows no other 16 bits of which white is zero.
        np.testing.assert_array_equal(rgb(tiff(one, 16, 0)), 255 - rounded)
    narrow = levels(9, 16, 1)
    for photometric, flip in ((1, 0), (0, 255)):
        np.testing.assert_array_equal(rgb(tiff(narrow, 8, photometric, order)), grey(narrow[..., 0] ^ flip))
        found = rgb(tiff(narrow > 128, 1, photometric, order))
        np.testing.assert_array_equal(found, grey((narrow[..., 0] > 128) * 255 ^ flip))
    floats = RANDOM.random((9, 16, 1)).astype(order + "f4")
    np.testing.assert_array_equal(rgb(tiff(floats, 32, 1, order, 3)), grey(np.rint(floats[..., 0] * 255)))
    whole = one.astype(order + "i4")
    np.testing.assert_array_equal(rgb(tiff(whole, 32, 1, order, 2)), rounded)
    with pytest.raises(ImageError, match=r"its integers lie between \d+ and 70000, not in 0 to 65535") as caught:
        read_image(tiff(np.full_like(whole, 70000), 32, 1, order, 2))
    assert caught.value.kind == "unsupported"


def adobe(data: bytes, transform: int) -> bytes:
    """Return a JPEG of four components that says it is CMYK (0) or YCCK (2)."""
    at = data.index(b"Adobe")
    return data[: at + 11] + bytes([transform]) + data[at + 12 :]


def test_cmyk_and_ycck_jpegs_are_inverted_as_adobe_stores_them() -> None:
    inks = np.zeros((32, 32, 4), dtype=np.uint8)
    inks[:16, :, 0], inks[:, :16, 1], inks[16:, 16:, 3] = 200, 90, 120
    cmyk = encoded(Image.frombytes("CMYK", (32, 32), inks.tobytes()), "JPEG", quality=100, subsampling=0)
    corners = (np.array([[4, 4], [4, 28], [28, 4], [28, 28]])).T
    np.testing.assert_allclose(rgb(cmyk)[tuple(corners)], from_inks(inks)[tuple(corners)], atol=3)
    # Adobe stores 255 - ink, and takes 255 minus that for the RGB of which it stores the YCbCr: the ink again. Pillow
    # writes what it is given, inverted.
    ycc = Image.fromarray(inks[..., :3]).convert("YCbCr")
    stored = np.dstack([255 - np.asarray(ycc), inks[..., 3:]])
    data = encoded(Image.frombytes("CMYK", (32, 32), stored.tobytes()), "JPEG", quality=100, subsampling=0)
    found = rgb(adobe(data, 2))
    np.testing.assert_allclose(found[tuple(corners)], from_inks(inks)[tuple(corners)], atol=4)


PRIMARIES = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])  # P3


def profile(space: bytes = b"RGB ", gamma: float = 1.8, table: bytes = b"") -> bytes:
    """Return a colour profile: of Display P3's primaries, or of a table to Lab."""
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)

    def xyz(values: Any) -> bytes:
        return b"XYZ " + bytes(4) + struct.pack(">iii", *(round(value * 65536) for value in values))

    tags = {b"wtpt": xyz((0.9642, 1, 0.8249)), b"desc": b"desc" + bytes(4) + struct.pack(">I", 2) + b"p\0" + bytes(78)}
    if table:
        tags[b"A2B0"] = table
    elif space == b"GRAY":
        tags[b"kTRC"] = curve
    else:
        tags |= {name + b"TRC": curve for name in (b"r", b"g", b"b")}
        tags |= {name + b"XYZ": xyz(PRIMARIES[:, at]) for at, name in enumerate((b"r", b"g", b"b"))}
    offset, index, body = 132 + 12 * len(tags), b"", b""
    for name, value in tags.items():
        index += name + struct.pack(">II", offset + len(body), len(value))
        body += value + bytes(-len(value) % 4)
    kind, connection = (b"prtr", b"Lab ") if table else (b"mntr", b"XYZ ")
    head = struct.pack(">I4xI4s4s4s12x4s28x", offset + len(body), 0x02400000, kind, space, connection, b"acsp")
    head += struct.pack(">iii", 63190, 65536, 54061)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + index + body


def lab_table() -> bytes:
    """Return a table for CMYK whose Lab is grey, from white without ink to black with all of black or cyan."""
    curves = bytes(range(256))
    nodes = bytearray()
    for node in range(16):
        cyan, black = node >> 3 & 1, node & 1
        nodes += bytes([0 if cyan or black else 255, 128, 128])
    matrix = struct.pack(">9i", *(65536 * (at % 4 == 0) for at in range(9)))
    return b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + matrix + curves * 4 + bytes(nodes) + curves * 3


def test_profiles_become_srgb_on_demand_and_are_left_alone_otherwise() -> None:
    pixels = np.clip(levels(16, 16, 3), 90, 160)  # All of these colours exist in sRGB.
    expected = in_srgb((pixels / 255.0) ** (461 / 256) @ PRIMARIES.T)
    image = Image.fromarray(pixels)
    for kind, options in (("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True})):
        data = encoded(image, kind, icc_profile=profile(), **options)
        np.testing.assert_array_equal(rgb(data), pixels)
        np.testing.assert_allclose(rgb(data, icc=True), expected, atol=2)
    assert np.abs(expected - pixels).mean() > 5
    bare = encoded(image, "PNG")
    np.testing.assert_array_equal(rgb(bare, icc=True), pixels)
    layer = Image.fromarray(np.dstack([pixels, levels(16, 16)]))
    found = rgb(encoded(layer, "PNG", icc_profile=profile()), icc=True)
    np.testing.assert_allclose(found, over_white(expected, np.asarray(layer)[..., 3]), atol=2)
    tones = encoded(Image.fromarray(pixels[..., 0]), "PNG", icc_profile=profile(b"GRAY"))
    linear = (pixels[..., 0] / 255.0) ** (461 / 256)
    assert np.abs(rgb(tones, icc=True) - in_srgb(linear[..., None] * np.array([0.9642, 1, 0.8249]))).max() <= 2


def test_a_profile_of_inks_decides_what_they_look_like() -> None:
    inks = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    data = encoded(inks, "TIFF", icc_profile=profile(b"CMYK", table=lab_table()))
    np.testing.assert_array_equal(rgb(data)[0, 0], [0, 255, 255])
    np.testing.assert_allclose(rgb(data, icc=True)[0, 0], [0, 0, 0], atol=2)


@pytest.mark.parametrize(
    "broken", [b"no profile", profile()[:200], profile(b"GRAY"), profile(b"CMYK", table=lab_table())]
)
def test_a_broken_or_foreign_profile_never_costs_the_image(broken: bytes) -> None:
    pixels = levels(16, 16, 3)
    np.testing.assert_array_equal(rgb(encoded(Image.fromarray(pixels), "PNG", icc_profile=broken), icc=True), pixels)


@pytest.mark.parametrize("name", DECODERS)
def test_the_fast_way_for_jpegs_heeds_the_profile(name: str) -> None:
    image = Image.fromarray(np.clip(levels(8, 8, 3), 90, 160)).resize((256, 256), Image.Resampling.NEAREST)
    data = encoded(image, "JPEG", quality=95, icc_profile=profile())
    plain, converted = (Preprocessing(decoder=DECODERS[name], icc=icc) for icc in (False, True))
    expected = crop(read_image(data, icc=True), converted).astype(int)
    np.testing.assert_array_equal(read_crop(data, converted), expected)
    assert np.abs(read_crop(data, plain) - expected).mean() > 5
    without = encoded(image, "JPEG", quality=95)
    np.testing.assert_array_equal(read_crop(without, converted), read_crop(without, plain))
