"""blend: feature maps with other samples' backgrounds, and images with a detector's boxes erased or kept."""
