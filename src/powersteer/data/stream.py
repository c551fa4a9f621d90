"""WebDataset shards read in order, over and over: for data that no disk of this machine holds."""

from __future__ import annotations

import random
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby, islice
from typing import Any

import fsspec
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from powersteer.core.errors import PowersteerError
from powersteer.core.files import reason_of
from powersteer.data.encode import EncodedPairs, Encoder, Sample, TextStates, one_line_errors
from powersteer.data.layouts.base import Columns, is_hidden
from powersteer.data.layouts.shards import (
    SHARD_SUFFIX,
    key_and_kind,
    members_of,
    open_shard,
    parted,
    shard_row,
    unreadable,
)
from powersteer.data.order import Share
from powersteer.data.pairs import Size, Transform, Views, captioned
from powersteer.data.rows import Row

SHUFFLE_BUFFER = 1000
"""Rows that wait, encoded, for their turn: a row comes at random out of so many."""
MOST_SHARDS = 100_000
"""That one pattern stands for."""
LONGEST_RANGE = 50
"""Characters of ``{000..099}``."""


def list_shards(pattern: str) -> list[str]:
    """The shards that a folder, a pattern or a URL of either stands for.

    Args:
        pattern: A folder with ``*.tar``; or names with ``*``, ``{000..099}`` or ``{a,b}``, on this machine or at a URL
            that fsspec can open (``https://``, ``s3://``, ``hf://``, …).

    Raises:
        PowersteerError: There are none, or they cannot be listed.
    """
    names = _expand(pattern)
    try:
        filesystem, _ = fsspec.core.url_to_fs(names[0])
        if len(names) == 1 and not names[0].endswith(SHARD_SUFFIX):
            names = [f"{names[0].rstrip('/')}/*{SHARD_SUFFIX}"]
        found: list[str] = []
        for name in names:
            matches = sorted(filesystem.glob(name)) if "*" in name else [name]
            found += [str(filesystem.unstrip_protocol(match)) if "*" in name else match for match in matches]
    except Exception as error:  # fsspec's file systems raise what their clients do
        raise PowersteerError(f"cannot list the shards {pattern}: {reason_of(error)}") from None
    found = [name for name in found if not is_hidden(name.rpartition("/")[2])]
    if not found:
        raise PowersteerError(f"there are no shards {names[0]}")
    return found


def read_shard(shard: str, columns: Columns) -> Iterator[Row]:
    """The pairs of one shard, in order, read once from beginning to end.

    Raises:
        PowersteerError: It cannot be opened or read, or a row is malformed.
    """
    with _opened(shard) as file, open_shard(shard, stream=file) as tar:
        keys: set[str] = set()
        for key, group in groupby(_members(shard, tar), key=_key):
            if key in keys:
                raise parted(shard, key)
            keys.add(key)
            yield shard_row(shard, key, [(name, partial(bytes, content)) for name, content in group], columns)


