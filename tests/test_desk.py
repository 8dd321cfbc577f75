"""The desk of a review: nothing lost, nothing twice, whatever browsers, tabs, reviewers and disks do."""
import json
import random
import shutil
import sqlite3
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from PIL import Image

from deerml.capture import schema
from deerml.capture.store import (
    NewFrame,
    Store,
    add_camera,
    add_frames,
    detections,
    frames_by_id,
    image_path,
    record_inference,
)
from deerml.capture.truth import BoxVerdict, FrameStatement, events_on, record, said_by, truths
from deerml.core.box import Box
from deerml.core.clock import parse_time
from deerml.core.settings import Home
from deerml.model.detector import Detection
from deerml.review.desk import Desk
from deerml.review.items import item_name
from deerml.review.queue import close_night

START = parse_time("2026-11-03T21:41:00", "America/Chicago")
MODEL = SimpleNamespace(digest="b" * 64, threshold=lambda camera, label: 0.6)  # what a desk asks of a bundle
SPOTS = [Box(10, 10, 30, 20), Box(60, 10, 30, 20)]  # of the detections, pixels
DRAWN = [Box(10, 60, 30, 20), Box(60, 60, 30, 20)]  # of what a person draws


def picture(seed: int, width: int = 160, height: int = 96) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (height // 8, width // 8, 3), np.uint8)
    return cv2.imencode(".jpg", cv2.resize(pixels, (width, height)))[1].tobytes()


def make(path: Path, boxes: tuple[int, ...] = (2, 1, 0), seconds: int = 60, close: bool = True, **options) -> Store:
    "A camera with one frame for each number, with so many detections on it, drawn for review"
    store = Store.open(Home.create(path, zone="America/Chicago", **options))
    add_camera(store, "cam1", "Porch")
    new = [NewFrame(picture(n), "test", str(n), camera="cam1", taken_at=START + timedelta(seconds=seconds * n), trigger="scheduled") for n in range(len(boxes))]
    ids = add_frames(store, new)
    found = [[Detection("deer", 0.9 - 0.4 * n, SPOTS[n]) for n in range(number)] for number in boxes]
    record_inference(store, MODEL.digest, [(frame_id, of_frame, bool(of_frame)) for frame_id, of_frame in zip(ids, found)])
    if close and boxes:
        close_night(store, "2026-11-03", MODEL.digest)
    return store


@pytest.fixture
def store(tmp_path):
    with make(tmp_path / "yard") as store:
        yield store


def ask(desk: Desk, **message) -> list[dict]:
    replies = list(desk.handle(message))
    for reply, images in replies:
        json.dumps(reply, allow_nan=False)
        assert len(images) == (reply["type"] == "image") and all(isinstance(one, bytes) for one in images)
    return [reply for reply, _ in replies]


def kinds(replies: list[dict]) -> list[str]:
    return [reply["type"] for reply in replies]


def ready(desk: Desk, client: str = "tab", **more) -> list[dict]:
    "The items after `ready`"
    return next(reply for reply in ask(desk, type="ready", client=client, **more) if reply["type"] == "items")["items"]


def frame(frame_id: int, *boxes: dict, statement: str | None = None, revision: int = 0) -> dict:
    return {"frame_id": frame_id, "revision": revision, "statement": statement, "boxes": list(boxes)}


def shown(box: dict, word: str, /, **more) -> dict:
    return {name: box[name] for name in ("box_key", "detection_id", "label", "box")} | {"word": word} | more


def drawn(name: str, box: Box = DRAWN[0], word: str = "missed") -> dict:
    return {"box_key": f"drawn:{name}", "detection_id": None, "label": "deer", "box": list(box.xywh), "word": word}


def verdict(op_id: str, item: dict | str, *frames: dict, **more) -> dict:
    item_id = item if isinstance(item, str) else item["id"]
    return {"type": "verdict", "op_id": op_id, "item_id": item_id, "key": "C", "source": "strip", "shown_ms": 6000, "frames": list(frames)} | more


def all_of(item: dict, op_id: str, word: str = "correct") -> dict:
    "Key C, or N, on a whole strip"
    frames = []
    for one in item["frames"]:
        boxes = [shown(box, word) for box in one["boxes"]]
        stands = boxes and word != "false_positive"
        frames.append(frame(one["id"], *boxes, statement="all_boxed" if stands else "nothing_here", revision=one["revision"]))
    return verdict(op_id, item, *frames)


def state(store: Store, frame_id: int) -> str:
    return truths(store, ["deer"], [frame_id])[frame_id].state(["deer"])


def event_count(store: Store) -> int:
    with store.read() as connection:
        return connection.scalar(sa.select(sa.func.count()).select_from(schema.review_event))


# -- a plain model of what truth must be ------------------------------------------------------------------------------

FRAMES = (1, 2, 3)
BOXES = {1: ["detection:1", "detection:2"], 2: ["detection:3"], 3: []}
PLACES = {"detection:1": SPOTS[0], "detection:2": SPOTS[1], "detection:3": SPOTS[0], "drawn:a": DRAWN[0], "drawn:b": DRAWN[1]}


class Tab:
    "A page: what it has seen of each frame, and what it waits for"

    def __init__(self, reviewer: str):
        self.reviewer, self.seen, self.own, self.pending, self.sent = reviewer, {one: (0, 0) for one in FRAMES}, set(), [], []


class DeskMachine(RuleBasedStateMachine):
    template: Path

    @initialize()
    def open(self):
        self.folder = tempfile.TemporaryDirectory()
        path = Path(self.folder.name) / "yard"
        shutil.copytree(self.template, path)
        self.store = Store.open(Home.open(path))
        self.ops: list[dict] = []  # accepted, in order
        self.tabs = [Tab("ann"), Tab("ann"), Tab("ben")]
        self.count = 0
        for tab in self.tabs:
            self.load(tab)

    def teardown(self):
        if hasattr(self, "store"):
            self.store.close()
            self.folder.cleanup()

    def load(self, tab: Tab):
        self.count += 1
        tab.desk, tab.own = Desk(self.store, tab.reviewer, MODEL), set()
        expected = [self.accept(tab, message) for message in tab.pending]
        replies = ask(tab.desk, type="ready", client=f"client-{self.count}", pending=list(tab.pending))
        assert [reply.get("code", "ack") for reply in replies[:len(expected)]] == expected
        assert replies[len(expected)]["type"] == "hello"
        tab.pending = []
        [item] = ask(tab.desk, **verdict("probe!", "strip.1of1.1-2-3"))[:1]  # any refusal shows the item as it is
        assert item["code"] == "BAD_MESSAGE"
        item = ask(tab.desk, **verdict("probe", "strip.1of1.1-2-3", frame(99, statement="unsure")))[0]["item"]
        self.look(tab, item)

    def look(self, tab: Tab, item: dict):
        "The tab redraws what the desk says, which must be the reviewer's own verdicts and nobody else's"
        for one in item["frames"]:
            boxes, word = self.opinion(tab.reviewer, one["id"])
            assert one["statement"] == word
            told = {box["box_key"]: box["word"] for box in one["boxes"]}
            assert {key: said for key, said in told.items() if said} == {key: said for key, said in boxes.items() if key.startswith("detection") or said != "false_positive"}
            tab.seen[one["id"]] = (one["revision"], len(self.on(tab.reviewer, one["id"])))

    # the model

    def active(self) -> list[dict]:
        undone = set()
        for op in reversed(self.ops):
            if "target" in op and op["id"] not in undone:
                undone.add(op["target"])
        return [op for op in self.ops if "target" not in op and op["id"] not in undone]

    def on(self, reviewer: str, frame_id: int) -> list[dict]:
        return [op for op in self.ops if op["by"] == reviewer and frame_id in op["frames"]]

    def opinion(self, reviewer: str, frame_id: int, more: dict | None = None) -> tuple[dict, str | None]:
        boxes, word = {}, None
        said = [op["frames"][frame_id] for op in self.active() if op["by"] == reviewer and frame_id in op["frames"]]
        for one in [*said, *([more] if more else [])]:
            boxes |= {box["box_key"]: "missed" if box["box_key"].startswith("drawn") and box["word"] != "false_positive" else box["word"] for box in one["boxes"]}
            word = one["statement"] or word
        return boxes, word

    def state(self, frame_id: int) -> str:
        opinions, finished = [], []
        for reviewer in ("ann", "ben"):
            boxes, word = self.opinion(reviewer, frame_id)
            alive = {key for key, said in boxes.items() if said != "false_positive"}
            if boxes or word:
                complete = (word == "all_boxed" and alive) or (word == "nothing_here" and not alive)
                (finished if complete else opinions).append((word, alive, {key for key, said in boxes.items() if said == "false_positive"}))
        if not finished:
            return "in_progress" if opinions else "unreviewed"
        differ = len(finished) == 2 and finished[0][:2] != finished[1][:2]
        doubt = any(denied & kept or alive - kept for _, alive, denied in opinions for _, kept, _ in finished)
        return "disputed" if differ or doubt else "boxes_complete" if finished[0][1] else "verified_empty"

    def accept(self, tab: Tab, message: dict) -> str:
        "What the desk must answer; the model moves on when it accepts"
        known = {op["id"]: op for op in self.ops}
        if message["type"] == "undo":
            target = known.get(message["target_op"])
            if target is None or target["by"] != tab.reviewer:
                return "NO_EVENT"
            if message["op_id"] not in known:
                self.ops.append({"id": message["op_id"], "by": tab.reviewer, "target": target["id"], "frames": dict.fromkeys(target["frames"]), "events": target["events"]})
            tab.own.add(message["op_id"])
            return "ack"
        if message["op_id"] not in known:
            for one in message["frames"]:
                if (refusal := self.refusal(tab, message, one)) is not None:
                    return refusal
            events = sum(len(one["boxes"]) + (one["statement"] is not None) for one in message["frames"])
            self.ops.append({"id": message["op_id"], "by": tab.reviewer, "frames": {one["frame_id"]: one for one in message["frames"]}, "events": events})
        tab.own.add(message["op_id"])
        return "ack"

    def refusal(self, tab: Tab, message: dict, one: dict) -> str | None:
        seen = message["seen"][one["frame_id"]]
        if any(op["id"] not in tab.own for op in self.on(tab.reviewer, one["frame_id"])[seen:]):
            return "STALE"
        boxes, _ = self.opinion(tab.reviewer, one["frame_id"], one)
        alive = any(word != "false_positive" for word in boxes.values())
        return "NOT_COMPLETE_STATEMENT" if one["statement"] == ("nothing_here" if alive else "all_boxed") else None

    # what can happen

    def send(self, tab: Tab, message: dict, lost: bool):
        expected = self.accept(tab, message)
        reply = ask(tab.desk, **message)[0]
        assert reply.get("code", "ack") == expected and reply["op_id"] == message["op_id"]
        tab.sent.append(message)
        if lost:
            tab.pending.append(message)
        elif expected == "ack":
            for name, one in reply["frames"].items():
                tab.seen[int(name)] = (one["revision"], len(self.on(tab.reviewer, int(name))))
                assert one["state"] == self.state(int(name))
            tab.pending = [other for other in tab.pending if other["op_id"] != message["op_id"]]
        else:
            self.look(tab, reply["item"])

    def press(self, data, tab: Tab) -> dict:
        "A verdict on some frames: any words that a browser could send"
        frames, self.count = [], self.count + 1
        for frame_id in data.draw(st.lists(st.sampled_from(FRAMES), min_size=1, max_size=3, unique=True)):
            keys = data.draw(st.lists(st.sampled_from([*BOXES[frame_id], "drawn:a", "drawn:b"]), max_size=3, unique=True))
            boxes = [{"box_key": key, "detection_id": int(key[10:]) if key.startswith("det") else None, "label": "deer", "box": list(PLACES[key].xywh),
                      "word": data.draw(st.sampled_from(["correct", "false_positive"] if key.startswith("det") else ["missed", "false_positive"]))} for key in keys]
            word = data.draw(st.sampled_from(["all_boxed", "nothing_here", "unsure", *([None] if boxes else [])]))
            frames.append(frame(frame_id, *boxes, statement=word, revision=tab.seen[frame_id][0]))
        message = verdict(f"op-{self.count}", "strip.1of1.1-2-3", *frames)
        return message | {"seen": {frame_id: count for frame_id, (_, count) in tab.seen.items()}}

    @rule(data=st.data(), tab=st.integers(0, 2), lost=st.booleans())
    def judges(self, data, tab, lost):
        self.send(self.tabs[tab], self.press(data, self.tabs[tab]), lost)

    @rule(data=st.data(), tab=st.integers(0, 2))
    def judges_twice_and_the_second_arrives_first(self, data, tab):
        first, second = (self.press(data, self.tabs[tab]) for _ in range(2))
        self.send(self.tabs[tab], second, lost=True)
        self.send(self.tabs[tab], first, lost=True)

    @rule(data=st.data(), tab=st.integers(0, 2), lost=st.booleans())
    def sends_again(self, data, tab, lost):
        if self.tabs[tab].sent:
            self.send(self.tabs[tab], data.draw(st.sampled_from(self.tabs[tab].sent)), lost)

    @rule(data=st.data(), tab=st.integers(0, 2), lost=st.booleans())
    def undoes(self, data, tab, lost):
        if self.ops:
            self.count += 1
            target = data.draw(st.sampled_from(self.ops))["id"]
            self.send(self.tabs[tab], {"type": "undo", "op_id": f"op-{self.count}", "target_op": target, "item_id": "strip.1of1.1-2-3"}, lost)

    @rule(tab=st.integers(0, 2))
    def reloads(self, tab):
        self.load(self.tabs[tab])

    @invariant()
    def the_store_is_what_the_model_says(self):
        if not hasattr(self, "store"):
            return
        assert {one: state(self.store, one) for one in FRAMES} == {one: self.state(one) for one in FRAMES}
        assert event_count(self.store) == sum(op["events"] for op in self.ops)
        with self.store.read() as connection:
            events = events_on(connection, FRAMES)
        for reviewer in ("ann", "ben"):
            for one in FRAMES:
                word, boxes = said_by(events[one], reviewer, "deer")
                assert ({key: said for key, (said, _) in boxes.items()}, word) == self.opinion(reviewer, one)


def machine(examples: int, steps: int):
    folder = tempfile.TemporaryDirectory()
    DeskMachine.template = Path(folder.name) / "yard"
    make(DeskMachine.template).close()
    case = DeskMachine.TestCase
    case.settings = settings(max_examples=examples, stateful_step_count=steps, deadline=None, suppress_health_check=list(HealthCheck))
    case().runTest()
    folder.cleanup()


def test_whatever_tabs_reviewers_and_connections_do():
    machine(examples=15, steps=20)


@pytest.mark.slow
def test_whatever_they_do_at_length():
    machine(examples=200, steps=50)


# -- what is refused --------------------------------------------------------------------------------------------------


def refused(desk: Desk, message: dict) -> str:
    before = event_count(desk.view.store)
    [reply] = ask(desk, **message)
    assert reply["type"] == "reject" and reply["op_id"] == message["op_id"] and reply["message"] and event_count(desk.view.store) == before
    return reply["code"]


def test_each_refusal_has_its_code_and_shows_the_item_as_it_is(store):
    desk = Desk(store, "ann", MODEL)
    [item] = ready(desk)
    one, two, three = item["frames"]
    box, other = one["boxes"]
    right = shown(box, "correct")
    cases = [
        ("NO_FRAME", frame(99, statement="nothing_here")),
        ("BAD_BOX", frame(1, right | {"box": [0, 0, 0, 9]})),
        ("BAD_BOX", frame(1, right | {"box": [150, 0, 40, 9]})),
        ("BAD_BOX", frame(1, right | {"box": [float("nan"), 0, 40, 9]})),
        ("BAD_BOX", frame(1, right | {"box": [1, 2, 3]})),
        ("BAD_BOX", frame(1, shown(two["boxes"][0], "correct"))),  # of another frame
        ("BAD_BOX", frame(1, right | {"detection_id": 77, "box_key": "detection:77"})),
        ("BAD_BOX", frame(1, right | {"word": "missed"})),
        ("BAD_BOX", frame(1, right | {"detection_id": None})),
        ("BAD_BOX", frame(1, right | {"box_key": "drawn:x"})),
        ("BAD_BOX", frame(1, drawn("x'; drop"))),
        ("UNKNOWN_CLASS", frame(1, right | {"label": "elk"})),
        ("NOT_COMPLETE_STATEMENT", frame(3, statement="all_boxed")),
        ("NOT_COMPLETE_STATEMENT", frame(1, right, statement="nothing_here")),
        ("NOT_COMPLETE_STATEMENT", frame(1, shown(box, "false_positive"), statement="all_boxed")),
        ("STALE", frame(1, right, revision=5)),
        ("BAD_MESSAGE", frame(1)),
        ("BAD_MESSAGE", frame(1, right, right)),
        ("BAD_MESSAGE", frame(1, statement="settled")),
        ("BAD_MESSAGE", frame("1", right)),
        ("BAD_MESSAGE", frame(2**63, right)),
    ]
    for number, (code, words) in enumerate(cases):
        message = verdict(f"bad-{number}", item, words)
        [reply] = ask(desk, **message)
        assert (reply["type"], reply["code"]) == ("reject", code), (words, reply)
        assert reply["item"] == item
    assert refused(desk, verdict("many", item, *(frame(1, statement="unsure") for _ in range(25)))) == "BAD_MESSAGE"
    assert refused(desk, verdict("twice", item, frame(1, statement="unsure"), frame(1, statement="unsure"))) == "BAD_MESSAGE"
    assert refused(desk, verdict("boxes", item, frame(1, *(drawn(str(n)) for n in range(201))))) == "BAD_MESSAGE"
    assert refused(desk, verdict("nowhere", "strip.1of1.99", frame(99, statement="unsure"))) == "NO_FRAME"
    assert refused(desk, verdict("noitem", "strip.1of1.", frame(1, statement="unsure"))) == "BAD_MESSAGE"
    assert refused(desk, verdict("grid", "grid.1", frame(1, right, statement="all_boxed"), source="grid")) == "NOT_COMPLETE_STATEMENT"
    assert refused(desk, {"type": "undo", "op_id": "u", "target_op": "never", "item_id": item["id"]}) == "NO_EVENT"
    assert ask(desk, **verdict("bad id!", item, frame(1, right)))[0]["code"] == "BAD_MESSAGE"
    assert event_count(store) == 0


def test_an_operation_id_of_somebody_else(store):
    ann, ben = Desk(store, "ann", MODEL), Desk(store, "ben", MODEL)
    [item] = ready(ann)
    ask(ann, **all_of(item, "same"))
    assert refused(ben, all_of(item, "same")) == "BAD_MESSAGE"
    assert refused(ben, {"type": "undo", "op_id": "mine", "target_op": "same", "item_id": item["id"]}) == "NO_EVENT"


def test_another_tab_is_newer(store):
    old, new = Desk(store, "ann", MODEL), Desk(store, "ann", MODEL)
    [item], _ = ready(old), ready(new)
    ask(new, **all_of(item, "new"))
    [reply] = ask(old, **all_of(item, "old", "false_positive"))
    assert reply["code"] == "STALE" and reply["item"]["done"]
    ack = ask(old, **all_of(reply["item"], "again", "false_positive"))[0]
    assert ack["type"] == "ack" and {one["state"] for one in ack["frames"].values()} == {"verified_empty"}


def test_verdicts_that_came_from_elsewhere_are_newer_too(store):
    desk = Desk(store, "ann", MODEL)
    [item] = ready(desk)
    record(store, "ann", [FrameStatement(1, "nothing_here", ("deer",))])
    assert refused(desk, all_of(item, "late")) == "STALE"


# -- what is recorded -------------------------------------------------------------------------------------------------


def test_what_the_words_become(store):
    desk = Desk(store, "ann", MODEL)
    [item] = ready(desk)
    first, second = item["frames"][0]["boxes"]
    message = verdict("one", item, frame(1, shown(first, "correct"), shown(second, "correct", box=[62, 12, 30, 20]), statement="all_boxed"), frame(3, drawn("a", word="adjusted"), statement="all_boxed"))
    assert ask(desk, **message)[0]["type"] == "ack"
    with store.read() as connection:
        events = events_on(connection, [1, 3])
    assert [(event.verdict, event.x, event.source, event.operation_id) for event in events[1]] == [
        ("correct", 10, "strip:draw", "op:one:1:0"), ("adjusted", 62, "strip:draw", "op:one:1:1"), ("all_boxed", None, "strip:draw", "op:one:1:2")]
    assert [(event.verdict, event.box_key) for event in events[3]] == [("missed", "drawn:a"), ("all_boxed", None)]
    again = ask(desk, **verdict("probe", item, frame(9, statement="unsure")))[0]["item"]
    assert [(box["kind"], box["word"], box["box"][0]) for box in again["frames"][0]["boxes"]] == [("alarm", "correct", 10), ("suggestion", "adjusted", 62)]
    assert [(box["kind"], box["word"]) for box in again["frames"][2]["boxes"]] == [("drawn", "missed")]


def test_a_yard_with_two_kinds_of_animals(tmp_path):
    with make(tmp_path / "yard", (1, 0), classes=["deer", "fox"]) as store:
        desk = Desk(store, "ann", MODEL)
        [item] = ready(desk)
        box = item["frames"][0]["boxes"][0]
        truth = lambda: truths(store, ["deer", "fox"], [1])[1]  # noqa: E731
        ask(desk, **verdict("deer", item, frame(1, shown(box, "correct"), statement="all_boxed")))
        assert truth().state(["deer", "fox"]) == "boxes_complete" and truth().of["fox"].state == "verified_empty"
        ask(desk, **verdict("fox", item, frame(1, shown(box, "correct", label="fox"), statement="all_boxed")))
        assert truth().state(["deer", "fox"]) == "boxes_complete" and truth().of["deer"].state == "verified_empty" and len(truth().of["fox"].boxes) == 1
        shown_again = ask(desk, **verdict("probe", item, frame(9, statement="unsure")))[0]["item"]["frames"][0]
        assert [(one["label"], one["word"]) for one in shown_again["boxes"]] == [("fox", "adjusted")] and shown_again["statement"] == "all_boxed"
        ask(desk, type="undo", op_id="back", target_op="fox", item_id=item["id"])
        assert truth().of["fox"].state == "verified_empty" and len(truth().of["deer"].boxes) == 1


def test_reviewers_see_their_own_and_disputes_are_told(store):
    ann, ben = Desk(store, "ann", MODEL), Desk(store, "ben", MODEL)
    [item], [of_ben] = ready(ann), ready(ben)
    ask(ann, **all_of(item, "a"))
    assert of_ben == ask(ben, **verdict("probe", item, frame(9, statement="unsure")))[0]["item"] | {"frames": of_ben["frames"]}
    ack = ask(ben, **all_of(of_ben, "b", "false_positive"))[0]
    assert ack["note"] and ack["frames"]["1"]["state"] == "disputed" and ack["frames"]["3"]["state"] == "verified_empty"
    hello, items, *_ = ask(ben, type="choose", mode="strip", choice={"what": "disputed"})
    assert "differ" in hello["words"] and [one["id"] for one in items["items"][0]["frames"]] == [1, 2]
    settle = verdict("c", items["items"][0], *(frame(one["id"], *(shown(box, "correct") for box in one["boxes"]), statement="all_boxed", revision=one["revision"]) for one in items["items"][0]["frames"]))
    assert {one["state"] for one in ask(ben, **settle)[0]["frames"].values()} == {"boxes_complete"}


def test_a_new_model_does_not_double_an_animal(store):
    desk = Desk(store, "ann", MODEL)
    [item] = ready(desk)
    ask(desk, **verdict("one", item, frame(3, drawn("a"), statement="all_boxed"), frame(2, shown(item["frames"][1]["boxes"][0], "correct"), statement="all_boxed")))
    newer = SimpleNamespace(digest="c" * 64, threshold=MODEL.threshold)
    near = [Detection("deer", 0.9, Box(box.x + 2, box.y, box.width, box.height)) for box in (DRAWN[0], SPOTS[0])]
    record_inference(store, newer.digest, [(3, near[:1], True), (2, near[1:], True)])
    later = ask(Desk(store, "ann", newer), **verdict("probe", item, frame(9, statement="unsure")))[0]["item"]["frames"]
    assert [box["box_key"] for box in later[2]["boxes"]] == ["drawn:a"] and [box["box_key"] for box in later[1]["boxes"]] == ["detection:3"]
    fresh = ask(Desk(store, "ben", newer), **verdict("probe", item, frame(9, statement="unsure")))[0]["item"]["frames"]
    assert [box["detection_id"] for one in fresh[1:] for box in one["boxes"]] == [one.id for of_frame in (2, 3) for one in detections(store, newer.digest)[of_frame]]


# -- what is asked ----------------------------------------------------------------------------------------------------


def test_reasons_for_an_empty_review(tmp_path):
    with make(tmp_path / "none", ()) as store:
        hello, items, end = ask(Desk(store, "ann", MODEL), type="ready", client="c")
        assert hello["words"] == end["because"] == "Nothing to review, because there are no frames." and items["items"] == []
    with make(tmp_path / "open", (1,), close=False) as store:
        desk = Desk(store, "ann")
        assert ask(desk, type="ready", client="c")[-1]["because"].startswith("Nothing to review, because ")
        for mode, choice, reason in [("grid", {"what": "queue"}, "There is no model yet, so there are no boxes to judge."), ("strip", {"what": "disputed"}, "No reviewers differ."),
                                     ("strip", {"what": "skipped"}, "You have skipped nothing."), ("single", {"what": "night", "night": "2001-01-01"}, "No camera has frames of that night.")]:
            assert ask(desk, type="choose", mode=mode, choice=choice)[-1] == {"type": "end", "because": reason, "summary": "Nothing was judged."}


def test_no_model_no_boxes(store):
    desk = Desk(store, "ann")
    [item] = ready(desk)
    assert item["key_frame"] == 1 and not any(one["boxes"] for one in item["frames"])
    assert ask(desk, **all_of(item, "n"))[0]["type"] == "ack" and state(store, 1) == "verified_empty"


def test_the_end_and_what_changed(tmp_path):
    with make(tmp_path / "yard", (1, 1, 0, 0), seconds=900) as store:  # four windows
        desk = Desk(store, "ann", MODEL)
        first = ready(desk)
        generation = desk.agenda.generation
        items, *_, end = ask(desk, type="need", after=first[-1]["id"], items=6, generation=generation)
        assert end["type"] == "end" and end["because"] == "These are the last of 4 windows of tonight."
        assert ask(desk, type="need", after=None, items=2, generation=generation - 1) == [{"type": "items", "generation": generation - 1, "items": []}]
        by_frame = {item["frames"][0]["id"]: item for item in first + items["items"]}
        assert sorted(by_frame) == [1, 2, 3, 4]
        ask(desk, **all_of(by_frame[1], "1"))
        ask(desk, **all_of(by_frame[2], "2", "false_positive"))
        ask(desk, **verdict("3", by_frame[3], frame(3, drawn("a"), statement="all_boxed"), shown_ms=90000))
        ack, nothing, end = ask(desk, **all_of(by_frame[4], "4"))
        assert ack["progress"] == {"done": 4, "total": 4, "frames": 4, "minutes_left": 0, "images_a_minute": 10, "by": {"all_boxed": 2, "nothing_here": 2}}
        assert nothing["items"] == [] and end == {"type": "end", "because": "All 4 windows of tonight are judged.",
            "summary": "You judged 4 windows (4 frames) in 2 minutes: 2 visits, 1 window with a false alarm, 1 window with a missed animal; 4 frames more can be trained on."}
        hello, _, end = ask(Desk(store, "ben", MODEL), type="ready", client="c")
        assert hello["words"] == end["because"] == "Nothing to review, because everything that was drawn is judged."
        undone = ask(desk, type="undo", op_id="5", target_op="4", item_id=by_frame[4]["id"])[0]
        assert undone["progress"]["done"] == 3 and undone["progress"]["by"] == {"all_boxed": 2, "nothing_here": 1}
        assert [item["frames"][0]["id"] for item in ready(Desk(store, "ann", MODEL))] == [4]


def test_a_reload_counts_what_was_judged_before_its_answer_came(store):
    desk = Desk(store, "ann", MODEL)
    [item] = ready(desk)
    message = all_of(item, "1")
    ask(desk, **message)
    replies = ask(Desk(store, "ann", MODEL), type="ready", client="new", pending=[message, {"type": "broken"}, {"nonsense": 1}, {"type": "need", "generation": 1}])
    assert kinds(replies) == ["ack", "error", "error", "hello", "items", "end"]
    assert replies[-1]["summary"] == "You judged 1 window (3 frames) in under a minute: 1 visit; 3 frames more can be trained on."


def test_new_questions_are_asked_when_all_is_judged(tmp_path):
    with make(tmp_path / "yard", (1,)) as store:
        desk = Desk(store, "ann", MODEL)
        [item] = ready(desk)
        ids = add_frames(store, [NewFrame(picture(9), "test", "late", camera="cam1", taken_at=START + timedelta(days=1), trigger="scheduled")])
        close_night(store, "2026-11-04", MODEL.digest)
        ack, items, *rest = ask(desk, **all_of(item, "1"))
        assert [one["id"] for one in items["items"][0]["frames"]] == ids and kinds(rest) == ["image", "end"]


def test_long_windows_become_parts_and_the_order_of_images_starts_with_the_key_frame(tmp_path):
    with make(tmp_path / "yard", (0,) * 20 + (1,) + (0,) * 9, seconds=15) as store:
        desk = Desk(store, "ann", MODEL)
        replies = ask(desk, type="ready", client="c", have=[1])
        items = replies[1]["items"]
        assert [(item["part"], len(item["frames"])) for item in items] == [([1, 3], 10), ([2, 3], 10)] and items[0]["title"] == "Porch · Tue 3 Nov, 21:40"
        assert items[0]["frames"][0]["time"] == "21:41:00"
        images = [reply["frame_id"] for reply in replies if reply["type"] == "image"]
        assert images == [6, *range(2, 6), *range(7, 11), 16, *range(11, 16), *range(17, 21)]
        [last] = ask(desk, type="need", after=items[1]["id"], items=2, generation=desk.agenda.generation)[0]["items"]
        assert last["key_frame"] == 0 and last["frames"][0]["boxes"][0]["kind"] == "alarm"
        assert "stratum" not in json.dumps(replies)
        single = ask(desk, type="choose", mode="single", choice={"what": "night", "night": "2026-11-03", "camera": "cam1"})
        assert [len(item["frames"]) for item in single[1]["items"]] == [1] * 8 and single[0]["progress"]["total"] == 30
        ask(desk, **verdict("s", single[1]["items"][0], frame(1, statement="nothing_here"), source="single"))
        with store.read() as connection:
            assert events_on(connection, [1])[1][0].source == "single:night"
        ask(desk, **verdict("u", single[1]["items"][1], frame(2, statement="unsure"), source="single"))
        skipped = ask(desk, type="choose", mode="strip", choice={"what": "skipped"})
        assert [[one["id"] for one in item["frames"]] for item in skipped[1]["items"]] == [[2]] and not skipped[1]["items"][0]["done"]


def test_pages_of_crops(tmp_path):
    with make(tmp_path / "yard", (2,) * 30) as store:
        desk = Desk(store, "ann", MODEL)
        hello, items, *rest = ask(desk, type="choose", mode="grid")
        assert hello["words"].startswith("4 pages") and [len(page["crops"]) for page in items["items"]] == [24, 6]
        page = items["items"][0]
        assert page["band"] == [0.85, 0.95] and kinds(rest) == ["image"] * 30 and rest[0]["crop"] == page["crops"][0]["box_key"]
        words = ["false_positive" if number == 3 else "correct" for number in range(24)]
        frames = [frame(crop["frame_id"], shown(crop, word)) for crop, word in zip(page["crops"], words)]
        ack = ask(desk, **verdict("g", page, *frames, source="grid"))[0]
        assert ack["progress"]["by"] == {"correct": 23, "false_positive": 1} and ack["progress"]["done"] == 1
        assert {one["state"] for one in ack["frames"].values()} == {"in_progress"}  # a page completes nothing
        with store.read() as connection:
            assert events_on(connection, [1])[1][0].source == "grid"
        assert len(ask(Desk(store, "ben", MODEL), type="choose", mode="grid")[1]["items"][0]["crops"]) == 6
        ask(desk, type="undo", op_id="h", target_op="g", item_id=page["id"])
        assert len(ask(Desk(store, "ben", MODEL), type="choose", mode="grid")[1]["items"][0]["crops"]) == 24


# -- images -----------------------------------------------------------------------------------------------------------


def received(desk: Desk, **message) -> tuple[dict, np.ndarray]:
    [(reply, [data])] = desk.handle({"type": "image"} | message)
    pixels = np.asarray(Image.open(BytesIO(data)).convert("RGB"))  # without any turning of its own
    assert (reply["width"], reply["height"]) == (pixels.shape[1], pixels.shape[0]) and reply["media_type"] in ("image/jpeg", "image/png", "image/webp")
    return reply, pixels


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(160, 96), (2400, 1200)])
def test_boxes_mean_the_pixels_that_are_seen(tmp_path, orientation, size):
    upright = np.zeros((size[1], size[0], 3), np.uint8)
    x, y, width, height = (round(share * side) for share, side in zip((0.1, 0.2, 0.3, 0.25), size * 2))
    upright[y:y + height, x:x + width] = 255
    turns = {1: [], 2: [0], 3: [3], 4: [1], 5: [5], 6: [2], 7: [6], 8: [4]}[orientation]  # how a camera held that way stores it
    stored = Image.fromarray(upright)
    for turn in turns:
        stored = stored.transpose(turn)
    exif = Image.Exif()
    exif[274] = orientation
    data = BytesIO()
    stored.save(data, "JPEG", quality=95, exif=exif)
    with make(tmp_path / "yard", ()) as store:
        [frame_id] = add_frames(store, [NewFrame(data.getvalue(), "t", "1", camera="cam1", taken_at=START)])
        box = Box.from_xywh((x, y, width, height), size)
        record_inference(store, MODEL.digest, [(frame_id, [Detection("deer", 0.9, box)], True)])
        assert frames_by_id(store, [frame_id])[0].size == size
        desk = Desk(store, "ann", MODEL)
        item = ask(desk, type="choose", mode="strip", choice={"what": "night", "night": "2026-11-03"})[1]["items"][0]
        for full in (False, True):
            reply, pixels = received(desk, frame_id=frame_id, full=full)
            scale = 1 if full else item["frames"][0]["image_bytes_scale"]
            assert max(pixels.shape[:2]) == (max(size) if full else min(1600, max(size))) and reply["full"] is full
            left, top, right, bottom = (round(edge * scale) for edge in box.xyxy)
            edge = round(8 * scale) + 2
            assert pixels[top + edge:bottom - edge, left + edge:right - edge].min() > 200
            around = np.ones(pixels.shape[:2], bool)
            around[max(0, top - edge):bottom + edge, max(0, left - edge):right + edge] = False
            assert pixels[around].max() < 55
        [(reply, [raw])] = desk.handle({"type": "image", "frame_id": frame_id, "full": True})
        assert (raw == data.getvalue()) is (orientation == 1)


