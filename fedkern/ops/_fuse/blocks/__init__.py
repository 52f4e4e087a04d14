"""FusedBlocks: M clients' blocks of one structure as one module, and the compiler behind it."""
