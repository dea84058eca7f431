"""Published CIFAR-100 results, for plots beside ours.

Costs are in the published convention: average multiply-adds per image, in millions, counting every operation of the
program up to the exit. The published anytime networks were trained on all 50,000 images, and their best epoch was
chosen on the test images; ours hold out 5,000 images and report the last epoch.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class PublishedCurve:
    label: str
    source: str  # where the numbers are from, and how they were read
    mflops: tuple[float, ...]
    accuracy: tuple[float, ...]  # top-1, 0 to 1


def _curve(label: str, source: str, mflops: tuple[float, ...], top1_percent: tuple[float, ...]) -> PublishedCurve:
    return PublishedCurve(label, source, mflops, tuple(percent / 100 for percent in top1_percent))


_TABLE = "BoostNet (AAAI 2023), Table 1"
_BOOSTNET = "BoostNet (AAAI 2023), budgeted-batch figure, digitised: about 0.1 points, 1 % of the budget"
_L2W = "L2W-DEN (ECCV 2022), budgeted-batch figure, digitised: about 0.1 points, 1 % of the budget"
_C_ANY_MFLOPS = (15.14, 25.51, 37.79, 52.06, 62.18, 74.07, 87.73, 100.0, 110.1, 121.7)
_BATCH_MFLOPS = (16, 18, 20, 25, 30, 35, 40, 45, 50, 60, 70, 80, 90)
_L2W_MFLOPS = (10, 12, 15, 18, 20, 25, 30, 35, 40, 45, 50, 60, 70, 80)

CIFAR100_ANYTIME = (
    _curve(
        "MSDNet, 10 exits (published)",
        _TABLE,
        _C_ANY_MFLOPS,
        (64.60, 67.94, 69.36, 71.53, 72.76, 74.03, 74.65, 75.37, 75.53, 75.98),
    ),
    _curve(
        "BoostNet-MSDNet, 10 exits (published)",
        _TABLE,
        _C_ANY_MFLOPS,
        (65.32, 70.01, 72.34, 74.15, 75.24, 75.85, 75.94, 76.51, 76.53, 76.30),
    ),
)

CIFAR100_BUDGETED = (
    _curve(
        "MSDNet, best of 3 sizes (published, digitised)",
        _BOOSTNET,
        _BATCH_MFLOPS,
        (65.9, 68.2, 70.0, 72.3, 73.2, 73.8, 73.8, 74.4, 74.6, 74.9, 74.8, 74.7, 74.7),
    ),
    _curve(
        "BoostNet-MSDNet, best of 3 sizes (published, digitised)",
        _BOOSTNET,
        _BATCH_MFLOPS,
        (66.4, 68.8, 70.4, 73.1, 74.3, 74.5, 75.2, 75.5, 75.5, 75.7, 75.8, 75.8, 75.8),
    ),
    _curve(
        "L2W-MSDNet (published, digitised)",
        _L2W,
        _L2W_MFLOPS,
        (66.5, 68.5, 70.4, 71.6, 72.4, 73.4, 74.0, 74.3, 74.3, 74.6, 75.1, 75.7, 76.0, 76.1),
    ),
)