class StreamedPairs(IterableDataset[list[Sample]]):
    """Pairs of shards, ready for training; each process and worker has shards of its own.

    Args:
        shards: From `list_shards`.
        encoder: The base's encoders.
        probe: A few of the pairs, encoded, to be watched on fixed noise.
        transform: Row → tensors.
        size: Pixels (height, width).
        views: The versions of each pair, one of which is drawn.
        columns: What the shards call theirs.
        default_prompt: Caption of pairs that have none.
    """

    def __init__(
        self,
        shards: Sequence[str],
        encoder: Encoder,
        probe: EncodedPairs,
        *,
        transform: Transform,
        size: Size,
        views: Views,
        columns: Columns,
        default_prompt: str | None = None,
    ) -> None:
        self.shards, self.encoder, self.probe = list(shards), encoder, probe
        self.transform, self.size, self.views = transform, size, views
        self.columns, self.default_prompt = columns, default_prompt
        self._share, self._seed, self._first = Share(1), 0, 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "encoder": None, "probe": None}  # the base does not travel to a worker

    def latents(self, samples: Sequence[Sample]) -> torch.Tensor:
        """(N, C, h, w)."""
        return self.encoder.latents(torch.stack([sample.image for sample in samples]))

    def texts(self, prompts: Sequence[str]) -> TextStates:
        """Text states of prompts."""
        return self.encoder.texts(prompts)

    def micro_batches(self, share: Share, seed: int, first: int, workers: int) -> Iterator[list[Sample]]:
        """This process's samples of each accumulation step, from update ``first`` on; what came before is read past.

        Raises:
            PowersteerError: There are fewer shards than readers.
        """
        readers = share.processes * max(1, workers)
        if readers > len(self.shards):
            raise PowersteerError(
                f"{len(self.shards)} shards are too few for {readers} readers (processes × dataloader_num_workers)"
            )
        self._share, self._seed, self._first = share, seed, first * share.accumulation
        return one_line_errors(DataLoader(self, batch_size=None, num_workers=workers))

    def __iter__(self) -> Iterator[list[Sample]]:
        """The batches of one worker: of n workers, each makes every n-th batch of the process."""
        worker = get_worker_info()
        index, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        lane = (index + self._first) % workers  # the loader begins with its first worker, wherever the run is
        taken = (self._first - lane + workers - 1) // workers
        keys = self._rows(lane * self._share.processes + self._share.process, workers * self._share.processes)
        for _ in range(taken * self._share.size):
            next(keys)
        while True:
            yield [self._sample(*next(keys)) for _ in range(self._share.size)]

    def _rows(self, lane: int, lanes: int) -> Iterator[tuple[Row, int]]:
        """(row, view), shuffled, without end."""
        chance = random.Random(1_000_003 * self._seed + lane)
        waiting: list[Row] = []
        round_ = 0
        while True:
            order = list(self.shards)
            random.Random(1_000_003 * self._seed + round_).shuffle(order)
            for shard in order[lane::lanes]:
                for row in read_shard(shard, self.columns):
                    waiting.append(captioned(row, self.default_prompt))
                    if len(waiting) >= SHUFFLE_BUFFER:
                        yield waiting.pop(chance.randrange(len(waiting))), chance.randrange(len(self.views))
            if not waiting:
                raise PowersteerError(f"the shards hold no pairs: {order[lane]}, …")
            while waiting:  # a round ends before the next begins: every pair comes once in each
                yield waiting.pop(chance.randrange(len(waiting))), chance.randrange(len(self.views))
            round_ += 1

    def _sample(self, row: Row, view: int) -> Sample:
        image, condition = self.transform(
            row, self.size, self.views.of(zlib.crc32(row.where.encode(errors="surrogateescape")), view)
        )
        return Sample(row.where, image, condition, row.texts, row.generated_text)


def _opened(shard: str) -> Any:
    try:
        source: Any = fsspec.open(shard, "rb")
        return source.open()
    except Exception as error:  # fsspec's file systems raise what their clients do
        raise unreadable(shard, error) from None


def _members(shard: str, tar: tarfile.TarFile) -> Iterator[tuple[str, bytes]]:
    """(name, content) of every file."""
    for member in members_of(shard, tar):
        try:
            file: Any = tar.extractfile(member)
            content = file.read()
        except Exception as error:  # tarfile raises whatever its parser meets
            raise unreadable(shard, error) from None
        yield member.name, content


def _key(member: tuple[str, bytes]) -> str:
    return key_and_kind(member[0])[0]


def _expand(pattern: str) -> list[str]:
    """The names that braces stand for, as in a shell: ``{000..002}`` → 000, 001, 002."""
    from braceexpand import braceexpand  # here: the kit for a GPU without a network trains without it

    for found in re.finditer(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.-?\d+)?\}", pattern):
        # braceexpand holds a range in memory: one that a slip made endless is refused before.
        if len(found.group()) > LONGEST_RANGE or not 0 <= int(found[2]) - int(found[1]) < MOST_SHARDS:
            raise PowersteerError(f"{found.group()[:40]} is no range of shards: give {{000..099}}, the lesser first")
    try:
        names = list(islice(braceexpand(pattern, escape=False), MOST_SHARDS + 1))
    except (ValueError, RecursionError):  # braces without their other half
        return [pattern]  # a folder may be called so
    if len(names) > MOST_SHARDS:
        raise PowersteerError(f"{pattern[:80]} stands for more than {MOST_SHARDS:,} shards: give fewer")
    return names
