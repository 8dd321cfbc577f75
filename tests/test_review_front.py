"""The browser side of a review, in Chromium, before a desk that lives in the page (review_page.html)."""
import json

import pytest

from browser import ROOT, axe, drag, launched, served

# A busy machine may paint too late for a person's pace; a defect fails twice.
pytestmark = pytest.mark.flaky(reruns=1)

STATIC = ROOT / "deerml/review/static"
SETTLE_MS = 180  # longer than a picture must have been on the screen


@pytest.fixture(scope="module")
def browser():
    with launched() as found:
        yield found


@pytest.fixture(scope="module")
def address():
    with served(static=STATIC, tests=ROOT / "tests") as url:
        yield url


@pytest.fixture
def opened(browser, address):
    "`opened(frames=3, ...)` gives a page on which the first item has been seen"
    contexts = []

    def open_page(size=(1000, 700), seen=True, context=None, **wanted):
        options = {"viewport": {"width": size[0], "height": size[1]}, **(context or {})}
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.faults = []
        page.hosts = set()
        page.on("pageerror", lambda error: page.faults.append(str(error)))
        page.on("request", lambda request: page.hosts.add(request.url.split("/")[2] if "://" in request.url else request.url.split(":")[0]))
        page.add_init_script(f"window.wanted = {json.dumps(wanted)}")
        page.goto(f"{address}/tests/review_page.html")
        if seen:
            page.wait_for_function("painted.length > 0")
            page.wait_for_timeout(SETTLE_MS)
        return page

    yield open_page
    faults = [fault for context in contexts for page in context.pages for fault in page.faults]
    for context in contexts:
        context.close()
    assert not faults


def press(page, *keys):
    for key in keys:
        page.keyboard.press(key)
        page.wait_for_timeout(SETTLE_MS)


def sent(page, kind="verdict"):
    return [message for message in page.evaluate("desk.log") if message["type"] == kind]


def statements(message):
    return [frame["statement"] for frame in message["frames"]]


def words(message):
    return [box["word"] for frame in message["frames"] for box in frame["boxes"]]


def title(page):
    return page.locator("h2").inner_text()


# -- keys -------------------------------------------------------------------------------------------------------


def test_one_key_says_it_for_every_frame_of_the_strip(opened):
    page = opened(frames=3, boxes=2)
    press(page, "c")
    [verdict] = sent(page)
    assert (verdict["key"], verdict["source"], verdict["item_id"]) == ("C", "strip", "window:0")
    assert statements(verdict) == ["all_boxed"] * 3 and words(verdict) == ["correct"] * 6
    assert verdict["frames"][0]["boxes"][0]["box_key"] == "detection:0" and verdict["shown_ms"] > 100
    assert "21:11" in title(page)


def test_wrong_asks_whether_nothing_is_here(opened):
    page = opened(frames=2)
    press(page, "f")
    assert not sent(page) and page.get_by_text("Is there nothing on these 2 frames?").is_visible()
    press(page, "n")
    assert not sent(page), "N would mean yes to one reader and no to another: it answers nothing"
    press(page, "y")
    assert statements(sent(page)[0]) == ["nothing_here"] * 2 and words(sent(page)[0]) == ["false_positive"] * 2
    press(page, "f", "m")
    assert statements(sent(page)[1]) == [None, None] and "21:11" in title(page)
    assert page.locator(".view.drawing").is_visible()


@pytest.mark.slow
def test_other_verdicts(opened):
    page = opened(items=6, frames=2)
    press(page, "n", "b", "s", "U")
    assert [message["key"] for message in sent(page)] == ["N", "B", "S", "S"]
    assert [statements(message)[0] for message in sent(page)] == ["nothing_here", "all_boxed", "unsure", "unsure"]
    assert sent(page)[2]["frames"][0]["boxes"] == []


@pytest.mark.slow
def test_shift_says_it_for_one_frame(opened):
    page = opened(frames=3)
    press(page, "Shift+C", "Shift+N", "Shift+S")
    assert [len(message["frames"]) for message in sent(page)] == [1, 1, 1] and {message["source"] for message in sent(page)} == {"single"}
    assert "21:11" in title(page), "with the last frame the window is judged"


@pytest.mark.slow
def test_nothing_to_confirm_is_refused(opened):
    page = opened(boxes=0)
    press(page, "c", "b")
    assert not sent(page) and "There is no box to confirm" in page.evaluate("refused[0]")
    press(page, "f", "Enter")
    assert statements(sent(page)[0]) == ["nothing_here"] * 3


