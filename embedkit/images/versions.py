"""Which decoders this installation has."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from PIL import features

_LIBRARIES = {
    "libjpeg-turbo": "libjpeg_turbo", "zlib": "zlib", "libwebp": "webp", "libavif": "avif", "OpenJPEG": "jpg_2000",
    "libtiff": "libtiff",
}  # fmt: skip
_PACKAGES = ("simplejpeg", "pillow-heif", "pillow-jxl-plugin")


def decoder_versions() -> dict[str, str | None]:
    """Return the version of each decoder, or None where it is not there.

    Examples
    --------
    >>> from embedkit.images.versions import decoder_versions
    >>> decoder_versions()["zlib"] is not None
    True
    """
    found = {name: features.version(key) if features.check(key) else None for name, key in _LIBRARIES.items()}
    return found | {package: _installed(package) for package in _PACKAGES}


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
