"""Surface normals, as colours."""

from powersteer.conditions.kind import KINDS, Kind

KINDS.add(Kind("normal"))
