"""What the page asks for: pictures that follow drawings, with progress; conditions of pictures; settings read back."""

from __future__ import annotations

import base64
import io
import json
import shutil
import threading
import time
import uuid
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps

from powersteer.adapters.attach import check_fits
from powersteer.adapters.load import load_adapter
from powersteer.adapters.protocol import Adapter
from powersteer.apps.studio.folders import make_room
from powersteer.apps.studio.progress import Progress, Watch, reported
from powersteer.apps.studio.recipe import parse, record_of
from powersteer.apps.studio.uploads import check_picture, write_drawing
from powersteer.apps.studio.wishes import CONDITIONS, MAX_SEED, Wanted, Wish, checked
from powersteer.backbones.load import EMBEDDED_BASE, load_base
from powersteer.backbones.protocol import base_of
from powersteer.conditions.extractor import EXTRACTORS, Extractor, Subject
from powersteer.conditions.fidelity.lines import line_f1
from powersteer.conditions.kind import KINDS
from powersteer.conditions.layers import on_paper
from powersteer.core.config import build_config
from powersteer.core.errors import PowersteerError
from powersteer.core.files import read_bytes
from powersteer.core.images import open_picture
from powersteer.core.pictures import from_pil, to_pil
from powersteer.denoising.sampling.metadata import read_metadata, save_picture
from powersteer.denoising.sampling.sample import make_scheduler, steered_pictures
from powersteer.denoising.sampling.sampler import condition_of
from powersteer.denoising.settings import GenerateSettings, PictureJob

CANVAS_SIDE = 512
BATCH_SIZE = 4
AS_IT_IS = "none: it is a drawing"
KEPT_RESULTS = 200
"""The most folders of results that are kept; older ones make room."""
KEPT_BYTES = 4_000_000_000
"""The most bytes that Gradio may keep of uploads and pictures; the oldest file makes room."""
KEPT_PRIORS = 64
"""The most pictures of the prior that are kept: while a drawing grows, the prior's picture stays as it is."""
_WIDEST = 1024
"""Pixels a side that an extractor is given at most."""


@dataclass(frozen=True)
class Made:
    """A picture and all that belongs to it."""

    picture: Path
    prior: Path | None
    settings: GenerateSettings
    job: PictureJob
    line_f1: float | None = None
    """Agreement of its lines with the drawing's, where that can be told."""
    prior_line_f1: float | None = None


@dataclass(frozen=True)
class Result:
    """What a wish came to."""

    made: list[Made]
    spread: Path | None
    """Where the pictures of several seeds differ."""
    mean_spread: float | None
    """Standard deviation of a pixel over the seeds, mean of all, in [0, 1]."""
    seconds: float


