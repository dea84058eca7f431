"""`gates.json` of a gated run: its gates, how they were made, and what the published decision came to."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from models.exits import Outcome, outcome
from models.gates import GATE_FEATURES, PUBLISHED_THRESHOLD, GateScore, gate_scores, see_softmax
from training.checkpoint import RunError, RunFolder
from training.ensemble import Ensemble
from training.jei.gates import FoldedGates

GATES = "gates.json"
SCORE = "jei_gates"  # what the exit score is called
# As published the heads have half of the batches of 15 epochs, and gates the others.
EPOCHS = 8
HeadsStart = Literal["kept", "trained", "fresh"]
GatesOn = Literal["heldout", "training"]


@dataclass(frozen=True)
class Settings:
    """What is asked for."""

    trade_off: float  # nats of cross-entropy that the full network's cost is worth
    heads: HeadsStart = "trained"  # kept: gates alone; else where the last layers start
    gates_on: GatesOn = "heldout"
    epochs: int = EPOCHS
    detached: bool = True  # see `gated_loss`
    seed: int = 0


@dataclass(frozen=True)
class Turn:
    """After a fit of the gates: gated answers of held-out images, at the published decision."""

    step: int
    accuracy: float  # share
    cost_share: float  # mean cost of the full network's
    loss: float | None  # mean over the steps of the turn before; None before the first


class GateRecord(BaseModel):
    """What `calibrate`, `evaluate` and `export` need to know of gates."""

    model_config = ConfigDict(extra="forbid")

    settings: Settings
    source: str  # the run that it was made from, by its folder's name
    gates: list[list[float]]  # [N, 5]: a row an exit, the bias last
    gates_by_fold: list[list[list[float]]]  # [folds, N, 5]
    fold: list[int]  # of every held-out image
    ensemble: Ensemble | None  # that the gates were fitted to; None: as trained
    turns: tuple[Turn, ...]
    kept: int

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
        return GateScore(np.array(self.gates))

    def heldout_scores(self, logits: list[NDArray[Any]]) -> NDArray[np.float32]:
        """Scores [M, N] of the held-out images' logits, each by gates that it had no part in."""
        folded = FoldedGates(np.array(self.gates), np.array(self.gates_by_fold), np.array(self.fold))
        features = np.stack([see_softmax(x) for x in logits], axis=1)
        scores = np.empty(features.shape[:2], dtype=np.float32)
        for rows, weights in folded.parts():
            scores[rows] = gate_scores(weights, features[rows])
        return scores

    def told(self, heldout: Outcome, test: Outcome) -> dict[str, Any]:
        """What a bundle tells of how its gates were made, and what the published decision comes to."""
        s = self.settings
        decided = {
            name: {"executed_mflops": done.mean_cost, "accuracy": done.accuracy, "shares": list(done.shares)}
            for name, done in (("heldout", heldout), ("test", test))
        }
        made = {"trade_off": s.trade_off, "heads": s.heads, "gates_on": s.gates_on, "detached": s.detached}
        return {**made, "steps": self.turns[self.kept].step, "seed": s.seed, "published_decision": decided}

    def manifest_fields(self) -> dict[str, Any]:
        """The gates as a bundle's manifest has them."""
        return {"features": list(GATE_FEATURES), "gain": self.gates, "loss": None}


def published_thresholds(n_exits: int) -> NDArray[np.float64]:
    """Those [N] of a gate's score at which an image leaves as published: at the first exit with pi_l of one half."""
    return np.array([PUBLISHED_THRESHOLD] * (n_exits - 1) + [-np.inf])


def published_decision(scores: NDArray[Any], correct: NDArray[np.bool_], costs: Sequence[float]) -> Outcome:
    """What images with scores [M, N] do at those thresholds."""
    return outcome(scores, correct, costs, published_thresholds(len(costs)))
