"""Memory: counted bytes are closed forms, and a step that was only imagined takes what a real one takes."""

from contextlib import nullcontext

import psutil
import pytest
import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from diffusers import UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode

from conftest import build_pipe
from powersteer import BPSModel, load_base, steer
from powersteer.backbones.unet import UNetBackbone
from powersteer.core.hardware import fast_attention
from powersteer.core.memory import TensorBytes
from powersteer.training.memory import Step, estimate_memory

pytestmark = pytest.mark.usefixtures("one_thread")
NETWORK = {"pixel_unshuffle": 4, "conditioning_channels": 3}


@pytest.fixture(scope="module")
def unet():
    return build_pipe().unet.requires_grad_(False)


@pytest.fixture(params=[nullcontext, FakeTensorMode], ids=["real", "fake"])
def mode(request):
    return request.param()


def test_counted_bytes_are_a_closed_form(mode):
    with mode:
        weight = torch.ones(1000)
        with TensorBytes([weight]) as counted:
            x = torch.zeros(1000)  # 4,000 bytes live
            y = x * 2  # 8,000
            del x
            z = y.view(10, 100).to(torch.bfloat16)  # 6,000: a view is no new storage
            del y
            weight.mul_(2)
            torch.zeros(500)  # 4,000
            assert (counted.now, counted.peak) == (2000, 8000)
            del z
            torch.zeros(3000)
        assert (counted.now, counted.peak) == (0, 12000)


def test_what_autograd_makes_is_counted(mode):
    with mode:
        weight = torch.ones(1000, requires_grad=True)
        with TensorBytes([weight]) as counted:
            y = (weight.sin() * 3).sum()  # sin, its multiple; then a number, when the first is gone
            assert (counted.now, counted.peak) == (4, 8000)
            y.backward()
            # The number and its gradient, expanded without memory; 3 times that; cos(weight); their product.
            assert (counted.now, counted.peak) == (4 + 4000, 4 + 4 + 12000)
            del y
        assert counted.now == 4000


def real_peak(unet, batch_size, size, precision, gradient_checkpointing, gradient_accumulation):
    """Bytes of the training loop's second update, beyond the weights and what the first one left behind."""
    model = BPSModel.from_unet(unet, **NETWORK)
    for module in (unet, model):
        (module.enable_gradient_checkpointing if gradient_checkpointing else module.disable_gradient_checkpointing)()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def update():
        condition = torch.rand(batch_size, 3, 4 * size[0], 4 * size[1])
        noisy, target = torch.randn(2, batch_size, 4, *size)
        text, timesteps = torch.randn(batch_size, 12, 24), torch.arange(batch_size)
        for _ in range(1 + gradient_accumulation):
            with steer(unet, model, condition), fast_attention("cpu", precision):
                with torch.autocast("cpu", precision, enabled=precision != torch.float32):
                    guess = unet(noisy, timesteps, text).sample
                F.mse_loss(guess.float(), target).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    update()
    state = [value for values in optimizer.state.values() for value in values.values()]
    with TensorBytes([*unet.parameters(), *model.parameters(), *state]) as counted:
        update()
    return counted.peak


def estimate(unet, batch_size=1, size=(32, 32), **options):
    return estimate_memory(UNetBackbone(unet), NETWORK, Step(batch_size, size, text_length=12, **options))


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("accumulation", [False, True], ids=["", "accumulation"])
def test_an_imagined_step_takes_what_a_real_one_takes(unet, accumulation, checkpointing, precision):
    options = {"gradient_checkpointing": checkpointing, "gradient_accumulation": accumulation, "precision": precision}
    rows = estimate(unet, 2, **options).rows
    real = real_peak(unet, 2, (32, 32), **options)
    assert rows["gradients"] + rows["activations"] == pytest.approx(real, rel=0.01)


def test_the_update_takes_no_room_of_its_own(unet):
    options = {"gradient_checkpointing": True, "gradient_accumulation": False, "precision": torch.float32}
    rows = estimate(unet, size=(4, 4), **options).rows
    assert rows["gradients"] + rows["activations"] == pytest.approx(real_peak(unet, 1, (4, 4), **options), rel=0.01)
    largest = max(p.nbytes for p in BPSModel.from_unet(unet, **NETWORK).parameters())
    assert rows["activations"] < 2 * largest  # what the update of one weight after the other would take


