"""One training at a time: `powersteer train` in a process of its own, watched through what it writes."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from powersteer.apps.studio.folders import without_place
from powersteer.apps.studio.pairs import PairsFound, Unpacked, look_through
from powersteer.backbones.load import EMBEDDED_BASE
from powersteer.core.config import build_config, save_config
from powersteer.core.errors import PowersteerError
from powersteer.training.config import TINY_LEARNING_RATE, TrainConfig
from powersteer.training.monitor import LOG

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}")


@dataclass(frozen=True)
class TrainingState:
    """What is known of a training now."""

    status: Literal["none", "running", "finished", "stopped", "failed"]
    message: str
    log: list[dict[str, Any]]
    """Rows of its ``log.jsonl``."""
    pictures: Path | None
    """The newest validation pictures."""
    adapter: Path | None
    """The weights, as soon as there are some."""


class Training:
    """The trainings of a studio.

    Args:
        base: What they steer.
        adapters_dir: Each writes its adapter into a new folder here.
        work_dir: For unpacked pairs and configurations.
    """

    def __init__(self, base: str, adapters_dir: Path, work_dir: Path) -> None:
        self.base, self.adapters_dir, self.work_dir = base, adapters_dir, work_dir
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: Path | None = None
        self._output_dir: Path | None = None
        self._stopped = False
        self._unpacked = Unpacked(work_dir / "pairs", lambda: self._folder if self.running else None)

    def look(self, source: Path, default_prompt: str | None = None, who: str = "") -> PairsFound:
        """Look through pairs.

        Args:
            source: A zip, or a folder.
            default_prompt: Caption of pairs that have none.
            who: Of each visitor, the last zip is kept.

        Raises:
            PowersteerError: It cannot be unpacked, holds no pairs, leads out of itself, or a picture in it is too
                large; then nothing is left of it.
        """
        if source.is_dir():
            return look_through(source, source.name, default_prompt)
        return self._unpacked.look(source, who, default_prompt)

    def start(self, found: PairsFound, name: str, **settings: Any) -> None:
        """Begin to train, with the preset for few pairs.

        Args:
            found: The pairs.
            name: Of the new adapter.
            **settings: Keys of `TrainConfig` that differ from the preset's.

        Raises:
            PowersteerError: One is running, the name is taken or unusable, or the pairs have errors.
        """
        if self.running:
            raise PowersteerError("a training is running: stop it first, or wait for its end")
        if found.report.errors:
            raise PowersteerError(f"these pairs cannot be trained on: {found.report.errors[0]}")
        if not found.folder.is_dir():
            raise PowersteerError("these pairs made room for later ones: drop the zip again")
        if not _NAME.fullmatch(name):
            raise PowersteerError(f"'{name}' cannot be a folder's name: take up to 40 letters, digits, - and _")
        output_dir = self.adapters_dir / name
        if output_dir.exists():
            raise PowersteerError(f"there is an adapter '{name}' already: choose another name")
        values: dict[str, Any] = {
            "preset": "few-shot",
            "pretrained_model_name_or_path": self.base,
            "train_data_dir": str(found.folder),
            "output_dir": output_dir,
            "cache_dir": self.work_dir / "cache",
            "validation_image_steps": 50,
        }
        if self.base == EMBEDDED_BASE:
            values["learning_rate"] = TINY_LEARNING_RATE
        config = build_config(values | settings, TrainConfig, where="training")
        try:
            output_dir.mkdir(parents=True)
        except OSError as error:
            raise PowersteerError(f"cannot write to {output_dir}: {error.strerror}") from None
        file = self.work_dir / "train.yaml"
        save_config(config, file)
        with (self.work_dir / "train.log").open("wb") as log:
            command = [sys.executable, "-m", "powersteer.apps.studio.attended", str(file)]
            # In a session of its own: Ctrl-C in the terminal would reach it besides `stop`, and twice means at once.
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
            )
        self._output_dir, self._folder, self._stopped = output_dir, found.folder, False

    @property
    def running(self) -> bool:
        """Whether one is."""
        return self._process is not None and self._process.poll() is None

    def stop(self) -> None:
        """End it after the update under way; the best weights so far are kept."""
        if self._process is not None and self.running:
            self._stopped = True
            self._process.send_signal(signal.SIGINT)

    def close(self, seconds: float = 20.0) -> None:
        """End it, whatever it does."""
        self.stop()
        if self._process is not None:
            try:
                self._process.wait(seconds)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def state(self) -> TrainingState:
        """What is known now."""
        if self._process is None or self._output_dir is None:
            return TrainingState("none", "", [], None, None)
        folder, code = self._output_dir, self._process.poll()
        log = _rows(folder / LOG)
        pictures = max((folder / "validation").glob("step-*.png"), default=None)
        adapter = folder if (folder / "config.json").exists() else None
        step = log[-1]["step"] if log else 0
        if code is None:
            message = f"step {step}" if log else "reading and encoding the pairs"
            return TrainingState("running", "stopping" if self._stopped else message, log, pictures, adapter)
        if code == 0:
            best = min(log, key=lambda row: row["steered"])["step"] if log else 0
            return TrainingState("finished", f"best at step {best} of {step}", log, pictures, adapter)
        if self._stopped:
            return TrainingState("stopped", f"stopped after step {step}", log, pictures, adapter)
        return TrainingState("failed", self._fault(), log, pictures, None)

    def _fault(self) -> str:
        lines = (self.work_dir / "train.log").read_text(encoding="utf-8", errors="replace").splitlines()
        told = [line.strip() for line in lines if line.startswith("error:")]
        if not told:
            return "it ended unexpectedly: train from the command line to see more"
        return without_place(told[-1].removeprefix("error: ").replace(f"{self._folder}/", ""), self.work_dir)


def _rows(log: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    if log.exists():
        for line in log.read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):  # the last line may be half written
                rows.append(json.loads(line))
    return rows
