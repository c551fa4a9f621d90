"""Layouts: a filled box for each thing, in its class's colour."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from powersteer.conditions.agreement import Agreement, Pictures
from powersteer.conditions.fidelity.labels import box_iou, class_boxes
from powersteer.conditions.kind import KINDS
from powersteer.conditions.kinds.segmentation import Segmentation


@dataclass(frozen=True)
class Layout(Segmentation):
    """A label map of boxes."""

    def agreement(self, wanted: torch.Tensor, found: Pictures, protocol: Mapping[str, Any]) -> Agreement:
        """The figure of the boxes of each class."""
        classes = protocol["classes"]
        boxes = class_boxes(wanted, classes)
        ious = {name: box_iou(boxes, class_boxes(x, classes)).nanmean(1) for name, x in found.items()}
        return Agreement("box IoU", "higher", ious, protocol)


KINDS.add(Layout("layout", seen_as="segmentation"))
