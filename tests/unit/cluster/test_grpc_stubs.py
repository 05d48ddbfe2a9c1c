"""The generated gRPC stubs belong to their `.proto` file."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

from kvarto.protos import inference_pb2, inference_pb2_grpc


def test_generating_the_stubs_again_gives_the_same_bytes(tmp_path):
    pytest.importorskip("grpc_tools")
    version = importlib.metadata.version("grpcio-tools")
    if version != inference_pb2_grpc.GRPC_GENERATED_VERSION:
        pytest.skip(f"the stubs come from grpcio-tools {inference_pb2_grpc.GRPC_GENERATED_VERSION}, this is {version}")
    from kvarto.protos.generate import HERE, NAMES, generate

    generate(tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in NAMES} == {
        name: Path(HERE, name).read_bytes() for name in NAMES}


def test_the_descriptor_has_a_name_that_no_other_package_has():
    assert inference_pb2.DESCRIPTOR.name == "kvarto/protos/inference.proto"
    assert inference_pb2.DESCRIPTOR.package == "kvarto.v1"
