"""The documentation says what is so: messages, pictures and figures are those of the code and of committed results."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import yaml

import powersteer

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def tool():
    sys.path.insert(0, str(DOCS / "tools"))
    yield importlib.import_module
    sys.path.remove(str(DOCS / "tools"))


def test_every_error_message_has_its_place_in_troubleshooting(tool):
    tools = tool("messages")
    found = tools.messages()
    assert len(found) > 200
    listed, left = tools.by_marker((DOCS / "troubleshooting.md").read_text(encoding="utf-8"), found)
    assert not left, "docs/troubleshooting.md: name the module in a marker of the section that helps"
    assert all(listed.values()), [marker for marker, of_marker in listed.items() if not of_marker]
    assert sum(map(len, listed.values())) == len(found)


def test_messages_are_read_as_people_see_them(tool, tmp_path):
    (tmp_path / "room").mkdir()
    (tmp_path / "room" / "a.py").write_text(
        'HELP = "take another"\n'
        "def f(x):\n"
        '    raise PowersteerError(f"{x} is odd: {HELP}")\n'
        '    raise PowersteerError(f"{x.a}, {x.b!r}: " "no")\n'
        "    raise PowersteerError(advice(x))\n"
        "    raise PowersteerError(str(x))  # made elsewhere\n"
        '    raise KeyError("not for people")\n'
        "def advice(x):\n"
        '    return f"give {x:.1f}"\n',
        encoding="utf-8",
    )
    tools = tool("messages")
    found = tools.messages(tmp_path)
    assert [message.text for message in found] == ["give …", "… is odd: take another", "…: no"]
    page = "<!-- messages in: room/ -->\n<!-- messages in: room/a.py -->\n<!-- messages with: is odd -->"
    listed, left = tools.by_marker(page, [*found, tools.Message("b.py", "lost")])
    assert [len(of_marker) for of_marker in listed.values()] == [0, 2, 1] and left == [tools.Message("b.py", "lost")]


@pytest.mark.parametrize(
    ("file", "preset", "parameters", "widths"),
    [
        ("network.svg", "paper", "672.1 M", [320, 640, 1280, 1280, 1280, 1280, 1280, 640, 320]),
        ("network-lite.svg", "lite", "51.0 M", [120, 240, 480, 480, 480, 160, 160, 80, 40]),
    ],
)
def test_the_picture_of_the_network_is_that_of_the_models(tool, file, preset, parameters, widths):
    drawn = tool("network").draw(preset)
    assert drawn == (DOCS / file).read_text(encoding="utf-8"), "run python docs/tools/network.py"
    words = re.findall(r"<text[^>]*>([^<]+)", drawn)
    assert [word for word in words if word.startswith("×")] == ["×16", "×8", "×4", "×2", "×16", *["×1"] * 4]
    numbers = [int(word) for word in words if word.isdecimal()]
    assert numbers[1::2] == widths and numbers[::2] == [320, 640, 1280, 1280, 1280, 1280, 1280, 640, 320]
    layers = re.findall(r">(\d) ([RT])<", drawn)
    assert sum(int(count) for count, kind in layers if kind == "R") == 8 + 2 + 12
    assert sum(int(count) for count, kind in layers if kind == "T") == 6 + 1 + 9
    assert f"{preset}, {parameters}" in drawn and "859.5 M" in drawn


def test_figures_are_those_of_committed_results():
    pages = {file.stem: " ".join(file.read_text(encoding="utf-8").split()) for file in DOCS.glob("*.md")}
    metrics = json.loads(
        (ROOT / "src/powersteer/core/assets/powersteer-tiny-sketch/metrics.json").read_text(encoding="utf-8")
    )
    lines = metrics["line_f1"]
    assert (
        f"On {metrics['held_out_pairs']} held-out drawings the denoising loss lies {metrics['loss_reduction']:.0%}"
    ).replace("%", " %") in pages["index"]
    assert (
        f"{metrics['held_out_pictures']} generated pictures agree with the drawings' to an F1 of "
        f"{lines['steered']:.3f} "
        f"(the prior's: {lines['prior']:.3f}; with drawings shuffled: {lines['shuffled']:.3f}; the artist's own: "
        f"{lines['artist']:.3f})"
    ) in pages["index"]
    steps = json.loads((DOCS / "results" / "train-sd15-cpu.json").read_text(encoding="utf-8"))
    for row in steps["rows"]:
        name = {"BPS paper": "BPS `paper`", "BPS lite": "BPS `lite`"}.get(row["name"], row["name"])
        ratio = "1" if row["ratio"] == 1 else f"{row['ratio']:.2f}"
        cells = f"| {name} | {row['peak_memory'] / 1e9:.1f} GB | {row['parameters'] / 1e6:.0f} M | {ratio} |"
        assert cells in pages["faq"]
    steering = json.loads((DOCS / "results" / "steering-sd15-cpu.json").read_text(encoding="utf-8"))
    ratios = {row["name"]: row["ratio"] for row in steering["rows"]}
    shared, warm, controlnet = (ratios[name] for name in ("BPS paper, shared", "BPS paper, warm plan", "ControlNet"))
    assert f"a step costs {shared:.2f} bare U-Net steps for the first picture and {warm:.2f} for" in pages["method"]
    assert f"where ControlNet's costs {controlnet:.2f}" in pages["method"]


def test_the_citation_is_the_papers():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == powersteer.__version__
    title = citation["preferred-citation"]["title"]
    assert title in (DOCS / "method.md").read_text(encoding="utf-8")
    assert title in " ".join(sys.modules[powersteer.BPSModel.__module__].__doc__.split())


def test_commands_that_pages_show_exist():
    from typer.main import get_command

    from powersteer.apps.cli import app

    known = get_command(app)
    for page in [*DOCS.glob("*.md"), ROOT / "README.md"]:
        for block in re.findall(r"```console\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
            for line in block.replace("\\\n", " ").splitlines():
                words = line.split("#")[0].split("|")[0].removeprefix(".venv/bin/").split()
                if words[:1] != ["powersteer"] or words[1].startswith("-"):
                    continue
                command = known.commands[words[1]]
                if hasattr(command, "commands"):
                    command = command.commands[words[2]]
                options = {name for param in command.params for name in param.opts} | {"--help"}
                used = {word.split("=")[0] for word in words if word.startswith("--")}
                assert used <= options, f"{page.name}: {line}"
