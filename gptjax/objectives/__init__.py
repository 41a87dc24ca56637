"""The papers' losses as functions on arrays. Losses and statistics are sums over the batch, with a count: the mean is
taken once, over all devices, hosts and micro-batches. Shape suffixes: model/__init__.py.
"""
