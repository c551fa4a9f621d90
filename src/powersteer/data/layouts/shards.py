"""WebDataset: ``.tar`` shards, read in place; nothing is extracted, no link in one is followed."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar

from powersteer.conditions.kind import KINDS
from powersteer.core.errors import PowersteerError
from powersteer.core.files import reason_of
from powersteer.core.text import decode_text, parse_object
from powersteer.data.layouts.base import (
    PICTURE_SUFFIXES,
    Columns,
    ReadRow,
    Seen,
    alone,
    generated_of,
    inside,
    is_hidden,
    listed,
    texts_of,
)
from powersteer.data.rows import Picture, Row

Member = tuple[str, Callable[[], bytes]]
"""A member's name and its content."""
SHARD_SUFFIX = ".tar"
LONGEST_HEADER = 1 << 13
"""Bytes of what a header says beside the usual: long names, mostly. More is no shard of pictures."""
_LONG_HEADERS = (b"x", b"g", b"X", b"L", b"K")


class WebDataset:
    """``.tar`` shards: members that share a key, side by side.

    A key may come again in another shard, as many number theirs from 0; the same pair may not.
    """

    def fits(self, folder: Path) -> bool:
        """Whether there is a ``.tar``."""
        return bool(_shards(folder))

    def rows(self, folder: Path, columns: Columns, seen: Seen) -> Iterator[ReadRow]:
        """Shard by shard, key by key."""
        known: dict[str, _Group] = {}
        for shard in map(seen.take, _shards(folder)):
            with open_shard(str(shard), shard) as tar:
                places = [(one.name, one.offset_data, one.size) for one in members_of(str(shard), tar)]
            for key, found in groupby(places, key=lambda place: key_and_kind(place[0])[0]):
                group = _Group(shard, key, tuple(found))
                yield partial(group.row, known.get(key), columns, seen)
                known.setdefault(key, group)


@dataclass(frozen=True)
class _Group:
    """Members side by side that share a key."""

    shard: Path
    key: str
    places: tuple[tuple[str, int, int], ...]
    """Name, first byte, number of bytes."""

    def members(self) -> list[Member]:
        return [(name, partial(_slice, self.shard, offset, size)) for name, offset, size in self.places]

    def row(self, earlier: _Group | None, columns: Columns, seen: Seen) -> Row:
        """The pair, unless it came before."""
        if earlier is not None and earlier.shard == self.shard:
            raise parted(str(self.shard), self.key)
        if earlier is not None and earlier._holds(self):
            raise PowersteerError(f"{_where(self.shard, self.key)}: the same pair as in {earlier.shard}: remove one")
        return shard_row(str(self.shard), self.key, self.members(), columns, self.shard, seen)

    def _holds(self, other: _Group) -> bool:
        """The same members; contents are looked at where their lengths agree."""
        if [(name, size) for name, _, size in self.places] != [(name, size) for name, _, size in other.places]:
            return False
        return all(one() == two() for (_, one), (_, two) in zip(self.members(), other.members(), strict=True))


def shard_row(
    shard: str,
    key: str,
    members: Sequence[Member],
    columns: Columns,
    file: Path | None = None,
    seen: Seen | None = None,
) -> Row:
    """One pair of a shard.

    Args:
        shard: Its name.
        key: What the members' names share.
        members: All of them.
        columns: What the members are called.
        file: The shard, where it is a file of this machine.
        seen: Where columns, and members that no column names, are noted.

    Raises:
        PowersteerError: A picture is missing, two members claim one column, or the caption cannot be read.
    """
    where = _where(shard, key)
    kinds: dict[str, Member] = {}
    for member in members:
        kind = key_and_kind(member[0])[1]
        if kind in kinds:
            alone(where, kind, [kinds[kind][0], member[0]])
        kinds[kind] = member
    suffixes = {columns.image: PICTURE_SUFFIXES, columns.conditioning_image: (*PICTURE_SUFFIXES, *KINDS.suffixes)}
    found: dict[str, Picture] = {}
    used = {"json", "txt"}
    for column, allowed in suffixes.items():
        wanted = {column.lower() + suffix for suffix in allowed}
        wanted |= {suffix[1:] for suffix in allowed} if column == columns.image else set()
        mine = [kind for kind in kinds if kind in wanted]
        used |= set(mine)
        if not mine:
            raise PowersteerError(
                f"{where}: no member {key}.{column}.png (column {column}), but {listed(kinds)}: a key ends at the "
                "first dot of a name"
            )
        alone(where, column, [kinds[kind][0] for kind in mine])
        name, read = kinds[mine[0]]
        found[column] = Picture(f"{shard}:{name}", column, read, file)
    record = parse_object(_content(where, kinds["json"]), where) if "json" in kinds else {}
    texts = texts_of(where, record, columns.text)
    if "txt" in kinds:
        text = decode_text(_content(where, kinds["txt"]), where).strip()
        if texts and texts != (text,):
            raise PowersteerError(f"{where}: {key}.txt and {key}.json give different captions: keep one of them")
        texts = (text,)
    if seen is not None:
        seen.columns.update(kinds, record)
        seen.left_out += [f"{shard}:{kinds[kind][0]}" for kind in kinds if kind not in used]
    lacks = "" if texts else f"no {key}.txt, and no '{columns.text}' in {key}.json, but {listed(record)}"
    generated = generated_of(where, record, columns)
    return Row(where, found[columns.image], found[columns.conditioning_image], texts, generated, lacks)


