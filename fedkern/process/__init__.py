"""Memory, standard streams, interrupts and threads of fedkern's process, and its machine."""
