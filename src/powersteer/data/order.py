"""The order in which pairs are trained on: endless, and a function of the seed alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

SampleKey = tuple[int, int]
"""(pair, view)."""


@dataclass(frozen=True)
class Share:
    """How the samples of an optimizer update are divided: over accumulation steps, and in each over processes."""

    size: int
    """Samples of one process in one accumulation step."""
    accumulation: int = 1
    processes: int = 1
    process: int = 0
    """This one."""

    @property
    def batch_size(self) -> int:
        """Samples of the whole update."""
        return self.size * self.processes * self.accumulation

    def places(self, accumulation_step: int) -> range:
        """This process's places in the update's batch."""
        start = (accumulation_step * self.processes + self.process) * self.size
        return range(start, start + self.size)


def batches(sizes: Sequence[tuple[int, int]], views: int, batch_size: int, seed: int) -> Iterator[list[SampleKey]]:
    """The samples of each optimizer update, over all processes and accumulation steps.

    A batch holds pictures of one size. Each size has its own endless shuffled sequence in which every pair comes
    once a round, in a view drawn anew; which size is next is drawn in proportion to its pairs.

    Args:
        sizes: Of each pair.
        views: Versions of each pair.
        batch_size: Samples an update.
        seed: Of everything drawn.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for i, size in enumerate(sizes):
        groups.setdefault(size, []).append(i)
    sequences = [_shuffled(group, views, seed + 1 + i) for i, group in enumerate(groups.values())]
    shares = torch.tensor([float(len(group)) for group in groups.values()])
    generator = torch.Generator().manual_seed(seed)
    while True:
        chosen = sequences[int(torch.multinomial(shares, 1, generator=generator))]
        yield [next(chosen) for _ in range(batch_size)]


def _shuffled(group: list[int], views: int, seed: int) -> Iterator[SampleKey]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        drawn = torch.randint(views, (len(group),), generator=generator).tolist()
        for place, view in zip(torch.randperm(len(group), generator=generator).tolist(), drawn, strict=True):
            yield group[place], view
