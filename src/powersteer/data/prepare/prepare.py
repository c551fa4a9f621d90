"""Pictures → a data set of pairs that `powersteer train` reads: `powersteer prepare`."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

from powersteer.conditions.extractor import EXTRACTORS, Registered
from powersteer.core.console import PlainColumn, PlainConsole
from powersteer.core.errors import PowersteerError
from powersteer.core.files import is_file, reason_of, write_whole
from powersteer.core.text import parse_json, read_text
from powersteer.data.findings import Finding, finding
from powersteer.data.prepare.config import PrepareConfig
from powersteer.data.prepare.ledger import FOLDER, Ledger, Shards, log_path, read_log, rejected_table
from powersteer.data.prepare.make import HeldOut, Job, Measures, Outcome, Recipe, measure
from powersteer.data.prepare.sources import OPENMOJI, find_source
from powersteer.data.prepare.sources.base import Item, Source, Wanted
from powersteer.data.prepare.workers import available, in_processes
from powersteer.data.splits import is_held_out

DESCRIPTION = "dataset.json"
FEW = 16
"""Items that one process is done with while another starts."""
LONGEST_KEY = 100
"""Characters of a file's name; a longer one is cut, and told apart by a digest."""


@dataclass(frozen=True)
class Prepared:
    """What is there now."""

    out_dir: Path
    pairs: dict[str, int]
    """How many pairs of each split this part holds."""
    rejected: int
    """How many items of this part were refused; see ``rejected.csv``."""
    complete: bool
    """Whether all parts are done."""
    findings: list[Finding]
    """What of the source was not used, or was asked for in vain."""

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "out_dir": str(self.out_dir)}


def prepare(config: PrepareConfig, console: Console | None = None) -> Prepared:
    """Make a pair of every picture; the same command goes on with a run that was interrupted.

    Args:
        config: What to do.
        console: For progress; standard error by default.

    Raises:
        PowersteerError: The source, or a file that describes it all, cannot be read; the extractor lacks something;
            ``out_dir`` holds something else; nothing at all could be made.
    """
    console = console or PlainConsole(stderr=True)
    _check_apart(config)
    source = find_source(config.source)
    registered, settings = _extractor(config, source)
    record = registered.build(**settings).record()
    items = source.items(Wanted(config.task, config.background, config.resolution))
    _describe(config, source, items, json.loads(json.dumps(record)))
    findings = _findings(config, source, items)
    try:
        with FileLock(log_path(config.out_dir, config.shard_index, config.num_shards).with_suffix(".lock"), timeout=0):
            return _run(config, items, registered, settings, findings, console)
    except Timeout:
        raise PowersteerError(f"{config.out_dir}: another process is at this part of the work") from None


def _findings(config: PrepareConfig, source: Source, items: Sequence[Item]) -> list[Finding]:
    """What a user may have meant otherwise."""
    findings: list[Finding] = []
    for why, names in source.unused.items():
        findings += finding("warning", "unused", f"{{}} files of the source {why}, and were not used", names)
    bare = [item.name for item in items if not item.captions]
    findings += finding("warning", "no_caption", "{} pictures have no caption", bare, "train with default_prompt")
    if config.captions != "all" and not any(len(item.captions) > 1 for item in items):
        text = f"no picture has several captions: captions={config.captions} changes nothing"
        findings.append(Finding("note", "captions", 0, text))
    root = Path(config.source).resolve()
    if config.source != OPENMOJI and is_held_out(root.name) and any(item.split == "train" for item in items):
        text = f"the source is called {root.name}, and is prepared for training all the same"
        findings.append(Finding("warning", "held_out", 1, text))
    return findings


def _run(
    config: PrepareConfig,
    items: Sequence[Item],
    registered: Registered,
    settings: dict[str, Any],
    findings: list[Finding],
    console: Console,
) -> Prepared:
    jobs = [Job(item, key) for item, key in zip(items, keys_of(items), strict=True)]
    mine = jobs[config.shard_index :: config.num_shards]
    workers = config.workers or available()
    ledger = Ledger(config.out_dir, config.shard_index, config.num_shards)
    shards = Shards(config.out_dir, config.shard_index) if config.shards else None
    try:
        if shards:
            for outcome in ledger.outcomes:
                shards.add(outcome)
        done = {(one.split, one.key) for one in ledger.outcomes}
        left = [job for job in mine if (job.item.split, job.key) not in done]
        bar = (PlainColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*bar, TimeRemainingColumn(), console=console, transient=True) as progress:
            held_out = _held_out(items, left, workers, progress)
            recipe = Recipe(
                config.out_dir,
                registered,
                settings,
                held_out,
                config.captions,
                several=config.captions == "all" and any(len(item.captions) > 1 for item in items),
                resolution=config.resolution,
            )
            task = progress.add_task("making pairs", total=len(mine), completed=len(mine) - len(left))
            for outcome in in_processes(recipe.build, left, _worth(workers, len(left))):
                ledger.add(outcome)
                if shards:
                    shards.add(outcome)
                progress.advance(task)
        if shards:
            shards.finish()
        outcomes = list(ledger.outcomes)
    finally:
        ledger.close()
    pairs = Counter(one.split for one in outcomes if one.row is not None)
    refused = [one for one in outcomes if one.row is None]
    if mine and not pairs:
        raise PowersteerError(f"no pair could be made; {refused[0].name}: {refused[0].reason}")
    return Prepared(config.out_dir, dict(pairs), len(refused), _assemble(config, jobs), findings)


