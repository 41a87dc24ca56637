"""Scaling laws: finished runs → laws fitted to them, with intervals → forecasts that are sealed before the run."""
