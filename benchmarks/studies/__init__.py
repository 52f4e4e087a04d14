"""Studies of learning: results of the methods on real data, and the commands of their pages."""
