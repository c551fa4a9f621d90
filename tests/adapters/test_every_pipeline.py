"""Under every diffusers pipeline that takes the U-Net, steering is exact, or refused in words.

Rows are told here by value, not by what the engine reads: which image a row of a call shows, and whether it is
unconditional, is read off the numbers that the U-Net was given.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from diffusers import AutoPipelineForImage2Image

from conftest import by_hand, randomise
from pipeline_calls import PROMPTS, STEPS, arguments, drawn, guided, picture, unet_of
from pipelines import build, pipeline_class, places, stock, takes_unet, traits
from powersteer import BPSModel, PowersteerError, steer
from powersteer.adapters.clock import progress

BROKEN = {
    "BlipDiffusionControlNetPipeline": "its Q-Former lacks a method that transformers 5 took away",
    "BlipDiffusionPipeline": "its Q-Former lacks a method that transformers 5 took away",
    "VersatileDiffusionDualGuidedPipeline": "its transformers refuse an argument of its U-Net's blocks",
}
"""What does not run without steering either."""

REBUILT = {"VersatileDiffusionPipeline"}
"""Puts other layers into its U-Net while it runs: its calls cannot be made again afterwards."""

LEAST = 85
"""Pipelines that are put to the test, or more."""

WORDS = re.compile(r": .*\b(give|leave|take|steer|resize|load|cut|say)|cannot be steered")
"""A refusal says what to do, or that there is nothing to do."""

pytestmark = pytest.mark.usefixtures("one_thread")
CLOSE = {"atol": 5e-4, "rtol": 1e-3}


def refused(error: PowersteerError) -> str:
    assert WORDS.search(str(error)), f"a refusal without advice: {error}"
    return str(error)


@dataclass
class Evaluation:
    """What the U-Net was given in a call, and what it gave."""

    inputs: dict[str, Any]
    processors: dict[str, Any]
    """The attention layers: a pipeline may put its own in while it runs."""
    output: torch.Tensor = field(default_factory=lambda: torch.zeros(0))

    @property
    def sample(self) -> torch.Tensor:
        return self.inputs["sample"]

    @property
    def text(self) -> torch.Tensor | None:
        """What tells the prompts apart."""
        given = [self.inputs.get(name) for name in ("encoder_hidden_states", "class_labels")]
        given += [(self.inputs.get("added_cond_kwargs") or {}).get("image_embeds")]
        return next((one for one in given if one is not None), None)


@contextmanager
def recorded(unet: Any) -> Iterator[list[Evaluation]]:
    """Every call of the U-Net's forward, after the engine has laid its hooks."""
    calls: list[Evaluation] = []
    names = ("sample", "timestep", "encoder_hidden_states", "class_labels")

    def kept(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(kept(one) for one in value)
        return value.detach().clone() if torch.is_tensor(value) else value

    def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(names, args, strict=False)) | kwargs
        inputs = {name: kept(value) for name, value in given.items()}
        calls.append(Evaluation(inputs, dict(unet.attn_processors)))

    def after(_: Any, __: Any, output: Any) -> None:
        calls[-1].output = kept(output[0])

    handles = [unet.register_forward_pre_hook(before, with_kwargs=True), unet.register_forward_hook(after)]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


class Bound:
    """The U-Net as `by_hand` calls it, with the call's other arguments beside."""

    def __init__(self, unet: Any, inputs: dict[str, Any]) -> None:
        self.unet = unet
        self.rest = {name: value for name, value in inputs.items()
                     if name not in ("sample", "timestep", "encoder_hidden_states", "return_dict")}  # fmt: skip

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unet, name)

    def __call__(self, sample: torch.Tensor, timestep: Any, text: Any) -> Any:
        rest = {name: list(value) if isinstance(value, list) else value for name, value in self.rest.items()}
        return self.unet.forward(sample, timestep, text, **rest)  # which empties lists

    def time_embedding(self, features: torch.Tensor) -> torch.Tensor:
        return self.unet.time_embedding(features, self.rest.get("timestep_cond"))


