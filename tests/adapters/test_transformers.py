"""Diffusion transformers of every family of the table, in their stock pipelines: steering is exact, or refused."""

from __future__ import annotations

import copy
import functools
from typing import Any

import accelerate
import diffusers
import peft
import pytest
import torch
from diffusers import FirstBlockCacheConfig
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import _pop_mode_temporarily

from conftest import randomise
from powersteer import BPSModel, PowersteerError, SteeringPlan, steer
from powersteer.adapters.attach import attach, check_fits
from powersteer.adapters.bps.transformer import BPSTransformerModel
from powersteer.adapters.engine import Engine
from powersteer.backbones.protocol import find_backbone
from powersteer.backbones.transformer import FAMILIES
from tiny_bases import tiny_unet
from tiny_transformers import TINY, Tiny
from waits import Waits

pytestmark = pytest.mark.usefixtures("one_thread")
HEIGHT, WIDTH = 4, 6
"""Of the pictures, in tokens."""
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}


class Subject:
    """A tiny pipeline, two prompts and two drawings."""

    def __init__(self, tiny: Tiny) -> None:
        self.tiny, self.pipe = tiny, tiny.pipe()
        self.size = {"height": HEIGHT * tiny.pixels, "width": WIDTH * tiny.pixels}
        self.texts = tiny.texts(torch.Generator().manual_seed(1), 2)
        self.conditions = torch.rand(2, 1, *self.size.values(), generator=torch.Generator().manual_seed(2))

    def network(self, **options: Any) -> BPSTransformerModel:
        made = BPSTransformerModel.from_transformer(
            self.pipe.transformer, pixel_unshuffle=self.tiny.pixels, hidden_channels=(32, 32, 32), **options
        )
        return randomise(made)

    def latents(self, rows: list[int], guidance: float = 3.0, pipe: Any = None) -> torch.Tensor:
        """What the pipeline makes of some of the prompts, as latents."""
        chosen = {
            name: value[rows] if torch.is_tensor(value) else [value[row] for row in rows] if value else value
            for name, value in self.texts.items()
        }
        return (pipe or self.pipe)(
            num_inference_steps=3,
            generator=[torch.Generator().manual_seed(row) for row in rows],
            output_type="latent",
            **self.size,
            **chosen,
            **{self.tiny.guidance: guidance},
            **dict(self.tiny.more),
        ).images

    def steered(self, model: Any, rows: list[int], guidance: float = 3.0, **how: Any) -> torch.Tensor:
        with steer(self.pipe, model, self.conditions[rows], **how):
            return self.latents(rows, guidance)


@pytest.fixture(params=TINY)
def subject(request) -> Subject:
    return Subject(TINY[request.param])


def moved(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).abs().max().item()


MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "strength": {"scale": 0.3},
    "span": {"start": 0.3, "end": 0.8},
    "text half": {"steer_unconditional": False},
    "tempered": {"steering_guidance_scale": 2.0},
}


def test_untrained_it_is_the_prior_to_the_bit(subject):
    untrained = BPSTransformerModel.from_transformer(subject.pipe.transformer, pixel_unshuffle=subject.tiny.pixels)
    assert torch.equal(subject.steered(untrained, [0, 1]), subject.latents([0, 1]))


@pytest.mark.parametrize("guidance", [1.0, 3.0], ids=["alone", "guided"])
@pytest.mark.parametrize("mode", MODES)
def test_a_batch_is_its_pictures_made_one_by_one(subject, mode, guidance):
    model, how = subject.network(), MODES[mode]
    both, prior = subject.steered(model, [0, 1], guidance, **how), subject.latents([0, 1], guidance)
    alone = torch.cat([subject.steered(model, [row], guidance, **how) for row in (0, 1)])
    scale = max(1.0, both.abs().max().item())
    assert moved(both, alone) < 1e-4 * scale
    assert moved(both, prior) > 1e-2 * scale
    assert torch.equal(subject.latents([0, 1], guidance), prior)  # nothing is left behind
    if mode != "plain":
        assert moved(both, subject.steered(model, [0, 1], guidance)) > 1e-3 or (mode == "text half" and guidance == 1)


