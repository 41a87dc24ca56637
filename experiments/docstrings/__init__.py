"""Write a docstring's summary line from a signature: the task, its labeler and its measure."""
