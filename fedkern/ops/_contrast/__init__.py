"""contrast: the symmetric in-batch contrastive loss."""
