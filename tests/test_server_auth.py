"""Who may come in, what a socket says and survives, and how the command starts and ends."""
import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import httpx
import pytest
import uvicorn
import websockets
from fastapi.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from deerml.app.server import MAX_MESSAGE_BYTES, listen, make_app, token_of
from deerml.core.errors import DeermlError
from deerml.core.settings import Home

TOKEN = "t0ken-of-the-yard-0123456789"  # noqa: S105
HERE = {"client": ("127.0.0.1", 5), "base_url": "http://localhost"}
FAR = {"client": ("10.0.0.7", 5), "base_url": "http://deer.lan:8460"}


class EchoDesk:
    "Says who is asked, and sends as many pictures as it is told"

    def __init__(self, store, reviewer):
        self.reviewer = reviewer

    def handle(self, message):
        if message["type"] == "fail":
            raise RuntimeError("a secret")
        yield {"type": "hello", "reviewer": self.reviewer, "heard": message}, []
        for number in range(message.get("pictures", 0)):
            yield {"type": "image", "frame_id": number, "buffers": 1}, [bytes([number]) * 100_000]


@pytest.fixture
def home(tmp_path):
    return Home.create(tmp_path / "yard")


def app_of(home, **options):
    return make_app(home, reviewer="ann", make_desk=EchoDesk, **options)


@pytest.fixture
def local(home):
    with TestClient(app_of(home), **HERE) as client:
        yield client


@pytest.fixture
def far(home):
    with TestClient(app_of(home, host="0.0.0.0", token=TOKEN), **FAR, follow_redirects=False) as client:
        yield client


def routes(app) -> list[tuple[str, str]]:
    "Every method and path of the application, found by walking what FastAPI has registered"
    paths = {(method.upper(), path) for path, operations in app.openapi()["paths"].items() for method in operations}
    pages = {("GET", path) for path in ("/", "/review", "/review/static/page.js", "/openapi.json", "/nowhere", "/api")}
    return sorted((method, re.sub(r"\{\w+\}", "1", path)) for method, path in paths | pages)


# -- the token ------------------------------------------------------------------------------------------------------


def test_every_route_needs_the_token(far):
    walked = routes(far.app)
    assert len(walked) >= 11
    for method, path in walked:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Bearer {TOKEN}x"}, {"Authorization": f"Basic {TOKEN}"}, {"Authorization": TOKEN},
                        {"Authorization": "Bearer \xe9"}, {"Cookie": "deerml=1"}, {"Host": "localhost"}, {"X-Forwarded-For": "127.0.0.1"}, {"Host": "x/healthz?"}, {"Host": "x/healthz#"}):
            answer = far.request(method, path, headers={name: value.encode("latin-1") for name, value in headers.items()})
            assert answer.status_code == 401, (method, path, headers)
            assert TOKEN not in answer.text and answer.json()["error"]["code"] == "NO_TOKEN"
        assert far.request(method, f"{path}?token=wrong").status_code == 401
        assert far.request(method, path, headers={"Authorization": f"Bearer {TOKEN}"}).status_code != 401
    assert far.get("/healthz").json() == {"status": "ok"}
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        with pytest.raises(WebSocketDisconnect), far.websocket_connect("ws://deer.lan:8460/review/ws", headers=headers):
            pass


def test_no_route_was_forgotten(far):
    "A new page must be known to the walk above"
    pages = {route.path for route in far.app.routes if getattr(route, "path", "").startswith(("/review", "/healthz")) or getattr(route, "path", "") == "/"}
    assert pages <= {"/", "/healthz", "/review", "/review/static/{name}", "/review/ws"}


def test_a_browser_gets_a_cookie_and_a_clean_address(far):
    answer = far.get(f"/review?token={TOKEN}&reviewer=ben")
    cookie = answer.headers["set-cookie"]
    assert answer.status_code == 303 and answer.headers["location"] == "/review?reviewer=ben" and TOKEN not in str(answer.headers)
    assert "HttpOnly" in cookie and "samesite=strict" in cookie.lower()
    page = far.get("/review")
    assert page.status_code == 200 and "page.js" in page.text
    assert far.get("/review/static/page.js").status_code == 200


def test_the_token_opens_no_other_address(far):
    for path in ("/api/detections", "/review/static/page.js", "/openapi.json", "/review/ws"):
        assert far.get(f"{path}?token={TOKEN}").status_code == 401