def test_an_image_that_is_gone_or_broken_is_shown_as_such_and_cannot_be_judged(store):
    paths = [image_path(store.home.images, one.image, one.media_type) for one in frames_by_id(store, [1, 2, 3])]
    paths[0].unlink()
    paths[1].chmod(0o644)
    paths[1].write_bytes(paths[1].read_bytes()[:300])
    desk = Desk(store, "ann", MODEL)
    replies = ask(desk, type="ready", client="c")
    item = replies[1]["items"][0]
    assert [one["problem"] for one in item["frames"]] == ["gone", "broken", None]
    assert [reply["frame_id"] for reply in replies if reply["type"] == "image"] == [3]
    assert [ask(desk, type="image", frame_id=one)[0]["code"] for one in (1, 2, 99)] == ["IMAGE_GONE", "BAD_IMAGE", "NO_FRAME"]
    assert refused(desk, verdict("1", item, frame(1, statement="nothing_here"))) == "NO_FRAME"
    assert ask(desk, type="broken", frame_id=2, reason="it cannot be decoded") == []
    assert refused(desk, verdict("2", item, frame(2, statement="nothing_here"))) == "NO_FRAME"
    ack = ask(desk, **verdict("3", item, frame(2, statement="unsure"), frame(3, statement="nothing_here")))
    assert ack[0]["type"] == "ack" and ack[0]["progress"]["done"] == 1  # the one that is gone holds nothing up
    assert ack[-1]["summary"].endswith("2 images could not be shown.")


