"""Studies of learning: what the methods reach on real data, and the commands of their pages."""
