"""What other pages of a browser, and visitors who mean harm, get from a studio: asked of a real one, byte for byte."""

import asyncio
import html
import io
import json
import os
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from conftest import draw_pairs
from powersteer.apps.studio.guard import Guard, refusal
from powersteer.apps.studio.serve import served
from powersteer.apps.studio.work import AS_IT_IS
from studio_visitor import Visitor

pytest.importorskip("gradio")
REFUSED = (400, 403, 421)
CROSS = {"Sec-Fetch-Site": "cross-site"}
VISIT = {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
JOIN = ("POST", "/gradio_api/queue/join")
LOGGED_IN = {"username": "me", "password": "word"}


@pytest.fixture(scope="module")
def studio(tmp_path_factory):
    with served(adapters_dir=tmp_path_factory.mktemp("runs")) as address:
        yield address


@pytest.fixture
def locked_studio(tmp_path_factory):
    with served(adapters_dir=tmp_path_factory.mktemp("runs"), auth="me:word") as address:
        yield address


@pytest.fixture
def visitor(studio) -> Visitor:
    return Visitor(studio)


@pytest.fixture
def secret(tmp_path) -> Path:
    """A picture of the machine that no visitor may see."""
    Image.new("RGB", (32, 32), "red").save(tmp_path / "secret.png")
    return tmp_path / "secret.png"


HOSTS = [
    "evil.example:{port}",
    "x.localhost:{port}",
    "localhost.:{port}",
    "127.0.0.1.:{port}",
    "LOCALHOST:{port}",
    "localhost.evil.example:{port}",
    "127.0.0.1.evil.example:{port}",
    "127.0.0.1",
    "localhost",
    "localhost:80",
    "localhost:1",
    "localhost:{port}0",
    "0.0.0.0:{port}",
    "127.1:{port}",
    "127.0.0.2:{port}",
    "2130706433:{port}",
    "[::]:{port}",
    "[::ffff:127.0.0.1]:{port}",
    "::1:{port}",
    "me@localhost:{port}",
    "localhost:{port}, evil.example",
    "",
    None,
]


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize(("method", "path"), [("GET", "/"), ("OPTIONS", "/"), JOIN, ("POST", "/gradio_api/upload")])
def test_only_the_names_of_this_machine_are_answered(visitor, host, method, path):
    given = [] if host is None else [("Host", host.format(port=visitor.port))]
    answer = visitor.ask(method, path, given, b"{}" if method == "POST" else None, host=None)
    assert answer.status in (400, 421)
    assert not [name for name, _ in answer.headers if name.lower().startswith("access-control")]


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", "[::1]"])
def test_the_names_of_this_machine_are_answered(visitor, name):
    host = f"{name}:{visitor.port}"
    for headers in ({}, {"Origin": f"http://{host}"}, {"Sec-Fetch-Site": "same-origin"}, {"Sec-Fetch-Site": "none"}):
        answer = visitor.ask("GET", "/", headers, host=host)
        assert answer.status == 200
        assert "default-src 'self'" in answer.header("content-security-policy")
        assert answer.header("access-control-allow-origin") in (None, f"http://{host}")


ORIGINS = [
    "http://evil.example",
    "http://evil.example:{port}",
    "null",
    "",
    "file://",
    "http://localhost:{port}",  # the page's own is 127.0.0.1
    "http://127.0.0.1",
    "http://127.0.0.1:1",
    "https://127.0.0.1:{port}",
    "http://127.0.0.1:{port}.evil.example",
    "http://127.0.0.1:{port}@evil.example",
    "http://127.0.0.1:{port}/",
    "HTTP://127.0.0.1:{port}",
    "chrome-extension://abc",
    "http://127.0.0.1:{port} http://evil.example",
]
ROUTES = [
    ("GET", "/"),
    ("HEAD", "/"),
    ("OPTIONS", "/gradio_api/queue/join"),
    ("GET", "/config"),
    ("GET", "/gradio_api/queue/data?session_hash=a"),
    ("GET", "/gradio_api/file=/etc/hostname"),
    ("POST", "/gradio_api/upload"),
    ("POST", "/gradio_api/run/predict"),
    JOIN,
]


@pytest.mark.parametrize("origin", ORIGINS)
@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_other_pages_are_refused_everywhere(visitor, origin, method, path):
    asked = {"Origin": origin.format(port=visitor.port), "Access-Control-Request-Method": "POST"}
    answer = visitor.ask(method, path, asked, b"{}" if method == "POST" else None)
    assert answer.status == 403
    assert not [name for name, _ in answer.headers if name.lower().startswith("access-control")]


@pytest.mark.parametrize(
    ("method", "path", "headers"),
    [
        ("GET", "/", CROSS),
        ("GET", "/", {"Sec-Fetch-Site": "same-site"}),
        ("GET", "/", {**CROSS, "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"}),
        ("GET", "/", {**CROSS, "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"}),
        ("POST", "/", {**CROSS, **VISIT}),
        ("GET", "/config", {**CROSS, **VISIT}),
        ("GET", "/gradio_api/file=/etc/hostname", {**CROSS, **VISIT}),
        ("GET", "/gradio_api/queue/data?session_hash=a", CROSS),
        ("GET", "/gradio_api/startup-events", CROSS),
        (*JOIN, CROSS),
        ("GET", "/", {"X-Forwarded-Host": "evil.example"}),
        ("GET", "/", {"Forwarded": "host=evil.example"}),
        ("GET", "/", {"X-Forwarded-For": "10.0.0.1"}),
    ],
)
def test_what_another_page_or_an_open_proxy_sends_is_refused(visitor, method, path, headers):
    assert visitor.ask(method, path, headers, b"{}" if method == "POST" else None).status == 403


def test_two_hosts_or_origins_are_refused(visitor):
    own = f"127.0.0.1:{visitor.port}"
    assert visitor.ask("GET", "/", [("Host", "evil.example")]).status in REFUSED
    assert visitor.ask("GET", "/", [("Origin", f"http://{own}"), ("Origin", "http://evil.example")]).status == 403
    evil = visitor.ask("GET", "/", [("Host", f"evil.example:{visitor.port}"), ("X-Forwarded-Host", own)], host=None)
    assert evil.status == 421


def test_a_link_to_the_page_may_be_followed(visitor):
    assert visitor.ask("GET", "/", {**CROSS, **VISIT}).status == 200


@pytest.mark.parametrize("path", ["proxy=http://example.com/", "file=http://example.com/", "deep_link?session_hash=a"])
def test_routes_that_fetch_or_keep_things_for_anybody_are_closed(visitor, path):
    assert visitor.ask("GET", f"/gradio_api/{path}").status == 404


def test_an_upload_of_another_page_leaves_nothing(visitor):
    assert visitor.upload("a.txt", b"own").status == 200
    for headers in ({"Origin": "http://evil.example"}, CROSS):
        assert visitor.upload("a.txt", b"foreign", headers).status == 403


def test_web_sockets_of_other_pages_are_closed_and_of_the_own_page_passed_on():
    async def app(scope, receive, send):
        await send({"type": "websocket.accept"})

    async def asked(origin: str) -> list[str]:
        said = []

        async def send(message):
            said.append(message["type"])

        scope = {"type": "websocket", "path": "/", "server": ("127.0.0.1", 7860)}
        scope["headers"] = [(b"host", b"localhost:7860"), (b"origin", origin.encode())]
        await Guard(app, {"localhost"}, lambda: None)(scope, None, send)
        return said

    assert asyncio.run(asked("http://evil.example")) == ["websocket.close"]
    assert asyncio.run(asked("http://localhost:7860")) == ["websocket.accept"]


@pytest.mark.parametrize(
    ("host", "origin", "answered"),
    [
        ("studio.example", "https://studio.example", True),  # a proxy speaks TLS
        ("studio.example", "https://studio.example:443", True),
        ("studio.example:8443", "https://studio.example:8443", True),
        ("10.0.0.5:7860", "http://10.0.0.5:7860", True),
        ("studio.example", None, True),
        ("studio.example", "https://evil.example", False),
        ("studio.example", "https://studio.example.evil.example", False),
        ("studio.example", "https://studio.example:8443", False),
        ("studio.example", "null", False),
        ("127.0.0.1:7860", "https://studio.example", False),  # a proxy that does not pass Host on
        ("evil.example:7860", "http://studio.example", False),
    ],
)
def test_with_a_password_any_name_is_answered_but_no_other_page(host, origin, answered):
    headers = [(b"host", host.encode())] + ([(b"origin", origin.encode())] if origin else [])
    scope = {"type": "http", "method": "POST", "path": "/", "server": ("127.0.0.1", 7860), "headers": headers}
    assert (refusal(scope, None) is None) is answered


def test_port_80_is_not_named_in_host():
    scope = {"type": "http", "method": "GET", "path": "/", "server": ("127.0.0.1", 80)}
    assert refusal({**scope, "headers": [(b"host", b"localhost")]}, {"localhost"}) is None
    assert refusal({**scope, "headers": [(b"host", b"evil.example")]}, {"localhost"}) is not None


# What visitors may read


def zipped(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def png(colour: str = "white") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), colour).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_visitor_cannot_read_pictures_of_the_machine_through_an_upload(visitor, secret):
    row = {"file_name": str(secret), "conditioning_image_file_name": str(secret), "text": "a"}
    path = Path(visitor.uploaded("metadata.jsonl", json.dumps(row).encode())["path"])
    assert path.is_file()
    for folder in (path.parent, f"{path.parent}/../{path.parent.name}", path.parent.parent):
        told = visitor.call("look_at_folder", None, str(folder), "")
        assert "a folder of the studio itself" in str(told)
    link = secret.parent / "link"
    link.symlink_to(path.parent)
    assert "a folder of the studio itself" in str(visitor.call("look_at_folder", None, str(link), ""))


