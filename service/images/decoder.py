"""Decodes image files to the uint8 pixels that a network reads.

The steps, in this order: read the header and check the size, before pixels are allocated; decode; crop to the network's
aspect ratio around the centre and scale, in one antialiased (bilinear) step, which does nothing to images of the
network's own size; apply the EXIF orientation; blend transparent pixels with white; convert to RGB. The network
normalises.

A JPEG at least six times larger than needed is decoded at 1/2, 1/4 or 1/8 of its size, never below three times the size
needed: photographs of 224 pixels scaled to 32 that way differ from fully decoded ones by 0.3 grey levels on average, by
8 at most, and take half the time.

If the engine's device scales images itself, those that are opaque, upright and not too large are passed on as decoded.
The others are few, or cost less to transfer once scaled down.
"""

import asyncio
import io
import logging
import math
from collections.abc import Callable
from concurrent.futures import Future
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

# Whatever decoding needs is imported here. Pillow would otherwise import it at the first image of a kind: all of its
# plugins at the first WebP, and, once the server's connections have used up its files, nothing, with an error as if the
# image were damaged.
from PIL import (
    BmpImagePlugin,
    Image,
    ImageOps,  # noqa: F401 (for EXIF, as the next)
    TiffImagePlugin,  # noqa: F401
    UnidentifiedImageError,
    WebPImagePlugin,
)

from models.pixels import TURNS, as_rgb, fitted, loaded, orientation_of
from service.errors import EngineError
from service.images.jpeg_scans import MOST_PIECES, MOST_SCANS, is_endless
from service.images.mistaken import name_of
from service.images.plain import PlainJpeg, PlainPng
from service.images.sizes import webp_canvas, weight_of
from service.images.still import StillGif, StillJpeg
from service.images.threads import Decoding
from service.images.whole_png import WholePng, has_too_many_chunks, unpacks_much

logger = logging.getLogger(__name__)

Image.preinit()  # imports the plugins that `Image.open` would

FORMATS = (
    WholePng.__name__,
    StillJpeg.__name__,
    WebPImagePlugin.WebPImageFile.format,
    BmpImagePlugin.BmpImageFile.format,
    StillGif.__name__,
)
FORMAT_NAMES = "PNG, JPEG, WebP, BMP or GIF"
BEGINNINGS = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"BM", b"GIF8")
ANIMATED_FORMATS = frozenset({"PNG", "WEBP", "GIF"})

# Below both limits, decoding takes the event loop less than about 0.3 ms. Handing it to another thread would cost as
# much, in switches between threads that contend for the interpreter lock.
SMALL_BYTES = 64 * 1024
SMALL_PIXELS = 128 * 128
SMALL_PIXELS_OF_JPEG = 256 * 256

DRAFT_FACTOR = 3


