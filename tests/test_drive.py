"""A remote on Google Drive: the real PyDrive2 on a server on loopback that answers as Drive does."""
import pytest

pytest.importorskip("pydrive2", reason="Google Drive is not installed: pip install 'deerml[drive]'")
pytest.importorskip("stamina", reason="Google Drive is not installed: pip install 'deerml[drive]'")

from pathlib import Path  # noqa: E402

import stamina  # noqa: E402
from drive_server import ALL, OWN, ROOT, SEE, DriveServer  # noqa: E402

from deerml.core.errors import DeermlError  # noqa: E402
from deerml.data import drive_api  # noqa: E402
from deerml.data.drive import DriveRemote  # noqa: E402
from deerml.data.drive_account import ACCOUNT_FILE, Account, write_account  # noqa: E402
from deerml.data.drive_api import GoogleDrive, lend, open_drive  # noqa: E402
from deerml.data.remote import FolderRemote  # noqa: E402

PIECE = 256 * 1024  # the smallest piece that Drive takes


@pytest.fixture(autouse=True)
def no_waiting():
    "Repeats as often as in earnest, without the pauses"
    with stamina.set_testing(True, attempts=drive_api.ATTEMPTS, cap=True):
        yield


@pytest.fixture
def server():
    with DriveServer() as started:
        yield started


def account(server, client="server", scopes=(OWN, SEE), folder="", **info) -> Account:
    info = {"refresh_token": server.login(client, scopes), "client_id": client, "client_secret": "s", "token_uri": f"{server.address}/token", **info}
    return Account("user", info, tuple(scopes), folder, api=server.address)


def top(server, client="server") -> str:
    "deerml's folder on the Drive, as the login makes it"
    found = [file.id for file in server.files.values() if file.title == "deerml" and file.made_by == client]
    return found[0] if found else server.add("deerml", ROOT, client, folder=True).id


def remote_at(server, sessions=None, client="server", scopes=(OWN, SEE), chunk=PIECE, on_progress=None) -> DriveRemote:
    return DriveRemote(GoogleDrive(account(server, client, scopes), sessions, chunk), top(server), on_progress=on_progress)


def code_of(call) -> str:
    with pytest.raises(DeermlError) as caught:
        call()
    return caught.value.code


def test_smoke(server, tmp_path):
    remote = remote_at(server)
    remote.put("review/ab.tar", b"x" * 700_000)
    remote.replace("review/newest.json", b"ab")
    remote.replace("review/newest.json", b"cd")
    assert remote.get("review/ab.tar") == b"x" * 700_000
    print(server.calls, server.tree().keys(), remote.list(""))
