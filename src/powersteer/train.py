"""For several processes: ``accelerate launch … -m powersteer.train CONFIG.yaml [key=value …]``."""

from __future__ import annotations

import sys

from powersteer.apps.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "train")
    main()
