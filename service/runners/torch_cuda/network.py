"""From a bundle to stages that run fast on a device: the network is rebuilt, cut into stages, and lowered.

Lowering folds BatchNorm into the convolution before it, joins bias and ReLU, makes maps and weights channels-last, and
puts convolutions in half precision. Linear layers, and with them logits, their ensemble and scores, stay in float32. In
float16 on a GPU, maps are padded to multiples of eight channels, and custom kernels replace torch's where they exist.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from models.bundle import WEIGHTS, Bundle
from models.normalise import Normalise
from models.registry import ARCHITECTURES, build_network
from models.staging import Stage, split
from service.runners.base import RunnerError
from service.runners.torch_cuda.exact_images import use_exact_images, use_exact_weights
from service.runners.torch_cuda.growing import grow_in_place
from service.runners.torch_cuda.joined import BiasRelu, ConvRelu, can_join, can_multiply
from service.runners.torch_cuda.kernels import Kernels, Ways
from service.runners.torch_cuda.replaced import replace_maps
from service.runners.torch_cuda.rounding import rounded
from service.runners.torch_cuda.small_conv import use_small_convs
from service.runners.torch_cuda.widening import widen

CHANNELS = 8  # in half precision 16 bytes, the unit that tensor cores and the custom kernels read
POOLING = (nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Flatten)
Join = Callable[[nn.Conv2d, Any], nn.Module | None]  # None: it cannot join them


def load_network(bundle: Bundle) -> nn.Module:
    """Rebuild a bundle's network with its weights, float32, in evaluation mode, on the CPU.

    Raises:
        RunnerError: the architecture is not a built-in one, or the weights or the manifest do not fit the network.
    """
    manifest = bundle.manifest
    if manifest.architecture not in ARCHITECTURES:
        raise RunnerError(
            f"the runner torch-cuda can rebuild only {', '.join(ARCHITECTURES)}, and this bundle's network is "
            f"{manifest.architecture!r}: choose the runner onnx, or auto"
        )
    try:
        network = build_network(manifest.architecture, manifest.arguments)
        network.load_state_dict(load_file(bundle.path / WEIGHTS))  # copies weights stored in half precision to float32
        built: Any = network.n_exits, network.config.n_classes  # type: ignore[union-attr]
        if built != (len(manifest.exits), len(manifest.class_names)):
            raise ValueError(f"it has {built[0]} exits and {built[1]} classes, the manifest other numbers")
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise RunnerError(
            f"{bundle.path}: the weights do not fit the network of the manifest ({error}): export the bundle again, or "
            "choose the runner onnx"
        ) from error
    return network.eval()


def cut(network: nn.Module, image_shape: Sequence[int], mean: Sequence[float], std: Sequence[float]) -> list[Stage]:
    """Split a network into stages; the first takes uint8 images [rows, height, width, 3]. See `staging.split`."""
    example = torch.randint(0, 256, (2, *image_shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return split(network, example, Normalise(mean, std)).stages


@torch.no_grad()
def lower(
    stages: Sequence[Stage],
    device: torch.device,
    dtype: torch.dtype,
    bias_relu: BiasRelu | None = None,
    kernels: Kernels | None = None,
    ways: Ways | None = None,
) -> list[Stage]:
    """Lower stages for a device, in place; returns them.

    Args:
        bias_relu: adds a bias and applies ReLU, for convolutions without a fused kernel; None: torch's operations do.
        kernels: the custom kernels of the device, for float16; by default none.
        ways: the optimisations to use; by default none.
    """
    ways, kernels = ways or Ways.none(), kernels or Kernels()
    multiply = ways.product and can_multiply(device, dtype)
    exact = ways.exact and dtype != torch.float32

    def join(conv: nn.Conv2d, _: Any) -> nn.Module | None:
        return ConvRelu(conv, bias_relu, ways.fused, multiply) if can_join(conv) else None

    for stage in stages:
        _merge(stage, nn.BatchNorm2d, fuse_conv_bn_eval)
        _merge(stage, nn.ReLU, join)
        if exact:
            use_exact_images(stage, dtype, kernels)
        if dtype != torch.float32:
            _narrow(stage, dtype)
    if ways.widened or exact:
        widen(stages, CHANNELS if ways.widened else 1, dtype if exact else torch.float32)
    for stage in stages:
        use_exact_weights(stage, dtype)
        if exact:
            _round_weights(stage, dtype)
        replace_maps(stage, kernels)
        for module in stage.modules():
            if isinstance(module, nn.Conv2d):
                # Module.to accepts memory formats, but its annotations do not.
                module.to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        stage.to(device)
    if ways.grown and "concat" in kernels:
        grow_in_place(stages)
    if ways.small and kernels.compile_kernel is not None:
        use_small_convs(stages, kernels.compile_kernel)
    return list(stages)


def _merge(stage: Stage, kind: type[nn.Module], join: Join) -> None:
    """Replace each convolution and the module of type `kind` that alone reads it by what `join` makes of the two."""
    modules = dict(stage.named_modules())
    calls = Counter(node.target for node in stage.graph.nodes if node.op == "call_module")
    for node in list(stage.graph.nodes):
        if node.op != "call_module" or not isinstance(modules[node.target], kind):
            continue
        source = node.args[0]
        is_own = source.op == "call_module" and len(source.users) == 1 and calls[source.target] == 1
        conv = modules[source.target] if is_own else None
        joined = join(conv, modules[node.target]) if isinstance(conv, nn.Conv2d) else None
        if joined is not None:
            stage.set_submodule(source.target, joined)
            node.replace_all_uses_with(source)
            stage.graph.erase_node(node)
    stage.delete_all_unused_submodules()
    stage.recompile()


def _round_weights(stage: Stage, dtype: torch.dtype) -> None:
    """Round weights to numbers of `dtype`, so that the conversion to `dtype` changes nothing."""
    for module in stage.modules():
        if isinstance(module, nn.Conv2d):
            module.weight = nn.Parameter(rounded(module.weight.detach(), dtype), requires_grad=False)


def _narrow(stage: Stage, dtype: torch.dtype) -> None:
    """Convert normalised images to `dtype`, and maps back to float32 before a linear layer, or before the pooling in
    front of it."""
    modules = dict(stage.named_modules())
    graph: fx.Graph = stage.graph
    for node in list(graph.nodes):
        if node.op != "call_module":
            continue
        if isinstance(modules[node.target], Normalise):
            with graph.inserting_after(node):
                narrow = graph.call_method("to", (node, dtype))
            node.replace_all_uses_with(narrow, delete_user_cb=lambda user, narrow=narrow: user is not narrow)
        elif isinstance(modules[node.target], nn.Linear):
            reader, source = node, node.args[0]
            while len(source.users) == 1 and _is_pooled(source, modules):
                reader, source = source, source.args[0]
            with graph.inserting_before(reader):
                wide = graph.call_method("float", (source,))
            reader.replace_input_with(source, wide)
    stage.recompile()


def _is_pooled(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether a node is average pooling or flattening, as before a linear layer."""
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], POOLING)
    return node.target in ("flatten", torch.flatten)
