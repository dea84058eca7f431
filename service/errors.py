"""Errors for requests that get no answer."""


class EngineError(RuntimeError):
    """A request got no answer; the message names the cause."""


class EngineDraining(EngineError):  # noqa: N818 (a state, not a fault)
    """The engine is stopping (or has stopped) and takes no new requests."""


class EngineUnsound(EngineError):  # noqa: N818
    """The engine cannot run its stages; it retries by itself."""


class EngineLost(EngineError):  # noqa: N818
    """The device is lost: the engine can run nothing more in this process."""


class EngineOverloaded(EngineError):  # noqa: N818
    """The engine is full, or the predicted wait is longer than allowed."""

    def __init__(self, in_flight_rows: int, wait_s: float = 0.0) -> None:
        super().__init__(f"{in_flight_rows} images are in flight, which will take about {wait_s:.1f} s")
        self.in_flight_rows, self.wait_s = in_flight_rows, wait_s

    def __reduce__(self) -> tuple[type[EngineError], tuple[object, ...]]:
        return EngineOverloaded, (self.in_flight_rows, self.wait_s)


class EngineTooLate(EngineError):  # noqa: N818 (the clock's fault)
    """A request's deadline passed before its first stage could run."""

    def __init__(self) -> None:
        super().__init__("the deadline passed before the first stage could run")

    def __reduce__(self) -> tuple[type[EngineError], tuple[object, ...]]:
        return EngineTooLate, ()
