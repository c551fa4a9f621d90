"""How good a steered picture is: fidelity to its condition, and the report of a run."""
