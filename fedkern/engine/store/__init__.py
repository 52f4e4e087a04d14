"""Run folders: checkpoints, records, the saved model, artifacts, and checks before a run is resumed."""
