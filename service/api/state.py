"""What the routes share, made once by `create_app`."""

from dataclasses import dataclass

from models.bundle import Bundle
from service.api.delivery import Delivery
from service.api.lifecycle import Lifecycle
from service.api.problems import not_ready
from service.engine import Engine
from service.images import ImageDecoder
from service.metrics import Metrics
from service.settings import Settings
from service.target import Targets


@dataclass(frozen=True, slots=True)
class State:
    bundle: Bundle
    targets: Targets
    engine: Engine
    delivery: Delivery
    decoder: ImageDecoder
    metrics: Metrics
    lifecycle: Lifecycle
    settings: Settings
    admin_token: str | None

    @property
    def is_ready(self) -> bool:
        return self.lifecycle.is_ready and self.engine.is_alive and self.engine.trouble is None

    def require_ready(self) -> None:
        """Raise 503 unless the engine is warm and well."""
        if not self.lifecycle.is_ready:
            raise not_ready(self.lifecycle.detail)
        if not self.engine.is_alive:
            raise not_ready("The engine has stopped: the server's log says why; restart it.")
        if self.engine.trouble is not None:
            raise not_ready(f"For now {self.engine.trouble}: the server tries again by itself; its log says more.")
