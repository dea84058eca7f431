"""Learning to weight samples for early exits (L2W-DEN, ECCV 2022): the objective `weighted`.

Joint training shows every image to every exit, but in service easy images leave early, and deep exits see only hard
ones. Here a small network, the weight predictor, maps an image's losses to a weight for each of them. It is trained
alongside, by meta-learning: a step on one batch with its weights should lower the loss on another batch, in which each
exit answers only for the images that would leave there. It is not served.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

from training.batches import Batch, Batches
from training.objectives.losses import losses_by_exit, statistics_of
from training.optimiser import after_step
from training.processes import Processes
from training.recipe import Weighting
from training.schedule import cosine

HIDDEN = 500  # width of the predictor's one hidden layer, as published
MEAN_OVER = {"mat": [0, 1], "col": [1], "row": [0]}  # axes of [rows, exits]: both, an image's exits, an exit's images


class WeightPredictor(nn.Module):
    """Predicts weights of a batch's losses: 1 + delta (o - mean o), with an output o in [-1, 1] for every loss.

    So their mean is 1 (over the axes that `weighting.mean` names), and each is less than 2 delta from it.
    """

    def __init__(self, n_exits: int, weighting: Weighting) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(n_exits, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, n_exits), nn.Tanh())
        self.delta, self.mean_over = weighting.delta, MEAN_OVER[weighting.mean]

    def forward(self, losses: Tensor) -> Tensor:
        """Map losses [exits, rows] to weights of the same shape; no gradient reaches the losses."""
        with torch.autocast(losses.device.type, enabled=False):
            outputs: Tensor = self.layers(losses.detach().T)
            weights = 1 + self.delta * (outputs - outputs.mean(self.mean_over, keepdim=True))
        return weights.T


def exit_shares(n_exits: int, ratio: float) -> list[float]:
    """Shares of the images that are to leave at each exit: every share is `ratio` times the one before it."""
    powers = [ratio**n for n in range(1, n_exits + 1)]
    return [power / sum(powers) for power in powers]


@torch.no_grad()
def leaving_at(logits: list[Tensor], ratio: float) -> Tensor:
    """The exit, from 0, at which each row of a batch would leave: int64 [rows].

    Exit by exit, the most confident of the remaining rows (by largest softmax) leave until its share is full; the rest
    leave at the last exit.
    """
    n_rows, n_exits = len(logits[0]), len(logits)
    exits = torch.full((n_rows,), n_exits - 1, device=logits[0].device)
    for n, share in enumerate(exit_shares(n_exits, ratio)[:-1]):
        confidence = logits[n].softmax(1).amax(1)
        gone = exits < n_exits - 1
        exits[confidence.masked_fill(gone, -1.0).topk(int(n_rows * share)).indices] = n
    return exits


def early_exit_loss(logits: list[Tensor], labels: Tensor, ratio: float, label_smoothing: float = 0.0) -> Tensor:
    """The sum over exits of the mean loss of the images that leave there; an exit where none leaves adds nothing."""
    exits = leaving_at(logits, ratio)
    losses = losses_by_exit(logits, labels, label_smoothing)
    n_leaving = (exits == torch.arange(len(logits), device=exits.device)[:, None]).sum(1)  # bincount synchronises
    return (losses.gather(0, exits[None])[0] / n_leaving[exits]).sum()


class WeightedLosses:
    """The summed loss of `joint`, with each image's loss at each exit weighted by a `WeightPredictor`.

    Args:
        network: steps are tried on it, without changing its weights or statistics.
    """

    def __init__(self, network: nn.Module, n_exits: int, weighting: Weighting, label_smoothing: float = 0.0) -> None:
        self.network, self.weighting, self.label_smoothing = network, weighting, label_smoothing
        device = next(network.parameters()).device
        self.predictor = WeightPredictor(n_exits, weighting).to(device)
        self.optimiser = torch.optim.Adam(
            self.predictor.parameters(), weighting.learning_rate, weight_decay=weighting.weight_decay
        )

    def __call__(self, network: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        losses = losses_by_exit([x.float() for x in network(images)], labels, self.label_smoothing)
        with torch.no_grad():
            weights = self.predictor(losses)
        return (weights * losses).mean(1).sum(), statistics_of(losses)

    def before(self, step: int, batch: Batch, batches: Batches, optimiser: torch.optim.SGD) -> None:
        """Every `meta_interval` steps, train the predictor: try the step on `batch`, and judge it by its partner."""
        if step % self.weighting.meta_interval == 0:
            self.try_step(batch, batches[batches.partner(step)], optimiser)
            self.learn(step / batches.total_steps, batches.processes)

    def try_step(self, batch: Batch, judge: Batch, optimiser: torch.optim.SGD) -> None:
        """Set the predictor's gradient: that of the early-exit loss on `judge` after a step on `batch`.

        In float32, because forward mode does not support autocast, and because in bf16 the gradient was off by nearly
        its own size at the beginning of a run and by 3 to 8 % after four epochs, to save an eighth of the time
        (docs/rivals.md).
        """
        named = {name: p for name, p in self.network.named_parameters() if p.requires_grad}
        start = {name: p.detach().requires_grad_() for name, p in named.items()}
        losses = losses_by_exit(self._logits(start, batch[0]), batch[1], self.label_smoothing)
        weights = self.predictor(losses)
        total = (weights.detach() * losses).mean(1).sum()
        gradients = [g.requires_grad_() for g in torch.autograd.grad(total, list(start.values()))]
        moved = after_step(optimiser, dict(zip(named.values(), gradients, strict=True)))
        logits = self._logits({name: moved[p] for name, p in named.items()}, judge[0])
        judged = early_exit_loss(logits, judge[1], self.weighting.ratio, self.label_smoothing)

        # The gradient of the step is linear in the weights: d judged / d weight[n, i] is 1 / rows times the derivative
        # of loss n of image i along d judged / d gradient. So one forward-mode pass replaces a backward pass through a
        # backward pass, at two thirds of its time and without its memory.
        along = dict(zip(named, torch.autograd.grad(judged, gradients), strict=True))
        with torch.no_grad():
            changes: Tensor = jvp(
                lambda values: losses_by_exit(self._logits(values, batch[0]), batch[1], self.label_smoothing),
                (start,),
                (along,),
            )[1]
        self.predictor.zero_grad()
        weights.backward(changes / changes.shape[1])

    def learn(self, share: float, processes: Processes) -> None:
        """Take the predictor's step with the mean gradient of all processes; `share` of the run is done."""
        processes.average_gradients(self.predictor)
        for group in self.optimiser.param_groups:
            group["lr"] = cosine(self.weighting.learning_rate, share)
        self.optimiser.step()

    def state(self) -> dict[str, Any]:
        return {"predictor": self.predictor.state_dict(), "predictor_optimiser": self.optimiser.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        self.predictor.load_state_dict(state["predictor"])
        self.optimiser.load_state_dict(state["predictor_optimiser"])

    def _logits(self, weights: dict[str, Tensor], images: Tensor) -> list[Tensor]:
        """The network's logits with these weights; updates of its batch statistics are discarded."""
        statistics = {name: buffer.clone() for name, buffer in self.network.named_buffers()}
        logits: list[Tensor] = functional_call(self.network, (weights, statistics), (images,))
        return logits
