"""The parts of a run, made from its configuration: read once, then passed on."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import ProjectConfiguration

from powersteer.adapters.attach import check_fits
from powersteer.adapters.bps.model import BPSModel
from powersteer.adapters.load import load_network
from powersteer.adapters.protocol import Adapter
from powersteer.adapters.registry import class_of, make_adapter
from powersteer.backbones.protocol import PipelineBackbone, base_of
from powersteer.conditions.kind import BLIND, KINDS
from powersteer.core.errors import PowersteerError
from powersteer.core.hardware import native_precision
from powersteer.data.conditioning import DATASET_FILE, Conditioning, conditioning_of
from powersteer.data.contents import Contents
from powersteer.data.encode import EncodedPairs, Sample, TextStates
from powersteer.data.layouts import Columns, hub_rows
from powersteer.data.order import Share
from powersteer.data.pairs import Pairs, Size, Views, bucket_sizes
from powersteer.data.splits import is_held_out
from powersteer.denoising.heldout import Autocast, HeldOut
from powersteer.denoising.objective import Objective, TimeSampler, objective_of
from powersteer.training.config import NETWORK_KEYS, TrainConfig
from powersteer.training.monitor import check_trackers
from powersteer.training.sharding import share_out

PROBE = 64
"""Training pairs that are watched on fixed noise."""


class Source(Protocol):
    """What is trained on: `EncodedPairs`, or `powersteer.data.stream.StreamedPairs`."""

    @property
    def probe(self) -> EncodedPairs:
        """Some of the pairs, to be watched on fixed noise."""
        ...

    def micro_batches(self, share: Share, seed: int, first: int, workers: int) -> Iterator[list[Sample]]:
        """This process's samples of each accumulation step, from update ``first`` on, without end."""
        ...

    def latents(self, samples: Sequence[Sample]) -> torch.Tensor:
        """(N, C, h, w)."""
        ...

    def texts(self, prompts: Sequence[str]) -> TextStates:
        """Text states of prompts."""
        ...


@dataclass(frozen=True)
class Setup:
    """What a configuration comes to on a base."""

    config: TrainConfig
    objective: Objective
    sampler: TimeSampler
    """Draws the times to train at."""
    conditioning: Conditioning
    columns: Columns
    """What the data calls its columns."""
    precision: str
    """``no``, ``bf16`` or ``fp16``."""
    size: Size
    """Pixels (height, width) to train at."""
    size_step: int
    """What both must be multiples of."""
    vae_scale_factor: int

    @classmethod
    def of(cls, config: TrainConfig, pipe: Any) -> Setup:
        """Read a configuration for a base: a pipeline, or what `powersteer.backbones.load.imagine_base` gives.

        Raises:
            PowersteerError: The base cannot be trained on so, or the data contradicts the configuration.
        """
        base, objective = base_of(pipe), objective_of(pipe.scheduler)
        return cls(
            config,
            objective,
            objective.sampler(config.log_snr_share, config.weighting_scheme),
            conditioning(config),
            columns_of(config),
            precision_of(config),
            picture_size(config, base),
            base.step,
            base.factor,
        )

    @property
    def latents(self) -> tuple[int, int]:
        """Height and width of the latents."""
        return self.size[0] // self.vae_scale_factor, self.size[1] // self.vae_scale_factor

    @property
    def network(self) -> dict[str, Any]:
        """The arguments of `powersteer.adapters.registry.make_adapter` for a new network."""
        config, given = self.config, self.conditioning
        own_widths = {"hidden_channels": config.hidden_channels, "up_channels": config.up_channels}
        return {
            "conditioning_channels": given.channels,
            "pixel_unshuffle": 1 if KINDS.find(given.kind).at_latents else self.vae_scale_factor,
            "preset": config.network,
            "weights": config.weights,
            "prediction_type": self.objective.prediction_type,
            "conditioning": given.record,
            "dropout": config.dropout,
            "trainable_weights": config.trainable_weights,
            "ablation": config.ablation,
            **{name: widths for name, widths in own_widths.items() if widths is not None},
        }


@dataclass(frozen=True)
class Run:
    """A training run, put together."""

    setup: Setup
    accelerator: Accelerator
    base: PipelineBackbone
    """The frozen base, on its device."""
    network: Adapter
    """The adapter that is trained."""
    pairs: Source
    held_out: HeldOut | None
    """Where the best weights are chosen."""

    @property
    def config(self) -> TrainConfig:
        """The configuration of the run."""
        return self.setup.config

    @property
    def objective(self) -> Objective:
        """What the base was trained to do."""
        return self.setup.objective

    @property
    def autocast(self) -> Autocast:
        """Makes the context that the run computes in."""
        return partial(autocast, self.accelerator.device.type, self.setup.precision)


