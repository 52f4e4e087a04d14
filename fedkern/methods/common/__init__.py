"""Parts that several methods share: objectives, figures, calibration, one-shot training, robust weights."""
