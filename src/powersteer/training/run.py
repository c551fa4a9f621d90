"""A training run: base, data, network, the loop; and for few pairs, once more on all of them."""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console

from powersteer.adapters.load import load_network
from powersteer.adapters.protocol import Adapter
from powersteer.backbones.load import load_base
from powersteer.backbones.options import base_options
from powersteer.backbones.protocol import base_of
from powersteer.core.card import write_card
from powersteer.core.console import PlainConsole
from powersteer.core.digests import content_digest, weights_digest
from powersteer.core.errors import PowersteerError
from powersteer.denoising.heldout import HeldOut
from powersteer.denoising.objective import Objective
from powersteer.training.checkpoint import check_intact, chosen_checkpoint, load_checkpoint, save_adapter, step_of
from powersteer.training.config import TrainConfig
from powersteer.training.data import RunData
from powersteer.training.dry_run import dry_run, free_memory
from powersteer.training.folder import REFIT, StillThere, held, remove, writing
from powersteer.training.loop import fit
from powersteer.training.record import RECORD, Record, begun_with, check_step, write_settings
from powersteer.training.setup import (
    Run,
    Setup,
    Source,
    base_dtype,
    check_base,
    check_splits,
    make_accelerator,
    new_network,
    update_count,
)
from powersteer.training.state import Place, TrainState


@dataclass(frozen=True)
class TrainResult:
    """What a run came to."""

    adapter_dir: Path
    """The best weights by held-out loss (the last, without held-out pairs)."""
    step: int
    """Optimizer updates done."""
    best_step: int
    seconds: float
    """Time spent in the loop, over all its resumptions."""
    control_step: int | None
    """The step at which the condition was first seen to be used."""
    interrupted: bool
    """Whether it was told to stop, be it in the last update."""
    main_process: bool = True
    """Whether this process is the one of several that reports the result."""

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "adapter_dir": str(self.adapter_dir)}


def train(config: TrainConfig) -> TrainResult:
    """Train a steering network, or go on training it, in ``config.output_dir``.

    Raises:
        PowersteerError: The base, the data or the output folder is unusable, or the loss became non-finite; or the
            training pairs are held out.
    """
    check_splits(config)
    accelerator = make_accelerator(config)
    with held(config.output_dir, accelerator.is_main_process) as still_there, _one_line(config):
        return _train(config, accelerator, still_there)


def _train(config: TrainConfig, accelerator: Accelerator, still_there: StillThere) -> TrainResult:
    console = PlainConsole(stderr=True, quiet=not accelerator.is_main_process)
    for line in config.idle():
        console.print(line, soft_wrap=True)
    pipe = load_base(config.pretrained_model_name_or_path, **base_options(config))
    check_base(pipe)
    setup = Setup.of(config, pipe)
    network = new_network(setup, pipe)
    data = RunData(setup, pipe, console)
    steps = update_count(config, data.count, accelerator.num_processes)
    facts = _facts(setup, pipe, network, accelerator.num_processes, steps) | data.facts()
    record, chosen = _agreed(config, facts, steps, console)

    run, all_pairs = _assembled(setup, accelerator, pipe, network, data)
    checkpoint = None if chosen is None else load_checkpoint(chosen, run.network)
    accelerator.wait_for_everyone()  # all have read what one now writes
    if accelerator.is_main_process:
        still_there()
        record.save(config.output_dir)
        write_settings(config, config.output_dir)
    with writing(f"the logs in {config.output_dir}"):
        accelerator.init_trackers("powersteer")

    place = Place(config.output_dir, still_there, checkpoint, {RECORD: record.as_json()})
    state, interrupted = fit(run, place, steps)
    if config.refit and not interrupted:
        interrupted = _refit(replace(run, pairs=all_pairs, held_out=None), state, place, record, console)
    with writing(f"the logs in {config.output_dir}"):
        accelerator.end_training()
    if accelerator.is_main_process and not interrupted:
        still_there()
        write_card(config.output_dir)
    return TrainResult(
        config.output_dir,
        state.step,
        state.best_step,
        state.seconds,
        state.control_step,
        interrupted=interrupted,
        main_process=accelerator.is_main_process,
    )


def _assembled(
    setup: Setup, accelerator: Accelerator, pipe: Any, network: Adapter, data: RunData
) -> tuple[Run, Source]:
    """The run, everything on its device and encoded; and all pairs, the held-out ones too."""
    config = setup.config
    base = base_of(pipe)
    torch.nn.Module.to(base.module, base_dtype(setup.precision, accelerator.device.type))
    pipe.to(accelerator.device)
    network = network.to(accelerator.device)
    if config.gradient_checkpointing:
        base.module.enable_gradient_checkpointing()
    data.tell()
    pairs, held_out_pairs, all_pairs = data.encode()
    held_out = None
    if held_out_pairs is not None:
        held_out = HeldOut(pipe, held_out_pairs, limit=config.max_validation_samples, accelerator=accelerator)
    return Run(setup, accelerator, base, network, pairs, held_out), all_pairs


