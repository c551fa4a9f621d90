"""What a run tells of itself: a progress bar, log.jsonl, TensorBoard or W&B, pictures, and what it noticed."""

from __future__ import annotations

import importlib.util
import json
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TimeRemainingColumn

from powersteer.adapters.attach import attach
from powersteer.adapters.protocol import Adapter
from powersteer.backbones.protocol import PipelineBackbone
from powersteer.conditions import condition_picture
from powersteer.core.console import PlainColumn, PlainConsole
from powersteer.core.errors import NonFiniteError, PowersteerError
from powersteer.core.files import write_whole
from powersteer.core.pictures import save_grid, to_pil
from powersteer.core.text import json_lines, parse_object, read_text
from powersteer.data.encode import Sample, conditions_of
from powersteer.data.pairs import spread
from powersteer.denoising.heldout import Autocast, Gap, HeldOut
from powersteer.denoising.sampling.sample import steered_pictures
from powersteer.training.folder import writing
from powersteer.training.record import LOG


def check_trackers(report_to: str) -> list[str]:
    """The trackers to report to.

    Raises:
        PowersteerError: One is not installed.
    """
    names = {"none": [], "all": ["tensorboard", "wandb"]}.get(report_to, [report_to])
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise PowersteerError(f"report_to={report_to} needs {name}: pip install {name}")
    return names


@dataclass(frozen=True)
class Validation:
    """The held-out losses of one moment, and what they say."""

    prior: torch.Tensor
    """(bands, N), as the others."""
    steered: torch.Tensor
    shuffled: torch.Tensor
    bands: list[str]

    @classmethod
    def of(cls, held_out: HeldOut, prior: torch.Tensor, network: Adapter, autocast: Autocast) -> Validation:
        """Measure a network."""
        network.eval()
        steered = held_out.losses(network, autocast=autocast)
        shuffled = held_out.losses(network, shuffled=True, autocast=autocast)
        network.train()
        return cls(prior, steered, shuffled, held_out.bands)

    @property
    def gain(self) -> Gap:
        """How far the steered loss lies below the prior's."""
        return Gap.of(self.prior - self.steered)

    @property
    def control(self) -> Gap:
        """How much is lost when conditions are exchanged: whether the condition is used."""
        return Gap.of(self.shuffled - self.steered)

    def row(self) -> dict[str, Any]:
        """For the log."""
        kinds = {"prior": self.prior, "steered": self.steered, "shuffled": self.shuffled}
        means = {name: losses.nanmean().item() for name, losses in kinds.items()}
        bands = {
            band: {name: losses[i].nanmean().item() for name, losses in kinds.items()}
            for i, band in enumerate(self.bands)
        }
        return {
            **means,
            "gain": self.gain.mean,
            "gain_error": self.gain.error,
            "control": self.control.mean,
            "control_error": self.control.error,
            "bands": bands,
        }


