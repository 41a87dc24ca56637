"""muP: the coordinate check, and the best learning rate at several widths."""
