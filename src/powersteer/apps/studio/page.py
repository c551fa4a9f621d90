"""The page: two tabs, one to draw in and one to train in."""

from __future__ import annotations

import html
from typing import Any

import gradio as gr

from powersteer.apps.studio.draw_tab import draw_tab
from powersteer.apps.studio.train_tab import train_tab
from powersteer.apps.studio.training import Training
from powersteer.apps.studio.widgets import asset
from powersteer.apps.studio.work import Studio

_FONTS = ("ui-sans-serif", "system-ui", "sans-serif")
_MONO = ("ui-monospace", "monospace")


def theme() -> Any:
    """The theme of the page: no font is fetched."""
    return gr.themes.Soft(primary_hue="emerald", secondary_hue="emerald", font=_FONTS, font_mono=_MONO)


def style() -> str:
    """CSS of the page."""
    return asset("page.css")


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
                adapters = draw_tab(page, studio)
            with gr.Tab("Train", id="train"):
                train_tab(page, studio, training, tabs, adapters, local=local)
    return page