def test_a_crop_of_a_missing_image_is_left_out(store):
    path = image_path(store.home.images, frames_by_id(store, [1])[0].image, "jpeg")
    path.unlink()
    desk = Desk(store, "ann", MODEL)
    pages = ask(desk, type="choose", mode="grid")[1]["items"]
    assert [[crop["frame_id"] for crop in page["crops"]] for page in pages] == [[2], []]
    assert [ask(desk, type="image", crop=key)[0]["code"] for key in ("detection:1", "detection:99", "drawn:x", "")] == ["IMAGE_GONE", "BAD_BOX", "BAD_BOX", "BAD_BOX"]


# -- the database -----------------------------------------------------------------------------------------------------


def database(store: Store) -> str:
    return str(store.home.path / "deerml.db")


def test_a_locked_database_keeps_the_order(store):
    desk = Desk(store, "ann", MODEL)
    [item] = ready(desk)
    first = verdict("1", item, frame(1, drawn("a")))
    second = verdict("2", item, frame(1, drawn("a", word="false_positive"), statement="nothing_here"))
    other = sqlite3.connect(database(store))
    other.execute("begin immediate")
    start = time.monotonic()
    replies = [ask(desk, **message) for message in (first, second)]
    assert time.monotonic() - start < 5
    assert all(reply["code"] == "BUSY" and reply["retry"] and reply["item"] is None for [reply] in replies)
    other.rollback()
    assert ask(desk, **second)[0]["code"] == "BUSY"  # the first comes first
    assert [ask(desk, **message)[0]["type"] for message in (first, second, first)] == ["ack"] * 3
    assert state(store, 1) == "verified_empty" and event_count(store) == 3
    other.execute("begin immediate")
    start = time.monotonic()
    replies = ask(Desk(store, "ann", MODEL), type="ready", client="new", pending=[verdict(str(n), item, frame(2, drawn(f"n{n}"))) for n in range(4, 9)])
    assert [reply.get("code") for reply in replies[:5]] == ["BUSY"] * 5 and replies[5]["type"] == "hello" and replies[5]["read_only"] is False
    assert time.monotonic() - start < 8
    other.close()
    with store.read() as connection:
        assert connection.exec_driver_sql("pragma busy_timeout").scalar() == 10000  # others are as patient as before


