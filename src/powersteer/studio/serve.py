"""The studio on a port: who may reach it, and what it may load."""

from __future__ import annotations

import ipaddress
import os
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image

from powersteer.base import EMBEDDED_ADAPTERS, EMBEDDED_BASE
from powersteer.errors import PowersteerError
from powersteer.studio.uploads import MAX_PIXELS

QUEUE = 32
"""Events that may wait; more are refused."""
MAX_UPLOAD = "512mb"
# Nothing is fetched from elsewhere, and no other page may frame this one. Gradio compiles templates in the browser.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
    "frame-ancestors 'self'; form-action 'self'; base-uri 'self'"
)


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
    local = is_loopback(host)
    credentials = _credentials(auth)
    if not local and credentials is None:
        raise PowersteerError(f"others can reach {host}: give --auth user:password, or leave --host out")
    if find_spec("gradio") is None:
        raise PowersteerError("the studio needs Gradio: pip install 'powersteer[studio]'")
    with tempfile.TemporaryDirectory(prefix="powersteer-studio-") as folder, _picture_limit():
        work_dir = Path(folder)
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        os.environ["GRADIO_TEMP_DIR"] = str(work_dir / "gradio")
        from powersteer.studio.page import build, style, theme
        from powersteer.studio.training import Training
        from powersteer.studio.work import Studio

        if not adapters and base == EMBEDDED_BASE:
            adapters = list(EMBEDDED_ADAPTERS)
        studio, training = Studio(base, adapters, adapters_dir, work_dir), Training(base, adapters_dir, work_dir)
        page = build(studio, training, local=local)
        page.queue(max_size=QUEUE, api_open=False, default_concurrency_limit=4)
        try:
            _, address, _ = page.launch(
                server_name=host,
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
                footer_links=[],
                max_file_size=MAX_UPLOAD,
                theme=theme(),
                css=style(),
                app_kwargs={"middleware": [_policy()], "docs_url": None, "redoc_url": None, "openapi_url": None},
            )
        except OSError as error:
            raise PowersteerError(f"cannot listen on {host}: {error}; give another --port") from None
        try:
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


def _policy() -> Any:
    """Middleware that tells browsers where they may load from."""
    from starlette.middleware import Middleware

    class Policy:
        def __init__(self, app: Any) -> None:
            self.app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            async def with_headers(message: Any) -> None:
                if message["type"] == "http.response.start":
                    message["headers"] = [
                        *message.get("headers", []),
                        (b"content-security-policy", _POLICY.encode()),
                        (b"x-content-type-options", b"nosniff"),
                        (b"referrer-policy", b"same-origin"),
                    ]
                await send(message)

            await self.app(scope, receive, with_headers if scope["type"] == "http" else send)

    return Middleware(Policy)
