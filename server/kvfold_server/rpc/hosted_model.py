"""The models that the server hosts, by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvfold_server.generation.errors import EngineUnavailableError, InvalidRequestError, UnknownModelError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from kvfold_server.channel.front_end import EngineHandle
    from kvfold_server.generation.model_info import ModelInfo
    from kvfold_server.text.model_text import ModelText


class HostedModel:
    """One model: its engine, and its tokenizer once the engine has said where it lies."""

    def __init__(self, name: str, handle: EngineHandle) -> None:
        self.name = name
        self.handle = handle
        self._text: ModelText | None = None

    @property
    def ready(self) -> bool:
        """Whether the model can be asked for answers."""
        return self.handle.ready and self._text is not None

    @property
    def info(self) -> ModelInfo:
        """The model's description. Raises EngineUnavailableError until its engine has started for the first time."""
        if self.handle.info is None:
            raise EngineUnavailableError(f"the engine of model {self.name!r} is starting")
        return self.handle.info

    @property
    def text(self) -> ModelText:
        """Tokenizer and chat template. Raises EngineUnavailableError until they are loaded."""
        if self._text is None:
            raise EngineUnavailableError(f"the engine of model {self.name!r} is starting")
        return self._text

    def set_text(self, text: ModelText) -> None:
        """Takes what has been loaded."""
        self._text = text


class HostedModels:
    """All models, in the order of the configuration."""

    def __init__(self, models: Iterable[HostedModel]) -> None:
        self._models = {model.name: model for model in models}

    @property
    def all(self) -> Sequence[HostedModel]:
        """Every model."""
        return tuple(self._models.values())

    @property
    def ready(self) -> bool:
        """Whether every model can be asked."""
        return all(model.ready for model in self._models.values())

    def find(self, name: str) -> HostedModel:
        """The model of that name; the only one if the name is empty.

        Raises UnknownModelError or InvalidRequestError.
        """
        if not name:
            if len(self._models) != 1:
                raise InvalidRequestError("model", "the server hosts several models; name one")
            return next(iter(self._models.values()))
        if name not in self._models:
            raise UnknownModelError(name)
        return self._models[name]

    def select(self, name: str) -> Sequence[HostedModel]:
        """The model of that name; all if the name is empty. Raises UnknownModelError."""
        return (self.find(name),) if name else self.all