ROW = {"file_name": "0.png", "conditioning_image_file_name": "0.png", "text": "a"}


def leading_out(folder: Path, secret: Path, way: str) -> Path:
    """A folder of pairs in which one thing leads to the secret."""
    folder.mkdir()
    (folder / "0.png").write_bytes(png())
    names = {"absolute": str(secret), "up": f"../{secret.name}", "link": "linked.png", "folder": "there/secret.png"}
    if way in names:
        (folder / "linked.png").symlink_to(secret)
        (folder / "there").symlink_to(secret.parent)
        for unused in {"linked.png", "there"} - {names[way].partition("/")[0]}:
            (folder / unused).unlink()
        row = ROW | {"conditioning_image_file_name": names[way]}
        (folder / "metadata.jsonl").write_text(json.dumps(row))
    elif way == "prompt.json":
        (folder / "prompt.json").write_text(json.dumps({"source": str(secret), "target": "0.png", "prompt": "a"}))
    elif way in ("caption", "condition"):
        for part in ("images", "conditioning_images"):
            (folder / part).mkdir()
            (folder / part / "0.png").write_bytes(png())
        (folder / "images" / "0.txt").write_text("a")
        led = folder / ("images/0.txt" if way == "caption" else "conditioning_images/0.png")
        led.unlink()
        led.symlink_to(secret)
    elif way == "metadata":
        (secret.parent / "elsewhere.jsonl").write_text(json.dumps(ROW))
        (folder / "metadata.jsonl").symlink_to(secret.parent / "elsewhere.jsonl")
    elif way == "shard":
        (secret.parent / "elsewhere.tar").write_bytes(b"")
        (folder / "0.tar").symlink_to(secret.parent / "elsewhere.tar")
    elif way == "nothing there":
        (folder / "metadata.jsonl").write_text(json.dumps(ROW | {"file_name": "../no.png"}))
    return folder


