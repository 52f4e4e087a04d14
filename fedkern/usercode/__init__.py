"""Code that a user names: plugins, names of functions and classes, and the identity of their code."""
