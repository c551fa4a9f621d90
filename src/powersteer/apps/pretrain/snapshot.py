"""What a recipe has learned, in pieces that travel: the tokenizer and the weights of every stage, packed and cut."""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
from pathlib import Path

from powersteer.apps.pretrain.fit import WEIGHTS
from powersteer.core.errors import PowersteerError
from powersteer.core.files import read_bytes, reason_of, write_whole

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
    for i in range(count):
        piece = packed[i * PIECE_BYTES : (i + 1) * PIECE_BYTES]
        write_whole(folder / f"snapshot-{name}-{i + 1}-of-{count}", piece)
    for piece in folder.glob("snapshot-*"):
        if _PIECE.fullmatch(piece.name) and f"-{name}-" not in piece.name:
            piece.unlink()


def newest(folder: Path) -> list[Path]:
    """The pieces of the newest snapshot in a folder of which none is missing, in order; none where there is none.

    Raises:
        PowersteerError: There are pieces, and of every snapshot some are missing.
    """
    found: dict[str, dict[int, Path]] = {}
    whole: dict[str, int] = {}
    for piece in folder.glob("snapshot-*"):
        said = _PIECE.fullmatch(piece.name)
        if said is not None:
            found.setdefault(said[1], {})[int(said[2])] = piece
            whole[said[1]] = int(said[3])
    complete = [name for name, pieces in found.items() if set(pieces) == set(range(1, whole[name] + 1))]
    if found and not complete:
        name, pieces = next(iter(found.items()))
        missing = min(set(range(1, whole[name] + 1)) - set(pieces), default=0)
        raise PowersteerError(f"{folder} lacks snapshot-{name}-{missing}-of-{whole[name]}")
    latest = max(complete, key=lambda name: found[name][1].stat().st_mtime_ns, default=None)
    return [] if latest is None else [found[latest][number] for number in sorted(found[latest])]


def unpack(folder: Path, root: Path) -> None:
    """Put the newest pieces of a folder together again: files that ``root`` already has are left as they are.

    Raises:
        PowersteerError: A piece is missing or damaged, or a file would lie outside of ``root``.
    """
    pieces = newest(folder)
    packed = b"".join(map(read_bytes, pieces))
    if pieces and f"-{hashlib.sha256(packed).hexdigest()[:8]}-" not in pieces[0].name:
        raise PowersteerError(f"{pieces[0]}, or another piece of it, is damaged: bring it again")
    if not pieces:
        return
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        for member in tar:
            if (root / member.name).exists():
                continue
            try:
                tar.extract(member, root, filter="data")
            except (tarfile.TarError, OSError) as error:
                raise PowersteerError(f"cannot unpack {member.name} of {pieces[0]}: {reason_of(error)}") from None
