"""Maps that grow layer by layer, as a dense network's do, stay where they are.

Every layer puts its maps beside those of all layers before it, which are copied each time. So the first of such a row
of maps gets room for the last, and every layer writes behind what is there. The last one is as if it had been put
together at once. All others lie with gaps between their pixels, which matrix products read as they are: so a map that
anything else reads is none of them.
"""

from collections import Counter
from collections.abc import Sequence

from torch import fx

from models.staging import Stage
from service.runners.torch_cuda.joined import ALIGNED, ConvRelu
from service.runners.torch_cuda.replaced import N_CHANNELS, Concat


def grow_in_place(stages: Sequence[Stage]) -> None:
    """Find the rows of maps in lowered stages, and have them grow.

    What an earlier stage has left is the first of a row if no other stage reads it: it is gathered with room.
    """
    readers = Counter(name for stage in stages for name in stage.inputs)
    for stage in stages:
        grown: set[fx.Node] = set()
        for node in stage.graph.nodes:
            if node in grown or _concat(node, stage) is None:
                continue
            row = [node]
            while (following := _grown_from(row[-1], stage)) is not None:
                row.append(following)
            grown.update(row)
            room, first = row[-1].meta.get(N_CHANNELS), _first(node)
            is_left = first.op == "placeholder" and readers[str(first.target)] == 1
            is_left = is_left and _grown_from(first, stage) is node
            if room is None or room % ALIGNED or (len(row) == 1 and not is_left):
                continue
            for i, each in enumerate(row):
                concat = _concat(each, stage)
                assert concat is not None
                concat.room, concat.appends = room, i > 0 or is_left


def rooms(stages: Sequence[Stage]) -> dict[str, int]:
    """Channels that values are to be gathered with room for, by name."""
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
    """What puts maps behind this one, if all else that reads it are products."""
    following = [user for user in node.users if _concat(user, stage) is not None]
    others = [user for user in node.users if user not in following]
    if len(following) != 1 or not all(_is_product(user, stage) for user in others):
        return None
    maps = following[0].args[0]
    assert isinstance(maps, (list, tuple))
    return following[0] if [i for i, one in enumerate(maps) if one is node] == [0] else None


def _concat(node: fx.Node, stage: Stage) -> Concat | None:
    module = stage.get_submodule(str(node.target)) if node.op == "call_module" else None
    return module if isinstance(module, Concat) else None


def _is_product(node: fx.Node, stage: Stage) -> bool:
    module = stage.get_submodule(str(node.target)) if node.op == "call_module" else None
    return isinstance(module, ConvRelu) and module.is_product
