"""The studio on a port: who may reach it, and what it may load."""

from __future__ import annotations

import ipaddress
import os
import signal
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from powersteer.adapters.load import EMBEDDED_ADAPTERS
from powersteer.apps.studio.folders import make_room, work_folder
from powersteer.apps.studio.guard import Guard
from powersteer.apps.studio.uploads import MAX_PIXELS
from powersteer.backbones.load import EMBEDDED_BASE
from powersteer.core.errors import PowersteerError

if TYPE_CHECKING:
    import gradio as gr

QUEUE = 32
"""Events that may wait; more are refused."""
MAX_UPLOAD = 512_000_000
"""The most bytes of one uploaded file."""
_NAMES = ("127.0.0.1", "localhost", "[::1]")
"""The names by which this machine calls itself."""


@contextmanager
def served(
    base: str = EMBEDDED_BASE,
    adapters: Sequence[str] = (),
    adapters_dir: Path = Path("runs"),
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    auth: str | None = None,
) -> Generator[str]:
    """The studio, as long as the block lasts; yields its address.

    Args:
        base: The frozen base.
        adapters: Adapters to choose from; with the embedded base, its own by default.
        adapters_dir: Those in it can be chosen too, and new ones are trained into it.
        host: An address of this machine.
        port: By default the first that is free from 7860 on.
        auth: ``user:password``; must be given when others can reach ``host``.

    Raises:
        PowersteerError: Others could reach it without a password, Gradio is not installed, base or adapters cannot be
            loaded, or the port is taken.
    """
    access = _access(host, port, auth)
    if find_spec("gradio") is None:
        raise PowersteerError("the studio needs Gradio: pip install 'powersteer[studio]'")
    with work_folder() as work_dir, _gradio_in(work_dir / "gradio"), _picture_limit():
        from powersteer.apps.studio.page import build
        from powersteer.apps.studio.training import Training
        from powersteer.apps.studio.work import KEPT_BYTES, Studio

        if not adapters and base == EMBEDDED_BASE:
            adapters = list(EMBEDDED_ADAPTERS)
        studio, training = Studio(base, adapters, adapters_dir, work_dir), Training(base, adapters_dir, work_dir)
        page = build(studio, training, local=access.local)
        address = _launch(page, access, lambda: make_room(studio.uploads, KEPT_BYTES - MAX_UPLOAD))
        try:
            if not isinstance(page.app.middleware_stack, Guard):
                raise PowersteerError("this Gradio cannot be guarded: pip install -U 'powersteer[studio]'")
            yield address
        finally:
            training.close()
            page.close(verbose=False)


def end_on_signals() -> None:
    """Let SIGTERM, and the SIGHUP of a terminal that closes, end the studio as Ctrl-C does."""
    signal.signal(signal.SIGTERM, _interrupt)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # which is what nohup asks for
        signal.signal(signal.SIGHUP, _interrupt)


def _interrupt(*_: Any) -> None:
    # A terminal and its shell send SIGHUP each: the second must not break off the clean-up.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    raise KeyboardInterrupt


@dataclass(frozen=True)
class _Access:
    """Who may reach the studio, and where."""

    host: str
    """As it stands in an address."""
    port: int | None
    credentials: tuple[str, str] | None
    local: bool
    """Only this machine's own people can: behind a proxy, whoever comes seems to come from here."""

    @property
    def names(self) -> set[str] | None:
        """See `Guard`."""
        return {*_NAMES, self.host} if self.local else None


def _access(host: str, port: int | None, auth: str | None) -> _Access:
    """See `served`."""
    host, credentials = host.removeprefix("[").removesuffix("]"), _credentials(auth)
    if not is_loopback(host) and credentials is None:
        raise PowersteerError(f"others can reach {host}: give --auth user:password, or leave --host out")
    named = f"[{host}]" if ":" in host else host
    return _Access(named, port, credentials, local=credentials is None)


def _launch(page: gr.Blocks, access: _Access, before_upload: Callable[[], None]) -> str:
    """Let the page be reached; returns its address.

    Raises:
        PowersteerError: The port is taken.
    """
    from powersteer.apps.studio.page import style, theme

    @asynccontextmanager
    async def guarded(app: Any) -> AsyncGenerator[None]:
        # Gradio's own middleware, which answers other origins, stands outside of any that it is given.
        app.middleware_stack = Guard(app.middleware_stack, access.names, before_upload)
        yield

    page.queue(max_size=QUEUE, api_open=False, default_concurrency_limit=4)
    try:
        _, address, _ = page.launch(
            server_name=access.host,
            server_port=access.port,
            auth=access.credentials,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            show_error=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            enable_monitoring=False,
            run_history=False,
            num_workers=0,
            footer_links=[],
            max_file_size=MAX_UPLOAD,
            theme=theme(),
            css=style(),
            app_kwargs={"lifespan": guarded, "docs_url": None, "redoc_url": None, "openapi_url": None},
        )
    except OSError as error:
        host = access.host.strip("[]")
        raise PowersteerError(f"cannot listen on {host}: {error}; give another --port") from None
    return address


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach it."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@contextmanager
def _gradio_in(folder: Path) -> Generator[None]:
    """Gradio keeps its files there, and tells nobody that it is used."""
    wanted = {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": str(folder)}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


@contextmanager
def _picture_limit() -> Generator[None]:
    """PIL refuses whatever has more than `MAX_PIXELS`, whoever opens it."""
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, MAX_PIXELS // 2  # it refuses from twice as many on
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _credentials(auth: str | None) -> tuple[str, str] | None:
    if auth is None:
        return None
    user, colon, password = auth.partition(":")
    if not (user and colon and password):
        raise PowersteerError("--auth is user:password, neither of them empty")
    return user, password