def test_a_wholly_locked_database_is_an_answer(store):
    desk = Desk(store, "ann", MODEL)
    [item] = ready(desk)
    other = sqlite3.connect(database(store))
    other.execute("begin exclusive")
    [reply] = ask(desk, type="choose", mode="strip")
    if reply["type"] == "error":  # a write-ahead log lets readers through
        assert reply["code"] == "BUSY" and reply["retry"]
    assert ask(desk, **all_of(item, "1"))[0]["code"] == "BUSY"
    other.close()
    assert ask(desk, **all_of(item, "1"))[0]["type"] == "ack"


def test_a_home_that_cannot_be_written(store):
    with Store(store.home, schema.open_engine(f"sqlite:///file:{database(store)}?mode=ro&uri=true")) as fixed:
        desk = Desk(fixed, "ann", MODEL)
        hello, items, *_ = ask(desk, type="ready", client="c")
        assert hello["read_only"] is True and len(items["items"]) == 1
        [reply] = ask(desk, **all_of(items["items"][0], "1"))
        assert reply["code"] == "READ_ONLY" and reply["item"] == items["items"][0]
    assert ask(Desk(store, "ann", MODEL), type="ready", client="c")[0]["read_only"] is False


# -- hostile messages -------------------------------------------------------------------------------------------------