class Studio:
    """One base, its adapters, and whoever draws with them, one at a time.

    Args:
        base: See `load_base`.
        adapters: See `load_adapter`; the first is chosen at the start.
        adapters_dir: Whatever adapters lie in it can be chosen too.
        work_dir: For what is made; its owner removes it.

    Raises:
        PowersteerError: The base or an adapter is missing, or they do not fit.
    """

    def __init__(self, base: str, adapters: Sequence[str], adapters_dir: Path, work_dir: Path) -> None:
        self.base, self.named, self.adapters_dir, self.work_dir = base, tuple(adapters), adapters_dir, work_dir
        self.pipe: Any = load_base(base)
        self.own_scheduler = self.pipe.scheduler
        self._lock = threading.Lock()
        self._networks: dict[str, tuple[float, Adapter]] = {}
        self._extractors: dict[tuple[str, str], Extractor] = {}
        self._results: deque[Path] = deque()
        self._stops: dict[str, threading.Event] = {}
        self._priors: OrderedDict[str, Image.Image] = OrderedDict()
        for name in adapters:
            self.network(name)

    # Adapters

    def adapters(self) -> list[str]:
        """The names to choose from."""
        found = sorted(self.adapters_dir.glob("*/config.json")) if self.adapters_dir.is_dir() else []
        return list(dict.fromkeys([*self.named, *(str(file.parent) for file in found if _is_adapter(file))]))

    def network(self, name: str) -> Adapter:
        """One of them, loaded once, and again when it was trained on.

        Raises:
            PowersteerError: It is not one of `adapters`, or does not fit the base.
        """
        if name not in self.adapters():
            raise PowersteerError(f"there is no adapter '{name}' here: start the studio with --adapter {name}")
        weights = Path(name) / "diffusion_pytorch_model.safetensors"
        changed = weights.stat().st_mtime if weights.exists() else 0.0
        if name not in self._networks or self._networks[name][0] != changed:
            network = load_adapter(name)
            check_fits(network, self.pipe)
            self._networks[name] = (changed, network)
        return self._networks[name][1]

    def kind(self, adapter: str) -> str:
        """What its conditions are."""
        return self.network(adapter).spec.conditioning.get("kind") or "sketch"

    # Pictures

    def pictures(self, wish: Wish, who: str) -> Iterator[Progress | Result]:
        """Make what is wished: progress, and at last the result.

        Args:
            wish: What to make.
            who: Can `stop` it.

        Raises:
            PowersteerError: Something is missing or wrong.
            Stopped: `stop` was called.
        """
        wish = checked(wish)
        given = [one for one in wish.conditions if one.adapter]
        if not wish.prompt.strip():
            raise PowersteerError("the prompt is empty: say what the drawing shows, such as 'a fox'")
        if not given:
            raise PowersteerError("no adapter is chosen: choose one for the first drawing")
        blank = next((i for i, one in enumerate(given, 1) if not one.drawing), None)
        if blank is not None:
            raise PowersteerError(f"canvas {blank} is empty: draw something, or start from a picture")
        settings = build_config(
            {
                "adapter": tuple(one.adapter for one in given),
                "base": self.base,
                "num_inference_steps": wish.num_inference_steps,
                "guidance_scale": wish.guidance_scale,
                "scheduler": wish.scheduler,
                **{name: tuple(getattr(one, name) for one in given) for name in ("scale", "start", "end")},
            },
            GenerateSettings,
            where="settings",
        )
        folder = self._new_folder()
        files = [write_drawing(str(one.drawing), folder / f"drawing-{i}.png") for i, one in enumerate(given, 1)]
        jobs = [
            PictureJob(
                prompt=wish.prompt,
                condition=tuple(files),
                negative_prompt=wish.negative_prompt,
                seed=(wish.seed + i) % (MAX_SEED + 1),
            )
            for i in range(wish.num_images)
        ]
        stop = self._stops[who] = threading.Event()
        try:
            yield from reported(lambda report: self._make(settings, jobs, wish.compare, folder, report), stop)
        finally:
            self._stops.pop(who, None)

    def stop(self, who: str) -> None:
        """End what is being made for someone, after the step under way."""
        if (stop := self._stops.get(who)) is not None:
            stop.set()

    def _make(
        self,
        settings: GenerateSettings,
        jobs: Sequence[PictureJob],
        compare: bool,
        folder: Path,
        report: Callable[[Progress], None],
    ) -> Result:
        with self._lock:
            since = time.perf_counter()
            networks = [self.network(name) for name in settings.adapter]
            side = base_of(self.pipe).sample_size
            read = [
                condition_of(file, network, side) for file, network in zip(jobs[0].condition, networks, strict=True)
            ]
            conditions = [condition[None] for condition, _ in read]
            steered, priors = self._denoise(settings, jobs, networks, conditions, compare, report)
        record = {"inverted": [inverted for _, inverted in read]}
        files = _save(steered, folder, "", settings, jobs, record)
        prior = settings.model_copy(update={"scale": (0.0,) * len(networks)})
        prior_files = _save(priors, folder, "prior-", prior, jobs, record)
        scores, prior_scores = (self._line_scores(settings, conditions, images) for images in (steered, priors))
        made = [
            Made(
                files[i],
                prior_files[i] if compare else None,
                settings,
                job,
                scores[i],
                prior_scores[i] if compare else None,
            )
            for i, job in enumerate(jobs)
        ]
        spread, mean_spread = None, None
        if len(steered) > 1:
            deviation = pixel_spread(torch.stack([from_pil(image) for image in steered]))
            mean_spread, spread = deviation.mean().item(), folder / "spread.png"
            spread_picture(deviation).save(spread)
        return Result(made, spread, mean_spread, time.perf_counter() - since)

    def _denoise(
        self,
        settings: GenerateSettings,
        jobs: Sequence[PictureJob],
        networks: list[Adapter],
        conditions: list[torch.Tensor],
        compare: bool,
        report: Callable[[Progress], None],
    ) -> tuple[list[Image.Image], list[Image.Image]]:
        """The steered pictures, and (``compare``) the prior's, of which only those are made that are not known."""
        own, name = self.own_scheduler, settings.scheduler
        self.pipe.scheduler = own if name is None else make_scheduler(name, own)
        keys = [_prior_key(settings, job) for job in jobs] if compare else []
        missing = [job for job, key in zip(jobs, keys, strict=False) if key not in self._priors]
        runs: list[tuple[list[Adapter] | None, Sequence[PictureJob]]] = [(networks, part) for part in _batches(jobs)]
        runs += [(None, part) for part in _batches(missing)]
        steered: list[Image.Image] = []
        for turn, (models, batch) in enumerate(runs):
            images = steered_pictures(
                self.pipe,
                models,
                [job.prompt for job in batch],
                conditions,
                seeds=[job.seed for job in batch],
                negative_prompt=[job.negative_prompt for job in batch],
                num_inference_steps=settings.num_inference_steps,
                guidance_scale=settings.guidance_scale,
                scale=settings.scale,
                start=settings.start,
                end=settings.end,
                callback_on_step_end=Watch(report, turn / len(runs), 1 / len(runs), previewed=models is not None),
            )
            if models is not None:
                steered += images
            else:
                self._priors |= {_prior_key(settings, job): image for job, image in zip(batch, images, strict=True)}
        priors = [self._priors[key] for key in keys]
        while len(self._priors) > KEPT_PRIORS:
            self._priors.popitem(last=False)
        return steered, priors

    def _line_scores(
        self, settings: GenerateSettings, conditions: list[torch.Tensor], images: list[Image.Image]
    ) -> list[float | None]:
        """The line F1 of each picture; None for each unless they are icons, whose lines are dark."""
        line_art = [KINDS.find(self.kind(name)).line_art for name in settings.adapter] == [True]
        if not images or self.base != EMBEDDED_BASE or not line_art:
            return [None] * len(images)
        found = torch.stack([from_pil(image) for image in images])
        return list(line_f1(conditions[0].expand(len(images), -1, -1, -1), found).tolist())

    def _new_folder(self) -> Path:
        folder = self.work_dir / "results" / uuid.uuid4().hex
        folder.mkdir(parents=True)
        self._results.append(folder)
        while len(self._results) > KEPT_RESULTS:
            shutil.rmtree(self._results.popleft(), ignore_errors=True)
        make_room(self.uploads, KEPT_BYTES)
        return folder

    @property
    def uploads(self) -> Path:
        """Where Gradio keeps uploads, and copies of the pictures that it shows."""
        return self.work_dir / "gradio"

    # From pictures

    def extractors(self, adapter: str) -> list[str]:
        """What can make the adapter's conditions of pictures, by name."""
        import_module("powersteer.conditions.extractors.catalogue")
        kind = self.kind(adapter)
        names = [one.name for one in EXTRACTORS.known.values() if one.task == kind and one.name != "drawn"]
        return [*names, AS_IT_IS]

    def extract(self, picture: Path, adapter: str, extractor: str) -> str:
        """A condition of a picture, for the canvas: a PNG as a data URL.

        Raises:
            PowersteerError: The picture is unusable, or the extractor lacks what it needs.
        """
        check_picture(picture)
        kind = self.kind(adapter)
        if KINDS.find(kind).at_latents:
            raise PowersteerError("this adapter reads feature maps, which cannot be drawn: use `powersteer generate`")
        if extractor not in self.extractors(adapter):
            raise PowersteerError(f"there is no extractor '{extractor}' for this adapter: choose one of the menu")
        found = on_paper(open_picture(read_bytes(picture), picture.name))
        if extractor == AS_IT_IS:
            paper: Any = found.getpixel((0, 0))
            return as_data_url(ImageOps.pad(found, (CANVAS_SIDE, CANVAS_SIDE), color=paper))
        if (kind, extractor) not in self._extractors:
            import_module("powersteer.conditions.extractors.catalogue")
            self._extractors[kind, extractor] = EXTRACTORS.find(kind, extractor).build()
        side = min(_WIDEST, *found.size)
        found = ImageOps.fit(found, (side, side))
        with self._lock:
            condition = self._extractors[kind, extractor](Subject(found))
        assert isinstance(condition, Image.Image)
        drawn = ImageOps.invert(condition) if KINDS.find(kind).line_art else condition
        return as_data_url(drawn.resize((CANVAS_SIDE, CANVAS_SIDE), Image.Resampling.LANCZOS))

    def reload(self, picture: Path) -> Wish:
        """What a picture was made of.

        Raises:
            PowersteerError: It does not say, or was made with what is not here.
        """
        check_picture(picture)
        metadata = read_metadata(picture)
        settings, job = parse(metadata.settings)
        if settings.base != self.base:
            raise PowersteerError(f"{picture.name} was made on {settings.base}: start the studio with --base for it")
        if settings.init_image is not None:
            raise PowersteerError(f"{picture.name} started from another picture: use `powersteer generate` for it")
        if settings.prepared or not 1 <= len(settings.adapter) <= CONDITIONS:
            raise PowersteerError(
                f"{picture.name} was not made of one to {CONDITIONS} drawings: use `powersteer generate`"
            )
        for name in settings.adapter:
            self.network(name)
        drawings: list[str | None] = [None] * len(settings.adapter)
        if metadata.conditions:
            folder = self._new_folder()
            for i, content in enumerate(metadata.conditions[: len(drawings)]):
                drawings[i] = as_data_url(Image.open(write_drawing(content, folder / f"drawing-{i + 1}.png")))
        spans: list[Sequence[float]] = [settings.scale, settings.start, settings.end]
        if any(len(span) not in (1, len(drawings)) for span in spans):
            raise PowersteerError(f"the settings in {picture.name} are not one for each adapter, or one for all")
        each = [span if len(span) == len(drawings) else [*span] * len(drawings) for span in spans]
        return checked(
            Wish(
                job.prompt,
                [
                    Wanted(*one)  # (adapter, drawing, scale, start, end)
                    for one in zip(settings.adapter, drawings, *each, strict=True)
                ],
                negative_prompt=job.negative_prompt,
                seed=job.seed,
                num_inference_steps=settings.num_inference_steps,
                guidance_scale=settings.guidance_scale,
                scheduler=settings.scheduler,
            )
        )


