"""The implementations of the ops, each registered under its backend's name."""

from neuroada_kernels.backends import cpu, cuda, eager, triton

__all__ = ["cpu", "cuda", "eager", "triton"]
