"""Stage graphs and the one file of weights they share, opened with ONNX Runtime. No torch here.

A stage's ONNX file holds its graph alone; its weights are external data: byte ranges of a safetensors file in the
bundle's folder, of which every stage reads its part.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxruntime as ort


class StageLoadError(RuntimeError):
    """A stage cannot be opened; the message names the file, the reason and the fix."""


def load_stage_session(
    bundle_path: Path,
    stage_file: str,
    providers: Sequence[str | tuple[str, dict[str, Any]]] = ("CPUExecutionProvider",),
    session_options: ort.SessionOptions | None = None,
    graph: bytes | None = None,
) -> ort.InferenceSession:
    """Open one stage of a bundle; a self-contained ONNX file opens just as well.

    Args:
        bundle_path: the bundle's folder.
        stage_file: the stage's path within it, as the manifest has it.
        providers: ONNX Runtime execution providers, in order of preference.
        session_options: thread counts and the like; left as it was but for where the weights are. Options may be
            shared by the stages of one bundle, not by two bundles.
        graph: what to open in the place of the file's contents; its weights are the bundle's.

    Raises:
        StageLoadError: a file is missing, or ONNX Runtime refuses the graph or the folder's name.
    """
    options = session_options if session_options is not None else ort.SessionOptions()
    folder, path = str(bundle_path.resolve()), bundle_path / stage_file
    try:
        folder.encode()
    except UnicodeEncodeError:  # the runtime would say no more than that it takes no such argument
        raise StageLoadError(f"{path}: ONNX Runtime opens no folder whose name is not UTF-8; rename it") from None
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    try:
        # As bytes: given a path, the runtime would look for the weights beside the stage, in no folder above.
        return ort.InferenceSession(graph or path.read_bytes(), options, providers=list(providers))
    except OSError as error:
        raise StageLoadError(f"{path}: {error.strerror}; restore the bundle or export it again") from error
    except Exception as error:  # ONNX Runtime raises one type per status, with no common base but Exception
        raise StageLoadError(f"{path}: {error}; export the bundle again with `python -m training export`") from error
