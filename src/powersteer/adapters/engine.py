"""Calls of a frozen backbone, intercepted: residuals are evaluated before its forward begins, and added within it.

Within a block, a backbone's module carries one entry more in its ``__dict__``, ``_compiled_call_impl``, which
`torch.nn.Module.__call__` heeds and which neither copies nor pickles take along. Layers have another ``forward`` for
the length of a call only (until the next one where gradient checkpointing runs layers again): hooks would do as well,
and cost more than the addition itself. All this happens outside of what ``torch.compile`` made, so that nothing breaks
its graph; a layer has the same other ``forward`` every time, so that nothing is compiled anew.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Protocol
from weakref import WeakKeyDictionary, ref

import torch
import torch._dynamo.config
import torch.nn.functional as F
from torch import nn

from powersteer.adapters.protocol import Addition
from powersteer.adapters.rows import Caller
from powersteer.backbones.protocol import Backbone, Call, Place

# A U-Net compiled before a block would else run without the block's hooks, and say nothing.
torch._dynamo.config.skip_nnmodule_hook_guards = False

CALL = "_compiled_call_impl"
FORWARD = "forward"

Run = Callable[[], Any]


class Block(Protocol):
    """What an open `attach` block has the engine do."""

    thread: int

    def additions(self, call: Call, caller: Caller | None, hooks: ExitStack) -> dict[nn.Module, Addition]:
        """What to add to which layer's output in this call."""
        ...

    def around(self, call: Call, caller: Caller | None, prior: Run, steered: Run) -> Any:
        """The call's result, from the backbone as it is and as it is steered."""
        ...


class Site:
    """The ``forward`` of one layer: adds its residual to the output, in the thread that steers."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = ref(layer)
        self.own: Any = None
        """A ``forward`` that the layer already had in place of its class's, as offloading gives it."""
        self.residual: Addition | None = None
        self.where: Place | None = None
        self.here: threading.local | None = None
        """Says ``steers`` in the thread that steers; None where any may run the layer: autograd's, to recompute it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's output, steered."""
        layer: Any = self.layer()
        output = type(layer).forward(layer, *args, **kwargs) if self.own is None else self.own(*args, **kwargs)
        # A thread's own variable: compiled code can read that, and nothing is quicker.
        residual = self.residual
        if residual is None or (self.here is not None and not getattr(self.here, "steers", False)):
            return output
        if not isinstance(residual, torch.Tensor):
            residual = residual()
        return added(output, residual) if self.where is None else added_to_tokens(output, residual, self.where)

    def place(self, layer: nn.Module, residual: Addition, where: Place | None, here: threading.local | None) -> None:
        """Take the place of the layer's ``forward``."""
        self.residual, self.where, self.here = residual, where, here
        self.own = layer.__dict__.get(FORWARD)
        layer.__dict__[FORWARD] = self

    def take_back(self, layer: nn.Module) -> None:
        """Leave the layer as it was."""
        if self.own is None:
            del layer.__dict__[FORWARD]
        else:
            layer.__dict__[FORWARD] = self.own
        self.own = self.residual = None


def added(output: Any, residual: torch.Tensor) -> Any:
    """``residual`` added to what a layer gave: a tensor, a tuple that begins with one, or an output with a sample."""
    if isinstance(output, torch.Tensor):
        return output + (residual if residual.dtype == output.dtype else residual.to(output.dtype))
    if isinstance(output, tuple):
        return (added(output[0], residual), *output[1:])
    output.sample = added(output.sample, residual)
    return output


def added_to_tokens(output: Any, residual: torch.Tensor, where: Place) -> Any:
    """``residual`` (1 or B, tokens, D) added to the image's tokens in what a layer gave."""
    if where.index is not None:
        return tuple(
            added_to_tokens(one, residual, replace(where, index=None)) if place == where.index else one
            for place, one in enumerate(output)
        )
    behind = output.shape[1] - where.first - where.count
    residual = residual.to(output.dtype)
    return output + (F.pad(residual, (0, 0, where.first, behind)) if where.first or behind else residual)


def summed(additions: dict[nn.Module, Addition], more: dict[nn.Module, Addition]) -> dict[nn.Module, Addition]:
    """Additions to layers, together; layers that share a residual share its sum."""
    if not additions or not more:
        return additions or more
    total, sums = dict(additions), dict[tuple[int, int], Any]()
    for layer, residual in more.items():
        before: Any = additions.get(layer)
        if before is not None:
            key = id(before), id(residual)
            residual = sums[key] if key in sums else sums.setdefault(key, before + residual)
        total[layer] = residual
    return total


