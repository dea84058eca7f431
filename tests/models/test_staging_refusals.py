"""Networks that cannot be cut into stages are refused with the reason."""

import pytest
import torch
from torch import Tensor

from models.staging import StagingError, split
from tests.models.networks import TwoExits, head, randomise_statistics


class Branches(TwoExits):
    def forward(self, images: Tensor) -> list[Tensor]:
        return super().forward(images) if images.sum() > 0 else []


class OneAnswer(TwoExits):
    def forward(self, images: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(images)[-1]


class Backwards(TwoExits):
    def forward(self, images: Tensor) -> list[Tensor]:
        first, second = super().forward(images)
        return [first + second, first]


class Twice(TwoExits):
    def forward(self, images: Tensor) -> list[Tensor]:
        first, second = super().forward(images)
        return [first, first, second]


class Features(TwoExits):
    def forward(self, images: Tensor) -> list[Tensor]:
        return [self.first(images), *super().forward(images)]


class OtherClasses(TwoExits):
    def __init__(self) -> None:
        super().__init__()
        self.head_1 = head(4, n_classes=9)


class Constant(TwoExits):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("prior", torch.zeros(2, 5))

    def forward(self, images: Tensor) -> list[Tensor]:
        return [self.prior, *super().forward(images)]


class WholeBatch(TwoExits):
    """Its second exit subtracts the mean over the batch."""

    def __init__(self) -> None:
        super().__init__(lambda x, images: x - x.mean(0, keepdim=True))


class Squeezes(TwoExits):
    def forward(self, images: Tensor) -> list[Tensor]:
        return [logits.squeeze() for logits in super().forward(images)]


class MeanCrosses(TwoExits):
    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.first(images)
        mean = x.mean(0)
        return [self.head_1(x - mean), self.head_2(self.second(x * mean))]


class TwoStreams(TwoExits):
    """Two concatenated maps are as long as two images, so gathering them by rows would be wrong."""

    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.first(images)
        both = torch.stack([x, x.sigmoid()])
        return [self.head_1(both.amax(0)), self.head_2(self.second(both.sum(0)))]


class Assigns(TwoExits):
    def __init__(self) -> None:
        super().__init__(self.zero_left)

    @staticmethod
    def zero_left(x: Tensor, images: Tensor) -> Tensor:
        x[:, :, :, 0] = 0
        return x


class Noisy(TwoExits):
    def __init__(self) -> None:
        super().__init__(lambda x, images: x + torch.randn(2, 4, 8, 8))


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (Branches, "cannot trace Branches.*must not branch"),
        (OneAnswer, "OneAnswer does not return a list"),
        (Backwards, "exit 2 needs nothing beyond what exit 1 computes.*cheapest first"),
        (Twice, "exit 2 needs nothing beyond what exit 1 computes"),
        (Features, r"exit 1 of Features gives \(2, 4, 8, 8\)"),
        (OtherClasses, r"exit 2 of OtherClasses gives \(2, 5\).*same classes at every exit"),
        (Constant, "exit 1 does not depend on the images"),
        (WholeBatch, "exit 2 returns other logits for an image alone"),
        (Squeezes, r"exit 1 returns \(5,\) for one image, not \(1, 5\).*flatten"),
        (MeanCrosses, r"a later exit reads 'mean'.*\(4, 8, 8\)"),
        (TwoStreams, r"a later exit reads 'stack'.*\(2, 1, 4, 8, 8\) for one image"),
        (Assigns, "Assigns cannot be staged: it assigns into a tensor.*torch.cat"),
        (Noisy, "exit 2 returns other logits in stages|fails on images"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_networks_that_cannot_be_staged_are_refused_with_the_reason(network, message):
    torch.manual_seed(3)
    with pytest.raises(StagingError, match=f"(?s){message}"):
        split(randomise_statistics(network()), torch.randn(2, 3, 8, 8))


def test_an_input_that_the_network_rejects_is_reported():
    with pytest.raises(StagingError, match=r"fails on images of shape \(2, 1, 8, 8\)"):
        split(TwoExits(), torch.randn(2, 1, 8, 8))
