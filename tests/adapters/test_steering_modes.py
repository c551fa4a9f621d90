"""Several conditions, parts of the schedule, modes of guidance, plans, torch.compile."""

import gc
import warnings

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    UNet2DConditionModel,
)
from PIL import Image, ImageDraw

from conftest import randomise
from powersteer import BPSModel, PowersteerError, SteeringPlan, steer
from powersteer.adapters.plan import plan_of
from powersteer.backbones.fingerprint import fingerprint


def condition_of(seed: int, count: int = 1) -> torch.Tensor:
    return torch.rand(count, 1, 32, 32, generator=torch.Generator().manual_seed(seed))


def unet_inputs(batch: int = 2, timestep: int = 500):
    generator = torch.Generator().manual_seed(7)
    sample = torch.randn(batch, 4, 8, 8, generator=generator)
    return sample, torch.tensor(timestep), torch.randn(batch, 6, 24, generator=generator)


def pictures(pipe, prompts=("a fox",), guidance_scale=4.0, steps=3, **kwargs):
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    return pipe(
        list(prompts),
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        generator=generators,
        output_type="pt",
        **kwargs,
    ).images


@pytest.fixture
def other(pipe):
    torch.manual_seed(2)
    return randomise(BPSModel.from_unet(pipe.unet, pixel_unshuffle=4, weights=[0.3, 0.2, 0.3, 0.4]), seed=5)


@torch.no_grad()
def test_several_conditions_add_and_nest(pipe, model, other):
    first, second = condition_of(0), condition_of(1)
    inputs = unet_inputs()
    with steer(pipe.unet, [model, other], [first, second], scale=[1.0, 0.5]):
        together = pipe.unet(*inputs).sample
    with steer(pipe.unet, model, first), steer(pipe.unet, other, second, scale=0.5):
        nested = pipe.unet(*inputs).sample
        with steer(pipe.unet, other, second, scale=-0.5):
            cancelled = pipe.unet(*inputs).sample
    with steer(pipe.unet, model, first):
        alone = pipe.unet(*inputs).sample
    torch.testing.assert_close(together, nested)
    torch.testing.assert_close(cancelled, alone, atol=1e-5, rtol=1e-4)
    assert (together - alone).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize(("timestep", "steered"), [(990, False), (700, True), (501, True), (500, False), (10, False)])
def test_steers_between_start_and_end_only(pipe, model, timestep, steered):
    inputs = unet_inputs(timestep=timestep)
    prior = pipe.unet(*inputs).sample
    with steer(pipe.unet, model, condition_of(0), start=0.1, end=0.5):
        got = pipe.unet(*inputs).sample
    with steer(pipe.unet, model, condition_of(0)):
        full = pipe.unet(*inputs).sample
    torch.testing.assert_close(got, full if steered else prior)


