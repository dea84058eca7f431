"""Pillow's reader of GIFs, which does not make ready what comes after the first frame."""

from PIL import GifImagePlugin, Image


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


Image.register_open(StillGif.__name__, StillGif, lambda beginning: beginning.startswith((b"GIF87a", b"GIF89a")))
