"""Shared parts of methods: objectives, figures, calibration, one-shot training, robust weights."""
