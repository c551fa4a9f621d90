"""The model card of an adapter, made of what its run left: config, settings, log, figures, pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from pydantic import BaseModel, TypeAdapter, ValidationError

from powersteer.core.errors import PowersteerError
from powersteer.core.files import write_whole
from powersteer.core.text import json_lines, parse_object, parse_yaml, read_object, read_text

CARD = "README.md"
TEMPLATE = Path(__file__).parent / "assets" / "model_card.md.jinja"
HELD_OUT = "held-out pairs"
"""What a row of the log was measured on, if not on pairs of the training."""
MARK = "<!-- Written by powersteer, and written anew by it. Delete this line, and the card is yours. -->"
_LICENCES = ("cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "apache-2.0", "mit")
"""The Hub's own names of what a data set may say."""
_BASE_OPTIONS = ("variant", "revision", "base_config")
_LOCAL = ("train_data_dir", "validation_data_dir", "output_dir", "cache_dir", "init_from")
"""Settings that may hold paths, which are nobody else's business."""


def write_card(folder: Path, name: str | None = None) -> bool:
    """Write ``README.md`` beside an adapter's weights; one that a person made their own is left alone.

    Args:
        folder: The adapter's.
        name: As others load it: ``user/name``; the folder's by default.

    Returns:
        Whether it was written.

    Raises:
        PowersteerError: The folder holds no adapter, or cannot be written.
    """
    path = folder / CARD
    if path.exists() and not _is_ours(path):
        return False
    write_whole(path, model_card(folder, name).encode())
    return True


def _is_ours(path: Path) -> bool:
    try:
        return MARK in read_text(path)
    except PowersteerError:
        return False  # a person's, in an encoding of their own


def model_card(folder: Path, name: str | None = None) -> str:
    """The card: metadata for the Hub, then what the adapter is, its data, figures, settings and licence.

    Args:
        folder: The adapter's. ``train.yaml``, ``log.jsonl``, ``validation/``, ``grid.png`` and ``metrics.json`` (of
            ``powersteer evaluate --json``) are read where they are there.
        name: See `write_card`.

    Raises:
        PowersteerError: The folder holds no adapter, or one of those files is damaged.
    """
    config = _read_json(folder / "config.json")
    if not config:
        raise PowersteerError(f"{folder} holds no config.json: give the folder of a trained adapter")
    settings = _read_yaml(folder / "train.yaml")
    data = _data(settings)
    condition = dict(config.get("conditioning") or {"kind": settings.get("conditioning_kind") or "picture"})
    base = _base(config, settings)
    on_hub = not Path(base).exists()
    name = name or (folder.name if folder.is_absolute() else str(folder))
    title = name.rpartition("/")[2]
    best, last_step = _best(folder)
    figures = _figures(folder / "metrics.json")
    columns = list(dict.fromkeys(column for figure in figures.values() for column in figure.values))
    results = _results(settings, data, best, figures)
    metadata = ModelCardData(
        library_name="powersteer",
        pipeline_tag="text-to-image",
        tags=_tags(config, condition["kind"]),
        base_model=base if on_hub and settings else None,
        base_model_relation="adapter" if on_hub and settings else None,
        license=_licence(data),
        datasets=[settings["dataset_name"]] if settings.get("dataset_name") else None,
        model_name=title if results else None,
        eval_results=results or None,
        widget=[{"text": caption, "output": {"url": file}} for file, caption in pictures_of(folder).items()] or None,
    )
    card = ModelCard.from_template(
        metadata,
        template_path=str(TEMPLATE),
        mark=MARK,
        name=name,
        title=title,
        base=_public(base),
        base_options={key: _public(settings[key]) for key in _BASE_OPTIONS if settings.get(key)},
        kind=condition["kind"],
        pictures=pictures_of(folder),
        is_bps=config.get("_class_name") == "BPSModel",
        picture_mode={1: "L", 3: "RGB", 4: "RGBA"}.get(config.get("conditioning_channels", 1)),
        pixel_unshuffle=config.get("pixel_unshuffle", 8),
        facts=_facts(config, condition, data, settings),
        best=best,
        last_step=last_step,
        refitted=_refitted(folder, settings, best),
        columns=columns,
        measured=_measured(figures, columns),
        settings=_told(settings),
        licence=_licence(data),
    )
    return f"{card}\n"


def pictures_of(folder: Path) -> dict[str, str]:
    """The pictures that a card shows, relative to the folder, with their captions."""
    found = {"grid.png": "Conditions and pictures"} if (folder / "grid.png").exists() else {}
    steps = sorted((folder / "validation").glob("step-*.png"))
    if steps:
        found[f"validation/{steps[-1].name}"] = "Condition, generated, target, from fixed seeds"
    return found


def _tags(config: Mapping[str, Any], kind: Any) -> list[str]:
    tags = ["powersteer", "bayesian-power-steering", "diffusers", "diffusers-training", "text-to-image"]
    tags += ["stable-diffusion"] if str((config.get("base") or {}).get("family")).startswith("Stable") else []
    return [*tags, str(kind)]