@pytest.mark.parametrize(
    "way",
    [
        *("absolute", "up", "link", "folder", "prompt.json", "caption", "condition", "metadata", "shard"),
        "nothing there",  # the same words: whether a file is there is not told either
    ],
)
def test_no_row_and_no_link_leads_out_of_a_folder_that_a_visitor_named(visitor, tmp_path, secret, way):
    told = visitor.call("look_at_folder", None, str(leading_out(tmp_path / "pairs", secret, way)), "")
    assert str(told).startswith("pairs names pictures that are not in it")


@pytest.mark.parametrize("column", ["file_name", "conditioning_image_file_name"])
@pytest.mark.parametrize(
    "name", ["{secret}", "../../gradio/secret.png", "../../../../../../etc/hostname", "a/../../b.png"]
)
def test_no_row_of_a_zip_leads_out_of_it(visitor, secret, column, name):
    row = ROW | {column: name.format(secret=secret)}
    content = zipped({"0.png": png(), "metadata.jsonl": json.dumps(row).encode()})
    told = str(visitor.call("look_at_zip", visitor.uploaded("mine.zip", content), "", ""))
    assert told.startswith("mine.zip names pictures that are not in it")
    assert "powersteer-studio-" not in told


def test_saved_data_sets_and_pipes_are_not_looked_through(visitor, tmp_path):
    datasets = pytest.importorskip("datasets")
    cell = {"bytes": None, "path": "/etc/hostname"}
    table = datasets.Dataset.from_dict({"image": [cell], "conditioning_image": [cell], "text": ["a"]})
    table.save_to_disk(str(tmp_path / "saved"))
    assert "is a data set that" in str(visitor.call("look_at_folder", None, str(tmp_path / "saved"), ""))
    pairs = draw_pairs(tmp_path / "pairs", 2)
    os.mkfifo(pairs / "images" / "pipe.png")
    assert "neither a file nor a folder" in str(visitor.call("look_at_folder", None, str(pairs), ""))


