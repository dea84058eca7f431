"""What a process that serves keeps in memory, and what of it the garbage collector is to look at."""

import contextlib
import ctypes
import gc

FEW_OBJECTS, MANY_OBJECTS = 5_000, 100_000
OBJECTS_IN_FLIGHT = 4  # by so many times the images that may be in work the number of objects comes and goes


def settle_memory(max_in_flight: int = 0) -> None:
    """Have the garbage collector leave alone what is there, once everything is warm: it stays for good.

    Else it walks over all of it again and again: a tenth of the event loop's time, in pauses of many milliseconds.
    What is left to it are requests in work, few enough to be looked at less often; where they may be thousands, not
    before there are more than come and go with every few batches. Each look drives what is in work out of the caches.
    """
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):  # glibc alone: 70 MB that loading leaves between what stays
        ctypes.CDLL(None).malloc_trim(0)
    gc.freeze()
    # Python looks at old objects once new ones are a quarter of those that its last full look found: let these be what
    # is not frozen. Else requests that ended in a circle pile up to a quarter of all the server holds, some 14 MiB.
    gc.collect()
    n_objects = min(max(FEW_OBJECTS, OBJECTS_IN_FLIGHT * max_in_flight), MANY_OBJECTS)  # circles are among them
    gc.set_threshold(n_objects, 20, 5)
