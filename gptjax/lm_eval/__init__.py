"""A workdir as a model of EleutherAI's lm-evaluation-harness: adapter.py; __main__.py runs the harness's own command.

In Python, after `import gptjax.lm_eval.adapter`:

    lm_eval.simple_evaluate(model="gptjax", model_args={"workdir": "runs/x"}, tasks=["piqa"])

Releases of the harness after 0.4.13 find the model by its entry point (pyproject.toml), without that import.
"""
