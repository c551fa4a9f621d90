"""ComfyUI's nodes without ComfyUI: on a U-Net of its module layout, through its patcher's own protocol.

The U-Net has LDM's names and loads the reference's LDM-named weights, so the steered prediction must be the one that
the authors' implementation computed, as `powersteer.steer`'s is on the converted weights (`test_reference`).
"""

import copy
import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn

from powersteer import BPSModel, PowersteerError

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "integrations" / "comfyui"
REFERENCE = Path(__file__).parents[1] / "fixtures" / "sketch_sd.safetensors"


def load_package():
    spec = importlib.util.spec_from_file_location(
        "comfyui_powersteer", PACKAGE / "__init__.py", submodule_search_locations=[str(PACKAGE)]
    )
    package = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = package
    spec.loader.exec_module(package)
    return package


nodes = load_package().NODE_CLASS_MAPPINGS
steering = sys.modules["comfyui_powersteer.steering"]


class ResBlock(nn.Module):
    def __init__(self, inner, outer, embedding):
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(32, inner), nn.SiLU(), nn.Conv2d(inner, outer, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, outer))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, outer), nn.SiLU(), nn.Dropout(0), nn.Conv2d(outer, outer, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if inner == outer else nn.Conv2d(inner, outer, 1)

    def forward(self, x, emb, context):
        return self.skip_connection(x) + self.out_layers(self.in_layers(x) + self.emb_layers(emb)[..., None, None])


class Attention(nn.Module):
    def __init__(self, width, context, heads):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k, self.to_v = (nn.Linear(context, width, bias=False) for _ in range(2))
        self.to_out = nn.Sequential(nn.Linear(width, width), nn.Dropout(0))

    def forward(self, x, context):
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for t in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Gate(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.proj = nn.Linear(width, 8 * width)

    def forward(self, x):
        value, gate = self.proj(x).chunk(2, -1)
        return value * F.gelu(gate)


class Block(nn.Module):
    def __init__(self, width, context, heads):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.attn1, self.attn2 = Attention(width, width, heads), Attention(width, context, heads)
        self.ff = nn.Module()
        self.ff.net = nn.Sequential(Gate(width), nn.Dropout(0), nn.Linear(4 * width, width))

    def forward(self, x, context):
        n = self.norm1(x)
        x = x + self.attn1(n, n)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff.net(self.norm3(x))


class SpatialTransformer(nn.Module):
    def __init__(self, width, context, heads):
        super().__init__()
        self.norm = nn.GroupNorm(32, width, eps=1e-6)
        self.proj_in, self.proj_out = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList([Block(width, context, heads)])

    def forward(self, x, emb, context):
        h = self.proj_in(self.norm(x))
        tokens = self.transformer_blocks[0](h.flatten(2).mT, context)
        return x + self.proj_out(tokens.mT.reshape(h.shape))


class Downsample(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.op = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x, emb, context):
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x, emb, context):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Stem(nn.Conv2d):
    def forward(self, x, emb, context):
        return super().forward(x)


class UNetModel(nn.Module):
    def __init__(self, shape):
        super().__init__()
        width, depth, heads, text = (shape[k] for k in ("model_channels", "num_res_blocks", "num_heads", "context_dim"))
        self.model_channels, self.channel_mult = width, shape["channel_mult"]
        self.num_res_blocks = [depth] * len(self.channel_mult)
        emb, attended, levels = 4 * width, shape["attention_resolutions"], len(self.channel_mult)
        self.time_embed = nn.Sequential(nn.Linear(width, emb), nn.SiLU(), nn.Linear(emb, emb))

        def layers(inner, outer, level):
            made = [ResBlock(inner, outer, emb)]
            return [*made, SpatialTransformer(outer, text, heads)] if 2**level in attended else made

        blocks, now, skips = [nn.ModuleList([Stem(shape["in_channels"], width, 3, padding=1)])], width, [width]
        for level, multiple in enumerate(self.channel_mult):
            for _ in range(depth):
                blocks.append(nn.ModuleList(layers(now, multiple * width, level)))
                now = multiple * width
                skips.append(now)
            if level + 1 < levels:
                blocks.append(nn.ModuleList([Downsample(now)]))
                skips.append(now)
        self.input_blocks = nn.ModuleList(blocks)
        self.middle_block = nn.ModuleList(
            [ResBlock(now, now, emb), SpatialTransformer(now, text, heads), ResBlock(now, now, emb)]
        )
        blocks = []
        for level, multiple in reversed(list(enumerate(self.channel_mult))):
            for i in range(depth + 1):
                made = layers(now + skips.pop(), multiple * width, level)
                now = multiple * width
                blocks.append(nn.ModuleList([*made, Upsample(now)] if level and i == depth else made))
        self.output_blocks = nn.ModuleList(blocks)
        self.out = nn.Sequential(nn.GroupNorm(32, now), nn.SiLU(), nn.Conv2d(now, shape["out_channels"], 3, padding=1))

    def forward(self, x, timesteps, context):
        half = self.model_channels // 2
        angles = timesteps[:, None].float() * torch.exp(-math.log(10000) * torch.arange(half) / half)
        emb = self.time_embed(torch.cat([angles.cos(), angles.sin()], 1))

        def run(block, h):
            for layer in block:
                h = layer(h, emb, context)
            return h

        skips = []
        for block in self.input_blocks:
            x = run(block, x)
            skips.append(x)
        x = run(self.middle_block, x)
        for block in self.output_blocks:
            x = run(block, torch.cat([x, skips.pop()], 1))
        return self.out(x)


class Sampling:
    """Sampling of noise-predicting models in ComfyUI: sigmas of a thousand timesteps, the nearest by its logarithm."""

    def __init__(self):
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        alphas = (1 - betas).cumprod(0)
        self.sigmas = ((1 - alphas) / alphas).sqrt().float()

    def timestep(self, sigma):
        return (sigma.log()[:, None] - self.sigmas.log()).abs().argmin(1)


class Model:
    def __init__(self, unet):
        self.diffusion_model, self.model_sampling = unet, Sampling()

    def apply_model(self, x, t, c_crossattn=None, transformer_options=None):
        sigma = t[:, None, None, None]
        eps = self.diffusion_model(x / (sigma**2 + 1).sqrt(), self.model_sampling.timestep(t), c_crossattn)
        return x - sigma * eps


class Patcher:
    """What of ComfyUI's ``ModelPatcher`` the nodes use."""

    def __init__(self, model):
        self.model, self.model_options = model, {"transformer_options": {}}

    def clone(self):
        made = Patcher(self.model)
        made.model_options = copy.copy(self.model_options)
        return made

    def set_model_unet_function_wrapper(self, wrapper):
        self.model_options["model_function_wrapper"] = wrapper


@pytest.fixture(scope="module")
def reference():
    with safe_open(REFERENCE, "pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
    tensors = {n: t.float() if t.is_floating_point() else t for n, t in tensors.items()}
    weights = {n.removeprefix("weights."): t for n, t in tensors.items() if n.startswith("weights.")}
    unet = UNetModel(config["unet"])
    unet.load_state_dict({n: t for n, t in weights.items() if "control_model" not in n})
    adapter = BPSModel.from_original(weights, conditioning_channels=1)
    adapter.register_to_config(conditioning={"kind": "other"})  # random noise, which has no polarity
    return tensors, Patcher(Model(unet.eval())), adapter


@torch.no_grad()
def predicted(patcher, sample, timesteps, text, chunks):
    """ε, as ComfyUI's sampler asks for it: by sigmas, the wrapper around ``apply_model`` if there is one."""
    sigma = patcher.model.model_sampling.sigmas[timesteps]
    x = sample * (sigma**2 + 1).sqrt()[:, None, None, None]
    given = {"input": x, "timestep": sigma, "c": {"c_crossattn": text}, "cond_or_uncond": chunks}
    wrapper = patcher.model_options.get("model_function_wrapper")
    apply = patcher.model.apply_model
    denoised = apply(x, sigma, **given["c"]) if wrapper is None else wrapper(apply, given)
    return (x - denoised) / sigma[:, None, None, None]


def image_of(condition):
    """(N, 1, H, W) → ComfyUI's (N, H, W, 3)."""
    return condition.movedim(1, -1).expand(-1, -1, -1, 3)


def apply(patcher, adapter, image, strength=1.0, start=0.0, end=1.0, negative=True):
    return nodes["PowersteerApplySteering"]().apply(patcher, adapter, image, strength, start, end, negative)[0]


def error(got, wanted):
    return ((got - wanted).norm() / wanted.norm()).item()


def inputs(tensors, timestep=None):
    steps = tensors["in.timestep"].long() if timestep is None else torch.full((2,), timestep)
    return tensors["in.sample"], steps, tensors["in.encoder_hidden_states"]


def hooked(unet):
    return [m for m in unet.modules() if m._forward_hooks]


def test_steered_prediction_equals_the_reference(reference):
    tensors, patcher, adapter = reference
    made = apply(patcher, adapter, image_of(tensors["in.condition"]))
    got = predicted(made, *inputs(tensors), [0])  # two pictures at their own sigmas, 17 and 803
    assert error(got, tensors["out.eps"]) < 1e-3  # ε of a denoised picture at the smallest sigmas loses digits
    assert error(predicted(patcher, *inputs(tensors), [0]), tensors["out.eps"]) > 0.1
    assert not hooked(patcher.model.diffusion_model) and "model_function_wrapper" not in patcher.model_options


@pytest.mark.parametrize("chunks", [[0, 1], [1, 0]])
def test_chunks_of_both_prompts_share_a_condition_and_the_negative_one_may_be_spared(reference, chunks):
    tensors, patcher, adapter = reference
    sample, steps, text = inputs(tensors, 500)
    condition = image_of(tensors["in.condition"])
    row = chunks.index(0)

    def alone(steered, i):
        one = apply(patcher, adapter, condition[:1]) if steered else patcher
        return predicted(one, sample[i : i + 1], steps[:1], text[i : i + 1], [0])

    both = predicted(apply(patcher, adapter, condition[:1]), sample, steps, text, chunks)
    for i in range(2):
        assert error(both[i : i + 1], alone(True, i)) < 1e-4
    spared = predicted(apply(patcher, adapter, condition[:1], negative=False), sample, steps, text, chunks)
    assert error(spared[row : row + 1], alone(True, row)) < 1e-4
    assert error(spared[1 - row : 2 - row], alone(False, 1 - row)) < 1e-4


def test_each_picture_of_a_batch_follows_its_own_condition_in_every_chunk(reference):
    tensors, patcher, adapter = reference
    sample, steps, text = (torch.cat([part, part]) for part in inputs(tensors, 500))
    condition = image_of(tensors["in.condition"])
    together = predicted(apply(patcher, adapter, condition), sample, steps, text, [1, 0])
    for i in range(4):
        one = apply(patcher, adapter, condition[i % 2 : i % 2 + 1])
        rows = slice(i, i + 1)
        assert error(together[rows], predicted(one, sample[rows], steps[rows], text[rows], [0])) < 1e-4
    with pytest.raises(PowersteerError, match="2 condition images for 4 pictures"):
        predicted(apply(patcher, adapter, condition), sample, steps, text, [0])


def test_strength_span_and_several_conditions(reference):
    tensors, patcher, adapter = reference
    condition = image_of(tensors["in.condition"])[:1]
    late, early = inputs(tensors, 100), inputs(tensors, 900)
    prior = {case[1][0].item(): predicted(patcher, *case, [0]) for case in (late, early)}
    half = apply(patcher, adapter, condition, start=0.5)
    assert (
        torch.equal(predicted(half, *early, [0]), prior[900]) and error(predicted(half, *late, [0]), prior[100]) > 0.05
    )
    half = apply(patcher, adapter, condition, end=0.5)
    assert (
        torch.equal(predicted(half, *late, [0]), prior[100]) and error(predicted(half, *early, [0]), prior[900]) > 0.05
    )
    assert torch.equal(predicted(apply(patcher, adapter, condition, 0.0), *late, [0]), prior[100])
    twice = apply(apply(patcher, adapter, condition, 0.25), adapter, condition, 0.5)  # their steering adds
    whole = apply(patcher, adapter, condition, 0.75)
    assert error(predicted(twice, *late, [0]), predicted(whole, *late, [0])) < 1e-4


def test_conditions_are_scaled_and_dark_sketches_on_light_inverted(reference):
    adapter = reference[2]
    image = torch.zeros(1, 128, 96, 3)
    image[:, 40:80, 30:60] = 1
    assert steering.condition_of(adapter, image, (8, 8)).shape == (1, 1, 64, 64)
    sketch = copy.deepcopy(adapter)
    sketch.register_to_config(conditioning={"kind": "sketch"})
    light = steering.condition_of(sketch, image, (8, 8))
    torch.testing.assert_close(steering.condition_of(sketch, 1 - image, (8, 8)), light, atol=1e-6, rtol=0)


def test_another_model_is_refused(reference):
    _, patcher, adapter = reference
    other = BPSModel(block_out_channels=(32, 64), layers_per_block=(1, 1), down_weights=(1, 1), time_embed_dim=128)
    image = torch.zeros(1, 64, 64, 3)
    with pytest.raises(PowersteerError, match=r"made for .*widths 32-64,.* this is .*widths 32-64-64-64"):
        apply(patcher, other, image)
    with pytest.raises(PowersteerError, match="Linear has no denoiser to steer"):
        apply(Patcher(Model(nn.Linear(1, 1))), adapter, image)


def test_load_and_extract():
    (adapter,) = nodes["PowersteerLoadAdapter"]().load("sketch")
    assert adapter.config["base"]["family"] == "powersteer-tiny"
    picture = torch.zeros(1, 64, 64, 3)
    picture[:, 16:48, 16:48] = 1
    (edges,) = nodes["PowersteerExtractCondition"]().extract(picture, "sketch: canny")
    assert edges.shape == (1, 64, 64, 3) and 0 < edges.mean() < 0.2 and edges[0, 28:36, 28:36].max() == 0
    assert edges[0, 15:18, 20:40].amax(0).min() == 1  # the square's upper side


def test_the_workflow_wires_the_nodes_that_there_are():
    workflow = json.loads((PACKAGE / "workflow.json").read_text())  # ComfyUI's API format
    for node in workflow.values():
        for value in node["inputs"].values():
            if isinstance(value, list):
                assert value[0] in workflow
        if node["class_type"] in nodes:
            wanted = nodes[node["class_type"]].INPUT_TYPES()["required"]
            assert set(node["inputs"]) == set(wanted)
    assert set(nodes) <= {node["class_type"] for node in workflow.values()}