def parted(shard: str, key: str) -> PowersteerError:
    """What to say of a key that comes twice in one shard."""
    return PowersteerError(f"{_where(shard, key)}: the key comes twice in the shard: its members must lie side by side")


def key_and_kind(name: str) -> tuple[str, str]:
    """``a/001.image.png`` → (``a/001``, ``image.png``): a key ends at the first dot of the file's name."""
    folder, slash, file = name.rpartition("/")
    stem, _, kind = file.partition(".")
    return folder + slash + stem, kind.lower()


def open_shard(where: str, path: Path | None = None, stream: Any = None) -> tarfile.TarFile:
    """A shard to read `members_of`: a file, or a stream that is read once.

    Raises:
        PowersteerError: It cannot be opened, or does not begin as a ``.tar`` does.
    """

    class Header(_Header):
        endings: ClassVar[list[Exception]] = []

    try:
        return tarfile.open(path, "r:" if stream is None else "r|", fileobj=stream, tarinfo=Header)
    except Exception as error:  # tarfile raises whatever its parser meets
        raise unreadable(where, error) from None


def members_of(where: str, tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The plain files in a shard, without hidden ones, in order.

    Raises:
        PowersteerError: It is damaged, cut short, or goes on after its end.
    """
    try:
        for member in tar:
            # A negative size leads back to where it was, for ever; tarfile of Python 3.11 follows it.
            if member.size < 0 or tar.offset <= member.offset:
                raise tarfile.ReadError("a member of negative size")
            if member.issparse():
                raise tarfile.ReadError(f"'{member.name}' is sparse")
            if member.isreg() and not any(
                is_hidden(part) for part in member.name.split("/") if part not in (".", "..")
            ):
                yield member
        header: Any = tar.tarinfo
        if type(header.endings[-1]).__name__ != "EOFHeaderError":  # at a damaged one, tarfile ends in silence
            raise header.endings[-1]
        rest: Any = tar.fileobj
        while chunk := rest.read(1 << 20):
            if chunk.strip(b"\0"):
                raise tarfile.ReadError("there is more after its end")
    except Exception as error:
        raise unreadable(where, error) from None


def unreadable(where: str, error: Exception) -> PowersteerError:
    """What to say of a shard at which reading failed."""
    return PowersteerError(f"cannot read the shard {where}: {reason_of(error)}; if it is damaged, write it anew")


class _Header(tarfile.TarInfo):
    """A header that remembers what ended the reading, and does not take long ones."""

    endings: ClassVar[list[Exception]]

    @classmethod
    def frombuf(cls, buf: Any, encoding: Any, errors: Any) -> Any:
        """See `tarfile.TarInfo`."""
        try:
            header = super().frombuf(buf, encoding, errors)
            if header.type in _LONG_HEADERS and header.size > LONGEST_HEADER:
                raise tarfile.HeaderError("a header of several pages")
        except Exception as error:
            cls.endings.append(error)
            raise
        return header


def _shards(folder: Path) -> list[Path]:
    return [path for path in inside(folder) if path.suffix == SHARD_SUFFIX]


def _where(shard: Path | str, key: str) -> str:
    return f"{str(shard).rpartition('/')[2]}[{key}]"


def _content(where: str, member: Member) -> bytes:
    try:
        return member[1]()
    except OSError as error:
        raise PowersteerError(f"{where}: {member[0]} cannot be read: {reason_of(error)}") from None


def _slice(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)
