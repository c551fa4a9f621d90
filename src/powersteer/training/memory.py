"""What a training step takes in memory, known without loading weights or data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from powersteer.adapters.attach import attach
from powersteer.adapters.registry import make_adapter
from powersteer.backbones.protocol import PipelineBackbone
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


@dataclass(frozen=True)
class Step:
    """What a training step is like, beside its networks."""

    batch_size: int
    """Samples of one forward pass."""
    size: tuple[int, int]
    """Height and width of the latents."""
    text_length: int = 77
    """Tokens of a prompt."""
    base_dtype: torch.dtype = torch.float32
    """Precision of the base's weights; the adapter's are float32."""
    precision: torch.dtype = torch.float32
    """Precision of autocast; float32 for none."""
    gradient_checkpointing: bool = False
    """Whether base and adapter compute their activations again on the way back."""
    gradient_accumulation: bool = False
    """Whether gradients live on from one forward pass to the next."""
    use_8bit_adam: bool = False
    """Whether the optimizer keeps two bytes a weight, not eight."""
    ema: bool = True
    """Whether a running average of the weights is kept."""
    other_base_bytes: int = 0
    """What else stays on the device: VAE, text encoder."""
    device_type: str = "cpu"
    """``cpu``, or ``cuda``: there autocast leaves the norms in float32."""


def estimate_memory(base: PipelineBackbone, network: Mapping[str, Any], step: Step) -> MemoryEstimate:
    """Take a training step with tensors that have shapes but no values, and count.

    What kernels need within one operation is left out, and so is what an allocator loses to fragments.

    Args:
        base: Its denoiser's configuration alone is read.
        network: The arguments of `powersteer.adapters.registry.make_adapter`.
        step: The step.

    Raises:
        ValueError: ``network`` is wrong; see `powersteer.adapters.registry.make_adapter`.
    """
    imagined = _Imagined(base, network, step)
    activations = imagined.peak()
    gradients = _nbytes(imagined.trained)
    count = sum(p.numel() for p in imagined.trained)
    return MemoryEstimate(
        {
            "base weights": _nbytes(imagined.module.parameters()) + step.other_base_bytes,
            "network weights": _nbytes(imagined.model.parameters()),
            "gradients": gradients,
            "optimizer": 2 * count if step.use_8bit_adam else 2 * gradients,
            "EMA": gradients if step.ema else 0,
            "activations": activations - gradients,
        }
    )


class _Imagined:
    """Networks and optimizer of fake tensors, as an update finds them."""

    def __init__(self, base: PipelineBackbone, network: Mapping[str, Any], step: Step) -> None:
        self.step, self.fake = step, FakeTensorMode(allow_non_fake_inputs=True)
        with self.fake:
            self.module = type(base.module).from_config(base.module.config)
            self.base = type(base)(self.module)
            _freeze(self.module.eval(), step.base_dtype)
            self.model = make_adapter(self.module, **network)
            self.trained = [p for p in self.model.parameters() if p.requires_grad]
            self.optimizer = None if step.use_8bit_adam else torch.optim.AdamW(self.trained, fused=True)
            if self.optimizer is not None:
                _make_state(self.optimizer, self.trained)
            if step.gradient_checkpointing:
                self.module.enable_gradient_checkpointing()
                self.model.save_activation_memory()
            if step.device_type != "cpu" and step.precision != torch.float32:
                _norms_in_float32(self.module)
                _norms_in_float32(self.model)
        channels, factor = network.get("conditioning_channels", 1), network.get("pixel_unshuffle", 8)
        height, width = step.size
        # One number in memory.
        self.condition = torch.zeros(1).expand(step.batch_size, channels, factor * height, factor * width)

    def peak(self) -> int:
        """Take an update; returns the most bytes that live beside weights and optimizer."""
        step, module, optimizer = self.step, self.module, self.optimizer
        kept = [v for state in optimizer.state.values() for v in state.values()] if optimizer is not None else []
        with ExitStack() as steering:
            # `attach` looks at the condition's values: it is real, and the block is entered outside the fake mode.
            steering.enter_context(attach(module, self.model, self.condition, plan=None))
            steering.enter_context(fast_attention(step.device_type, step.precision))
            with self.fake, TensorBytes([*module.parameters(), *self.model.parameters(), *kept]) as counted:
                # `attach` keeps a copy where the adapter is. It is seen where checkpointing saves it as an input.
                copied = None if step.gradient_checkpointing else torch.zeros(self.condition.shape)
                inputs = self.base.example(step.batch_size, step.size, step.text_length, step.base_dtype)
                target = torch.zeros(step.batch_size, module.config["out_channels"], *step.size)
                for _ in range(1 + step.gradient_accumulation):
                    with torch.autocast("cpu", step.precision, enabled=step.precision != torch.float32):
                        guess = module(**inputs).sample
                    loss = F.mse_loss(guess.float(), target)
                    loss.backward()
                steering.close()  # on recomputation its hooks were needed
                del copied
                if optimizer is not None:
                    optimizer.step()
        # The caller's own condition stays in main memory.
        return counted.peak + (self.condition.nbytes if step.device_type == "cpu" else 0)


def _freeze(denoiser: nn.Module, dtype: torch.dtype) -> None:
    for module in denoiser.modules():
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


def _nbytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.nbytes for parameter in parameters)