def _facts(
    config: Mapping[str, Any], condition: Mapping[str, Any], data: Mapping[str, Any], settings: Mapping[str, Any]
) -> dict[str, str]:
    """What it reads, what it is, what it learned from."""
    channels = config.get("conditioning_channels", 1)
    reads = "one channel" if channels == 1 else f"{channels} channels"
    if condition.get("range"):
        reads += " in [{:g}, {:g}]".format(*condition["range"])
    if condition.get("polarity"):
        reads += f", {condition['polarity']}"
    rows = {"condition": f"{condition['kind']}: {reads}", "made by": condition.get("extractor")}
    if "down_weights" in config:
        down = ", ".join(f"{weight:g}" for weight in config["down_weights"])
        rows["network"] = (
            f"{config['_class_name']}, integration weights {down} down, {config['mid_weight']:g} in the middle, "
            f"{config['up_weight']:g} up"
        )
    else:
        rows["network"] = config.get("_class_name")
    known = config.get("base") or {}
    if known.get("family", "unknown") != "unknown":
        rows["made for"] = f"{known['family']}, {known['prediction_type'] or 'any prediction type'}"
    source = data.get("source") or settings.get("dataset_name")
    if source:
        rows["data"] = f"{source}, {data['pictures']} pictures" if data.get("pictures") else str(source)
    rows["licence of the data"] = data.get("licence")
    if settings.get("resolution"):
        rows["resolution"] = settings["resolution"]
    return {key: " ".join(str(fact).replace("|", "\\|").split()) for key, fact in rows.items() if fact}


def _best(folder: Path) -> tuple[dict[str, Any], int]:
    """The best row of the log, as the run chose it, and the last step; an empty row where nothing was measured."""
    rows = [row for row in _log(folder / "log.jsonl") if "steered" in row and "prior" in row]
    if not rows:
        return {}, 0
    held_out = rows[-1].get("on") == HELD_OUT
    return min(rows, key=lambda row: row["steered"]) if held_out else rows[-1], rows[-1]["step"]


def _refitted(folder: Path, settings: Mapping[str, Any], best: Mapping[str, Any]) -> int | None:
    """Updates of the training on all pairs that followed, if one did."""
    record = _read_json(folder / "run.json")
    return record.get("refitted") if record else (settings.get("refit") and best.get("step")) or None


class _Value(BaseModel):
    value: float | None
    error: float | None = None

    def __str__(self) -> str:
        if self.value is None:
            return ""
        return f"{self.value:.4g}" + (f" ± {self.error:.2g}" if self.error else "")


class _Figure(BaseModel):
    """What ``powersteer evaluate --json`` writes of one measure; ``values`` by column."""

    better: Literal["higher", "lower"] | None = None
    values: dict[str, _Value | None]


def _figures(path: Path) -> dict[str, _Figure]:
    """What was measured, by name."""
    try:
        return TypeAdapter(dict[str, _Figure]).validate_python(_read_json(path).get("figures", {}))
    except ValidationError:
        message = f"{path} does not hold what `powersteer evaluate --json` writes: mend it, or remove it"
        raise PowersteerError(message) from None


def _measured(figures: Mapping[str, _Figure], columns: list[str]) -> dict[str, list[str]]:
    """Heading → cells."""
    arrow = {"higher": " ↑", "lower": " ↓", None: ""}
    return {
        f"{name}{arrow[figure.better]}": [str(figure.values.get(column) or "") for column in columns]
        for name, figure in figures.items()
    }


def _results(
    settings: Mapping[str, Any], data: Mapping[str, Any], best: Mapping[str, Any], figures: Mapping[str, _Figure]
) -> list[EvalResult]:
    """The figures of the steered base, as the Hub lists them beside the card."""
    found = {"denoising_loss": best["steered"]} if best.get("on") == HELD_OUT else {}
    found |= {name: value.value for name, figure in figures.items() if (value := figure.values.get("steered"))}
    hub_name = settings.get("dataset_name")
    return [
        EvalResult(
            task_type="text-to-image",
            dataset_type=hub_name or "imagefolder",
            dataset_name=str(data.get("source") or hub_name or HELD_OUT),
            metric_type=name,
            metric_value=value,
        )
        for name, value in found.items()
        if value is not None
    ]


def _told(settings: Mapping[str, Any]) -> str:
    """The settings of the run; of paths, only the last names."""
    if not settings:
        return ""
    told = {key: Path(value).name if key in _LOCAL and value else value for key, value in settings.items()}
    told |= {key: _public(told[key]) for key in ("pretrained_model_name_or_path", "base_config") if told.get(key)}
    told = {key: value for key, value in told.items() if value is not None}
    return yaml.safe_dump(told, sort_keys=False, allow_unicode=True).strip()


def _public(name: str) -> str:
    """A name on the Hub; of a path here, the last name."""
    return Path(name).name if Path(name).exists() else name


def _base(config: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    return str(settings.get("pretrained_model_name_or_path") or (config.get("base") or {}).get("family") or "its base")


def _data(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What ``dataset.json`` says, beside the pairs or one folder above."""
    source = settings.get("train_data_dir")
    folder = Path(source or ".")
    found = (_read_json(place / "dataset.json") for place in (folder, folder.parent)) if source else ()
    return next((said for said in found if said), {})


def _licence(data: Mapping[str, Any]) -> str | None:
    said = str(data.get("licence", "")).partition(",")[0].strip().lower().replace(" ", "-")
    return said if said in _LICENCES else None


def _log(file: Path) -> list[dict[str, Any]]:
    """The rows of a log; one that was cut short is none yet."""
    rows: list[dict[str, Any]] = []
    for number, line in json_lines(read_text(file), str(file)) if file.exists() else ():
        try:
            rows.append(parse_object(line, f"{file}, line {number}"))
        except PowersteerError:
            continue
    return rows


def _read_json(path: Path) -> dict[str, Any]:
    """What a file says; nothing where there is none."""
    return read_object(path) if path.exists() else {}


def _read_yaml(path: Path) -> dict[str, Any]:
    found = parse_yaml(read_text(path), str(path)) if path.exists() else {}
    if not isinstance(found, dict):
        raise PowersteerError(f"{path} does not hold the settings of a run: mend it, or remove it")
    return found
