"""Measures the lane time that images take, and derives how many may be in flight for a given predicted wait."""

from math import inf
from typing import Final


class Pace:
    """Lane seconds per image, averaged over the last few hundred images, however they ended.

    Plain Python over numbers. A new image is predicted to wait for those in flight: `in flight x row_s`. This is right
    under load; it is too long while batches are small, since full ones cost less per image.

    A batch counts at most `MOST_TIMES` the mean of the last ones. One that ran while the machine was suspended, for
    minutes perhaps, would otherwise have nearly everything refused for thousands of images.

    Args:
        n_lanes: batches that run at once.
        image_s: expected lane seconds per image, until images have been measured.
    """

    PRIOR_IMAGES: Final = 64
    MEMORY_IMAGES: Final = 512
    MEMORY_BATCHES: Final = 16
    MOST_TIMES: Final = 8.0  # a larger change that lasts is adopted within a few batches

    def __init__(self, n_lanes: int, image_s: float) -> None:
        self.n_lanes = n_lanes
        self._images = float(self.PRIOR_IMAGES)
        self._seconds = self._images * image_s
        self._batch_s = 0.0  # mean; 0 before the first

    @property
    def row_s(self) -> float:
        """Predicted wait in seconds that each image in flight adds."""
        return self._seconds / self._images / self.n_lanes

    def ran(self, seconds: float, n_ended: int) -> None:
        """Record a batch that took `seconds`, and `n_ended` images that have ended since the previous one."""
        if self._batch_s > 0:
            seconds = min(seconds, self.MOST_TIMES * self._batch_s)
            self._batch_s += (seconds - self._batch_s) / self.MEMORY_BATCHES
        else:
            self._batch_s = seconds
        self._seconds += seconds
        self._images += n_ended
        if self._images > 2 * self.MEMORY_IMAGES:
            self._seconds /= 2
            self._images /= 2

    def room_rows(self, max_wait_s: float, max_rows: int) -> int:
        """How many images in flight make a predicted wait of `max_wait_s`: from two per lane up to `max_rows`."""
        row_s = self.row_s
        bearable = inf if row_s <= 0 else max_wait_s / row_s
        return int(min(max_rows, max(2 * self.n_lanes, bearable)))
