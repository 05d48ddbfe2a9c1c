"""The gRPC server of one frontend."""

from __future__ import annotations

import grpc  # type: ignore[import-untyped]
from grpc_health.v1 import health, health_pb2_grpc  # type: ignore[import-untyped]
from grpc_reflection.v1alpha import reflection  # type: ignore[import-untyped]

from ...protos import inference_pb2
from ...protos.config import ServeConfig
from ...protos.errors import ConfigError, ResourcesError
from ...protos.inference_pb2_grpc import add_InferenceServicer_to_server
from ..frontend_protocol import Frontend
from .auth import KeyInterceptor
from .health import HealthService
from .inference import Inference

SERVICE_NAME: str = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name


class GrpcServer:
    """Serves `frontend` at `config.host` and `config.grpc_port`, in the event loop that `start` runs in."""

    def __init__(self, frontend: Frontend, config: ServeConfig) -> None:
        if config.grpc_port is None:
            raise ConfigError("grpc_port is null, which means that there is no gRPC server", param="grpc_port")
        self._frontend = frontend
        self._config = config
        self._address = f"[{config.host}]" if ":" in config.host else config.host
        self._server: grpc.aio.Server | None = None
        self._health: HealthService | None = None

    async def start(self) -> int:
        """Listen; the port in use. Raises `ResourcesError` when the port is taken."""
        key = self._config.api_key
        # With SO_REUSEPORT a second server on the same port would start and take a share of the first one's clients.
        server = grpc.aio.server(
            interceptors=[] if key is None else [KeyInterceptor(key)], options=[("grpc.so_reuseport", 0)])
        names = (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
        self._health = HealthService(self._frontend, names)
        add_InferenceServicer_to_server(Inference(self._frontend), server)  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection(names, server)
        try:
            port = int(server.add_insecure_port(f"{self._address}:{self._config.grpc_port}"))
        except RuntimeError as error:
            raise ResourcesError(
                f"the gRPC server cannot listen on {self._address}:{self._config.grpc_port}: {error}; free the port, "
                "or choose another with grpc_port (0: any free one)", param="grpc_port") from None
        await server.start()
        self._server = server
        return port

    async def stop(self, grace_s: float) -> None:
        """Take no new calls, let running ones go on for `grace_s`, then cancel them. Idempotent."""
        if self._health is not None:
            self._health.drain()
        if self._server is not None:
            await self._server.stop(grace_s)
