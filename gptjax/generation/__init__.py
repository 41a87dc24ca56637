"""Text from a model: plain.py is the algorithm, decode.py the same with a KV cache, sampling.py chooses a token."""