@pytest.mark.parametrize(
    "name", ["/no/such/folder", "~nobody-of-this-name", "a\0b", "a" * 5000, "\ud800", "../" * 3000]
)
def test_names_that_no_folder_has_are_refused_in_words(visitor, name):
    assert str(visitor.call("look_at_folder", None, name, "")).startswith("there is no folder of pairs")


def test_a_folder_of_ones_own_can_be_named(visitor, tmp_path):
    pairs = draw_pairs(tmp_path / "pairs", 8)
    (pairs / "again").symlink_to(pairs / "images")  # a link within it
    _, report, _ = visitor.call("look_at_folder", None, f" {pairs} ", "")
    assert report.startswith("**8 pairs.**")


def test_what_is_found_in_pairs_is_told_the_worst_first(visitor, tmp_path):
    pairs = draw_pairs(tmp_path / "pairs", 8)
    for i in (2, 5):
        (pairs / "images" / f"{i}.png").write_bytes(b"?")
    Image.new("L", (32, 32)).save(pairs / "drawings" / "3.png")
    _, report, _ = visitor.call("look_at_folder", None, str(pairs), "")
    report = html.unescape(report)
    told = report.splitlines()[1:]
    severities = [line.split(":")[0].removeprefix("- ") for line in told]
    assert set(severities) == {"Error", "Warning", "Note"}
    assert severities == sorted(severities, key=["Error", "Warning", "Note"].index)
    assert told[0].startswith("- Error: 2 pairs cannot be read, such as pairs[2]: 'images/2.png'")
    assert "- Warning: 1 conditions are blank, such as that of pairs[3]" in report
    small = "such as 'images/0.png' (column file_name), 32×32: give larger ones"
    assert told[-1] == f"- Note: 6 pictures are enlarged to 64 pixels, {small}"


def test_behind_a_password_nobody_names_a_folder_of_the_server(locked_studio, tmp_path):
    pairs = draw_pairs(tmp_path / "pairs", 8)
    stranger = Visitor(locked_studio)
    assert stranger.ask("GET", "/config").status == 401
    form = b"username=me&password=word"
    kind = {"Content-Type": "application/x-www-form-urlencoded"}
    assert stranger.ask("POST", "/login", {**kind, "Origin": "http://evil.example"}, form).status == 403
    entered = stranger.ask("POST", "/login", kind, form)
    cookies = "; ".join(value.partition(";")[0] for name, value in entered.headers if name == "set-cookie")
    me = Visitor(locked_studio, Cookie=cookies)
    told = str(me.call("look_at_folder", None, str(pairs), ""))
    assert told == "there are no pairs: drop a zip"
    assert me.ask("POST", "/gradio_api/upload", {"Origin": "http://evil.example"}, b"").status == 403
    assert me.ask("GET", "/config", host="studio.example").status == 200  # a proxy that passes Host on
    content = {str(file.relative_to(pairs)): file.read_bytes() for file in pairs.rglob("*.*")}
    _, report, _ = me.call("look_at_zip", me.uploaded("pairs.zip", zipped(content)), "", "")
    assert report.startswith("**8 pairs.**")