class Subject:
    """A pipeline, a network for it, and a condition for each of two pictures."""

    def __init__(self, name: str) -> None:
        self.pipe = build(pipeline_class(name))
        self.traits = traits(type(self.pipe))
        self.unet = unet_of(self.pipe)
        self.factor = 1 if self.traits.pixels else 4
        self.model: Any = None
        self.conditions = torch.zeros(0)

    def prepare(self, sample: torch.Tensor) -> None:
        torch.manual_seed(1)
        self.model = randomise(BPSModel.from_unet(self.unet, pixel_unshuffle=self.factor, weights="uniform"))
        height, width = (self.factor * side for side in sample.shape[-2:])
        self.conditions = torch.rand(2, 1, height, width, generator=torch.Generator().manual_seed(1))

    def draw(self, rows: list[int], guidance: float | None) -> tuple[torch.Tensor, list[Evaluation]]:
        with recorded(self.unet) as calls:
            return drawn(self.pipe, rows, guidance), calls

    def steered(self, rows: list[int], guidance: float | None, order: list[int] | None = None, **how: Any) -> Any:
        with steer(self.pipe, self.model, self.conditions[order or rows], **how):
            return self.draw(rows, guidance)

    def expected(self, call: Evaluation, images: list[int], steered: list[bool]) -> torch.Tensor:
        """The call's output, worked out without the engine: these rows steered, each by its image's condition."""
        unet: Any = Bound(self.unet, call.inputs)
        timestep, text = torch.as_tensor(call.inputs["timestep"]).reshape(-1), call.inputs.get("encoder_hidden_states")
        timestep = timestep[0] if len(timestep) == 1 else timestep
        own = self.unet.attn_processors
        self.unet.set_attn_processor(dict(call.processors))
        with torch.no_grad():
            found = by_hand(unet, self.model, call.sample, timestep, text, self.conditions[images])
            if not all(steered):
                prior = unet(call.sample, timestep, text).sample
                found = torch.where(torch.tensor(steered)[:, None, None, None], found, prior)
        self.unet.set_attn_processor(own)
        return found


def images_of(call: Evaluation, alone: list[Evaluation]) -> list[int] | None:
    """For each row, whose picture's call made by itself has that row; None where that does not tell."""
    if any(one.sample.shape[1:] != call.sample.shape[1:] for one in alone):
        return None
    found = []
    for row in call.sample:
        near = [any(torch.allclose(row, other, atol=1e-4) for other in one.sample) for one in alone]
        if near.count(True) != 1:
            return None
        found.append(near.index(True))
    return found


def unconditional_of(call: Evaluation, images: list[int]) -> list[bool]:
    """Of each row, whether its text is another image's too: prompts differ, what stands for no prompt does not."""
    text = call.text
    assert text is not None
    return [
        any(image != other and torch.equal(text[row], text[place]) for place, other in enumerate(images))
        for row, image in enumerate(images)
    ]


def attempt(make: Any) -> tuple[Any, str | None]:
    try:
        return make(), None
    except PowersteerError as error:
        return None, refused(error)


def differ(first: list[Evaluation], second: list[Evaluation]) -> bool:
    """Whether a call's output does; pictures may saturate."""
    first = first[1::2] if len(first) == 2 * len(second) else first
    return any((one.output - other.output).abs().max() > 1e-3 for one, other in zip(first, second, strict=True))


def check_one(subject: Subject, guidance: float | None, prior: list[Evaluation]) -> None:
    """A single picture under one condition: every row follows it."""
    _, calls = subject.steered([0], guidance)
    assert differ(calls, prior), "steering changed nothing"
    assert differ(calls, subject.steered([0], guidance, [1])[1]), "the condition is not heeded"
    for call in calls[:STEPS]:
        rows = len(call.sample)
        wanted = subject.expected(call, [0] * rows, [True] * rows)
        torch.testing.assert_close(call.output, wanted, **CLOSE)


def check_both(subject: Subject, guidance: float | None, prior: list[Evaluation], alone: Any, how: dict) -> str | None:
    """Two pictures with two conditions, by pictures and by calls; says why it was refused."""
    made, reason = attempt(lambda: subject.steered([0, 1], guidance, **how))
    if reason is not None:
        return reason
    got, calls = made
    assert differ(calls, prior), "steering changed nothing"
    check_calls(subject, calls, alone, how)
    if not how or "steering_guidance_scale" in how:
        for row in (1,) if how else (0, 1):
            by_itself, _ = subject.steered([row], guidance, **how)
            torch.testing.assert_close(got[row : row + 1], by_itself, **CLOSE)
    if not how and guidance != 1.0:
        assert differ(calls, subject.steered([0, 1], guidance, [1, 0])[1]), "the conditions are not heeded"
    return None


