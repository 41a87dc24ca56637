"""A reward model on real human judgments of which of two arguments is the more convincing."""
