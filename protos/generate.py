"""Regenerates the gRPC stubs beside `inference.proto`: `python -m kvarto.protos.generate`."""

from __future__ import annotations

import tempfile
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc  # type: ignore[import-untyped]

HERE = Path(__file__).parent
NAMES = ("inference_pb2.py", "inference_pb2.pyi", "inference_pb2_grpc.py")


def generate(target: Path) -> None:
    """Write the stubs into the folder `target`. The same compiler gives the same bytes."""
    with tempfile.TemporaryDirectory() as folder:
        # Mapped to its place in the package: a bare `inference.proto` would clash with that of another project, since
        # all of a process share one pool of descriptors.
        code = protoc.main([
            "protoc", f"-Ikvarto/protos={HERE}", f"-I{files('grpc_tools') / '_proto'}", f"--python_out={folder}",
            f"--pyi_out={folder}", f"--grpc_python_out={folder}", "kvarto/protos/inference.proto"])
        if code != 0:
            raise SystemExit(code)
        for name in NAMES:
            text = (Path(folder) / "kvarto" / "protos" / name).read_text()
            text = text.replace("from kvarto.protos import ", "from . import ")
            # protobuf and grpc have no types of their own, so that nothing here can be checked.
            (target / name).write_text(f"# mypy: ignore-errors\n{text}")


if __name__ == "__main__":
    generate(HERE)
