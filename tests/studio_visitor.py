"""A visitor of a studio who speaks HTTP as it comes, byte for byte: a browser's page, or somebody who means harm."""

import http.client
import json
import uuid
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Answer:
    """What the server answers."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key.lower() == name), None)


class Visitor:
    """One session.

    Args:
        address: Of the studio.
        headers: Sent with every request.
    """

    def __init__(self, address: str, **headers: str) -> None:
        self.host, self.port = urlsplit(address).hostname, urlsplit(address).port
        self.headers, self.session = headers, uuid.uuid4().hex

    def ask(self, method: str, path: str, headers=None, body: bytes | None = None, host: str | None = "") -> Answer:
        """A request with exactly these headers; ``host``: ours by default, None for no such header."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=120)
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        given = [*self.headers.items(), *(headers.items() if isinstance(headers, dict) else headers or [])]
        if host is not None:
            given.insert(0, ("Host", host or f"{self.host}:{self.port}"))
        if body is not None:
            given.append(("Content-Length", str(len(body))))
        for name, value in given:
            connection.putheader(name, value)
        connection.endheaders(body)
        answer = connection.getresponse()
        found = Answer(answer.status, answer.getheaders(), answer.read())
        connection.close()
        return found

    @cached_property
    def handlers(self) -> dict[str, int]:
        """Numbers of what the page can call, by name."""
        config = json.loads(self.ask("GET", "/config").body)
        return {str(one["api_name"]): one["id"] for one in config["dependencies"]}

    def call(self, name: str, *data: Any, event: Any = None) -> Any:
        """What a handler of the page gives for these values: its outputs, or an `Exception` with its words."""
        told: dict[str, Any] = {"data": data, "fn_index": self.handlers[name], "session_hash": self.session}
        told |= {"event_data": event, "trigger_id": None}
        joined = self.ask("POST", "/gradio_api/queue/join", {"Content-Type": "application/json"}, _json(told))
        assert joined.status == 200, joined
        said = self.ask("GET", f"/gradio_api/queue/data?session_hash={self.session}").body.decode()
        for line in said.splitlines():
            message = json.loads(line.removeprefix("data: ")) if line.startswith("data: ") else {}
            if message.get("msg") == "process_completed":
                output = message["output"]
                return output["data"] if message["success"] else Exception(output.get("error"))
        raise AssertionError(said)

    def upload(self, name: str, content: bytes, headers=None) -> Answer:
        """A file, as the page's forms send it."""
        form = (
            (
                f'--edge\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n'
                "Content-Type: application/octet-stream\r\n\r\n"
            ).encode()
            + content
            + b"\r\n--edge--\r\n"
        )
        kind = {"Content-Type": "multipart/form-data; boundary=edge"}
        return self.ask("POST", "/gradio_api/upload", {**kind, **(headers or {})}, form)

    def uploaded(self, name: str, content: bytes) -> dict[str, Any]:
        """The same, as a value of the page."""
        answer = self.upload(name, content)
        assert answer.status == 200, answer
        [path] = json.loads(answer.body)
        return {"path": path, "orig_name": name, "meta": {"_type": "gradio.FileData"}}


def _json(value: Any) -> bytes:
    return value if isinstance(value, bytes) else json.dumps(value).encode()
