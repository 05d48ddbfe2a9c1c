"""`kvarto.v1.Inference`."""

from __future__ import annotations

import logging
from contextlib import aclosing
from uuid import uuid4

import grpc  # type: ignore[import-untyped]

from ...protos import inference_pb2 as pb
from ...protos.errors import KvartoError
from ...protos.inference_pb2_grpc import InferenceServicer
from ..frontend_protocol import Frontend
from ..http.models import check_model
from .convert import params_of, prompt_of, response_of

logger = logging.getLogger("kvarto.grpc")

_NAME_CHARS = 64
"""So much of a client's own request id goes into ours, which travel with every token."""


class Inference(InferenceServicer):
    """Streams generations from one frontend."""

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend

    async def GenerateStream(self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext) -> None:
        """Answer one call. When the client cancels or goes away, gRPC cancels this coroutine."""
        try:
            await self._answer(request, context)
        except KvartoError as error:
            await context.abort(grpc.StatusCode[error.code], error.message)
        except grpc.aio.BaseError:
            raise
        except Exception:
            logger.exception("a call failed unexpectedly")
            await context.abort(grpc.StatusCode.INTERNAL, "internal error; the server's log says more")

    async def _answer(self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext) -> None:
        check_model(request.model or None, self._frontend.config)
        params = params_of(request, self._frontend.default_sampling)
        prompt = await prompt_of(request, self._frontend.tokenizer)
        engine_id = "-".join(filter(None, ("grpc", request.request_id[:_NAME_CHARS], uuid4().hex)))
        stream = self._frontend.stream(
            prompt.token_ids, params, request_id=engine_id, priority=request.priority, cache_salt=request.cache_salt)
        usage = pb.Usage(prompt_tokens=len(prompt.token_ids))
        num_running = params.n
        async with aclosing(stream):
            async for chunk in stream:
                usage.completion_tokens += len(chunk.token_ids) + chunk.num_dropped_tokens
                usage.cached_tokens = max(usage.cached_tokens, chunk.num_cached_tokens)
                num_running -= chunk.finish_reason is not None
                response = response_of(request.request_id or engine_id, chunk)
                if num_running == 0:
                    response.usage.CopyFrom(usage)
                # Written, not yielded: a generator that is abandoned at its yield would be closed only when collected.
                await context.write(response)
        if num_running:
            raise RuntimeError(f"the engine ended a request before {num_running} of its completions were finished")
