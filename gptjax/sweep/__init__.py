"""Sweeps: many runs from one config file, shared by workers on any number of hosts, interrupted and taken up again."""
