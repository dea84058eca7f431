"""Signals: other predictors of whether going on helps, compared with the logit margin as exit policies are.

A fitted signal is an exit score: minus the log-odds that going on mends the answer, by a logistic regression on the
heads' outputs or on the inputs of their last layers (a gate). Those fitted to held-out images are judged by
cross-fitting; those fitted to training images, augmented as in training, have seen no held-out image.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from models.frontier import build_frontier
from training.augment import DeviceImages
from training.calibration import (
    CalibrationRecord,
    ExitOutputs,
    checked_split,
    in_batches,
    load_trained,
    outputs_of,
    parts_of,
)
from training.checkpoint import RunFolder
from training.comparison import Behaviour, Estimate, behaviour, mean_leads
from training.evaluation import N_BUDGETS, cost_of
from training.gates import HeadInputs
from training.image_set import ImageSet, Split
from training.policies import PAPER, Policy, Rows, Source, crossfit_rightness
from training.predicting import RIDGE, fit_exits, folds_of, mends

MARGIN = Policy("logit_margin", "ratio")
FAMILY = "ratio"
Columns = NDArray[np.floating[Any]]  # [images, N, F]


@dataclass(frozen=True)
class Seen:
    """Outputs of a network with N exits for M images, and the inputs of its heads' last layers."""

    outputs: ExitOutputs
    inputs: NDArray[np.float32]  # [M, N, width]; narrower heads are padded with 0

    @property
    def mends(self) -> NDArray[np.bool_]:
        """Whether going on mends the answer [M, N]."""
        return mends(self.outputs.correct)


@dataclass(frozen=True)
class Signal:
    """A score, and the images that it was fitted to."""

    name: str
    fitted_on: str  # "held-out images", "training images", or "" if nothing is fitted
    source: Source
    heldout: NDArray[np.float64]  # [M, N]; by cross-fitting if it was fitted to held-out images
    test: NDArray[np.float64]  # [M, N]


@dataclass(frozen=True)
class Judged:
    """A signal's leads with `ratio` thresholds: differences in top-1 as shares, on average over all budgets."""

    signal: Signal
    over_paper: tuple[float, float]  # on held-out images: the lead over max softmax, geometric, and its standard error
    over_margin: tuple[float, float]  # the same over the logit margin, ratio
    test_over_margin: Estimate  # on test images, at equal measured cost


def judge(folder: RunFolder, images: ImageSet, device: torch.device, n_train: int | None = None) -> list[Judged]:
    """Fit and judge every signal on a calibrated run.

    Args:
        n_train: number of training images to fit gates to; by default all.

    Raises:
        RunError, DataError: the run is not calibrated, or `images` is not the set it was trained on.
    """
    record = CalibrationRecord.load(folder)
    train, heldout, test = look(folder, record, images, device, n_train)
    costs = tuple(cost / 1e6 for cost in cost_of(folder, record).executed)
    signals = [*plain_signals(heldout, test), *fitted_signals(train, heldout, test)]
    signals += trained_gate(folder, heldout, test)
    return judged(signals, heldout.outputs.correct, test.outputs.correct, costs)


def look(
    folder: RunFolder, record: CalibrationRecord, images: ImageSet, device: torch.device, n_train: int | None
) -> tuple[Seen, Seen, Seen]:
    """Run the network over training images, each augmented once, and over held-out and test images as they are."""
    split = checked_split(folder, folder.read_description()["data"], images)
    split = Split(split.train[:n_train], split.held_out)
    network, _ = load_trained(folder, len(record.class_names), record.half_weights, record.ensemble)
    network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    train, heldout, test = parts_of(images, split, folder.read_recipe().augmentation, device)
    draws = torch.Generator(device).manual_seed(0)
    return (
        _run(network, train, lambda rows: train.augmented(rows, draws)[0], "training images"),
        _run(network, heldout, lambda rows: heldout.plain(rows)[0], "held-out images"),
        _run(network, test, lambda rows: test.plain(rows)[0], "test images"),
    )


