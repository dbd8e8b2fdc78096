"""A gRPC server that does nothing but send: `python bare_streams.py SECONDS`.

Sends one short message on each open stream, every so many seconds. Prints its port. What a front end costs is compared
with what this costs: the same library, event loop and garbage collector, but no engine, tokens or text.
"""

from __future__ import annotations

import asyncio
import sys

import grpc.aio
import uvloop

from kvfold.v1 import generation_pb2
from kvfold_server.runtime import spare_loaded_objects

METHOD = "kvfold.v1.GenerationService"
MESSAGE = generation_pb2.GenerateStreamResponse(text=" word", token_ids=[3000]).SerializeToString()


class Ticker:
    """Wakes all that wait, again and again."""

    def __init__(self) -> None:
        self._waiting: list[asyncio.Future[None]] = []

    async def tick(self) -> None:
        future = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        await future

    async def run(self, seconds: float) -> None:
        while True:
            await asyncio.sleep(seconds)
            waiting, self._waiting = self._waiting, []
            for future in waiting:
                if not future.done():
                    future.set_result(None)


async def main(seconds: float) -> None:
    ticker = Ticker()

    async def send_for_ever(_request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        while True:
            await ticker.tick()
            await context.write(MESSAGE)

    handler = grpc.unary_stream_rpc_method_handler(send_for_ever)
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(METHOD, {"GenerateStream": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)  # noqa: T201
    spare_loaded_objects()
    await ticker.run(seconds)


if __name__ == "__main__":
    uvloop.run(main(float(sys.argv[1])))
