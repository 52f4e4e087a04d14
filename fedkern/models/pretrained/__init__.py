"""Pre-trained networks through transformers, their preprocessing, and files of weights."""
