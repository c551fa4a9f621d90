"""``python -m powersteer.apps.cli``: the command ``powersteer``."""

from powersteer.apps.cli import main

if __name__ == "__main__":
    main()
