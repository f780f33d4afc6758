"""The implementations of the ops, each registered under its backend's name."""

from neuroada_kernels.backends import cpu, eager

__all__ = ["cpu", "eager"]
