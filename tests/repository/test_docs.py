"""Every fenced ``python`` block of README.md and docs/ is run as it stands, page by page, top to bottom.

Only loading is replaced: a name that is not here gives a tiny random pipeline or adapter of the same make, which takes
four steps at most. A block under an HTML comment ``<!-- notest: why -->`` is only compiled.
"""

import ast
import importlib
import json
import re
from pathlib import Path

import peft
import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    DiffusionPipeline,
)
from diffusers.loaders import IPAdapterMixin, StableDiffusionLoraLoaderMixin, StableDiffusionXLLoraLoaderMixin
from PIL import Image, ImageDraw
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from conftest import randomise
from powersteer import BPSModel
from powersteer.adapters import load as adapters
from tiny_bases import tiny_pipe, tiny_unet

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    page
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    if "```python" in page.read_text(encoding="utf-8")
)
FENCE = re.compile(
    r"(?P<mark><!-- notest: [^>]+ -->\n+)?^```python[^\n]*\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)
OPENED = re.compile(r"(?:open|load_image)\(\s*\"([^\"]+\.(?:png|jpg))\"")
NAMED = re.compile(r"\b(?:tests|src/powersteer|configs|notebooks)/[\w/.-]*\w")
STEPS = 4
PROJECTED = 16
"""Width of the tiny picture encoder."""


def tiny_adapter(name: str) -> BPSModel:
    lower = name.lower()
    coloured = "seg" in lower or "layout" in lower
    more = {"attention_head_dim": 8} if "xl" in lower else {}
    return randomise(
        BPSModel.from_unet(tiny_unet(xl="xl" in lower), conditioning_channels=3 if coloured else 1, **more)
    )


def load_ip_adapter(self, *_, **__):
    torch.manual_seed(0)
    layers = {"proj": torch.nn.Linear(PROJECTED, 4 * 24), "norm": torch.nn.LayerNorm(24)}
    state = {"image_proj": {}, "ip_adapter": {}}
    for name, layer in layers.items():
        state["image_proj"] |= {f"{name}.{key}": tensor for key, tensor in layer.state_dict().items()}
    for place, name in enumerate(name for name in self.unet.attn_processors if "attn2" in name):
        width = self.unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
        for kind in ("to_k_ip", "to_v_ip"):
            state["ip_adapter"][f"{2 * place + 1}.{kind}.weight"] = torch.randn(width, 24) * 0.2
    self.unet._load_ip_adapter_weights([state])
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
        projection_dim=PROJECTED,
    )
    size = {"height": 32, "width": 32}
    self.register_modules(
        image_encoder=CLIPVisionModelWithProjection(vision).eval(),
        feature_extractor=CLIPImageProcessor(size=size, crop_size=size),
    )


def load_lora_weights(self, *_, **__):
    torch.manual_seed(0)
    self.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))


@pytest.fixture
def reader(monkeypatch, tmp_path):
    """A person who follows a page in an empty folder; counts the evaluations of steering networks."""
    monkeypatch.chdir(tmp_path)

    def replace(kind, make):
        real = kind.from_pretrained.__func__

        def from_pretrained(cls, name, **kwargs):
            return real(cls, name, **kwargs) if Path(name).exists() else make(cls, str(name))

        monkeypatch.setattr(kind, "from_pretrained", classmethod(from_pretrained))

    def pipeline(cls, name):
        pipe = tiny_pipe(name)
        made = pipe if cls is DiffusionPipeline or isinstance(pipe, cls) else cls.from_pipe(pipe)
        made.set_progress_bar_config(disable=True)
        run = type(made).__call__

        def few_steps(self, *args, num_inference_steps=50, **kwargs):
            return run(self, *args, num_inference_steps=min(num_inference_steps, STEPS), **kwargs)

        monkeypatch.setattr(type(made), "__call__", few_steps)
        return made

    def fetched(name, *_):
        folder = tmp_path / "hub" / name
        if not folder.exists():
            tiny_adapter(name).save_pretrained(folder)
        return folder

    monkeypatch.setattr(adapters, "fetch", fetched)
    replace(BPSModel, lambda _, name: tiny_adapter(name))
    for kind in (DiffusionPipeline, AutoPipelineForText2Image, AutoPipelineForImage2Image, AutoPipelineForInpainting):
        replace(kind, pipeline)
    monkeypatch.setattr(IPAdapterMixin, "load_ip_adapter", load_ip_adapter)
    for loader in (StableDiffusionLoraLoaderMixin, StableDiffusionXLLoraLoaderMixin):
        monkeypatch.setattr(loader, "load_lora_weights", load_lora_weights)

    evaluations, forward = [], BPSModel.forward
    monkeypatch.setattr(BPSModel, "forward", lambda *args: (evaluations.append(1), forward(*args))[1])
    return evaluations


