"""Models of the JSON documents, for OpenAPI and the Python client. For speed, answers are built without them."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from service.budget.latency import MAX_LATENCY_MS


class Ranked(BaseModel):
    label: str = Field(examples=["bicycle"])
    class_id: int = Field(examples=[8])
    confidence: float = Field(examples=[0.9312], description="softmax probability")


class Timings(BaseModel):
    decode_ms: float = Field(examples=[0.06], description="decoding the image file")
    queue_ms: float = Field(examples=[0.31], description="waiting, summed over stages")
    stages_ms: float = Field(examples=[2.87], description="running in batches, summed over stages")
    total_ms: float = Field(examples=[3.35], description="from the last byte of the body to the answer")


class Classification(BaseModel):
    """The answer for one image."""

    label: str = Field(examples=["bicycle"], description="the most probable class")
    class_id: int = Field(examples=[8])
    confidence: float = Field(examples=[0.9312], description="softmax probability of the label at the exit taken")
    top_k: list[Ranked] = Field(description="the most probable classes, in descending order")
    exit: int = Field(examples=[2], description="the exit taken, from 1 to `exits`")
    exits: int = Field(examples=[6])
    reason: Literal["confident", "final", "budget", "deadline", "pinned"] = Field(
        examples=["confident"],
        description="why the image left there: the exit was confident enough; it was the last exit; no budget was left "
        "to go on (the server's or `max_mflops`); the deadline; or the exit was requested",
    )
    mflops: float = Field(examples=[24.06], description="millions of multiply-adds charged for this image")
    full_mflops: float = Field(examples=[60.28], description="the cost of the whole network")
    model: str = Field(examples=["cifar100-msdnet"])
    version: str = Field(examples=["3f9a1c2b7d4e"])
    timings: Timings
    request_id: str = Field(examples=["9f2c11d0-000042"])


class Step(BaseModel):
    """The result of an exit that the image went on from: a line of `/classify/stream`."""

    exit: int = Field(examples=[1])
    exits: int = Field(examples=[6])
    label: str = Field(examples=["bicycle"])
    class_id: int = Field(examples=[8])
    confidence: float = Field(examples=[0.4312])
    top_k: list[Ranked] = Field(description="the most probable classes, in descending order")
    score: float | None = Field(description="the score compared with the threshold; null if not finite")
    threshold: float | None = Field(
        description="the score at which images left here at that moment; null if every image left, or none"
    )
    mflops: float = Field(description="millions of multiply-adds charged so far")
    final: Literal[False]


class LastStep(Classification):
    """The last line of `/classify/stream`: the answer."""

    score: float | None
    threshold: float | None
    final: Literal[True]


class BatchItem(BaseModel):
    """One image of a batch: an answer or a problem; the other one is null."""

    filename: str | None = Field(description="as given in the form")
    answer: Classification | None
    problem: "ProblemDocument | None"


class BatchAnswer(BaseModel):
    """An entry for every image, in the order of the form."""

    results: list[BatchItem]
    answered: int
    failed: int
    request_id: str


class BudgetRequest(BaseModel):
    """A budget: one of `average_mflops`, `fraction` and `accuracy`, or a latency target, or both."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    average_mflops: float | None = Field(None, description="millions of multiply-adds per image, on average")
    fraction: float | None = Field(None, description="the same as a fraction of the full network's cost")
    accuracy: float | None = Field(None, description="the accuracy to reach on images like the held-out ones, 0 to 1")
    latency_ms: float | None = Field(
        None,
        ge=1,
        le=MAX_LATENCY_MS,
        description="time within which 95 % of images are to be answered: under load the server lowers the working "
        "budget to meet it. Given alone, the budget is the whole network's cost; without it, there is no target",
    )


class Range(BaseModel):
    lowest: float
    highest: float


class Expected(BaseModel):
    average_mflops: float = Field(description="mean cost of images like the held-out ones")
    accuracy: float = Field(description="accuracy on images like the held-out ones")
    exit_shares: list[float] = Field(description="shares of such images that leave, by exit")


class Rolling(BaseModel):
    images: int = Field(description="number of answers averaged: the last 1,000, or all if fewer")
    average_mflops: float | None = Field(description="their measured mean cost; null before the first answer")


class LedgerState(BaseModel):
    """The ledger behind the hard bound: any n answers cost at most n + `burst_images` budgets."""

    answered: int
    total_mflops: float = Field(description="charged over all answers since the start")
    saved_mflops: float = Field(description="what easy images have saved for hard ones")
    burst_images: float = Field(description="the most that can be saved up, in budgets")


class Working(BaseModel):
    average_mflops: float = Field(description="the budget kept at the moment: the one set, or less")
    fraction: float = Field(description="the same as a fraction of the full network")
    accuracy: float = Field(description="the accuracy to expect at it")


class LatencyState(BaseModel):
    """A latency target, and its present effect on the budget."""

    target_ms: float
    p95_ms: float | None = Field(
        description="95th percentile of recent answer times, from a request's last byte; null below 20 answers in 10 s"
    )
    answers: int = Field(description="number of these answers: the last second's, or 20")
    limited: bool = Field(description="true while the server works below the budget to keep the target")
    limited_since: str | None = Field(description="UTC; null unless limited", examples=["2026-11-21T10:04:31Z"])
    at_lowest: bool = Field(description="true if the budget can go no lower; excess requests are then refused (429)")
    working: Working


class BudgetState(BaseModel):
    """The budget in its three forms, the results to expect of it, and the state of keeping it."""

    average_mflops: float = Field(description="the budget: the mean cost that is not exceeded")
    fraction: float = Field(description="the same as a fraction of the full network")
    accuracy: float = Field(description="the accuracy to expect at it")
    set_as: Literal["average_mflops", "fraction", "accuracy"] = Field(description="the form in which it was set")
    expected: Expected
    frontier_ends_below_budget: bool = Field(
        description="true if spending all of the budget would not raise accuracy: the rest is saved"
    )
    thresholds: list[float | None] = Field(
        description="score at which an image leaves at present, by exit; null if every image leaves"
    )
    rolling: Rolling
    ledger: LedgerState
    latency: LatencyState | None = Field(description="null without a target")
    allowed: dict[Literal["average_mflops", "fraction", "accuracy"], Range]


class FrontierCurve(BaseModel):
    """Expected accuracy and exit shares against average cost, measured on held-out images."""

    average_mflops: list[float]
    fraction: list[float]
    accuracy: list[float]
    exit_shares: list[list[float]]
    thresholds: list[list[float | None]]


class ModelExit(BaseModel):
    """One exit's cumulative cost, and its accuracy."""

    published_mflops: float = Field(description="as counted in the publication")
    executed_mflops: float = Field(description="what is executed up to this exit, and charged")
    test_accuracy: float | None
    heldout_accuracy: float


class ModelInput(BaseModel):
    height_px: int
    width_px: int


class ModelDescription(BaseModel):
    """The network that is served; `GET /model` returns further members."""

    name: str
    version: str
    description: str
    architecture: str
    class_names: list[str]
    input: ModelInput
    exits: list[ModelExit]


class Health(BaseModel):
    status: Literal["alive"] = "alive"


class Readiness(BaseModel):
    status: Literal["ready"] = "ready"


class ProblemDocument(BaseModel):
    """An error, as RFC 9457 defines it."""

    model_config = ConfigDict(extra="allow")

    type: str = Field(examples=["urn:exitserve:problem:broken-image"], description="stable identifier for programs")
    title: str
    status: int
    detail: str = Field(description="cause and remedy, as text")
    instance: str = Field(description="the path of the request")
    request_id: str