def test_a_cookie_alone_changes_nothing(far):
    far.get(f"/review?token={TOKEN}")
    body = {"json": {"verdict": "correct"}}
    for headers in ({}, {"Origin": "http://evil.example"}, {"Origin": "null"}, {"Origin": "http://deer.lan:8461"}, {"Origin": "http://deer.lan"}, {"Sec-Fetch-Site": "same-site"}):
        assert far.post("/api/detections/1/review", **body, headers=headers).json()["error"]["code"] == "FOREIGN_PAGE"
        with pytest.raises(WebSocketDisconnect), far.websocket_connect("ws://deer.lan:8460/review/ws", headers=headers):
            pass
    ours = {"Origin": "http://deer.lan:8460"}
    assert far.post("/api/detections/1/review", **body, headers=ours).status_code == 404
    with far.websocket_connect("ws://deer.lan:8460/review/ws", headers=ours | {"Cookie": "; ".join(f"{name}={value}" for name, value in far.cookies.items())}) as talk:
        talk.send_json({"type": "ready"})
        assert talk.receive_json()["reviewer"] == "ann"


def test_people_are_told_in_words(far):
    answer = far.get("/review", headers={"Accept": "text/html"})
    assert answer.status_code == 401 and "needs its token" in answer.text and answer.headers["content-type"].startswith("text/html")


def test_where_others_come_a_token_is_needed(home):
    for host in ("0.0.0.0", "::", "10.0.0.7", "deer.lan"):
        with pytest.raises(DeermlError) as caught:
            make_app(home, host=host)
        assert caught.value.code == "TOKEN_NEEDED"


def test_the_token_is_a_secret(home, monkeypatch):
    token = token_of(home, make=True)
    path = home.path / "token"
    assert len(token) > 40 and path.stat().st_mode & 0o777 == 0o600
    for change in (lambda: path.chmod(0o644), lambda: (path.chmod(0o600), path.write_text("short")), lambda: monkeypatch.setenv("DEERML_TOKEN", "short")):
        change()
        with pytest.raises(DeermlError, match="token"):
            token_of(home)
    monkeypatch.setenv("DEERML_TOKEN", TOKEN)
    assert token_of(home) == TOKEN


# -- without a token ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "localhost.evil.example", "10.0.0.7:80", "127.0.0.1.evil.example", "", "0.0.0.0", "[::2]:80"])
def test_a_name_pointed_at_this_computer(local, host):
    for method, path in [*routes(local.app), ("GET", "/healthz")]:
        assert local.request(method, path, headers={"Host": host}).status_code == 403, (method, path)


@pytest.mark.parametrize("host", ["localhost", "localhost:9999", "127.0.0.1:8460", "[::1]:8460", "[::1]", "127.0.0.2"])
def test_the_names_of_this_computer(local, host):
    assert local.get("/review", headers={"Host": host}).status_code == 200


def test_pages_from_elsewhere_change_nothing(local):
    body = {"json": {"verdict": "correct"}}
    for headers in ({"Origin": "http://evil.example"}, {"Origin": "null"}, {"Origin": "http://localhost:3000"}, {"Origin": ""}, {"Sec-Fetch-Site": "cross-site"}):
        assert local.post("/api/detections/1/review", **body, headers=headers).status_code == 403, headers
        with pytest.raises(WebSocketDisconnect), local.websocket_connect("ws://localhost/review/ws", headers=headers):
            pass
    for headers in ({}, {"Origin": "http://localhost"}, {"Sec-Fetch-Site": "same-origin"}):
        assert local.post("/api/detections/1/review", **body, headers=headers).status_code == 404


def test_a_caller_from_elsewhere(home):
    with TestClient(app_of(home), client=("10.0.0.7", 5), base_url="http://localhost") as client:
        assert client.get("/review").json()["error"]["code"] == "ELSEWHERE"


def test_every_answer_has_its_guards(local):
    for path in ("/", "/review", "/nowhere", "/review/static/page.js", "/api/detections"):
        headers = local.get(path).headers
        assert "default-src 'self'" in headers["content-security-policy"] and "unsafe" not in headers["content-security-policy"] and headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("name", ["../server.py", "..%2f..%2fapp%2fserver.py", "%2e%2e/desk.py", "page.html", "review.ipynb", ".", "", "page.js/", "page.js%00", "/etc/passwd"])
def test_only_what_is_meant_to_be_loaded(local, name):
    answer = local.get(f"/review/static/{name}", follow_redirects=False)
    assert answer.status_code in (307, 404) and "import" not in answer.text


# -- a real server --------------------------------------------------------------------------------------------------


@contextmanager
def running(app, port=0):
    "uvicorn on loopback, in a thread; gives its port"
    with listen("127.0.0.1", port) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", ws_max_size=MAX_MESSAGE_BYTES, ws_per_message_deflate=False, timeout_graceful_shutdown=2))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(10)
            assert not thread.is_alive()


def talk(port, conversation, query="", **options):
    async def run():
        async with websockets.connect(f"ws://127.0.0.1:{port}/review/ws{query}", max_size=None, **options) as socket:
            return await conversation(socket)
    return asyncio.run(run())


def test_a_conversation_with_pictures(home):
    async def conversation(socket):
        await socket.send(json.dumps({"type": "need", "pictures": 3}))
        hello = json.loads(await socket.recv())
        got = []
        for _ in range(3):
            message = json.loads(await socket.recv())
            got += [(message["buffers"], len(await socket.recv()))]
        return hello["reviewer"], got

    with running(app_of(home)) as port:
        assert talk(port, conversation, "?reviewer=ben") == ("ben", [(1, 100_000)] * 3)


