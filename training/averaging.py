"""A running average of the weights, which is evaluated and exported instead of the weights of the last step."""

from typing import Any

from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class Averaging:
    """Exponential moving average of a network's weights and BatchNorm statistics.

    Args:
        network: the network that is trained.
        decay: weight of the previous average at every step; 0 keeps no average, and `evaluated` is the network itself.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self._network = network
        self._average: AveragedModel | None = None
        if decay > 0:
            self._average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)

    @property
    def evaluated(self) -> nn.Module:
        """The network to evaluate and to export."""
        return self._network if self._average is None else self._average.module

    def update(self) -> None:
        """Add the weights to the average; call it after every step."""
        if self._average is not None:
            self._average.update_parameters(self._network)

    def state(self) -> dict[str, Any]:
        """For a checkpoint: `network` is evaluated; with an average, `trained` has the weights to resume from."""
        if self._average is None:
            return {"network": self._network.state_dict()}
        average = {"network": self.evaluated.state_dict(), "n_averaged": int(self._average.n_averaged)}
        return {**average, "trained": self._network.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore the average from a checkpoint; the network must have loaded the checkpoint's `network` already."""
        if self._average is not None:
            self._average.module.load_state_dict(state["network"])
            self._average.n_averaged.fill_(state["n_averaged"])
            self._network.load_state_dict(state["trained"])
