"""A small Hub over real HTTP, on this machine."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub.constants
import pytest


class TinyHub(BaseHTTPRequestHandler):
    """What huggingface_hub asks of a hub to make, fill and read a repository."""

    repos: dict[str, dict[str, bytes]]
    """``user/name``, or ``user/name@revision`` for another revision than main → the files."""
    requests: list[str]

    def files_at(self, repo: str, revision: str | None) -> dict[str, bytes] | None:
        """A revision's files, by its name or by its commit."""
        named = {commit_of(name): name for name in self.repos if name.partition("@")[0] == repo}
        other = named.get(revision or "", f"{repo}@{revision}")
        return self.repos.get(other, self.repos.get(repo) if revision in (None, "main") else None)

    def answer(self, content: bytes | dict | list, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def read(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_GET(self):
        path = self.path.partition("?")[0]
        self.requests.append(path)
        if path == "/api/whoami-v2":
            return self.answer({"name": "you", "type": "user"})
        found = re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)(?:/(revision|tree)/([\w.-]+))?", path)
        if found and found[1] in self.repos:
            files = self.files_at(found[1], found[3])
            if files is None:
                return self.answer({"error": "no such revision"}, 404, X_Error_Code="RevisionNotFound")
            if found[2] == "tree":
                oid = "0" * 40
                return self.answer([{"type": "file", "path": f, "size": len(c), "oid": oid} for f, c in files.items()])
            sha = commit_of(next(name for name, kept in self.repos.items() if kept is files))
            return self.answer(
                {"id": found[1], "sha": sha, "private": False, "siblings": [{"rfilename": f} for f in files]}
            )
        found = re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([\w.-]+)/(.+)", path)
        files = found and self.files_at(found[1], found[2])
        if files and found[3] in files:
            content = files[found[3]]
            return self.answer(content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=found[2])
        code = "EntryNotFound" if found and found[1] in self.repos else "RepoNotFound"
        return self.answer({"error": "not found"}, 404, X_Error_Code=code)

    do_HEAD = do_GET

    def do_POST(self):
        body = self.read()
        self.requests.append(self.path)
        if "Bearer" not in self.headers.get("Authorization", ""):
            return self.answer({"error": "who are you?"}, 401)
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization', 'you')}/{asked['name']}"
            if name.startswith("others/"):
                return self.answer({"error": "not yours"}, 403)
            self.repos.setdefault(name, {})
            return self.answer({"url": f"https://huggingface.co/{name}", "name": name, "id": name})
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        repo = re.match(r"/api/models/(\w+/[\w-]+)/", self.path)[1]
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            return self.answer(
                {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            )
        for line in body.decode().splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                self.repos[repo][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        return self.answer({"commitUrl": f"https://huggingface.co/{repo}/commit/{'1' * 40}", "commitOid": "1" * 40})

    def log_message(self, *_):
        pass


def commit_of(name: str) -> str:
    """Forty digits for a repository's revision."""
    return hashlib.sha1(name.encode()).hexdigest()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    handler = type("Handler", (TinyHub,), {"repos": {}, "requests": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    use_endpoint(monkeypatch, tmp_path, f"http://127.0.0.1:{server.server_port}")
    yield handler
    server.shutdown()
    server.server_close()


def use_endpoint(monkeypatch, tmp_path, address):
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")


def files_of(folder):
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