def make_accelerator(config: TrainConfig) -> Accelerator:
    """The processes and the precision of a run.

    Raises:
        PowersteerError: The precision is not one of this machine, or a tracker is not installed.
    """
    # Accelerate keeps the first precision for the whole process; an earlier run here may have had another.
    AcceleratorState._reset_state()  # pyright: ignore[reportPrivateUsage]
    precision = precision_of(config)
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    if deepspeed and precision == "fp16":
        raise PowersteerError("mixed_precision=fp16 is not possible with DeepSpeed: give bf16 or no")
    trackers: Any = check_trackers(config.report_to)
    logs = str(config.output_dir / "logs")
    try:
        accelerator = Accelerator(
            mixed_precision="no" if deepspeed else precision,  # its own half precision would halve the weights, too
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            log_with=trackers or None,
            project_config=ProjectConfiguration(project_dir=str(config.output_dir), logging_dir=logs),
        )
    except ValueError as error:
        raise PowersteerError(f"mixed_precision={precision} is not possible here: {error}") from None
    if deepspeed:
        share_out(accelerator, config, autocast_dtype(precision))
    return accelerator


def precision_of(config: TrainConfig) -> str:
    """``no``, ``bf16`` or ``fp16``."""
    if config.mixed_precision != "auto":
        return config.mixed_precision
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "no"}[native_precision(device)]


def autocast_dtype(mixed_precision: str) -> torch.dtype:
    """What ``no``, ``bf16`` or ``fp16`` stands for."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision, torch.float32)


def autocast(device_type: str, mixed_precision: str) -> AbstractContextManager[Any]:
    """What a run of this precision computes in."""
    return nullcontext() if mixed_precision == "no" else torch.autocast(device_type, autocast_dtype(mixed_precision))


def base_dtype(mixed_precision: str, device_type: str) -> torch.dtype:
    """The number type of the frozen U-Net: half precision where that halves its memory; on a CPU float32, as its
    normalisations want all in one precision."""
    return torch.float32 if device_type == "cpu" else autocast_dtype(mixed_precision)


def new_network(setup: Setup, pipe: Any) -> Adapter:
    """The network to train: untrained, or with the weights of ``init_from``.

    Raises:
        PowersteerError: ``init_from`` is no adapter for the base or not what else is asked for, or ``weights`` do not
            fit the base.
    """
    config, wanted = setup.config, setup.conditioning
    if config.init_from is not None:
        network = load_network(config.init_from)
        check_fits(network, pipe)
        _check_shape(setup, network, pipe)
        if isinstance(network, BPSModel):
            if network.config["conditioning_channels"] != wanted.channels:
                raise PowersteerError(
                    f"init_from={config.init_from} reads {network.config['conditioning_channels']} channels, the "
                    f"conditions have {wanted.channels}: start from another adapter, or from none"
                )
            if wanted.stated:
                network.register_to_config(conditioning=wanted.record)
    else:
        torch.manual_seed(config.seed)
        network = untrained(setup, base_of(pipe))
    if config.gradient_checkpointing:
        network.save_activation_memory()
    return network


def untrained(setup: Setup, base: PipelineBackbone) -> Adapter:
    """The network that a configuration asks for.

    Raises:
        PowersteerError: ``weights`` do not fit the base.
    """
    try:
        return make_adapter(base.module, **setup.network)
    except ValueError as error:
        raise PowersteerError(f"'weights': {error}") from None


_SHAPED = {
    "weights": ("down_weights", "mid_weight", "up_weight"),
    "network": ("output_kernel_size",),
    "ablation": (),
}
"""The entries of a BPS network's config that a key decides; a key that is missing here decides its namesake."""


def _check_shape(setup: Setup, network: Adapter, pipe: Any) -> None:
    """Refuse ``init_from`` with keys that ask for another network: they would have no effect.

    Raises:
        PowersteerError: There are such.
    """
    config = setup.config
    asked = config.asked(*NETWORK_KEYS)
    kind = class_of(config.network, config.ablation, base_of(pipe).module)
    differ = [key for key in asked if key in ("network", "ablation") and type(network) is not kind]
    blind = bool(network.spec.conditioning.get(BLIND))
    if "ablation" in asked and config.ablation == BLIND and not blind:
        differ.append("ablation")
    if isinstance(network, BPSModel) and not differ and asked:
        with torch.device("meta"):
            wanted: Any = untrained(setup, base_of(pipe))
        for key in asked:
            names = _SHAPED.get(key, (key,))
            given, own = ([_plain(one.config[name]) for name in names] for one in (wanted, network))
            if given != own:
                differ.append(key)
    if config.asked("port_learning_rates") and not isinstance(network, BPSModel):
        differ.append("port_learning_rates")
    if differ:
        raise PowersteerError(
            f"init_from={config.init_from} brings its own network, a {type(network).__name__} which is not of "
            f"{differ[0]}={getattr(config, differ[0])}: leave {differ[0]} out, or init_from"
        )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value


