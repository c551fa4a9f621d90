"""Poses: skeletons of people in colours, on black."""

from powersteer.conditions.kind import KINDS, Kind

KINDS.add(Kind("pose"))