def _facts(setup: Setup, pipe: Any, network: Adapter, processes: int, steps: int) -> dict[str, Any]:
    """What settings come to, but for the data; see `powersteer.training.record.FACTS`."""
    config = setup.config
    facts: dict[str, Any] = {
        "base": _base_digests(setup.objective, pipe),
        "start": None if config.init_from is None else weights_digest(network),
        "batch": config.train_batch_size * config.gradient_accumulation_steps * processes,
        "precision": setup.precision,
        "processes": processes,
    }
    if config.lr_scheduler in ("linear", "cosine"):
        facts["updates"] = steps
    if config.streaming:
        facts["readers"] = processes * max(1, config.dataloader_num_workers)
    return facts


def _base_digests(objective: Objective, pipe: Any) -> dict[str, Any]:
    """What a run depends on in the base, mostly as digests; left out is what another version of a library would put in
    other words."""
    base = base_of(pipe)
    words = json.dumps([[sorted(t.get_vocab().items()), t.model_max_length] for t in base.tokenizers])
    return {name: weights_digest(part) for name, part in base.parts.items()} | {
        "tokenizers": content_digest(words.encode()),
        "noise": content_digest(objective.levels),
        "prediction_type": objective.prediction_type,
        "scaling_factor": pipe.vae.config.scaling_factor,
    }


def _agreed(config: TrainConfig, facts: dict[str, Any], steps: int, console: Console) -> tuple[Record, Path | None]:
    """The run's record, and the checkpoint to go on from.

    Raises:
        PowersteerError: What is in the folder was begun with other settings, is damaged, or somebody else's.
    """
    chosen = chosen_checkpoint(config.output_dir, config.resume_from_checkpoint)
    if chosen is not None:
        check_intact(chosen)
    begun, now = begun_with(config.output_dir, chosen), Record.of(config, facts)
    if begun is None:
        return now, chosen
    step = 0 if chosen is None else step_of(chosen)
    record = begun.continued(now, step, config.output_dir)
    if chosen is not None and (kept := Record.read(chosen)) is not None:
        kept.continued(now, step, config.output_dir)  # it may have been put here from another run
    check_step(config.output_dir, chosen, steps)
    for change in record.changes[len(begun.changes) :]:
        told = ", ".join(f"{key} {both[1]} (was {both[0]})" for key, both in change.items() if key != "step")
        console.print(f"from step {change['step']} on with {told}", soft_wrap=True)
    return record, chosen


def _refit(run: Run, found: TrainState, place: Place, record: Record, console: Console) -> bool:
    """Train a new adapter on all pairs for as many updates as were best; whether that was interrupted."""
    if found.best_step == 0:
        console.print("nothing learned was better than the prior, whose network is kept: no refit", soft_wrap=True)
        return False
    config, accelerator = run.config, run.accelerator
    output_dir = config.output_dir / REFIT
    network = new_network(run.setup, run.base.pipe).to(accelerator.device)
    accelerator.free_memory()
    wanted = "latest-intact" if config.resume_from_checkpoint == "latest-intact" else "latest"
    chosen = chosen_checkpoint(output_dir, wanted)
    if chosen is not None and step_of(chosen) > found.best_step:  # of a run that was then best later
        accelerator.wait_for_everyone()
        chosen = None
        if accelerator.is_main_process:
            remove(output_dir)
    if chosen is not None:
        check_intact(chosen)
    if accelerator.is_main_process:
        place.still_there()
        with writing(output_dir):
            output_dir.mkdir(exist_ok=True)
    accelerator.wait_for_everyone()
    checkpoint = None if chosen is None else load_checkpoint(chosen, network)
    there = replace(place, folder=output_dir, checkpoint=checkpoint)
    _, interrupted = fit(replace(run, network=network), there, found.best_step, "on all pairs")
    if not interrupted and accelerator.is_main_process:
        place.still_there()
        save_adapter(config.output_dir, load_network(output_dir))
        replace(record, refitted=found.best_step).save(config.output_dir)
    return interrupted


@contextmanager
def _one_line(config: TrainConfig) -> Generator[None]:
    """Within the block, what a machine lacks, or takes away, is said with what to do about it."""
    try:
        yield
    except RuntimeError as error:
        if _out_of_memory(error):
            raise PowersteerError(_memory_advice(config)) from None
        said = " ".join(str(error).split())
        if "DataLoader worker" not in said:
            raise
        raise PowersteerError(
            f"a data worker was ended from outside ({said}): memory may have run out. The same command goes on from "
            "the last checkpoint; give fewer dataloader_num_workers"
        ) from None


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _memory_advice(config: TrainConfig) -> str:
    estimate, batch = dry_run(config).memory.total, config.train_batch_size * config.gradient_accumulation_steps
    advice = f"gradient_checkpointing=true train_batch_size=1 gradient_accumulation_steps={batch}"
    if config.gradient_checkpointing and config.train_batch_size == 1:
        advice = "network=lite use_8bit_adam=true ema_decay=null, or a smaller resolution"
    return f"out of memory (estimate {estimate / 1e9:.1f} GB, free {free_memory() / 1e9:.1f} GB): add {advice}"
