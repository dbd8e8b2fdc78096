"""Reading a layer's mask kind from the mask function that transformers builds for it, at any distance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.masking_utils import eager_mask

from kvfold_server.models.errors import UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Callable

    MaskFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

MASK_FUNCTION = "kvfold_mask_function"
"""The attribute that carries a mask's function from where transformers builds it to the layer that receives it."""

FAR_POSITIONS = (1_000_003, 1_000_211, 1_064_960)
"""Beyond any window in use, so that a window shows; unrelated to each other, so that chunks do."""


FUTURE_KEYS = 8
"""Keys after a query that are looked at: a causal mask hides them."""


def recorded_mask(**arguments: Any) -> torch.Tensor:  # noqa: ANN401
    """A mask function for the registry of transformers: the eager mask, which remembers what it was made from."""
    mask: torch.Tensor = eager_mask(**{**arguments, "allow_is_bidirectional_skip": False})
    setattr(mask, MASK_FUNCTION, arguments["mask_function"])
    return mask


def window_of(mask: torch.Tensor | None) -> int | None:
    """The width of the sliding window of a recorded mask in tokens; None for full causal attention.

    Raises UnsupportedModelError for any other mask: made or changed by the model itself, bidirectional, chunked.
    """
    function: MaskFunction | None = getattr(mask, MASK_FUNCTION, None)
    if function is None:
        raise UnsupportedModelError("the model makes its own attention mask, which the probe cannot read")
    windows = {_window_at(function, position) for position in FAR_POSITIONS}
    if len(windows) > 1:
        raise UnsupportedModelError("the attention mask is neither causal nor a sliding window (chunked attention?)")
    return windows.pop()


def _window_at(function: MaskFunction, position: int) -> int | None:
    """How many keys, itself included, a query at `position` sees; None if it sees all before it."""
    keys = torch.arange(position + FUTURE_KEYS, -1, -1)
    query = torch.tensor(position)
    zero = torch.tensor(0)
    try:
        visible = function(zero, zero, query, keys).expand(keys.shape)
    except (IndexError, RuntimeError) as error:
        raise UnsupportedModelError("the attention mask depends on more than positions") from error
    if bool(visible[:FUTURE_KEYS].any()):
        raise UnsupportedModelError("the attention is not causal")
    past = visible[FUTURE_KEYS:]  # the query's own key first, then backward
    width = int(past.count_nonzero())
    if not bool(past[:width].all()):
        raise UnsupportedModelError("the attention mask is neither causal nor a sliding window")
    return None if width == position + 1 else width
