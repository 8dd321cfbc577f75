"""A browser for the tests that need one, and the reasons for which they are skipped without it."""
import shutil
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
