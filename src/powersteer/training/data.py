"""The pairs of a run: what is trained on, what is held out, and both together; read, told of, then encoded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from powersteer.backbones.protocol import base_of
from powersteer.core.errors import PowersteerError
from powersteer.data.captions import cut_captions, token_limit
from powersteer.data.contents import Contents
from powersteer.data.encode import CONTENTS, EncodedPairs, Encoder, encode_pairs
from powersteer.data.pairs import Pairs, Transform, Views, spread
from powersteer.data.rows import Row
from powersteer.data.stream import StreamedPairs, list_shards, read_shard
from powersteer.training.setup import PROBE, Setup, Source, read_pairs

MIN_HELD_OUT = 4
_SHOWN = 60
"""Characters of a caption that is named."""


class RunData:
    """What a run trains on and is measured on.

    Args:
        setup: The run's.
        pipe: The base.
        console: Where it is told.

    Raises:
        PowersteerError: The pairs cannot be read, or are too few to hold some out.
    """

    def __init__(self, setup: Setup, pipe: Any, console: Console) -> None:
        self.setup, self.pipe, self.console = setup, pipe, console
        self.config = config = setup.config
        self.cache_dir = (config.cache_dir or config.output_dir / "cache") if config.cache_latents else None
        self.contents = Contents((self.cache_dir or config.output_dir) / CONTENTS)
        self.shards: list[str] = []
        self.held_out: Pairs | None = None
        if config.validation_data_dir is not None:
            self.held_out = read_pairs(setup, config.validation_data_dir, plain=True, contents=self.contents)
        if config.streaming:
            self.shards = list_shards(str(config.train_data_dir))
            self.everything = self.train = self._probe()
            return
        folder = None if config.train_data_dir is None else Path(config.train_data_dir)
        self.everything = self.train = read_pairs(setup, folder, plain=False, contents=self.contents)
        if config.validation_split:
            self._hold_out()

    @property
    def count(self) -> int:
        """Pairs to train on; 0 of a stream, where it is not known."""
        return 0 if self.shards else len(self.train)

    def facts(self) -> dict[str, Any]:
        """Digests of the pairs: of each one's bytes and captions, in order; of a stream, of its shards' names and sizes
        and of the first pairs.

        Raises:
            PowersteerError: A picture cannot be read.
        """
        given = self.setup.conditioning
        shards = [(name.rpartition("/")[2], _size_of(name)) for name in self.shards]
        return {
            "train_data": self._digest(self.everything, shards),
            "validation_data": None if self.config.validation_data_dir is None else self._digest(self.held_out),
            "conditioning": [given.kind, given.channels],
            "resolution": list(self.setup.size),
        }

    def tell(self) -> None:
        """Say which captions the text encoder cuts."""
        tokenizers = base_of(self.pipe).tokenizers
        cut = cut_captions(tokenizers, self._captions())
        if cut:
            caption, tokens = max(cut, key=lambda one: one[1])
            shown = caption if len(caption) <= _SHOWN else f"{caption[:_SHOWN]}…"
            self.console.print(
                f"captions longer than the {token_limit(tokenizers)} tokens that the text encoder reads, the rest of "
                f"which is cut off: {len(cut)}; one has {tokens}: '{shown}'",
                soft_wrap=True,
            )

    def encode(self) -> tuple[Source, EncodedPairs | None, Source]:
        """What to train on, what to hold out, and both together.

        Raises:
            PowersteerError: A picture cannot be read, or the cache cannot be written.
        """
        held_out = None if self.held_out is None else self._encoded(self.held_out)
        train = self._encoded(self.train)
        if self.shards:
            stream = self._stream(train)
            return stream, held_out, stream
        everything = train if self.everything is self.train else self._encoded(self.everything)
        return train, held_out, everything

    def _hold_out(self) -> None:
        pairs, share = self.everything, self.config.validation_split
        if len(pairs) < 2 * MIN_HELD_OUT:
            raise PowersteerError(
                f"{len(pairs)} pairs are too few to hold some out: give {2 * MIN_HELD_OUT} or more, or "
                "validation_split=0 refit=false patience=null"
            )
        count = min(max(MIN_HELD_OUT, round(share * len(pairs))), len(pairs) - 1)
        if count != round(share * len(pairs)):
            self.console.print(f"{count} of {len(pairs)} pairs are held out, not a share of {share}", soft_wrap=True)
        chosen = spread(len(pairs), count)
        rest = [i for i in range(len(pairs)) if i not in set(chosen)]
        self.train, self.held_out = pairs.subset(rest), pairs.subset(chosen, plain=True)

    def _encoded(self, pairs: Pairs) -> EncodedPairs:
        prompts = [self.config.fixed_prompt] if self.config.prompt_mix else []
        dtype = torch.float32 if self.setup.precision == "no" else torch.float16
        given: dict[str, Any] = {"prompts": prompts, "dtype": dtype, "console": self.console, "contents": self.contents}
        return encode_pairs(self.pipe, pairs, self.cache_dir, **given)

    def _probe(self) -> Pairs:
        """The first pairs of a stream."""
        config, given = self.config, self.setup.conditioning
        return Pairs(
            list(islice(read_shard(self.shards[0], self.setup.columns), PROBE)),
            self.setup.size,
            given.channels,
            kind=given.kind,
            default_prompt=config.default_prompt,
            vae_scale_factor=self.setup.vae_scale_factor,
        )

    def _stream(self, probe: EncodedPairs) -> StreamedPairs:
        config, given = self.config, self.setup.conditioning
        return StreamedPairs(
            self.shards,
            Encoder(self.pipe),
            probe,
            transform=Transform(given.channels, given.kind, self.setup.vae_scale_factor),
            size=self.setup.size,
            views=Views(config.random_flip, config.random_crops, config.smallest_crop),
            columns=self.setup.columns,
            default_prompt=config.default_prompt,
        )

    def _captions(self) -> Iterator[str]:
        if self.config.prompt_mix:
            yield self.config.fixed_prompt
        for pairs in (self.everything, self.held_out):
            for row in () if pairs is None else pairs.rows:
                yield from _texts(row)

    def _digest(self, pairs: Pairs | None, *others: Any) -> str:
        rows: Sequence[Row] = () if pairs is None else pairs.rows
        found = self.contents.digests(picture for row in rows for picture in (row.image, row.conditioning_image))
        digest = hashlib.sha256(json.dumps(others).encode())
        for i, row in enumerate(rows):
            digest.update(json.dumps([found[2 * i : 2 * i + 2], row.texts, row.generated_text]).encode())
        return digest.hexdigest()[:24]


def _texts(row: Row) -> Iterator[str]:
    yield from row.texts
    if row.generated_text is not None:
        yield row.generated_text


def _size_of(shard: str) -> int | None:
    """Bytes of a shard of this machine."""
    file = Path(shard.removeprefix("file://"))
    return file.stat().st_size if file.is_file() else None
