"""Measurements: what steering costs, as ratios within one run."""
