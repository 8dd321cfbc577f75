"""A browser for the tests that need one, and the reasons for which they are skipped without it."""
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PLACES = ("/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome")
OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]


def chromium() -> str | None:
    "Where Chromium lies, None when there is none"
    found = [place for place in PLACES if Path(place).exists()]
    return found[0] if found else shutil.which("chromium")


@contextmanager
def launched():
    "A headless Chromium. Skips the test, with the reason, where there is none."
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install 'deerml[dev]'")
    path = chromium()
    if path is None:
        pytest.skip("Chromium is not installed: apt install chromium")
    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=OPTIONS)
        yield browser
        browser.close()


class Quiet(SimpleHTTPRequestHandler):
    "Files from several folders, by the first part of the path; without a line for each request"

    def __init__(self, *args, folders: dict[str, Path], **kwargs):
        self.folders = folders
        super().__init__(*args, **kwargs)

    def translate_path(self, path: str) -> str:
        top, _, rest = path.split("?")[0].lstrip("/").partition("/")
        return str(self.folders.get(top, Path("/nowhere")) / rest)

    def end_headers(self) -> None:
        self.send_header("Cache-Control", "no-store")
        super().end_headers()

    def log_message(self, *args) -> None:
        return


@contextmanager
def served(**folders: Path) -> Iterator[str]:
    "The address of a server on loopback: `served(static=...)` gives `/static/...`"
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, folders=folders))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def drag(page, start: tuple[float, float], end: tuple[float, float]) -> None:
    "Press, move and release the mouse"
    page.mouse.move(*start)
    page.mouse.down()
    page.mouse.move((start[0] + end[0]) / 2, (start[1] + end[1]) / 2)
    page.mouse.move(*end)
    page.mouse.up()


def axe(folder: Path) -> str:
    "The source of axe-core, from the registry through npm, kept in `folder`. Skips the test, with the reason, where it cannot be had."
    if not list(folder.glob("axe-core-*.tgz")):
        if shutil.which("npm") is None:
            pytest.skip("npm is absent, and axe-core comes from there")
        try:
            packed = subprocess.run(["npm", "pack", "axe-core", "--silent"], cwd=folder, capture_output=True, text=True, timeout=60)
        except subprocess.TimeoutExpired:
            pytest.skip("the registry did not answer within a minute")
        if packed.returncode:
            pytest.skip(f"axe-core could not be fetched: {packed.stderr.strip()[:200]}")
    with tarfile.open(next(folder.glob("axe-core-*.tgz"))) as archive:
        return archive.extractfile("package/axe.min.js").read().decode()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


def notebook_of(path: Path, *cells: str) -> Path:
    "A notebook with these cells of code"
    told = [{"cell_type": "code", "execution_count": None, "id": f"cell-{n}", "metadata": {}, "outputs": [], "source": source} for n, source in enumerate(cells)]
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    path.write_text(json.dumps({"cells": told, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}))
    return path


@contextmanager
def jupyter_lab(folder: Path) -> Iterator[tuple[str, str, int]]:
    "JupyterLab on loopback, with settings of its own: its address, its token and its process. Skips the test where it is not installed."
    pytest.importorskip("jupyterlab", reason="JupyterLab is not installed: pip install 'deerml[notebook]'")
    port, token = free_port(), secrets.token_hex(16)
    own = {f"JUPYTER_{name}_DIR": str(folder / ".jupyter" / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")} | {"JUPYTERLAB_SETTINGS_DIR": str(folder / ".jupyter/settings"), "JUPYTERLAB_WORKSPACES_DIR": str(folder / ".jupyter/workspaces")}
    options = [f"--ServerApp.port={port}", "--ServerApp.ip=127.0.0.1", "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={folder}", "--ServerApp.open_browser=False",
               "--LabApp.expose_app_in_browser=True", "--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", *(["--allow-root"] if os.geteuid() == 0 else [])]
    asked = folder / ".jupyter/settings/@jupyterlab/apputils-extension/notification.jupyterlab-settings"
    asked.parent.mkdir(parents=True)
    asked.write_text('{"fetchNews": "false", "checkForUpdates": false}')  # or it asks, over the review
    with open(folder / "lab.log", "w") as log:
        process = subprocess.Popen([sys.executable, "-m", "jupyterlab", *options], cwd=folder, stdout=log, stderr=log, env=os.environ | own | {"PYTHONPATH": str(ROOT)})
        try:
            wait_for(f"http://127.0.0.1:{port}/api/status?token={token}", process)
            yield f"http://127.0.0.1:{port}", token, process.pid
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_for(url: str, process: subprocess.Popen, seconds: float = 90) -> None:
    "Until a server answers at this address"
    end = time.monotonic() + seconds
    while True:
        assert process.poll() is None and time.monotonic() < end, f"no server at {url.split('?')[0]}"
        try:
            return urllib.request.urlopen(url, timeout=5).close()
        except OSError:
            time.sleep(0.2)


def open_notebook(page, address: str, token: str, name: str) -> None:
    "The notebook in JupyterLab, with its kernel ready"
    page.goto(f"{address}/doc/tree/{name}?token={token}")
    page.wait_for_function("window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'", timeout=90_000)


def run_all(page) -> None:
    page.evaluate("jupyterapp.commands.execute('notebook:run-all-cells')")
    page.wait_for_selector(".deerml-review", timeout=60_000)
