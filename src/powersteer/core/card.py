"""The model card of an adapter, made of what its run left: config, settings, log, figures, pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from powersteer.core.errors import PowersteerError
from powersteer.core.files import write_whole
from powersteer.core.text import json_lines, parse_object, parse_yaml, read_object, read_text

CARD = "README.md"
MARK = "<!-- Written by powersteer, and written anew by it. Delete this line, and the card is yours. -->"
_LICENCES = ("cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "apache-2.0", "mit")
"""The Hub's own names of what a data set may say."""
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
    base, licence = _base(config, settings), _licence(data)
    on_hub = not Path(base).exists()
    base = base if on_hub else Path(base).name
    name = name or (folder.name if folder.is_absolute() else str(folder))

    tags = ["powersteer", "bayesian-power-steering", "diffusers", "diffusers-training", "text-to-image"]
    tags += ["stable-diffusion"] if str(config.get("base", {}).get("family")).startswith("Stable") else []
    metadata: dict[str, Any] = {
        "library_name": "powersteer",
        "pipeline_tag": "text-to-image",
        "tags": [*tags, str(condition["kind"])],
        "base_model": base if on_hub and settings else None,
        "base_model_relation": "adapter",
        "license": licence,
        "datasets": [settings["dataset_name"]] if settings.get("dataset_name") else None,
        "widget": [{"text": caption, "output": {"url": file}} for file, caption in pictures_of(folder).items()],
    }
    head = yaml.safe_dump({key: value for key, value in metadata.items() if value}, sort_keys=False)
    parts = [
        f"---\n{head}---\n{MARK}\n\n# {name.rpartition('/')[2]}",
        f"Steers {base} with a condition of the kind **{condition['kind']}**, by [Bayesian Power Steering]"
        "(https://arxiv.org/abs/2406.03683). The base stays frozen.",
        *(f"![{caption}]({file})\n\n*{caption}.*" for file, caption in pictures_of(folder).items()),
        _use(name, base, config) if config.get("_class_name") == "BPSModel" else "",
        _facts(config, condition, data, settings),
        _figures(folder, settings),
        _measured(_read_json(folder / "metrics.json")),
        _command(settings),
        f"## Licence\n\n{licence}, as its data."
        if licence
        else "## Licence\n\nNot stated. The base and the data have "
        "theirs; say here under which the weights may be used.",
        "## Not good for\n\nOther bases than its own, and conditions of another kind or polarity than the table says.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def pictures_of(folder: Path) -> dict[str, str]:
    """The pictures that a card shows, relative to the folder, with their captions."""
    found = {"grid.png": "Conditions and pictures"} if (folder / "grid.png").exists() else {}
    steps = sorted((folder / "validation").glob("step-*.png"))
    if steps:
        found[f"validation/{steps[-1].name}"] = "Condition, generated, target, from fixed seeds"
    return found


def _use(name: str, base: str, config: Mapping[str, Any]) -> str:
    channels, unshuffle = config.get("conditioning_channels", 1), config.get("pixel_unshuffle", 8)
    mode = {1: "L", 3: "RGB", 4: "RGBA"}.get(channels)
    load = f'Image.open("condition.png").convert("{mode}").resize((side, side))'
    if mode is None:
        load = 'torch.from_numpy(np.load("condition.npy"))[None]'
    imports = "from PIL import Image\n" if mode else "import numpy as np\nimport torch\n"
    return f"""## Use

```console
powersteer generate --adapter {name} --base {base} --condition condition.png --prompt "a fox"
```

```python
{imports}
from powersteer import load_adapter, load_base, steer

pipe, model = load_base("{base}"), load_adapter("{name}")
side = pipe.unet.config.sample_size * {unshuffle}
condition = {load}
with steer(pipe, model, condition):
    pipe("a fox").images[0].save("fox.png")
```"""


def _facts(
    config: Mapping[str, Any], condition: Mapping[str, Any], data: Mapping[str, Any], settings: Mapping[str, Any]
) -> str:
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
    return "## What it is\n\n| | |\n|---|---|\n" + "\n".join(
        f"| {key} | {fact} |" for key, fact in rows.items() if fact
    )


def _figures(folder: Path, settings: Mapping[str, Any]) -> str:
    """The best row of the log, as the run chose it."""
    rows = [row for row in _log(folder / "log.jsonl") if "steered" in row and "prior" in row]
    if not rows:
        return ""
    held_out = rows[-1].get("on") == "held-out pairs"
    best = min(rows, key=lambda row: row["steered"]) if held_out else rows[-1]
    record = _read_json(folder / "run.json")
    updates = record.get("refitted") if record else settings.get("refit") and best["step"]
    note = f" These weights were then trained anew on all pairs, for {updates} updates." if updates else ""
    losses = [f"{best[kind]:.4f}" if kind in best else "—" for kind in ("prior", "steered", "shuffled")]
    gaps = [f"{best[kind]:.4f}{_error(best, kind)}" for kind in ("gain", "control")]
    return f"""## Figures

Denoising loss on {best["on"]}, same noise for all, at step {best["step"]} of {rows[-1]["step"]}:

| prior | steered | conditions exchanged | gain | control |
|---|---|---|---|---|
| {" | ".join([*losses, *gaps])} |

Gain: prior less steered. Control: how much worse it is with another picture's condition.{note}"""


def _error(row: Mapping[str, Any], kind: str) -> str:
    error = row.get(f"{kind}_error")
    return "" if error is None else f" ± {error:.4f}"


def _measured(metrics: Mapping[str, Any]) -> str:
    """What ``powersteer evaluate`` found."""
    figures: Mapping[str, Any] = metrics.get("figures", {})
    columns = list(dict.fromkeys(column for figure in figures.values() for column in figure["values"]))
    if not columns:
        return ""

    def shown(value: Mapping[str, Any] | None) -> str:
        if value is None or value["value"] is None:
            return ""
        return f"{value['value']:.4g}" + (f" ± {value['error']:.2g}" if value.get("error") else "")

    arrow = {"higher": " ↑", "lower": " ↓"}
    rows = [
        f"| {name}{arrow.get(str(figure['better']), '')} | "
        + " | ".join(shown(figure["values"].get(column)) for column in columns)
        + " |"
        for name, figure in figures.items()
    ]
    head = f"| `powersteer evaluate` | {' | '.join(columns)} |\n|---{'|---' * len(columns)}|"
    return "\n".join([head, *rows])


def _command(settings: Mapping[str, Any]) -> str:
    """How it was made; of paths, only the last names."""
    if not settings:
        return ""
    told = {key: Path(value).name if key in _LOCAL and value else value for key, value in settings.items()}
    base = settings.get("pretrained_model_name_or_path")
    told |= {"pretrained_model_name_or_path": Path(base).name} if base and Path(base).exists() else {}
    listing = yaml.safe_dump({key: value for key, value in told.items() if value is not None}, sort_keys=False)
    return f"## How it was made\n\n```console\npowersteer train train.yaml\n```\n\n```yaml\n# train.yaml\n{listing}```"


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
