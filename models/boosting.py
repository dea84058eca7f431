"""Boosted ensembles of exits, and the gradient rescaling used to train them.

A boosted network is an additive model over its heads: the logits used at exit n are F_n = t_n F_(n-1) + f_n, so each
head learns to correct the heads before it (BoostNet, AAAI 2023). Training and inference use the same recursion.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

Rescaling = Literal["off", "coarsest", "all"]


def temperatures_per_exit(temperatures: float | Sequence[float], n_exits: int) -> tuple[float, ...]:
    """Expand a temperature setting to one value per exit.

    One value applies to every exit, two are interpolated linearly from the first exit to the last, and `n_exits` values
    are used as given. The first is never used: it would multiply F_0 = 0.

    Raises:
        ValueError: the number of values is not 1, 2 or `n_exits`.
    """
    values = [float(temperatures)] if isinstance(temperatures, (int, float)) else [float(t) for t in temperatures]
    if len(values) == n_exits:
        return tuple(values)
    if len(values) == 1:
        return tuple(values * n_exits)
    if len(values) == 2 and n_exits > 1:
        first, last = values
        return tuple(first + (last - first) * i / (n_exits - 1) for i in range(n_exits))
    raise ValueError(f"{len(values)} temperatures for {n_exits} exits: give 1, 2 (linear) or {n_exits}")


class Boosting(nn.Module):
    """F_n = t_n stop_gradient(F_(n-1)) + s_n f_n over a list of head logits (BoostNet, section 3).

    Args:
        temperatures: t_1..t_N (t_1 is unused). All zero gives a plain multi-exit network.
        stop_gradient: detach F_(n-1), so that loss n does not train earlier heads, as published; False: their ablation.
        scales: s_1..s_N, by default 1 as in training; `training.ensemble` fits other values afterwards.
        learned: t_2..t_N are parameters, initialised to these values and trained; each stays between 0 and 1.

    Raises:
        ValueError: the numbers of scales and temperatures differ, or a learned temperature is not between 0 and 1.
    """

    def __init__(
        self,
        temperatures: Sequence[float],
        stop_gradient: bool = True,
        scales: Sequence[float] | None = None,
        learned: bool = False,
    ) -> None:
        super().__init__()
        self.log_odds: nn.Parameter | None = None
        if learned and len(temperatures) > 1:
            if not all(0.0 < t < 1.0 for t in temperatures[1:]):
                raise ValueError(f"learned temperatures must start between 0 and 1, not at {list(temperatures)}")
            self.log_odds = nn.Parameter(torch.zeros(len(temperatures) - 1))
        self.temperatures = tuple(temperatures)
        self.scales = tuple(float(s) for s in scales) if scales is not None else (1.0,) * len(self.temperatures)
        if len(self.scales) != len(self.temperatures):
            raise ValueError(f"{len(self.scales)} scales for {len(self.temperatures)} exits: give one per exit")
        self.stop_gradient = stop_gradient

    @property
    def temperatures(self) -> tuple[float, ...]:
        """The present t_1..t_N. Learned ones can be set as well, and training continues from there."""
        if self.log_odds is None:
            return self._fixed
        return (self._fixed[0], *self.log_odds.detach().sigmoid().tolist())

    @temperatures.setter
    def temperatures(self, values: Sequence[float]) -> None:
        self._fixed = tuple(float(t) for t in values)
        if self.log_odds is not None:
            with torch.no_grad():
                self.log_odds.copy_(torch.tensor(self._fixed[1:]).logit())

    def fixed(self) -> "Boosting":
        """Return a copy with its temperatures as constants, for counting costs, staging and serving."""
        return Boosting(self.temperatures, self.stop_gradient, self.scales).train(self.training)

    def forward(self, head_logits: list[Tensor]) -> list[Tensor]:
        """Map N raw head logits [rows, classes] to the N ensembled logits of the same shape, float32."""
        # Always float32, also under autocast: rounded logits would tie and lose their ranking.
        first, *later = (
            logits.float() if scale == 1.0 else scale * logits.float()
            for scale, logits in zip(self.scales, head_logits, strict=True)
        )
        ensembled = [first]
        weights: Sequence[float | Tensor] = self._fixed[1:]
        if self.log_odds is not None:
            weights = self.log_odds.sigmoid().unbind()
        for temperature, logits in zip(weights, later, strict=True):
            if self.log_odds is None and temperature == 0.0:
                ensembled.append(logits)
                continue
            previous = ensembled[-1].detach() if self.stop_gradient and self.training else ensembled[-1]
            ensembled.append(temperature * previous + logits)
        return ensembled


class _RescaleGradient(torch.autograd.Function):
    """Identity forward, multiplication by a constant backward."""

    @staticmethod
    def forward(x: Tensor, factor: float) -> Tensor:
        return x.view_as(x)  # a view, because torch.compile has left the bare input unscaled (pytorch #102970)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


class _RescaleBothWays(_RescaleGradient):
    """Also supports forward-mode differentiation, consistent with `backward`; torch.compile does not accept it."""

    @staticmethod
    def jvp(ctx: Any, change: Tensor, _: None) -> Tensor:
        scaled: Tensor = change * ctx.factor
        return scaled


def rescale_gradient(x: Tensor, factor: float) -> Tensor:
    """Return `x` unchanged, bit for bit, with its gradient multiplied by `factor` (IMTA, ICCV 2019)."""
    function = _RescaleGradient if torch.compiler.is_compiling() else _RescaleBothWays
    rescaled: Tensor = function.apply(x, factor)
    return rescaled
