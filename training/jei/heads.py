"""The last layers of all heads, trained on stored inputs from the frozen rest of the network."""

import copy
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from models.boosting import Boosting
from models.gates import exit_probabilities, see_softmax
from training.jei.gates import Shown
from training.jei.inputs import Rows
from training.schedule import cosine

EPSILON = 1e-6  # nats; avoids a division by 0 where the weighted loss vanishes
SHOWN_ROWS = 5000
BATCH_ROWS = 64  # as published, like the learning rates
FIRST_RATE, LAST_RATE = 0.01, 2e-4


class Heads(nn.Module):
    """Last layers, and the ensemble that sums their outputs: exit n has logits F_n = t_n F_(n-1) + s_n f_n, as served.

    The loss of exit n is that of F_n, with the gradient stopped at F_(n-1), as when the network was trained: each layer
    learns what the layers before it got wrong, and the loss of an exit does not change earlier layers.
    """

    def __init__(self, layers: Sequence[nn.Linear], boosting: Boosting) -> None:
        super().__init__()
        self.layers = nn.ModuleList(copy.deepcopy(layer) for layer in layers)
        self.boosting = Boosting(boosting.temperatures, scales=boosting.scales)
        self.train().requires_grad_()

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Map the inputs of the last layers, N of [rows, width], to logits [N, rows, classes]."""
        return torch.stack(self.boosting([layer(x) for layer, x in zip(self.layers, inputs, strict=True)]))

    def start_afresh(self, seed: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for layer in self.layers:
                assert isinstance(layer, nn.Linear)
                layer.reset_parameters()

    @torch.no_grad()
    def show(self, rows: Rows) -> tuple[Shown, NDArray[np.bool_]]:
        """Return the gates' features and losses for M images, and whether each exit's answer is right [M, N]."""
        features, losses, correct = [], [], []
        for part in torch.arange(len(rows)).split(SHOWN_ROWS):
            logits, labels = self([x[part] for x in rows.inputs]), rows.labels[part]
            features.append(np.stack([see_softmax(x.numpy()) for x in logits], axis=1))
            losses.append(cross_entropies(logits, labels).T.double().numpy())
            correct.append((logits.argmax(2) == labels).T.numpy())
        return Shown(np.concatenate(features), np.concatenate(losses)), np.concatenate(correct)


def cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropies [N, rows] of logits [N, rows, classes]."""
    return torch.stack([functional.cross_entropy(x, labels, reduction="none") for x in logits])


def gated_loss(losses: Tensor, probabilities: Tensor, detached: bool = True) -> Tensor:
    """The loss of one batch: every image's losses at the exits, weighted by its probability of leaving there.

    An image's total is kept: sum_l P_l CE_l is scaled by sum_l CE_l / sum_l P_l CE_l, through which no gradient may
    flow. In the published code it does flow: then the two cancel, and both loss and gradient of every image are those
    of sum_l CE_l, whatever the gates say.

    Args:
        losses: cross-entropies [N, rows].
        probabilities: P_l, that an image leaves at an exit [N, rows]; without gradient.
        detached: False is the published form, for comparison.
    """
    weighted = (probabilities * losses).sum(0)
    scale = losses.sum(0) / (weighted + EPSILON)
    return ((scale.detach() if detached else scale) * weighted).mean()


def leaving(gates: NDArray[np.float64], logits: Tensor) -> Tensor:
    """Probabilities [N, rows] of leaving at each exit, by gates [N, 5] from logits [N, rows, classes]; no gradient."""
    n_exits, n_rows, n_classes = logits.shape
    features = see_softmax(logits.detach().numpy().reshape(-1, n_classes)).reshape(n_exits, n_rows, -1).swapaxes(0, 1)
    return torch.from_numpy(exit_probabilities(gates, features)).T.to(logits.dtype)


def optimiser_of(heads: Heads) -> torch.optim.SGD:
    """SGD with the published settings."""
    return torch.optim.SGD(heads.parameters(), FIRST_RATE, momentum=0.9, weight_decay=5e-4)


def rate_of(epoch: int, epochs: int) -> float:
    """Learning rate of an epoch (from 0): half a cosine from `FIRST_RATE` to `LAST_RATE` in the last epoch."""
    return LAST_RATE + cosine(FIRST_RATE - LAST_RATE, epoch / max(1, epochs - 1))


def batches(rows: Rows, generator: torch.Generator) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Yield the batches of one epoch in a new random order: inputs, N of [batch, width], and labels [batch]."""
    for part in torch.randperm(len(rows), generator=generator).split(BATCH_ROWS):
        yield [x[part] for x in rows.inputs], rows.labels[part]