@pytest.mark.slow
def test_hidden_boxes_are_not_confirmed(opened):
    page = opened()
    press(page, "h", "c")
    assert not sent(page) and page.locator(".overlay rect").count() == 2
    press(page, "c")
    assert len(sent(page)) == 1


def test_boxes_one_by_one(opened):
    page = opened(frames=2, boxes=2)
    press(page, "Tab", "Shift+F", "Tab", "Shift+C")
    assert [words(message) for message in sent(page)] == [["false_positive"], ["correct"]]
    press(page, "c")
    assert sent(page)[-1]["key"] == "B" and words(sent(page)[-1]) == ["correct", "correct", "false_positive", "correct"]


def test_nudge_and_resize_are_sent_when_the_hand_rests_and_stay_inside(opened):
    page = opened(frames=1, boxes=1)
    page.keyboard.press("Tab")
    for key in ["ArrowRight", "Alt+ArrowDown"] + ["Shift+ArrowLeft"] * 40:
        page.keyboard.press(key)
    page.wait_for_timeout(700)
    [verdict] = sent(page)
    box = verdict["frames"][0]["boxes"][0]
    assert box["word"] == "adjusted" and box["box"][0] == 0 and box["box"][2] == 256 and box["box"][3] > 216
    assert statements(verdict) == [None]


def test_keys_belong_to_the_widget_alone(opened):
    page = opened()
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<input id=other>')")
    page.focus("#other")
    press(page, "c")
    assert not sent(page)
    page.locator(".view").click(position={"x": 5, "y": 5})
    press(page, "Control+c", "Meta+c", "Alt+c")
    assert not sent(page)
    page.evaluate("heard = 0; document.addEventListener('keydown', () => heard++)")
    press(page, "c")
    assert len(sent(page)) == 1 and page.evaluate("heard") == 0
    assert page.locator(".deerml-review").get_attribute("data-lm-suppress-shortcuts") == "true"


def test_a_click_is_not_taken_for_one_on_the_host(opened):
    page = opened()
    page.evaluate("document.querySelector('main').dataset.mode = 'command'")
    page.locator(".view").click(position={"x": 5, "y": 5})
    press(page, "c")
    assert not sent(page, "choose") and len(sent(page)) == 1


@pytest.mark.slow
def test_keyboard_alone_walks_through_and_out(opened):
    page = opened(frames=1, boxes=2)
    within = "document.querySelector('.deerml-review').contains(document.activeElement)"
    press(page, "Tab", "Tab")
    assert page.locator(".box.selected").count() == 1
    for _ in range(60):
        page.keyboard.press("Tab")
        if not page.evaluate(within):
            break
    assert not page.evaluate(within), "Tab leaves at the end"
    page.locator(".view").click(position={"x": 5, "y": 5})
    press(page, "m", "Enter", "ArrowLeft", "Escape", "Escape", "b")
    assert [message["key"] for message in sent(page)] == ["M", "adjust", "B"]
    press(page, "Escape")
    assert not page.evaluate(within)


@pytest.mark.slow
def test_a_button_that_goes_leaves_the_keys_alive(opened):
    page = opened(frames=1)
    for open_key, button, close_key in [("m", ".do-place", "Escape"), ("f", ".do-yes", "Escape"), ("f", ".do-yes", "m")]:
        press(page, open_key)
        page.locator(button).focus()
        press(page, close_key)
        assert page.evaluate("document.activeElement.className").startswith("deerml-review"), (button, close_key)


# -- seen before judged -----------------------------------------------------------------------------------------


def test_a_press_before_the_picture_is_refused_and_not_kept(opened):
    page = opened(seen=False, withhold=True)
    page.wait_for_function("document.querySelector('.strip .thumb')")
    press(page, "c")
    assert not sent(page) and page.evaluate("refused[0]") == "Not yet: the image is still loading"
    assert page.get_by_text("Not yet").first.inner_text()


def test_thirty_presses_in_a_row_judge_no_more_than_was_seen(opened):
    page = opened(items=8, frames=1)
    page.evaluate("""() => { const root = document.querySelector('.deerml-review');
        for (let n = 0; n < 30; n++) root.dispatchEvent(new KeyboardEvent('keydown', { key: 'c', bubbles: true })) }""")
    page.wait_for_timeout(300)
    assert len(sent(page)) == 1 and page.evaluate("refused.length") == 29
    assert set(page.evaluate("refused")) <= {"Not yet: the image has just appeared", "Not yet: the image is still loading"}