def test_words_that_are_no_messages_leave_the_socket_open(home):
    async def conversation(socket):
        codes = []
        for bad in ("", "[]", "{", "null", '{"type": 3}', b"binary", "[" * 9000, '{"type": "fail"}'):
            await socket.send(bad)
            codes.append(json.loads(await socket.recv())["code"])
        await socket.send('{"type": "ready"}')
        return codes, json.loads(await socket.recv())["type"]

    with running(app_of(home)) as port:
        assert talk(port, conversation) == (["BAD_MESSAGE"] * 7 + ["BUG"], "hello")


def test_a_message_that_is_too_long_ends_the_socket(home):
    async def conversation(socket):
        await socket.send(json.dumps({"type": "ready", "more": "x" * MAX_MESSAGE_BYTES}))
        with pytest.raises(websockets.ConnectionClosed) as caught:
            await socket.recv()
        return caught.value.rcvd.code

    with running(app_of(home)) as port:
        assert talk(port, conversation) == 1009


def test_too_many_pages_and_strange_names_are_told(home):
    async def closing(socket):
        with pytest.raises(websockets.ConnectionClosed) as caught:
            await socket.recv()
        return caught.value.rcvd.code

    async def both(socket):
        await socket.send('{"type": "ready"}')
        await socket.recv()
        async with websockets.connect(f"ws://127.0.0.1:{port}/review/ws") as second:
            return await closing(second)

    with running(app_of(home, max_sockets=1)) as port:
        assert talk(port, both) == 1013
        assert talk(port, closing, "?reviewer=import:x") == 1008

        async def again(socket):
            await socket.send('{"type": "ready"}')
            return json.loads(await socket.recv())["type"]

        assert talk(port, again) == "hello", "the place of a page that left is free"


def test_after_a_restart_the_page_finds_its_server(home):
    async def ready(socket):
        await socket.send('{"type": "ready"}')
        return json.loads(await socket.recv())["type"]

    with running(app_of(home)) as port:
        assert talk(port, ready) == "hello"
    with running(app_of(home), port):
        assert talk(port, ready) == "hello"


def test_a_page_that_leaves_in_the_middle(home):
    async def leave(socket):
        await socket.send(json.dumps({"type": "need", "pictures": 200}))
        await socket.recv()

    async def ready(socket):
        await socket.send('{"type": "ready"}')
        return json.loads(await socket.recv())["type"]

    with running(app_of(home)) as port:
        for _ in range(3):
            talk(port, leave, close_timeout=0.2)
        assert talk(port, ready) == "hello"


def test_an_announced_upload_is_refused_before_it_comes(home):
    head = b"POST /api/detections HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=b\r\nContent-Length: 2000000000\r\n\r\nx"
    with running(app_of(home)) as port:
        answer = raw(port, head)
    assert b" 413 " in answer.split(b"\r\n")[0] and b"TOO_LARGE" in answer


def raw(port: int, request: bytes) -> bytes:
    import socket
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        connection.sendall(request)
        answer = b""
        while b"}}" not in answer and (piece := connection.recv(65536)):
            answer += piece
        return answer


# -- the command ----------------------------------------------------------------------------------------------------

CLI = [sys.executable, "-c", "from deerml.app.cli import main; main()"]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_the_command_serves_and_ends(home, how):
    command = [*CLI, "review", "--home", str(home.path), "--port", "0", "--host", "0.0.0.0" if how == signal.SIGINT else "127.0.0.1", "--no-browser", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    try:
        said = json.loads(process.stdout.readline())
        answer = httpx.get(said["url"], follow_redirects=True, timeout=20)
        assert answer.status_code == 200 and "page.js" in answer.text
        assert "token" in said["url"] or how == signal.SIGTERM
        started = time.monotonic()
        process.send_signal(how)
        rest, errors = process.communicate(timeout=15)
        assert process.returncode in (0, -how) and "Traceback" not in errors and TOKEN not in errors and rest == "" and time.monotonic() - started < 10
    finally:
        process.kill()


def test_a_taken_port_is_told(home):
    with listen("127.0.0.1", 0) as taken:
        ran = subprocess.run([*CLI, "review", "--home", str(home.path), "--port", str(taken.getsockname()[1]), "--no-browser"], capture_output=True, text=True, check=False)
    assert ran.returncode == 1 and "is taken" in ran.stderr and "--port" in ran.stderr and "Traceback" not in ran.stderr


def test_lab_without_jupyterlab(home, monkeypatch):
    import importlib.util

    from deerml.app.cli_review import open_lab
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DeermlError) as caught:
        open_lab(home)
    assert caught.value.code == "NO_JUPYTERLAB"
