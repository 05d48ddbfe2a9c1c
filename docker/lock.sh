#!/bin/sh
# Writes the requirements-*.txt that the images are built from: exact versions with hashes, for Python 3.11 on x86-64.
# Needs uv (pip install uv). UV_FIND_LINKS may name a folder that has the wheel of torch+cpu.
set -eu
cd "$(dirname "$0")/.."

compile() {
    uv pip compile --quiet --generate-hashes --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
        --custom-compile-command docker/lock.sh "$@"
}

cpu=https://download.pytorch.org/whl/cpu
[ -n "${UV_FIND_LINKS:-}" ] || export UV_FIND_LINKS="$cpu/torch/"
echo "torch==2.13.0+cpu" | compile pyproject.toml --extra tracing --constraints - -o docker/requirements-cpu.txt
unset UV_FIND_LINKS
compile pyproject.toml --extra tracing --extra gpu -o docker/requirements-cuda.txt
