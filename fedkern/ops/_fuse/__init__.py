"""fuse: feature maps of several clients' blocks concatenated or averaged, and the blocks as one module."""
