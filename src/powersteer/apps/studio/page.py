"""The page: what is where, and what calls what. What happens then is `work`'s and `training`'s."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from powersteer.apps.studio.messages import told
from powersteer.apps.studio.pairs import PairsFound, named_folder
from powersteer.apps.studio.progress import Progress, Stopped
from powersteer.apps.studio.recipe import as_command, as_python
from powersteer.apps.studio.training import Training
from powersteer.apps.studio.wishes import (
    CONDITIONS,
    LIVE_SCHEDULER,
    LIVE_STEPS,
    MAX_IMAGES,
    MAX_SEED,
    MAX_STEPS,
    Extraction,
    Seed,
    TrainingWish,
    Wanted,
    Wish,
    checked,
)
from powersteer.apps.studio.work import AS_IT_IS, Result, Studio
from powersteer.core.config import build_config
from powersteer.core.errors import PowersteerError
from powersteer.denoising.generate import SCHEDULERS
from powersteer.denoising.metadata import read_metadata
from powersteer.evaluation.report import curves

OWN_SCHEDULER = "the base's own"
_STILL = [gr.skip()] * 9
"""What is shown of a result, left as it is: pictures, recipe, downloads, strip, spread, result."""
_FONTS = ("ui-sans-serif", "system-ui", "sans-serif")
_MONO = ("ui-monospace", "monospace")
_COMPUTE: dict[str, Any] = {"concurrency_id": "compute", "concurrency_limit": 1, "api_visibility": "private"}
_RAW: dict[str, Any] = {"preprocess": False}
"""Values as the browser sent them: `wishes` checks them, with better words than Gradio's."""
_LIGHT: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
_WIDE: dict[str, Any] = {"min_width": 280}


def theme() -> Any:
    """The theme of the page: no font is fetched."""
    return gr.themes.Soft(primary_hue="emerald", secondary_hue="emerald", font=_FONTS, font_mono=_MONO)


def style() -> str:
    """CSS of the page."""
    return _asset("page.css")


