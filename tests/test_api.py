"""The HTTP API: every status, repetition, pages, and requests that mean no good."""
import asyncio
import json
import sqlite3
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import cv2
import numpy as np
import pytest
import sqlalchemy as sa
from fastapi import Depends, FastAPI, Header, HTTPException
from fastapi.testclient import TestClient

from deerml.app import intake, sightings
from deerml.app.api import api_router
from deerml.app.server import make_app
from deerml.app.sightings import Asked, Reviewed, from_cursor, page_of, to_cursor
from deerml.capture import schema
from deerml.capture.store import Store, frames, image_path
from deerml.core.settings import Home

DEER = {"label": "deer", "score": 0.9, "box": {"x": 20, "y": 30, "width": 60, "height": 40}}


def picture(seed: int, size=(90, 160), kind=".jpg") -> bytes:
    return cv2.imencode(kind, np.random.default_rng(seed).integers(0, 255, (*size, 3), np.uint8))[1].tobytes()


def client_of(app) -> TestClient:
    return TestClient(app, base_url="http://localhost", client=("127.0.0.1", 5), raise_server_exceptions=False)


@pytest.fixture
def home(tmp_path) -> Home:
    return Home.create(tmp_path / "yard", zone="America/Chicago", classes=["deer", "fox"], max_upload_mb=1)


@pytest.fixture
def client(home):
    with client_of(make_app(home, reviewer="ann")) as client:
        yield client


def post(client, seed=1, key=None, data=None, kind=".jpg", **metadata):
    said = {"camera": "gate", "taken_at": "2026-10-31T22:00:00", "detections": [DEER], "model": "house-4", **metadata}
    headers = {"Idempotency-Key": key} if key else {}
    content = picture(seed, kind=kind) if data is None else data
    return client.post("/api/detections", files={"file": ("a.jpg", content)}, data={"metadata": json.dumps(said)}, headers=headers)


def review(client, detection, **said):
    return client.post(f"/api/detections/{detection}/review", json=said)


def refused(answer, status, code):
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, code), answer.text
    assert set(error) == {"code", "what", "why", "next_step"} and error["what"]


def counts(client) -> list[int]:
    tables = (schema.image, schema.frame, schema.sighting, schema.inference, schema.detection, schema.review_event)
    with client.app.state.store.read() as connection:
        return [connection.scalar(sa.select(sa.func.count()).select_from(table)) for table in tables]


# -- sightings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [".jpg", ".png", ".webp"])
def test_stored_means_on_the_disk(client, home, kind):
    answer = post(client, kind=kind)
    got = answer.json()
    assert answer.status_code == 201 and got["stored"] is True
    [frame] = frames(client.app.state.store)
    assert image_path(home.images, frame.image, frame.media_type).read_bytes() == picture(1, kind=kind)
    assert got["frame"]["taken_at"] == "2026-11-01T03:00:00Z" and got["frame"]["night"] == "2026-10-31"  # the camera's local time
    assert got["bundle"] == "house-4" and got["fired"] and got["detections"][0]["box"] == DEER["box"]
    with sqlite3.connect(home.path / "deerml.db") as other:
        assert other.execute("select count(*) from detection").fetchone() == (1,)


def test_a_repetition_is_the_same_sighting(client):
    first, before = post(client, key="e1"), counts(client)
    again = post(client, key="e1")
    assert (first.status_code, again.status_code) == (201, 200) and first.json() == again.json() and counts(client) == before
    refused(post(client, seed=2, key="e1"), 409, "KEY_REUSED")
    refused(post(client, key="e1", trigger="scheduled"), 409, "KEY_REUSED")
    assert counts(client) == before
    assert len(list(client.app.state.store.home.images.rglob("*.jpg"))) == 1


def test_without_a_key_the_content_is_the_key(client):
    assert [post(client).status_code for _ in range(2)] == [201, 200]
    refused(post(client, detections=[]), 409, "ALREADY_SEEN")
    assert post(client, detections=[], model="house-5").status_code == 201
    assert counts(client)[:4] == [1, 1, 2, 2]


def test_a_sighting_that_says_little(client):
    answer = client.post("/api/detections", files={"file": picture(3)}, data={"metadata": "{}"}).json()
    assert answer["frame"]["camera"] == "import:api" and answer["bundle"] == "external" and not answer["fired"]
    arrived = client.post("/api/detections", files={"file": picture(4)}, data={"metadata": '{"camera": "gate"}'}).json()
    assert abs((datetime.fromisoformat(arrived["frame"]["taken_at"]) - datetime.now(UTC)).total_seconds()) < 60


