"""Joins a bundle's stage graphs into one ONNX graph, as a server without early exits would serve it."""

from pathlib import Path

import onnx
from onnx import compose

from models.bundle import Bundle


def write_whole_graph(bundle: Bundle, path: Path) -> None:
    """Chain a bundle's stages and write one self-contained graph: uint8 images [rows, H, W, 3] -> the last logits.

    It has the nodes and weights that the service runs, but the runtime can optimise it as one network.
    """
    whole: onnx.ModelProto | None = None
    for k, stage in enumerate(bundle.manifest.stages):
        # Stages may share names of initializers, so these get a prefix; values passed between stages keep their names.
        model = onnx.load(str(bundle.path / stage.file), load_external_data=False)
        onnx.load_external_data_for_model(model, str(bundle.path))
        model = compose.add_prefix(model, f"s{k}_", rename_inputs=False, rename_outputs=False)
        if whole is None:
            whole = model
            continue
        given = {value.name for value in whole.graph.output}
        shared = [(value.name, value.name) for value in model.graph.input if value.name in given]
        read_later = [value.name for value in whole.graph.output]
        whole = compose.merge_models(whole, model, io_map=shared, outputs=_without_twins(read_later, model))
    assert whole is not None
    last = bundle.manifest.stages[-1].outputs[0].name
    (output,) = [value for value in whole.graph.output if value.name == last]
    del whole.graph.output[:]
    whole.graph.output.append(output)
    onnx.checker.check_model(whole)
    path.write_bytes(whole.SerializeToString())


def _without_twins(names: list[str], model: onnx.ModelProto) -> list[str]:
    own = [value.name for value in model.graph.output]
    return [name for name in names if name not in own] + own
