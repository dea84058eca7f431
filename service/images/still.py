"""Pillow's readers of GIFs and JPEGs, without what they do as a file is opened and a still picture has no use for."""

from PIL import GifImagePlugin, Image, JpegImagePlugin


class StillGif(GifImagePlugin.GifImageFile):
    """A GIF of which no frame makes way for a next one: a file with a second one is refused.

    The first frame says how it is to make way, and Pillow fills what is to be there instead as the file is opened:
    before anybody can ask for its size, and as large as the frame says, whatever the screen's size. 84 bytes of a file
    took 177 MB and a tenth of a second.
    """

    @property
    def disposal_method(self) -> int:
        return 0

    @disposal_method.setter
    def disposal_method(self, method: int) -> None:
        """As the frame says."""


class StillJpeg(JpegImagePlugin.JpegImageFile):
    """A JPEG whose notes nobody reads as it is opened: not how large to print it, nor what other pictures follow."""

    def _read_dpi_from_exif(self) -> None:
        """Pillow takes 10 us a note, of which a file may have 65,535; `models.pixels` looks how many there are."""


Image.register_open(StillGif.__name__, StillGif, lambda beginning: beginning.startswith((b"GIF87a", b"GIF89a")))
Image.register_open(StillJpeg.__name__, StillJpeg, lambda beginning: beginning.startswith(b"\xff\xd8\xff"))