@pytest.mark.parametrize("said", [
    {"detections": [{**DEER, "label": "wolf"}]}, {"detections": [{**DEER, "score": 1.5}]}, {"detections": [{**DEER, "score": float("nan")}]},
    {"detections": [{**DEER, "box": {**DEER["box"], "x": 150}}]}, {"detections": [{**DEER, "box": {**DEER["box"], "width": 0}}]},
    {"detections": [{**DEER, "box": {**DEER["box"], "height": float("inf")}}]}, {"detections": [{**DEER, "box": {"x": 0.1, "y": 0.1, "width": 0.5, "height": 0.5}}]},
    {"detections": [DEER] * 301}, {"camera": ""}, {"camera": "a\u0000b"}, {"camera": "import:x"}, {"camera": "x" * 201}, {"camera": "\ud800"}, {"\ud800": 1},
    {"taken_at": "yesterday"}, {"taken_at": "0001-01-01T00:00:00+14:00"}, {"taken_at": "9999-12-31T23:59:59-14:00"}, {"trigger": "bored"}, {"deer": True}, {"model": "../../etc"*30},
])
def test_words_that_cannot_be(client, said):
    before = counts(client)
    answer = post(client, **said)
    assert answer.status_code == 422 and answer.json()["error"]["what"] and counts(client) == before


@pytest.mark.parametrize("metadata", ["", "[]", "null", "{", "[" * 50_000, '{"detections": 1e999}', "\x00", '"{}"'])
def test_metadata_that_is_none(client, metadata):
    answer = client.post("/api/detections", files={"file": picture(1)}, data={"metadata": metadata})
    assert answer.status_code == 422 and answer.json()["error"]["code"] == "BAD_REQUEST"


@pytest.mark.parametrize(("data", "status"), [
    (b"", 415), (b"%PDF-1.7", 415), (b"GIF89a" + bytes(100), 415), (b"<svg/>", 415), (b"\xff\xd8\xff", 422), (picture(1)[:2000], 422), (picture(1, kind=".png")[:-30], 422),
])
def test_files_that_are_no_image(client, home, data, status):
    answer = post(client, data=data)
    refused(answer, status, {415: "NOT_AN_IMAGE", 422: "BAD_IMAGE"}[status])
    assert counts(client) == [0] * 6 and not [path for path in home.images.rglob("*") if path.is_file()]


@pytest.mark.parametrize("content_type", ["multipart/form-data", "multipart/form-data; boundary=", "text/plain", "application/json", "multipart/form-data; boundary=a; charset=utf-99"])
def test_bodies_that_are_no_form(client, content_type):
    answer = client.post("/api/detections", content=b"--a\r\nnonsense", headers={"Content-Type": content_type})
    assert answer.status_code in (400, 422) and answer.json()["error"]["code"] == "BAD_REQUEST"


# -- too large ------------------------------------------------------------------------------------------------------

START = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.jpg"\r\n\r\n'


def streamed(app, headers: list[tuple[bytes, bytes]], pieces: int, size: int, path="/api/detections", first=START) -> tuple[int, dict, int]:
    "Sends a body piece by piece: (status, answer, pieces that the server took)"
    taken, out = 0, []
    piece = bytes(size)

    async def receive():
        nonlocal taken
        taken += 1
        body = first if taken == 1 else piece
        return {"type": "http.request", "body": body, "more_body": taken < pieces}

    async def send(message):
        out.append(message)

    scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
             "scheme": "http", "headers": [(b"host", b"localhost"), *headers], "client": ("127.0.0.1", 5), "server": ("127.0.0.1", 80)}
    asyncio.run(app(scope, receive, send))
    return out[0]["status"], json.loads(b"".join(message.get("body", b"") for message in out[1:])), taken


FORM = (b"content-type", b"multipart/form-data; boundary=b")


