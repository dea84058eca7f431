"""Maps that grow layer by layer, as a dense network's do, stay where they are.

Every layer puts its maps beside those of all layers before it, which are copied each time. So the first of such a row
of maps gets room for the last, and every layer writes behind what is there. The last one is as if it had been put
together at once. All others lie with gaps between their pixels, which matrix products read as they are: so a map that
anything else reads is none of them.
"""

from torch import fx

from models.staging import Stage
from service.runners.torch_cuda.joined import ConvRelu
from service.runners.torch_cuda.replaced import N_CHANNELS, Concat


def grow_in_place(stage: Stage) -> None:
    """Find the rows of maps in a stage, and have them grow."""
    grown: set[fx.Node] = set()
    for node in stage.graph.nodes:
        if node in grown or _concat(node, stage) is None:
            continue
        row = [node]
        while (following := _grown_from(row[-1], stage)) is not None:
            row.append(following)
        grown.update(row)
        room = row[-1].meta.get(N_CHANNELS)
        if len(row) == 1 or room is None:
            continue
        for i, each in enumerate(row):
            concat = _concat(each, stage)
            assert concat is not None
            concat.room, concat.appends = room, i > 0


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