@pytest.mark.slow
def test_a_broken_and_a_lost_image_can_be_skipped(opened):
    page = opened(items=2, frames=1, broken=[0], problem={"100": "gone"})
    assert page.get_by_text("cannot be read").is_visible() and sent(page, "broken")[0]["frame_id"] == 0
    press(page, "c")
    assert not sent(page)
    press(page, "s")
    assert page.get_by_text("is gone").is_visible()
    press(page, "s")
    assert [statements(message) for message in sent(page)] == [["unsure"], ["unsure"]]
    assert page.get_by_text("All 2 windows of tonight are judged").is_visible()


# -- nothing lost, nothing twice ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_undo_shows_ten_items_again_without_loading(opened):
    page = opened(items=12, frames=1)
    for shown in range(10):
        page.wait_for_function(f"painted.length > {shown}")
        page.wait_for_timeout(SETTLE_MS)
        press(page, "c")
    before = len(sent(page, "image"))
    press(page, *"z" * 10)
    assert "21:10" in title(page) and len(sent(page, "undo")) == 10 and len(sent(page, "image")) == before
    assert [message["target_op"] for message in sent(page, "undo")] == [message["op_id"] for message in reversed(sent(page))]
    assert page.evaluate("desk.stored.size") == 0
    press(page, "n")
    assert page.evaluate("desk.stored.size") == 1


def test_lost_acknowledgements_are_sent_again_and_stored_once(opened):
    page = opened(items=6)
    page.evaluate("desk.silent = true")
    press(page, "c", "n")
    page.evaluate("desk.tell({ type: 'connection', state: 'lost' })")
    page.get_by_text("Offline · 2 unsaved").wait_for(timeout=5000)
    page.evaluate("desk.silent = false; desk.tell({ type: 'connection', state: 'open' })")
    page.wait_for_timeout(300)
    first, again = sent(page), sent(page, "ready")[-1]["pending"]
    assert [message["op_id"] for message in again] == [message["op_id"] for message in first]
    assert page.evaluate("desk.stored.size") == 2 and page.evaluate("Object.keys(localStorage).filter((key) => key.includes('window')).length") == 0
    assert page.locator(".saving").is_hidden() and "21:12" in title(page)


def test_a_reload_delivers_what_was_not_acknowledged(opened):
    page = opened()
    page.evaluate("desk.silent = true")
    press(page, "c")
    operation = sent(page)[0]["op_id"]
    page.reload()
    page.wait_for_function("desk.stored.size === 1")
    assert page.evaluate("[...desk.stored.keys()]") == [operation]
    assert not page.evaluate("Object.keys(localStorage).some((key) => key.endsWith('" + operation + "'))")


@pytest.mark.slow
def test_a_busy_database_is_waited_for(opened):
    page = opened()
    page.evaluate("desk.fail = () => { desk.fail = null; return { code: 'BUSY', message: 'locked', retry: true, item: null } }; 0")
    press(page, "c")
    page.wait_for_function("desk.stored.size === 1")
    assert len(sent(page)) == 2 and sent(page)[0]["op_id"] == sent(page)[1]["op_id"]


def test_a_rejected_verdict_brings_its_frames_back(opened):
    page = opened(items=4)
    page.evaluate("desk.fail = () => { desk.fail = null; return { code: 'STALE', message: 'Judged in another tab.', item: null } }; 0")
    press(page, "c")
    assert "21:11" in title(page), "nothing is swapped under the eyes of somebody who is about to judge"
    press(page, "c")
    assert "21:10" in title(page) and page.locator(".banner").inner_text() == "Not stored: Judged in another tab."


def test_a_second_operation_names_the_revision_of_the_first(opened):
    page = opened(frames=1, boxes=1)
    press(page, "Tab", "Shift+C", "Escape", "c")
    assert [message["frames"][0]["revision"] for message in sent(page)] == [0, 1]


@pytest.mark.slow
def test_items_of_an_older_generation_are_dropped(opened):
    page = opened(frames=1)
    page.get_by_label("What to review").select_option("disputed")
    page.wait_for_timeout(400)
    assert sent(page, "choose")[0]["choice"]["what"] == "disputed"
    page.evaluate("desk.tell({ type: 'items', generation: 1, items: [{ ...desk.items[0], id: 'old', title: 'Old' }] })")
    press(page, "c", "c", "c", "c")
    assert "old" not in [message["item_id"] for message in sent(page)] and len(sent(page)) == 4


@pytest.mark.slow
def test_two_views_of_one_widget_do_not_judge_twice(opened):
    page = opened(frames=1)
    page.evaluate("""async () => { const second = document.body.appendChild(document.createElement('div'));
        (await import('/static/review.js')).default.render({ model: desk, el: second }) }""")
    page.wait_for_timeout(500)
    page.locator(".view").first.click(position={"x": 5, "y": 5})
    press(page, "c")
    page.wait_for_timeout(300)
    assert len(sent(page)) == 1 and ["21:11" in text for text in page.locator("h2").all_inner_texts()] == [True, True]


