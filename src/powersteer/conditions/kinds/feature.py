"""Feature maps: any numbers at the latents' size."""

from powersteer.conditions.kind import KINDS, Kind

KINDS.add(Kind("feature", channels=None, at_latents=True))
