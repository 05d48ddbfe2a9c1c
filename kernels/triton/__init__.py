"""The ops as Triton kernels, for CUDA and HIP devices. See `docs/kernels.md`; `launch.py` is what `ops.py` calls.

Triton itself is imported by the modules that hold kernels, never here: without it, `kvarto.kernels` still works.
"""
