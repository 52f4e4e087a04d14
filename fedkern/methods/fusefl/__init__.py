"""FuseFL (arXiv 2410.20380): one-shot federated learning by progressive model fusion."""

from fedkern.methods.fusefl.method import FuseFL

__all__ = ["FuseFL"]
