"""Run folders: checkpoints, records, the saved model, artifacts, and whether a run can be resumed."""
