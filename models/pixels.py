"""Converts a decoded image to the network's input: cropped and scaled, rotated, blended with white, RGB.

In this order, so that everything after the scaling processes few pixels. Training and serving use this same code, so
that a network is served the kind of images it was trained on.
"""

from typing import Literal

import numpy as np
from PIL import Image

EXIF_ORIENTATION_TAG = 0x0112
EXIF_SOURCES = frozenset({"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"})
MOST_NOTES = 200  # EXIF entries: Pillow takes 10 us each; cameras write some 20 where the orientation is
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
GREY_STEPS = {"L;2": 85, "L;4": 17}  # 8-bit grey levels per step of a value of fewer bits
SWAPS_SIDES = frozenset({5, 6, 7, 8})


def loaded(image: Image.Image) -> Image.Image:
    """Decode an opened image; return it with correct transparency or, if it is a GIF, with its bare parts white."""
    _correct_transparency(image)
    image.load()
    return _on_white(image) if image.format == "GIF" else image


def _on_white(gif: Image.Image) -> Image.Image:
    """Return a decoded GIF that is white where its frame leaves the screen bare.

    Browsers show these parts as transparent; Pillow gives them the palette's first colour, if none is transparent.
    """
    box = gif.dispose_extent  # type: ignore[attr-defined]  # of the frame
    if box is None or box == (0, 0, *gif.size) or "transparency" in gif.info:
        return gif
    white = Image.new("RGB", gif.size, "white")
    white.paste(gif.crop(box).convert("RGB"), box)
    return white


def _correct_transparency(image: Image.Image) -> None:
    """Convert a PNG's transparent value to the depth that its pixels will have. To be called before they are loaded.

    Pillow leaves the value as it is in the file, but makes 8 bits of pixels that have 2, 4, or 3 x 16.
    """
    named = image.info.get("transparency")
    if image.format != "PNG" or named is None or not image.tile:  # type: ignore[attr-defined]
        return
    packed = image.tile[0].args  # type: ignore[attr-defined]
    if packed in GREY_STEPS:
        image.info["transparency"] = named * GREY_STEPS[packed]
    elif packed == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in named)


def orientation_of(image: Image.Image) -> int:
    """Return the EXIF orientation; 1 (upright) if there is none."""
    if not EXIF_SOURCES & image.info.keys():
        return 1
    try:
        return 1 if _n_notes(image) > MOST_NOTES else int(image.getexif().get(EXIF_ORIENTATION_TAG, 1))
    except Exception:  # the image is usable even if its EXIF data are damaged
        return 1


def _n_notes(image: Image.Image) -> int:
    """Return the number of EXIF entries that the image declares, of those that Pillow reads."""
    notes = image.info.get("exif")
    if notes is None:
        text = image.info.get("Raw profile type exif", "")  # in a PNG, where it may be compressed
        notes = bytes.fromhex("".join(text.split("\n")[3:]))
    tiff = notes.removeprefix(b"Exif\0\0").removeprefix(b"Exif\0\0")
    order: Literal["little", "big"] = "little" if tiff.startswith(b"II") else "big"
    at = int.from_bytes(tiff[4:8], order)
    return int.from_bytes(tiff[at : at + 2], order)


def fitted(image: Image.Image, size: tuple[int, int], orientation: int) -> Image.Image:
    """Return `image` upright, in RGB, and of `size` (width and height in pixels)."""
    small = _scaled(image, size[::-1] if orientation in SWAPS_SIDES else size)
    if orientation in TURNS:
        small = small.transpose(TURNS[orientation])
    return as_rgb(small)


def as_rgb(image: Image.Image) -> Image.Image:
    """Return `image` in RGB, with transparent pixels blended with white."""
    if image.mode.startswith("I"):
        return _shallow(image).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA"):
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _scaled(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Crop `image` to the aspect ratio of `size` around its centre and scale it to `size`, antialiased."""
    if image.mode.startswith("I") and "transparency" in image.info:
        image = _deep_grey_with_alpha(image)
    elif image.mode == "P" or "transparency" in image.info:
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    elif image.mode == "1":
        image = image.convert("L")  # 1-bit pixels can be averaged only as grey levels
    if image.size == size:
        return image
    return image.resize(size, Image.Resampling.BILINEAR, _middle(image.width, image.height, size))


def _middle(width_px: int, height_px: int, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The largest centred box of the aspect ratio of `size`: left, top, right, bottom."""
    scale = min(width_px / size[0], height_px / size[1])
    # Rounding must not take the box beyond the edge, which Pillow refuses.
    half_width, half_height = min(size[0] * scale, width_px) / 2, min(size[1] * scale, height_px) / 2
    centre_x, centre_y = width_px / 2, height_px / 2
    return centre_x - half_width, centre_y - half_height, centre_x + half_width, centre_y + half_height


def _shallow(deep: Image.Image) -> Image.Image:
    """Convert 16-bit to 8-bit grey; Pillow's own conversion would clip, not scale."""
    return Image.fromarray((np.asarray(deep, np.float32) / 257.0 + 0.5).astype(np.uint8))


def _deep_grey_with_alpha(image: Image.Image) -> Image.Image:
    """Convert 16-bit grey with one transparent value to 8-bit grey with alpha."""
    opaque = np.where(np.asarray(image) == image.info["transparency"], 0, 255).astype(np.uint8)
    return Image.merge("LA", (_shallow(image), Image.fromarray(opaque)))