def draw(file: Path) -> None:
    picture = Image.new("RGB", (96, 80), "black")
    ImageDraw.Draw(picture).ellipse((20, 10, 70, 60), outline="white", width=3)
    file.parent.mkdir(parents=True, exist_ok=True)
    picture.save(file)


def blocks(text: str):
    for found in FENCE.finditer(text):
        yield text.count("\n", 0, found.start("code")), found["code"], bool(found["mark"])


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=[page.relative_to(ROOT).as_posix() for page in PAGES])
def test_every_snippet_runs(page, reader):
    names: dict = {"__name__": "__main__"}
    for line, code, only_compiled in blocks(page.read_text(encoding="utf-8")):
        program = compile("\n" * line + code, str(page), "exec")
        if only_compiled:
            continue
        for file in OPENED.findall(code):
            if not Path(file).exists():
                draw(Path(file))
        before = len(reader)
        exec(program, names)
        if "with steer(" in code:
            assert len(reader) > before, f"{page.name}, line {line + 1}: the block steered nothing"


def programs():
    """Every program for readers that is not imported by a test: blocks of pages, and cells of notebooks."""
    for page in PAGES:
        yield from ((page.name, code) for _, code, _ in blocks(page.read_text(encoding="utf-8")))
    for file in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
        yield from ((file.name, "".join(cell["source"])) for cell in cells if cell["cell_type"] == "code")


def test_every_imported_name_is_there():
    found = set()
    for file, code in programs():
        imports = (node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom))
        for node in (node for node in imports if str(node.module).split(".")[0] == "powersteer"):
            module = importlib.import_module(str(node.module))
            missing = [name.name for name in node.names if not hasattr(module, name.name)]
            assert not missing, f"{file}: {node.module} has no {', '.join(missing)}"
            found.add(file)
    assert {"README.md", "pipelines.md", "few-shot.ipynb", "steer.ipynb"} <= found


def test_every_file_that_is_named_is_there():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    named = {(page.name, file) for page in pages for file in NAMED.findall(page.read_text(encoding="utf-8"))}
    assert len(named) > 10 and not [one for one in named if not (ROOT / one[1]).exists() and "NAME" not in one[1]]


def test_blocks_are_found_with_their_lines_and_marks():
    text = "a\n\n```python\nx = 1\n```\n\n<!-- notest: needs a GPU -->\n```python\ny\n```\n\n```console\nz\n```\n"
    assert list(blocks(text)) == [(3, "x = 1\n", False), (8, "y\n", True)]


def test_stand_ins_have_the_real_sizes():
    pipe, xl = tiny_pipe("stable-diffusion-v1-5/stable-diffusion-v1-5"), tiny_pipe("stabilityai/sdxl")
    assert [p.unet.config.sample_size * p.vae_scale_factor for p in (pipe, xl)] == [512, 1024]
    assert tiny_pipe("x/stable-diffusion-inpainting").unet.config.in_channels == 9
    assert tiny_adapter("you/segmentation").config["conditioning_channels"] == 3
