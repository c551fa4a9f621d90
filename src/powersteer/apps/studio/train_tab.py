"""The tab to train in: what is where, and what calls what. What happens then is `training`'s."""

from __future__ import annotations

import html
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gradio as gr
from PIL import Image

from powersteer.apps.studio.messages import told
from powersteer.apps.studio.pairs import PairsFound, named_folder
from powersteer.apps.studio.training import Training
from powersteer.apps.studio.widgets import LIGHT, RAW, WIDE, status
from powersteer.apps.studio.wishes import CONDITIONS, TrainingWish
from powersteer.apps.studio.work import Studio
from powersteer.core.config import build_config
from powersteer.core.errors import PowersteerError
from powersteer.data.findings import SEVERITIES
from powersteer.evaluation.report import curves

SHOWN_FINDINGS = 5
"""How many of each severity."""
_CHECK: dict[str, Any] = {"concurrency_id": "check", "concurrency_limit": 1, "api_visibility": "private"}
"""Events that read pairs: one at a time."""


def train_tab(
    page: gr.Blocks, studio: Studio, training: Training, tabs: gr.Tabs, adapters: list[gr.Dropdown], *, local: bool
) -> None:
    """Fill the tab.

    Args:
        page: What it is on.
        studio: What makes pictures with a new adapter.
        training: What trains it.
        tabs: To turn to the other one.
        adapters: The menus of adapters there.
        local: See `powersteer.apps.studio.page.build`.
    """
    with gr.Row(equal_height=False):
        asked = _asked(local)
        seen = _seen()
    timer = gr.Timer(2.0, active=False)
    found = gr.State(None)
    answers, telling = _Answers(studio, training, local), told(studio.work_dir)

    sources, findings = [asked.archive, asked.folder, asked.caption], [found, seen.report, seen.pairs]
    asked.archive.upload(telling(answers.look_at_zip), sources, findings, show_progress_on=[seen.report], **_CHECK)
    asked.folder.submit(telling(answers.look_at_folder), sources, findings, show_progress_on=[seen.report], **_CHECK)
    watched = [seen.status, seen.plot, seen.validation, asked.use, timer]
    wish = [found, asked.name, asked.steps, asked.caption]
    asked.begin.click(telling(answers.start), wish, watched, show_progress="hidden", **RAW, **_CHECK)
    asked.halt.click(telling(answers.stop), None, watched, **LIGHT)
    asked.use.click(telling(answers.used), None, [tabs, *adapters], **LIGHT)
    timer.tick(answers.watch, None, watched, **LIGHT)
    page.load(answers.watch, None, watched, **LIGHT)


@dataclass(frozen=True)
class _Asked:
    """The left column: pairs, and what is to be learned from them."""

    archive: gr.File
    folder: gr.Textbox
    caption: gr.Textbox
    name: gr.Textbox
    steps: gr.Slider
    begin: gr.Button
    halt: gr.Button
    use: gr.Button


def _asked(local: bool) -> _Asked:
    with gr.Column(**WIDE):
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
    return _Asked(archive, folder, caption, name, steps, begin, halt, use)


@dataclass(frozen=True)
class _Seen:
    """The right column: what the pairs are like, and how the training goes."""

    status: gr.HTML
    report: gr.Markdown
    plot: gr.HTML
    validation: gr.Image
    pairs: gr.Gallery


def _seen() -> _Seen:
    with gr.Column(**WIDE):
        said = gr.HTML(status("Nothing is being trained."), elem_id="training-status")
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
    return _Seen(said, report, plot, shown, pairs)


@dataclass(frozen=True)
class _Answers:
    """What the events of the tab do."""

    studio: Studio
    training: Training
    local: bool
    """See `train_tab`."""

    def watch(self) -> list[Any]:
        """How the training goes."""
        state = self.training.state()
        running = state.status == "running"
        word = {"none": "Nothing is being trained", "failed": "It failed"}.get(state.status, state.status.capitalize())
        said = status(f"{word}{': ' + state.message if state.message else '.'}", wait=running)
        picture = gr.skip()
        if state.pictures is not None:
            picture = gr.Image(value=Image.open(state.pictures), visible=True)
        drawn = curves(state.log) if state.log else ""
        usable = gr.Button(interactive=state.adapter is not None)
        return [said, drawn, picture, usable, gr.Timer(active=running)]

    def look_at_zip(self, request: gr.Request, file: str | None, folder: str | None, caption: str | None) -> Any:
        """Look through a zip of pairs, or the folder where there is none."""
        return self._look(request, "zip", file, folder, caption)

    def look_at_folder(self, request: gr.Request, file: str | None, folder: str | None, caption: str | None) -> Any:
        """Look through a folder of pairs, or the zip where there is none."""
        return self._look(request, "folder", file, folder, caption)

    def _look(
        self,
        request: gr.Request,
        first: Literal["zip", "folder"],
        file: str | None,
        folder: str | None,
        caption: str | None,
    ) -> Any:
        zipped, words = None if file is None else Path(file), (caption or "").strip() or None
        named = named_folder(folder, self.studio.work_dir) if self.local and folder and folder.strip() else None
        source = named or zipped if first == "folder" else zipped or named
        if source is None:
            raise PowersteerError("there are no pairs: drop a zip" + (", or name a folder" if self.local else ""))
        pairs = self.training.look(source, words, request.session_hash or "")
        return pairs, _report(pairs), gr.Gallery(value=list(pairs.shown), visible=True)

    def start(self, pairs: PairsFound | None, name: Any, steps: Any, caption: Any) -> Any:
        """Begin to train."""
        if pairs is None:
            raise PowersteerError("there are no pairs: drop a zip first")
        given = {"name": name, "max_train_steps": steps, "default_prompt": caption or ""}
        asked = build_config(given, TrainingWish, where="training")
        words = asked.default_prompt.strip() or None
        self.training.start(pairs, asked.name.strip(), max_train_steps=asked.max_train_steps, default_prompt=words)
        return self.watch()

    def stop(self) -> Any:
        """End the training."""
        self.training.stop()
        return self.watch()

    def used(self) -> list[Any]:
        """Turn to the other tab, with the new adapter."""
        adapter = self.training.state().adapter
        if adapter is None:
            raise PowersteerError("there is no new adapter: train one first")
        adapter = str(adapter)
        self.studio.network(adapter)
        choices = self.studio.adapters()
        others = [gr.Dropdown(choices=choices) for _ in range(1, CONDITIONS)]
        return [gr.Tabs(selected="draw"), gr.Dropdown(choices=choices, value=adapter), *others]


def _report(pairs: PairsFound) -> str:
    """What was found in the pairs, the worst first."""
    facts, findings = pairs.report.facts, pairs.report.findings
    lines = [f"**{facts['pairs']} pairs.**"]
    condition = facts.get("condition")
    if condition:
        width, height = (facts[side]["median"] for side in ("width", "height"))
        lines[0] += f" Conditions: {condition['kind']}. Median size {width:.0f}×{height:.0f}."
    for severity in SEVERITIES:
        found = [one.line for one in findings if one.severity == severity]
        lines += [f"- {severity.capitalize()}: {html.escape(line)}" for line in found[:SHOWN_FINDINGS]]
        if len(found) > SHOWN_FINDINGS:
            lines.append(f"- … and {len(found) - SHOWN_FINDINGS} more")
    return "\n".join(lines)
