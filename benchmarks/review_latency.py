"""From a key press to the next picture on the screen, in Chromium: on the page, in JupyterLab, and in Label Studio beside.

    python benchmarks/review_latency.py              # 200 frames each, about four minutes
    python benchmarks/review_latency.py --label-studio ~/venv/bin/label-studio

Frames of 1280 x 720 pixels and about 300 KB, one to a window, each with one box. First a key every 300 ms, then each as
soon as it counts, which is 100 ms after the picture before. A time runs from the press (the time stamp of the browser's
event) to the frame in which the picture was handed to the screen. Needs `deerml[notebook,serve,dev]` and Chromium.
"""
import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import cv2
import httpx
import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[1] / "tests")]
from browser import free_port, jupyter_lab, launched, notebook_of, open_notebook, run_all, wait_for  # noqa: E402
from deerml.core.box import Box  # noqa: E402
from review_homes import Shot, review_home  # noqa: E402

WIDTH, HEIGHT = 1280, 720
PACE_MS = 300
MEDIAN_MS, P95_MS = 35, 60  # targets
COUNT_TIMES = """
window.times = []; window.painted = 0; window.refused = 0;
document.addEventListener("deerml:refused", () => window.refused++);
document.addEventListener("deerml:painted", ({ detail }) => {
  window.painted++;
  window.lastPainted = performance.now();
  if (detail.key_time !== null) window.times.push(detail.painted_time - detail.key_time);
});
"""
SATURATED = """(count) => new Promise((done) => {
  const root = document.querySelector(".deerml-review");
  const timer = setInterval(() => {
    if (times.length >= count || root.dataset.kind === "end") {
      clearInterval(timer);
      return done();
    }
    if (performance.now() - lastPainted > 105) {
      lastPainted = Infinity;
      root.dispatchEvent(new KeyboardEvent("keydown", { key: "c", bubbles: true, cancelable: true }));
    }
  }, 2);
  document.addEventListener("deerml:refused", () => { lastPainted = performance.now() - 90; });
})"""


def pictures(count: int) -> list[bytes]:
    "JPEGs of about 300 KB, all different: the noise of one, moved"
    random = np.random.default_rng(0)
    noise = cv2.randn(np.empty((HEIGHT, WIDTH, 3), np.int16), 0, 40)
    result = []
    for _ in range(count):
        coarse = cv2.resize(random.integers(30, 200, (6, 9, 3), np.uint8), (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
        pixels = np.clip(coarse + np.roll(noise, random.integers(0, HEIGHT, 2), (0, 1)), 0, 255).astype(np.uint8)
        result.append(cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 91])[1].tobytes())
    return result


