"""Kernels in CUDA C++ for Hopper, compiled at run time and launched inside compiled programs."""