@pytest.mark.parametrize("length", [None, b"100", b"2000000000", b"9" * 400, b"many"])
def test_two_gigabytes_are_not_read(client, length):
    headers = [FORM] + ([(b"content-length", length)] if length else [])
    tracemalloc.start()
    status, answer, taken = streamed(client.app, headers, pieces=2000, size=1_000_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert status == 413 and answer["error"]["code"] == "TOO_LARGE" and taken <= 4 and peak < 20e6


def test_json_is_bounded_too(client):
    status, answer, taken = streamed(client.app, [(b"content-type", b"application/json")], 2000, 100_000, "/api/detections/1/review", b"{")
    assert status == 413 and taken <= 12
    assert client.post("/api/detections/1/review", content=b" " * 1_000_001).status_code == 413


def test_an_image_above_the_limit(client):
    refused(post(client, data=picture(1) + bytes(1_000_001)), 413, "TOO_LARGE")
    assert post(client, data=picture(1) + bytes(500_000)).status_code == 201


# -- reviews --------------------------------------------------------------------------------------------------------


def test_what_is_complete_is_complete_for_all_classes(client):
    "A frame on which all is boxed, and all of that is deer, has no fox"
    seen = post(client).json()
    answer = review(client, seen["id"], verdict="correct", revision=0).json()
    assert answer["frame"]["state"] == "boxes_complete" and answer["training_set"]["with_animal"] == 1
    fox = [{"box": {"x": 100, "y": 10, "width": 30, "height": 30}, "label": "fox"}]
    assert review(client, seen["id"], verdict="missed", boxes=fox, all_boxed=True).json()["frame"]["state"] == "boxes_complete"
    assert [len(one["boxes"]) for one in client.get("/api/frames/1").json()["truth"]] == [1, 1]


@pytest.fixture
def deer_client(tmp_path):
    with client_of(make_app(Home.create(tmp_path / "deer"), reviewer="ann")) as client:
        yield client


def test_the_words_mean_what_the_keys_mean(deer_client):
    client = deer_client
    ids = [post(client, seed=seed, taken_at=f"2026-10-31T22:{seed:02}:00").json()["id"] for seed in range(1, 8)]
    empty = post(client, seed=9, detections=[]).json()["id"]
    drawn = [{"box": {"x": 100, "y": 10, "width": 30, "height": 30}}]

    def state(number, **said):
        return review(client, number, **said).json()["frame"]["state"]

    assert state(ids[0], verdict="correct") == "boxes_complete"
    assert state(ids[1], verdict="false_positive") == "in_progress"
    assert state(ids[1], verdict="false_positive", nothing_here=True) == "verified_empty"
    assert state(ids[2], verdict="missed", boxes=drawn) == "in_progress"
    assert state(ids[3], verdict="missed_deer", boxes=drawn, all_boxed=True) == "boxes_complete"
    assert state(ids[4], verdict="unsure") == "in_progress"
    assert state(empty, verdict="false_positive", nothing_here=True) == "verified_empty"
    adjusted = [{"detection_id": client.get(f"/api/frames/{ids[5]}").json()["seen"][0]["detections"][0]["id"], "box": {"x": 22, "y": 31, "width": 55, "height": 41}}]
    assert state(ids[5], verdict="correct", boxes=adjusted) == "boxes_complete"
    assert client.get(f"/api/frames/{ids[5]}").json()["truth"][0]["boxes"] == [adjusted[0]["box"]]
    assert len(client.get(f"/api/frames/{ids[3]}").json()["truth"][0]["boxes"]) == 2  # the shown one counts as right
    assert state(ids[2], verdict="false_positive", nothing_here=True) == "verified_empty"  # takes back the drawn box of the same hand
    training = review(client, ids[6], verdict="correct", confidence=0.8).json()["training_set"]
    assert training == {"complete": 7, "with_animal": 4, "empty": 3, "waiting_for_next_version": 7}
    assert client.get(f"/api/frames/{ids[6]}").json()["verdicts"][0]["source"].endswith("confidence=0.8")


def test_a_drawn_box_sent_again_is_the_same_animal(deer_client):
    post(deer_client, detections=[])
    drawn = {"verdict": "missed_deer", "boxes": [{"box": {"x": 100, "y": 10, "width": 30, "height": 30}}]}
    review(deer_client, 1, **drawn)
    assert review(deer_client, 1, **drawn, all_boxed=True).json()["frame"]["state"] == "boxes_complete"
    assert len(deer_client.get("/api/frames/1").json()["truth"][0]["boxes"]) == 1


@pytest.mark.parametrize(("said", "code"), [
    ({"verdict": "wrong"}, "BAD_REQUEST"), ({"verdict": "missed_"}, "BAD_REQUEST"), ({}, "BAD_REQUEST"), ({"verdict": "correct", "confidence": 2}, "BAD_REQUEST"),
    ({"verdict": "correct", "revision": -1}, "BAD_REQUEST"), ({"verdict": "correct", "revision": 2**70}, "BAD_REQUEST"), ({"verdict": "correct", "reviewer": "import:x"}, "BAD_REQUEST"),
    ({"verdict": "correct", "nothing_here": True}, "BAD_REVIEW"), ({"verdict": "false_positive", "nothing_here": True, "all_boxed": True}, "BAD_REVIEW"),
    ({"verdict": "missed"}, "BAD_REVIEW"), ({"verdict": "unsure", "all_boxed": True}, "BAD_REVIEW"), ({"verdict": "correct", "boxes": [{"box": DEER["box"]}]}, "BAD_REVIEW"),
    ({"verdict": "correct", "boxes": [{"detection_id": 99}]}, "BAD_REVIEW"), ({"verdict": "correct", "boxes": [{"detection_id": 1}] * 2}, "BAD_REVIEW"),
    ({"verdict": "correct", "boxes": [{"detection_id": 1, "word": "adjusted"}]}, "BAD_REVIEW"), ({"verdict": "correct", "boxes": [{"detection_id": 1, "label": "fox"}]}, "BAD_REVIEW"),
    ({"verdict": "missed_wolf", "boxes": [{"box": DEER["box"]}]}, "UNKNOWN_CLASS"), ({"verdict": "missed", "boxes": [{"box": DEER["box"], "label": "wolf"}]}, "UNKNOWN_CLASS"),
    ({"verdict": "missed", "boxes": [{"box": {**DEER["box"], "x": 155}}]}, "BAD_BOX"), ({"verdict": "missed", "boxes": [{"box": {**DEER["box"], "width": 0}}]}, "BAD_BOX"),
    ({"verdict": "false_positive", "all_boxed": True}, "NOT_COMPLETE_STATEMENT"), ({"verdict": "correct", "boxes": [{"detection_id": 1, "word": "false_positive"}]}, "NOT_COMPLETE_STATEMENT"),
])
def test_reviews_that_cannot_be(deer_client, said, code):
    post(deer_client)
    refused(review(deer_client, 1, **said), 422, code)
    assert counts(deer_client)[-1] == 0


def test_nothing_to_confirm(deer_client):
    post(deer_client, detections=[{**DEER, "score": 0.1}])  # below what a person is shown
    for verdict in ("correct", "false_positive"):
        refused(review(deer_client, 1, verdict=verdict), 422, "NOTHING_SHOWN")


def test_unknown_detections_and_frames(client):
    refused(review(client, 1, verdict="correct"), 404, "NO_DETECTION")
    for path in ("/api/frames/1", "/api/frames/1/image"):
        refused(client.get(path), 404, "NO_FRAME")
    for number in ("0", "-1", "x", str(2**70), "1.5", "%00"):
        assert review(client, number, verdict="correct").status_code == 422 == client.get(f"/api/frames/{number}").status_code
    refused(client.get("/api/nothing"), 404, "NOT_FOUND")
    refused(client.delete("/api/detections"), 405, "HTTP_405")


def test_a_stale_review_is_shown_what_happened(deer_client):
    post(deer_client)
    first = review(deer_client, 1, verdict="correct", revision=0, reviewer="ben").json()["frame"]
    answer = review(deer_client, 1, verdict="false_positive", nothing_here=True, revision=0)
    refused(answer, 409, "STALE")
    assert answer.json()["frame"] == first and first["revision"] > 0
    assert review(deer_client, 1, verdict="false_positive", nothing_here=True, revision=first["revision"]).json()["frame"]["state"] == "disputed"


def test_a_repeated_operation_is_acknowledged_and_not_stored_again(deer_client):
    post(deer_client)
    once, again = (review(deer_client, 1, verdict="correct", revision=0, operation_id="press-1").json() for _ in range(2))
    assert once["recorded"] == 2 and again["recorded"] == 0 and once["frame"] == again["frame"] and counts(deer_client)[-1] == 2
    refused(review(deer_client, 1, verdict="unsure", operation_id="press-1"), 409, "OPERATION_REUSED")


def test_of_many_reviews_at_once_one_wins(deer_client):
    post(deer_client)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda number: review(deer_client, 1, verdict="correct", revision=0, reviewer=f"r{number}").status_code, range(8)))
    assert sorted(answers) == [200] + [409] * 7 and counts(deer_client)[-1] == 2


