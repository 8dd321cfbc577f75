"""The review as a person meets it: the real server, a real home, and Chromium on its page."""
import json
import re
import sqlite3
import threading
import time
from collections import Counter
from contextlib import closing, contextmanager
from itertools import product

import cv2
import numpy as np
import pytest
import uvicorn

from browser import axe, drag, launched
from deerml.app.server import MAX_MESSAGE_BYTES, listen, make_app
from deerml.capture.store import Store, frames, frames_by_id, image_path
from deerml.capture.truth import events_on, truths
from deerml.core.box import Box
from deerml.core.settings import Home
from deerml.judge.collect import Origin
from deerml.judge.replay import make_replay
from deerml.judge.replayed import result_of
from deerml.review.items import standing
from deerml.ship.deploy import adopt_current
from review_homes import Shot, marked, review_home, scene, windows
from yards import AFTER, replay_yard, spot_bundle

# A busy machine may paint too late for a person's pace; a defect fails twice.
pytestmark = pytest.mark.flaky(reruns=1)

DWELL_MS = 150  # longer than a picture must have been on the screen
TOKEN = "t0ken-of-the-yard-0123456789"  # noqa: S105
COUNT_EVENTS = """
window.painted = 0; window.refused = [];
document.addEventListener("deerml:painted", () => window.painted++);
document.addEventListener("deerml:refused", (event) => window.refused.push(event.detail.text));
"""
UNSENT = "Object.keys(localStorage).filter((key) => key.startsWith('deerml-review:')).length"


@contextmanager
def serving(home: Home, port: int = 0, **options):
    "The server of a home in a thread; gives its address"
    with listen("127.0.0.1", port) as listening:
        app = make_app(home, reviewer="ann", **options)
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", ws_max_size=MAX_MESSAGE_BYTES, ws_per_message_deflate=False, timeout_graceful_shutdown=2))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(15)


def until(page, condition: str, seconds: float = 15) -> None:
    "Wait for a condition in the page. Playwright's own way needs `eval`, which the page's policy forbids."
    end = time.monotonic() + seconds
    while not page.evaluate(condition):
        assert time.monotonic() < end, f"never came: {condition}; refused: {page.evaluate('refused')}"
        page.wait_for_timeout(30)