def build(studio: Studio, training: Training, *, local: bool) -> gr.Blocks:
    """The page.

    Args:
        studio: What makes pictures.
        training: What trains.
        local: Only this machine's own people can reach it, who may name its folders.
    """
    with gr.Blocks(title="powersteer studio", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        gr.HTML(
            f"<h1>powersteer studio</h1><p>Draw, say what it is, and watch <b>{html.escape(studio.base)}</b> follow "
            "your lines.</p>",
            elem_id="head",
        )
        with gr.Tabs() as tabs:
            with gr.Tab("Draw", id="draw"):
                adapters = _draw_tab(page, studio)
            with gr.Tab("Train", id="train"):
                _train_tab(page, studio, training, tabs, adapters, local=local)
    return page


def _draw_tab(page: gr.Blocks, studio: Studio) -> list[gr.Dropdown]:
    made = gr.State(None)
    with gr.Row(equal_height=False, elem_id="room"):
        with gr.Column(elem_id="sheet", **_WIDE):
            prompt = gr.Textbox("", label="Prompt", placeholder="a fox", elem_id="prompt", max_lines=2)
            canvas = _canvas(0)
            with gr.Row():
                go = gr.Button("Generate", variant="primary", elem_id="go", min_width=90)
                halt = gr.Button("Stop", elem_id="halt", min_width=80)
                again = gr.Button("New seed", elem_id="again", min_width=80)
            live = gr.Checkbox(True, label=f"Make a picture after every stroke ({LIVE_STEPS} steps)", elem_id="live")
        with gr.Column(elem_id="pictures", **_WIDE):
            status = gr.HTML(_status("Draw something: a picture of it comes here."), elem_id="status")
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
                label="Where your drawing leaves freedom",
                format="png",
                buttons=[],
                visible=False,
                elem_id="spread",
            )
            with gr.Accordion("Settings of this picture", open=False, elem_id="recipe"):
                command = gr.Code(
                    language="shell", label="Command", elem_id="command", interactive=False, wrap_lines=True
                )
                snippet = gr.Code(language="python", label="Python", elem_id="snippet", interactive=False)
                record = gr.Code(language="json", label="Settings", elem_id="record", interactive=False, max_lines=12)
            downloads = gr.File(
                label="Download the picture and its drawings", elem_id="downloads", visible=False, interactive=False
            )
            reload = gr.UploadButton("Reload a picture made here", file_types=[".png"], size="sm", elem_id="reload")
        with gr.Column(elem_id="choices", **_WIDE):
            slots = [_condition(studio, 0, canvas)]
            for i in range(1, CONDITIONS):
                with gr.Accordion(f"Condition {i + 1}", open=False, elem_id=f"more-{i}"):
                    slots.append(_condition(studio, i, _canvas(i)))
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

    one = [prior, steered, command, snippet, record, downloads]
    outputs = [status, *one, strip, spread, made]
    fields = [field for slot in slots for field in slot]
    inputs = [prompt, negative, seed, count, steps, guidance, scheduler, compare, *fields]

    @told(studio.work_dir)
    def generate(request: gr.Request, *values: Any) -> Iterator[Any]:
        yield from _shown(studio, _wish(values), request.session_hash or "")

    @told(studio.work_dir)
    def sketch(request: gr.Request, on: bool, *values: Any) -> Iterator[Any]:
        wish = checked(_wish(values, live=True))
        if not on or not any(one.drawing for one in wish.conditions):
            return
        if not wish.prompt.strip():
            yield [_status("Say what it shows, in the prompt: then a picture comes after every stroke."), *_STILL]
            return
        yield from _shown(studio, wish, request.session_hash or "")

    @told(studio.work_dir)
    def select(result: Result | None, event: gr.SelectData) -> Any:
        chosen = [i for i in range(len(result.made) if result else 0) if i == event.index]
        if result is None or not chosen:
            raise PowersteerError("there is no such picture: make some first")
        return _one(result, chosen[0])

    @told(studio.work_dir)
    def reloaded(file: str | None) -> list[Any]:
        if file is None:
            raise PowersteerError("there is no picture: choose a PNG that was made here")
        wish = studio.reload(Path(file))
        if not all(one.drawing for one in wish.conditions):
            gr.Warning("The picture does not carry its drawing: only its settings were reloaded.")
        told: list[Any] = [wish.prompt, wish.negative_prompt, wish.seed, wish.num_inference_steps, wish.guidance_scale]
        told.append(wish.scheduler or OWN_SCHEDULER)
        blank = Wanted("", None)
        for i in range(CONDITIONS):
            slot = wish.conditions[i] if i < len(wish.conditions) else blank
            drawing = slot.drawing or gr.skip()
            choices = studio.adapters()
            told += [
                gr.Dropdown(choices=choices, value=slot.adapter or None),
                drawing,
                slot.scale,
                slot.start,
                slot.end,
            ]
        return told

    go.click(generate, inputs, outputs, trigger_mode="once", show_progress="hidden", **_RAW, **_COMPUTE)
    later: dict[str, Any] = {"trigger_mode": "always_last", "show_progress": "hidden", **_RAW, **_COMPUTE}
    for slot in slots:
        slot[1].input(sketch, [live, *inputs], outputs, **later)
    for box in (prompt, seed):
        box.submit(sketch, [live, *inputs], outputs, **later)

    @told(studio.work_dir)
    def next_seed(seed: Any) -> int:
        return (build_config({"seed": seed or 0}, Seed, where="settings").seed + 1) % (MAX_SEED + 1)

    again.click(next_seed, seed, seed, **_RAW, **_LIGHT).success(sketch, [live, *inputs], outputs, **later)

    def stop(request: gr.Request) -> None:
        studio.stop(request.session_hash or "")

    halt.click(stop, None, None, **_LIGHT)
    strip.select(select, [made], one, **_LIGHT)
    settings = [prompt, negative, seed, steps, guidance, scheduler]
    reload.upload(reloaded, [reload], [*settings, *fields], show_progress="hidden", **_COMPUTE)
    page.unload(stop)
    return [slot[0] for slot in slots]


