"""On a GPU as on the CPU: the same pictures, the same weights, the memory that was promised. Without one, a rehearsal.

POWERSTEER_TEST_DEVICE names the device; by default the GPU where there is one. `gpu/check.py` writes the figures down.
"""

import copy
import gc
import importlib.util
import json
import math
import os
import signal

import accelerate
import pytest
import torch
import torch.nn.functional as F
from diffusers.hooks import apply_group_offloading
from torch import nn

from conftest import build_unet, by_hand, randomise
from powersteer import BPSModel, SteeringPlan, steer
from powersteer.adapters.attach import attach
from powersteer.adapters.registry import make_adapter
from powersteer.apps.bench.shapes import make_unet
from powersteer.apps.bench.turns import device_waits
from powersteer.backbones.unet import UNetBackbone
from powersteer.training import loop
from powersteer.training.memory import Step, estimate_memory
from powersteer.training.run import train
from powersteer.training.setup import autocast, base_dtype

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first product: without it, sums in any order

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("one_thread")]

LIMITS = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
ROUNDING = 1e-4
"""Of one float32 result made in two ways, relative."""


@pytest.fixture(scope="module")
def device():
    default = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(os.environ.get("POWERSTEER_TEST_DEVICE") or default)


@pytest.fixture(autouse=True)
def float32_is_float32():
    """Neither TF32 nor kernels chosen by a race."""
    switches = [(torch.backends.cuda.matmul, "allow_tf32"), (torch.backends.cudnn, "allow_tf32")]
    switches.append((torch.backends.cudnn, "benchmark"))
    before = [getattr(*switch) for switch in switches]
    for switch in switches:
        setattr(*switch, False)
    yield
    for switch, value in zip(switches, before, strict=True):
        setattr(*switch, value)


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def needs_gpu(device, what):
    if device.type != "cuda":
        pytest.skip(f"{what} needs a GPU")


def relative(got, wanted):
    """‖got − wanted‖ / ‖wanted‖; NaN where there is one."""
    got, wanted = got.double().cpu(), wanted.double().cpu()
    return ((got - wanted).norm() / wanted.norm()).item()


def worst(values):
    """The largest; NaN where there is one."""
    return torch.tensor(list(values)).max().item()


def to_device(module, device, dtype=torch.float32):
    return nn.Module.to(module, device, dtype)


# The steered U-Net


SHAPES = {"tiny": (8, 6, 24), "wide": (16, 77, 96)}
"""Of what a U-Net reads: side of the latents, tokens, text width."""


def unet_of(shape):
    side, _, width = SHAPES[shape]
    wide = {"block_out_channels": (64, 128), "attention_head_dim": 4, "norm_num_groups": 16}
    return build_unet(sample_size=side, cross_attention_dim=width, **(wide if shape == "wide" else {}))