def test_no_file_of_the_machine_can_be_named_as_an_upload(visitor, secret):
    forged = {"path": str(secret), "orig_name": "secret.png", "meta": {"_type": "gradio.FileData"}}
    for name, *rest in (("reloaded",), ("look_at_zip", "", ""), ("extracted", AS_IT_IS, "sketch")):
        assert isinstance(visitor.call(name, forged, *rest), Exception)
    for path in (secret, f"{secret.parent}/./secret.png", "/etc/hostname", Path(__file__)):
        assert visitor.ask("GET", f"/gradio_api/file={path}").status == 403


@pytest.mark.parametrize(
    "name",
    ["a" * 300 + ".png", "a" * 5000, "a\0b.png", "../../../x.png", "..", ".", "", "ä" * 300, "%2e%2e/x", "a\\..\\b"],
)
def test_names_of_uploads_stay_within_their_folder(visitor, name):
    answer = visitor.upload(name, b"x")
    assert answer.status in (200, 400, 413)
    if answer.status == 200:
        [path] = json.loads(answer.body)
        assert Path(path).parent.parent.name == "gradio"
        assert Path(path).read_bytes() == b"x"


# Values that no page sends

SLOT = ["sketch", None, 1, 0, 1]
ODD = [
    None,
    "",
    "x",
    "nan",
    [],
    [1],
    {},
    {"a": 1},
    True,
    -1,
    -(10**30),
    10**400,
    2.5,
    1e308,
    float("nan"),
    float("inf"),
]


def wanted(place: int, value) -> list:
    given = ["a fox", "", 0, 1, 6, 3, "euler", False, *SLOT, *([None, None, 1, 0, 1] * 2)]
    given[place] = value
    return given


@pytest.mark.parametrize(
    ("handler", "places"), [("generate", range(8)), pytest.param("sketch", range(23), marks=pytest.mark.slow)]
)
def test_any_value_of_any_field_is_taken_or_refused_in_words(visitor, caplog, capfd, handler, places):
    said = set()
    for place in places:
        for value in ODD:
            given = wanted(place, value)
            told = visitor.call(handler, *([True] if handler == "sketch" else []), *given)
            said.add(str(told) if isinstance(told, Exception) else "taken")
    assert "" not in said
    assert "None" not in said
    assert len(said) > len(places)
    assert not [one for one in said if "went wrong" in one]
    assert not caplog.records
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("value", [one for one in ODD if one is not True])
def test_seeds_and_updates_that_are_no_numbers_are_refused(visitor, tmp_path, value, capfd):
    _, report, _ = visitor.call("look_at_folder", None, str(draw_pairs(tmp_path / "pairs", 2)), "")
    assert report.startswith("**2 pairs.**")
    updates = visitor.call("start", None, "mine", value, "")
    assert "max_train_steps" in str(updates)
    seed = visitor.call("next_seed", value)
    assert seed == [1] if value in (None, "", [], {}) else "seed" in str(seed)
    for name in ([None], None, {"a": 1}, "x" * 1000, "../up", "a\0"):
        assert "name" in str(visitor.call("start", None, name, 20, ""))
    assert "default_prompt" in str(visitor.call("start", None, "mine", 20, [1]))
    assert "Traceback" not in capfd.readouterr().err


def test_the_seed_after_the_last_is_the_first(visitor):
    assert visitor.call("next_seed", 2**32 - 1) == [0]
    assert visitor.call("next_seed", 41) == [42]


def test_files_and_choices_that_are_not_there_are_refused_in_words(visitor, capfd):
    picture = visitor.uploaded("it.png", png())
    assert "drop one" in str(visitor.call("extracted", None, "canny", "sketch"))
    assert "there is no picture" in str(visitor.call("reloaded", None))
    for event in ({"index": 3, "value": ""}, {"index": "x", "value": ""}, {"index": [0], "value": ""}):
        assert "no such picture" in str(visitor.call("select", None, event=event))
    for adapter in ("/etc", "mine", ["sketch"]):
        assert "there is no adapter" in str(visitor.call("chosen", adapter))
    for extractor in ("no", [], ["canny"]):
        told = visitor.call("extracted", picture, extractor, "sketch")
        assert isinstance(told, Exception)
        assert "went wrong" not in str(told)
    assert "Traceback" not in capfd.readouterr().err