class ImageError(Exception):
    """The body is not an image that this server can classify.

    Args:
        kind: `empty-image`, `not-an-image`, `broken-image`, `image-too-large` or `animated-image`.
        message: cause and remedy, for the client.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class ImageDecoder:
    """Decodes image files to a network's input size.

    Small ones are decoded on the event loop, where that is cheapest (`decode_here`). Larger ones are decoded on
    `n_threads` threads and so do not delay small ones: Pillow releases the interpreter lock while it decodes.

    Args:
        height_px, width_px: the network's input.
        max_pixels: larger images are refused, by the size in their header.
        observe_seconds: called with the duration of each decoding.
        canvas_px: opaque images of up to this many pixels a side are left for the engine to scale; 0: none.
        max_wait_s: see `Decoding`.
    """

    def __init__(
        self,
        height_px: int,
        width_px: int,
        max_pixels: int,
        n_threads: int = 2,
        observe_seconds: Callable[[float], object] = lambda seconds: None,
        canvas_px: int = 0,
        max_wait_s: float = math.inf,
    ) -> None:
        self.height_px, self.width_px, self.max_pixels = height_px, width_px, max_pixels
        self.observe_seconds, self.canvas_px = observe_seconds, canvas_px
        size = (height_px, width_px)
        self._plain = (PlainPng(*size), PlainJpeg(*size)) if height_px * width_px <= max_pixels else ()
        self.n_threads = n_threads
        self._elsewhere = Decoding(self.decode_now, n_threads, max_wait_s, lambda body: weight_of(body, max_pixels))

    def close(self) -> None:
        self._elsewhere.close()

    def decode_here(self, body: bytes) -> NDArray[np.uint8] | None:
        """Return the pixels of a small image file, uint8 [height_px, width_px, 3]; None if decoding may take longer.

        Images that the engine is to scale (see `canvas_px`) keep their own height and width.

        Raises:
            ImageError: the body is not an image, or the image is refused.
            EngineError: memory has run out.
        """
        if len(body) > SMALL_BYTES:
            return None
        started = perf_counter()
        pixels = self._decode_plain(body)
        if pixels is None:
            if unpacks_much(body):
                return None
            image = self.open(body)
            if image.width * image.height > (SMALL_PIXELS_OF_JPEG if image.format == "JPEG" else SMALL_PIXELS):
                return None
            pixels = self.load(image)
        self.observe_seconds(perf_counter() - started)
        return pixels

    def decode_elsewhere(self, body: bytes, deadline_s: float = math.inf) -> Future[NDArray[np.uint8]]:
        """Decode any image file on another thread; the caller observes the duration. See `Decoding.submit`."""
        return self._elsewhere.submit(body, deadline_s)

    async def decode(self, body: bytes, deadline_s: float = math.inf) -> NDArray[np.uint8]:
        """Return the pixels of any image file, as `decode_here` does; large ones are decoded on another thread.

        Raises:
            ImageError: as `decode_here`.
            EngineError: as `Decoding.submit` and the future that it returns.
        """
        pixels = self.decode_here(body)
        if pixels is None:
            started = perf_counter()
            pixels = await asyncio.wrap_future(self.decode_elsewhere(body, deadline_s))
            self.observe_seconds(perf_counter() - started)
        return pixels

    def decode_now(self, body: bytes) -> NDArray[np.uint8]:
        """Decode any image file on the calling thread; the result is that of `decode_here`."""
        pixels = self._decode_plain(body)
        return self.load(self.open(body)) if pixels is None else pixels

    def _decode_plain(self, body: bytes) -> NDArray[np.uint8] | None:
        for plain in self._plain:
            if (pixels := plain.decode(body)) is not None:
                return pixels
        return None

    def open(self, body: bytes) -> Image.Image:
        """Read the header only, and raise ImageError unless the image may be decoded; EngineError as `load`."""
        if not body:
            raise ImageError("empty-image", f"The body is empty: send the bytes of one {FORMAT_NAMES} image.")
        self._refuse_large(*webp_canvas(body))  # opening it allocates its canvas, up to 16,383 x 16,383
        if is_endless(body):
            raise _broken(f"it has more than {MOST_SCANS} scans, or {MOST_PIECES:,} segments")
        if has_too_many_chunks(body):
            raise _broken("it has too many chunks")
        try:
            image = Image.open(io.BytesIO(body), formats=FORMATS)
            animated = image.format in ANIMATED_FORMATS and getattr(image, "is_animated", False)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            raise self._too_large("more than 89 million") from None
        except UnidentifiedImageError:
            if body.startswith(BEGINNINGS):
                raise _broken("its header cannot be read") from None
            seems = name_of(body)
            seen = f" (they begin with {body[:12]!r})" if seems is None else f". It seems to be {seems}"
            raise ImageError(
                "not-an-image",
                f"The {len(body):,} bytes sent are not a {FORMAT_NAMES} image, whatever their name or content type "
                f"says{seen}.",
            ) from None
        except MemoryError:
            raise _no_memory() from None
        except Exception as error:  # for damaged files Pillow's readers raise errors of many types
            raise _broken(error) from None
        self._refuse_large(*image.size)
        if animated:
            raise ImageError("animated-image", "The image is animated: send one still frame of it.")
        return image

    def load(self, image: Image.Image) -> NDArray[np.uint8]:
        """Decode an opened image to uint8 [height_px, width_px, 3].

        Raises:
            ImageError: the image is damaged.
            EngineError: memory has run out. Where Pillow's libraries do not report that as such, it is an ImageError.
        """
        try:
            return self._load(image)
        except MemoryError:
            raise _no_memory() from None
        except Exception as error:  # as above
            raise _broken(error) from None

    def _load(self, image: Image.Image) -> NDArray[np.uint8]:
        if image.size != (self.width_px, self.height_px):
            side = DRAFT_FACTOR * max(self.width_px, self.height_px)
            image.draft(image.mode, (side, side))  # JPEG only; picks the smallest scale of at least `side`
        image = loaded(image)
        if image.mode == "RGB" and image.size == (self.width_px, self.height_px) and not image.info:
            return np.asarray(image)
        orientation = orientation_of(image)
        if self._is_left_as_it_is(image, orientation):
            return np.asarray(as_rgb(image))
        return np.asarray(fitted(image, (self.width_px, self.height_px), orientation))

    def _is_left_as_it_is(self, image: Image.Image, orientation: int) -> bool:
        return (
            max(image.size) <= self.canvas_px
            and image.size != (self.width_px, self.height_px)
            and image.mode in ("RGB", "L")
            and "transparency" not in image.info
            and orientation not in TURNS
        )

    def _refuse_large(self, width_px: int, height_px: int) -> None:
        if width_px * height_px > self.max_pixels:
            raise self._too_large(f"{width_px} x {height_px} = {width_px * height_px:,}")

    def _too_large(self, size: str) -> ImageError:
        return ImageError(
            "image-too-large",
            f"The image has {size} pixels and this server accepts at most {self.max_pixels:,}: send a smaller one (the "
            f"network reads {self.width_px} x {self.height_px}), or raise --max-pixels.",
        )


def _broken(why: object) -> ImageError:
    return ImageError("broken-image", f"The image is damaged or cut short ({why}): send the whole file again.")


def _no_memory() -> EngineError:
    """The error of an intact image: its client is not to be told that it is damaged."""
    logger.error("no memory is left to decode an image")
    return EngineError("the server has no memory left to decode it")
