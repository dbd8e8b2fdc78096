"""What users import stays where it is."""

from __future__ import annotations

import subprocess
import sys

import kvfold_client

EXPORTS = {
    *("AsyncClient", "AsyncStream", "Client", "Stream", "Tls", "CallOptions", "GenerationOptions"),
    *("ChatMessage", "Prompt"),
    *("Generation", "GenerationChunk", "FinishInfo", "FinishReason", "PromptInfo", "Usage"),
    *("PositionLogprobs", "TokenLogprob"),
    *("MemoryReport", "ModelMemory", "BlockState"),
    *("ModelDescription", "ModelSummary", "Layer", "AttentionType", "SharingPlan", "SharingEntry", "DepthQuality"),
    *("KvfoldError", "InvalidRequestError", "AuthenticationError", "PermissionDeniedError", "NotFoundError"),
    *("PreconditionError", "ConflictError", "ResourceExhaustedError", "UnavailableError", "DeadlineExceededError"),
    *("RequestCancelledError", "UnimplementedError", "ServerError", "FieldViolation"),
}


def test_the_exports_are_these() -> None:
    assert set(kvfold_client.__all__) == EXPORTS


def test_every_export_is_there() -> None:
    for name in EXPORTS:
        assert getattr(kvfold_client, name) is not None


def test_the_package_alone_does_not_load_grpc() -> None:
    code = "import sys, kvfold_client, kvfold_client.cli.main; print('grpc' in sys.modules, 'rich' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
