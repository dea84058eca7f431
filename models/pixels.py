"""From a picture as it was decoded to one that a network reads: cut and scaled, turned, laid on white, RGB.

In this order, so that all but the scaling is done to few pixels. Pictures are trained on and served by the same code:
a network is to see what it was taught with.
"""

from typing import Literal

import numpy as np
from PIL import Image

EXIF_ORIENTATION_TAG = 0x0112
EXIF_SOURCES = frozenset({"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"})
MOST_NOTES = 200  # Pillow takes 10 us a note; cameras write some 20 where this one is
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
GREY_STEPS = {"L;2": 85, "L;4": 17}  # of 255, between one value of few bits and the next
SWAPS_SIDES = frozenset({5, 6, 7, 8})


def loaded(image: Image.Image) -> Image.Image:
    """Decode an opened picture; returns it, with what is transparent as it is meant, or one that is white there."""
    _correct_transparency(image)
    image.load()
    return _on_white(image) if image.format == "GIF" else image


def _on_white(gif: Image.Image) -> Image.Image:
    """A decoded GIF, white where its frame leaves the screen bare.

    That is transparent for browsers; Pillow gives it the first colour of the palette, if none is transparent.
    """
    box = gif.dispose_extent  # type: ignore[attr-defined]  # of the frame
    if box is None or box == (0, 0, *gif.size) or "transparency" in gif.info:
        return gif
    white = Image.new("RGB", gif.size, "white")
    white.paste(gif.crop(box).convert("RGB"), box)
    return white


def _correct_transparency(image: Image.Image) -> None:
    """Have what a PNG names as transparent be as its pixels will be; to be called before they are loaded.

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
    """What its EXIF note says: 1 for a picture that is upright, and where there is none."""
    if not EXIF_SOURCES & image.info.keys():
        return 1
    try:
        return 1 if _n_notes(image) > MOST_NOTES else int(image.getexif().get(EXIF_ORIENTATION_TAG, 1))
    except Exception:  # a damaged note about the picture does not damage the picture
        return 1


def _n_notes(image: Image.Image) -> int:
    """How many notes its EXIF says it has, of those that Pillow reads."""
    notes = image.info.get("exif")
    if notes is None:
        text = image.info.get("Raw profile type exif", "")  # in a PNG, where it may be packed
        notes = bytes.fromhex("".join(text.split("\n")[3:]))
    tiff = notes.removeprefix(b"Exif\0\0").removeprefix(b"Exif\0\0")
    order: Literal["little", "big"] = "little" if tiff.startswith(b"II") else "big"
    at = int.from_bytes(tiff[4:8], order)
    return int.from_bytes(tiff[at : at + 2], order)


def fitted(image: Image.Image, size: tuple[int, int], orientation: int) -> Image.Image:
    """Return `image` upright, in RGB, and of a size: width and height in pixels."""
    small = _scaled(image, size[::-1] if orientation in SWAPS_SIDES else size)
    if orientation in TURNS:
        small = small.transpose(TURNS[orientation])
    return as_rgb(small)


def as_rgb(image: Image.Image) -> Image.Image:
    """Lay `image` on white where it is transparent."""
    if image.mode.startswith("I"):
        return _shallow(image).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA"):
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _scaled(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Cut `image` to the aspect ratio of `size` around its centre and scale it to `size`, antialiased."""
    if image.mode.startswith("I") and "transparency" in image.info:
        image = _deep_grey_with_alpha(image)
    elif image.mode == "P" or "transparency" in image.info:
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    elif image.mode == "1":
        image = image.convert("L")  # black and white can be averaged only as greys
    if image.size == size:
        return image
    return image.resize(size, Image.Resampling.BILINEAR, _middle(image.width, image.height, size))


def _middle(width_px: int, height_px: int, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The largest box of the aspect ratio of `size` in the middle of a picture: left, top, right, bottom."""
    scale = min(width_px / size[0], height_px / size[1])
    # Rounding must not take it over the edge: Pillow refuses such a box.
    half_width, half_height = min(size[0] * scale, width_px) / 2, min(size[1] * scale, height_px) / 2
    centre_x, centre_y = width_px / 2, height_px / 2
    return centre_x - half_width, centre_y - half_height, centre_x + half_width, centre_y + half_height


def _shallow(deep: Image.Image) -> Image.Image:
    """16-bit grey as 8-bit grey; Pillow's own conversion would cut, not scale."""
    return Image.fromarray((np.asarray(deep, np.float32) / 257.0 + 0.5).astype(np.uint8))


def _deep_grey_with_alpha(image: Image.Image) -> Image.Image:
    """16-bit grey, one value of which is transparent."""
    opaque = np.where(np.asarray(image) == image.info["transparency"], 0, 255).astype(np.uint8)
    return Image.merge("LA", (_shallow(image), Image.fromarray(opaque)))