@torch.no_grad()
def test_rows_at_their_own_timesteps_start_and_end_each(pipe, model):
    sample, _, text = unet_inputs(2)
    timesteps = torch.tensor([900, 100])
    with steer(pipe.unet, model, condition_of(0), end=0.5):
        got = pipe.unet(sample, timesteps, text).sample
    with steer(pipe.unet, model, condition_of(0)):
        full = pipe.unet(sample, timesteps, text).sample
    prior = pipe.unet(sample, timesteps, text).sample
    torch.testing.assert_close(got[0], full[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(got[1], prior[1])


def halves_of(unet, sample, timestep, empty, text, model, condition):
    """ε(∅), ε(text), ε(∅, c), ε(text, c), each evaluated alone."""
    prior = [unet(sample, timestep, states).sample for states in (empty, text)]
    with steer(unet, model, condition):
        return [*prior, *[unet(sample, timestep, states).sample for states in (empty, text)]]


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 3])
def test_guidance_modes_on_a_bare_unet(pipe, model, count):
    sample, timestep, text = unet_inputs(count)
    empty, condition = torch.zeros_like(text), condition_of(3, count)
    none, prior, none_c, text_c = halves_of(pipe.unet, sample, timestep, empty, text, model, condition)
    both = sample.repeat(2, 1, 1, 1), timestep, torch.cat([empty, text])

    def halves(**mode):
        with steer(pipe.unet, model, condition, **mode):
            return pipe.unet(*both).sample.chunk(2)

    for got, wanted in zip(halves(), (none_c, text_c), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)
    for got, wanted in zip(halves(steer_unconditional=False), (none, text_c), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)
    w_text, w_c = 4.0, 2.5
    first, second = halves(steering_guidance_scale=w_c)
    wanted = none + w_text * (prior - none) + w_c * (text_c - prior)
    torch.testing.assert_close(first + w_text * (second - first), wanted, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_steering_guidance_in_a_pipeline_and_its_limits(pipe, model):
    prompts, conditions = ["a fox", "a red house", "the moon"], condition_of(4, 3)
    prior = pictures(pipe, prompts)
    with steer(pipe, model, conditions, steering_guidance_scale=0.0):
        torch.testing.assert_close(pictures(pipe, prompts), prior, atol=1e-4, rtol=1e-4)
    # Without text guidance, w_c = 1 is plain steering.
    with steer(pipe, model, conditions):
        plain = pictures(pipe, prompts, guidance_scale=1.0)
    with steer(pipe, model, conditions, steering_guidance_scale=1.0):
        torch.testing.assert_close(pictures(pipe, prompts, guidance_scale=1.0), plain, atol=1e-4, rtol=1e-4)
    # A batch equals its pictures one by one.
    with steer(pipe, model, conditions, steering_guidance_scale=2.0):
        together = pictures(pipe, prompts)
    for i, prompt in enumerate(prompts):
        generator = torch.Generator().manual_seed(i)
        with steer(pipe, model, conditions[i : i + 1], steering_guidance_scale=2.0):
            alone = pipe(
                prompt, num_inference_steps=3, guidance_scale=4.0, generator=generator, output_type="pt"
            ).images
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-4, rtol=1e-4)
    with (
        steer(pipe, model, conditions, steering_guidance_scale=2.0),
        pytest.raises(PowersteerError, match="do not nest"),
        steer(pipe, model, conditions),
    ):
        pass
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in pipe.unet.modules())


@torch.no_grad()
def test_ambiguous_halves_are_refused_on_a_bare_unet(pipe, model):
    with (
        steer(pipe.unet, model, condition_of(0), steer_unconditional=False),
        pytest.raises(PowersteerError, match="which of the 4 rows of this batch are unconditional cannot be told"),
    ):
        pipe.unet(*unet_inputs(4))


def calls_of(model):
    calls = []
    model.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    return calls


def test_a_warm_plan_spares_every_evaluation_and_changes_nothing(pipe, model):
    calls, condition = calls_of(model), condition_of(0)
    with steer(pipe, model, condition, plan=None):
        wanted = [pictures(pipe), pictures(pipe, ["the moon"])]
    assert len(calls) == 6
    calls.clear()
    got = []
    for prompt in ("a fox", "the moon"):
        with steer(pipe, model, condition):
            got.append(pictures(pipe, [prompt]))
    assert len(calls) == 3  # the second prompt cost none
    for one, two in zip(got, wanted, strict=True):
        assert torch.equal(one, two)
    with steer(pipe, model, condition_of(1)):
        pictures(pipe)
    assert len(calls) == 6  # another condition, other residuals


def test_a_plan_notices_new_weights(pipe, model):
    condition = condition_of(0)
    with steer(pipe, model, condition):
        before = pictures(pipe)
    for parameter in model.parameters():
        parameter.data.mul_(1.5)  # as EMA does: behind autograd's back
    with steer(pipe, model, condition):
        after = pictures(pipe)
    with steer(pipe, model, condition, plan=None):
        assert torch.equal(pictures(pipe), after)
    assert (after - before).abs().max() > 1e-3


