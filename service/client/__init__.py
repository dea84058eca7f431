"""A Python client of an ExitServe server: the same calls blocking (`Client`) and asynchronous (`AsyncClient`).

    with Client("http://127.0.0.1:8000") as client:
        answer = client.classify(Path("cat.png"), deadline_ms=50)
        print(answer.label, answer.confidence, answer.exit, answer.reason)

Answers are models of `service.api.answers`. Every refusal raises an exception, whose class is the kind of refusal and
whose text says what to do. The client needs httpx, which the extra `client` installs.
"""

import sys
from importlib.util import find_spec

if find_spec("httpx") is None:  # the server does not need it
    raise ImportError(f"service.client needs httpx: {sys.executable} -m pip install httpx")

from service.api.answers import BudgetState, Classification, LastStep, ModelDescription, Step
from service.client.awaited import AsyncClient
from service.client.calls import DEFAULT_TIMEOUT_S, DEFAULT_URL, BudgetKind, Wishes
from service.client.errors import (
    BadImage,
    BadRequest,
    DeadlinePassed,
    Later,
    NotAllowed,
    NotReady,
    Overloaded,
    Refused,
    ServerError,
    ServerFault,
    Unreachable,
    refusal,
)
from service.client.pictures import Image
from service.client.waiting import Client

__all__ = [
    "DEFAULT_TIMEOUT_S",
    "DEFAULT_URL",
    "AsyncClient",
    "BadImage",
    "BadRequest",
    "BudgetKind",
    "BudgetState",
    "Classification",
    "Client",
    "DeadlinePassed",
    "Image",
    "LastStep",
    "Later",
    "ModelDescription",
    "NotAllowed",
    "NotReady",
    "Overloaded",
    "Refused",
    "ServerError",
    "ServerFault",
    "Step",
    "Unreachable",
    "Wishes",
    "refusal",
]
