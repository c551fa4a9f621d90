"""Pairs as the base sees them: latents, conditions, text states; encoded once into a cache, or when asked for."""

from __future__ import annotations

import shutil
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from safetensors import safe_open
from torch.utils.data import DataLoader, Dataset

from powersteer.backbones.protocol import base_of
from powersteer.core.console import PlainColumn, PlainConsole, printable
from powersteer.core.errors import PowersteerError
from powersteer.core.files import reason_of
from powersteer.data.cache import (
    LOCKS,
    fault_of,
    key_of,
    module_digest,
    settings_digest,
    sweep,
    tokenizer_digest,
    write_tensors,
)
from powersteer.data.contents import Contents
from powersteer.data.order import Share, batches
from powersteer.data.pairs import Pairs, condition_values

CONTENTS = "contents.json"
"""The file of a cache that keeps what is known of pictures; see `Contents`."""
SHARD = 256
"""Pairs, or captions, in one file of the cache."""
ENCODE_BATCH = 16
"""Pictures that the VAE encodes at once."""

_CONDITION_DTYPES: dict[int, Any] = {1: np.uint8, 2: np.float16, 4: np.float32}
"""The number type of cached conditions, by the bytes of a number."""

T = TypeVar("T")
TextStates = dict[str, torch.Tensor]
"""``encoder_hidden_states`` (N, T, D), and for SDXL ``text_embeds`` (N, D')."""


@dataclass(frozen=True)
class Sample:
    """One version of one pair."""

    name: str
    image: torch.Tensor
    """Latents (C, h, w), float32; or the picture (3, H, W) in [-1, 1] where nothing is cached."""
    condition: torch.Tensor
    """(C, H, W), uint8: 255 stands for 1; features (C, h, w) are floating-point numbers."""
    texts: tuple[str, ...]
    generated_text: str | None


class Encoder:
    """The base's VAE and text encoders.

    Args:
        pipe: The base, a Stable Diffusion pipeline (1.x, 2.x or XL).

    Raises:
        PowersteerError: Its VAE shifts its latents, as no such pipeline's does.
    """

    def __init__(self, pipe: Any) -> None:
        self.base = base_of(pipe)
        settings = pipe.vae.config
        shifts = [key for key in ("shift_factor", "latents_mean", "latents_std") if settings.get(key) is not None]
        if shifts:
            raise PowersteerError(f"the base's VAE has a {shifts[0]}, which is not supported: give another base")
        self.latents, self.texts = self.base.latents, self.base.texts

    @property
    def text_digest(self) -> list[str]:
        """What decides how text becomes text states: the pipeline's kind, and digests of its settings, tokenizers and
        encoders."""
        pipe, parts = self.base.pipe, self.base.parts
        encoders = [part for name, part in parts.items() if name.startswith("text_encoder")]
        digests = [*map(tokenizer_digest, self.base.tokenizers), *map(module_digest, encoders)]
        return [type(pipe).__name__, settings_digest(pipe.config), *digests]


