"""Flower: aggregation strategies for its apps, and whole fedkern runs on its nodes (``--flower DIR``)."""
