"""The studio on a port: who may reach it, and what it may load."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import asynccontextmanager, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image

from powersteer.adapters.load import EMBEDDED_ADAPTERS
from powersteer.apps.studio.folders import make_room, work_folder
from powersteer.apps.studio.guard import Guard
from powersteer.apps.studio.uploads import MAX_PIXELS
from powersteer.backbones.load import EMBEDDED_BASE
from powersteer.core.errors import PowersteerError

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
    host, credentials = host.removeprefix("[").removesuffix("]"), _credentials(auth)
    local = is_loopback(host) and credentials is None  # behind a proxy, whoever comes seems to come from here
    if not is_loopback(host) and credentials is None:
        raise PowersteerError(f"others can reach {host}: give --auth user:password, or leave --host out")
    if find_spec("gradio") is None:
        raise PowersteerError("the studio needs Gradio: pip install 'powersteer[studio]'")
    with work_folder() as work_dir, _gradio_in(work_dir / "gradio"), _picture_limit():
        from powersteer.apps.studio.page import build, style, theme
        from powersteer.apps.studio.training import Training
        from powersteer.apps.studio.work import KEPT_BYTES, Studio

        if not adapters and base == EMBEDDED_BASE:
            adapters = list(EMBEDDED_ADAPTERS)
        studio, training = Studio(base, adapters, adapters_dir, work_dir), Training(base, adapters_dir, work_dir)
        page = build(studio, training, local=local)
        named = f"[{host}]" if ":" in host else host
        names = {*_NAMES, named} if local else None

        @asynccontextmanager
        async def guarded(app: Any) -> AsyncGenerator[None]:
            # Gradio's own middleware, which answers other origins, stands outside of any that it is given.
            app.middleware_stack = Guard(
                app.middleware_stack, names, lambda: make_room(studio.uploads, KEPT_BYTES - MAX_UPLOAD)
            )
            yield

        page.queue(max_size=QUEUE, api_open=False, default_concurrency_limit=4)
        try:
            _, address, _ = page.launch(
                server_name=named,
                server_port=port,
                auth=credentials,
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
            raise PowersteerError(f"cannot listen on {host}: {error}; give another --port") from None
        try:
            if not isinstance(page.app.middleware_stack, Guard):
                raise PowersteerError("this Gradio cannot be guarded: pip install -U 'powersteer[studio]'")
            yield address
        finally:
            training.close()
            page.close(verbose=False)


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
