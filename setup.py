"""Compiles the engine's own modules to C, where that is asked for: `make compile`.

They are ordinary Python and run as they are; compiled (by mypyc, from their annotations) they take less than half the
time an image. An installation compiles nothing, so it needs no compiler.
"""

import os

from setuptools import setup

# What runs for every image, or every batch, between an image's arrival and its answer. Modules of a group call each
# other directly; what they call outside of it (numpy, the runners' libraries) is called as ever.
#
# What mypyc asks of them: no generic dataclass, no base class outside of the group, no attribute named `_thread` (C
# takes it for a keyword), constants of a class marked Final. What is frozen cannot be unpickled, and what is compiled
# cannot be replaced by tests: both stay in modules beside these. What is hot walks over lists, declared as such, by
# range or enumerate: those are loops in C, `zip(..., strict=True)` is not.
COMPILED = [
    f"service/{name}.py"
    for name in (
        "budget/controller",
        "budget/ledger",
        "budget/steering",
        "budget/trail",
        "engine/admission",
        "engine/answering",
        "engine/core",
        "engine/costs",
        "engine/guard",
        "engine/inbox",
        "engine/lanes",
        "engine/launching",
        "engine/loop",
        "engine/outbox",
        "engine/pace",
        "engine/policies",
        "engine/rows",
        "engine/scheduler",
        "engine/wishes",
        "runners/blocks",
        "runners/limits",
        "runners/slots",
    )
]

if os.environ.get("EXITSERVE_COMPILE") == "1":
    from mypyc.build import mypycify

    setup(ext_modules=mypycify(COMPILED, group_name="service.compiled"))
else:
    setup()