@torch.no_grad()
def _run(network: nn.Module, images: DeviceImages, read: Callable[[Tensor], Tensor], description: str) -> Seen:
    kept, logits, inputs = HeadInputs(network), [], []
    for rows in in_batches(images, description):
        logits.append(torch.stack(network(read(rows))).float().cpu())
        inputs.append(_side_by_side(kept.take()).float().cpu())
    kept.remove()
    return Seen(outputs_of(list(torch.cat(logits, 1)), images.labels.cpu()), torch.cat(inputs).numpy())


def _side_by_side(inputs: Sequence[Tensor]) -> Tensor:
    """Stack inputs of N heads to [rows, N, width of the widest]; in networks for photographs the widths differ."""
    width = max(x.shape[1] for x in inputs)
    return torch.stack([functional.pad(x, (0, width - x.shape[1])) for x in inputs], 1)


def plain_signals(heldout: Seen, test: Seen) -> list[Signal]:
    """The published score and the logit margin, with which the others are compared."""
    names = PAPER.score, MARGIN.score
    return [_given(name, "", heldout.outputs.scores[name], test.outputs.scores[name]) for name in names]


def fitted_signals(train: Seen, heldout: Seen, test: Seen) -> list[Signal]:
    """All signals that are fitted after training."""

    def of_both(columns: Callable[[Seen], Columns]) -> tuple[Columns, Columns]:
        return columns(heldout), columns(test)

    both_margins = "margins and agreement of two heads"
    signals = [
        _fitted("this head's margin, log-odds, probability margin, entropy", heldout, of_both(_this_head)),
        _fitted(both_margins, heldout, of_both(_two_margins)),
        _fitted("all of those", heldout, of_both(_two_heads)),
    ]
    signals += [
        _fitted(f"all of those and the head's inputs, ridge {ridge:g}", heldout, of_both(_with_inputs), ridge)
        for ridge in (30.0, 300.0)
    ]
    gates: list[tuple[str, Callable[[Seen], Columns]]] = [
        ("the head's inputs", lambda seen: seen.inputs),
        (f"the head's inputs, {both_margins}", lambda seen: np.concatenate([seen.inputs, _two_margins(seen)], axis=2)),
    ]
    for name, columns in gates:
        weights = fit_exits(columns(train), train.mends)
        signals += _gate_signals(name, heldout, test, *(apply(weights, part) for part in of_both(columns)))
    return signals


def trained_gate(folder: RunFolder, heldout: Seen, test: Seen) -> list[Signal]:
    """The outputs of the network's own gates, if it was trained with them (`training.gates`)."""
    state = folder.load_checkpoint()["network"]
    if "gates.outputs.0.weight" not in state:
        return []
    n_exits, width = heldout.inputs.shape[1:]
    weights = np.zeros((n_exits, width + 1))
    for i in range(n_exits - 1):
        weight = state[f"gates.outputs.{i}.weight"].numpy()[0]
        weights[i, : len(weight)] = weight
        weights[i, -1] = state[f"gates.outputs.{i}.bias"].item()
    said = (apply(weights, part.inputs) for part in (heldout, test))
    return _gate_signals("gates trained with the network", heldout, test, *said)


def _gate_signals(name: str, heldout: Seen, test: Seen, *said: NDArray[np.float64]) -> list[Signal]:
    """Two signals from a gate's log-odds: alone, and with both margins in a regression on held-out images."""
    alone = _given(name, "training images", *(-log_odds for log_odds in said))
    beside = [
        np.concatenate([_two_margins(part), log_odds[:, :, None]], axis=2)
        for part, log_odds in zip((heldout, test), said, strict=True)
    ]
    return [alone, _fitted(f"its answer and both margins ({name})", heldout, (beside[0], beside[1]))]