def test_the_end_is_asked_for_once_more_and_no_more(opened):
    page = opened(items=2, frames=1)
    press(page, "c", "n")
    page.wait_for_timeout(500)
    assert page.get_by_text("All 2 windows of tonight are judged").is_visible() and "one deer" in page.locator(".ending").inner_text()
    assert len(sent(page, "need")) <= 5
    press(page, "z")
    assert "21:11" in title(page)


@pytest.mark.slow
def test_the_view_cleans_up(opened):
    page = opened()
    page.evaluate("closeReview()")
    assert page.evaluate("desk.listeners.length") == 0 and page.locator(".deerml-review").count() == 0


# -- drawing ----------------------------------------------------------------------------------------------------

SHAPES = {"wide": (1280, 720, 1), "large": (4000, 2250, 0.4), "tall": (720, 1600, 1), "small": (320, 240, 1)}


FAST = [("wide", 1), ("large", 2.5), ("tall", 4)]
DRAWINGS = [pytest.param(shape, zoom, marks=[] if (shape, zoom) in FAST else pytest.mark.slow) for shape in SHAPES for zoom in (1, 2.5, 4)]


@pytest.mark.parametrize(("shape", "zoom"), DRAWINGS)
def test_a_drawn_box_arrives_where_it_was_drawn(opened, shape, zoom):
    width, height, shown = SHAPES[shape]
    page = opened(frames=1, boxes=0, width=width, height=height, shown=shown, context={"device_scale_factor": 2 if zoom == 4 else 1})
    page.evaluate("window.scrollTo(0, 7)")
    page.keyboard.press("m")
    view, sheet = page.locator(".view").bounding_box(), page.locator(".sheet")
    for _ in range({1: 0, 2.5: 2, 4: 3}[zoom]):
        page.keyboard.press("+")
    start = (view["x"] + view["width"] / 2 - 40, view["y"] + view["height"] / 2 - 30)
    end = (start[0] + 71, start[1] + 53)
    drag(page, start, end)
    page.wait_for_timeout(SETTLE_MS)
    area = sheet.bounding_box()
    scale = width / area["width"]
    wanted = [(start[0] - area["x"]) * scale, (start[1] - area["y"]) * scale, 71 * scale, 53 * scale]
    [verdict] = sent(page)
    box = verdict["frames"][0]["boxes"][0]
    assert verdict["key"] == "M" and box["word"] == "missed" and box["label"] == "deer" and box["box_key"].startswith("drawn:")
    assert box["box"] == pytest.approx(wanted, abs=1)
    line = page.locator(".box.drawn .line").bounding_box()
    assert (line["x"], line["y"]) == pytest.approx(start, abs=2.5)


@pytest.mark.slow
def test_original_pixels_come_with_the_zoom(opened):
    page = opened(frames=1, width=4000, height=2250, shown=0.4)
    assert not sent(page, "image")
    press(page, "+", "+", "+")
    page.wait_for_function("document.querySelector('.picture img').naturalWidth === 4000")
    assert [message["full"] for message in sent(page, "image")] == [True]


def test_a_finger_draws_on_a_phone(opened):
    page = opened(size=(390, 844), frames=12, boxes=0, context={"device_scale_factor": 3, "has_touch": True, "is_mobile": True})
    page.locator(".do-missed").tap()
    assert page.locator(".view").evaluate("node => getComputedStyle(node).touchAction") == "none"
    area = page.locator(".sheet").bounding_box()
    touch = page.context.new_cdp_session(page)
    start, end = (area["x"] + 60.5, area["y"] + 40.25), (area["x"] + 180.5, area["y"] + 120.25)
    # At rest at its end, as a hand is: after a flick Chromium swallows the next tap.
    for kind, x, y in [("touchStart", *start), ("touchMove", start[0] + 40, start[1] + 30), ("touchMove", *end), ("touchMove", end[0], end[1] + 1), ("touchMove", *end)]:
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [{"x": x, "y": y}]})
        page.wait_for_timeout(60)
    touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    page.wait_for_timeout(SETTLE_MS)
    scale = 1280 / area["width"]
    [verdict] = sent(page)
    assert verdict["frames"][0]["boxes"][0]["box"] == pytest.approx([60.5 * scale, 40.25 * scale, 120 * scale, 80 * scale], abs=1)
    page.locator(".do-boxed").tap()
    page.wait_for_function("desk.stored.size === 2")
    assert statements(sent(page)[-1]).count("all_boxed") == 1 and statements(sent(page)[-1]).count("nothing_here") == 11


