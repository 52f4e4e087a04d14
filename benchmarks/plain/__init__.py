"""Methods as they are usually written: plain PyTorch, a module per client, state dicts averaged.

``benchmarks.bench_methods`` compares fedkern with them.  Data, partition and networks are fedkern's, so that both train
the same; nothing else is.
"""
