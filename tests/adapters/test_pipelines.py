"""Diffusers' own pipelines and what people do to them: SDXL, LoRA, IP-Adapter, LCM, offloading, slicing, formats."""

import accelerate
import pytest
import torch
from diffusers import LatentConsistencyModelPipeline, LCMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from conftest import randomise
from powersteer import BPSModel, steer

PROMPTS = ["a fox", "the moon", "two fish"]


def conditions(count: int = 3) -> torch.Tensor:
    return torch.rand(count, 1, 32, 32, generator=torch.Generator().manual_seed(1))


def batch_equals_one_by_one(pipe, model, *, guidance_scale=3.0, **kwargs):
    """Every image follows its own condition, whatever shares its batch; returns the steered batch."""

    def run(rows, steered=True):
        with steer(pipe, model, conditions()[rows], 1.0 if steered else 0.0):
            return pipe(
                [PROMPTS[i] for i in rows],
                num_inference_steps=3,
                guidance_scale=guidance_scale,
                generator=[torch.Generator().manual_seed(i) for i in rows],
                output_type="pt",
                **kwargs,
            ).images

    together = run([0, 1, 2])
    for i in range(3):
        torch.testing.assert_close(run([i]), together[i : i + 1], atol=5e-4, rtol=1e-3)
    assert (run([0, 1, 2], steered=False) - together).abs().amax((1, 2, 3)).min() > 1e-2
    return together


def text_tower(pipe, kind, **change):
    config = dict(pipe.text_encoder.config.to_dict()) | change
    return kind(CLIPTextConfig(**config)).eval()


def test_sdxl_with_its_attention_variant(pipe):
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(2, 4),
        cross_attention_dim=48,
        norm_num_groups=8,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 20,
    ).eval()
    sdxl = StableDiffusionXLPipeline(
        vae=pipe.vae,
        text_encoder=text_tower(pipe, CLIPTextModel),
        text_encoder_2=text_tower(pipe, CLIPTextModelWithProjection, projection_dim=20),
        tokenizer=pipe.tokenizer,
        tokenizer_2=pipe.tokenizer,
        unet=unet,
        scheduler=pipe.scheduler,
        add_watermarker=False,
    )
    sdxl.set_progress_bar_config(disable=True)
    model = randomise(BPSModel.from_unet(unet, pixel_unshuffle=4, attention_head_dim=8))
    assert model.config["attention_head_dim"] == 8
    batch_equals_one_by_one(sdxl, model, height=32, width=32)


def test_lora_loaded_equals_lora_fused(pipe, model):
    peft = pytest.importorskip("peft")
    pipe.unet.add_adapter(peft.LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_v"], init_lora_weights=False))
    loaded = batch_equals_one_by_one(pipe, model)
    pipe.unet.fuse_lora()
    torch.testing.assert_close(batch_equals_one_by_one(pipe, model), loaded, atol=5e-4, rtol=1e-3)
    pipe.unet.unfuse_lora()
    pipe.unet.disable_adapters()
    assert (batch_equals_one_by_one(pipe, model) - loaded).abs().max() > 1e-2


def test_ip_adapter(pipe, model):
    torch.manual_seed(0)
    width, heads = 24, 4
    state = {"image_proj": {}, "ip_adapter": {}}
    projection = {"proj": torch.nn.Linear(16, heads * width), "norm": torch.nn.LayerNorm(width)}
    for name, layer in projection.items():
        state["image_proj"] |= {f"{name}.{key}": tensor for key, tensor in layer.state_dict().items()}
    crossing = [name for name in pipe.unet.attn_processors if "attn2" in name]
    channels = {name: pipe.unet.get_submodule(name.removesuffix(".processor")).to_k.out_features for name in crossing}
    for place, name in enumerate(crossing):
        for kind in ("to_k_ip", "to_v_ip"):
            state["ip_adapter"][f"{2 * place + 1}.{kind}.weight"] = torch.randn(channels[name], width) * 0.2
    pipe.unet._load_ip_adapter_weights([state])
    embeds = [torch.cat([torch.zeros(1, 1, 16), torch.randn(1, 1, 16)])]  # diffusers: one picture for all prompts
    with_picture = batch_equals_one_by_one(pipe, model, ip_adapter_image_embeds=embeds)
    pipe.set_ip_adapter_scale(0.0)
    assert (batch_equals_one_by_one(pipe, model, ip_adapter_image_embeds=embeds) - with_picture).abs().max() > 1e-3


def test_lcm_takes_guidance_as_an_embedding(pipe):
    torch.manual_seed(0)
    shape = {name: value for name, value in pipe.unet.config.items() if not name.startswith("_")}
    unet = UNet2DConditionModel.from_config(shape | {"time_cond_proj_dim": 16}).eval()
    assert unet.config.time_cond_proj_dim == 16
    lcm = LatentConsistencyModelPipeline(
        vae=pipe.vae,
        text_encoder=pipe.text_encoder,
        tokenizer=pipe.tokenizer,
        unet=unet,
        scheduler=LCMScheduler.from_config(pipe.scheduler.config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    lcm.set_progress_bar_config(disable=True)
    batch_equals_one_by_one(
        lcm, randomise(BPSModel.from_unet(unet, pixel_unshuffle=4)), guidance_scale=8.0, height=32, width=32
    )


def steered(unet, model, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    sample, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 24, generator=generator)
    with torch.no_grad(), steer(unet, model, conditions(2)):
        return unet(sample.to(dtype), 321, text.to(dtype)).sample.float()


@pytest.mark.parametrize(
    "arrange",
    [
        lambda unet: unet.set_attention_slice("max"),
        lambda unet: unet.to(memory_format=torch.channels_last),
        lambda unet: unet.enable_freeu(1.0, 1.0, 1.0, 1.0),
        lambda unet: accelerate.cpu_offload_with_hook(unet, "cpu"),  # what enable_model_cpu_offload does
        lambda unet: accelerate.cpu_offload(unet, "cpu"),  # and enable_sequential_cpu_offload
    ],
    ids=["attention slicing", "channels last", "freeu at one", "model offload", "sequential offload"],
)
def test_arrangements_that_change_no_result(pipe, model, arrange):
    wanted = steered(pipe.unet, model)
    arrange(pipe.unet)
    torch.testing.assert_close(steered(pipe.unet, model), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_half_precision_unet_under_networks_of_either_precision(pipe, model, dtype, error):
    wanted = steered(pipe.unet, model)
    unet = pipe.unet.to(dtype)
    for network in (model, model.to(dtype)):
        got = steered(unet, network, dtype)
        assert ((got - wanted).norm() / wanted.norm()).item() < error


@pytest.mark.parametrize(
    "in_place", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["torch.compile(unet)", "unet.compile()"]
)
def test_compiled_before_the_block_steers_within_it_only(pipe, model, in_place):
    torch.compiler.reset()
    generator = torch.Generator().manual_seed(3)
    sample, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 24, generator=generator)
    unet = pipe.unet

    @torch.no_grad()
    def outputs(denoise):
        made = [denoise(sample, 321, text).sample]
        for condition, scale in ((conditions(1), 1.0), (conditions(2), 0.5), (conditions(1), 1.0)):
            with steer(unet, model, condition, scale):
                made.append(denoise(sample, 321, text).sample)
        return [*made, denoise(sample, 321, text).sample]

    wanted = outputs(unet)
    if in_place:
        unet.compile(backend="aot_eager")
    got = outputs(unet if in_place else torch.compile(unet, backend="aot_eager"))
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert (wanted[0] - wanted[1]).abs().max() > 1e-2 and torch.equal(wanted[0], wanted[-1])
