"""Does a law fitted to small runs forecast a larger one? A whole study of scaling on a CPU: __main__.py."""
