"""Two Colabs on this machine. `stand_in` is an executable that prints what google-colab-cli 0.7.5 prints; `local_colab`
serves the endpoints that the real command line speaks to, in front of an ordinary Jupyter server.

The real one needs Python 3.12 and packages of its own, so it is used where COLAB_CLI_PYTHON names such an environment:

    python3.12 -m venv colab && colab/bin/pip install google-colab-cli==0.7.5 jupyter_server ipykernel
"""
import contextlib
import json
import os
import socket
import stat
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

STAND_IN = '''#!{python}
import json, os, pathlib, shutil, subprocess, sys
place = pathlib.Path({place!r})
arguments = sys.argv[1:]
with open(place / "calls.txt", "a") as file:
    print(*arguments, file=file)
assert arguments[0] == "--auth" and arguments[2] == "--config" and "/" in arguments[3], "explicit login, and a folder in front of the file"
command, rest = arguments[4], arguments[5:]
state = pathlib.Path(arguments[3])
told = json.loads((place / "told.json").read_text()) if (place / "told.json").exists() else dict()
live = json.loads(state.read_text()) if state.exists() else dict()
def option(name): return rest[rest.index(name) + 1]
if command == "new":
    print(f"[colab] Creating session '{{option('-s')}}'...")
    if told.get("refuse"):
        print("[colab] Allocation refused (precondition failed). This can mean too many active sessions.", file=sys.stderr)
        sys.exit(1)
    gpu = option("--gpu") if option("--gpu") in ("T4", "L4", "H100") else "A100"
    state.write_text(json.dumps({{option("-s"): told.get("gives", gpu)}}))
    print("[colab] Session READY.")
elif command == "sessions":
    for name, gpu in live.items():
        print(f"[{{name}}] ep1 | Hardware: {{gpu}} | Shape: Standard | Variant: GPU")
elif command == "upload":
    shutil.copy(rest[2], "/" + rest[3])
elif command == "exec":
    subprocess.run([sys.executable, option("-f")])  # and 0, whatever came of it
elif command == "download":
    if not os.path.exists("/" + rest[2]):
        print("[colab] Error: File or directory not found", file=sys.stderr)
        sys.exit(1)
    shutil.copy("/" + rest[2], rest[3])
elif command == "stop":
    state.unlink(missing_ok=True)
'''

LAUNCHER = '''#!{python}
import requests, colab_cli.auto_update as update, colab_cli.common as common, colab_cli.client as client
common.Prod = lambda: client.Prod(domain={url!r}, api={url!r})
common.get_credentials = lambda *a, **k: requests.Session()
update.run_background_check = lambda *a, **k: None
from colab_cli.cli import main
main()
'''


def executable(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def stand_in(place: Path) -> Path:
    return executable(place / "colab", STAND_IN.format(python=sys.executable, place=str(place)))


class Endpoints(BaseHTTPRequestHandler):
    "What Colab answers when a machine is asked for, listed and given back"

    def log_message(self, *_):
        return

    def _answer(self):
        url = self.path.split("?")[0]
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        machine = {"accelerator": self.server.gives, "endpoint": "ep1", "variant": 1, "runtimeProxyInfo": {"token": "", "tokenExpiresInSeconds": 3600, "url": self.server.jupyter}}
        live, code = self.server.live, 200
        if url == "/tun/m/assign" and self.command == "GET":
            answer = {"acc": self.server.gives, "nbh": "x", "token": "xsrf", "variant": "GPU"}
        elif url == "/tun/m/assign":
            live.append("ep1")
            self.server.asked.append(self.path)
            answer = machine
        elif url == "/tun/m/assignments":
            answer = {"assignments": [machine | {"machineShape": 0} for _ in live]}
        elif url.startswith("/tun/m/unassign/"):
            if self.command == "POST":
                live.clear()
            answer = {"token": "x"}
        else:
            answer, code = {}, 404
        data = b")]}'\n" + json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = _answer


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextlib.contextmanager
def local_colab(place: Path, python: str):
    "The real command line, pointed at this machine: its executable, and the server that stands for Colab"
    port = _free_port()
    options = ["--no-browser", "--allow-root", "--ServerApp.disable_check_xsrf=True", "--IdentityProvider.token=", "--ServerApp.root_dir=/", "--ip=127.0.0.1", f"--port={port}"]
    jupyter = subprocess.Popen([python, "-m", "jupyter_server", *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | {"HOME": str(place)})
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoints)
    server.jupyter, server.live, server.asked, server.gives = f"http://127.0.0.1:{port}", [], [], "T4"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        until = time.monotonic() + 40
        while time.monotonic() < until:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{server.jupyter}/api", timeout=2).close()
                break
            time.sleep(0.2)
        yield executable(place / "colab", LAUNCHER.format(python=python, url=f"http://127.0.0.1:{server.server_port}")), server
    finally:
        server.shutdown()
        server.server_close()
        jupyter.terminate()
        jupyter.wait()
