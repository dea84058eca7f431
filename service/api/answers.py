"""Models of the JSON documents, for OpenAPI and the Python client. For speed, answers are built without them."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from service.budget.latency import MAX_LATENCY_MS


class Ranked(BaseModel):
    label: str = Field(examples=["bicycle"])
    class_id: int = Field(examples=[8])
    confidence: float = Field(examples=[0.9312], description="softmax probability")


class Timings(BaseModel):
    decode_ms: float = Field(examples=[0.06], description="from the bytes of the file to the network's pixels")
    queue_ms: float = Field(examples=[0.31], description="waiting, all stages together")
    stages_ms: float = Field(examples=[2.87], description="in batches, all stages together")
    total_ms: float = Field(examples=[3.35], description="from the last byte of the body to this answer")


class Classification(BaseModel):
    """The answer for one image."""

    label: str = Field(examples=["bicycle"], description="the most probable class")
    class_id: int = Field(examples=[8])
    confidence: float = Field(examples=[0.9312], description="softmax probability of the label at the exit taken")
    top_k: list[Ranked] = Field(description="the most probable classes, surest first")
    exit: int = Field(examples=[2], description="the exit taken, from 1 to `exits`")
    exits: int = Field(examples=[6])
    reason: Literal["confident", "final", "budget", "deadline", "pinned"] = Field(
        examples=["confident"],
        description="why here: sure enough, no exit left, no budget left to go on (the server's or `max_mflops`), no "
        "time left, or the exit that was asked for",
    )
    mflops: float = Field(examples=[24.06], description="millions of multiply-adds this image was charged")
    full_mflops: float = Field(examples=[60.28], description="what the last exit costs")
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
    top_k: list[Ranked] = Field(description="the most probable classes, surest first")
    score: float | None = Field(description="how sure, as the thresholds count it; null where not finite")
    threshold: float | None = Field(
        description="score from which an image left here at that moment; null where none, or every one, would do"
    )
    mflops: float = Field(description="millions of multiply-adds so far")
    final: Literal[False]


class LastStep(Classification):
    """The last line of `/classify/stream`: the answer."""

    score: float | None
    threshold: float | None
    final: Literal[True]


class BatchItem(BaseModel):
    """One image of a batch: an answer or a problem; the other one is null."""

    filename: str | None = Field(description="as the form gave it")
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

    average_mflops: float | None = Field(None, description="millions of multiply-adds, on average over images")
    fraction: float | None = Field(None, description="of what the last exit costs")
    accuracy: float | None = Field(None, description="expected on images like the held-out ones, 0 to 1")
    latency_ms: float | None = Field(
        None,
        ge=1,
        le=MAX_LATENCY_MS,
        description="time in which 95 % of the images are to be answered: under load the server works below the "
        "budget, as far as that takes. Alone it goes with the budget of the whole network; without it there is none",
    )


class Range(BaseModel):
    lowest: float
    highest: float


class Expected(BaseModel):
    average_mflops: float = Field(description="what images like the held-out ones will cost on average")
    accuracy: float = Field(description="share of images like the held-out ones that will be right")
    exit_shares: list[float] = Field(description="of such images, by exit")


class Rolling(BaseModel):
    images: int = Field(description="answers averaged over: the last 1,000, or all so far")
    average_mflops: float | None = Field(description="what they really cost; null before the first answer")


class LedgerState(BaseModel):
    """The ledger behind the hard bound: any n answers cost at most n + `burst_images` budgets."""

    answered: int
    total_mflops: float = Field(description="charged over all answers since the start")
    saved_mflops: float = Field(description="left over by easy images, for hard ones to use")
    burst_images: float = Field(description="the most that is saved up, in budgets")


class Working(BaseModel):
    average_mflops: float = Field(description="what is kept at the moment: the budget, or less")
    fraction: float = Field(description="the same as a fraction of the full network")
    accuracy: float = Field(description="the accuracy to expect at it")


class LatencyState(BaseModel):
    """A latency target, and its present effect on the budget."""

    target_ms: float
    p95_ms: float | None = Field(
        description="95 % of the latest answers took no longer, from a request's last byte on; null below 20 in 10 s"
    )
    answers: int = Field(description="how many those are: the last second's, or 20")
    limited: bool = Field(description="true while the server works below the budget to keep the target")
    limited_since: str | None = Field(description="UTC; null while it is not", examples=["2026-11-21T10:04:31Z"])
    at_lowest: bool = Field(description="true where it can go no lower: what comes beyond that is refused (429)")
    working: Working


class BudgetState(BaseModel):
    """The budget in its three forms, the results to expect of it, and the state of keeping it."""

    average_mflops: float = Field(description="the ceiling that is kept")
    fraction: float = Field(description="the same as a fraction of the full network")
    accuracy: float = Field(description="the accuracy to expect under it")
    set_as: Literal["average_mflops", "fraction", "accuracy"] = Field(description="how it was given")
    expected: Expected
    frontier_ends_below_budget: bool = Field(
        description="true where going deeper stops paying before the budget is spent: the rest is saved"
    )
    thresholds: list[float | None] = Field(
        description="score from which an image leaves, by exit, right now; null where every image leaves"
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

    published_mflops: float = Field(description="as the network's authors count")
    executed_mflops: float = Field(description="what is run up to it, and charged")
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

    type: str = Field(examples=["urn:exitserve:problem:broken-image"], description="stable, for programs")
    title: str
    status: int
    detail: str = Field(description="cause and remedy, for people")
    instance: str = Field(description="the path that was asked")
    request_id: str
