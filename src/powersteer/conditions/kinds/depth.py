"""Depth: near is bright."""

from powersteer.conditions.kind import KINDS, Kind

KINDS.add(Kind("depth", polarity="near 1, far 0"))
