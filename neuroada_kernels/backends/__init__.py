"""The implementations of the ops, each registered under its backend's name."""

from neuroada_kernels.backends import cpu, eager, triton

__all__ = ["cpu", "eager", "triton"]
