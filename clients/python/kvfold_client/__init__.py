"""The client of kvfold: text generation over gRPC, with typed results and typed errors.

    from kvfold_client import Client

    with Client("localhost:50051") as client:
        answer = client.generate("The sea is", max_tokens=32, shared_layers=4)
        print(answer.text, answer.finish.memory.kv_bytes_saved)

`AsyncClient` has the same methods as coroutines. All that the package exports is listed in `kvfold_client.exports`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvfold_client.exports import *  # noqa: F403
    from kvfold_client.exports import __all__ as __all__


def __getattr__(name: str) -> Any:  # noqa: ANN401  (the type checker reads the import above)
    """Imports the exports when one is first used: `kvfold --help` shares this package and must not wait for grpc."""
    if name.startswith("__") and name != "__all__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("kvfold_client.exports"), name)
