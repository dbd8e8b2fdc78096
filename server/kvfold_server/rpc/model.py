"""ModelService."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvfold.v1 import model_pb2, model_pb2_grpc
from kvfold_server.rpc import conversion

if TYPE_CHECKING:
    import grpc

    from kvfold_server.rpc.hosted_model import HostedModels

    Context = grpc.aio.ServicerContext[Any, Any]


class ModelServicer(model_pb2_grpc.ModelServiceServicer):
    """Describes the models."""

    def __init__(self, models: HostedModels) -> None:
        self._models = models

    async def ListModels(  # noqa: N802, gRPC's names
        self, _request: model_pb2.ListModelsRequest, _context: Context
    ) -> model_pb2.ListModelsResponse:
        """All models."""
        return model_pb2.ListModelsResponse(models=map(conversion.model_summary, self._models.all))

    async def GetModel(  # noqa: N802
        self, request: model_pb2.GetModelRequest, _context: Context
    ) -> model_pb2.GetModelResponse:
        """One model."""
        return conversion.model_response(self._models.find(request.model))
