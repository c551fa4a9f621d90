"""What moves the weights, and their running average."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from diffusers.training_utils import EMAModel

from powersteer.adapters.bps.model import BPSModel
from powersteer.adapters.bps.presets import integration_weights
from powersteer.adapters.protocol import Adapter
from powersteer.core.errors import PowersteerError
from powersteer.training.config import TrainConfig
from powersteer.training.sharding import dealt


def make_optimizer(config: TrainConfig, network: Adapter) -> torch.optim.Optimizer:
    """AdamW on the network's trainable weights, in 8 bits where asked for.

    Raises:
        PowersteerError: 8-bit AdamW is asked for and bitsandbytes or a GPU is missing.
    """
    kind: Any = partial(torch.optim.AdamW, fused=True)
    if config.use_8bit_adam:
        if importlib.util.find_spec("bitsandbytes") is None or not torch.cuda.is_available():
            raise PowersteerError("use_8bit_adam=true needs a GPU and bitsandbytes (pip install bitsandbytes)")
        kind = importlib.import_module("bitsandbytes").optim.AdamW8bit
    return kind(
        _groups(config, network),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.adam_weight_decay,
    )


def _groups(config: TrainConfig, network: Adapter) -> list[dict[str, Any]]:
    """The trainable weights; first those of the plain rate, then one group for each port with a rate of its own."""
    rest = {name: p for name, p in network.named_parameters() if p.requires_grad}
    if config.port_learning_rates == "same" or not isinstance(network, BPSModel):
        return [{"params": list(rest.values())}]
    depths = network.config["layers_per_block"]
    down, mid, up = integration_weights(config.port_learning_rates, len(depths))
    factors = {"mid_output": mid} | {f"up_outputs.{i}": up for i in range(len(network.up_outputs))}
    by_layer = [weight for weight, depth in zip(down, depths, strict=True) for _ in range(depth)]
    factors |= {f"down_outputs.{i}": weight for i, weight in enumerate(by_layer)}
    ports: list[dict[str, Any]] = []
    for port, factor in factors.items():
        params = [rest.pop(f"{port}.{kind}") for kind in ("weight", "bias")]
        # AdamW shrinks a weight by rate times decay: the port is to forget no faster than the others.
        rates = {"lr": config.learning_rate * factor, "weight_decay": config.adam_weight_decay / factor}
        ports.append({"params": params, **rates})
    return [{"params": list(rest.values())}, *ports]


class Average:
    """The running average of the weights, which is what is validated and kept; without a decay, they are themselves.

    Args:
        parameters: The weights.
        decay: Of the average, reached after a warm-up; None for no average.
        device: Where it is kept.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], decay: float | None, device: torch.device) -> None:
        self._ema = None if decay is None else EMAModel(parameters, decay=decay, use_ema_warmup=True, power=0.75)
        self._device = device
        if self._ema is not None:
            self._ema.to(device)

    def step(self, parameters: list[torch.nn.Parameter]) -> None:
        """After an update."""
        if self._ema is not None:
            self._ema.step(parameters)

    @contextmanager
    def applied(self, parameters: list[torch.nn.Parameter]) -> Generator[None]:
        """Within the block, the weights are their average."""
        if self._ema is None:
            yield
            return
        self._ema.store(parameters)
        self._ema.copy_to(parameters)
        try:
            yield
        finally:
            self._ema.restore(parameters)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""
        return {} if self._ema is None else self._ema.state_dict()

    def load_state_dict(self, state: dict[str, Any], parameters: list[torch.nn.Parameter]) -> None:
        """Go on from a saved state."""
        if self._ema is not None:
            weights = [dealt(w, p) for w, p in zip(state["shadow_params"], parameters, strict=True)]
            self._ema.load_state_dict({**state, "shadow_params": weights})
            self._ema.to(self._device)
