"""Images in half precision without rounding error, by folding their normalisation into the convolution that reads them.

Rounding normalised pixels to float16 was the largest error of all, and no later layer can undo it. But grey levels
minus a whole number are exact, in float16 and in bfloat16, and the weights can do the scaling. The rest of the shift
applies only inside the image, not to the zero padding around it, so it is the weight of an extra channel of ones.
"""

import copy

import torch
from torch import Tensor, fx, nn

from models.normalise import Normalise
from models.staging import Stage
from service.runners.torch_cuda.joined import ConvRelu
from service.runners.torch_cuda.kernels import CHANNELS_EACH, GREY_LEVEL, Kernels, centred


class ExactImages(nn.Module):
    """From uint8 [rows, height, width, 3] to `dtype` [rows, CHANNELS_EACH x n_copies, height, width]; see the module.

    Args:
        levels: float32 [3], the whole number of grey levels to subtract from each channel.

    Attributes:
        n_copies: how often an image is repeated along the channels, 1 or 2.
    """

    def __init__(self, levels: Tensor, dtype: torch.dtype, kernels: Kernels) -> None:
        super().__init__()
        self.levels: Tensor
        self.register_buffer("levels", levels)
        self.n_copies, self._dtype, self._kernels = 1, dtype, kernels

    def forward(self, images: Tensor) -> Tensor:
        if self._dtype == torch.float16 and not torch.compiler.is_compiling():
            return self._kernels.centre(images, self.levels, self.n_copies)
        return centred(images, self.levels, self.n_copies, self._dtype)


def use_exact_images(stage: Stage, dtype: torch.dtype, kernels: Kernels) -> None:
    """If only convolutions read the normalised images of a stage, make them read exact images instead."""
    for node in list(stage.graph.nodes):
        normalise = stage.get_submodule(str(node.target)) if node.op == "call_module" else None
        if not isinstance(normalise, Normalise) or not all(
            _is_suited(_convolution(stage, user)) for user in node.users
        ):
            continue
        levels = (-normalise.shift / normalise.scale).round().flatten()
        for user in node.users:
            _read_exactly(stage, user, normalise, levels)
        stage.set_submodule(str(node.target), ExactImages(levels, dtype, kernels))
    stage.delete_all_unused_submodules()
    stage.recompile()


def use_exact_weights(stage: Stage, dtype: torch.dtype) -> None:
    """If only 3 x 3 convolutions read exact images, repeat the images along the channels: the second copy is multiplied
    by what the weights lose when rounded to `dtype`.

    This costs nothing, as these convolutions take eight channels anyway; for others, cuDNN has kernels for four.
    """
    for node in stage.graph.nodes:
        images = stage.get_submodule(str(node.target)) if node.op == "call_module" else None
        if not isinstance(images, ExactImages):
            continue
        readers = [_convolution(stage, user) for user in node.users]
        if all(isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3) for conv in readers):
            images.n_copies = 2
            for conv in readers:
                assert isinstance(conv, nn.Conv2d)
                rounded = conv.weight.to(dtype).to(conv.weight.dtype)
                conv.weight = nn.Parameter(torch.cat([rounded, conv.weight - rounded], dim=1), requires_grad=False)
                conv.in_channels *= 2


def _convolution(stage: Stage, node: fx.Node) -> nn.Module | None:
    """The module that a node calls; of a `ConvRelu`, its convolution."""
    module = stage.get_submodule(str(node.target)) if node.op == "call_module" else None
    return module.conv if isinstance(module, ConvRelu) else module


def _is_suited(conv: nn.Module | None) -> bool:
    """Whether this is an ungrouped convolution with zero padding."""
    return isinstance(conv, nn.Conv2d) and conv.groups == 1 and conv.padding_mode == "zeros"


def _read_exactly(stage: Stage, node: fx.Node, normalise: Normalise, levels: Tensor) -> None:
    """Replace the convolution of a node that reads normalised images by one that reads exact images."""
    conv = copy.deepcopy(_convolution(stage, node))
    assert isinstance(conv, nn.Conv2d)
    conv.in_channels = CHANNELS_EACH
    weight = _folded(conv.weight, normalise.scale.flatten(), normalise.shift.flatten(), levels)
    conv.weight = nn.Parameter(weight, requires_grad=False)
    module = stage.get_submodule(str(node.target))
    name = f"exact_{node.name}"  # a new name: other nodes may call the old module
    stage.add_submodule(name, module.around(conv) if isinstance(module, ConvRelu) else conv)
    node.target = name


def _folded(weight: Tensor, scale: Tensor, shift: Tensor, levels: Tensor) -> Tensor:
    """Weights for exact images, [outputs, CHANNELS_EACH, ...], from those for normalised ones. With the exact image
    e = (x - levels) GREY_LEVEL: x scale + shift = e scale / GREY_LEVEL + (shift + levels scale)."""
    by_channel = (1, 3, *[1] * (weight.ndim - 2))
    left = (weight * (shift + levels * scale).view(by_channel)).sum(dim=1, keepdim=True)
    return torch.cat([weight * (scale / GREY_LEVEL).view(by_channel), left], dim=1)