class EncodedPairs(Dataset[Sample]):
    """Pairs ready for training.

    Args:
        pairs: The pairs.
        encoder: The base's encoders, used where nothing is cached.
        shards: The cached file and the row in it of each sample, by (index, view); None without a cache.
        captions: The cached file and row of each caption.
    """

    def __init__(
        self,
        pairs: Pairs,
        encoder: Encoder,
        shards: dict[tuple[int, int], tuple[Path, int]] | None = None,
        captions: dict[str, tuple[Path, int]] | None = None,
    ) -> None:
        self.pairs, self.encoder = pairs, encoder
        self._shards, self._captions = shards, captions
        self._open: dict[Path, Any] = {}

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """One sample, by (index, view)."""
        row = self.pairs.rows[key[0]]
        if self._shards is None:
            image, condition = self.pairs.view(*key)
        else:
            image, condition = self._cached(*self._shards[key])
        return Sample(row.where, image, condition, row.texts, row.generated_text)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}, "encoder": None}  # neither open files nor the base travel to a worker

    @property
    def probe(self) -> EncodedPairs:
        """Pairs to be watched on fixed noise: any of these."""
        return self

    def micro_batches(self, share: Share, seed: int, first: int, workers: int) -> Iterator[list[Sample]]:
        """This process's samples of each accumulation step, from update ``first`` on, without end.

        Args:
            share: How updates are divided.
            seed: Of the order.
            first: The update to begin with.
            workers: Processes that read ahead; 0 reads in this one.
        """
        order = islice(batches(self.pairs.sizes, len(self.pairs.views), share.batch_size, seed), first, None)
        places = [share.places(step) for step in range(share.accumulation)]
        mine: Any = ([keys[place] for place in part] for keys in order for part in places)
        return one_line_errors(DataLoader(self, batch_sampler=mine, num_workers=workers, collate_fn=list))

    @property
    def cached(self) -> bool:
        """Whether samples hold latents."""
        return self._shards is not None

    def latents(self, samples: Sequence[Sample]) -> torch.Tensor:
        """(N, C, h, w), of samples of one size."""
        images = torch.stack([sample.image for sample in samples])
        return images if self.cached else self.encoder.latents(images)

    def texts(self, prompts: Sequence[str]) -> TextStates:
        """Text states of prompts; those that were known beforehand come from the cache."""
        if self._captions is None or any(prompt not in self._captions for prompt in prompts):
            return self.encoder.texts(prompts)
        rows = [self._row(*self._captions[prompt]) for prompt in prompts]
        return {name: torch.stack([row[name] for row in rows]).float() for name in rows[0]}

    def _cached(self, file: Path, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        try:
            shard = self._file(file)
            latents = shard.get_slice("latents")[row].float()
            start, end = shard.get_slice("offsets")[row : row + 2].tolist()
            packed = shard.get_slice("conditions")[start:end].numpy()
            height, width, channels = shard.get_slice("shape")[:].tolist()
            content = zlib.decompress(packed)
            dtype = _CONDITION_DTYPES[len(content) // (channels * height * width)]
            return latents, torch.from_numpy(np.frombuffer(content, dtype).reshape(channels, height, width).copy())
        except Exception as error:  # what is damaged while a run reads it
            raise _changed_meanwhile(file, error) from None

    def _row(self, file: Path, row: int) -> dict[str, torch.Tensor]:
        try:
            shard = self._file(file)
            return {name: shard.get_slice(name)[row] for name in shard.keys()}  # noqa: SIM118
        except Exception as error:
            raise _changed_meanwhile(file, error) from None

    def _file(self, file: Path) -> Any:
        if file not in self._open:
            self._open[file] = safe_open(file, "pt")
        return self._open[file]


def _changed_meanwhile(file: Path, error: Exception) -> PowersteerError:
    return PowersteerError(
        f"the cache file {file} was whole when the run began and cannot be read any more ({reason_of(error)}): give "
        "the same command again, and it is made anew"
    )


def one_line_errors(loader: Iterable[list[Sample]]) -> Iterator[list[Sample]]:
    """What a loader yields; a worker's error without the worker's stack trace."""
    try:
        yield from loader
    except PowersteerError as error:
        raise PowersteerError(str(error).rstrip().rpartition("PowersteerError: ")[2]) from None


def conditions_of(samples: Sequence[Sample]) -> torch.Tensor:
    """Conditions (N, C, H, W) in [0, 1]; features (N, C, h, w) as they are."""
    return condition_values(torch.stack([sample.condition for sample in samples]))


def encode_pairs(
    pipe: Any,
    pairs: Pairs,
    cache_dir: Path | None = None,
    *,
    prompts: Iterable[str] = (),
    dtype: torch.dtype = torch.float32,
    console: Console | None = None,
    contents: Contents | None = None,
) -> EncodedPairs:
    """Encode every pair, or find it in the cache; without a cache, pairs are encoded whenever they are asked for.

    A file of the cache is named after what it depends on: the pictures' bytes, size and views, or the captions; the
    weights and configurations that encoded them, tokenizers included; the precision. Every file carries a digest and is
    read once, from end to end, before it is used (some three seconds a gigabyte); a damaged one is made again. Several
    processes share one cache, each encodes what no other is at.

    Args:
        pipe: The base.
        pairs: The pairs.
        cache_dir: The cache.
        prompts: Captions to encode beside the pairs' own.
        dtype: Of the cached latents and text states.
        console: Where the cache's size is told, before and after.
        contents: What is known of the pictures; by default, what the cache remembers.

    Raises:
        PowersteerError: A picture cannot be read, or the cache cannot be written or would not fit on its disk.
    """
    encoder = Encoder(pipe)
    if cache_dir is None:
        return EncodedPairs(pairs, encoder)
    contents = contents or Contents(cache_dir / CONTENTS)
    try:
        return _encode(encoder, pairs, cache_dir, prompts, dtype, console or PlainConsole(quiet=True), contents)
    except OSError as error:
        raise PowersteerError(f"cannot write the cache {cache_dir}: {reason_of(error)}") from None


@dataclass(frozen=True)
class _Job:
    """One file of the cache."""

    file: Path
    work: int
    """Pictures or captions to encode."""
    nbytes: int
    """About."""
    make: Callable[[], dict[str, torch.Tensor]]


def _encode(
    encoder: Encoder,
    pairs: Pairs,
    cache_dir: Path,
    prompts: Iterable[str],
    dtype: torch.dtype,
    console: Console,
    contents: Contents,
) -> EncodedPairs:
    (cache_dir / LOCKS).mkdir(parents=True, exist_ok=True)
    sweep(cache_dir)
    jobs: list[_Job] = []
    shards: dict[tuple[int, int], tuple[Path, int]] = {}
    for key, samples, size in _picture_files(encoder, pairs, dtype, contents):
        file = cache_dir / f"latents-{key}.safetensors"
        shards |= {sample: (file, row) for row, sample in enumerate(samples)}
        pixels, factor = size[0] * size[1], encoder.base.factor
        nbytes = encoder.base.pipe.vae.config.latent_channels * pixels // factor**2 * dtype.itemsize
        nbytes += pairs.transform.condition_bytes(size)
        jobs.append(_Job(file, len(samples), nbytes * len(samples), _latents(encoder, pairs, samples, dtype)))
    captions: dict[str, tuple[Path, int]] = {}
    own = {text for row in pairs.rows for text in (*row.texts, row.generated_text) if text is not None}
    encoders = encoder.text_digest
    for part in _chunks(sorted({"", *own, *prompts}), SHARD):
        file = cache_dir / f"text-{key_of(encoders, dtype, part)}.safetensors"
        captions |= {text: (file, row) for row, text in enumerate(part)}
        nbytes = len(part) * encoder.base.text_numbers * dtype.itemsize
        jobs.append(_Job(file, len(part), nbytes, _texts(encoder, part, dtype)))

    missing = _missing(jobs, console)
    if missing:
        needed, free = sum(job.nbytes for job in missing), shutil.disk_usage(cache_dir).free
        _tell(console, f"encoding into {cache_dir}: about {needed / 1e6:.0f} MB, {free / 1e9:.1f} GB free")
        if needed > free:
            raise PowersteerError(
                f"the cache {cache_dir} needs about {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free: give another "
                "cache_dir, or cache_latents=false"
            )
        _work_off(missing, cache_dir, console)
        size = sum(job.file.stat().st_size for job in jobs)
        _tell(console, f"the cache has {size / 1e6:.0f} MB: {len(shards):,} pictures, {len(captions):,} captions")
    return EncodedPairs(pairs, encoder, shards, captions)


def _picture_files(
    encoder: Encoder, pairs: Pairs, dtype: torch.dtype, contents: Contents
) -> Iterator[tuple[str, list[tuple[int, int]], tuple[int, int]]]:
    """The key, samples and picture size of each file of pictures."""
    digests = contents.digests(picture for row in pairs.rows for picture in (row.image, row.conditioning_image))
    transform, vae_digest = sorted(vars(pairs.transform).items()), module_digest(encoder.base.parts["vae"])
    by_size: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i, size in enumerate(pairs.sizes):
        by_size[size].append(i)
    for size, indices in by_size.items():
        for part in _chunks(indices, SHARD):
            places = part if len(pairs.views) > 2 else []  # crops depend on the place
            both = [digests[2 * i : 2 * i + 2] for i in part]
            samples = [(i, view) for i in part for view in range(len(pairs.views))]
            yield key_of(vae_digest, dtype, size, transform, pairs.views, places, both), samples, size


def _missing(jobs: list[_Job], console: Console) -> list[_Job]:
    """The files that are not there, or damaged."""
    missing: list[_Job] = []
    for job in jobs:
        fault = fault_of(job.file)
        if fault is not None:
            missing.append(job)
            if job.file.exists():
                _tell(console, f"the cache file {job.file} is damaged ({fault}): it is made again")
    return missing


def _tell(console: Console, line: str) -> None:
    console.print(printable(line), soft_wrap=True, highlight=False, markup=False)


def _work_off(jobs: list[_Job], cache_dir: Path, console: Console) -> None:
    """Make every file that is missing; what another process is at is waited for last."""
    bar = (PlainColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*bar, console=console, transient=True) as progress:
        task = progress.add_task("encoding", total=sum(job.work for job in jobs))
        for timeout in (0, -1):
            for job in jobs:
                try:
                    with FileLock(cache_dir / LOCKS / job.file.stem, timeout=timeout):
                        if fault_of(job.file) is not None:
                            write_tensors(job.file, job.make())
                            progress.advance(task, job.work)
                except Timeout:
                    continue


def _latents(
    encoder: Encoder, pairs: Pairs, samples: list[tuple[int, int]], dtype: torch.dtype
) -> Callable[[], dict[str, torch.Tensor]]:
    def make() -> dict[str, torch.Tensor]:
        latents: list[torch.Tensor] = []
        packed: list[bytes] = []
        shape = torch.Size([])
        for part in _chunks(samples, ENCODE_BATCH):
            views = [pairs.view(*sample) for sample in part]
            latents.append(encoder.latents(torch.stack([image for image, _ in views])).to(dtype))
            packed += [zlib.compress(condition.numpy().tobytes(), 1) for _, condition in views]
            shape = views[0][1].shape
        offsets = np.cumsum([0, *(len(content) for content in packed)])
        return {
            "latents": torch.cat(latents).contiguous(),
            "conditions": torch.from_numpy(np.frombuffer(b"".join(packed), dtype=np.uint8).copy()),
            "offsets": torch.from_numpy(offsets.astype(np.int64)),
            "shape": torch.tensor([*shape[1:], shape[0]]),
        }

    return make


def _texts(encoder: Encoder, texts: Sequence[str], dtype: torch.dtype) -> Callable[[], dict[str, torch.Tensor]]:
    return lambda: {name: states.to(dtype).contiguous() for name, states in encoder.texts(texts).items()}


def _chunks(items: list[T], size: int) -> list[list[T]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