class Tab:
    "A page with the review, and what came to it"

    def __init__(self, context, address: str):
        self.page, self.items, self.faults = context.new_page(), {}, []
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("websocket", lambda socket: socket.on("framereceived", self.heard))
        self.page.add_init_script(COUNT_EVENTS)
        self.page.goto(address)
        self.page.wait_for_selector(".deerml-review", state="attached")
        self.settle(0)

    def heard(self, content: str | bytes) -> None:
        if isinstance(content, str) and (message := json.loads(content))["type"] == "items":
            self.items |= {item["title"]: item for item in message["items"]}

    def settle(self, painted: int) -> None:
        "Wait until the next item has been seen, or the end is reached"
        until(self.page, f"painted > {painted} || document.querySelector('.deerml-review')?.dataset.kind === 'end'")
        self.page.wait_for_timeout(DWELL_MS)

    def press(self, *keys: str) -> None:
        "Keys that stay at the item"
        for key in keys:
            self.page.keyboard.press(key)
            self.page.wait_for_timeout(DWELL_MS)

    def judge(self, *keys: str) -> None:
        "Keys of which the last one brings the next item"
        self.press(*keys[:-1])
        before = self.page.evaluate("painted")
        self.page.keyboard.press(keys[-1])
        self.settle(before)

    def saved(self) -> None:
        "Wait until everything is acknowledged"
        until(self.page, f"{UNSENT} === 0")

    @property
    def title(self) -> str:
        return self.page.locator("h2").inner_text()

    @property
    def frames(self) -> list[int]:
        "The ids of the frames on the screen"
        return [frame["id"] for frame in self.items[self.title]["frames"]]

    def draw(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        self.press("m")
        drag(self.page, start, end)
        self.press("Escape", "Escape")  # the selection, then drawing


@pytest.fixture(scope="module")
def browser():
    with launched() as found:
        yield found


@pytest.fixture
def yard(tmp_path):
    "`yard(shots)` is a home, its address and a way to open tabs; afterwards nothing has failed and no other host was asked"
    opened = []

    def make(shots, **settings):
        store = review_home(tmp_path / "yard", shots, **settings)
        opened.append(store)
        return store

    yield make
    for store in opened:
        store.close()


@pytest.fixture
def person(browser):
    "`person(address)` is a new browser with one tab; `person(address, beside=tab)` a second tab in it"
    contexts, tabs, urls = [], [], []

    def open_tab(address, path="/review", beside=None, size=(1000, 700), **options):
        if beside is None:
            contexts.append(browser.new_context(viewport={"width": size[0], "height": size[1]}, **options))
            contexts[-1].on("request", lambda request: urls.append((address, request.url)))
        tabs.append(Tab(beside.page.context if beside else contexts[-1], address + path))
        return tabs[-1]

    yield open_tab
    faults = [fault for tab in tabs for fault in tab.faults]
    for context in contexts:
        context.close()
    assert not faults
    assert not [url for address, url in urls if not url.startswith((f"{address}/", "blob:", "data:"))], "a request left the house"


def events(store: Store, frame_ids: list[int]) -> list:
    with store.read() as connection:
        return [event for of_frame in events_on(connection, frame_ids).values() for event in of_frame]


def held(store: Store, frame_id: int, reviewer: str = "ann"):
    "What a reviewer holds of a frame: the statement, and the words on its boxes"
    said = standing(events(store, [frame_id]), reviewer, ["deer"])
    return said.statement, sorted(word for word, _ in said.boxes.values())


def state(store: Store, frame_id: int) -> str:
    return truths(store, ["deer"], [frame_id])[frame_id].state(["deer"])


# -- what was pressed is what is true ---------------------------------------------------------------------------------


def test_every_key_arrives_in_the_store(yard, person):
    store = yard(windows(7, 2))
    with serving(store.home) as address:
        tab = person(address)
        said = {}
        for keys in (["c"], ["f", "y"], ["n"], ["s"]):
            said["".join(keys)] = tab.frames
            tab.judge(*keys)
        said["m"], view = tab.frames, tab.page.locator(".sheet").bounding_box()
        tab.draw((view["x"] + 400, view["y"] + 200), (view["x"] + 460, view["y"] + 280))
        tab.judge("b")
        undone = tab.frames
        tab.judge("c")
        tab.judge("z")
        assert tab.frames == undone
        tab.judge("f", "y")
        tab.press("ArrowRight", "Shift+S")
        said["alone"] = tab.frames
        tab.saved()
    assert [held(store, one) for one in said["c"]] == [("all_boxed", ["correct"])] * 2
    assert [held(store, one) for one in [*said["fy"], *said["n"], *undone]] == [("nothing_here", ["false_positive"])] * 6
    assert [held(store, one) for one in said["s"]] == [("unsure", [])] * 2
    assert sorted(held(store, one) for one in said["m"]) == [("all_boxed", ["correct"]), ("all_boxed", ["correct", "missed"])]
    assert sorted(str(held(store, one)[0]) for one in said["alone"]) == ["None", "unsure"]
    assert [state(store, one) for one in said["c"] + said["n"]] == ["boxes_complete"] * 2 + ["verified_empty"] * 2
    assert Counter(event.undoes is not None for event in events(store, undone))[True] == 4, "what was taken back stays in the store, and its undoing beside it"


def test_a_reload_goes_on_where_it_was(yard, person):
    store = yard(windows(4))
    with serving(store.home) as address:
        tab = person(address)
        for _ in range(2):
            tab.judge("c")
        next_title = tab.title
        tab.page.reload()
        tab.settle(0)
        assert tab.title == next_title and "2 of 4" in tab.page.locator(".figures").inner_text()
        tab.judge("n")
        tab.judge("n")
        assert tab.page.get_by_text("All 4 windows of tonight are judged").is_visible()
        tab.saved()
    ids = [frame["id"] for item in tab.items.values() for frame in item["frames"]]
    assert Counter(held(store, one)[0] for one in ids) == {"all_boxed": 2, "nothing_here": 2}
    assert len(events(store, ids)) == 8, "one box and one statement a frame"


def test_a_stale_press_in_a_second_tab_changes_nothing(yard, person):
    store = yard(windows(3))
    with serving(store.home) as address:
        first = person(address)
        second = person(address, beside=first)
        [frame], title = first.frames, first.title
        assert second.title == title
        first.judge("c")
        first.saved()
        second.page.bring_to_front()
        second.judge("n")
        until(second.page, "document.querySelector('.live').textContent.includes('not stored')")
        assert second.title != title, "no picture is swapped under the eyes"
        second.judge("n")
        assert second.title == title and second.page.locator(".banner").inner_text().startswith("Not stored:")
        assert held(store, frame) == ("all_boxed", ["correct"]) and second.page.locator(".box.correct").count() == 1
        second.judge("n")
        second.saved()
    assert held(store, frame) == ("nothing_here", ["false_positive"]), "who has seen it may change it"


def test_two_reviewers_who_differ_are_told(yard, person):
    store = yard(windows(2))
    with serving(store.home) as address:
        ann, ben = person(address), person(address, "/review?reviewer=ben")
        [frame] = ben.frames
        assert ann.frames == [frame]
        ann.judge("c")
        ann.saved()
        ben.page.bring_to_front()
        ben.judge("n")
        until(ben.page, "document.querySelector('.toast').textContent.includes('disputed')")
        before = ben.page.evaluate("painted")
        ben.page.get_by_label("What to review").select_option("disputed")
        ben.settle(before)
        assert ben.frames == [frame]
    assert state(store, frame) == "disputed" and held(store, frame) == ("all_boxed", ["correct"]) and held(store, frame, "ben")[0] == "nothing_here"


def test_a_server_that_goes_and_comes_back_loses_nothing(yard, person):
    store = yard(windows(4))
    with serving(store.home) as address:
        tab = person(address)
        tab.judge("c")
        tab.saved()
        [one], port = tab.frames, int(address.rpartition(":")[2])
    until(tab.page, "document.querySelector('.saving').textContent === 'Offline'")
    tab.judge("n")
    [other] = tab.frames
    tab.press("c")
    assert tab.page.locator(".saving").inner_text() == "Offline · 2 unsaved" and tab.page.locator("#connection").inner_text()
    assert held(store, one) == held(store, other) == (None, [])
    with serving(store.home, port):
        tab.saved()
        until(tab.page, "document.querySelector('.saving').hidden")
        until(tab.page, "document.querySelector('.figures').textContent.startsWith('3 of 4')")
        assert not tab.page.locator("#connection").inner_text()
    assert held(store, one) == ("nothing_here", ["false_positive"]) and held(store, other) == ("all_boxed", ["correct"])
    assert len(events(store, [one, other])) == 4


def test_the_token_is_the_way_in_and_leaves_the_address(yard, person, browser):
    store = yard(windows(2))
    with serving(store.home, host="0.0.0.0", token=TOKEN) as address:  # what it is told: it listens here alone
        stranger = browser.new_page()
        assert stranger.goto(f"{address}/review").status == 401 and "needs its token" in stranger.content()
        stranger.close()
        tab = person(address, f"/review?token={TOKEN}")
        assert tab.page.url == f"{address}/review"
        [frame] = tab.frames
        tab.judge("c")
        tab.saved()
    assert held(store, frame)[0] == "all_boxed"


# -- a box arrives where it was drawn -----------------------------------------------------------------------------------

SHAPES = {"wide": (1280, 720, 1), "4K": (3840, 2160, 1), "portrait": (720, 1280, 6)}


def mark_on(page) -> list[float]:
    "The edges of what was painted, in pixels of the window: found by its colour on a screenshot"
    picture = cv2.imdecode(np.frombuffer(page.screenshot(), np.uint8), cv2.IMREAD_COLOR).astype(int)
    coloured = (picture[..., 2] > 165) & (picture[..., 1] < 100) & (picture[..., 0] > 165)
    rows, columns = np.flatnonzero(coloured.sum(1) > 8), np.flatnonzero(coloured.sum(0) > 8)
    return [float(edge) for edge in (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)]


def zoom(page, factor: float) -> None:
    view = page.locator(".view").bounding_box()
    page.mouse.move(view["x"] + view["width"] / 2, view["y"] + view["height"] / 2)
    page.keyboard.down("Control")
    page.mouse.wheel(0, -300 * float(np.log(factor)))
    page.keyboard.up("Control")
    page.wait_for_timeout(DWELL_MS)


def test_a_box_arrives_where_it_was_drawn(yard, person):
    marks = {name: Box(round(width * 0.43), round(height * 0.42), round(width * 0.1), round(height * 0.1)) for name, (width, height, _) in SHAPES.items()}
    shots = [Shot(marked(width, height, marks[name], turned), window=number) for number, (name, (width, height, turned)) in enumerate(SHAPES.items())]
    store = yard(shots)
    with serving(store.home) as address:
        tab = person(address)
        for _ in SHAPES:
            [frame] = frames_by_id(store, tab.frames)
            name = next(name for name, shape in SHAPES.items() if shape[:2] == frame.size)
            for factor in (1, 2.5):
                if factor != 1:
                    zoom(tab.page, factor)
                left, top, right, bottom = mark_on(tab.page)
                sheet = tab.page.locator(".sheet").bounding_box()
                tab.draw((left, top), (right, bottom))
                tab.saved()
                [drawn] = [event for event in events(store, [frame.id]) if event.verdict == "missed"][-1:]
                scale = frame.width / sheet["width"]
                told = [(left - sheet["x"]) * scale, (top - sheet["y"]) * scale, (right - left) * scale, (bottom - top) * scale]
                assert [drawn.x, drawn.y, drawn.width, drawn.height] == pytest.approx(told, abs=1), (name, factor)
                # And it lies on what is to be seen there, as exactly as a pixel of the screen shows it.
                assert [drawn.x, drawn.y, drawn.width, drawn.height] == pytest.approx(marks[name].xywh, abs=1 + 2 * scale), (name, factor)
                tab.judge("z")
            tab.judge("s")


# -- images that cannot be shown ----------------------------------------------------------------------------------------


def test_what_cannot_be_shown_can_be_skipped(yard, person):
    store = yard(windows(3, 2))
    found = frames(store)
    gone, broken, damaged = found[::2]
    path_of = {one.id: image_path(store.home.images, one.image, one.media_type) for one in (gone, broken, damaged)}
    data = path_of[damaged.id].read_bytes()
    for one, content in ((broken, b"no image"), (damaged, data[:400] + b"no image" * 50)):
        path_of[one.id].chmod(0o644)
        path_of[one.id].write_bytes(content)
    path_of[gone.id].unlink()
    with serving(store.home) as address:
        tab = person(address)
        for _ in range(3):
            bad = next(one for one in tab.frames if one in path_of)
            tab.page.locator(".thumb").nth(tab.frames.index(bad)).click()
            until(tab.page, "!document.querySelector('.card').hidden && !document.querySelector('.card').textContent.includes('Loading')")
            word = "is gone" if bad == gone.id else "cannot be read"
            assert word in tab.page.locator(".card").inner_text()
            tab.press("Shift+C")
            assert "cannot be shown" in tab.page.evaluate("refused.at(-1)")
            tab.judge("c" if bad == gone.id else "s")
        tab.saved()
        assert "could not be shown" in tab.page.locator(".ending").inner_text()
    assert {held(store, one.id)[0] for one in (gone, broken, damaged)} == {"unsure"}, "a verdict on the strip says nothing of what nobody saw"


# -- how it looks, and for whom -------------------------------------------------------------------------------------------


def test_a_finger_judges_and_draws_on_a_phone(yard, person):
    store = yard(windows(3, 3, width=640))
    with serving(store.home) as address:
        tab = person(address, size=(390, 844), device_scale_factor=3, has_touch=True, is_mobile=True, color_scheme="dark")
        assert tab.page.evaluate("document.documentElement.scrollWidth <= innerWidth && visualViewport.scale === 1")
        judged, before = tab.frames, tab.page.evaluate("painted")
        tab.page.locator(".do-correct").tap()
        tab.settle(before)
        tab.page.locator(".do-missed").tap()
        area, drawn_on = tab.page.locator(".sheet").bounding_box(), tab.items[tab.title]["frames"][tab.items[tab.title]["key_frame"]]["id"]
        start, end = (area["x"] + 190.5, area["y"] + 110.25), (area["x"] + 290.5, area["y"] + 170.25)
        touch = tab.page.context.new_cdp_session(tab.page)
        # At rest at its end, as a hand is: after a flick Chromium swallows the next tap.
        for kind, x, y in [("touchStart", *start), ("touchMove", start[0] + 40, start[1] + 30), ("touchMove", *end), ("touchMove", end[0], end[1] + 1), ("touchMove", *end)]:
            touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [{"x": x, "y": y}]})
            tab.page.wait_for_timeout(60)
        touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
        tab.page.wait_for_timeout(DWELL_MS)
        tab.saved()
    assert [held(store, one)[0] for one in judged] == ["all_boxed"] * 3
    [box] = [event for event in events(store, [drawn_on]) if event.verdict == "missed"]
    scale = 640 / area["width"]
    assert [box.x, box.y, box.width, box.height] == pytest.approx([190.5 * scale, 110.25 * scale, 100 * scale, 60 * scale], abs=1)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "scheme"), product([(800, 600), (1920, 1080), (390, 844)], ["light", "dark"]))
