"""Zero- and few-shot evaluation: task files (published/*.toml), prompts of K examples, scoring, metrics.

Read in this order: requests.py (text to scored token sequences), packing.py (many requests in one row),
likelihood.py (their log-probabilities), task.py (a task file), harness.py (a task on a model).
"""
