"""Compiled loops for a CPU: compiled when kvprune is installed, into `kvprune.kernels._cpu`.

    kernels     `CPUKernels`: the loops as operations on tensors
    loading     the library that they are in; arguments: what they take for tensors
    loops.h     what the files in C share: vectors, codes, hashes, and rows as a model or a table has them
    *.c         one file an operation

They run on PyTorch's own threads: both are built on OpenMP, and the library that PyTorch has loaded serves both.
"""

from kvprune.kernels.cpu.kernels import CPU
from kvprune.kernels.cpu.loading import library

__all__ = ["CPU", "library"]