JUNK = [None, True, 0, -1, 1, 2**63, 10**400, 1.5, float("nan"), float("inf"), "", "1", "\x00", "\ud800", "a" * 600, "' or 1=1 --", "strip.1of1.1-2-3", "grid.1-2", [], {}, [[]], {"type": "verdict"}]


def mutated(value: object, chance: random.Random) -> object:
    "A message with some of its parts exchanged for junk"
    if chance.random() < 0.06:
        return chance.choice(JUNK)
    if isinstance(value, dict):
        return {name: mutated(one, chance) for name, one in value.items() if chance.random() > 0.03}
    return [mutated(one, chance) for one in value] if isinstance(value, list) else value


def test_hostile_messages_are_answered(store):
    desk, chance = Desk(store, "ann", MODEL), random.Random(5)
    [item] = ready(desk)
    sound = [all_of(item, "1"), verdict("2", "grid.1-2", frame(1, shown(item["frames"][0]["boxes"][0], "correct")), source="grid"), {"type": "undo", "op_id": "3", "target_op": "1", "item_id": item["id"]},
             {"type": "need", "after": item["id"], "items": 2, "generation": 1}, {"type": "image", "frame_id": 1, "full": True}, {"type": "image", "crop": "detection:1"}, {"type": "broken", "frame_id": 3, "reason": "x"},
             {"type": "choose", "mode": "single", "choice": {"what": "night", "night": "2026-11-03", "camera": "cam1"}}]
    sound.append({"type": "ready", "client": "c", "mode": "strip", "choice": {"what": "queue"}, "have": [1], "pending": sound[:3]})
    seen = Counter()
    for _ in range(300):
        message = mutated(chance.choice(sound), chance)
        for reply, images in desk.handle(message):
            seen[reply["type"], reply.get("code")] += 1
            json.dumps(reply).encode("utf-8")
            assert all(isinstance(one, bytes) for one in images) and isinstance(reply["type"], str)
    assert seen["error", "BAD_MESSAGE"] > 30 and seen["reject", "BAD_MESSAGE"] > 10 and seen["ack", None] > 5
    for junk in JUNK:
        assert [reply["type"] for reply, _ in desk.handle(junk)] in (["error"], ["reject"])


