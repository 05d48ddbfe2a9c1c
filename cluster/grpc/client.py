"""A client of `kvarto.v1.Inference` for benchmarks: it counts tokens and leaves text alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Self

import grpc  # type: ignore[import-untyped]

from ...protos import inference_pb2 as pb
from ...protos.errors import KvartoError, UnavailableError
from ...protos.inference_pb2_grpc import InferenceStub

CONNECT_S = 10.0


class GrpcClient:
    """A `StreamClient` of the server at `address` (host:port), as an asynchronous context manager."""

    counts_pieces = False

    def __init__(self, address: str, api_key: str | None) -> None:
        self._address = address
        self._metadata = None if api_key is None else (("authorization", f"Bearer {api_key}"),)
        self._channel: grpc.aio.Channel | None = None

    async def __aenter__(self) -> Self:
        """Raises `UnavailableError` when nobody answers at the address."""
        self._channel = grpc.aio.insecure_channel(self._address)
        try:
            await asyncio.wait_for(self._channel.channel_ready(), CONNECT_S)
        except TimeoutError:
            await self._channel.close()
            raise UnavailableError(
                f"no gRPC server answers at {self._address}: start one with `kvarto serve`, or give the port of "
                "another with --grpc-port") from None
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._channel is not None:
            await self._channel.close()

    async def stream(self, prompt: list[int], output_len: int) -> AsyncGenerator[int, None]:
        """See `StreamClient`."""
        request = pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=prompt),
            sampling=pb.SamplingParameters(temperature=0, max_tokens=output_len, ignore_eos=True))
        call = InferenceStub(self._channel).GenerateStream(  # type: ignore[no-untyped-call]
            request, metadata=self._metadata)
        count = 0
        try:
            async for response in call:
                count += len(response.token_ids)
                yield count
        except grpc.aio.AioRpcError as error:
            kind = UnavailableError if error.code() is grpc.StatusCode.UNAVAILABLE else KvartoError
            raise kind(f"{error.code().name}: {error.details()}") from None
        finally:
            call.cancel()
