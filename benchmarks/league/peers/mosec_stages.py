"""mosec with one process per stage of the network: early exits in a pipeline.

Each process runs its stage for the images of its batch that have not left, with the thresholds that the service starts
with. Images that have left are passed through, as mosec's pipeline has no exit before its end.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
from mosec import Server, Worker
from numpy.typing import NDArray

from benchmarks.league.peers.serving import Setup, answers, decode, session_options
from models.bundle import load_bundle
from models.onnx_weights import load_stage_session

HISTORY = "score history"
LEFT = "answer"
Row = dict[str, Any]  # the values of an image between stages or, once it has left, only its answer


class Stage(Worker):
    """One stage, whose index mosec passes to its process as LEAGUE_STAGE."""

    def __init__(self) -> None:
        self.served = Setup.from_environment()
        bundle = load_bundle(Path(self.served.bundle))
        self.k = int(os.environ["LEAGUE_STAGE"])
        stages = bundle.manifest.stages
        self.info = stages[self.k]
        self.is_last = self.k == len(stages) - 1
        self.needed = {value.name for stage in stages[self.k + 1 :] for value in stage.inputs}
        frontier = bundle.frontier()
        point = frontier.at_cost(self.served.budget_fraction * bundle.costs_mflops[-1])
        self.threshold = point.thresholds[self.k]
        self.mflops = bundle.costs_mflops[self.k]
        self.score = bundle.score()
        self.session = load_stage_session(bundle.path, self.info.file, session_options=session_options())

    def deserialize(self, data: bytes) -> Row:
        return {"images": decode(data, self.served), HISTORY: self.score.start(1)[0]}

    def forward(self, data: list[Row]) -> list[Row]:
        staying = [row for row in data if LEFT not in row]
        if staying:
            self._run(staying)
        return [row[LEFT] for row in data] if self.is_last else data

    def _run(self, rows: list[Row]) -> None:
        feed = {value.name: np.stack([row[value.name] for row in rows]) for value in self.info.inputs}
        outputs: list[NDArray[Any]] = self.session.run(None, feed)
        scores, history = self.score(self.k, outputs[0], np.stack([row[HISTORY] for row in rows]))
        batch_answers = answers(outputs[0])
        for i, row in enumerate(rows):
            row.update({value.name: output[i] for value, output in zip(self.info.outputs, outputs, strict=True)})
            row[HISTORY] = history[i]
            if self.is_last or scores[i] >= self.threshold:
                row.clear()
                row[LEFT] = {**batch_answers[i], "exit": self.k + 1, "mflops": self.mflops}
            else:
                for name in set(row) - self.needed - {HISTORY}:
                    del row[name]


if __name__ == "__main__":
    setup = Setup.from_environment()
    server = Server()
    for k in range(len(load_bundle(Path(setup.bundle)).manifest.stages)):
        server.append_worker(
            Stage,
            max_batch_size=setup.max_rows,
            max_wait_time=max(1, round(setup.wait_ms)),
            env=[{"LEAGUE_STAGE": str(k)}],
        )
    server.run()