def test_a_plan_in_half_precision_stays_within_its_rounding(pipe, model):
    plan, condition = SteeringPlan(dtype=torch.bfloat16, device="cpu"), condition_of(0)
    with steer(pipe, model, condition, plan=plan):
        pictures(pipe)
        kept = pictures(pipe)
    with steer(pipe, model, condition, plan=None):
        exact = pictures(pipe)
    assert 0 < (kept - exact).abs().max() < 0.02
    size = sum(r.nbytes for steps in plan._kept.values() for residuals in steps.values() for r in residuals)
    assert plan.nbytes == size > 0 and len(plan) == 3


def test_a_plan_stays_within_its_memory(pipe, model):
    probe = SteeringPlan()
    with steer(pipe, model, condition_of(0), plan=probe):
        pictures(pipe, steps=1)
    one = probe.nbytes
    plan = SteeringPlan(memory_limit=4 * one)
    for seed in (0, 1, 2):
        with steer(pipe, model, condition_of(seed), plan=plan):
            pictures(pipe, steps=3)
        assert plan.nbytes <= 4 * one
    calls = calls_of(model)
    with steer(pipe, model, condition_of(2), plan=plan):
        pictures(pipe, steps=3)
    assert not calls  # the newest is kept whole
    with steer(pipe, model, condition_of(3), plan=SteeringPlan(memory_limit=2 * one)) as _:
        pictures(pipe, steps=3)
        pictures(pipe, steps=3)
    assert len(calls) == 4  # a schedule that does not fit is kept as far as it fits
    plan.clear()
    assert plan.nbytes == 0 and len(plan) == 0


def test_training_keeps_no_plan_and_a_plan_dies_with_its_network(pipe, model):
    model.train()
    with steer(pipe.unet, model, condition_of(0)):
        pipe.unet(*unet_inputs()).sample.mean().backward()
    assert len(plan_of(model)) == 0
    from powersteer.adapters.plan import _plans

    lone = randomise(BPSModel.from_unet(pipe.unet, pixel_unshuffle=4, weights="uniform"))
    with steer(pipe, lone, condition_of(0)):
        pictures(pipe)
    assert lone in _plans and len(_plans[lone]) == 3
    gc.collect()
    count = len(_plans)
    del lone
    gc.collect()
    assert len(_plans) == count - 1


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_other_schedulers_batch_equals_one_by_one(pipe, model, scheduler):
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    conditions = condition_of(6, 2)
    with steer(pipe, model, conditions):
        together = pictures(pipe, ["a fox", "the moon"])
    with steer(pipe, model, conditions[:1]):
        torch.testing.assert_close(pictures(pipe, ["a fox"]), together[:1], atol=1e-4, rtol=1e-4)


def test_image_to_image_and_inpainting(pipe, model):
    conditions = condition_of(8, 3)
    start = Image.new("RGB", (32, 32), "orange")
    mask = Image.new("L", (32, 32), 0)
    ImageDraw.Draw(mask).rectangle((0, 0, 16, 32), fill=255)
    parts = {name: part for name, part in pipe.components.items() if name != "image_encoder"}
    torch.manual_seed(0)
    shape = {name: value for name, value in pipe.unet.config.items() if not name.startswith("_")}
    nine = UNet2DConditionModel.from_config(shape | {"in_channels": 9}).eval()
    assert nine.conv_in.in_channels == 9
    for make, unet, extra in (
        (StableDiffusionImg2ImgPipeline, pipe.unet, {"strength": 0.7}),
        (StableDiffusionInpaintPipeline, pipe.unet, {"mask_image": mask, "height": 32, "width": 32}),
        (StableDiffusionInpaintPipeline, nine, {"mask_image": mask, "height": 32, "width": 32}),
    ):
        stock = make(**(parts | {"unet": unet}), requires_safety_checker=False)
        stock.set_progress_bar_config(disable=True)
        prompts = ["a fox", "the moon", "two fish"]

        def draw(rows, stock=stock, extra=extra, prompts=prompts):
            return stock(
                [prompts[i] for i in rows],
                image=[start] * len(rows),  # one for each prompt: a shared one is encoded with the first seed only
                num_inference_steps=4,
                guidance_scale=3.0,
                generator=[torch.Generator().manual_seed(i) for i in rows],
                output_type="pt",
                **extra,
            ).images

        def run(rows, stock=stock, draw=draw):
            with steer(stock, model, conditions[rows]):
                return draw(rows)

        together = run([0, 1, 2])
        for i in range(3):
            torch.testing.assert_close(run([i]), together[i : i + 1], atol=2e-4, rtol=1e-3)
        assert (draw([0, 1, 2]) - together).abs().max() > 1e-2