def make_home(path: Path, data: list[bytes]):
    found = [(0.8, Box(400, 250, 200, 150))]
    with review_home(path, (Shot(one, found, number // 4, f"camera{number % 4}") for number, one in enumerate(data))) as store:
        return store.home


@contextmanager
def on_the_page(home):
    "The address of the review, by the command that people use"
    command = [sys.executable, "-c", "from deerml.app.cli import main; main()", "review", "--home", str(home.path), "--port", "0", "--no-browser", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": sys.path[0]})
    try:
        yield json.loads(process.stdout.readline())["url"]
    finally:
        process.terminate()
        process.wait(20)


def until(page, condition: str, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not page.evaluate(condition):
        if time.monotonic() > end:
            raise TimeoutError(condition)
        page.wait_for_timeout(50)


def paced(page, count: int) -> list[float]:
    "A real key every 300 ms; a press that comes too early is refused and made again"
    until(page, "painted > 0")
    page.wait_for_timeout(500)
    start, presses = time.monotonic(), 0
    while len(times := page.evaluate("times")) < count:
        presses += 1
        page.wait_for_timeout(max(1.0, 1000 * (start - time.monotonic()) + PACE_MS * presses))
        page.keyboard.press("c")
    return times


def measure(page, count: int) -> dict[str, list[float]]:
    "Times in milliseconds, paced and saturated"
    slow = paced(page, count)
    early = page.evaluate("refused")
    page.evaluate("times = []")
    page.evaluate(SATURATED, count)
    return {"paced": slow, "saturated": page.evaluate("times"), "refused": early}


def measure_page(browser, folder: Path, data: list[bytes]) -> dict:
    with on_the_page(make_home(folder / "page", data)) as url:
        page = browser.new_page(viewport={"width": 1360, "height": 950})
        page.add_init_script(COUNT_TIMES)
        page.goto(url)
        result = measure(page, len(data) // 2 - 2)
        page.close()
        return result


def measure_lab(browser, folder: Path, data: list[bytes]) -> dict:
    home, place = make_home(folder / "home", data), folder / "lab"
    place.mkdir()
    notebook_of(place / "review.ipynb", f"from deerml.core.settings import Home\nfrom deerml.review.widget import review\nreview(Home.open({str(home.path)!r}))")
    with jupyter_lab(place) as (address, token, _):
        page = browser.new_page(viewport={"width": 1360, "height": 950})
        page.add_init_script(COUNT_TIMES)
        open_notebook(page, address, token, "review.ipynb")
        run_all(page)
        until(page, "painted > 0")
        page.locator(".deerml-review .view").click(position={"x": 5, "y": 5})
        result = measure(page, len(data) // 2 - 2)
        page.close()
        return result


LABEL_CONFIG = '<View><Image name="image" value="$image"/><Choices name="verdict" toName="image"><Choice value="correct" hotkey="c"/><Choice value="wrong" hotkey="f"/></Choices></View>'
WATCH_IMAGE = """
window.times = []; window.painted = 0; let pressed = null, last = null;
document.addEventListener("keydown", (event) => { if (event.key === "Enter" && event.ctrlKey) pressed = event.timeStamp; }, true);
const look = () => {
  const found = [...document.images].find((one) => one.complete && one.naturalWidth === 1280 && one.getBoundingClientRect().width > 200);
  if (found && found.src !== last) {
    last = found.src;
    const channel = new MessageChannel(), from = pressed;
    channel.port1.onmessage = () => { painted++; if (from !== null) times.push(performance.now() - from); };
    channel.port2.postMessage(null);
  }
  requestAnimationFrame(look);
};
requestAnimationFrame(look);
"""


@contextmanager
def label_studio(folder: Path, command: str):
    "The address, and a client that may ask for anything"
    port, token = free_port(), "0123456789abcdef0123456789abcdef01234567"
    words = [command, "start", "--no-browser", "--port", str(port), "--data-dir", str(folder / "label-studio"), "--username", "me@home.example", "--password", "a-word-for-a-minute", "--user-token", token, "--enable-legacy-api-token"]
    own = {"LATEST_VERSION_CHECK": "false", "COLLECT_ANALYTICS": "false", "SENTRY_DSN": "", "FRONTEND_SENTRY_DSN": ""}
    with open(folder / "label-studio.log", "w") as log:
        process = subprocess.Popen(words, cwd=folder, stdout=log, stderr=log, env=os.environ | own)
        try:
            wait_for(f"http://127.0.0.1:{port}/health", process, 240)
            yield f"http://127.0.0.1:{port}", httpx.Client(base_url=f"http://127.0.0.1:{port}", headers={"Authorization": f"Token {token}"}, timeout=120)
        finally:
            process.terminate()
            process.wait(20)


def measure_label_studio(browser, folder: Path, data: list[bytes], command: str) -> tuple[dict | None, str]:
    "Times of its label stream, from Ctrl+Enter, and a note; the first key, which chooses the verdict, is not counted"
    with label_studio(folder, command) as (address, client):
        project = client.post("/api/projects", json={"title": "Latency", "label_config": LABEL_CONFIG}).raise_for_status().json()["id"]
        for start in range(0, len(data), 10):
            client.post(f"/api/projects/{project}/import", files=[("files", (f"{start + n}.jpg", one, "image/jpeg")) for n, one in enumerate(data[start:start + 10])]).raise_for_status()
        page = browser.new_page(viewport={"width": 1360, "height": 950})
        page.add_init_script(WATCH_IMAGE)
        page.goto(f"{address}/user/login")
        page.fill("[name=email]", "me@home.example")
        page.fill("[name=password]", "a-word-for-a-minute")
        page.keyboard.press("Enter")
        page.wait_for_url("**/projects**")
        page.goto(f"{address}/projects/{project}/data?labeling=1")
        until(page, "painted > 0")
        page.wait_for_timeout(2000)
        result = {"paced": stream(page, len(data) // 2 - 1, PACE_MS), "refused": 0}
        page.evaluate("times = []")
        result["saturated"] = stream(page, len(data) // 2 - 1, 0)
        page.close()
    return result, f"peer: Label Studio, {len(result['paced'])} frames, its second key alone"


def stream(page, count: int, pause_ms: int) -> list[float]:
    "A verdict and Ctrl+Enter, as soon as the picture is there and the pause is over"
    while (done := len(page.evaluate("times"))) < count:
        page.keyboard.press("c")
        page.wait_for_timeout(pause_ms or 50)
        page.keyboard.press("Control+Enter")
        until(page, f"times.length > {done}")
    return page.evaluate("times")


def p95(times: list[float]) -> float:
    return float(np.percentile(times, 95))


def row(name: str, ours: float, target: float, peer: float | None, peer_name: str | None, note: str) -> dict:
    return {"name": name, "ours": round(ours, 1), "peer": peer and round(peer, 1), "peer_name": peer_name, "floor": round(1000 / 60, 1), "ratio": peer and round(peer / ours, 1),
            "target": target, "ok": ours < target, "unit": "ms", "note": note}


def table(results: dict[str, dict]) -> None:
    print(f"{'':<14}{'frames':>8}{'paced median':>15}{'p95':>8}{'max':>8}{'saturated median':>19}{'p95':>8}{'refused':>9}")
    for name, found in results.items():
        slow, fast = found["paced"], found["saturated"]
        print(f"{name:<14}{len(slow):>8}{statistics.median(slow):>15.1f}{p95(slow):>8.1f}{max(slow):>8.1f}{statistics.median(fast):>19.1f}{p95(fast):>8.1f}{found['refused']:>9}")


def rows_of(results: dict[str, dict], peer: dict | None, why: str) -> list[dict]:
    rows, peer_name = [], "Label Studio" if peer else None
    for host, found in results.items():
        times = found["paced"]
        note = f"{len(times)} frames of {WIDTH}x{HEIGHT}, paced at {PACE_MS} ms, {found['refused']} early presses, load {os.getloadavg()[0]:.1f}; floor: one frame of the screen; {why}"
        rows.append(row(f"key press to next image, {host}, median", statistics.median(times), MEDIAN_MS, peer and statistics.median(peer["paced"]), peer_name, note))
        rows.append(row(f"key press to next image, {host}, p95", p95(times), P95_MS, peer and p95(peer["paced"]), peer_name, note))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=200, help="for each host and pace")
    parser.add_argument("--hosts", nargs="+", choices=["page", "lab", "none"], default=["page", "lab"])
    parser.add_argument("--label-studio", default=shutil.which("label-studio"), help="its command; default: the one that is installed")
    asked = parser.parse_args()
    data, results, peer = pictures(2 * asked.frames + 4), {}, None
    print(f"{len(data)} JPEGs, {statistics.mean(map(len, data)) / 1000:.0f} KB each", flush=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, launched() as browser:
        if asked.label_studio:
            peer, why = measure_label_studio(browser, Path(folder), data[:min(42, len(data))], asked.label_studio)
        else:
            why = "peer: label-studio is not installed"
        for host, run in {"page": measure_page, "lab": measure_lab}.items():
            if host in asked.hosts:
                results[host] = run(browser, Path(folder), data)
    table(results | ({"Label Studio": peer} if peer else {}))
    print(json.dumps(rows_of(results, peer, why)))


if __name__ == "__main__":
    main()