def test_a_drawn_box_is_clipped_moved_resized_and_removed(opened):
    page = opened(frames=1, boxes=0)
    page.keyboard.press("m")
    area = page.locator(".sheet").bounding_box()
    right, bottom = area["x"] + area["width"], area["y"] + area["height"]
    drag(page, (right - 100, bottom - 100), (right + 60, bottom + 60))
    first = sent(page)[0]["frames"][0]["boxes"][0]
    assert first["box"][0] + first["box"][2] == pytest.approx(1280, abs=0.02) and first["box"][1] + first["box"][3] == pytest.approx(720, abs=0.02)
    handle = page.locator("[data-handle=nw]").bounding_box()
    drag(page, (handle["x"] + 7, handle["y"] + 7), (handle["x"] - 13, handle["y"] - 3))
    second = sent(page)[1]["frames"][0]["boxes"][0]
    assert second["box_key"] == first["box_key"] and second["word"] == "missed" and second["box"][2] > first["box"][2]
    press(page, "Delete")
    assert words(sent(page)[2]) == ["false_positive"] and page.locator(".box").count() == 0
    press(page, "z")
    assert page.locator(".box.drawn").count() == 1
    page.keyboard.press("m")
    drag(page, (area["x"] + 20, area["y"] + 20), (area["x"] + 24, area["y"] + 21))
    assert "Too small" in page.evaluate("refused.at(-1)") and len(sent(page)) == 3


# -- grid -------------------------------------------------------------------------------------------------------


def test_a_page_of_crops_is_confirmed_with_its_exceptions(opened):
    page = opened(mode="grid", crops=12, items=2)
    page.locator(".crop").nth(4).click()
    press(page, "2", "ArrowRight", "u", "Enter")
    [verdict] = sent(page)
    said = {box["box_key"]: box["word"] for frame in verdict["frames"] for box in frame["boxes"]}
    assert (verdict["source"], set(statements(verdict))) == ("grid", {None})
    assert said["detection:4"] == said["detection:1"] == "false_positive" and "detection:2" not in said
    assert len(said) == 11 and list(said.values()).count("correct") == 9
    press(page, "z")
    assert page.locator(".crop.false_positive").count() == 2


# -- how it looks -----------------------------------------------------------------------------------------------


SCREENS = [((800, 600), "dark"), ((390, 844), "light"), *(pytest.param(*one, marks=pytest.mark.slow) for one in [((800, 600), "light"), ((1920, 1080), "dark"), ((3840, 2160), "light")])]


@pytest.mark.parametrize(("size", "scheme"), SCREENS)
def test_every_verdict_is_in_view(opened, size, scheme):
    page = opened(size=size, frames=12, context={"color_scheme": scheme})
    for name in ["correct", "wrong", "nothing", "missed", "boxed", "skip", "undo"]:
        box = page.locator(f".bar .do-{name}").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= size[0] and box["y"] + box["height"] <= size[1] and min(box["width"], box["height"]) >= 48
    strip = page.locator(".thumb").last.bounding_box()
    assert strip["x"] + strip["width"] <= size[0], "what a verdict counts for is on the screen"
    assert page.locator(".sheet").bounding_box()["height"] >= 150
    root = page.locator(".deerml-review")
    assert root.get_attribute("data-theme") == scheme and root.bounding_box()["width"] <= 1100
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_no_other_host_is_asked(opened, address):
    page = opened()
    press(page, "c", "?", "Escape", "g")
    assert page.hosts <= {address.split("/")[2], "data", "blob"}
    assert "http" not in (STATIC / "review.css").read_text() and "@import" not in (STATIC / "review.css").read_text()


@pytest.mark.slow
def test_axe_finds_nothing_serious(opened, pytestconfig):
    source = axe(pytestconfig.cache.mkdir("axe"))
    for scheme in ["light", "dark"]:
        for wanted, keys in [({"boxes": 2}, []), ({"boxes": 2}, ["Tab"]), ({}, ["f"]), ({}, ["?"]), ({}, ["m"]), ({"mode": "grid"}, ["1"]), ({"items": 1}, ["c"])]:
            page = opened(context={"color_scheme": scheme}, **wanted)
            press(page, *keys)
            page.wait_for_timeout(2700)  # until a text that fades is gone
            page.evaluate(source)
            found = page.evaluate("axe.run()")["violations"]
            serious = [(one["id"], [node["html"][:160] for node in one["nodes"]]) for one in found if one["impact"] in ("serious", "critical")]
            assert not serious, (scheme, wanted, keys, serious)