def judged(
    signals: Sequence[Signal],
    heldout_correct: NDArray[np.bool_],
    test_correct: NDArray[np.bool_],
    costs: tuple[float, ...],
) -> list[Judged]:
    """Compare signals, the published score and the logit margin among them, with `ratio` thresholds."""
    budgets = np.linspace(costs[0], costs[-1], N_BUDGETS).tolist()
    rightness: dict[str, NDArray[np.float64]] = {}
    behaviours: dict[Policy, Behaviour] = {}
    for signal in tqdm(signals, desc="signals", disable=None):
        families = (FAMILY, PAPER.family) if signal.name == PAPER.score else (FAMILY,)
        by_family = crossfit_rightness(signal.source, heldout_correct, costs, budgets, families)
        rightness[signal.name] = by_family[FAMILY]
        if PAPER.family in by_family:
            paper = by_family[PAPER.family]
        frontier = build_frontier(signal.heldout, heldout_correct, costs, FAMILY)
        thresholds = np.array([frontier.at_cost(budget).thresholds for budget in budgets])
        behaviours[Policy(signal.name, FAMILY)] = behaviour(signal.test, test_correct, costs, thresholds)
    leads = mean_leads(behaviours, MARGIN, costs)
    return [
        Judged(
            signal,
            _lead(rightness[signal.name] - paper),
            _lead(rightness[signal.name] - rightness[MARGIN.score]),
            leads[Policy(signal.name, FAMILY)],
        )
        for signal in signals
    ]


def _lead(difference: NDArray[np.float64]) -> tuple[float, float]:
    return float(difference.mean()), float(difference.std() / np.sqrt(len(difference)))


def apply(weights: NDArray[np.float64], columns: Columns) -> NDArray[np.float64]:
    """The log-odds [M, N] from columns [M, N, F]."""
    log_odds: NDArray[np.float64] = np.einsum("mnf,nf->mn", columns, weights[:, :-1]) + weights[:, -1]
    return log_odds


def _given(name: str, fitted_on: str, heldout: NDArray[Any], test: NDArray[Any]) -> Signal:
    """A signal that was not fitted to held-out images."""
    return Signal(name, fitted_on, lambda fitted, judged: (heldout[fitted], heldout[judged]), heldout, test)


def _fitted(name: str, heldout: Seen, columns: tuple[Columns, Columns], ridge: float = RIDGE) -> Signal:
    """A signal fitted to the held-out images; `columns` are its inputs for those and for the test images."""
    of_heldout, of_test = columns
    happens = heldout.mends

    def source(fitted: Rows, judged: Rows) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        weights = fit_exits(of_heldout[fitted], happens[fitted], ridge)
        return crossfit_columns(of_heldout[fitted], happens[fitted], ridge), -apply(weights, of_heldout[judged])

    test = -apply(fit_exits(of_heldout, happens, ridge), of_test)
    return Signal(name, "held-out images", source, crossfit_columns(of_heldout, happens, ridge), test)


def crossfit_columns(columns: Columns, happens: NDArray[np.bool_], ridge: float) -> NDArray[np.float64]:
    """Scores [M, N] of images by cross-fitting: each by weights that were not fitted to it."""
    fold = folds_of(len(columns))
    scores = np.empty(happens.shape)
    for k in np.unique(fold):
        scores[fold == k] = -apply(fit_exits(columns[fold != k], happens[fold != k], ridge), columns[fold == k])
    return scores


def _this_head(seen: Seen) -> Columns:
    names = ("logit_margin", "max_softmax", "probability_margin", "entropy")
    return np.stack([seen.outputs.scores[name] for name in names], axis=2)


def _two_margins(seen: Seen) -> Columns:
    return seen.outputs.features


def _two_heads(seen: Seen) -> Columns:
    this = _this_head(seen)
    before = np.concatenate([np.zeros_like(this[:, :1]), this[:, :-1]], axis=1)
    return np.concatenate([this, before, _two_margins(seen)], axis=2)


def _with_inputs(seen: Seen) -> Columns:
    return np.concatenate([_two_heads(seen), seen.inputs], axis=2)
