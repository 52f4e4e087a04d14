"""blend: feature maps with other samples' backgrounds; images with a detector's boxes erased or kept."""