_sites: WeakKeyDictionary[nn.Module, Site] = WeakKeyDictionary()
"""The sites of all layers that were ever steered; they are kept, for compiled code knows them by identity."""
_engines: WeakKeyDictionary[nn.Module, Engine] = WeakKeyDictionary()
_opening = threading.RLock()  # the garbage collector may close a block at any moment


class Engine:
    """The open blocks of one backbone; it exists while there are any."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self.blocks: list[Block] = []
        self._intercepted: dict[nn.Module, tuple[int, Any]] = {}
        """How many blocks intercept a module, and what it had in the place of the interception."""
        self._lock = threading.RLock()
        self._inside = False
        self._sites: dict[nn.Module, Site] = {}
        """Those of `_sites` that were needed; looking up a weak key takes longer than all else here."""
        self._hooks = ExitStack()
        """What the last call left to be taken back."""

    @classmethod
    @contextmanager
    def open(cls, backbone: Backbone, outer: nn.Module, block: Block) -> Generator[None]:
        """Within it, the block steers calls of the backbone, and of what ``torch.compile`` wrapped around it."""
        modules = list(dict.fromkeys([backbone.module, outer]))
        with _opening:
            engine = _engines.setdefault(backbone.module, cls(backbone))
            engine.blocks.append(block)
            for module in modules:
                engine._intercept(module)
        try:
            yield
        finally:
            with _opening, engine._lock:
                engine._hooks.close()
                engine.blocks.remove(block)
                for module in modules:
                    engine._let_go(module)
                if not engine.blocks:
                    del _engines[backbone.module]

    @staticmethod
    def blocks_of(backbone: Backbone) -> list[Block]:
        """The blocks that are open on it in this thread."""
        engine, me = _engines.get(backbone.module), threading.get_ident()
        return [] if engine is None else [block for block in engine.blocks if block.thread == me]

    def _intercept(self, module: nn.Module) -> None:
        count, original = self._intercepted.get(module, (0, module.__dict__.get(CALL)))
        self._intercepted[module] = count + 1, original
        module.__dict__[CALL] = torch.compiler.disable(
            partial(self._call, module),
            recursive=False,
            reason="steer what torch.compile gave, or its pipeline, and compile before the block",
        )

    def _let_go(self, module: nn.Module) -> None:
        count, original = self._intercepted[module]
        if count > 1:
            self._intercepted[module] = count - 1, original
            return
        del self._intercepted[module], module.__dict__[CALL]
        if original is not None:
            module.__dict__[CALL] = original

    def _call(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        """A call of the backbone, or of what is wrapped around it."""
        with self._lock:  # held by this thread alone, whose calls within a call are the backbone's own
            blocks = [] if self._inside else self.blocks_of(self.backbone)
            if not blocks:
                return self._plain(module, args, kwargs)
            self._inside = True
            try:
                return self._steered(module, args, kwargs, blocks)
            finally:
                self._inside = False

    def _plain(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        _, original = self._intercepted[module]
        inner = self.backbone.module
        if original is not None:
            return original(*args, **kwargs)
        if module is inner:
            return module._call_impl(*args, **kwargs)
        # Compiled code begins at the inner module's call, where it must find nothing of ours.
        ours = inner.__dict__.pop(CALL)
        try:
            return module._call_impl(*args, **kwargs)
        finally:
            inner.__dict__[CALL] = ours

    def _steered(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], blocks: list[Block]) -> Any:
        call, caller = self.backbone.call(args, kwargs), Caller.find(depth=3)

        def prior() -> Any:
            self._hooks.close()
            lists = {name: list(value) for name, value in kwargs.items() if isinstance(value, list)}
            return self._plain(module, args, kwargs | lists)  # the U-Net empties lists of residuals

        def steered() -> Any:
            self._hooks.close()
            try:
                total: dict[nn.Module, Addition] = {}
                for block in blocks:
                    total = summed(total, block.additions(call, caller, self._hooks))
                self._place(total, call)
                return self._plain(module, call.args, call.kwargs)
            finally:
                if not (torch.is_grad_enabled() and self.backbone.recomputes):
                    self._hooks.close()

        return blocks[-1].around(call, caller, prior, steered)

    def _place(self, additions: dict[nn.Module, Addition], call: Call) -> None:
        here = None if torch.is_grad_enabled() else threading.local()
        if here is not None:
            here.steers = True
        placed: list[tuple[nn.Module, Site]] = []

        def take_back() -> None:
            for layer, site in placed:
                site.take_back(layer)

        self._hooks.callback(take_back)
        height, width = self.backbone.grid(call) if self.backbone.has_places and additions else (0, 0)
        places = self.backbone.places(call, height * width)
        for layer, residual in additions.items():
            site = self._sites.get(layer)
            if site is None:
                site = self._sites[layer] = _sites.setdefault(layer, Site(layer))
            site.place(layer, residual, places.get(layer), here)
            placed.append((layer, site))
