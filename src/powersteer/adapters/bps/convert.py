"""The authors' checkpoint → an adapter's folder."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from powersteer.adapters.bps.model import BPSModel
from powersteer.conditions.kind import KINDS
from powersteer.core.errors import PowersteerError
from powersteer.core.files import is_file, reason_of
from powersteer.core.hub import CONFIG


def convert(
    source: Path,
    out_dir: Path,
    *,
    conditioning_channels: int = 1,
    unshuffle: int = 8,
    attention_head_dim: int = 64,
    norm_num_groups: int = 32,
    kind: str = "sketch",
) -> Path:
    """Write the network in ``source`` as `BPSModel.from_pretrained` reads it.

    Args:
        source: See `powersteer.adapters.bps.original.load_original`, also for the next four.
        out_dir: A folder that holds no adapter yet.
        conditioning_channels: Channels of the condition image.
        unshuffle: Pixels of the condition a side of one latent.
        attention_head_dim: Head width, where the network has self-attention.
        norm_num_groups: Of every GroupNorm.
        kind: Recorded in the config.

    Raises:
        PowersteerError: ``source`` is unsafe, unreadable or no BPS network, or ``out_dir`` is taken or unwritable.
    """
    if is_file(out_dir / CONFIG):
        raise PowersteerError(f"{out_dir} holds an adapter already: give another folder")
    model = BPSModel.from_original(
        source,
        conditioning_channels=conditioning_channels,
        unshuffle=unshuffle,
        attention_head_dim=attention_head_dim,
        norm_num_groups=norm_num_groups,
    )
    model.register_to_config(conditioning=KINDS.find(kind).record())
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(out_dir)
        mode = (out_dir / CONFIG).stat().st_mode
        for file in out_dir.glob("*.safetensors"):
            file.chmod(mode)  # safetensors makes files that nobody else may read, whatever the user's umask
    except Exception as error:  # of the operating system, or safetensors' own for a full disk
        with suppress(OSError, ValueError):
            (out_dir / CONFIG).unlink(missing_ok=True)  # written first: it must not pass for an adapter
        raise PowersteerError(f"cannot write to {out_dir}: {reason_of(error)}") from None
    return out_dir