def picture_size(config: TrainConfig, base: PipelineBackbone) -> Size:
    """Pixels (height, width) to train at.

    Raises:
        PowersteerError: The resolution is no multiple of what the base can make.
    """
    step, given = base.step, config.resolution or base.size
    size = (given, given) if isinstance(given, int) else given
    for side in size:
        if side < step or side % step:
            below = max(step, side // step * step)
            raise PowersteerError(f"resolution {side} is no multiple of {step}: give {below} or {below + step}")
    return size


def update_count(config: TrainConfig, pairs: int, processes: int) -> int:
    """Optimizer updates of the whole run."""
    if config.max_train_steps is not None:
        return config.max_train_steps
    batch = config.train_batch_size * config.gradient_accumulation_steps * processes
    return -(-pairs // batch) * (config.num_train_epochs or 1)


def check_base(pipe: Any) -> None:
    """Refuse a base that does not denoise latents alone.

    Raises:
        PowersteerError: Its U-Net reads more, as an inpainting base's does.
    """
    reads, given = base_of(pipe).module.config["in_channels"], pipe.vae.config["latent_channels"]
    if reads != given:
        raise PowersteerError(
            f"the base's U-Net reads {reads} channels, its latents have {given}: to train on, give a plain "
            "text-to-image base, not one for inpainting or editing"
        )


def check_splits(config: TrainConfig) -> None:
    """Refuse to train on what is held out.

    Raises:
        PowersteerError: ``train_data_dir`` is a held-out split of a prepared data set, or ``validation_data_dir`` too.
    """
    if config.train_data_dir is None:
        return
    folder = Path(config.train_data_dir).resolve()
    if folder.suffix == ".tar":  # a pattern of shards
        folder = folder.parent
    if is_held_out(folder.name) and (folder.parent / DATASET_FILE).is_file():
        raise PowersteerError(
            f"train_data_dir={config.train_data_dir} is held out of the data set in {folder.parent}: train on "
            f"{folder.parent / 'train'}"
        )
    if config.validation_data_dir is not None and folder == config.validation_data_dir.resolve():
        raise PowersteerError(
            f"train_data_dir and validation_data_dir are both {config.train_data_dir}: hold other pairs out, or give "
            "validation_split instead of validation_data_dir"
        )


def conditioning(config: TrainConfig) -> Conditioning:
    """The conditions of the training pairs; see `conditioning_of`.

    Raises:
        PowersteerError: Data and configuration, or training and held-out pairs, contradict each other, or feature maps
            would be cropped.
    """
    found = conditioning_of(config.train_data_dir, config.conditioning_channels, config.conditioning_kind)
    if config.validation_data_dir is not None:
        conditioning_of(str(config.validation_data_dir), found.channels, found.kind)
    if KINDS.find(found.kind).at_latents and config.random_crops:
        raise PowersteerError("random_crops cannot cut feature maps out of their pictures: give random_crops=0")
    return found


def columns_of(config: TrainConfig) -> Columns:
    """What the data calls its columns."""
    return Columns(
        config.image_column, config.conditioning_image_column, config.caption_column, config.generated_caption_column
    )


def read_pairs(setup: Setup, folder: Path | None, *, plain: bool, contents: Contents | None = None) -> Pairs:
    """The pairs of a folder, or of the Hub; (``plain``) without their mirrored and cut-out views."""
    config, source = setup.config, folder
    if source is None:
        source = hub_rows(str(config.dataset_name), config.dataset_config_name, config.dataset_split, setup.columns)
    return Pairs(
        source,
        setup.size,
        setup.conditioning.channels,
        None if plain else config.max_train_samples,
        kind=setup.conditioning.kind,
        columns=setup.columns,
        default_prompt=config.default_prompt,
        buckets=bucket_sizes(setup.size, setup.size_step) if config.aspect_ratio_buckets else None,
        contents=contents,
        views=Views() if plain else Views(config.random_flip, config.random_crops, config.smallest_crop),
        vae_scale_factor=setup.vae_scale_factor,
    )
