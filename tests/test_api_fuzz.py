"""Requests made from the API's own description: no answer is a failure of ours, and each is as described."""
import json

import pytest
import schemathesis
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from deerml.app.server import make_app
from deerml.core.settings import Home
from test_api import DEER, picture

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_headers_conformance, response_schema_conformance]


@pytest.fixture
def app(tmp_path):
    "A home with a few sightings, for requests from this computer"
    app = make_app(Home.create(tmp_path / "yard", max_upload_mb=1))
    client = TestClient(app, base_url="http://localhost", client=("127.0.0.1", 5))
    for seed in range(5):
        said = {"camera": "gate", "taken_at": f"2026-10-31T22:0{seed}:00Z", "detections": [DEER]}
        assert client.post("/api/detections", files={"file": picture(seed)}, data={"metadata": json.dumps(said)}).status_code == 201

    async def from_here(scope, receive, send):
        if scope["type"] == "http":
            headers = [(name, value) for name, value in scope["headers"] if name != b"host"]
            scope = scope | {"client": ("127.0.0.1", 5), "headers": [*headers, (b"host", b"localhost")]}
        await app(scope, receive, send)

    yield from_here
    client.close()
    app.state.store.close()


def ask_everything(app, examples: int) -> dict[str, list[int]]:
    "Every operation with that many requests; the statuses that were answered"
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    return {(operation := found.ok()).label: ask_one(operation, examples) for found in schema.get_all_operations()}


def ask_one(operation, examples: int) -> list[int]:
    statuses = []

    @settings(max_examples=examples, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy())
    def ask(case):
        statuses.append(case.call_and_validate(checks=CHECKS).status_code)

    ask()
    return statuses


@pytest.mark.parametrize("examples", [12, pytest.param(500, marks=pytest.mark.slow)])
def test_no_request_from_the_description_is_too_much(app, examples):
    statuses = ask_everything(app, examples)
    assert len(statuses) == 7 and all(len(seen) >= 1 for seen in statuses.values())
    assert not [status for seen in statuses.values() for status in seen if status in (401, 403) or status >= 500]


NUMBER = st.floats() | st.integers() | st.floats(0, 160) | st.none() | st.just("1")
TEXT = st.text(max_size=6) | st.sampled_from(["deer", "gate", "x" * 300])
BOX = st.fixed_dictionaries({}, optional=dict.fromkeys(("x", "y", "width", "height", "z"), NUMBER)) | st.just(DEER["box"])
DETECTION = st.fixed_dictionaries({"label": st.just("deer") | TEXT, "score": st.floats(0, 1) | NUMBER, "box": BOX}) | st.just(DEER)
WORDS = st.fixed_dictionaries({}, optional={
    "camera": TEXT, "taken_at": st.datetimes(timezones=st.none() | st.timezones()).map(str) | TEXT, "trigger": st.sampled_from(["motion", "scheduled"]) | TEXT,
    "sequence": TEXT, "model": TEXT, "fired": st.booleans(), "detections": st.lists(DETECTION, max_size=3)})
BOX_SAID = st.fixed_dictionaries({}, optional={"detection_id": st.integers(), "word": st.sampled_from(["correct", "adjusted", "missed", "false_positive"]), "label": TEXT, "box": BOX})
REVIEW = st.fixed_dictionaries({"verdict": st.sampled_from(["correct", "false_positive", "missed", "missed_deer", "unsure"]) | TEXT}, optional={
    "boxes": st.lists(BOX_SAID, max_size=3), "nothing_here": st.booleans(), "all_boxed": st.booleans(), "confidence": NUMBER, "reviewer": TEXT, "revision": st.integers(), "operation_id": TEXT})


@pytest.mark.parametrize("examples", [40, pytest.param(3000, marks=pytest.mark.slow)])
def test_real_images_and_made_up_words(app, examples):
    "The form needs a real image, which no description gives"
    client = TestClient(app, base_url="http://localhost", raise_server_exceptions=False)
    seen = []

    @settings(max_examples=examples, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(words=WORDS, said=REVIEW, number=st.integers(1, 20))
    def ask(words, said, number):
        sighting = client.post("/api/detections", files={"file": picture(1)}, data={"metadata": json.dumps(words)})
        review = client.post(f"/api/detections/{number}/review", content=json.dumps(said), headers={"Content-Type": "application/json"})
        for answer in (sighting, review):
            seen.append(answer.status_code)
            assert answer.status_code < 500 and ("frame" in answer.json() or answer.json()["error"]["what"]), (answer.text, words, said)

    ask()
    assert {200, 201, 422} <= set(seen)
