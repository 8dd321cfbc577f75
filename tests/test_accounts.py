"""Credentials: what is there, what works, what fails and why; never a secret in a text, never a call that changes anything."""
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deerml.app import accounts
from deerml.app.accounts import (
    GITHUB_FILE,
    GITHUB_VARIABLES,
    WITHOUT,
    check_github,
    credentials,
    github_credential,
    ntfy_credential,
)
from deerml.app.cli import app
from deerml.core.durable import write_file
from deerml.core.errors import DeermlError
from deerml.core.notify import notify
from deerml.core.settings import Home, Settings
from deerml.data.drive_account import ACCOUNT_FILE, Account, write_account

TOKEN = "github_pat_SECRET"
NOBODY = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def no_tokens(monkeypatch):
    for name in GITHUB_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def service():
    "Answers as it is told, and remembers what it was asked"
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            server.asked.append((self.command, self.path, self.headers.get("Authorization")))
            status, headers, body = server.answer
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *_):
            "Quiet"

    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.answer, server.place = [], (200, {}, b"{}"), f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def home_of(path: Path, **settings) -> Home:
    home = Home.create(path / "yard")
    return Home(home.path, Settings(**home.settings.model_dump() | settings))


def row(home: Home, name: str):
    return next(one for one in credentials(home) if one.name == name)


def test_without_any_account_every_row_says_what_for_and_how(tmp_path):
    home = home_of(tmp_path)
    found = credentials(home)
    assert [one.name for one in found] == ["remote", "Google Drive", "GitHub", "ntfy", "server"]
    assert {one.checked.state for one in found} == {"absent"} and all(one.purpose and one.steps and one.place for one in found)
    google = " ".join(row(home, "Google Drive").steps)
    assert "In production" in google and "7 days" in google and "deerml drive login" in google
    ran = CliRunner().invoke(app, ["doctor", "--accounts", "--home", str(home.path)])
    assert ran.exit_code == 0 and WITHOUT in ran.stdout and "bundle carried by hand" in ran.stdout
    assert len(json.loads(CliRunner().invoke(app, ["doctor", "--accounts", "--json", "--home", str(home.path)]).stdout)["credentials"]) == 5


@pytest.mark.parametrize(("answer", "state", "words"), [
    ((200, {"GitHub-Authentication-Token-Expiration": "2027-01-31 00:00:00 UTC"}, b'{"login": "ann"}'), "ok", "ends on 2027-01-31"),
    ((200, {"X-OAuth-Scopes": "repo, workflow"}, b'{"login": "ann"}'), "bad", "classic token for repo, workflow"),
    ((401, {}, b'{"message": "Bad credentials"}'), "bad", "ended or was revoked"),
    ((403, {}, b""), "bad", "403"), ((502, {}, b""), "unknown", "502"),
    ((200, {}, b"<html>log in to the hotel</html>"), "unknown", "not GitHub"), ((200, {}, b"[]"), "unknown", "not GitHub"),
])
def test_a_github_token_is_shown_to_github_alone(service, answer, state, words):
    service.answer = answer
    found = check_github(TOKEN, service.place)
    assert found.state == state and words in found.text and TOKEN not in f"{found}"
    assert service.asked == [("GET", "/user", f"Bearer {TOKEN}")]


def test_without_a_network_nothing_is_said_of_the_key(tmp_path, monkeypatch):
    monkeypatch.setattr(accounts, "GITHUB_API", NOBODY)
    monkeypatch.setattr(accounts.check_github, "__defaults__", (NOBODY,))
    monkeypatch.setenv("GH_TOKEN", TOKEN)
    home = home_of(tmp_path, ntfy=f"{NOBODY}/deer", remote=str(tmp_path / "gone"))
    found = {one.name: one.checked for one in credentials(home)}
    assert {name: found[name].state for name in ("GitHub", "ntfy", "remote")} == {"GitHub": "unknown", "ntfy": "unknown", "remote": "unknown"}
    assert "cannot be reached" in found["GitHub"].text and found["GitHub"].next_step and TOKEN not in str(found)


