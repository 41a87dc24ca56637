"""Sweeps: many runs from one config file, shared by workers on any number of hosts, resumed after any interruption."""
