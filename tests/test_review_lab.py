"""The review in a cell of JupyterLab."""
import json
from contextlib import contextmanager

import pytest

from browser import jupyter_lab, launched, notebook_of, open_notebook, run_all
from deerml.capture.store import frames
from deerml.capture.truth import events_on
from deerml.review.items import standing
from review_homes import review_home, windows

COUNT_EVENTS = """
window.painted = 0; window.refused = [];
document.addEventListener("deerml:painted", () => window.painted++);
document.addEventListener("deerml:refused", (event) => window.refused.push(event.detail.text));
"""
CELLS = "jupyterapp.shell.currentWidget.content.widgets.length"
SAVE = "jupyterapp.commands.execute('docmanager:save')"
DWELL_MS = 150

# Presses C as soon as it counts, until nothing is left: as fast as nobody is.
REVIEW_ALL = """() => new Promise((done) => {
  const root = document.querySelector(".deerml-review");
  const press = () => setTimeout(() => {
    if (root.dataset.kind === "end") return done();
    root.dispatchEvent(new KeyboardEvent("keydown", { key: "c", bubbles: true, cancelable: true }));
  }, 105);
  document.addEventListener("deerml:painted", press);
  document.addEventListener("deerml:refused", press);
  const watch = setInterval(() => { if (root.dataset.kind === "end") { clearInterval(watch); done(); } }, 200);
  press();
})"""


@pytest.fixture(scope="module")
def browser():
    with launched() as found:
        yield found


@contextmanager
def lab_with(browser, home):
    "JupyterLab on a notebook that reviews a home, run; gives the page and the process of the server"
    folder = home.path.parent / "lab"
    folder.mkdir()
    notebook_of(folder / "review.ipynb", f"from deerml.core.settings import Home\nfrom deerml.review.widget import review\nreview(Home.open({str(home.path)!r}))", "1 + 1", "2 + 2")
    with jupyter_lab(folder) as (address, token, process):
        page = browser.new_page(viewport={"width": 1360, "height": 950})
        page.add_init_script(COUNT_EVENTS)
        open_notebook(page, address, token, "review.ipynb")
        run_all(page)
        page.wait_for_function("painted > 0")
        page.wait_for_timeout(DWELL_MS)
        page.locator(".deerml-review .view").click(position={"x": 5, "y": 5})
        yield page, process
        page.close()


def judge(page, key):
    before = page.evaluate("painted")
    page.keyboard.press(key)
    page.wait_for_function(f"painted > {before} || document.querySelector('.deerml-review').dataset.kind === 'end'")
    page.wait_for_timeout(DWELL_MS)


def saved(page):
    page.wait_for_function("Object.keys(localStorage).filter((key) => key.startsWith('deerml-review:')).length === 0")


def words(store):
    "Statement and number of events, of every frame that somebody has judged"
    with store.read() as connection:
        found = events_on(connection, [frame.id for frame in frames(store)])
    return [(standing(events, "owner", ["deer"]).statement, len(events)) for events in found.values() if events]


@pytest.mark.slow
def test_keys_stay_in_the_review_and_verdicts_arrive(browser, tmp_path):
    with review_home(tmp_path / "yard", windows(5, 2)) as store, lab_with(browser, store.home) as (page, _):
        cells = page.evaluate(CELLS)
        for key in "ddabxy1":
            page.keyboard.press(key)
            page.wait_for_timeout(DWELL_MS)
        page.keyboard.press("z")  # B was a verdict
        page.wait_for_timeout(2 * DWELL_MS)
        assert page.evaluate(CELLS) == cells == 3 and page.evaluate("jupyterapp.shell.currentWidget.content.mode") in ("command", "edit")
        judge(page, "c")
        judge(page, "n")
        saved(page)
        assert sorted(word for word, count in words(store) if word) == ["all_boxed"] * 2 + ["nothing_here"] * 2
        title = page.locator(".deerml-review h2").inner_text()
        page.evaluate(SAVE)
        page.reload()
        page.wait_for_function("window.painted > 0", timeout=90_000)
        page.wait_for_timeout(DWELL_MS)
        assert page.locator(".deerml-review h2").inner_text() == title and "2 of 5" in page.locator(".figures").inner_text()
        page.locator(".deerml-review .view").click(position={"x": 5, "y": 5})
        judge(page, "c")
        saved(page)
        assert sum(word is not None for word, _ in words(store)) == 6


def memory(server: int) -> float:
    "Megabytes of the kernel that this JupyterLab has started"
    psutil = pytest.importorskip("psutil")
    [kernel] = [child for child in psutil.Process(server).children(recursive=True) if any("ipykernel" in word for word in child.cmdline())]
    return kernel.memory_info().rss / 2**20


@pytest.mark.slow
def test_a_thousand_frames_leave_kernel_and_notebook_small(browser, tmp_path):
    shots = [shot for camera in ("porch", "gate", "creek", "field") for shot in windows(50, 5, camera, width=1280, height=720)]
    with review_home(tmp_path / "yard", shots) as store, lab_with(browser, store.home) as (page, server):
        before = memory(server)
        page.evaluate(REVIEW_ALL)
        saved(page)
        assert len(words(store)) == 1000 and {word for word, _ in words(store)} == {"all_boxed"}
        assert memory(server) - before < 50
        page.evaluate(SAVE)
        page.wait_for_timeout(500)
        size = (store.home.path.parent / "lab/review.ipynb").stat().st_size
        assert size < 100_000 and json.loads((store.home.path.parent / "lab/review.ipynb").read_text())["cells"][0]["outputs"]
