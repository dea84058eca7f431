"""The objects that all routes share, created once by `create_app`."""

from dataclasses import dataclass

from models.bundle import Bundle
from service.api.delivery import Delivery
from service.api.lifecycle import Lifecycle
from service.api.ports import EnginePort, KeeperPort, MetricsPort
from service.api.problems import not_ready
from service.budget.target import Targets
from service.images.decoder import ImageDecoder
from service.settings import Settings


@dataclass(frozen=True, slots=True)
class State:
    bundle: Bundle
    targets: Targets
    engine: EnginePort
    keeper: KeeperPort
    delivery: Delivery
    decoder: ImageDecoder
    metrics: MetricsPort
    lifecycle: Lifecycle
    settings: Settings
    admin_token: str | None

    @property
    def is_ready(self) -> bool:
        return self.lifecycle.is_ready and self.is_open

    @property
    def is_open(self) -> bool:
        """Whether images are accepted: while ready, and during the last call of a drain."""
        return self.lifecycle.takes_work and self.engine.is_alive and self.engine.trouble is None

    def responded(self, exit_number: int, seconds: float) -> None:
        """Count an answer, `seconds` after the last byte of its request."""
        self.metrics.responded(exit_number, seconds)
        self.engine.took(seconds)

    def require_ready(self) -> None:
        """Raise 503 unless the server is ready and the engine can run images."""
        if not self.lifecycle.is_ready:
            raise not_ready(self.lifecycle.detail)
        self.require_open()

    def require_open(self) -> None:
        """Raise 503 unless images are accepted."""
        if not self.lifecycle.takes_work:
            raise not_ready(self.lifecycle.detail)
        if not self.engine.is_alive:
            raise not_ready("The engine has stopped: the server's log says why; restart it.")
        if self.engine.trouble is not None:
            raise not_ready(f"No stage can be run: {self.engine.trouble}. The server retries by itself; see its log.")
