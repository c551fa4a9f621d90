"""The kind of adapters that do not say theirs: of one channel it is read as a sketch, else as a plain picture."""

from powersteer.conditions.kind import KINDS, UNRECORDED
from powersteer.conditions.kinds.sketch import Sketch

KINDS.add(Sketch(UNRECORDED))
