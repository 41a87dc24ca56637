"""A reward model on real human judgements of which of two arguments is the more convincing."""
