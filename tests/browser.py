"""A browser for the tests that need one, and the reasons for which they are skipped without it."""
import shutil
import subprocess
import tarfile
import threading
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
