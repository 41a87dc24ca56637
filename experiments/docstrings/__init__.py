"""Write a docstring's summary line from a signature: the task, its labeller and its measure."""
