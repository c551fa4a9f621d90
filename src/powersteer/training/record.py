"""What a run was begun with: its settings, and digests of what they point at. Another command may not go on with it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from powersteer.core.errors import PowersteerError
from powersteer.core.files import read_bytes, write_whole
from powersteer.core.text import json_lines, parse_json, parse_yaml, read_object, read_text
from powersteer.training.checkpoint import list_checkpoints, step_of
from powersteer.training.config import NETWORK_KEYS, TrainConfig

RECORD = "run.json"
SETTINGS = "train.yaml"
LOG = "log.jsonl"
_OWN = ("config.json", "diffusion_pytorch_model.safetensors", LOG, SETTINGS, "refit")
"""What a run writes over."""
_SHOWN = 6
"""Differing keys that are named."""

FACTS: dict[str, tuple[str, ...]] = {
    "train_data": (
        "train_data_dir",
        "dataset_name",
        "dataset_config_name",
        "dataset_split",
        "image_column",
        "conditioning_image_column",
        "caption_column",
        "generated_caption_column",
        "default_prompt",
        "max_train_samples",
    ),
    "validation_data": ("validation_data_dir",),
    "base": ("pretrained_model_name_or_path", "variant", "revision", "base_config"),
    "start": ("init_from",),
    "conditioning": ("conditioning_kind", "conditioning_channels"),
    "resolution": ("resolution",),
    "batch": ("train_batch_size", "gradient_accumulation_steps"),
    "updates": ("max_train_steps", "num_train_epochs"),
}
"""What keys come to: the same pairs may lie elsewhere, the same batch be divided otherwise. ``updates`` is a fact only
where the learning rate falls over them."""

FREE = frozenset(
    {
        # Where things lie, and what only fills in other keys.
        *("output_dir", "cache_dir", "preset"),
        # How it is computed, not what: the same to rounding.
        *("cache_latents", "gradient_checkpointing", "mixed_precision", "dataloader_num_workers"),
        # How long, and how often it is looked at and saved. What is learned until then is the same.
        *("max_train_steps", "num_train_epochs", "max_train_minutes", "patience"),
        *("validation_steps", "validation_image_steps", "num_validation_images", "report_to"),
        *("checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint"),
    }
)
"""Keys that may change while a run goes on."""
_UNTOLD = frozenset({"output_dir", "cache_dir", "preset", "resume_from_checkpoint", "report_to"})
"""The keys of `FREE` whose change says nothing of the result, and is not written down."""
TOLD = ("precision", "processes", "readers")
"""Facts that may change: of the arithmetic, how many processes, and of a stream how many read it."""
_CONTENT = {
    "train_data": "the pairs of {} are not those it was begun with",
    "validation_data": "the held-out pairs in {} are not those it was begun with",
    "base": "the base {} is not what it was",
    "start": "the weights of {} are not those it was begun with",
}
_WORDS = {"batch": "the whole batch (train_batch_size × gradient_accumulation_steps × processes)"}


@dataclass(frozen=True)
class Record:
    """What one run was begun with, and how that has changed since."""

    settings: Mapping[str, Any]
    """The settings of the last command."""
    facts: Mapping[str, Any]
    """What those settings come to, by the names in `FACTS` and `TOLD`."""
    changes: Sequence[Mapping[str, Any]] = field(default_factory=tuple)
    """The changes of settings and facts while it went on: for each, the step, and (before, after) by name."""
    refitted: int | None = None
    """How many updates the finished refit on all pairs took; None where there was none."""

    @classmethod
    def of(cls, config: TrainConfig, facts: Mapping[str, Any]) -> Record:
        """What a command gives, as JSON has it."""
        return cls(settings_of(config), json.loads(json.dumps(dict(facts))))

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def save(self, folder: Path) -> None:
        """Write it into a folder.

        Raises:
            PowersteerError: It cannot be written.
        """
        _write(folder / RECORD, json.dumps(self.as_json(), indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Record | None:
        """What a folder holds, if anything.

        Raises:
            PowersteerError: It is damaged.
        """
        file = folder / RECORD
        if not file.exists():
            return None
        said = read_object(file)
        kinds = {"settings": dict, "facts": dict, "changes": list}
        if any(type(said.get(name)) is not kind for name, kind in kinds.items()):
            raise PowersteerError(f"{file} is damaged: it does not say what the run was begun with")
        refitted = said.get("refitted")
        whole = refitted if isinstance(refitted, int) else None
        return cls(said["settings"], said["facts"], said["changes"], whole)

    def continued(self, now: Record, step: int, output_dir: Path) -> Record:
        """The record of a run that goes on at a step with other settings, if it may.

        Raises:
            PowersteerError: They differ in what decides what is learned.
        """
        differ = list(self._differences(now))
        if differ:
            more = f"; and {len(differ) - _SHOWN} more" if len(differ) > _SHOWN else ""
            raise PowersteerError(
                f"{output_dir} holds a run with other settings: {'; '.join(differ[:_SHOWN])}{more}. Give another "
                "output_dir, or what it was begun with"
            )
        both = [(self.settings, now.settings, key) for key in sorted(FREE - _UNTOLD)]
        both += [(self.facts, now.facts, fact) for fact in TOLD]
        changed = {
            key: [was[key], given.get(key)] for was, given, key in both if key in was and was[key] != given.get(key)
        }
        changes = [*self.changes, {"step": step, **changed}] if changed else self.changes
        return replace(self, settings=now.settings, facts={**self.facts, **now.facts}, changes=changes)

    def _differences(self, now: Record) -> Iterator[str]:
        """What may not differ and does, each in words."""
        known = set(TrainConfig.model_fields)
        for key in sorted(self.settings.keys() - known):
            yield f"it has {key}, which this version does not know"
        before = {key: _default(key) for key in known} | dict(self.settings)
        after = {key: _default(key) for key in known} | dict(now.settings)
        if before["refit"] and not after["refit"]:
            yield "refit was true, now false"
        covered = {"refit", *FREE}
        for fact, keys in FACTS.items():
            covered |= set(keys)
            if fact not in now.facts:
                continue
            changed = [_changed(key, before[key], after[key]) for key in keys if before[key] != after[key]]
            if fact not in self.facts:  # of an earlier version's run
                yield from changed
            elif self.facts[fact] != now.facts[fact]:
                place = next((after[key] for key in keys if after[key] is not None), "")
                was = f"{_WORDS.get(fact, fact)} was {self.facts[fact]}, now {now.facts[fact]}"
                yield from changed or [_CONTENT[fact].format(place) if fact in _CONTENT else was]
        for key in TrainConfig.model_fields:
            if key not in covered and before[key] != after[key]:
                yield _changed(key, before[key], after[key])


def settings_of(config: TrainConfig) -> dict[str, Any]:
    """The settings that a run uses, as JSON: with ``init_from``, the network's shape is the adapter's own."""
    unused: set[str] = set(NETWORK_KEYS) if config.init_from is not None else set()
    return config.model_dump(mode="json", exclude=unused)


def begun_with(output_dir: Path, checkpoint: Path | None) -> Record | None:
    """The record of the run in a folder; None where nothing has been learned yet, and a new one may begin.

    Args:
        output_dir: The folder.
        checkpoint: The one to go on from.

    Raises:
        PowersteerError: What is there is not a run's, and would be written over; or a record is damaged.
    """
    record = Record.read(output_dir)
    if record is None and checkpoint is not None and (kept := Record.read(checkpoint)) is not None:
        return replace(kept, refitted=None)
    learned = bool(list_checkpoints(output_dir)) or _logged_step(output_dir / LOG) > 0
    if record is not None:
        return record if learned else None
    file = output_dir / SETTINGS
    if file.exists() and learned:  # of an earlier version
        settings = parse_yaml(read_text(file), str(file))
        if not isinstance(settings, dict):
            raise PowersteerError(f"{file} does not hold the settings of a run: give another output_dir")
        return Record(json.loads(json.dumps(settings, default=str)), {})
    foreign = [name for name in _OWN if (output_dir / name).exists()]
    if foreign and checkpoint is None:
        raise PowersteerError(
            f"{output_dir} holds a {foreign[0]} that no training here made, and would be written over: give another "
            "output_dir"
        )
    return None


def write_settings(config: TrainConfig, output_dir: Path) -> None:
    """Write ``train.yaml``, which is the same run again.

    Raises:
        PowersteerError: It cannot be written.
    """
    _write(output_dir / SETTINGS, yaml.safe_dump(settings_of(config), sort_keys=False))


def _write(path: Path, text: str) -> None:
    """Unless it says so already: a finished run that is asked for again writes nothing."""
    if not path.exists() or read_bytes(path) != text.encode():
        write_whole(path, text.encode())


def check_step(output_dir: Path, checkpoint: Path | None, last_step: int) -> None:
    """Refuse to end a run before where it is.

    Raises:
        PowersteerError: The checkpoint is of a later step than the last.
    """
    if checkpoint is not None and step_of(checkpoint) > last_step:
        raise PowersteerError(
            f"{output_dir} has come to step {step_of(checkpoint)}, and {last_step} updates are asked for: give no "
            "fewer, or resume_from_checkpoint of an earlier checkpoint, or another output_dir"
        )


def _logged_step(log: Path) -> int:
    """The last step of a run's log; 0 without one."""
    step = 0
    if log.exists():
        for number, line in json_lines(read_text(log), str(log)):
            try:
                step = max(step, int(parse_json(line, f"{log}, line {number}")["step"]))
            except (PowersteerError, KeyError, TypeError, ValueError):
                continue  # the last line may be cut short
    return step


def _default(key: str) -> Any:
    value = TrainConfig.model_fields[key].default
    return None if key == "output_dir" else value


def _changed(key: str, before: Any, after: Any) -> str:
    return f"{key} was {_shown(before)}, now {_shown(after)}"


def _shown(value: Any) -> str:
    return json.dumps(value) if isinstance(value, bool | type(None) | list) else str(value)