def test_every_verdict_is_in_view(yard, person, size, scheme):
    store = yard(windows(1, 12))
    with serving(store.home) as address:
        tab = person(address, size=size, color_scheme=scheme)
        for name in ["correct", "wrong", "nothing", "missed", "boxed", "skip", "undo"]:
            box = tab.page.locator(f".bar .do-{name}").bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= size[0] and box["y"] + box["height"] <= size[1] and min(box["width"], box["height"]) >= 48
        assert tab.page.locator(".sheet").bounding_box()["height"] >= 150
        assert tab.page.locator(".deerml-review").get_attribute("data-theme") == scheme
        assert tab.page.evaluate("document.documentElement.scrollWidth <= innerWidth && document.documentElement.scrollHeight <= innerHeight")


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(yard, person, pytestconfig, scheme):
    source, store = axe(pytestconfig.cache.mkdir("axe")), yard(windows(2, 2))

    def serious():
        tab.page.wait_for_timeout(2700)  # until a text that fades is gone
        tab.page.evaluate(source)
        found = tab.page.evaluate("axe.run()")["violations"]
        return [(one["id"], [node["html"][:160] for node in one["nodes"]]) for one in found if one["impact"] in ("serious", "critical")]

    with serving(store.home) as address:
        tab = person(address, color_scheme=scheme)
        assert not serious()
        for keys in (["?"], ["Escape", "m"], ["Escape", "Tab"], ["Escape", "f"]):
            tab.press(*keys)
            assert not serious(), keys
        tab.judge("Escape", "g")
        assert tab.page.locator(".crop").count() == 4 and not serious(), "grid"
        tab.judge("Enter")
        assert tab.page.locator(".ending").is_visible() and not serious(), "end"
        tab.saved()


