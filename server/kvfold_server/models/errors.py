"""What can be wrong with a model before it serves."""

from __future__ import annotations


class ModelError(Exception):
    """A model cannot be served; the message is one clear sentence for the person who named it."""


class ModelSourceError(ModelError):
    """What was given as a model cannot be found, fetched or read."""


class UnsupportedModelError(ModelError):
    """The model was found, but kvfold would not compute it correctly; the message says why."""