def test_noise_at_one_token_moves_its_patch_and_no_other(subject, monkeypatch):
    """Added behind the last block, where tokens no longer see one another."""
    model = subject.network()
    transformer, last = subject.pipe.transformer, len(find_backbone(subject.pipe.transformer).sites()) - 1
    seen: list[torch.Tensor] = []
    real = type(transformer).forward

    @functools.wraps(real)
    def kept(self, *args: Any, **kwargs: Any) -> Any:
        output = real(self, *args, **kwargs)
        found = output[0] if isinstance(output, tuple) else output.sample
        seen.append(torch.stack(found) if isinstance(found, list) else found)
        return output

    def one_token(self, place: int, features: torch.Tensor) -> torch.Tensor:
        made = torch.zeros(*features.shape[:2], self.config["inner_dim"])
        if place == last:
            made[:, token] = torch.randn(self.config["inner_dim"], generator=torch.Generator().manual_seed(3))
        return made

    monkeypatch.setattr(type(transformer), "forward", kept)
    monkeypatch.setattr(BPSTransformerModel, "residual", one_token)
    for token in (0, WIDTH + 2, HEIGHT * WIDTH - 1):
        seen.clear()
        subject.latents([0], 1.0)
        subject.steered(model, [0], 1.0)
        bare, steered = seen[0], seen[len(seen) // 2]  # the first step, from the same latents
        change = (steered - bare).abs()
        if change.ndim == 3:  # (1, tokens, channels)
            grid = change[0, : HEIGHT * WIDTH].amax(1).view(HEIGHT, WIDTH)
        else:
            picture = change.flatten(0, -3).amax(0)
            patch = picture.shape[-1] // WIDTH
            grid = picture.unflatten(1, (WIDTH, patch)).unflatten(0, (HEIGHT, patch)).amax((1, 3))
        where = grid.flatten() > 1e-6
        assert where.nonzero().flatten().tolist() == [token]


def test_the_network_runs_once_for_all_rows_and_never_again_under_its_plan(subject, monkeypatch):
    model, plan = subject.network(), SteeringPlan()
    calls: list[int] = []
    real = BPSTransformerModel.forward
    monkeypatch.setattr(BPSTransformerModel, "forward", lambda *args: (calls.append(len(args[1])), real(*args))[1])
    with steer(subject.pipe, model, subject.conditions[:1], plan=plan):
        first = subject.latents([0, 1])
        assert calls == [1] * 3 and len(plan) == 3
        assert torch.equal(subject.latents([0, 1]), first)
    assert calls == [1] * 3
    with steer(subject.pipe, model, subject.conditions[:1], plan=None):
        torch.testing.assert_close(subject.latents([0, 1]), first, **CLOSE)


def test_a_step_waits_for_nothing(subject, monkeypatch):
    """After a picture's first step the engine reads nothing off the device; the transformer itself is not counted."""
    model, found = subject.network(), []
    real, plain = Engine._steered, Engine._plain

    def steered(self, *args: Any) -> Any:
        with Waits() as counting:
            output = real(self, *args)
        found.append(counting.found)
        return output

    def uncounted(self, *args: Any) -> Any:
        with _pop_mode_temporarily():
            return plain(self, *args)

    monkeypatch.setattr(Engine, "_steered", steered)
    monkeypatch.setattr(Engine, "_plain", uncounted)
    for plan in (SteeringPlan(memory_limit=10**9), None):
        with steer(subject.pipe, model, subject.conditions, plan=plan):
            for _ in range(2):
                subject.latents([0, 1], 1.0)
    assert len(found) == 12 and found[0]
    # The first picture fills the plan, by copies on the device.
    assert not [one for step, one in enumerate(found) if step % 3 and step > 2 and one]


def test_conditions_add_up(subject):
    one, other = subject.network(), subject.network()
    twice = [subject.conditions[:1], subject.conditions[1:]]
    with steer(subject.pipe, [one, other], twice, scale=[1.0, 0.5]):
        together = subject.latents([0])
    with steer(subject.pipe, one, twice[0]), steer(subject.pipe, other, twice[1], scale=0.5):
        torch.testing.assert_close(subject.latents([0]), together, **CLOSE)
    with steer(subject.pipe, one, twice[0]):
        assert moved(subject.latents([0]), together) > 1e-3


def test_a_compiled_transformer_is_steered_as_the_eager_one(subject):
    torch._dynamo.reset()
    model = subject.network()
    wanted, prior = subject.steered(model, [0]), subject.latents([0])
    subject.pipe.transformer = torch.compile(subject.pipe.transformer, backend="eager")
    scale = wanted.abs().max().item()
    assert moved(subject.steered(model, [0]), wanted) < 1e-4 * scale
    graphs = counters["stats"]["unique_graphs"]
    assert moved(subject.steered(model, [0]), wanted) < 1e-4 * scale
    assert counters["stats"]["unique_graphs"] == graphs  # the second picture compiles nothing anew
    assert moved(subject.latents([0]), prior) < 1e-4 * scale


def test_an_offloaded_transformer_is_steered_as_before(subject):
    model = subject.network()
    wanted = subject.steered(model, [0, 1], plan=None)
    for part in subject.pipe.components.values():  # all of them: a pipeline computes where the first one is
        if isinstance(part, torch.nn.Module):
            accelerate.cpu_offload(part, execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in subject.pipe.transformer.parameters())
    torch.testing.assert_close(subject.steered(model, [0, 1], plan=None), wanted, **CLOSE)


def test_beside_a_lora(subject):
    model, transformer = subject.network(), subject.pipe.transformer
    before, prior = subject.steered(model, [0, 1]), subject.latents([0, 1])
    torch.manual_seed(4)
    peft.inject_adapter_in_model(
        peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False), transformer
    )
    assert moved(subject.latents([0, 1]), prior) > 1e-3
    both = subject.steered(model, [0, 1])
    alone = torch.cat([subject.steered(model, [row]) for row in (0, 1)])
    scale = max(1.0, both.abs().max().item())
    assert moved(both, alone) < 1e-4 * scale and moved(both, before) > 1e-3


