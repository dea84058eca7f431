"""Lets maps that grow layer by layer, as in a dense network, grow in place.

Each layer concatenates its maps to those of all layers before it, which would copy those each time. Instead, the first
map of such a chain is allocated with room for the last, and each layer writes its channels behind those already there.
The last map of a chain is laid out as usual. All others have gaps between their pixels, which only matrix products can
read: a map that anything else reads is not part of a chain.
"""

from collections import Counter
from collections.abc import Sequence

from torch import fx

from models.staging import Stage
from service.runners.torch_cuda.joined import ALIGNED, ConvRelu
from service.runners.torch_cuda.replaced import N_CHANNELS, Concat


def grow_in_place(stages: Sequence[Stage]) -> None:
    """Find the chains of growing maps in lowered stages, and make them grow in place.

    A value of an earlier stage can start a chain if no other stage reads it: it is then gathered with room.
    """
    readers = Counter(name for stage in stages for name in stage.inputs)
    for stage in stages:
        grown: set[fx.Node] = set()
        for node in stage.graph.nodes:
            if node in grown or _concat(node, stage) is None:
                continue
            chain = [node]
            while (following := _grown_from(chain[-1], stage)) is not None:
                chain.append(following)
            grown.update(chain)
            room, first = chain[-1].meta.get(N_CHANNELS), _first(node)
            is_carried = first.op == "placeholder" and readers[str(first.target)] == 1
            is_carried = is_carried and _grown_from(first, stage) is node
            if room is None or room % ALIGNED or (len(chain) == 1 and not is_carried):
                continue
            for i, each in enumerate(chain):
                concat = _concat(each, stage)
                assert concat is not None
                concat.room, concat.appends = room, i > 0 or is_carried


def rooms(stages: Sequence[Stage]) -> dict[str, int]:
    """For how many channels to leave room when values are gathered, by name."""
    found = {}
    for stage in stages:
        for node in stage.graph.nodes:
            concat = _concat(node, stage)
            if concat is not None and concat.appends and _first(node).op == "placeholder":
                found[str(_first(node).target)] = concat.room
    return found


def _first(concat: fx.Node) -> fx.Node:
    maps = concat.args[0]
    assert isinstance(maps, (list, tuple))
    assert isinstance(maps[0], fx.Node)
    return maps[0]


def _grown_from(node: fx.Node, stage: Stage) -> fx.Node | None:
    """The concatenation that has this map as its first, if all its other readers are matrix products."""
    following = [user for user in node.users if _concat(user, stage) is not None]
    others = [user for user in node.users if user not in following]
    if len(following) != 1 or not all(_is_product(user, stage) for user in others):
        return None
    maps = following[0].args[0]
    assert isinstance(maps, (list, tuple))
    return following[0] if [i for i, source in enumerate(maps) if source is node] == [0] else None


def _concat(node: fx.Node, stage: Stage) -> Concat | None:
    module = stage.get_submodule(str(node.target)) if node.op == "call_module" else None
    return module if isinstance(module, Concat) else None


def _is_product(node: fx.Node, stage: Stage) -> bool:
    module = stage.get_submodule(str(node.target)) if node.op == "call_module" else None
    return isinstance(module, ConvRelu) and module.is_product
