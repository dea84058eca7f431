"""Makes a calibrated run with gates from an evaluated run; it is then evaluated and exported as any other."""

import shutil
from typing import Any

import torch
from torch import nn

from models.scores import score_exits
from training.calibration import CalibrationRecord, load_trained, outputs_of, round_to_half
from training.checkpoint import RunError, RunFolder
from training.evaluation import Evaluation, cost_of
from training.image_set import ImageSet
from training.jei.alternation import alternate
from training.jei.gates import Shown
from training.jei.heads import Heads
from training.jei.inputs import HeadRows, head_rows
from training.jei.record import SCORE, GateRecord, Settings
from training.objectives import boosting_of


def gate_run(
    source: RunFolder,
    target: RunFolder,
    images: ImageSet,
    settings: Settings,
    passes: int,
    device: torch.device,
) -> tuple[GateRecord, tuple[Shown, Shown]]:
    """Train gates, and with them the heads' last layers, on the run `source`; write the result to `target`.

    Args:
        passes: over the training images, see `head_rows`.

    Returns:
        the gates, and the heads' outputs for held-out and for test images.

    Raises:
        RunError, DataError: the source is not evaluated, has only one exit, has gates already, or was trained on other
            images; or the target holds a run.
    """
    record = CalibrationRecord.load(source)
    if GateRecord.load(source) is not None:  # before the next check, whose advice to evaluate it would not help
        raise RunError(f"{source.path}: already has gates; give the run it was made from, which has none")
    Evaluation.load(source, record)  # the report needs it: fail before training, not after
    if target.description.exists():
        raise RunError(f"{target.path}: holds a run already; give another folder")
    costs = cost_of(source, record).executed
    if len(costs) == 1:
        raise RunError(f"{source.path}: has only one exit, but a gate needs a later exit to go on to; give another run")
    rows = head_rows(source, record, images, device, passes, settings.seed)
    network, _ = load_trained(source, len(record.class_names), record.half_weights, record.ensemble)
    heads = Heads([head.classifier for head in network.heads], boosting_of(network))  # type: ignore[union-attr]
    made = alternate(rows, heads, [cost / costs[-1] for cost in costs], settings)
    gates = GateRecord(
        settings=settings,
        source=source.path.resolve().name,
        gates=made.gates.weights.tolist(),
        gates_by_fold=made.gates.by_fold.tolist(),
        fold=made.gates.fold.tolist(),
        ensemble=record.ensemble,
        turns=made.turns,
        kept=made.kept,
    )
    _write(source, target, made.heads, gates)
    if record.half_weights:
        round_to_half(made.heads)
    _calibrate(target, record, rows, made.heads, gates)
    return gates, (made.heads.show(rows.heldout)[0], made.heads.show(rows.test)[0])


def _write(source: RunFolder, target: RunFolder, heads: Heads, gates: GateRecord) -> None:
    """Write the files of a trained run. run.json is written last: without it, the folder does not count as a run."""
    target.path.mkdir(parents=True, exist_ok=True)
    state: dict[str, Any] = source.load_checkpoint()
    for i, layer in enumerate(heads.layers):
        for name, value in layer.state_dict().items():
            state["network"][f"heads.{i}.classifier.{name}"] = value
    target.save_checkpoint(state)
    gates.save(target)
    shutil.copyfile(source.split, target.split)
    shutil.copyfile(source.description, target.description)


def _calibrate(
    target: RunFolder, record: CalibrationRecord, rows: HeadRows, heads: nn.Module, gates: GateRecord
) -> None:
    """Do as `training.calibration.calibrate` does, but from the heads' stored inputs, without running the network."""
    with torch.no_grad():
        heldout, test = (list(heads(part.inputs)) for part in (rows.heldout, rows.test))
    outputs = outputs_of(heldout, rows.heldout.labels)
    outputs.scored(SCORE, gates.heldout_scores([x.numpy() for x in heldout])).save(target.heldout)
    scores = score_exits(gates.score(), [x.numpy() for x in test])
    outputs_of(test, rows.test.labels).scored(SCORE, scores).save(target.test)
    record = record.model_copy(update={"scores": [*outputs.scores, SCORE]})
    target.calibration.write_text(record.model_dump_json(indent=2) + "\n")
