"""CPU kernels in C++ behind a C ABI; see `build.py` for how they are made and `library.py` for how they are called."""
