"""Where commands print, and how they write figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from powersteer.errors import PowersteerError

out = Console()


def write_json(file: Path | None, values: dict[str, Any]) -> None:
    """Write figures to a file, if one is given."""
    if file is None:
        return
    try:
        file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise PowersteerError(f"cannot write {file}: {error.strerror}") from None