def test_the_same_sighting_many_times_at_once(client):
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: post(client, key="e1"), range(8)))
    assert sorted(answer.status_code for answer in answers) == [200] * 7 + [201]
    assert len({answer.json()["id"] for answer in answers}) == 1 and counts(client)[:5] == [1, 1, 1, 1, 1]


def test_the_training_set_counts_as_the_fold_does(deer_client):
    store = deer_client.app.state.store
    for seed in range(1, 5):
        post(deer_client, seed=seed)
    reviewed = Reviewed(["deer"])
    for number, said in [(1, {"verdict": "correct"}), (2, {"verdict": "false_positive", "nothing_here": True}), (1, {"verdict": "false_positive", "nothing_here": True}), (3, {"verdict": "unsure"})]:
        review(deer_client, number, **said)
        with store.read() as connection:
            step, fresh = dict(reviewed.update(connection)), dict(Reviewed(["deer"]).update(connection))
        assert step == fresh


# -- reading --------------------------------------------------------------------------------------------------------


def test_pages_stay_while_others_come(client):
    for seed in range(1, 8):
        post(client, seed=seed)
    seen, cursor = [], None
    while True:
        page = client.get("/api/detections", params={"limit": 2} | ({"cursor": cursor} if cursor else {})).json()
        seen += [item["id"] for item in page["items"]]
        post(client, seed=100 + len(seen))
        if (cursor := page["next"]) is None:
            break
    assert seen == [7, 6, 5, 4, 3, 2, 1]


