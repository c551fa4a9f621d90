"""A run's figures and pictures as one self-contained HTML page."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path
from typing import Any

import torch

from powersteer.core.pictures import to_pil

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; } th, td { padding: .3rem .9rem; text-align: right; }
th:first-child, td:first-child { text-align: left; } tr { border-bottom: 1px solid #ddd; }
td img { width: 96px; image-rendering: auto; border: 1px solid #ddd; display: block; }
.pictures td, .pictures th { text-align: center; } .note { color: #555; }
@media (prefers-color-scheme: dark) { body { background: #181818; color: #ddd; } tr { border-color: #444; } }
"""


def write_report(path: Path, metrics: dict[str, Any], rows: list[dict[str, Any]], log: list[dict[str, float]]) -> None:
    """Write the page.

    Args:
        path: The HTML file.
        metrics: What `powersteer.apps.demo` measured.
        rows: Each a caption ``text`` and ``pictures``, a heading → picture (3, H, W) in [-1, 1].
        log: The training log: rows with ``step``, ``prior``, ``steered`` and ``shuffled``.
    """
    loss, lines = metrics["denoising_loss"], metrics["line_f1"]
    headings = "".join(f"<th>{html.escape(name)}</th>" for name in rows[0]["pictures"])
    body = "".join(
        f"<tr><td>{html.escape(row['text'])}</td>"
        + "".join(f"<td>{_image(picture)}</td>" for picture in row["pictures"].values())
        + "</tr>"
        for row in rows
    )
    path.write_text(
        f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>powersteer demo</title><style>{_STYLE}</style>
<h1>powersteer demo</h1>
<p>A steering network of {metrics["parameters"] / 1e6:.1f} M parameters, trained on {metrics["pairs"]} OpenMoji
drawings for {metrics["train_seconds"] / 60:.1f} minutes ({metrics["steps"]} updates), on a frozen
powersteer-tiny. All below is measured on drawings of concepts it has never seen.</p>
<h2>Figures</h2>
<table><tr><th></th><th>prior</th><th>steered</th><th>shuffled drawings</th><th>artist's picture</th></tr>
<tr><td>denoising loss, {metrics["held_out_pairs"]} pairs (lower is better)</td><td>{loss["prior"]:.4f}</td>
<td><b>{loss["steered"]:.4f}</b></td><td>{loss["shuffled"]:.4f}</td><td></td></tr>
<tr><td>line fidelity F1, {metrics["held_out_pictures"]} pictures (higher is better)</td><td>{lines["prior"]:.3f}</td>
<td><b>{lines["steered"]:.3f}</b></td><td>{lines["shuffled"]:.3f}</td><td>{lines["artist"]:.3f}</td></tr></table>
<p>The held-out loss is {metrics["loss_reduction"]:.0%} below the prior's; line fidelity goes
{lines["share_of_way"]:.0%} of the way from the prior to the artist's own picture. <span class="note">Shuffled:
each picture is steered by another's drawing, which must not help.</span></p>
<h2>Held-out loss while training</h2>
{curves(log)}
<h2>Pictures</h2>
<table class="pictures"><tr><th></th>{headings}</tr>{body}</table>
<p class="note">Drawings and the artist's pictures: OpenMoji, CC BY-SA 4.0, openmoji.org.</p>
</html>
""",
        encoding="utf-8",
    )


def _image(picture: torch.Tensor) -> str:
    buffer = io.BytesIO()
    to_pil(picture).save(buffer, "PNG")
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def curves(log: list[dict[str, Any]], width: int = 720, height: int = 260) -> str:
    """The log's prior, steered and shuffled losses as an SVG line plot."""
    colours = {"prior": "#888", "steered": "#0a7d4f", "shuffled": "#c2410c"}
    last = max((row["step"] for row in log), default=0) or 1
    top = 1.05 * max((row[name] for row in log for name in colours if name in row), default=1.0)
    lines: list[str] = []
    for position, (name, colour) in enumerate(colours.items()):
        points = [(row["step"] / last, row[name] / top) for row in log if name in row]
        places = " ".join(f"{50 + (width - 60) * x:.1f},{height - 25 - (height - 35) * y:.1f}" for x, y in points)
        lines.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{places}"/>')
        lines.append(f'<text x="{60 + 90 * position}" y="{height - 30}" fill="{colour}">{name}</text>')
    lines += [
        f'<text x="44" y="{height - 21 - (height - 35) * share:.0f}" text-anchor="end">{top * share:.2f}</text>'
        for share in (0, 0.5, 1)
    ]
    lines.append(f'<text x="{width - 10}" y="{height - 6}" text-anchor="end">step {last:.0f}</text>')
    axes = f'<path d="M50 10V{height - 25}H{width - 10}" fill="none" stroke="#999"/>'
    return (
        f'<svg viewBox="0 0 {width} {height}" width="100%" font-size="12" fill="currentColor" role="img" '
        f'aria-label="held-out loss by step">{axes}{"".join(lines)}</svg>'
    )
