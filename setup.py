"""Builds the native CPU kernels as part of the install; everything else is in pyproject.toml."""

import os
import runpy
import sys
import warnings
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

NATIVE = Path(__file__).parent / "kernels" / "native"


class BuildWithKernels(build_py):
    """Compiles the kernels beside their sources before the package's files are collected."""

    def run(self) -> None:
        native = runpy.run_path(str(NATIVE / "build.py"))
        try:
            native["build"](NATIVE)
        except native["NativeBuildError"] as error:
            message = (f"\n{'!' * 78}\nkvarto's native CPU kernels were NOT built: {error}\n"
                       "It will run on the much slower torch reference kernels. Install a C++17 compiler with OpenMP\n"
                       f"(Debian: apt install g++) and install kvarto again.\n{'!' * 78}")
            warnings.warn(message, stacklevel=1)
            print(message, file=sys.stderr)
            if os.environ.get("KVARTO_REQUIRE_NATIVE"):
                raise
        super().run()


class PlatformDistribution(Distribution):
    """The wheel holds machine code: it is for one platform."""

    def has_ext_modules(self) -> bool:
        return True


setup(cmdclass={"build_py": BuildWithKernels}, distclass=PlatformDistribution)