def test_fingerprint_refuses_another_base_unless_told_not_to(pipe, tmp_path):
    model = BPSModel.from_unet(pipe.unet, pixel_unshuffle=4, weights="uniform", prediction_type="v_prediction")
    model.save_pretrained(tmp_path)
    model = BPSModel.from_pretrained(tmp_path)
    with (
        pytest.raises(PowersteerError, match=r"trained on .*v_prediction.*this is .*epsilon.*strict_base=False"),
        steer(pipe, model, condition_of(0)),
    ):
        pass
    with steer(pipe, model, condition_of(0), strict_base=False):
        pictures(pipe)
    with steer(pipe.unet, model, condition_of(0)):  # a bare U-Net has no scheduler: nothing to compare
        pass


def test_an_adapter_of_noise_prediction_is_refused_on_a_base_of_flow_matching(pipe):
    model = BPSModel.from_unet(pipe.unet, pixel_unshuffle=4, weights="uniform", prediction_type="epsilon")
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    with (
        pytest.raises(PowersteerError, match=r"trained on .*epsilon.*this is .*flow_prediction.*strict_base=False"),
        steer(pipe, model, condition_of(0)),
    ):
        pass


def test_families_are_told_by_their_text_width():
    shape = {"block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2}
    with torch.device("meta"):
        unets = [
            UNet2DConditionModel(**shape, cross_attention_dim=width, attention_head_dim=8) for width in (768, 1024)
        ]
        model = BPSModel.from_unet(unets[0])
    assert [fingerprint(unet)["family"] for unet in unets] == ["Stable Diffusion 1.x", "Stable Diffusion 2.x"]
    with (
        pytest.raises(PowersteerError, match=r"trained on Stable Diffusion 1\.x.*this is Stable Diffusion 2\.x"),
        steer(unets[1], model, torch.rand(1, 1, 512, 512)),
    ):
        pass


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": [1.0, 2.0]}, "scale has 2 numbers for 1 networks"),
        ({"start": 0.6, "end": 0.5}, "0 ≤ start ≤ end ≤ 1"),
        ({"condition": [condition_of(0), condition_of(1)]}, "1 networks need as many conditions, not 2"),
    ],
)
def test_lists_that_do_not_fit_are_refused(pipe, model, change, message):
    arguments = {"condition": [condition_of(0)], **change}
    with pytest.raises(PowersteerError, match=message), steer(pipe, [model], **arguments):
        pass


def test_what_has_no_unet_is_refused(model):
    with (
        pytest.raises(PowersteerError, match="Linear has no denoiser to steer"),
        steer(torch.nn.Linear(2, 2), model, condition_of(0)),
    ):
        pass


def test_an_inverted_sketch_is_warned_of(pipe):
    model = BPSModel.from_unet(pipe.unet, pixel_unshuffle=4, conditioning={"kind": "sketch"})
    paper = torch.ones(1, 1, 32, 32)
    paper[..., 10:12, :] = 0
    with pytest.warns(UserWarning, match="94% of the sketch is ink, which is 1 on 0"), steer(pipe, model, paper):
        pass
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steer(pipe, model, 1 - paper).__enter__()
