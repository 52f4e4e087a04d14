"""distill: losses on rows of class logits (class axis 1): divergences and entropies, of one teacher or of K."""