def pixel_spread(pictures: torch.Tensor) -> torch.Tensor:
    """How far pictures differ at each pixel: (N, 3, H, W) in [-1, 1] → (H, W) in [0, 1].

    The standard deviation over the pictures, unbiased, root mean square of the channels; 1 would be black to white.
    """
    return (((pictures + 1) / 2).var(0).mean(0)).sqrt()


def spread_picture(deviation: torch.Tensor) -> Image.Image:
    """A map (H, W) for people to look at: dark where all agree, bright where they differ most."""
    share = deviation / deviation.max().clamp_min(1e-6)
    grey = to_pil((share * 2 - 1).expand(3, -1, -1)).convert("L")
    return ImageOps.colorize(grey, black="#1b1035", mid="#c0392b", white="#fff3b0")


def as_data_url(picture: Image.Image) -> str:
    """A picture as the canvas takes it."""
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _save(
    images: list[Image.Image],
    folder: Path,
    prefix: str,
    settings: GenerateSettings,
    jobs: Sequence[PictureJob],
    record: dict[str, Any],
) -> list[Path]:
    """Each with its settings and drawings; of the drawings' files only the names are told."""
    files: list[Path] = []
    for image, job in zip(images, jobs, strict=False):
        told = job.model_copy(update={"condition": tuple(Path(path.name) for path in job.condition)})
        files.append(folder / f"{prefix}seed{job.seed}.png")
        save_picture(image, files[-1], record_of(settings, told) | record, job.condition)
    return files


def _batches(jobs: Sequence[PictureJob]) -> list[Sequence[PictureJob]]:
    return [jobs[i : i + BATCH_SIZE] for i in range(0, len(jobs), BATCH_SIZE)]


def _prior_key(settings: GenerateSettings, job: PictureJob) -> str:
    """All that the prior's picture depends on."""
    steering = {"adapter", "scale", "start", "end"}
    return settings.model_dump_json(exclude=steering) + job.model_dump_json(exclude={"condition"})


def _is_adapter(file: Path) -> bool:
    with suppress(OSError, ValueError):
        return json.loads(file.read_text(encoding="utf-8")).get("_class_name") == "BPSModel"
    return False
