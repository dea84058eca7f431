"""All settings of the server, read from the command line or the environment and checked at start-up.

Each field is a command line option (`max_pixels` is `--max-pixels`) and an environment variable
(`EXITSERVE_MAX_PIXELS`); the command line wins. Secrets come only from the environment or a file, because every user of
the machine can read command lines.
"""

import re
import sys
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from service.budget.latency import MAX_LATENCY_MS

ENV_PREFIX = "EXITSERVE_"
MAX_LANES, MAX_BATCH_ROWS = 256, 4096
NOT_ON_THE_COMMAND_LINE = frozenset({"admin_token"})


class SettingsError(Exception):
    """A setting is invalid; the message names it and the remedy."""


class Settings(BaseSettings):
    """The settings, validated. Frozen: they do not change while the server runs."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, frozen=True, extra="forbid", env_ignore_empty=True)

    bundle: Path = Field(Path("models/zoo/cifar100-msdnet"), description="folder of the bundle to serve")
    host: str = Field("127.0.0.1", min_length=1, description="address to listen on; 0.0.0.0 for every interface")
    port: int = Field(8000, ge=0, le=65535, description="TCP port to listen on; 0 takes a free one")

    budget_fraction: float | None = Field(
        None, gt=0, le=1, description="average compute per image, as a fraction of the full network's"
    )
    budget_mflops: float | None = Field(
        None, gt=0, description="average compute per image, in millions of multiply-adds"
    )
    budget_accuracy: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="average compute per image, as the share of held-out images to answer correctly, e.g. 0.7",
    )
    latency_ms: float | None = Field(
        None,
        ge=1,
        le=MAX_LATENCY_MS,
        description="time within which 95 % of images are to be answered; under load the budget is lowered to meet it",
    )
    burst_images: float | None = Field(
        None,
        ge=1,
        le=1_000_000,
        description="budgets that may be saved up in easy traffic, in images; none: one batch per lane, at least 32",
    )

    runner: Literal["auto", "onnx", "torch-cuda"] = Field(
        "auto", description="what runs the stages; auto: onnx without a GPU, otherwise the one that measures fastest"
    )
    device: Literal["auto", "cpu", "cuda", "tensorrt"] = Field(
        "auto", description="where stages run; auto: a GPU if there is one, with TensorRT if installed and faster"
    )
    compile_stages: bool = Field(
        False,
        description="try torch.compile on the stages of torch-cuda and use it where faster; adds minutes to the start",
    )
    resize: Literal["auto", "host", "device"] = Field(
        "auto",
        description="where images that do not have the network's size are scaled; auto: the device with torch-cuda, "
        "otherwise the host",
    )
    precision: Literal["auto", "fp32", "int8"] = Field(
        "fp32",
        description="precision of the stages; int8: on CPUs, if the bundle has it; auto: the faster here, as measured",
    )
    lanes: int = Field(0, ge=0, le=MAX_LANES, description="batches that run concurrently; 0: one per core, 2 on a GPU")
    max_batch_rows: int = Field(32, ge=1, le=MAX_BATCH_ROWS, description="most images in one batch")
    scheduling_policy: Literal["default", "none", "no-compaction", "always-compact", "merge-full"] = Field(
        "default",
        description="how images are regrouped between stages; default: by measured cost; others: for comparison",
    )
    max_in_flight: int = Field(1024, ge=1, le=1_000_000, description="most images in flight; more are refused with 429")
    max_queue_s: float = Field(
        1.0,
        gt=0,
        le=3600,
        description="longest predicted wait, in seconds; images that would wait longer get 429",
    )

    http_workers: int = Field(
        0,
        ge=0,
        le=64,
        description="processes for HTTP and decoding, in front of the engine's process; 0: that process does both",
    )
    max_body_bytes: int = Field(16 * 2**20, ge=1024, le=2**30, description="largest request body, in bytes")
    max_held_bytes: int = Field(
        256 * 2**20,
        ge=1024,
        le=2**40,
        description="most bytes of request bodies held at once, by each HTTP process; beyond that, 429",
    )
    max_batch_images: int = Field(128, ge=1, le=10_000, description="most images in one POST /classify/batch")
    max_pixels: int = Field(32_000_000, ge=1024, le=89_000_000, description="largest image, as width x height")
    body_timeout_s: float = Field(
        20.0, gt=0, le=3600, description="time a client has to send a request's head, and then its body, in seconds"
    )
    keep_alive_s: float = Field(
        75.0,
        gt=0,
        le=86400,
        description="time after which an idle connection is closed, in seconds; set it longer than a load balancer in "
        "front keeps connections",
    )
    drain_s: float = Field(
        25.0,
        gt=0,
        le=3600,
        description="after SIGTERM, SIGINT or SIGHUP, time for accepted requests to be answered, in seconds",
    )

    allow_origins: str | None = Field(
        None,
        description="origins whose web pages may classify from a browser, such as https://shop.example, separated by "
        "spaces; * for all (none may set the budget)",
    )
    admin_token: SecretStr | None = Field(
        None,
        description="bearer token required to set the budget, at least 8 printable ASCII characters without spaces; "
        "without one, only clients on this machine may",
    )
    admin_token_file: Path | None = Field(None, description="file that contains the admin token")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least severe message logged")
    access_log: Literal["json", "off"] = Field(
        "json",
        description="json: one line per request, and all else as JSON too; off: no requests, and all else as text",
    )

    @field_validator("admin_token")
    @classmethod
    def _token_is_usable(cls, token: SecretStr | None) -> SecretStr | None:
        if token is not None:
            _check_token(token.get_secret_value())
        return token

    @field_validator("allow_origins")
    @classmethod
    def _origins_are_origins(cls, origins: str | None) -> str | None:
        for origin in (origins or "").split():
            if origin != "*" and not re.fullmatch(r"https?://[a-z0-9.\-_\[\]:]+", origin):
                raise ValueError(
                    f"{origin!r} is not an origin: write scheme, host and port in lower case and without a path, "
                    "such as http://localhost:5173 or https://shop.example"
                )
        return origins

    @model_validator(mode="after")
    def _one_of_each(self) -> Self:
        budgets = ("budget_fraction", "budget_mflops", "budget_accuracy")
        given = [name for name in budgets if getattr(self, name) is not None]
        if len(given) > 1:
            named = " and ".join(f"{flag(name)} ({variable(name)})" for name in given)
            raise ValueError(f"{named} both set the budget: give one of them")
        if self.http_workers and sys.platform != "linux":
            raise ValueError(f"{flag('http_workers')} needs Linux: leave it out to serve in one process")
        if self.admin_token is not None and self.admin_token_file is not None:
            raise ValueError(
                f"{variable('admin_token')} and {flag('admin_token_file')} are both given: give one of them"
            )
        return self

    @property
    def origins(self) -> tuple[str, ...]:
        return tuple((self.allow_origins or "").split())

    @property
    def latency_s(self) -> float | None:
        return None if self.latency_ms is None else self.latency_ms / 1e3

    def read_admin_token(self) -> str | None:
        """Return the admin token, from its file if one is given; None if none is configured.

        Raises:
            SettingsError: the file cannot be read or contains no valid token.
        """
        if self.admin_token is not None:
            return self.admin_token.get_secret_value()
        if self.admin_token_file is None:
            return None
        try:
            token = self.admin_token_file.read_text(encoding="utf-8").strip()
            _check_token(token)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise SettingsError(f"{flag('admin_token_file')} {self.admin_token_file}: {reason}") from None
        return token


def _check_token(token: str) -> None:
    if len(token) < 8 or not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError("a token must have at least 8 characters, printable ASCII without spaces")


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def variable(name: str) -> str:
    return ENV_PREFIX + name.upper()
