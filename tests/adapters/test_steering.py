import pytest
import torch
from PIL import Image, ImageDraw

from powersteer import PowersteerError, steer
from powersteer.backbones.protocol import backbone_of
from powersteer.denoising.sampling.generate import generate
from powersteer.denoising.sampling.sample import steered_pictures
from powersteer.denoising.settings import GenerateSettings


def drawing(x: int) -> Image.Image:
    image = Image.new("L", (32, 32), 0)
    ImageDraw.Draw(image).line((x, 4, 28 - x, 28), fill=255, width=3)
    return image


def unet_inputs(batch: int = 2):
    generator = torch.Generator().manual_seed(7)
    sample = torch.randn(batch, 4, 8, 8, generator=generator)
    return sample, torch.tensor(500), torch.randn(batch, 6, 24, generator=generator)


def pictures(pipe, prompts, seeds, guidance_scale=4.0, **kwargs):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipe(
        prompts,
        num_inference_steps=3,
        guidance_scale=guidance_scale,
        generator=generators,
        output_type="pt",
        **kwargs,
    ).images


@torch.no_grad()
def test_on_off_on_and_no_trace(pipe, model):
    inputs = unet_inputs()
    before, layout = pipe.unet(*inputs).sample, repr(pipe.unet)
    condition = torch.rand(1, 1, 32, 32)
    with steer(pipe.unet, model, condition):
        first = pipe.unet(*inputs).sample
    off = pipe.unet(*inputs).sample
    with steer(pipe.unet, model, condition):
        again = pipe.unet(*inputs).sample
    assert torch.equal(before, off) and torch.equal(first, again)
    assert (first - before).abs().max() > 1e-2
    assert repr(pipe.unet) == layout
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in pipe.unet.modules())


def test_an_exception_restores_the_unet(pipe, model):
    with pytest.raises(RuntimeError), steer(pipe, model, drawing(4)):
        raise RuntimeError
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in pipe.unet.modules())


@torch.no_grad()
def test_every_resnet_and_transformer_gets_its_residual(pipe, model):
    """Layer by layer against a U-Net run by hand-written hooks that know nothing of `steer`'s bookkeeping."""
    condition = torch.rand(2, 1, 32, 32)
    inputs = unet_inputs()
    steering = model(condition, pipe.unet.time_embedding(pipe.unet.time_proj(torch.tensor([500, 500]))))
    with steer(pipe.unet, model, condition):
        wanted = pipe.unet(*inputs).sample

    def add(residual):
        return lambda _, __, out: out + residual if isinstance(out, torch.Tensor) else (out[0] + residual,)

    unet = pipe.unet
    r = steering
    plan = [
        (unet.down_blocks[0].resnets[0], r.down[0]),
        (unet.down_blocks[0].resnets[1], r.down[1]),
        (unet.down_blocks[1].resnets[0], r.down[2]),
        (unet.down_blocks[1].attentions[0], r.down[2]),
        (unet.down_blocks[1].resnets[1], r.down[3]),
        (unet.down_blocks[1].attentions[1], r.down[3]),
        (unet.mid_block.resnets[0], r.mid),
        (unet.mid_block.attentions[0], r.mid),
        (unet.mid_block.resnets[1], r.mid),
        *[(unet.up_blocks[0].resnets[i], r.up[i]) for i in range(3)],
        *[(unet.up_blocks[0].attentions[i], r.up[i]) for i in range(3)],
        *[(unet.up_blocks[1].resnets[i], r.up[3 + i]) for i in range(3)],
    ]
    assert sorted(id(layer) for _, layer in backbone_of(unet).sites()) == sorted(id(layer) for layer, _ in plan)
    for layer, residual in plan:
        layer.register_forward_hook(add(residual))
    torch.testing.assert_close(unet(*inputs).sample, wanted)


@torch.no_grad()
def test_scale_zero_is_the_prior(pipe, model):
    inputs = unet_inputs()
    with steer(pipe.unet, model, drawing(4), scale=0.0):
        steered = pipe.unet(*inputs).sample
    torch.testing.assert_close(steered, pipe.unet(*inputs).sample)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("images_per_prompt", [1, 2])
def test_a_batch_of_conditions_equals_one_by_one(pipe, model, guidance_scale, images_per_prompt):
    prompts, drawings = ["a fox", "a red house", "the moon"], [drawing(4), drawing(12), drawing(20)]
    seeds = list(range(3 * images_per_prompt))
    with steer(pipe, model, drawings):
        together = pictures(pipe, prompts, seeds, guidance_scale, num_images_per_prompt=images_per_prompt)
    alone = []
    for i, (prompt, condition) in enumerate(zip(prompts, drawings, strict=True)):
        own = seeds[i * images_per_prompt : (i + 1) * images_per_prompt]
        with steer(pipe, model, condition):
            alone.append(pictures(pipe, [prompt], own, guidance_scale, num_images_per_prompt=images_per_prompt))
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=1e-4)
    assert (together[0] - together[-1]).abs().max() > 1e-2