@pytest.mark.parametrize("token", ["with\nline", "wörd", "\x00"])
def test_what_is_no_token_is_not_sent(service, token):
    assert check_github(token, service.place).state == "bad" and not service.asked


def test_a_file_that_others_read_is_bad(tmp_path):
    home = home_of(tmp_path)
    (home.path / "accounts").mkdir()
    write_file(home.path / GITHUB_FILE, TOKEN.encode(), mode=0o644)
    write_file(home.path / "token", b"x" * 32, mode=0o644)
    write_account(home.path / ACCOUNT_FILE, Account("user", {"refresh_token": "SECRET"}, ()))
    (home.path / ACCOUNT_FILE).chmod(0o640)
    found = {one.name: one for one in credentials(home)}
    for name, mode in (("GitHub", "0644"), ("server", "0644"), ("Google Drive", "0640")):
        assert found[name].checked.state == "bad" and found[name].mode == mode and "chmod 600" in found[name].checked.next_step
    ran = CliRunner().invoke(app, ["doctor", "--accounts", "--home", str(home.path)])
    assert ran.exit_code == 1 and "SECRET" not in ran.output


def test_a_token_in_a_file_or_a_variable(tmp_path, service, monkeypatch):
    monkeypatch.setattr(accounts.check_github, "__defaults__", (service.place,))
    service.answer = (200, {}, b'{"login": "ann"}')
    home = home_of(tmp_path)
    (home.path / "accounts").mkdir(mode=0o700)
    write_file(home.path / GITHUB_FILE, b"of the file\n", mode=0o600)
    found = github_credential(home)
    assert (found.checked.state, found.mode, found.place) == ("ok", "0600", str(home.path / GITHUB_FILE))
    monkeypatch.setenv("GITHUB_TOKEN", "of the variable")
    assert github_credential(home).place == "the variable GITHUB_TOKEN"
    assert [key for _, _, key in service.asked] == ["Bearer of the file", "Bearer of the variable"]


def test_a_topic_is_looked_at_and_nothing_is_sent_to_it(tmp_path, service):
    home = home_of(tmp_path, ntfy=f"{service.place}/deer")
    assert ntfy_credential(home).checked.state == "ok" and [(verb, path.partition("?")[0]) for verb, path, _ in service.asked] == [("GET", "/deer/json")]
    service.answer = (403, {}, b"")
    assert ntfy_credential(home).checked.state == "bad"


def test_a_folder_as_remote_works_without_a_key(tmp_path):
    (tmp_path / "drive").mkdir()
    found = row(home_of(tmp_path, remote=str(tmp_path / "drive")), "remote")
    assert found.checked.state == "ok" and found.place == "a folder needs no key"
    assert row(home_of(tmp_path / "other", remote="ftp://x"), "remote").checked.state == "bad"


def test_a_message_is_sent_or_it_is_told_why_not(service):
    notify(f"{service.place}/deer", "yard", "Judged: promote. Füchse")
    assert service.asked == [("POST", "/deer", None)]
    service.answer = (429, {}, b"")
    for topic in (f"{service.place}/deer", f"{NOBODY}/deer", "file:///etc/passwd"):
        with pytest.raises(DeermlError, match="could not be sent") as refused:
            notify(topic, "yard", "x")
        assert refused.value.code == "NOT_TOLD"


@pytest.mark.parametrize("topic", ["ntfy.sh/deer", "ftp://ntfy.sh/deer", "https://ntfy.sh/", "https://ntfy.sh/a/b", "https://ntfy.sh/a?x"])
def test_a_topic_that_is_none_is_refused_in_the_settings(tmp_path, topic):
    with pytest.raises(DeermlError) as refused:
        Home.create(tmp_path / "yard", ntfy=topic)
    assert refused.value.code == "BAD_SETTINGS" and not (tmp_path / "yard").exists()
