"""Segmentation: label maps, of the source or of a model, in a palette's colours."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from powersteer.conditions.extractor import EXTRACTORS, Subject
from powersteer.conditions.kind import extractor_record
from powersteer.conditions.palettes import InColours, Palette
from powersteer.core.config import StrictConfig
from powersteer.core.errors import PowersteerError
from powersteer.core.hardware import best_device


@EXTRACTORS.add("segmentation", "labels", needs="label maps in the source")
class SourceLabels(InColours):
    """The source's own label map."""

    kind = "segmentation", "labels"
    palette: str = "ade20k"

    def __call__(self, subject: Subject) -> Image.Image:
        """RGB."""
        if subject.labels is None:
            raise PowersteerError("there is no label map here: choose the extractor 'model', with a segmentation model")
        return self.colours.picture(subject.labels)


@EXTRACTORS.add("segmentation", "model", needs="a semantic segmentation model of transformers")
class ModelLabels(StrictConfig):
    """What a model of transformers sees."""

    model: str
    """A folder, or a model of the Hub."""
    palette: str | None = None
    """With as many classes as the model; by default the model's own names, in the PASCAL VOC colours."""
    device: str = "auto"

    def __call__(self, subject: Subject) -> Image.Image:
        """RGB."""
        processor, network, palette = self.loaded
        picture = subject.picture.convert("RGB")
        inputs = processor(images=picture, return_tensors="pt").to(network.device)
        with torch.inference_mode():
            logits = network(**inputs).logits.float()  # (1, classes, h, w)
        size = (picture.height, picture.width)
        labels = F.interpolate(logits, size=size, mode="bilinear", align_corners=False).argmax(1)[0]
        return palette.picture(labels.cpu().numpy().astype(np.int64))

    def record(self) -> Mapping[str, Any]:
        """See `Extractor`."""
        return extractor_record(
            "segmentation",
            "model",
            version=f"transformers {version('transformers')}",
            settings={"model": self.model, "palette": self.palette},
            channels=3,
            palette=self.loaded[2].table,
        )

    @cached_property
    def loaded(self) -> tuple[Any, Any, Palette]:
        """Processor, network, palette."""
        from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

        from powersteer.backbones.parts import folder_of, from_folder, load_model

        try:
            folder = folder_of(self.model, AutoModelForSemanticSegmentation)
            network: Any = load_model(folder, AutoModelForSemanticSegmentation)
            processor: Any = from_folder(folder, AutoImageProcessor, trust_remote_code=False)
        except PowersteerError as error:
            raise PowersteerError(f"'{self.model}' is no semantic segmentation model: {error}") from None
        names = [str(network.config.id2label[i]) for i in range(network.config.num_labels)]
        palette = Palette.of_names(names) if self.palette is None else Palette.find(self.palette)
        if len(palette) != len(names):
            raise PowersteerError(
                f"'{self.model}' tells {len(names)} classes apart, the palette '{self.palette}' {len(palette)}: leave "
                "palette out, or give one of its classes in their order"
            )
        return processor, network.to(best_device(self.device)).eval(), palette