@pytest.mark.slow
def test_a_page_of_crops_arrives_in_the_store(yard, person):
    store = yard(windows(3, 2))
    with serving(store.home) as address:
        tab = person(address)
        tab.judge("g")
        crops = tab.items[tab.title]["crops"]
        tab.press("2")
        tab.judge("Enter")
        tab.saved()
        assert "Every box of the model was judged" in tab.page.locator(".ending").inner_text() or "is judged" in tab.page.locator(".ending").inner_text()
    words = {event.detection_id: event.verdict for event in events(store, [crop["frame_id"] for crop in crops])}
    assert words == {crop["detection_id"]: "false_positive" if number == 1 else "correct" for number, crop in enumerate(crops)}


@pytest.mark.slow
def test_original_pixels_come_with_the_zoom(yard, person):
    store = yard([Shot(scene(1, 3840, 2160), window=0)])
    with serving(store.home) as address:
        tab = person(address)
        width = "document.querySelector('.picture img').naturalWidth"
        assert tab.page.evaluate(width) == 1600
        tab.press("+", "+", "+")
        until(tab.page, f"{width} === 3840")


@pytest.mark.slow
def test_a_database_that_is_locked_is_waited_for(yard, person):
    store = yard(windows(3))
    with serving(store.home) as address:
        tab = person(address)
        [frame] = tab.frames
        with closing(sqlite3.connect(store.home.path / "deerml.db", isolation_level=None)) as other:
            other.execute("begin immediate")
            tab.judge("c")
            until(tab.page, "document.querySelector('.saving').textContent === 'Saving…'")
            other.execute("rollback")
        tab.saved()
    assert held(store, frame)[0] == "all_boxed" and len(events(store, [frame])) == 2


def test_a_replay_is_judged_without_knowing_which_model_spoke(browser, tmp_path):
    "Both models' boxes stand there alike, without scores, and the answers become the result"
    with replay_yard(tmp_path / "yard", nights=1) as store:
        champion, challenger = spot_bundle(store, 0.8), spot_bundle(store)
        replay = make_replay(store, champion, challenger, [Origin(champion.digest), Origin(challenger.digest)], "2026-08-30..2026-09-30", AFTER)
        adopt_current(store.home, champion.digest, "a test")
        with serving(store.home) as address, closing(browser.new_context(viewport={"width": 1280, "height": 800})) as context:
            tab = Tab(context, f"{address}/review")
            assert tab.page.locator("select[name=what]").input_value() == "replay"
            for _ in range(4):
                boxes = tab.items[tab.title]["frames"][0]["boxes"]
                text = tab.page.locator(".deerml-review").inner_text()
                assert not re.search(r"\b0\.\d\d\b|alarm\b|champion|challenger", text), text
                tab.judge(*(["c"] if boxes else ["f", "y"]))
            tab.saved()
            assert not tab.faults
        result = result_of(store, replay)
        assert result.complete and (result.pairs.found_by_both, result.words) == (1, "1 more visit")