def _held_out(items: Sequence[Item], left: Sequence[Job], workers: int, progress: Progress) -> HeldOut:
    """Every machine looks at all held-out pictures: what it trains on must not be among them."""
    held_out = [item for item in items if item.split != "train"]
    if not any(job.item.split == "train" for job in left):
        held_out = []
    task = progress.add_task("looking at held-out pictures", total=len(held_out), visible=bool(held_out))
    measures = [
        one
        for one in progress.track(
            in_processes(_measurer, held_out, _worth(workers, len(held_out))), task_id=task, total=len(held_out)
        )
        if one is not None
    ]
    concepts = {item.concept: item.name for item in held_out if item.concept is not None}
    return HeldOut(concepts, sorted(measures, key=lambda one: one.name))


def _worth(workers: int, items: int) -> int:
    """Processes for so many items: few are not worth their start."""
    return max(1, min(workers, items // FEW))


def _measurer() -> Callable[[Item], Measures | None]:
    return measure


def _assemble(config: PrepareConfig, jobs: Sequence[Job]) -> bool:
    """When the logs of all parts are whole, write what stands for all: metadata of each split, and the rejected."""
    outcomes: dict[tuple[str, str], Outcome] = {}
    for part in range(config.num_shards):
        outcomes |= {(one.split, one.key): one for one in read_log(log_path(config.out_dir, part, config.num_shards))}
    if len(outcomes) < len(jobs):
        return False
    writer = f"{config.shard_index}-"
    ordered = [outcomes[job.item.split, job.key] for job in jobs]
    write_whole(config.out_dir / "rejected.csv", rejected_table(ordered), writer)
    if not config.shards:
        for split in {one.split for one in ordered}:
            rows = [json.dumps(one.row, ensure_ascii=False) for one in ordered if one.split == split and one.row]
            if rows:
                write_whole(config.out_dir / split / "metadata.jsonl", ("\n".join(rows) + "\n").encode(), writer)
    return True


def keys_of(items: Sequence[Item]) -> Iterator[str]:
    """A name for the files of each item: its own where that is short and plain everywhere, unique in its split."""
    taken: set[tuple[str, str]] = set()
    for item in items:
        stem = str(PurePosixPath(item.name).with_suffix("")) if item.name.count(".") else item.name
        plain = re.sub(r"[^A-Za-z0-9_-]+", "-", stem)
        key = plain
        if plain != stem or len(plain) > LONGEST_KEY or (item.split, plain.lower()) in taken:
            digest = hashlib.sha256(item.name.encode("utf-8", "surrogateescape")).hexdigest()[:12]
            key = f"{plain[: LONGEST_KEY - 13].strip('-')}-{digest}"
        taken.add((item.split, key.lower()))
        yield key


def _extractor(config: PrepareConfig, source: Source) -> tuple[Registered, dict[str, Any]]:
    """The extractor that is asked for, or suits, and its settings."""
    import_module("powersteer.conditions.extractors.catalogue")  # registers them
    choice = source.choice(config.task)
    suited = EXTRACTORS.find(config.task, choice.extractor)
    registered = EXTRACTORS.find(config.task, config.extractor) if config.extractor else suited
    given = dict(choice.settings) if registered == suited else {}
    return registered, given | config.settings


def _check_apart(config: PrepareConfig) -> None:
    """What is read must never be written to."""
    if config.source == OPENMOJI:
        return
    try:
        source, out_dir = Path(config.source).resolve(), config.out_dir.resolve()
    except (OSError, ValueError) as error:  # a loop of links, NUL in a name
        raise PowersteerError(f"cannot find {config.source} or {config.out_dir}: {reason_of(error)}") from None
    if source == out_dir or source in out_dir.parents or out_dir in source.parents:
        raise PowersteerError(
            f"{config.out_dir} and {config.source} lie one inside the other: give an output folder of its own"
        )


def _describe(config: PrepareConfig, source: Source, items: Sequence[Item], record: dict[str, Any]) -> None:
    """Write ``dataset.json`` in an empty folder; one that is there must say the same, for then it is this very run."""
    names = hashlib.sha256(repr([(one.split, one.name, one.captions, one.concept) for one in items]).encode())
    description = {
        "source": source.name,
        "licence": source.licence,
        "pictures": len(items),
        "digest": names.hexdigest()[:24],
        "captions": config.captions,
        "resolution": config.resolution,
        "background": config.background,
        "layout": "webdataset" if config.shards else "imagefolder",
        "parts": config.num_shards,
        "conditioning": record,
    }
    path = config.out_dir / DESCRIPTION
    there = parse_json(read_text(path), str(path)) if is_file(path) else None
    try:
        others = [file.name for file in config.out_dir.iterdir()] if config.out_dir.exists() else []
    except OSError as error:
        raise PowersteerError(f"cannot read {config.out_dir}: {reason_of(error)}") from None
    if there is None and any(not name.startswith(".") for name in others):
        raise PowersteerError(f"{config.out_dir} is not empty: give a new folder")
    if there is not None and there != description:
        known = there if isinstance(there, dict) else {}
        differing = ", ".join(key for key in description if known.get(key) != description[key])
        raise PowersteerError(
            f"{config.out_dir} was begun otherwise ({differing} differ): give a new folder, or the settings of "
            f"{DESCRIPTION}"
        )
    content = (json.dumps(description, indent=2, ensure_ascii=False) + "\n").encode(errors="backslashreplace")
    write_whole(path, content, f"{config.shard_index}-")
    (config.out_dir / FOLDER).mkdir(exist_ok=True)
