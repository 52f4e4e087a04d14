"""The process: what fedkern does with its own (memory, standard streams, interrupts, threads), and what it runs on."""
