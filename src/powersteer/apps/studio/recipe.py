"""A picture's settings as a person would write them: a Python snippet, a command line, and back."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from powersteer.core.config import build_config, option_of
from powersteer.denoising.settings import OPTIONS, GenerateSettings, PictureJob

_JOB = tuple(PictureJob.model_fields)


def parse(record: dict[str, Any]) -> tuple[GenerateSettings, PictureJob]:
    """The settings that a picture carries.

    Raises:
        PowersteerError: A key is unknown, missing, or of the wrong kind.
    """
    said = {key: value for key, value in record.items() if key not in ("inverted", "digests")}
    job = {key: said.pop(key) for key in _JOB if key in said}
    where = "the picture's settings"
    return build_config(said, GenerateSettings, where=where), build_config(job, PictureJob, where=where)


def record_of(settings: GenerateSettings, job: PictureJob) -> dict[str, Any]:
    """Plain values; what `parse` reads."""
    return settings.model_dump(mode="json") | job.model_dump(mode="json")


def as_python(settings: GenerateSettings, job: PictureJob, files: Sequence[str]) -> str:
    """Python that makes the picture again.

    Args:
        settings: Settings of the picture.
        job: Job of the picture.
        files: Names of the conditions' files, which must lie beside the script.
    """
    given = "".join(f"    {name}={value!r},\n" for name, value in _given(settings).items())
    paths = ", ".join(f"Path({name!r})" for name in files)
    told = [f"    prompt={job.prompt!r},\n", f"    condition=({paths},),\n"]
    if job.negative_prompt:
        told.append(f"    negative_prompt={job.negative_prompt!r},\n")
    told.append(f"    seed={job.seed},\n")
    return (
        "from pathlib import Path\n\n"
        "from powersteer.denoising.sampling.generate import generate\n"
        "from powersteer.denoising.settings import GenerateSettings, PictureJob\n\n"
        f"settings = GenerateSettings(\n{given})\n"
        f"job = PictureJob(\n{''.join(told)})\n"
        'print(generate(settings, [job], Path("generated"))[0])\n'
    )


def as_command(settings: GenerateSettings, job: PictureJob, files: Sequence[str]) -> str:
    """The command that makes the picture again; see `as_python`."""
    words = ["powersteer", "generate"]
    for name in files:
        words += ["--condition", name]
    words += ["--prompt", job.prompt, "--seed", str(job.seed), "--num-images", "1"]
    if job.negative_prompt:
        words += ["--negative-prompt", job.negative_prompt]
    for name, value in _given(settings).items():
        for one in value if isinstance(value, tuple) else (value,):
            words += [option_of(name, OPTIONS), str(one)]
    return shlex.join(words)


def _given(settings: GenerateSettings) -> dict[str, Any]:
    """What is not as it is by default, and steps and guidance in any case."""
    always = ("num_inference_steps", "guidance_scale")
    defaults = {name: field.default for name, field in GenerateSettings.model_fields.items()}
    values = {name: getattr(settings, name) for name in defaults}
    return {name: value for name, value in values.items() if name in always or value != defaults[name]}