def test_gradients_reach_every_weight(subject):
    model = subject.network().train()
    transformer = subject.pipe.transformer
    transformer.train()
    transformer.enable_gradient_checkpointing()
    model.enable_gradient_checkpointing()
    seen: dict[str, Any] = {}

    def keep(_: Any, args: Any, kwargs: Any) -> None:
        seen.setdefault("call", (args, kwargs))

    hook = transformer.register_forward_pre_hook(keep, with_kwargs=True)
    subject.latents([0], 1.0)
    hook.remove()
    args, kwargs = copy.copy(seen["call"])
    with attach(transformer, model, subject.conditions[:1], plan=None):
        output = transformer(*args, **kwargs)[0]
        (output[0] if isinstance(output, list) else output).square().mean().backward()
    missing = [name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None]
    assert not missing and not any(parameter.grad is not None for parameter in transformer.parameters())


CACHED = [family.title for name, family in FAMILIES.items() if hasattr(getattr(diffusers, name), "enable_cache")]


@pytest.mark.parametrize("name", CACHED)
def test_caches_that_skip_blocks_are_refused(name):
    subject = Subject(TINY[name])
    subject.pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.2))
    with pytest.raises(PowersteerError, match="disable_cache"):
        subject.steered(subject.network(), [0])


def test_what_does_not_fit_is_refused(subject):
    model, pipe = subject.network(), subject.pipe
    small = torch.zeros(1, 1, 32, 32)
    with pytest.raises(PowersteerError, match="resize the condition"), steer(pipe, model, small):
        subject.latents([0])
    of_unet = randomise(BPSModel.from_unet(tiny_unet()))
    with pytest.raises(PowersteerError, match="load the base it was trained on"):
        check_fits(of_unet, pipe)
    with pytest.raises(PowersteerError, match="load the base it was trained on"):
        check_fits(model, tiny_unet())
    with pytest.raises(PowersteerError, match="is no transformer of the table, which has"):
        BPSTransformerModel.from_transformer(diffusers.DiTTransformer2DModel(num_layers=1, sample_size=8))


def test_the_table_is_of_diffusers_classes():
    assert len(TINY) == len(FAMILIES)
    for name in FAMILIES:
        assert issubclass(getattr(diffusers, name), diffusers.ModelMixin)


@pytest.mark.parametrize(
    ("weights", "ends"), [("head-heavy", (16.0, 1.0)), ("foot-heavy", (1.0, 16.0)), ("uniform", (1.0, 1.0))]
)
def test_weights_run_over_depth(weights, ends):
    transformer = TINY["FLUX.1"].pipe().transformer
    model = BPSTransformerModel.from_transformer(transformer, weights=weights)
    found = model.weights.tolist()
    assert len(found) == 4 and (found[0], found[-1]) == ends and model.spec.depths == [4]
    with pytest.raises(ValueError, match="3 numbers for 4 blocks"):
        BPSTransformerModel.from_transformer(transformer, weights=(1.0, 2.0, 3.0))


def test_saved_and_loaded_it_is_the_same(subject, tmp_path):
    model = subject.network(conditioning={"kind": "sketch"})
    model.save_pretrained(tmp_path)
    again = BPSTransformerModel.from_pretrained(str(tmp_path))
    assert again.config["conditioning"] == {"kind": "sketch"} and again.spec == model.spec
    assert torch.equal(subject.steered(again, [0]), subject.steered(model, [0]))
