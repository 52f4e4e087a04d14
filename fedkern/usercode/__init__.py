"""User-defined code: plugins, names of functions and classes, and the identity of their code."""
