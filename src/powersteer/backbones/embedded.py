"""The name of the base that ships in the package; torch is not needed to know it."""

EMBEDDED_BASE = "powersteer-tiny"
