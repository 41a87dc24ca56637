"""The K-ranked reward model held against a known utility: its ceiling, its floor and its calibration are exact."""