@torch.no_grad()
def test_the_network_runs_once_for_each_distinct_condition(pipe, model):
    rows = []
    model.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    with steer(pipe, model, drawing(4)):
        pictures(pipe, ["a fox"] * 3, [0, 1, 2])
    assert rows == [1, 1, 1]  # three steps; neither guidance nor the batch adds to it


@torch.no_grad()
def test_bare_unet_takes_both_halves_of_guidance(pipe, model):
    sample, timestep, text = unet_inputs(2)
    conditions = torch.rand(2, 1, 32, 32)
    with steer(pipe.unet, model, conditions):
        plain = pipe.unet(sample, timestep, text).sample
        halves = pipe.unet(sample.repeat(2, 1, 1, 1), timestep, text.repeat(2, 1, 1)).sample
    torch.testing.assert_close(halves, plain.repeat(2, 1, 1, 1), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_each_row_has_its_own_timestep(pipe, model):
    sample, _, text = unet_inputs(2)
    conditions, timesteps = torch.rand(2, 1, 32, 32), torch.tensor([10, 900])
    with steer(pipe.unet, model, conditions):
        together = pipe.unet(sample, timesteps, text).sample
    for i in range(2):
        with steer(pipe.unet, model, conditions[i : i + 1]):
            alone = pipe.unet(sample[i : i + 1], timesteps[i], text[i : i + 1]).sample
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=1e-4)


def test_gradients_reach_the_network_and_only_it(pipe, model):
    pipe.unet.requires_grad_(False)
    with steer(pipe.unet, model, torch.rand(2, 1, 32, 32)):
        pipe.unet(*unet_inputs()).sample.square().mean().backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or p.grad.norm() == 0)]
    assert not missing
    assert all(p.grad is None for p in pipe.unet.parameters())


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        (torch.rand(3, 1, 32, 32), "3 conditions for a U-Net batch of 4"),
        (torch.rand(1, 1, 16, 16), "the condition is 16×16 pixels, the picture 32×32"),
        (torch.rand(1, 1, 30, 30), "the condition is 30×30 pixels, the picture 32×32: resize"),
        (torch.rand(0, 1, 32, 32), r"must have shape \(N, 1, H, W\), not \(0, 1, 32, 32\)"),
        ([], "one or more pictures"),
        (torch.rand(1, 3, 32, 32), r"must have shape \(N, 1, H, W\)"),
        (torch.rand(1, 1, 32, 32) * 255, "did you forget to divide by 255"),
        (torch.full((1, 1, 32, 32), float("nan")), r"must lie in \[0, 1\]"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(pipe, model, condition, message):
    with pytest.raises(PowersteerError, match=message), steer(pipe.unet, model, condition):
        pipe.unet(*unet_inputs(4))


@pytest.mark.parametrize(("prompts", "seeds"), [([], []), (["a fox"], [0, 1])])
def test_prompts_without_a_seed_each_are_refused(pipe, model, prompts, seeds):
    with pytest.raises(PowersteerError, match=f"{len(prompts)} prompts and {len(seeds)} seeds"):
        steered_pictures(pipe, model, prompts, drawing(4), seeds=seeds)


def test_a_list_of_no_jobs_is_refused(tmp_path):
    with pytest.raises(PowersteerError, match="no prompts: give at least one"):
        generate(GenerateSettings(), [], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_too_many_conditions_for_the_prompts_are_refused(pipe, model):
    with (
        pytest.raises(PowersteerError, match="2 conditions for 3 images"),
        steer(pipe, model, [drawing(4), drawing(8)]),
    ):
        pictures(pipe, ["a fox"] * 3, [0, 1, 2])


def test_a_network_of_another_shape_is_refused(pipe):
    from diffusers import UNet2DConditionModel

    from powersteer import BPSModel

    with torch.device("meta"):
        other = BPSModel.from_unet(UNet2DConditionModel(cross_attention_dim=8, block_out_channels=(32, 64, 64, 64)))
    with (
        pytest.raises(PowersteerError, match=r"widths 32-64-64-64.*this is .*widths 16-32"),
        steer(pipe, other, torch.rand(1, 1, 32, 32)),
    ):
        pass