# -- long evenings ----------------------------------------------------------------------------------------------------


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_a_thousand_frames_leave_the_memory_as_it_was(tmp_path):
    body = picture(1, 1280, 720)
    with Store.open(Home.create(tmp_path / "yard", zone="America/Chicago")) as store:
        add_frames(store, [NewFrame(body + bytes([n % 50]), "t", str(n), camera="cam1", taken_at=START + timedelta(seconds=30 * n)) for n in range(1000)])
        desk = Desk(store, "ann", MODEL)
        items = ask(desk, type="choose", mode="strip", choice={"what": "night", "night": "2026-11-03"})[1]["items"]
        before, judged, number = resident_mb(), 0, 0
        while items and judged < 1000:
            for item in items:
                number += 1
                for _ in desk.handle(all_of(item, f"op-{number}")):
                    pass
                judged += len(item["frames"])
            replies = desk.handle({"type": "need", "after": items[-1]["id"], "items": 2, "generation": desk.agenda.generation})
            items = next((reply["items"] for reply, _ in [next(replies)]), [])
            for _ in replies:
                pass
        assert judged == 1000 and resident_mb() - before < 50
        assert item_name(desk.agenda.plan.items[0]).kind == "strip"


def test_a_verdict_reads_only_its_own_frames(store):
    record(store, "ben", [BoxVerdict(2, "missed", "deer", DRAWN[0], operation_id=f"b{n}") for n in range(300)])
    desk = Desk(store, "ann", MODEL)
    [item] = ready(desk)
    rows = []

    @sa.event.listens_for(store.engine, "after_cursor_execute")
    def count(connection, cursor, statement, parameters, context, many):
        if statement.lower().startswith("select") and "review_event" in statement and "count(" not in statement:
            rows.append((statement, parameters))

    ask(desk, **verdict("1", item, frame(1, statement="unsure")))
    assert rows and all(parameters for _, parameters in rows)


def test_desks_in_several_threads_store_an_operation_once(tmp_path):
    with make(tmp_path / "yard", (1, 1, 0, 0, 1, 0), seconds=900) as store:
        desks = [Desk(store, "ann", MODEL) for _ in range(4)]
        items = {item["id"]: item for item in ask(desks[0], type="choose", mode="single")[1]["items"]}
        messages = [all_of(item, f"op-{number}") for number, item in enumerate(items.values())]
        with ThreadPoolExecutor(4) as pool:
            replies = list(pool.map(lambda desk: [ask(desk, **message)[0] for message in messages], desks))
        assert {(reply["type"], reply["op_id"]) for of_desk in replies for reply in of_desk} == {("ack", message["op_id"]) for message in messages}
        assert event_count(store) == sum(len(one["boxes"]) + 1 for message in messages for one in message["frames"])
