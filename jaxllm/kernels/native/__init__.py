"""CPU kernels in C++, compiled at first use and called through XLA's typed FFI."""
