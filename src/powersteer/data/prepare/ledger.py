"""What became of each item, written down as it happens: the log of rows, the rejected, and shards."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from powersteer.core.errors import PowersteerError
from powersteer.core.files import is_file, read_bytes, reason_of, write_whole
from powersteer.core.text import parse_object
from powersteer.data.prepare.make import Outcome

FOLDER = "rows"
PAIRS_A_SHARD = 1000
_KINDS: dict[str, Any] = {
    "key": str,
    "name": str,
    "split": str,
    "row": (dict, type(None)),
    "reason": (str, type(None)),
}
"""The keys of a line of the log, and the types that their values may have."""


class Ledger:
    """The log of one part of a run.

    Every line is an outcome whose files are there. A last line that was cut short is forgotten, and its item is made
    again.

    Args:
        out_dir: Of the run.
        part: Of so many.
        parts: How many.
    """

    def __init__(self, out_dir: Path, part: int, parts: int) -> None:
        self.path = log_path(out_dir, part, parts)
        self.rejected_path = out_dir / ("rejected.csv" if parts == 1 else f"rejected-{part:05d}-of-{parts:05d}.csv")
        self.outcomes = list(read_log(self.path))
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            whole = "".join(map(_line, self.outcomes)).encode()
            if self.path.exists() and self.path.stat().st_size != len(whole):
                write_whole(self.path, whole)
            write_whole(self.rejected_path, rejected_table(self.outcomes))
            self._log = self.path.open("a", encoding="utf-8")
            self._rejected = self.rejected_path.open("a", encoding="utf-8", newline="")
        except OSError as error:
            raise PowersteerError(f"cannot write {self.path}: {reason_of(error)}") from None

    def add(self, outcome: Outcome) -> None:
        """Write an outcome down.

        Raises:
            PowersteerError: It cannot be written.
        """
        self.outcomes.append(outcome)
        try:
            self._log.write(_line(outcome))
            self._log.flush()
            if outcome.row is None:
                self._rejected.write(_csv([outcome]))
                self._rejected.flush()
        except OSError as error:
            raise PowersteerError(f"cannot write {self.path}: {reason_of(error)}") from None

    def close(self) -> None:
        """Close the files."""
        self._log.close()
        self._rejected.close()


def log_path(out_dir: Path, part: int, parts: int) -> Path:
    """Where the log of one part lies."""
    return out_dir / FOLDER / f"{part:05d}-of-{parts:05d}.jsonl"


def read_log(path: Path) -> Iterator[Outcome]:
    """The outcomes of a log, as far as it is whole; none without one."""
    if not is_file(path):
        return
    for line in read_bytes(path).split(b"\n"):
        try:
            yield _outcome(parse_object(line, str(path)))
        except (PowersteerError, TypeError):
            return


def rejected_table(outcomes: Iterable[Outcome]) -> bytes:
    """``rejected.csv``: name, split and reason of what was refused."""
    return ("name,split,reason\n" + _csv(one for one in outcomes if one.row is None)).encode()


class Shards:
    """WebDataset shards of finished pairs, in the order of the log; the pairs' own files are deleted.

    Args:
        out_dir: Of the run.
        part: Its shards bear its number.
    """

    def __init__(self, out_dir: Path, part: int) -> None:
        self.out_dir, self.part = out_dir, part
        self._waiting: defaultdict[str, list[Outcome]] = defaultdict(list)
        self._count: defaultdict[str, int] = defaultdict(int)

    def add(self, outcome: Outcome) -> None:
        """Take a pair; a shard is written when it is full."""
        if outcome.row is not None:
            self._waiting[outcome.split].append(outcome)
            if len(self._waiting[outcome.split]) == PAIRS_A_SHARD:
                self._pack(outcome.split)

    def finish(self) -> None:
        """Write the rest."""
        for split in [split for split, waiting in self._waiting.items() if waiting]:
            self._pack(split)

    def _pack(self, split: str) -> None:
        path = self.out_dir / split / f"{self.part:05d}-{self._count[split]:06d}.tar"
        outcomes = self._waiting.pop(split)
        self._count[split] += 1
        try:
            if not path.exists():  # else it was written before the run was stopped
                partial = path.with_name(f".{path.name}")
                with tarfile.open(partial, "w") as tar:
                    for outcome in outcomes:
                        for name, content in self._members(outcome):
                            entry = tarfile.TarInfo(name)
                            entry.size = len(content)
                            tar.addfile(entry, io.BytesIO(content))
                partial.replace(path)
            for outcome in outcomes:
                for file in self._files(outcome).values():
                    file.unlink(missing_ok=True)
        except OSError as error:
            raise PowersteerError(f"cannot write {path}: {reason_of(error)}") from None

    def _members(self, outcome: Outcome) -> Iterator[tuple[str, bytes]]:
        row = outcome.row or {}
        for column, file in self._files(outcome).items():
            yield f"{outcome.key}.{column}{file.suffix}", file.read_bytes()
        rest = {name: value for name, value in row.items() if not name.endswith("file_name")}
        yield f"{outcome.key}.json", json.dumps(rest, ensure_ascii=False).encode()

    def _files(self, outcome: Outcome) -> dict[str, Path]:
        row: dict[str, Any] = outcome.row or {}
        columns = {"image": "file_name", "conditioning_image": "conditioning_image_file_name"}
        return {column: self.out_dir / outcome.split / row[name] for column, name in columns.items()}


def _outcome(said: dict[str, Any]) -> Outcome:
    if not all(isinstance(said.get(key), kind) for key, kind in _KINDS.items()):
        raise TypeError
    return Outcome(**said)


def _line(outcome: Outcome) -> str:
    return json.dumps(asdict(outcome), ensure_ascii=False) + "\n"


def _csv(outcomes: Iterable[Outcome]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([one.name, one.split, one.reason] for one in outcomes)
    return text.getvalue()
