"""What `ray_app.build` is told: the arguments of `serve run`, or of a Serve config file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from gemma_mtp.decoding.noise import MAX_DRAFT_TOKENS
from gemma_mtp.engine.settings import EngineSettings
from gemma_mtp.errors import ServerError
from gemma_mtp.server.settings import ServerSettings, metrics_prefix, origin

Count = int | None

#: seconds between looks at whether a process that is to go still has requests; each look is a log line of Serve's
DRAIN_TICK = 0.5


class RaySettings(BaseModel):
    """Arguments of the application; text is read as the field's type. Sizes are bytes, times seconds.

    The first block says what `gemma-mtp serve`'s options of the same names say, for each replica; paths are those of
    the machine that a replica runs on.

    allow_origin           origins of pages, as text with commas between them or as a list
    api_key_file           keys, one a line, read where the processes run; None: those of GEMMA_MTP_API_KEYS
    no_auth                without keys, answer every name: else only requests to localhost are answered
    max_concurrent         requests that one ingress process holds at a time, waiting ones included
    drain_seconds          that a replica that is to go may take for the requests it has

    min_replicas, max_replicas   engine replicas; where they differ, Serve chooses by load
    target_ongoing_requests      a replica's requests that Serve aims at; None: `max_running`
    max_ongoing_requests         a replica's requests at most, others wait at the ingress; None: twice `max_running`
    max_queued_requests          requests that may wait so at one ingress process; more are answered 429
    upscale_delay, downscale_delay   how long the load must have been so before replicas come or go
    ingress_replicas             processes that take requests and pass them on
    num_cpus, num_gpus           of one engine replica, as Ray counts them; threads default to `num_cpus`
    max_surge_percent            replicas that may come before old ones go, at a change of the application
    health_seconds               between looks at a replica's health
    stall_seconds                without a step, although there is work, that make a replica unhealthy
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    target: Path | None = None
    drafter: Path | None = None
    adapter: Path | None = None
    no_drafter: bool = False
    dtype: str = "auto"
    quantize: str | None = None
    strict: bool = False
    device: str = "auto"
    threads: Count = Field(None, ge=1)
    model_name: str | None = None
    draft_tokens: int | Literal["auto"] = "auto"
    max_running: int = Field(EngineSettings.max_running, ge=1)
    max_waiting: int = Field(EngineSettings.max_waiting, ge=1)
    max_tokens: Count = Field(None, ge=1)
    kv_memory: Count = Field(None, ge=1)
    prefix_reuse: bool = True
    api_key_file: Path | None = None
    no_auth: bool = False
    public_metrics: bool = False
    metrics_prefix: str = ServerSettings.metrics_prefix
    allow_origin: tuple[str, ...] = ()
    max_body_bytes: int = Field(ServerSettings.max_body_bytes, ge=1)
    max_prompt_tokens: Count = Field(None, ge=1)
    max_output_tokens: Count = Field(None, ge=1)
    max_choices: int = Field(ServerSettings.max_choices, ge=1)
    max_prompts: int = Field(ServerSettings.max_prompts, ge=1)
    max_concurrent: int = Field(1024, ge=1)
    request_seconds: float = Field(ServerSettings.request_seconds, gt=0)
    drain_seconds: float = Field(ServerSettings.drain_seconds, ge=0)
    log_text: bool = False

    min_replicas: int = Field(1, ge=1)
    max_replicas: Count = Field(None, ge=1)
    target_ongoing_requests: float | None = Field(None, gt=0)
    max_ongoing_requests: Count = Field(None, ge=1)
    max_queued_requests: int = Field(256, ge=1)
    upscale_delay: float = Field(30.0, ge=0)
    downscale_delay: float = Field(600.0, ge=0)
    ingress_replicas: int = Field(1, ge=1)
    num_cpus: float = Field(1.0, ge=0)
    num_gpus: float = Field(0.0, ge=0)
    max_surge_percent: int = Field(0, ge=0, le=100)
    health_seconds: float = Field(10.0, gt=0)
    stall_seconds: float = Field(60.0, gt=0)

    @field_validator("allow_origin", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(filter(None, map(str.strip, value.split(",")))) if isinstance(value, str) else value

    @field_validator("allow_origin")
    @classmethod
    def _check_origins(cls, texts: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(_checked(origin, text, "allow_origin") for text in texts)

    @field_validator("metrics_prefix")
    @classmethod
    def _check_prefix(cls, text: str) -> str:
        return _checked(metrics_prefix, text, "metrics_prefix")

    @model_validator(mode="after")
    def _check_together(self) -> RaySettings:
        if self.no_drafter and self.drafter is not None:
            raise ValueError("drafter and no_drafter exclude each other")
        if self.draft_tokens != "auto" and not 0 <= self.draft_tokens <= MAX_DRAFT_TOKENS:
            raise ValueError(f"draft_tokens must be auto or 0 to {MAX_DRAFT_TOKENS}")
        if self.max_replicas is not None and self.max_replicas < self.min_replicas:
            raise ValueError("max_replicas must not be below min_replicas")
        return self

    @classmethod
    def parse(cls, arguments: Mapping[str, Any]) -> RaySettings:
        """Settings of `serve run`'s arguments, or of a config file's. Raises ServerError, which names the argument."""
        try:
            return cls.model_validate(dict(arguments))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = first["loc"][0] if first["loc"] else ""
            if first["type"] == "extra_forbidden":
                known = ", ".join(cls.model_fields)
                raise ServerError(f"there is no argument {place}; there are {known}.") from None
            message = first["msg"].removeprefix("Value error, ")
            shown = f"{place}={first['input']}: " if place else ""
            raise ServerError(f"the application can not be built ({shown}{message}); correct the arguments.") from None

    @property
    def requests_at_a_replica(self) -> int:
        return self.max_ongoing_requests or 2 * self.max_running

    def engine(self) -> EngineSettings:
        return EngineSettings(
            max_running=self.max_running, max_waiting=self.max_waiting, max_tokens=self.max_tokens,
            kv_memory_mb=self.kv_memory, prefix_reuse=self.prefix_reuse,
        )  # fmt: skip

    def server(self, keys: tuple[str, ...]) -> ServerSettings:
        """Of the ingress and of each replica: both hold to the same limits."""
        name = self.model_name or ("gemma-mtp-bundled" if self.target is None else self.target.name)
        own = {
            "model_name": name, "api_keys": keys, "allow_origins": self.allow_origin,
            "loopback_names_only": not keys and not self.no_auth,
        }  # fmt: skip
        same = {field.name for field in dataclasses.fields(ServerSettings)} & type(self).model_fields.keys()
        return ServerSettings(**{**{field: getattr(self, field) for field in same}, **own})

    def replica_options(self) -> dict[str, Any]:
        """Serve's options of the engine replicas, but for the router."""
        most = self.max_replicas or self.min_replicas
        target = self.target_ongoing_requests or float(self.max_running)
        autoscaling = {
            "min_replicas": self.min_replicas, "max_replicas": most, "target_ongoing_requests": target,
            "upscale_delay_s": self.upscale_delay, "downscale_delay_s": self.downscale_delay,
        }  # fmt: skip
        scale = {"autoscaling_config": autoscaling} if most > self.min_replicas else {"num_replicas": most}
        return {
            **scale,
            "max_ongoing_requests": self.requests_at_a_replica,
            "max_queued_requests": self.max_queued_requests,
            "ray_actor_options": {"num_cpus": self.num_cpus, "num_gpus": self.num_gpus},
            "graceful_shutdown_timeout_s": self.drain_seconds,
            "graceful_shutdown_wait_loop_s": DRAIN_TICK,
            "health_check_period_s": self.health_seconds,
            "health_check_timeout_s": self.stall_seconds,
            "max_surge_percent": self.max_surge_percent,
            "max_constructor_retry_count": 3,
        }

    def ingress_options(self) -> dict[str, Any]:
        """Serve's options of the ingress: what it refuses, it refuses itself, in words."""
        return {
            "num_replicas": self.ingress_replicas,
            "max_ongoing_requests": 2 * self.max_concurrent,
            "ray_actor_options": {"num_cpus": 0},
            "graceful_shutdown_timeout_s": self.drain_seconds + 5.0,
            "graceful_shutdown_wait_loop_s": DRAIN_TICK,
            "max_surge_percent": 100,
            "max_constructor_retry_count": 3,
        }


def _checked(check: Callable[[str, str], str], text: str, name: str) -> str:
    """What a check of the server's gives, with its error as pydantic wants it."""
    try:
        return check(text, name)
    except ServerError as error:
        raise ValueError(str(error).rstrip(".")) from None
