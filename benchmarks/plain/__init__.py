"""The methods written the way they are usually written: plain PyTorch, a module per client, state dicts averaged.

What ``benchmarks.bench_methods`` compares fedkern with.  Data, partition and networks are fedkern's, so that both train
the same; nothing else is.
"""
