"""`gates.json` of a gated run: its gates and how they were made; and the published decision of when to leave."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from models.exits import Outcome, outcome
from models.gates import GATE_FEATURES, PUBLISHED_THRESHOLD, GateScore, see_softmax
from training.checkpoint import RunError, RunFolder
from training.ensemble import Ensemble
from training.jei.gates import FoldedGates
from training.options import GatesOn, HeadsStart

GATES = "gates.json"
SCORE = "jei_gates"  # name of the exit score


@dataclass(frozen=True)
class Settings:
    """Settings of `python -m training gate`."""

    trade_off: float  # nats of cross-entropy that the full network's cost is worth
    heads: HeadsStart = "trained"  # kept: only gates are trained; otherwise the last layers' initial weights
    gates_on: GatesOn = "heldout"
    epochs: int = 8  # as published: of 15 epochs, the heads are trained on half of the batches, the gates on the others
    detached: bool = True  # see `gated_loss`
    seed: int = 0


@dataclass(frozen=True)
class Turn:
    """Results of a turn: held-out images leave by its gates, at the published decision."""

    step: int  # of the heads, when the gates were fitted
    accuracy: float  # share
    cost_share: float  # mean cost, as a share of the full network's
    loss: float | None  # mean over the steps since the previous turn; None for the first


class GateRecord(BaseModel):
    """The gates of a run, for `calibrate`, `evaluate` and `export`."""

    model_config = ConfigDict(extra="forbid")

    settings: Settings
    source: str  # name of the folder of the run that it was made from
    gates: list[list[float]]  # [N, 5]: a row per exit, the bias last
    gates_by_fold: list[list[list[float]]]  # [folds, N, 5]
    fold: list[int]  # of every held-out image
    ensemble: Ensemble | None  # with which the gates were fitted; None: as trained
    turns: tuple[Turn, ...]
    kept: int  # index of the turn whose gates these are

    @classmethod
    def load(cls, folder: RunFolder) -> Self | None:
        """Read the gates of a run, if it has any.

        Raises:
            RunError: the file is damaged.
        """
        path = folder.path / GATES
        if not path.is_file():
            return None
        try:
            return cls.model_validate_json(path.read_text())
        except ValueError as error:
            raise RunError(f"{path}: damaged, or from another version; run `python -m training gate` again") from error

    def save(self, folder: RunFolder) -> Path:
        path = folder.path / GATES
        path.write_text(self.model_dump_json(indent=1) + "\n")
        return path

    def score(self) -> GateScore:
        return GateScore(self.gates)

    def heldout_scores(self, logits: list[NDArray[Any]]) -> NDArray[np.float64]:
        """Scores [M, N] of the held-out images' logits, each by gates that were not fitted to it."""
        folded = FoldedGates(np.array(self.gates), np.array(self.gates_by_fold), np.array(self.fold))
        return folded.scores(np.stack([see_softmax(x) for x in logits], axis=1))

    def told(self, heldout: Outcome, test: Outcome) -> dict[str, Any]:
        """For a bundle's training record: how its gates were made, and the results of the published decision."""
        s = self.settings
        decided = {
            name: {"executed_mflops": done.mean_cost, "accuracy": done.accuracy, "shares": list(done.shares)}
            for name, done in (("heldout", heldout), ("test", test))
        }
        made = {"trade_off": s.trade_off, "heads": s.heads, "gates_on": s.gates_on, "detached": s.detached}
        return {**made, "steps": self.turns[self.kept].step, "seed": s.seed, "published_decision": decided}

    def manifest_fields(self) -> dict[str, Any]:
        """The gates in the form of a bundle's manifest."""
        return {"features": list(GATE_FEATURES), "gain": self.gates, "loss": None}


def published_thresholds(n_exits: int) -> NDArray[np.float64]:
    """Thresholds [N] of the published decision: leave at the first exit where pi_l reaches one half."""
    return np.array([PUBLISHED_THRESHOLD] * (n_exits - 1) + [-np.inf])


def published_decision(scores: NDArray[Any], correct: NDArray[np.bool_], costs: Sequence[float]) -> Outcome:
    """Accuracy, cost and exits of images with scores [M, N] under the published decision."""
    return outcome(scores, correct, costs, published_thresholds(len(costs)))