def check_calls(subject: Subject, calls: list[Evaluation], alone: list[list[Evaluation]], how: dict) -> None:
    """Calls whose rows are known, and all that are laid out as they are, against what they should give."""
    if subject.traits.kind.__name__ in REBUILT:
        return
    twice = "steering_guidance_scale" in how  # each call is evaluated without steering, then with it
    layouts: dict[int, list[int] | None] = {}
    for place, call in enumerate(calls[1::2] if twice else calls):
        rows = len(call.sample)
        if rows not in layouts:
            singles = [one[place] for one in alone if place < len(one)]
            layouts[rows] = images_of(call, singles) if len(singles) == 2 else None
        images = layouts[rows]
        if images is None:
            assert place, "the rows of the first call show no image"
            continue
        steered = [True] * rows
        if how.get("steer_unconditional") is False:
            spared = unconditional_of(call, images)
            if all(spared):  # prompts came out alike
                continue
            steered = [not spare for spare in spared]
        if "start" in how:
            times = torch.as_tensor(call.inputs["timestep"]).flatten().tolist()
            components = subject.pipe.components
            scheduler = components.get("scheduler") or components["decoder_scheduler"]  # UnCLIP's
            ways = [progress(time, scheduler) for time in times]
            steered = [how["start"] <= way < how["end"] for way in (ways if len(ways) == rows else ways[:1] * rows)]
        torch.testing.assert_close(call.output, subject.expected(call, images, steered), **CLOSE)


MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "span": {"start": 0.2, "end": 0.8},
    "text half": {"steer_unconditional": False},
    "tempered": {"steering_guidance_scale": 2.0},
}

HALVES = {"text half", "tempered"}
REFUSED = {
    # Show neither their latents nor their guidance, or take pictures out of the batch one by one.
    "AudioDiffusionPipeline": set(MODES),
    "MarigoldDepthPipeline": set(MODES),
    "MarigoldIntrinsicsPipeline": set(MODES),
    "MarigoldNormalsPipeline": set(MODES),
    "StableDiffusionAttendAndExcitePipeline": set(MODES),
    # Mix the rows of a batch, and do not make a batch right themselves.
    "CycleDiffusionPipeline": {"plain"},
    "LEditsPPPipelineStableDiffusion": {"plain"},
    "StableDiffusionPanoramaPipeline": {"plain"},
    # Tell the U-Net another time than their scheduler's.
    "StableDiffusionLatentUpscalePipeline": {"span"},
    # Have other parts than an unconditional and a conditional one.
    "LDMTextToImagePipeline": HALVES,
    "SemanticStableDiffusionPipeline": HALVES,
    "StableDiffusionInstructPix2PixPipeline": HALVES,
    "StableDiffusionParadigmsPipeline": HALVES,
    "StableDiffusionPipelineSafe": HALVES,
    "StableDiffusionSAGPipeline": HALVES,
    "StableDiffusionXLInstructPix2PixPipeline": HALVES,
}
"""What is refused to two pictures with two conditions; all else is exact."""


def parameters() -> list[Any]:
    """Pipelines by name; those that only call others, which are here too, are left to the slow run."""
    return [pytest.param(name, marks=[pytest.mark.slow] * ("Combined" in name)) for name in sorted(places())]


@pytest.mark.parametrize("name", parameters())
@torch.no_grad()
def test_exact_or_refused(name):
    if name in BROKEN:
        pytest.skip(BROKEN[name])
    subject = Subject(name)
    if subject.unet is None:
        network = BPSModel.from_unet(stock().unet, pixel_unshuffle=4, weights="uniform")
        with (
            pytest.raises(PowersteerError, match="has no denoiser to steer: give"),
            steer(subject.pipe, network, torch.rand(1, 1, 32, 32)),
        ):
            pass
        return
    found: set[str] = set()
    for guidance in (1.0, 3.0) if guided(subject.traits) else (None,):
        try:
            single = subject.draw([0], guidance)
        except TypeError:
            assert guidance == 1.0  # some cannot do without
            continue
        if subject.model is None:
            subject.prepare(single[1][0].sample)
        found |= check_pair(subject, guidance, single)
    assert found == REFUSED.get(name, set())


def check_pair(subject: Subject, guidance: float | None, single: tuple[torch.Tensor, list[Evaluation]]) -> set[str]:
    """Two pictures at once, in every mode: those that were refused."""
    prior, calls = single
    try:
        together, of_both = subject.draw([0, 1], guidance)
    except (ValueError, TypeError, RuntimeError, IndexError):  # it takes one picture at a time
        check_one(subject, guidance, calls)
        return set()
    other, of_other = subject.draw([1], guidance)
    alone = [calls, of_other]
    if len(together) != 2 or not torch.allclose(together, torch.cat([prior, other]), **CLOSE):
        check_one(subject, guidance, calls)
        made, reason = attempt(lambda: subject.steered([0, 1], guidance))
        if reason is not None:
            return {"plain"}
        check_calls(subject, made[1][:1], alone, {})
        return set()
    found = set()
    for mode, how in MODES.items() if guidance != 1.0 else [("plain", {})]:
        if check_both(subject, guidance, of_both, alone, how) is not None:
            found.add(mode)
            if mode == "plain":
                check_one(subject, guidance, calls)
    return found


def test_most_pipelines_are_put_to_the_test():
    found = places()
    assert set(REFUSED) | set(BROKEN) <= set(found)
    assert all(takes_unet(pipeline_class(name)) for name in found)
    assert len(found) - len(BROKEN) >= LEAST