def test_rows_are_closed_forms_and_add_up(unet):
    base = sum(p.numel() for p in unet.parameters())
    model = BPSModel.from_unet(unet, **NETWORK)
    all_of_it = model.num_parameters()
    trained = model.num_parameters(only_trainable=True)
    full = estimate(unet, other_base_bytes=1000)
    activations = full.rows["activations"]
    assert full.rows == {
        "base weights": 4 * base + 1000,
        "network weights": 4 * all_of_it,
        "gradients": 4 * trained,
        "optimizer": 8 * trained,
        "EMA": 4 * trained,
        "activations": activations,
    }
    assert full.total == 4 * base + 1000 + 4 * all_of_it + 16 * trained + activations
    small = estimate(unet, base_dtype=torch.bfloat16, precision=torch.bfloat16, use_8bit_adam=True, ema=False).rows
    assert small["base weights"] == 2 * base and small["network weights"] == 4 * all_of_it
    assert small["optimizer"] == 2 * trained and small["EMA"] == 0
    assert small["activations"] < activations
    more = estimate_memory(UNetBackbone(unet), {**NETWORK, "trainable_weights": True}, Step(1, (32, 32)))
    assert more.rows["gradients"] == 4 * all_of_it


def test_activations_follow_batch_and_checkpointing(unet):
    once, twice = (sum(estimate(unet, n).rows[row] for row in ("gradients", "activations")) for n in (1, 2))
    assert twice == pytest.approx(2 * once, rel=0.01)
    sparing = estimate(unet, gradient_checkpointing=True).rows["activations"]
    assert sparing < 0.5 * estimate(unet).rows["activations"]


def test_on_a_gpu_autocast_leaves_the_norms_in_float32(unet):
    for checkpointing in (False, True):
        there, here = (
            estimate(
                unet,
                batch_size=4,
                precision=torch.bfloat16,
                base_dtype=torch.bfloat16,
                gradient_checkpointing=checkpointing,
                device_type=device_type,
            )
            for device_type in ("cuda", "cpu")
        )
        assert 1.1 < there.rows["activations"] / here.rows["activations"] < 2


def test_bases_that_need_more_than_text(unet):
    extra = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 80,
    }
    sdxl = {name: value for name, value in unet.config.items() if not name.startswith("_")} | extra
    network = NETWORK | {"attention_head_dim": 8}
    rows = estimate_memory(UNetBackbone(UNet2DConditionModel(**sdxl)), network, Step(1, (32, 32), text_length=12)).rows
    plain = estimate(unet).rows
    assert rows["network weights"] > plain["network weights"] and rows["activations"] > plain["activations"]
    # 80 features of size, place and pooled text, embedded in 64.
    assert rows["base weights"] - plain["base weights"] == 4 * (80 * 64 + 64 + 64 * 64 + 64)
    tiny = load_base().unet
    rows = estimate_memory(UNetBackbone(tiny), {"pixel_unshuffle": 4}, Step(2, (16, 16))).rows
    assert rows["base weights"] == 4 * tiny.num_parameters() and rows["activations"] > 0


def test_nothing_is_loaded_nor_drawn():
    state, memory = torch.get_rng_state(), psutil.Process().memory_info().rss
    with init_empty_weights():
        sd15 = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    found = estimate_memory(UNetBackbone(sd15), {}, Step(16, (64, 64), gradient_checkpointing=True))
    assert found.rows["base weights"] == 4 * 859_520_964 and found.total > 16e9
    assert psutil.Process().memory_info().rss - memory < 0.5e9
    assert torch.equal(state, torch.get_rng_state())


def test_a_wrong_network_is_refused(unet):
    with pytest.raises(ValueError, match="there is no network 'large'"):
        estimate_memory(UNetBackbone(unet), {"preset": "large"}, Step(1, (8, 8)))


def test_attention_in_float32_compiles():
    def attend(x):
        return F.scaled_dot_product_attention(x, x, x)

    plain, x = F.scaled_dot_product_attention, torch.randn(1, 2, 5, 8).bfloat16()
    torch._dynamo.reset()
    with fast_attention("cpu", torch.bfloat16):
        made = torch.compile(attend, backend="eager")(x)
    assert F.scaled_dot_product_attention is plain and made.dtype == torch.bfloat16
    assert torch.equal(made, plain(x.float(), x.float(), x.float()).bfloat16())
