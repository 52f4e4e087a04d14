"""What a run does around its rounds, a file each; `fedkern.engine.order` holds their order."""