class Monitor:
    """Used as a context: the progress bar is there within it. Only the main process shows and writes anything.

    Args:
        output_dir: Of the run.
        accelerator: Of the run.
        report_to: Trackers; see `TrainConfig`.
        total: Optimizer updates of the whole run.
        description: For the progress bar.
        autocast: Of the run; pictures are made within it.
    """

    def __init__(
        self, output_dir: Path, accelerator: Accelerator, total: int | None, description: str, autocast: Autocast
    ) -> None:
        self.output_dir, self.accelerator, self.autocast = output_dir, accelerator, autocast
        self.console = PlainConsole(stderr=True, quiet=not accelerator.is_main_process)
        self.progress = Progress(
            PlainColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            PlainColumn("{task.fields[figures]}"),
            console=self.console,
            disable=not accelerator.is_main_process,
        )
        self.total, self.description = total, description
        self.held_out = ""
        self._task = TaskID(0)
        self._since = (time.perf_counter(), 0)

    def __enter__(self) -> Monitor:
        with suppress(OSError):  # here as below: a terminal that has gone must not end the run
            self.progress.start()
        self._task = self.progress.add_task(self.description, total=self.total, figures="")
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self.progress.stop()

    def resume(self, step: int) -> None:
        """Go on at a step: what the log holds of later ones, which were lost, is cut off.

        Raises:
            PowersteerError: The log cannot be written.
        """
        self._since = (time.perf_counter(), step)
        self.progress.update(self._task, completed=step)
        log = self.output_dir / LOG
        if self.accelerator.is_main_process and log.exists():
            lines = [line for _, line in json_lines(read_text(log), str(log)) if step and _step(line) <= step]
            write_whole(log, "".join(line + "\n" for line in lines).encode())

    def advance(self, step: int, loss: float, batch_size: int) -> None:
        """Show an update."""
        since, first = self._since
        speed = (step - first) * batch_size / (time.perf_counter() - since)
        figures = (
            f"loss {loss:.4f}  {self.held_out}{speed:.1f} images/s  {memory_used(self.accelerator.device) / 1e9:.1f} GB"
        )
        self.progress.update(self._task, completed=step, figures=figures)

    def record(self, row: dict[str, Any]) -> None:
        """Append a row to the log, and report it; a figure that is no number (of one pair, an error) is left out.

        Raises:
            PowersteerError: The log, or a tracker's, cannot be written.
        """
        row = _finite(row)
        if "steered" in row:
            self.held_out = f"held-out {row['steered']:.4f} (prior {row['prior']:.4f})  "
        if not self.accelerator.is_main_process:
            return
        file = self.output_dir / LOG
        with writing(file), file.open("a", encoding="utf-8") as log:
            log.write(json.dumps(row) + "\n")
        flat = {name: value for name, value in row.items() if isinstance(value, float)}
        for band, figures in row.get("bands", {}).items():
            flat |= {f"t {band}/{name}": value for name, value in figures.items()}
        with writing(f"the logs of {', '.join(tracker.name for tracker in self.accelerator.trackers)}"):
            self.accelerator.log(flat, step=row["step"])

    def say(self, message: str) -> None:
        """A line above the bar."""
        with suppress(OSError):
            self.console.print(message, soft_wrap=True)

    def pictures(self, base: PipelineBackbone, network: Adapter, watched: HeldOut, count: int, step: int) -> None:
        """Write and report condition | generated | target for some of the watched pairs, seeds fixed.

        Raises:
            PowersteerError: They cannot be written.
        """
        if not self.accelerator.is_main_process or not count:
            return
        pairs = watched.pairs
        size = pairs.pairs.sizes[0]  # pictures of one size
        chosen = [i for i, other in enumerate(pairs.pairs.sizes) if other == size]
        chosen = [chosen[i] for i in spread(len(chosen), count)]
        samples = [pairs[i, 0] for i in chosen]
        conditions = conditions_of(samples)
        network.eval()
        try:
            made = self._made(base, network, conditions, samples, chosen, size)
        except NonFiniteError as error:  # the run's own loss says whether it may go on
            self.say(f"step {step}: no pictures, {error}")
            return
        finally:
            network.train()
        targets = [pairs.pairs.view(i, 0)[0] for i in chosen]
        sheet = [
            picture
            for condition, image, target in zip(conditions, made, targets, strict=True)
            for picture in (condition_picture(condition, size, pairs.pairs.transform.kind), image, target)
        ]
        file = self.output_dir / "validation" / f"step-{step:06d}.png"
        scale = max(1, 128 // size[1])
        with writing(file):
            save_grid(torch.stack(sheet), file, columns=3, scale=scale, headings=("condition", "generated", "target"))
        for tracker in self.accelerator.trackers:
            images = np.stack([np.asarray(to_pil(image)) for image in made])
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            with writing(f"the logs of {tracker.name}"):
                tracker.log_images({"generated": images}, step=step, **layout)

    def _made(
        self,
        base: PipelineBackbone,
        network: Adapter,
        conditions: torch.Tensor,
        samples: Sequence[Sample],
        seeds: Sequence[int],
        size: tuple[int, int],
    ) -> torch.Tensor:
        """Pictures (N, 3, H, W) in [-1, 1] under conditions (N, C, H, W).

        Raises:
            NonFiniteError: They are not finite.
        """
        with torch.no_grad():
            with self.autocast(), attach(base.module, network, conditions, plan=None):
                latents = steered_pictures(
                    base.pipe,
                    None,
                    [sample.texts[0] for sample in samples],
                    None,
                    seeds=seeds,
                    height=size[0],
                    width=size[1],
                    output_type="latent",
                )
            made = base.pictures(torch.as_tensor(latents)).float().cpu()
        if not bool(made.isfinite().all()):
            raise NonFiniteError(
                f"the VAE's are not finite numbers in {str(base.pipe.vae.dtype).removeprefix('torch.')}"
            )
        return made


def memory_used(device: torch.device) -> int:
    """Bytes: at most so far on a GPU, now on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss


def _finite(row: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: _finite(value) if isinstance(value, Mapping) else value for name, value in row.items()}
    return {name: value for name, value in kept.items() if not isinstance(value, float) or math.isfinite(value)}


def _step(line: str) -> int:
    try:
        return int(parse_object(line, LOG)["step"])
    except (PowersteerError, KeyError, TypeError, ValueError):
        return 2**63  # cut short
