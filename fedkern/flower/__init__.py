"""Flower: faster aggregation for its apps (`strategies`, `flat_arrays`), and whole runs of fedkern on its nodes.

`server_app` and `client_app` are the two apps of such a run; ``--flower DIR`` writes their project (`project`).
"""
