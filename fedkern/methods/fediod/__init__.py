"""FedIOD (arXiv 2312.14478): one generator against many private discriminators."""

from fedkern.methods.fediod.method import FedIOD

__all__ = ["FedIOD"]
