"""Pillow's readers of GIF and JPEG, without work at opening that still images do not need."""

from PIL import GifImagePlugin, Image, JpegImagePlugin

from service.images.jpeg_scans import BEGINNING as JPEG


class StillGif(GifImagePlugin.GifImageFile):
    """A GIF reader that ignores the disposal method, as files with a second frame are refused.

    For disposal, Pillow allocates an area of the first frame's size when it opens the file, before the size can be
    checked and whatever the screen's size: a file of 84 bytes took 177 MB and a tenth of a second.
    """

    @property
    def disposal_method(self) -> int:
        return 0

    @disposal_method.setter
    def disposal_method(self, method: int) -> None:
        """Ignore the method of the frame."""


class StillJpeg(JpegImagePlugin.JpegImageFile):
    """A JPEG reader that does not read the print resolution from EXIF when opening, nor the images that may follow."""

    def _read_dpi_from_exif(self) -> None:
        """Do nothing: Pillow takes 10 us per EXIF entry, and a file may have 65,535. `models.pixels` limits them."""


Image.register_open(StillGif.__name__, StillGif, lambda beginning: beginning.startswith((b"GIF87a", b"GIF89a")))
Image.register_open(StillJpeg.__name__, StillJpeg, lambda beginning: beginning.startswith(JPEG))
