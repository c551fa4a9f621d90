"""What tests send to processes of their own: a module that is imported fast."""

import os

import numpy as np
from PIL import Image


class Edges:
    """Where a pixel differs from its left neighbour."""

    def __call__(self, subject):
        grey = np.asarray(subject.picture.convert("L")).astype(int)
        return Image.fromarray((np.abs(np.diff(grey, axis=1, prepend=0)) > 20).astype(np.uint8) * 255)

    def record(self):
        return {"kind": "sketch", "channels": 1, "extractor": "test-edges"}


def build_double():
    return lambda value: (os._exit(3) if value < 0 else 2 * value, os.getpid())
