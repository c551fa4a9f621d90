"""Who is answered: the studio's own page, and no other page of the browser. It stands outside of all of Gradio."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from typing import Any

# Nothing is fetched from elsewhere, and no other page may frame this one. Gradio compiles templates in the browser.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
    "frame-ancestors 'self'; form-action 'self'; base-uri 'self'"
)
_HEADERS = [
    (b"content-security-policy", _POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"same-origin"),
]
_UPLOAD = "/gradio_api/upload"
_CLOSED = tuple(
    f"/gradio_api/{name}" for name in ("deep_link", "file=http", "file/http", "process_recording", "proxy=")
)
"""Routes of Gradio that the page does not use, and that fetch, convert or keep things for whoever asks."""
_DEFAULT_PORTS = {"http": 80, "https": 443}

Refusal = tuple[int, str]
"""HTTP status and words."""


class Guard:
    """ASGI middleware that answers this studio's own page alone.

    Browsers let any page send requests to any address, and a page's name may be made to mean this machine (DNS
    rebinding). So where the machine's own people come without a password, only the names of this machine are answered;
    and nowhere is a request answered that another page sent.

    Args:
        app: All the rest.
        names: The names of this machine, as they stand in ``Host`` without the port; None: there is a password, and
            any name is answered.
        before_upload: Called before an upload is taken.
    """

    def __init__(self, app: Any, names: Collection[str] | None, before_upload: Callable[[], None]) -> None:
        self.app, self.names, self.before_upload = app, names, before_upload

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """See ASGI."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        refused = refusal(scope, self.names)
        if refused is not None and scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return

        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *_HEADERS]
            await send(message)

        if refused is not None:
            status, words = refused
            plain = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(words)).encode())]
            await with_headers({"type": "http.response.start", "status": status, "headers": plain})
            await send({"type": "http.response.body", "body": words.encode()})
            return
        if scope["path"].startswith(_UPLOAD) and scope.get("method") == "POST":
            await asyncio.to_thread(self.before_upload)
        await self.app(scope, receive, with_headers)


def refusal(scope: Any, names: Collection[str] | None) -> Refusal | None:
    """Why a request is not answered; None where it is.

    Args:
        scope: ASGI's, of HTTP or a web socket.
        names: See `Guard`.
    """
    given: dict[str, list[str]] = {}
    for name, value in scope["headers"]:
        given.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
    hosts, origins = given.get("host", []), given.get("origin", [])
    if len(hosts) != 1:
        return 421, "a request names one Host"
    host = hosts[0]
    if names is not None:
        port = (scope.get("server") or ("", 0))[1]
        if host not in [f"{name}:{port}" for name in names] and not (port == 80 and host in names):
            return 421, f"the studio answers at http://127.0.0.1:{port}/ only; behind a proxy it needs --auth"
        if "forwarded" in given or any(name.startswith("x-forwarded") for name in given):
            return 403, "the studio needs --auth user:password behind a proxy"
        if any(origin != f"http://{host}" for origin in origins):
            return 403, "another page sent this: the studio answers its own page only"
    elif len(origins) > 1 or any(not _is_of(origin, host) for origin in origins):
        return 403, "another page sent this: the studio answers its own page only, and a proxy must pass Host on"
    if any(site not in ("same-origin", "none") for site in given.get("sec-fetch-site", [])) and not _is_a_visit(
        scope, given
    ):
        return 403, "another page sent this: the studio answers its own page only"
    if scope["path"].startswith(_CLOSED):
        return 404, "the studio has no such page"
    return None


def _is_of(origin: str, host: str) -> bool:
    """Whether a page of the origin came from the host; a proxy may have spoken HTTPS with it."""
    scheme, _, name = origin.partition("://")
    if scheme not in _DEFAULT_PORTS:
        return False
    default = f":{_DEFAULT_PORTS[scheme]}"
    return name.removesuffix(default) == host.removesuffix(default)


def _is_a_visit(scope: Any, given: dict[str, list[str]]) -> bool:
    """Whether someone followed a link to the page."""
    return (
        (scope.get("method"), scope["path"]) == ("GET", "/")
        and given.get("sec-fetch-mode") == ["navigate"]
        and given.get("sec-fetch-dest") == ["document"]
    )
