"""The tab to draw in: what is where, and what calls what. What happens then is `work`'s."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from powersteer.apps.studio.messages import told
from powersteer.apps.studio.progress import Progress, Stopped
from powersteer.apps.studio.recipe import as_command, as_python
from powersteer.apps.studio.widgets import COMPUTE, LIGHT, RAW, WIDE, asset, status
from powersteer.apps.studio.wishes import (
    CONDITIONS,
    LIVE_SCHEDULER,
    LIVE_STEPS,
    MAX_IMAGES,
    MAX_SEED,
    MAX_STEPS,
    Extraction,
    Seed,
    Wanted,
    Wish,
    checked,
)
from powersteer.apps.studio.work import AS_IT_IS, Result, Studio
from powersteer.core.config import build_config
from powersteer.core.errors import PowersteerError
from powersteer.denoising.sampling.metadata import read_metadata
from powersteer.denoising.settings import SCHEDULERS

OWN_SCHEDULER = "the base's own"
_STILL = [gr.skip()] * 9
"""What is shown of a result, left as it is: pictures, recipe, downloads, strip, spread, result."""


def draw_tab(page: gr.Blocks, studio: Studio) -> list[gr.Dropdown]:
    """Fill the tab.

    Args:
        page: What it is on.
        studio: What makes pictures.

    Returns:
        The menus of adapters.
    """
    with gr.Row(equal_height=False, elem_id="room"):
        sheet = _sheet()
        pictures = _pictures()
        choices = _choices(studio, sheet.canvas)
    _connect(page, _Answers(studio), sheet, pictures, choices)
    return [one.adapter for one in choices.conditions]


@dataclass(frozen=True)
class _Sheet:
    """The left column: what is drawn."""

    prompt: gr.Textbox
    canvas: gr.HTML
    go: gr.Button
    halt: gr.Button
    again: gr.Button
    live: gr.Checkbox


def _sheet() -> _Sheet:
    with gr.Column(elem_id="sheet", **WIDE):
        prompt = gr.Textbox("", label="Prompt", placeholder="a fox", elem_id="prompt", max_lines=2)
        canvas = _canvas(0)
        with gr.Row():
            go = gr.Button("Generate", variant="primary", elem_id="go", min_width=90)
            halt = gr.Button("Stop", elem_id="halt", min_width=80)
            again = gr.Button("New seed", elem_id="again", min_width=80)
        live = gr.Checkbox(True, label=f"Make a picture after every stroke ({LIVE_STEPS} steps)", elem_id="live")
    return _Sheet(prompt, canvas, go, halt, again, live)


@dataclass(frozen=True)
class _Pictures:
    """The middle column: what was made, and how."""

    status: gr.HTML
    one: list[Any]
    """What belongs to the chosen picture; see `_one`."""
    strip: gr.Gallery
    spread: gr.Image
    reload: gr.UploadButton
    made: gr.State
    """The `Result`."""

    @property
    def outputs(self) -> list[Any]:
        """What `_shown` fills."""
        return [self.status, *self.one, self.strip, self.spread, self.made]


def _pictures() -> _Pictures:
    with gr.Column(elem_id="pictures", **WIDE):
        said = gr.HTML(status("Draw something: a picture of it comes here."), elem_id="status")
        with gr.Row():
            prior = gr.Image(label="Prior", format="png", buttons=[], elem_id="prior", min_width=120)
            steered = gr.Image(label="Steered", format="png", buttons=[], elem_id="steered", min_width=120)
        strip = gr.Gallery(
            label="Seeds (choose one)",
            columns=4,
            object_fit="contain",
            allow_preview=False,
            height="auto",
            buttons=[],
            visible=False,
            elem_id="strip",
        )
        spread = gr.Image(
            label="Where your drawing leaves freedom", format="png", buttons=[], visible=False, elem_id="spread"
        )
        with gr.Accordion("Settings of this picture", open=False, elem_id="recipe"):
            command = gr.Code(language="shell", label="Command", elem_id="command", interactive=False, wrap_lines=True)
            snippet = gr.Code(language="python", label="Python", elem_id="snippet", interactive=False)
            record = gr.Code(language="json", label="Settings", elem_id="record", interactive=False, max_lines=12)
        downloads = gr.File(
            label="Download the picture and its drawings", elem_id="downloads", visible=False, interactive=False
        )
        reload = gr.UploadButton("Reload a picture made here", file_types=[".png"], size="sm", elem_id="reload")
    one = [prior, steered, command, snippet, record, downloads]
    return _Pictures(said, one, strip, spread, reload, gr.State(None))


@dataclass(frozen=True)
class _Condition:
    """The inputs of one condition."""

    adapter: gr.Dropdown
    canvas: gr.HTML
    scale: gr.Slider
    start: gr.Slider
    end: gr.Slider

    @property
    def fields(self) -> list[Any]:
        """In the order of `Wanted`."""
        return [self.adapter, self.canvas, self.scale, self.start, self.end]


@dataclass(frozen=True)
class _Choices:
    """The right column: conditions and settings."""

    conditions: list[_Condition]
    negative: gr.Textbox
    seed: gr.Number
    count: gr.Slider
    steps: gr.Slider
    guidance: gr.Slider
    scheduler: gr.Dropdown
    compare: gr.Checkbox

    @property
    def fields(self) -> list[Any]:
        """Those of all conditions."""
        return [field for one in self.conditions for field in one.fields]


def _choices(studio: Studio, canvas: gr.HTML) -> _Choices:
    with gr.Column(elem_id="choices", **WIDE):
        conditions = [_condition(studio, 0, canvas)]
        for i in range(1, CONDITIONS):
            with gr.Accordion(f"Condition {i + 1}", open=False, elem_id=f"more-{i}"):
                conditions.append(_condition(studio, i, _canvas(i)))
        with gr.Accordion("Settings", open=False, elem_id="settings"):
            negative = gr.Textbox("", label="Negative prompt", elem_id="negative")
            with gr.Row():
                seed = gr.Number(
                    0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, elem_id="seed", min_width=90
                )
                count = gr.Slider(1, MAX_IMAGES, 4, step=1, label="Pictures", elem_id="count", min_width=140)
            steps = gr.Slider(1, MAX_STEPS, 30, step=1, label="Steps", elem_id="steps")
            guidance = gr.Slider(1, 15, 3, step=0.1, label="Guidance scale", elem_id="guidance")
            scheduler = gr.Dropdown([OWN_SCHEDULER, *SCHEDULERS], value=OWN_SCHEDULER, label="Scheduler")
            compare = gr.Checkbox(True, label="Compare with the prior, from the same noise", elem_id="compare")
    return _Choices(conditions, negative, seed, count, steps, guidance, scheduler, compare)


def _canvas(index: int) -> gr.HTML:
    return gr.HTML(
        None,
        html_template=asset("canvas.html"),
        css_template=asset("canvas.css"),
        js_on_load=asset("canvas.js"),
        elem_id=f"canvas-{index}",
        name=f"Canvas {index + 1}",
    )


def _condition(studio: Studio, index: int, canvas: gr.HTML) -> _Condition:
    choices = studio.adapters()
    first = studio.named[0] if index == 0 and studio.named else None
    with gr.Accordion("Start from a picture", open=False, elem_id=f"from-picture-{index}"):
        names = studio.extractors(first) if first else [AS_IT_IS]
        extractor = gr.Dropdown(names, value=names[0], label="Find its lines with", elem_id=f"extractor-{index}")
        picture = gr.File(label="Drop a picture", height=110, elem_id=f"picture-{index}")
    with gr.Accordion("Adapter and strength", open=False, elem_id=f"strength-{index}"):
        adapter = gr.Dropdown(choices, value=first, label="Adapter", elem_id=f"adapter-{index}")
        scale = gr.Slider(0, 2, 1, step=0.05, label="Steering scale", elem_id=f"scale-{index}")
        start = gr.Slider(0, 1, 0, step=0.05, label="Start (0: noise)", elem_id=f"start-{index}")
        end = gr.Slider(0, 1, 1, step=0.05, label="End (1: picture)", elem_id=f"end-{index}")

    @told(studio.work_dir)
    def extracted(file: dict[str, Any] | None, extractor: Any, adapter: Any) -> Any:
        if not adapter:
            raise PowersteerError("no adapter is chosen: choose one under 'Adapter and strength'")
        if file is None:
            raise PowersteerError("there is no picture: drop one")
        asked = build_config({"adapter": adapter, "extractor": extractor}, Extraction, where="settings")
        return studio.extract(Path(file["path"]), asked.adapter, asked.extractor)

    @told(studio.work_dir)
    def chosen(adapter: Any) -> Any:
        names = studio.extractors(adapter) if adapter else [AS_IT_IS]
        return gr.Dropdown(choices=names, value=names[0])

    picture.upload(extracted, [picture, extractor, adapter], [canvas], show_progress="minimal", **RAW, **COMPUTE)
    adapter.input(chosen, [adapter], [extractor], **RAW, **LIGHT)
    return _Condition(adapter, canvas, scale, start, end)


def _connect(page: gr.Blocks, answers: _Answers, sheet: _Sheet, pictures: _Pictures, choices: _Choices) -> None:
    """Say which event calls what."""
    telling = told(answers.studio.work_dir)
    settings = [choices.negative, choices.seed, choices.count, choices.steps, choices.guidance, choices.scheduler]
    inputs = [sheet.prompt, *settings, choices.compare, *choices.fields]
    later: dict[str, Any] = {"trigger_mode": "always_last", "show_progress": "hidden", **RAW, **COMPUTE}
    sketch: tuple[Any, ...] = (telling(answers.sketch), [sheet.live, *inputs], pictures.outputs)

    once: dict[str, Any] = {"trigger_mode": "once", "show_progress": "hidden", **RAW, **COMPUTE}
    sheet.go.click(telling(answers.generate), inputs, pictures.outputs, **once)
    for one in choices.conditions:
        one.canvas.input(*sketch, **later)
    for box in (sheet.prompt, choices.seed):
        box.submit(*sketch, **later)
    counted = sheet.again.click(telling(answers.next_seed), choices.seed, choices.seed, **RAW, **LIGHT)
    counted.success(*sketch, **later)
    sheet.halt.click(answers.stop, None, None, **LIGHT)
    pictures.strip.select(telling(answers.select), [pictures.made], pictures.one, **LIGHT)
    told_of = [sheet.prompt, *(one for one in settings if one is not choices.count), *choices.fields]
    reload = pictures.reload
    reload.upload(telling(answers.reloaded), [reload], told_of, show_progress="hidden", **COMPUTE)
    page.unload(answers.stop)


@dataclass(frozen=True)
class _Answers:
    """What the events of the tab do."""

    studio: Studio

    def generate(self, request: gr.Request, *values: Any) -> Iterator[Any]:
        """Make what is wished."""
        yield from _shown(self.studio, _wish(values), request.session_hash or "")

    def sketch(self, request: gr.Request, on: bool, *values: Any) -> Iterator[Any]:
        """Make one quick picture, where that is wished after every stroke."""
        wish = checked(_wish(values, live=True))
        if not on or not any(one.drawing for one in wish.conditions):
            return
        if not wish.prompt.strip():
            yield [status("Say what it shows, in the prompt: then a picture comes after every stroke."), *_STILL]
            return
        yield from _shown(self.studio, wish, request.session_hash or "")

    def stop(self, request: gr.Request) -> None:
        """End what is being made."""
        self.studio.stop(request.session_hash or "")

    def next_seed(self, seed: Any) -> int:
        """The seed after this one."""
        return (build_config({"seed": seed or 0}, Seed, where="settings").seed + 1) % (MAX_SEED + 1)

    def select(self, result: Result | None, event: gr.SelectData) -> Any:
        """Show another picture of the result."""
        chosen = [i for i in range(len(result.made) if result else 0) if i == event.index]
        if result is None or not chosen:
            raise PowersteerError("there is no such picture: make some first")
        return _one(result, chosen[0])

    def reloaded(self, file: str | None) -> list[Any]:
        """Put back what a picture was made of."""
        if file is None:
            raise PowersteerError("there is no picture: choose a PNG that was made here")
        wish = self.studio.reload(Path(file))
        if not all(one.drawing for one in wish.conditions):
            gr.Warning("The picture does not carry its drawing: only its settings were reloaded.")
        told: list[Any] = [wish.prompt, wish.negative_prompt, wish.seed, wish.num_inference_steps, wish.guidance_scale]
        told.append(wish.scheduler or OWN_SCHEDULER)
        blank = Wanted("", None)
        for i in range(CONDITIONS):
            slot = wish.conditions[i] if i < len(wish.conditions) else blank
            adapter = gr.Dropdown(choices=self.studio.adapters(), value=slot.adapter or None)
            told += [adapter, slot.drawing or gr.skip(), slot.scale, slot.start, slot.end]
        return told


def _wish(values: Sequence[Any], *, live: bool = False) -> Wish:
    """What was sent, unchecked; an empty box for the seed is 0."""
    prompt, negative, seed, count, steps, guidance, scheduler, compare, *slots = values
    width = len(slots) // CONDITIONS
    wanted = [Wanted(*slots[i : i + width]) for i in range(0, len(slots), width)]
    own = None if scheduler == OWN_SCHEDULER else scheduler
    return Wish(
        prompt,
        [one for one in wanted if one.adapter],
        negative_prompt=negative,
        seed=seed or 0,
        num_images=1 if live else count,
        num_inference_steps=LIVE_STEPS if live else steps,
        guidance_scale=guidance,
        scheduler=LIVE_SCHEDULER if live else own,
        compare=compare,
    )


def _shown(studio: Studio, wish: Wish, who: str) -> Iterator[list[Any]]:
    """What the outputs become while a wish is being fulfilled."""
    try:
        for said in studio.pictures(wish, who):
            if isinstance(said, Progress):
                yield [status("Denoising", said.share), _STILL[0], said.preview or _STILL[1], *_STILL[2:]]
                continue
            told = status(_summary(said))
            several = len(said.made) > 1
            strip = gr.Gallery(value=[(str(m.picture), str(m.job.seed)) for m in said.made], visible=several)
            spread = gr.Image(value=None if said.spread is None else str(said.spread), visible=said.spread is not None)
            yield [told, *_one(said, 0), strip, spread, said]
    except Stopped:
        yield [status("Stopped."), *_STILL]


def _one(result: Result, index: int) -> list[Any]:
    """One picture of a result, and how to make it again: prior's, steered, command, Python, settings, files."""
    made = result.made[index]
    names = [path.name for path in made.job.condition]
    settings = read_metadata(made.picture).settings
    return [
        gr.Image(value=None if made.prior is None else str(made.prior), visible=made.prior is not None),
        str(made.picture),
        as_command(made.settings, made.job, names),
        as_python(made.settings, made.job, names),
        json.dumps(settings, indent=2, ensure_ascii=False),
        gr.File(value=[str(made.picture), *map(str, made.job.condition)], visible=True),
    ]


def _summary(result: Result) -> str:
    first = result.made[0]
    said = [f"{len(result.made)} picture{'s' * (len(result.made) > 1)} in {result.seconds:.1f} s"]
    if first.line_f1 is not None:
        prior = "" if first.prior_line_f1 is None else f" (the prior's: {first.prior_line_f1:.2f})"
        said.append(f"agreement with your lines {first.line_f1:.2f}{prior}")
    if result.mean_spread is not None:
        said.append(f"spread over the seeds {result.mean_spread:.3f}")
    return " · ".join(said)
