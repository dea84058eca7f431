"""Small networks with exits, each hard to stage in its own way. Weights are random; only the structure matters."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv(n_in: int, n_out: int, stride: int = 1, inplace: bool = False) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(n_in, n_out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU(inplace)
    )


def head(n_in: int, n_classes: int = 5) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n_in, n_classes))


def randomise_statistics(network: nn.Module, seed: int = 0) -> nn.Module:
    """Give batch normalisation random statistics and weights, since new layers are the identity."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None and module.running_var is not None:
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.normal_(module.bias, 0, 0.1, generator=generator)
    return network


class TwoExits(nn.Module):
    """Two convolutions with one head each, connected by `between(first map, images)`."""

    def __init__(self, between: Callable[[Tensor, Tensor], Tensor] = lambda x, images: x, n_between: int = 4) -> None:
        super().__init__()
        self.between = between
        self.first, self.second = conv(3, 4), conv(n_between, 6)
        self.head_1, self.head_2 = head(4), head(6)

    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.first(images)
        logits_1 = self.head_1(x)
        return [logits_1, self.head_2(self.second(self.between(x, images)))]


class InPlace(nn.Module):
    """Modifies maps in place that are read before or after, and images: by modules, functions, operators, methods."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.deeper = conv(4, 4, inplace=True)
        self.head_1, self.head_2, self.head_3 = head(4), head(4), head(4)

    def forward(self, images: Tensor) -> list[Tensor]:
        images -= 0.5
        x = self.norm(self.stem(images))
        before = x.sigmoid()
        self.relu(x)  # the result is unused: x is modified in place
        first = self.head_1(x)
        y = self.deeper(x)
        y += x
        second = self.head_2(F.relu(y, True))
        z = self.deeper(y)
        z.mul_(0.5).add_(before)
        self.relu(input=z)  # the same module again
        z += torch.empty_like(z).fill_(0.25)
        return [first, second, self.head_3(z + F.leaky_relu_(y, 0.2))]


class Shapes(nn.Module):
    """Builds tensors from the sizes, devices and types of maps that an exit does not otherwise need."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse, self.late = conv(3, 4), conv(3, 4, 2), conv(4, 4)
        self.linear_1, self.linear_2 = nn.Linear(4, 5), nn.Linear(4 * 8 * 8, 5)
        self.register_buffer("grid", torch.linspace(0, 1, 8).reshape(1, 1, 8, 1))

    def forward(self, images: Tensor, gain: float = 2.0, extra: Tensor | None = None) -> list[Tensor]:
        if extra is not None:
            images = images + extra
        fine, coarse = self.fine(images), self.coarse(images)
        n_rows, n_channels = fine.shape[:2]
        pooled = coarse.mean((2, 3)) * gain
        ones = coarse.new_ones(n_rows, n_channels).to(fine.device, fine.dtype)
        first = self.linear_1((pooled + ones).view(fine.size(0), -1))
        up = F.interpolate(coarse[..., : fine.shape[-1] // 2, :] + self.grid.mean(), size=fine.shape[2:])
        second = self.linear_2((self.late(up + fine) * self.grid + torch.arange(8.0)).reshape(n_rows, -1))
        return [first, second + first.new_zeros(first.shape)]


class Chunks(nn.Module):
    """Splits a map: one half is read by the first exit, the other by the second. Exits share layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.shared, self.head = conv(3, 4), conv(2, 2), head(2)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        left, right = self.stem(images).chunk(2, dim=1)
        first = self.head(self.shared(left))
        return first, 0.5 * first + self.head(self.shared(right))


class RandomNetwork(nn.Module):
    """A random graph of operations over maps of one shape, with exits along the way.

    Args:
        program: (operation, first operand, second operand), operands counted back from the last map made.
        exits: numbers of operations after which an exit reads the last map.
    """

    def __init__(self, program: list[tuple[str, int, int]], exits: list[int]) -> None:
        super().__init__()
        self.program, self.exits = program, exits
        self.layers = nn.ModuleList(conv(3, 3, inplace=index % 2 == 1) for index in range(len(program)))
        self.heads = nn.ModuleList(head(3) for _ in exits)

    def forward(self, images: Tensor) -> list[Tensor]:
        maps, logits = [images], list[Tensor]()
        for index, (operation, a, b) in enumerate(self.program):
            x, y = maps[-1 - a % len(maps)], maps[-1 - b % len(maps)]
            if operation == "conv":
                maps.append(self.layers[index](x))
            elif operation == "add":
                maps.append(x + y)
            elif operation == "add in place":
                x += y * 0.5
                maps.append(x)
            elif operation == "relu in place":
                maps.append(F.relu(x, inplace=True))
            elif operation == "halves":
                left, middle, right = torch.split(x, 1, dim=1)
                maps.append(torch.cat([right, left, middle], dim=1))
            for number, after in enumerate(self.exits):
                if after == index + 1:
                    logits.append(self.heads[number](maps[-1]))
        return logits