def test_filters(deer_client):
    client = deer_client
    for seed, camera, score in [(1, "gate", 0.9), (2, "gate", 0.3), (3, "lawn", 0.6), (4, "lawn", 0.1)]:
        post(client, seed=seed, camera=camera, taken_at=f"2026-10-3{1 if seed < 4 else 0}T22:0{seed}:00Z", detections=[{**DEER, "score": score}], fired=score > 0.5)
    review(client, 1, verdict="correct")

    def ids(**params):
        return [item["id"] for item in client.get("/api/detections", params=params).json()["items"]]

    assert ids(camera="gate") == [2, 1] and ids(night="2026-10-30") == [4] and ids(fired=True) == [3, 1] and ids(min_score=0.5) == [3, 1]
    assert ids(since="2026-10-31T22:02:00Z") == [3, 2] and ids(until="2026-10-31T22:02:00") == [4, 1] and ids(label="deer", min_score=0.7) == [1]
    assert ids(state="boxes_complete") == [1] and ids(state="unreviewed") == [4, 3, 2] and ids(bundle="house-4", camera="nowhere") == [] and ids(label="fox") == []


@pytest.mark.parametrize("params", [{"limit": 0}, {"limit": 201}, {"limit": "x"}, {"cursor": "x"}, {"cursor": "YmVmb3JlOjA="}, {"cursor": "é"}, {"night": "soon"}, {"since": "never"}, {"state": "done"}, {"min_score": "nan"}, {"camra": "gate"}])
def test_questions_that_cannot_be(client, params):
    assert client.get("/api/detections", params=params).status_code == 422


def test_a_filter_that_finds_little_still_ends(deer_client, monkeypatch):
    monkeypatch.setattr(sightings, "PIECE", 2)
    monkeypatch.setattr(sightings, "PIECES", 2)
    for seed in range(1, 10):
        post(deer_client, seed=seed)
    review(deer_client, 9, verdict="correct")
    found, cursor, pages = [], None, 0
    while pages == 0 or cursor:
        page = page_of(deer_client.app.state.store, Reviewed(["deer"]), Asked(state="unreviewed", limit=50, cursor=cursor))
        found, cursor, pages = found + [item.id for item in page.items], page.next, pages + 1
    assert found == [8, 7, 6, 5, 4, 3, 2, 1] and pages == 3
    assert from_cursor(to_cursor(7)) == 7


