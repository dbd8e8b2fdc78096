"""The server's configuration: flags, then environment variables, then a YAML file, then defaults."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, ValidationError, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, YamlConfigSettingsSource
from pydantic_settings import SettingsError as PydanticSettingsError

from kvfold_scheduler.scheduler import SchedulerLimits
from kvfold_server.byte_size import parse_bytes
from kvfold_server.channel.supervisor import DEFAULT_FACTORY
from kvfold_server.engine.options import EngineOptions

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pydantic_core import ErrorDetails

NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
"""Model names appear in logs, metrics and requests."""


def _read_size(value: object) -> object:
    return parse_bytes(value) if isinstance(value, str) else value


ByteCount = Annotated[PositiveInt, BeforeValidator(_read_size)]


class SettingsError(ValueError):
    """The configuration is wrong; the message says where, in words for the one who wrote it."""


class ModelSettings(BaseModel):
    """One model and its engine; see EngineOptions for what None means."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = Field(min_length=1)
    name: str = Field(default="", pattern=f"^({NAME_PATTERN})?$")
    plan: Path | None = None
    device: str | None = None
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    weights: Literal["dtype", "int8"] = "dtype"
    kv_memory: ByteCount | None = None
    max_running: PositiveInt = 128
    max_waiting: PositiveInt = 1024
    step_tokens: PositiveInt = 512
    attention_backend: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _name_after_source(cls, values: Any) -> Any:  # noqa: ANN401, whatever a configuration file holds
        if isinstance(values, dict) and not values.get("name") and isinstance(values.get("source"), str):
            return values | {"name": default_name(values["source"])}
        return values

    @model_validator(mode="after")
    def _check_limits(self) -> ModelSettings:
        SchedulerLimits(self.max_running, self.max_waiting, self.step_tokens)
        return self

    def engine_options(self) -> EngineOptions:
        """What the engine process is told."""
        return EngineOptions(
            model=self.source,
            plan=None if self.plan is None else str(self.plan),
            device=self.device,
            dtype=self.dtype,
            weights=self.weights,
            kv_memory_bytes=self.kv_memory,
            max_running=self.max_running,
            max_waiting=self.max_waiting,
            step_tokens=self.step_tokens,
            attention_backend=self.attention_backend,
        )


def default_name(source: str) -> str:
    """The name of a model that was given none: "default" for the embedded one, else the last part of its path."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", Path(source).name).lstrip("._-")[:64]


class ServerSettings(BaseSettings):
    """Everything that `kvfold serve` is told. Environment variables are named KVFOLD_HOST and so on."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", env_prefix="KVFOLD_")

    models: tuple[ModelSettings, ...] = Field(default=(ModelSettings(source="default"),), min_length=1)
    """Without any, the embedded default model, so that `kvfold serve` alone serves something."""
    host: str = "127.0.0.1"
    port: int = Field(default=50051, ge=0, le=65535)
    ready_file: Path | None = None
    grace: float = Field(default=30.0, ge=0)
    """Seconds that running requests may take after SIGTERM: Kubernetes kills after 30 by default."""
    max_connection_age: float | None = Field(default=None, gt=0)
    """Seconds after which clients are asked to connect again, so that they find new replicas. None: never."""
    tls_cert: Path | None = None
    tls_key: Path | None = None
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    engine_factory: str = DEFAULT_FACTORY
    """What builds an engine inside its process; tests name the fake one."""

    @model_validator(mode="after")
    def _check(self) -> ServerSettings:
        names = [model.name for model in self.models]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"several models are named {', '.join(repeated)}; write NAME=SOURCE")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("TLS needs both a certificate and a key")
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003, the base class hands it over by name
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, then the environment, then the file that `load_settings` names."""
        return init_settings, env_settings, YamlConfigSettingsSource(settings_cls)


def load_settings(flags: Mapping[str, Any], config: Path | None = None) -> ServerSettings:
    """Resolves the configuration. `flags` holds those that were given. Raises SettingsError with one clear line."""
    if config is not None and not config.is_file():
        raise SettingsError(f"there is no configuration file {config}")

    class ConfiguredSettings(ServerSettings):
        model_config = SettingsConfigDict(yaml_file=config)

    try:
        return ConfiguredSettings(**flags)
    except ValidationError as error:
        raise SettingsError("; ".join(map(_describe, error.errors()))) from error
    except (yaml.YAMLError, PydanticSettingsError, TypeError, ValueError) as error:
        raise SettingsError(f"the configuration cannot be read: {error}") from error


def _describe(problem: ErrorDetails) -> str:
    place = ".".join(map(str, problem["loc"]))
    return f"{place}: {problem['msg']}" if place else problem["msg"]


def split_model(text: str) -> dict[str, str]:
    """Reads "NAME=SOURCE" or "SOURCE"; a "=" behind a slash belongs to the source."""
    match = re.fullmatch(f"({NAME_PATTERN})=(.*)", text)
    return {"source": text} if match is None else {"name": match[1], "source": match[2]}
