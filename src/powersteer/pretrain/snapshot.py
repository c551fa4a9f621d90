"""What a recipe has learned, in pieces that travel: the tokenizer and the weights of every stage, packed and cut."""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
from pathlib import Path

from powersteer.core.files import read_bytes, write_whole
from powersteer.errors import PowersteerError
from powersteer.pretrain.fit import WEIGHTS

PIECE_BYTES = 15_900_000
"""Bytes of one piece, at most."""
_KEPT = ("tokenizer/*", f"*/{WEIGHTS}", "*/log.jsonl")
_PIECE = re.compile(r"snapshot-([0-9a-f]{8})-(\d+)-of-(\d+)")


def pack(root: Path, folder: Path) -> None:
    """Write the pieces of a recipe's folder, and remove those of before.

    Args:
        root: The ``output_dir`` of the recipe.
        folder: Where the pieces go.

    Raises:
        PowersteerError: They cannot be written.
    """
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for file in sorted(file for kept in _KEPT for file in root.glob(kept) if file.is_file()):
            tar.add(file, file.relative_to(root).as_posix())
    packed = content.getvalue()
    name = hashlib.sha256(packed).hexdigest()[:8]
    count = -(-len(packed) // PIECE_BYTES)
    older = list(_pieces(folder))
    for i in range(count):
        piece = packed[i * PIECE_BYTES : (i + 1) * PIECE_BYTES]
        write_whole(folder / f"snapshot-{name}-{i + 1}-of-{count}", piece)
    for piece in older:
        if f"-{name}-" not in piece.name:
            piece.unlink()


def unpack(folder: Path, root: Path) -> None:
    """Put the pieces of a folder together again: files that ``root`` already has are left as they are.

    Raises:
        PowersteerError: A piece is missing or damaged, or a file would lie outside of ``root``.
    """
    by_name: dict[str, dict[int, Path]] = {}
    counts: dict[str, int] = {}
    for piece in _pieces(folder):
        name, number, count = _parts(piece)
        by_name.setdefault(name, {})[number] = piece
        counts[name] = count
    if not by_name:
        return
    whole = [name for name, pieces in by_name.items() if sorted(pieces) == list(range(1, counts[name] + 1))]
    if not whole:
        name, pieces = next(iter(by_name.items()))
        missing = next(number for number in range(1, counts[name] + 1) if number not in pieces)
        raise PowersteerError(f"{folder} lacks snapshot-{name}-{missing}-of-{counts[name]}")
    name = max(whole, key=lambda name: by_name[name][1].stat().st_mtime_ns)
    packed = b"".join(read_bytes(by_name[name][number]) for number in sorted(by_name[name]))
    if hashlib.sha256(packed).hexdigest()[:8] != name:
        raise PowersteerError(f"a piece of snapshot-{name} in {folder} is damaged: bring it again")
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        for member in tar:
            if (root / member.name).exists():
                continue
            try:
                tar.extract(member, root, filter="data")
            except (tarfile.TarError, OSError) as error:
                raise PowersteerError(f"cannot unpack {member.name} of snapshot-{name}: {error}") from None


def _pieces(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.glob("snapshot-*")) if _PIECE.fullmatch(path.name)]


def _parts(piece: Path) -> tuple[str, int, int]:
    found = _PIECE.fullmatch(piece.name)
    assert found is not None
    return found[1], int(found[2]), int(found[3])
