"""Settings of the garbage collector for a process that serves."""

import contextlib
import ctypes
import gc

FEW_OBJECTS, MANY_OBJECTS = 5_000, 100_000
OBJECTS_IN_FLIGHT = 4  # fluctuation of the number of objects, per image that may be in flight


def settle_memory(max_in_flight: int = 0) -> None:
    """Exclude all present objects from garbage collection. To be called once warm: they live as long as the process.

    Otherwise the collector would traverse them repeatedly: a tenth of the event loop's time, in pauses of many
    milliseconds. Only requests in flight remain, so few objects that it may run less often: if thousands are in flight,
    not before there are more objects than every few batches create and free. Each run evicts them from the CPU caches.
    """
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):  # glibc only: frees 70 MB of gaps that loading leaves
        ctypes.CDLL(None).malloc_trim(0)
    gc.freeze()
    # Python runs a full collection once new objects are a quarter of those that the last one found. This one finds only
    # unfrozen ones. Otherwise requests in reference cycles pile up to a quarter of all objects held, some 14 MiB.
    gc.collect()
    n_objects = min(max(FEW_OBJECTS, OBJECTS_IN_FLIGHT * max_in_flight), MANY_OBJECTS)  # with those in cycles
    gc.set_threshold(n_objects, 20, 5)
