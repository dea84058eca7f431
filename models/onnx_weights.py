"""Opens a bundle's stages with ONNX Runtime. No torch here.

A stage's ONNX file contains only its graph. Its weights are external data: byte ranges of a safetensors file in the
bundle's folder, which all stages share.
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
    """Open one stage of a bundle; its ONNX file may also contain its weights.

    Args:
        bundle_path: the bundle's folder.
        stage_file: the stage's path within the bundle, as in the manifest.
        providers: ONNX Runtime execution providers, in order of preference.
        session_options: thread counts and the like. Only the folder of the weights is set in it, so that stages of one
            bundle may share it, but not two bundles.
        graph: opened in place of the file's contents, with the bundle's weights.

    Raises:
        StageLoadError: a file is missing, or ONNX Runtime does not accept the graph or the folder's name.
    """
    options = session_options if session_options is not None else ort.SessionOptions()
    folder, path = str(bundle_path.resolve()), bundle_path / stage_file
    try:
        folder.encode()
    except UnicodeEncodeError:  # ONNX Runtime's own error would not name the cause
        raise StageLoadError(f"{path}: ONNX Runtime cannot open a folder whose name is not UTF-8; rename it") from None
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    try:
        # As bytes: given a path, the runtime would look for weights beside the stage, not in a parent folder.
        return ort.InferenceSession(graph or path.read_bytes(), options, providers=list(providers))
    except OSError as error:
        raise StageLoadError(f"{path}: {error.strerror}; restore the bundle or export it again") from error
    except Exception as error:  # ONNX Runtime raises one type per status, with no common base except Exception
        raise StageLoadError(f"{path}: {error}; export the bundle again with `python -m training export`") from error