def test_images(client, home):
    frame = post(client).json()["frame_id"]
    answer = client.get(f"/api/frames/{frame}/image")
    assert answer.content == picture(1) and answer.headers["content-type"] == "image/jpeg" and "immutable" in answer.headers["cache-control"]
    assert client.get(f"/api/frames/{frame}/image", headers={"If-None-Match": answer.headers["etag"]}).status_code == 304
    small = client.get(f"/api/frames/{frame}/image?max=80")
    assert cv2.imdecode(np.frombuffer(small.content, np.uint8), 1).shape == (45, 80, 3) and small.headers["etag"] != answer.headers["etag"]
    assert client.get(f"/api/frames/{frame}/image?max=1600").content == picture(1)
    assert client.get(f"/api/frames/{frame}/image?max=1").status_code == 422
    with client.app.state.store.write() as connection:
        connection.execute(schema.image.update().values(expired_at="2026-12-01T00:00:00.000Z"))
    refused(client.get(f"/api/frames/{frame}/image"), 410, "IMAGE_GONE")


def test_a_missing_and_a_broken_file(client, home):
    frame = post(client).json()["frame_id"]
    [path] = home.images.rglob("*.jpg")
    path.chmod(0o644)
    path.write_bytes(picture(1)[:500])
    refused(client.get(f"/api/frames/{frame}/image?max=80"), 422, "BAD_IMAGE")
    path.unlink()
    refused(client.get(f"/api/frames/{frame}/image"), 410, "IMAGE_GONE")


# -- when the house is in trouble -----------------------------------------------------------------------------------


def test_a_locked_database_says_when_to_come_again(client, home):
    post(client)
    engine = client.app.state.store.engine
    sa.event.listen(engine, "checkout", lambda connection, _record, _proxy: connection.execute("pragma busy_timeout=50"))
    other = sqlite3.connect(home.path / "deerml.db", isolation_level=None)
    other.execute("begin exclusive")
    try:
        for answer in (post(client, seed=2), review(client, 1, verdict="correct"), client.get("/api/detections")):
            refused(answer, 503, "BUSY")
            assert int(answer.headers["retry-after"]) > 0
    finally:
        other.execute("rollback")
        other.close()
    assert post(client, seed=2).status_code == 201


def test_a_full_disk(client, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "x")

    monkeypatch.setattr(intake, "write_images", full)
    refused(post(client), 507, "NO_SPACE")
    assert counts(client) == [0] * 6


def test_what_nobody_foresaw_tells_no_secret(client, monkeypatch):
    monkeypatch.setattr(intake, "write_images", lambda *_: 1 / 0)
    answer = post(client)
    refused(answer, 500, "BUG")
    assert "division" not in answer.text


# -- in another application -----------------------------------------------------------------------------------------


def test_mounted_behind_the_locks_of_another_application(home):
    def lock(key: str = Header("")) -> None:
        if key != "secret":
            raise HTTPException(401, "Who are you?", {"WWW-Authenticate": "Key"})

    house, other = FastAPI(), FastAPI()
    with Store.open(home) as store:
        house.include_router(api_router(lambda: store, dependencies=[Depends(lock)]), prefix="/deer")
        other.include_router(api_router(lambda: store, prefix="/v1"))

        @house.get("/mine")
        def mine() -> str:
            raise HTTPException(418, "mine")

        client = client_of(house)
        answer = client.get("/deer/api/detections")
        refused(answer, 401, "HTTP_401")
        assert answer.headers["www-authenticate"] == "Key" and client.get("/mine").json() == {"detail": "mine"}
        client.headers["key"] = "secret"
        sent = client.post("/deer/api/detections", files={"file": picture(1)}, data={"metadata": '{"camera": "gate"}'})
        assert sent.status_code == 201
        refused(client.post("/deer/api/detections/5/review", json={"verdict": "unsure"}), 404, "NO_DETECTION")
        assert client_of(other).get("/v1/detections").json()["items"][0]["id"] == sent.json()["id"]
        assert set(house.openapi()["paths"]) >= {"/deer/api/detections", "/deer/api/detections/{detection_id}/review", "/deer/api/frames/{frame_id}/image"}


def test_threads_do_not_stand_in_each_others_way(deer_client):
    "Readers and writers together: no answer is lost and none is a failure"
    post(deer_client)
    stop, failures = threading.Event(), []

    def read():
        while not stop.is_set():
            if (status := deer_client.get("/api/detections").status_code) != 200:
                failures.append(status)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    written = [post(deer_client, seed=seed).status_code for seed in range(2, 12)]
    stop.set()
    for reader in readers:
        reader.join()
    assert written == [201] * 10 and not failures