@torch.no_grad()
def test_a_sibling_that_shares_the_unet_is_steered_too():
    subject = Subject("StableDiffusionPipeline")
    subject.prepare(torch.zeros(1, 4, 8, 8))
    sibling = AutoPipelineForImage2Image.from_pipe(subject.pipe)
    sibling.set_progress_bar_config(disable=True)

    def calls(rows: list[int]) -> list[Evaluation]:
        with recorded(subject.unet) as found:
            drawn(sibling, rows, 3.0)
        return found

    alone = [calls([0]), calls([1])]
    with steer(subject.pipe, subject.model, subject.conditions):
        found = calls([0, 1])
    check_calls(subject, found, alone, {})
    assert images_of(found[0], [one[0] for one in alone]) == [0, 1, 0, 1]


@torch.no_grad()
@pytest.mark.parametrize("of_each", [False, True], ids=["a condition a prompt", "a condition an image"])
def test_several_images_of_a_prompt(of_each):
    subject = Subject("StableDiffusionPipeline")
    subject.prepare(torch.zeros(1, 4, 8, 8))
    subject.conditions = torch.rand(4, 1, 32, 32, generator=torch.Generator().manual_seed(1))[: 4 if of_each else 2]
    with recorded(subject.unet) as calls, steer(subject.pipe, subject.model, subject.conditions):
        subject.pipe(PROMPTS, num_inference_steps=2, num_images_per_prompt=2, output_type="latent", guidance_scale=3.0)
    images = [0, 1, 2, 3] if of_each else [0, 0, 1, 1]
    for call in calls:
        torch.testing.assert_close(call.output, subject.expected(call, images * 2, [True] * 8), **CLOSE)


@torch.no_grad()
def test_a_crop_that_is_repainted_is_refused():
    subject = Subject("StableDiffusionInpaintPipeline")
    subject.prepare(torch.zeros(1, 4, 8, 8))
    given = arguments(subject.traits, [0], 3.0) | {"padding_mask_crop": 4, "output_type": "pil"}
    given |= {"image": given["image"][0], "mask_image": given["mask_image"][0]}
    with (
        steer(subject.pipe, subject.model, subject.conditions[:1]),
        pytest.raises(PowersteerError, match=r"repaints a crop .*: cut picture, mask and condition out yourself"),
    ):
        subject.pipe(**given)


@torch.no_grad()
def test_views_smaller_than_the_picture_are_refused():
    subject = Subject("StableDiffusionPanoramaPipeline")
    subject.prepare(torch.zeros(1, 4, 64, 128))
    given = arguments(subject.traits, [0], 3.0) | {"height": 256, "width": 512}
    with (
        steer(subject.pipe, subject.model, subject.conditions[:1]),
        pytest.raises(PowersteerError, match=r"denoises 64×64 of 64×128 latents at a time: .* cannot be steered"),
    ):
        subject.pipe(**given)


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 2])
def test_parts_that_are_halves_in_number_only_are_refused(count):
    # DiffEdit's mask: the latents four times, with two texts that are unconditional, and no variable named latents.
    subject = Subject("StableDiffusionDiffEditPipeline")
    subject.prepare(torch.zeros(1, 4, 8, 8))

    def run() -> None:
        subject.pipe.generate_mask(
            image=[picture(row) for row in range(count)],
            target_prompt=PROMPTS[:count],
            source_prompt=["two fish"] * count,
            num_maps_per_mask=1,
            num_inference_steps=2,
            generator=[torch.Generator().manual_seed(row) for row in range(count)],
        )

    with steer(subject.pipe, subject.model, subject.conditions[:1]):
        run()
    with (
        steer(subject.pipe, subject.model, subject.conditions[:count], steer_unconditional=False),
        pytest.raises(PowersteerError, match=r"does not repeat its latents part by part.*give one condition"),
    ):
        run()


@torch.no_grad()
def test_layers_that_a_pipeline_puts_in_while_it_runs_are_steered():
    subject = Subject("VersatileDiffusionPipeline")
    subject.prepare(torch.zeros(1, 4, 8, 8))
    found, _ = subject.steered([0, 1], 3.0)
    kind = pipeline_class("VersatileDiffusionTextToImagePipeline")
    parts = subject.pipe.components
    twin = kind(**{name: parts[name] for name in traits(kind).init})
    twin.set_progress_bar_config(disable=True)
    given = arguments(traits(kind), [0, 1], 3.0) | {"output_type": "np"}
    with steer(twin, subject.model, subject.conditions):
        wanted = twin(**given).images
    torch.testing.assert_close(found, torch.as_tensor(wanted), **CLOSE)
