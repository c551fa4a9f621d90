"""What a training step takes in memory, known without loading weights or data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from powersteer.adapters.attach import attach, make_adapter, save_activation_memory
from powersteer.core.hardware import fast_attention
from powersteer.core.memory import TensorBytes


@dataclass(frozen=True)
class MemoryEstimate:
    """The bytes that live at a training step's peak."""

    rows: dict[str, int]
    """base weights, network weights, gradients, optimizer, EMA; and activations: whatever else lives at the peak. They
    add up to the total. Where the peak comes before the last gradient, "activations" is so much less than there are."""

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(self.rows.values())


def estimate_memory(
    unet_config: Mapping[str, Any],
    network: Mapping[str, Any],
    *,
    batch_size: int,
    size: tuple[int, int],
    text_length: int = 77,
    base_dtype: torch.dtype = torch.float32,
    precision: torch.dtype = torch.float32,
    gradient_checkpointing: bool = False,
    gradient_accumulation: bool = False,
    use_8bit_adam: bool = False,
    ema: bool = True,
    other_base_bytes: int = 0,
    device_type: str = "cpu",
) -> MemoryEstimate:
    """Take a training step with tensors that have shapes but no values, and count.

    What kernels need within one operation is left out, and so is what an allocator loses to fragments.

    Args:
        unet_config: Of the base's `UNet2DConditionModel`.
        network: The arguments of `powersteer.adapters.attach.make_adapter`.
        batch_size: Samples of one forward pass.
        size: Height and width of the latents.
        text_length: Tokens of a prompt.
        base_dtype: Of the base's weights; the network's are float32.
        precision: Of autocast; float32 for none.
        gradient_checkpointing: Whether base and network compute their activations again on the way back.
        gradient_accumulation: Whether gradients live on from one forward pass to the next.
        use_8bit_adam: Whether the optimizer keeps two bytes a weight, not eight.
        ema: Whether a running average of the weights is kept.
        other_base_bytes: What else stays on the device: VAE, text encoder.
        device_type: ``cpu``, or ``cuda``: there autocast leaves the norms in float32.

    Raises:
        ValueError: ``network`` is wrong; see `powersteer.adapters.attach.make_adapter`.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        unet = cast(UNet2DConditionModel, UNet2DConditionModel.from_config(dict(unet_config)))
        _freeze(unet.eval(), base_dtype)
        model = make_adapter(unet, **network)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = None if use_8bit_adam else torch.optim.AdamW(trained, fused=True)
        if optimizer is not None:
            _make_state(optimizer, trained)
        if gradient_checkpointing:
            unet.enable_gradient_checkpointing()
            save_activation_memory(model)
        if device_type != "cpu" and precision != torch.float32:
            _norms_in_float32(unet)
            _norms_in_float32(model)
    channels, factor = network.get("conditioning_channels", 1), network.get("pixel_unshuffle", 8)
    height, width = size
    condition = torch.zeros(1).expand(batch_size, channels, factor * height, factor * width)  # one number in memory

    kept = [value for state in optimizer.state.values() for value in state.values()] if optimizer is not None else []
    with ExitStack() as steering:
        # `attach` looks at the condition's values: it is real, and the block is entered outside the fake mode.
        steering.enter_context(attach(unet, model, condition))
        steering.enter_context(fast_attention(device_type, precision))
        with fake, TensorBytes([*unet.parameters(), *model.parameters(), *kept]) as counted:
            inputs = _inputs(unet, batch_size, size, text_length, base_dtype)
            target = torch.zeros(batch_size, unet.config["out_channels"], *size)
            for _ in range(1 + gradient_accumulation):
                with torch.autocast("cpu", precision, enabled=precision != torch.float32):
                    guess = unet(**inputs).sample
                loss = F.mse_loss(guess.float(), target)
                loss.backward()
            steering.close()  # on recomputation its hooks were needed
            if optimizer is not None:
                optimizer.step()

    gradients = _nbytes(trained)
    optimizer_bytes = 2 * sum(p.numel() for p in trained) if use_8bit_adam else 2 * gradients
    return MemoryEstimate(
        {
            "base weights": _nbytes(unet.parameters()) + other_base_bytes,
            "network weights": _nbytes(model.parameters()),
            "gradients": gradients,
            "optimizer": optimizer_bytes,
            "EMA": gradients if ema else 0,
            "activations": counted.peak + condition.nbytes - gradients,
        }
    )


def _freeze(unet: nn.Module, dtype: torch.dtype) -> None:
    for module in unet.modules():
        # Fake parameters cannot be cast in place.
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.to(dtype), requires_grad=False))


def _norms_in_float32(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
            module.register_forward_pre_hook(_float)


def _float(_: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    return (args[0].float(),)


def _make_state(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    """What the optimizer keeps, from a first update on."""
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def _inputs(
    unet: UNet2DConditionModel, batch: int, size: tuple[int, int], text_length: int, dtype: torch.dtype
) -> dict[str, Any]:
    """The U-Net's arguments: noisy latents (B, C, h, w), timesteps (B,), text (B, tokens, width), and SDXL's."""
    config = unet.config
    width = config["encoder_hid_dim"] or config["cross_attention_dim"]
    inputs: dict[str, Any] = {
        "sample": torch.zeros(batch, config["in_channels"], *size, dtype=dtype),
        "timestep": torch.zeros(batch, dtype=torch.long),
        "encoder_hidden_states": torch.zeros(
            batch, text_length, width if isinstance(width, int) else max(width), dtype=dtype
        ),
    }
    if config["addition_embed_type"] == "text_time":
        ids = 6
        pooled = config["projection_class_embeddings_input_dim"] - ids * config["addition_time_embed_dim"]
        inputs["added_cond_kwargs"] = {
            "text_embeds": torch.zeros(batch, pooled, dtype=dtype),
            "time_ids": torch.zeros(batch, ids, dtype=dtype),
        }
    return inputs


def _nbytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.nbytes for parameter in parameters)
