"""What a run does around its rounds, a file each; `fedkern.engine.run` puts the parts in their order."""