def _canvas(index: int) -> gr.HTML:
    return gr.HTML(
        None,
        html_template=_asset("canvas.html"),
        css_template=_asset("canvas.css"),
        js_on_load=_asset("canvas.js"),
        elem_id=f"canvas-{index}",
        name=f"Canvas {index + 1}",
    )


def _condition(studio: Studio, index: int, canvas: gr.HTML) -> list[Any]:
    """The inputs of one condition: adapter, canvas, scale, start, end."""
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

    picture.upload(extracted, [picture, extractor, adapter], [canvas], show_progress="minimal", **_RAW, **_COMPUTE)
    adapter.input(chosen, [adapter], [extractor], **_RAW, **_LIGHT)
    return [adapter, canvas, scale, start, end]


def _train_tab(
    page: gr.Blocks, studio: Studio, training: Training, tabs: gr.Tabs, adapters: list[gr.Dropdown], *, local: bool
) -> None:
    found = gr.State(None)
    with gr.Row(equal_height=False):
        with gr.Column(**_WIDE):
            gr.Markdown(
                "Pairs of a picture and its drawing: a zip with a `metadata.jsonl`, or with `images/` and "
                "`conditioning_images/` of the same names and a `.txt` caption each. Some forty will do."
            )
            archive = gr.File(label="Drop a zip of pairs", height=120, elem_id="archive", file_types=[".zip"])
            folder = gr.Textbox(
                label="or a folder of this machine", placeholder="my/pairs", visible=local, elem_id="folder"
            )
            caption = gr.Textbox(label="Caption of pairs that have none", placeholder="a fox", elem_id="caption")
            with gr.Row():
                name = gr.Textbox("mine", label="Name of the new adapter", elem_id="name", min_width=140)
                steps = gr.Slider(10, 3000, 600, step=10, label="Updates at most", elem_id="updates", min_width=140)
            with gr.Row():
                begin = gr.Button("Start training", variant="primary", elem_id="begin", min_width=160)
                halt = gr.Button("Stop", elem_id="stop-training", min_width=80)
                use = gr.Button("Draw with it", interactive=False, elem_id="use", min_width=110)
        with gr.Column(**_WIDE):
            status = gr.HTML(_status("Nothing is being trained."), elem_id="training-status")
            report = gr.Markdown(elem_id="report")
            plot = gr.HTML(elem_id="curves")
            shown = gr.Image(label="Condition, generated, target", visible=False, buttons=[], elem_id="validation")
            pairs = gr.Gallery(
                label="Pairs",
                columns=2,
                object_fit="contain",
                allow_preview=False,
                height="auto",
                visible=False,
                buttons=[],
                elem_id="pairs",
            )
    timer = gr.Timer(2.0, active=False)
    watched = [status, plot, shown, use, timer]

    def watch() -> list[Any]:
        state = training.state()
        running = state.status == "running"
        word = {"none": "Nothing is being trained", "failed": "It failed"}.get(state.status, state.status.capitalize())
        told = _status(f"{word}{': ' + state.message if state.message else '.'}", wait=running)
        picture = gr.skip()
        if state.pictures is not None:
            picture = gr.Image(value=Image.open(state.pictures), visible=True)
        drawn = curves(state.log) if state.log else ""
        usable = gr.Button(interactive=state.adapter is not None)
        return [told, drawn, picture, usable, gr.Timer(active=running)]

    def looker(first: str) -> Callable[..., Any]:
        @told(studio.work_dir)
        def look(request: gr.Request, file: str | None, folder: str | None, caption: str | None) -> Any:
            zipped, words = None if file is None else Path(file), (caption or "").strip() or None
            named = named_folder(folder, studio.work_dir) if local and folder and folder.strip() else None
            source = named or zipped if first == "folder" else zipped or named
            if source is None:
                raise PowersteerError("there are no pairs: drop a zip" + (", or name a folder" if local else ""))
            pairs = training.look(source, words, request.session_hash or "")
            return pairs, _report(pairs), gr.Gallery(value=list(pairs.shown), visible=True)

        return look

    @told(studio.work_dir)
    def start(pairs: PairsFound | None, name: Any, steps: Any, caption: Any) -> Any:
        if pairs is None:
            raise PowersteerError("there are no pairs: drop a zip first")
        given = {"name": name, "max_train_steps": steps, "default_prompt": caption or ""}
        asked = build_config(given, TrainingWish, where="training")
        words = asked.default_prompt.strip() or None
        training.start(pairs, asked.name.strip(), max_train_steps=asked.max_train_steps, default_prompt=words)
        return watch()

    @told(studio.work_dir)
    def stop() -> Any:
        training.stop()
        return watch()

    @told(studio.work_dir)
    def used() -> list[Any]:
        adapter = training.state().adapter
        if adapter is None:
            raise PowersteerError("there is no new adapter: train one first")
        adapter = str(adapter)
        studio.network(adapter)
        choices = studio.adapters()
        others = [gr.Dropdown(choices=choices) for _ in adapters[1:]]
        return [gr.Tabs(selected="draw"), gr.Dropdown(choices=choices, value=adapter), *others]

    queued: dict[str, Any] = {"concurrency_id": "check", "concurrency_limit": 1, "api_visibility": "private"}
    sources, seen = [archive, folder, caption], [found, report, pairs]
    archive.upload(looker("zip"), sources, seen, show_progress_on=[report], **queued)
    folder.submit(looker("folder"), sources, seen, show_progress_on=[report], **queued)
    begin.click(start, [found, name, steps, caption], watched, show_progress="hidden", **_RAW, **queued)
    halt.click(stop, None, watched, **_LIGHT)
    use.click(used, None, [tabs, *adapters], **_LIGHT)
    timer.tick(watch, None, watched, **_LIGHT)
    page.load(watch, None, watched, **_LIGHT)


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
                yield [_status("Denoising", said.share), _STILL[0], said.preview or _STILL[1], *_STILL[2:]]
                continue
            told = _status(_summary(said))
            several = len(said.made) > 1
            strip = gr.Gallery(value=[(str(m.picture), str(m.job.seed)) for m in said.made], visible=several)
            spread = gr.Image(value=None if said.spread is None else str(said.spread), visible=said.spread is not None)
            yield [told, *_one(said, 0), strip, spread, said]
    except Stopped:
        yield [_status("Stopped."), *_STILL]


def _one(result: Result, index: int) -> list[Any]:
    """One picture of a result, and how to make it again."""
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


def _report(pairs: PairsFound) -> str:
    report = pairs.report
    lines = [f"**{report.facts['pairs']} pairs.**"]
    condition = report.facts.get("condition")
    if condition:
        width, height = (report.facts[side]["median"] for side in ("width", "height"))
        lines[0] += f" Conditions: {condition['kind']}. Median size {width:.0f}×{height:.0f}."
    for word, found in (("Error", report.errors), ("Warning", report.warnings)):
        lines += [f"- {word}: {html.escape(line)}" for line in found[:5]]
        if len(found) > 5:
            lines.append(f"- … and {len(found) - 5} more")
    return "\n".join(lines)


def _status(words: str, share: float | None = None, *, wait: bool = False) -> str:
    bar = "<progress></progress>" if wait else ""
    if share is not None:
        bar = f'<progress max="1" value="{share:.3f}"></progress>'
    return f'<div class="status" role="status">{html.escape(words)}{bar}</div>'


def _asset(name: str) -> str:
    return (files("powersteer.apps.studio") / name).read_text(encoding="utf-8")
