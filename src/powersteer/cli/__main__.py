"""``python -m powersteer.cli``: the command ``powersteer``."""

from powersteer.cli import main

if __name__ == "__main__":
    main()
