"""What would make a program wait for a GPU, counted on the CPU."""

from collections import Counter

from torch.utils._python_dispatch import TorchDispatchMode


class Waits(TorchDispatchMode):
    """Counts what would make a program wait for a GPU: numbers that leave the device, and copies to the CPU."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if name.startswith(("aten._local_scalar_dense", "aten.item", "aten.nonzero", "aten.equal", "aten.is_nonzero")):
            self.found[name] += 1
        if name.startswith("aten._to_copy") and (kwargs or {}).get("device") is not None:
            self.found[name] += 1
        return func(*args, **kwargs or {})
