"""In-context learning on rules that only a prompt's examples reveal: __main__.py."""
