"""The values that rows keep in their slots on the device.

Every value that a later stage reads has one tensor [slots, ...], its store; a row has the same slot in all of them. A
stage gathers its inputs by the rows' slots and scatters its outputs to the same slots. Regrouping rows therefore copies
nothing, and a value that a stage does not read stays in place.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from service.runners.torch_cuda.kernels import VECTOR_BYTES, Kernels, lies_in_runs


class Values:
    """The stores of values, by name.

    Stores of maps are [slots, height, width, channels]. A row is then one run of memory, whatever a device's gather
    does with strides, and gathered maps are channels-last without a conversion.

    Args:
        examples: of every value, [rows, ...]; their shape, type and device are used.
        kernels: the custom kernels of the device; `move` moves several values at once.
        rooms: for how many channels to leave room when a map is gathered by `move`, by its name; see `growing`.
    """

    def __init__(
        self,
        examples: Mapping[str, Tensor],
        n_slots: int,
        kernels: Kernels | None = None,
        rooms: Mapping[str, int] | None = None,
    ) -> None:
        self._kernels, self._rooms = kernels or Kernels(), rooms or {}
        self._stores = {
            name: torch.zeros(
                (1 + n_slots, *_channels_last(example).shape[1:]), dtype=example.dtype, device=example.device
            )
            for name, example in examples.items()
        }

    def row_bytes(self, name: str) -> int:
        return self._stores[name][0].nbytes

    def __contains__(self, name: str) -> bool:
        return name in self._stores

    def gather(self, names: Sequence[str], slots: Tensor) -> list[Tensor]:
        """Return values of the rows in `slots` (int64 [rows], on the device), in the order of `names`."""
        stores = {name: self._stores[name] for name in names}
        together = [name for name in stores if self._moves(stores[name])]
        rows = {name: self._empty_rows(name, len(slots)) for name in together}
        if together:
            self._kernels.move(slots, [(stores[name], rows[name]) for name in together], out=True)
        alone = {name: store.index_select(0, slots) for name, store in stores.items() if name not in rows}
        return [_channels_second((rows if name in rows else alone)[name]) for name in names]

    def scatter(self, values: Mapping[str, Tensor], slots: Tensor) -> None:
        """Write values of the rows in `slots`, which are distinct except for `SCRATCH`."""
        together = []
        for name, value in values.items():
            store, rows = self._stores[name], _channels_last(value)
            if self._moves(store) and self._moves(rows) and rows.dtype == store.dtype:
                together.append((store, rows))
            else:
                store.index_copy_(0, slots, rows)
        if together:
            self._kernels.move(slots, together, out=False)

    def _empty_rows(self, name: str, n_rows: int) -> Tensor:
        store = self._stores[name]
        *sides, n_channels = store.shape[1:]
        room = max(n_channels, self._rooms.get(name, 0))
        if any(n * store.element_size() % VECTOR_BYTES for n in (n_channels, room)):
            room = n_channels
        return store.new_empty((n_rows, *sides, room))[..., :n_channels]

    def _moves(self, rows: Tensor) -> bool:
        return "move" in self._kernels and lies_in_runs(rows)


def _channels_last(value: Tensor) -> Tensor:
    return value.permute(0, 2, 3, 1) if value.ndim == 4 else value


def _channels_second(value: Tensor) -> Tensor:
    return value.permute(0, 3, 1, 2) if value.ndim == 4 else value
