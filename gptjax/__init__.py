"""gptjax: the GPT story, from raw text to an aligned model, as one functional JAX codebase."""

__version__ = "0.1.0"
