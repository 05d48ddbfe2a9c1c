"""Compiles a kernel variant for a target, without a device, and reads from the binary what it needs of one."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .available import interpreted
from .variants import TARGETS, Variant

ALIGNED_SCALARS = ("query_stride", "key_stride", "value_stride", "block_stride", "row_size", "num_words",
                   "source_stride", "destination_stride", "num_slots", "residual_stride")


@dataclass(frozen=True, slots=True)
class Resources:
    """Per thread: registers, and bytes of them spilled to memory. Per program: bytes of shared memory."""

    registers: int
    spilled_bytes: int
    shared_bytes: int

    @property
    def text(self) -> str:
        return f"{self.registers} / {self.spilled_bytes} / {self.shared_bytes}"


def resources_of(variant: Variant, target: str) -> Resources:
    """`target`: one of `TARGETS`.

    Raises:
        RuntimeError: Triton is interpreting, so that there is nothing to compile.
    """
    if interpreted():
        raise RuntimeError("unset TRITON_INTERPRET to compile kernels")
    aligned = [["tt.divisibility", 16]]
    constants: dict[tuple[int, ...], object] = {}
    attrs: dict[tuple[int, ...], object] = {}
    for index, (name, types) in enumerate(variant.signature.items()):
        if isinstance(types, tuple):  # all of its pointers and strides are aligned; what it leaves out is None
            constants |= {(index, i): None for i, element in enumerate(types) if element == "constexpr"}
            attrs |= {(index, i): aligned for i, element in enumerate(types) if element != "constexpr"}
        elif types == "constexpr":
            constants[index,] = variant.constants.get(name)
        elif name.endswith("_ptr") or name in ALIGNED_SCALARS:
            attrs[index,] = aligned
    source = ASTSource(variant.kernel, variant.signature, constants, attrs)
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    compiled = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
    shared_bytes = int(compiled.metadata.shared)
    if "cubin" in compiled.asm:
        return _of_cubin(compiled.asm["cubin"], shared_bytes)
    return _of_amdgcn(compiled.asm["amdgcn"], shared_bytes)


def _of_cubin(cubin: bytes, shared_bytes: int) -> Resources:
    # Triton's kernels have no stack but for what is spilled, and no shared memory but what is asked for at launch.
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return Resources(found["REG"], found["STACK"] + found["LOCAL"], shared_bytes)


def _of_amdgcn(text: str, shared_bytes: int) -> Resources:
    found = {name: int(number) for name, number in re.findall(r"\.(\w+):\s+(\d+)", text)}
    # Scalar registers spill into lanes of vector registers; what goes to memory is in the private segment.
    return Resources(found["vgpr_count"], found["private_segment_fixed_size"], shared_bytes)
