"""gRPC against a real server."""

from __future__ import annotations

from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvarto.protos import inference_pb2, inference_pb2_grpc


def test_a_stream_of_tokens_and_a_healthy_service(server: Any) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        # The fixture waits for HTTP; gRPC is another replica, which may listen a moment later.
        health = health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(), timeout=30, wait_for_ready=True)
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        request = inference_pb2.GenerateRequest(
            model="smollm2", text="The capital of France is",
            sampling=inference_pb2.SamplingParameters(temperature=0, max_tokens=8, ignore_eos=True))
        replies = list(inference_pb2_grpc.InferenceStub(channel).GenerateStream(request, timeout=60))
    assert "Paris" in "".join(reply.text for reply in replies)
    assert sum(len(reply.token_ids) for reply in replies) == 8