def cases(shape):
    """Latents, timesteps, text and conditions: guidance's batch of two, then of two pictures at their own timesteps."""
    side, tokens, width = SHAPES[shape]
    generator = torch.Generator().manual_seed(7)
    for timesteps in ([1], [250], [501], [980], [20, 700, 20, 700]):
        pictures = max(1, len(timesteps) // 2)
        sample = torch.randn(pictures, 4, side, side, generator=generator).repeat(2, 1, 1, 1)
        text = torch.randn(2 * pictures, tokens, width, generator=generator)
        condition = torch.rand(pictures, 1, 4 * side, 4 * side, generator=generator)
        yield sample, torch.tensor(timesteps if pictures > 1 else timesteps[0]), text, condition


@torch.no_grad()
@pytest.mark.parametrize("dtype", LIMITS, ids=["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["paper", "lite", "controlnet"])
@pytest.mark.parametrize("shape", ["tiny", pytest.param("wide", marks=pytest.mark.slow)])
def test_the_steered_unet_is_that_of_the_cpu(device, record_property, shape, kind, dtype):
    unet = unet_of(shape)
    torch.manual_seed(1)
    network = randomise(make_adapter(unet, preset=kind, pixel_unshuffle=4))
    if kind == "controlnet":  # of whose output else a hundredth follows the condition
        network.controlnet_cond_embedding.conv_out.weight.data *= 30
    wanted = [by_hand(unet, network, *case) for case in cases(shape)]
    prior = [unet(*case[:3]).sample for case in cases(shape)]
    inverted = [by_hand(unet, network, *case[:3], 1 - case[3]) for case in cases(shape)]
    to_device(unet, device, dtype)
    to_device(network, device, dtype)
    got = []
    for sample, timestep, text, condition in cases(shape):
        with attach(unet, network, condition):
            got.append(unet(sample.to(device, dtype), timestep.to(device), text.to(device, dtype)).sample)
    error = worst(map(relative, got, wanted))
    steering, condition = (-worst(-one for one in map(relative, other, wanted)) for other in (prior, inverted))
    record_property("relative_error", error)
    record_property("least_share_of_steering", steering)
    record_property("least_share_of_the_condition", condition)
    assert all(one.dtype == dtype and one.device.type == device.type for one in got)
    assert steering > 0.1 and condition > 0.1  # else the error says nothing of them
    assert error < LIMITS[dtype]


@torch.no_grad()
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("kind", ["paper", "lite", "controlnet"])
def test_untrained_under_autocast_is_exactly_the_prior(device, record_property, kind, precision):
    """As a run in half precision begins: the base in what `powersteer.training.setup` makes it there."""
    unet = unet_of("tiny")
    torch.manual_seed(1)
    network = to_device(make_adapter(unet, preset=kind, pixel_unshuffle=4), device)
    frozen = base_dtype(precision, device.type)
    to_device(unet, device, frozen)
    errors = []
    for sample, timestep, text, condition in cases("tiny"):
        given = sample.to(device, frozen), timestep.to(device), text.to(device, frozen)
        with autocast(device.type, precision):
            prior = unet(*given).sample
            with attach(unet, network, condition):
                errors.append(relative(unet(*given).sample, prior))
    record_property("relative_error", worst(errors))
    assert worst(errors) == 0


# Pictures: plans, offloading


@pytest.fixture
def drawing():
    return torch.rand(1, 1, 32, 32, generator=torch.Generator().manual_seed(3))


def pictures(pipe, model, condition, prompts=("a fox",), **steering):
    with steer(pipe, model, condition, **steering):
        made = pipe(
            list(prompts),
            num_inference_steps=3,
            guidance_scale=4.0,
            generator=[torch.Generator().manual_seed(seed) for seed in range(len(prompts))],
            output_type="pt",
        ).images
    assert made.isfinite().all() and made.std() > 0.01
    return made.float().cpu()


def evaluations_of(model):
    calls = []
    model.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    return calls


@pytest.mark.parametrize(
    ("network_at", "plan_at"),
    [("device", "device"), ("device", "cpu"), ("cpu", "cpu")],
    ids=["plan on the device", "plan on the CPU", "network and plan on the CPU"],
)
def test_a_plan_changes_no_picture(device, pipe, model, drawing, record_property, network_at, plan_at):
    pipe.to(device)
    to_device(model, device)
    there = pictures(pipe, model, drawing, plan=None)
    to_device(model, "cpu" if network_at == "cpu" else device)
    wanted = pictures(pipe, model, drawing, plan=None)
    plan, calls = SteeringPlan(device="cpu" if plan_at == "cpu" else None), evaluations_of(model)
    cold = pictures(pipe, model, drawing, plan=plan)
    assert len(calls) == 3
    warm = pictures(pipe, model, drawing, plan=plan)
    assert len(calls) == 3  # the second picture cost none
    kept = {one.device.type for steps in plan._kept.values() for residuals in steps.values() for one in residuals}
    assert kept == {"cpu" if plan_at == "cpu" else device.type}
    pictures(pipe, model, drawing, ("a fox", "the moon"), plan=plan)
    record_property("bit_for_bit", torch.equal(cold, wanted) and torch.equal(warm, wanted))
    record_property("cold_from_none", relative(cold, wanted))
    record_property("warm_from_none", relative(warm, wanted))
    record_property("network_elsewhere", relative(wanted, there))
    record_property("evaluations_for_a_larger_batch", len(calls) - 3)  # 0 where its time embedding has the same bits
    assert relative(pictures(pipe, model, drawing, scale=0.0), wanted) > 10 * ROUNDING
    assert relative(wanted, there) < ROUNDING
    # Copies change no bit. On a CPU nothing else does; a GPU's libraries promise no more than rounding.
    assert worst([relative(cold, wanted), relative(warm, wanted)]) <= (0 if device.type == "cpu" else ROUNDING)
    assert torch.equal(warm, cold) or device.type == "cuda"


def group(pipe, device, **how):
    pipe.to(device)
    apply_group_offloading(pipe.unet, onload_device=device, offload_device=torch.device("cpu"), **how)


@pytest.mark.parametrize(
    ("arrange", "needs"),
    [
        (lambda pipe, device: pipe.enable_model_cpu_offload(device=device), "enable_model_cpu_offload"),
        (lambda pipe, device: accelerate.cpu_offload(pipe.to(device).unet, device), None),
        (lambda pipe, device: group(pipe, device, offload_type="block_level", num_blocks_per_group=1), None),
        (lambda pipe, device: group(pipe, device, offload_type="leaf_level"), None),
        (lambda pipe, device: group(pipe, device, offload_type="leaf_level", use_stream=True), "a stream of its own"),
    ],
    ids=["model", "sequential", "groups of blocks", "groups of leaves", "groups of leaves, streamed"],
)
def test_offloading_changes_no_picture(device, pipe, model, drawing, record_property, arrange, needs):
    if needs is not None:
        needs_gpu(device, needs)
    to_device(model, device)
    offloaded = copy.deepcopy(pipe)
    pipe.to(device)
    wanted = pictures(pipe, model, drawing, plan=None)
    arrange(offloaded, device)
    plan = SteeringPlan()
    first, second = (pictures(offloaded, model, drawing, plan=plan) for _ in range(2))
    error = worst([relative(first, wanted), relative(second, wanted)])
    record_property("bit_for_bit", torch.equal(first, wanted) and torch.equal(second, wanted))
    record_property("relative_error", error)
    assert relative(pictures(pipe, model, drawing, scale=0.0), wanted) > 10 * ROUNDING
    assert error < ROUNDING


@pytest.mark.slow
@pytest.mark.parametrize("place", ["before the block", "within the block"])
@torch.no_grad()
def test_a_compiled_unet_is_steered_as_the_eager_one(device, record_property, place):
    torch.compiler.reset()
    unet = build_unet(layers_per_block=1)  # compiled in seconds
    torch.manual_seed(1)
    model = to_device(randomise(BPSModel.from_unet(unet, pixel_unshuffle=4)), device)
    to_device(unet, device)
    sample, timestep, text, condition = next(cases("tiny"))
    given = sample.to(device), timestep.to(device), text.to(device)

    def outputs(*, compiled):
        # As diffusers recommends it; on a GPU, with its graphs.
        how = {"fullgraph": True, "mode": "reduce-overhead"}
        denoise = torch.compile(unet, **how) if compiled and place == "before the block" else unet
        made = [denoise(*given).sample.clone()]
        for drawing in (condition, 1 - condition):
            with steer(denoise, model, drawing):
                if compiled and place == "within the block" and denoise is unet:
                    denoise = torch.compile(unet)
                made.append(denoise(*given).sample.clone())
        return [*made, denoise(*given).sample]

    wanted, got = outputs(compiled=False), outputs(compiled=True)
    error = worst(map(relative, got, wanted))
    record_property("relative_error", error)
    record_property("graphs", torch._dynamo.utils.counters["stats"]["unique_graphs"])
    bare, first, second, again = wanted
    assert relative(first, bare) > 0.1 and relative(second, first) > 0.1 and torch.equal(again, bare)
    assert error < ROUNDING


# Training


def weights(folder):
    return BPSModel.from_pretrained(folder).state_dict()


def log_of(config):
    return [json.loads(line) for line in (config.output_dir / "log.jsonl").read_text().splitlines()]


def state_of(config):
    """Everything a run's last checkpoint keeps, flat, and the best weights."""
    folder = config.output_dir / f"checkpoint-{config.max_train_steps}"
    kept = torch.load(folder / "training.pt", weights_only=True)
    optimizer = {f"{i}.{part}": t for i, parts in kept["optimizer"]["state"].items() for part, t in parts.items()}
    average = {f"average.{i}": t for i, t in enumerate(kept["average"]["shadow_params"])}
    scaler = {f"scaler.{name}": torch.as_tensor(value) for name, value in kept["scaler"].items()}
    best = {f"best.{name}": t for name, t in weights(config.output_dir).items()}
    return optimizer | average | scaler | best | weights(folder)


def train_in_two(config):
    """Ctrl-C in the fourth update, then the same command again."""
    real, calls = loop.squared_errors, []

    def interrupting(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "squared_errors", interrupting)
        first = train(config)
    assert first.interrupted and first.step == 4
    second = train(config)
    assert second.step == config.max_train_steps and not second.interrupted


def run_of(device, config, **change):
    """A short run, with chance on the device: drop-out."""
    if change.get("mixed_precision") == "fp16":
        needs_gpu(device, "training in fp16")
    short = {"max_train_steps": 6, "validation_steps": 6, "checkpointing_steps": 3}
    few = {"max_train_samples": 8, "max_validation_samples": 4}
    return config.model_copy(update={**short, **few, "dropout": 0.1, **change})


def resumed(whole, tmp_path):
    """The largest difference between a run and one in two halves; the logs of both."""
    halves = whole.model_copy(update={"output_dir": tmp_path / "halves"})
    train(whole)
    train_in_two(halves)
    wanted, got = state_of(whole), state_of(halves)
    assert wanted.keys() == got.keys() and wanted["mid_output.weight"].abs().max() > 1e-4
    logs = [[{k: v for k, v in row.items() if k != "seconds"} for row in log_of(run)] for run in (whole, halves)]
    return worst((got[name].double() - tensor.double()).abs().max().item() for name, tensor in wanted.items()), logs


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_resumed_run_is_the_uninterrupted_one(device, config, deterministic, tmp_path, record_property, precision):
    difference, logs = resumed(run_of(device, config, mixed_precision=precision), tmp_path)
    record_property("largest_difference", difference)
    assert difference == 0 and logs[0] == logs[1]


def test_a_resumed_run_with_kernels_as_they_come(device, config, tmp_path, record_property):
    """How far off it is for those who ask torch for nothing: recorded, for a GPU promises nothing here."""
    needs_gpu(device, "a kernel that sums in any order")
    difference, _ = resumed(run_of(device, config), tmp_path)
    record_property("largest_difference", difference)
    assert math.isfinite(difference)


@pytest.mark.parametrize(
    "change",
    [
        {"mixed_precision": "bf16"},
        {"mixed_precision": "fp16"},
        {"mixed_precision": "bf16", "network": "controlnet"},
        {"mixed_precision": "fp16", "network": "controlnet"},
        {"use_8bit_adam": True},
    ],
    ids=["bf16", "fp16", "controlnet in bf16", "controlnet in fp16", "8-bit AdamW"],
)
def test_sparing_ways_to_train(device, config, record_property, change):
    if "use_8bit_adam" in change:
        if importlib.util.find_spec("bitsandbytes") is None:
            pytest.skip("bitsandbytes is not installed")
        needs_gpu(device, "8-bit AdamW")
    if "network" in change:
        needs_gpu(device, "ControlNet's training on a base in half precision")
        change = {**change, "weights": "head-heavy", "dropout": 0.0}  # the defaults: these are BPS's own
    run = run_of(device, config, max_train_steps=8, validation_steps=4, **change)
    result = train(run)
    rows = log_of(run)
    losses, held_out = [row["loss"] for row in rows[1:]], [row["steered"] for row in rows]
    record_property("losses", losses)
    record_property("held_out_losses", held_out)
    assert result.step == 8 and len(losses) == 2
    assert all(math.isfinite(loss) for loss in [*losses, *held_out])
    assert held_out[-1] != held_out[0]  # the weights moved


# Cost


@torch.no_grad()
def test_how_often_a_step_waits_for_the_device(device, pipe, model, drawing, record_property):
    needs_gpu(device, "counting waits")
    unet = to_device(pipe.unet, device)
    to_device(model, device)
    sample, timestep, text, _ = next(cases("tiny"))
    given = sample.to(device), timestep.to(device), text.to(device)

    def denoise():
        return unet(*given)

    denoise()
    bare = device_waits(denoise, "cuda")
    record_property("waits_of_the_bare_unet", bare)
    plans = {"device_waits": SteeringPlan(), "device_waits_plan_on_cpu": SteeringPlan(device="cpu")}
    for name, plan in {**plans, "device_waits_without_a_plan": None}.items():
        with steer(unet, model, drawing, plan=plan):
            denoise()
            steered = device_waits(denoise, "cuda")
        record_property(name, steered - bare)
        assert steered >= bare
    with steer(unet, model, drawing, plan=plans["device_waits"]):
        record_property("device_waits_of_a_block's_first_step", device_waits(denoise, "cuda") - bare)
    record_property("device_waits_of_opening_a_block", device_waits(steer(unet, model, drawing).__enter__, "cuda"))


def library_memory(device):
    """Bytes in use once libraries have taken what they keep from their first call on."""
    one = torch.ones(8, 8, device=device)
    for matrix in (one, one.bfloat16()):
        F.linear(matrix, matrix, matrix[0])
        F.conv2d(matrix[None, None], matrix[None, None])
    del one, matrix
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "checkpointing"),
    [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)],
    ids=["float32", "bfloat16", "bfloat16, checkpointing"],
)
def test_a_training_step_takes_the_memory_estimated(device, record_property, precision, checkpointing):
    """Of Stable Diffusion 1.5's shape; what a CPU takes is in test_memory.py."""
    needs_gpu(device, "an allocator that keeps count")
    before, batch = library_memory(device), 8
    with torch.device(device):
        unet, factor = make_unet("sd15")
        model = BPSModel.from_unet(unet, pixel_unshuffle=factor).train()
    to_device(unet.requires_grad_(False).eval(), device, precision)
    if checkpointing:
        unet.enable_gradient_checkpointing()
        model.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    side, width = unet.config.sample_size, unet.config.cross_attention_dim
    for _ in range(2):  # the second finds the optimizer's state there
        torch.cuda.reset_peak_memory_stats()
        condition = torch.rand(batch, 1, factor * side, factor * side)
        noisy = torch.randn(batch, 4, side, side, device=device, dtype=precision)
        text = torch.randn(batch, 77, width, device=device, dtype=precision)
        with attach(unet, model, condition):
            with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                guess = unet(noisy, torch.arange(batch, device=device), text).sample
            F.mse_loss(guess.float(), torch.randn(noisy.shape, device=device)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    taken = torch.cuda.max_memory_allocated() - before
    estimate = estimate_memory(
        UNetBackbone(unet),
        {"pixel_unshuffle": factor},
        Step(
            batch_size=batch,
            size=(side, side),
            base_dtype=precision,
            precision=precision,
            gradient_checkpointing=checkpointing,
            ema=False,
            device_type=device.type,
        ),
    )
    record_property("bytes_taken", taken)
    for name, count in {**estimate.rows, "total": estimate.total}.items():
        record_property(f"estimated: {name}", count)
    record_property("taken_to_estimated", taken / estimate.total)
    assert taken == pytest.approx(estimate.total, rel=0.15)
