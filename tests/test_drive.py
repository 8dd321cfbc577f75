"""A remote on Google Drive: the real PyDrive2 on a server on loopback that answers as Drive does."""
import json
import os
import re
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import HTTPRedirectHandler, build_opener

import pytest

for needed in ("pydrive2", "stamina", "google_auth_oauthlib"):
    pytest.importorskip(needed, reason="Google Drive is not installed: pip install 'deerml[drive]'")

import stamina  # noqa: E402
from google.auth import _exponential_backoff  # noqa: E402

from deerml.core.errors import DeermlError  # noqa: E402
from deerml.core.settings import Home  # noqa: E402
from deerml.data import drive_api  # noqa: E402
from deerml.data.drive import DriveRemote  # noqa: E402
from deerml.data.drive_account import ACCOUNT_FILE, Account, read_account, write_account  # noqa: E402
from deerml.data.drive_api import GoogleDrive, lend, open_drive, remote_of  # noqa: E402
from deerml.data.drive_login import Client, Login, drive_status, log_in, log_in_service  # noqa: E402
from deerml.data.remote import MAX_POINTER_BYTES, FolderRemote  # noqa: E402
from drive_server import ALL, NO_QUOTA, OWN, ROOT, SEE, DriveServer  # noqa: E402

PIECE = 256 * 1024  # the smallest piece that Drive takes
BIG = bytes(range(256)) * 2600  # three pieces
TESTS = Path(__file__).resolve().parent


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    "Repeats as often as in earnest, without the pauses"
    monkeypatch.setenv("OAUTHLIB_INSECURE_TRANSPORT", "1")  # loopback has no certificate
    monkeypatch.setattr(_exponential_backoff.ExponentialBackoff, "_calculate_jitter", lambda self: 0.0)
    with stamina.set_testing(True, attempts=drive_api.ATTEMPTS, cap=True):
        yield


@pytest.fixture
def server():
    with DriveServer() as started:
        yield started


def account(server, client="server", scopes=(OWN, SEE), folder="") -> Account:
    info = {"refresh_token": server.login(client, scopes), "client_id": client, "client_secret": "hush", "token_uri": f"{server.address}/token"}
    return Account("user", info, tuple(scopes), folder or top(server), email=server.email, api=server.address)


def top(server) -> str:
    "deerml's folder on the Drive, as the login makes it"
    found = [file.id for file in server.files.values() if file.title == "deerml" and file.made_by == "server"]
    return found[0] if found else server.add("deerml", ROOT, "server", folder=True).id


def remote_at(server, sessions=None, on_progress=None, **who) -> DriveRemote:
    known = account(server, **who)
    return DriveRemote(GoogleDrive(known, sessions, PIECE), known.folder, known.place, on_progress)


def logged_in(server, home: Path, **who) -> Path:
    "A home with a login"
    Home.create(home)
    write_account(home / ACCOUNT_FILE, account(server, **who))
    return home


def code_of(call) -> str:
    with pytest.raises(DeermlError) as caught:
        call()
    return caught.value.code


# -- what every remote promises -----------------------------------------------------------------------------------


@pytest.fixture(params=["folder", "drive"])
def any_remote(request, tmp_path, server):
    if request.param == "drive":
        return remote_at(server)
    (tmp_path / "shared").mkdir()
    return FolderRemote(tmp_path / "shared")


def test_files_stay_and_pointers_move(any_remote, tmp_path):
    assert any_remote.list("") == [] and any_remote.list("nowhere/") == []
    any_remote.put("packs/ab.tar", BIG)
    any_remote.put("packs/ab.tar", BIG)
    (tmp_path / "source").write_bytes(b"from a file")
    any_remote.put("runs/monday/log.txt", tmp_path / "source")
    any_remote.put("packs/empty.tar", b"")
    for pointer in (b"ab", b"cd", b"cd"):
        any_remote.replace("packs/newest.json", pointer)
    assert {entry.name: entry.size for entry in any_remote.list("")} == {"packs/ab.tar": len(BIG), "packs/empty.tar": 0, "packs/newest.json": 2, "runs/monday/log.txt": 11}
    assert [entry.name for entry in any_remote.list("packs/")] == ["packs/ab.tar", "packs/empty.tar", "packs/newest.json"]
    assert [entry.name for entry in any_remote.list("packs/ne")] == ["packs/newest.json"]
    assert [entry.name for entry in any_remote.list("ru")] == ["runs/monday/log.txt"]
    assert any_remote.get("packs/newest.json") == b"cd" and any_remote.get("packs/empty.tar") == b"" and any_remote.get("packs/ab.tar") == BIG
    any_remote.get_to("runs/monday/log.txt", tmp_path / "copy")
    any_remote.get_to("packs/empty.tar", tmp_path / "nothing")
    assert (tmp_path / "copy").read_bytes() == b"from a file" and (tmp_path / "nothing").read_bytes() == b""
    assert any_remote.place


def test_what_may_not_happen(any_remote, tmp_path):
    any_remote.put("packs/ab.tar", b"photographs")
    assert code_of(lambda: any_remote.put("packs/ab.tar", b"others")) == "EXISTS"
    assert code_of(lambda: any_remote.get("packs/cd.tar")) == "NOT_THERE"
    assert code_of(lambda: any_remote.get("nowhere/cd.tar")) == "NOT_THERE"
    assert code_of(lambda: any_remote.get_to("packs/cd.tar", tmp_path / "copy")) == "NOT_THERE"
    assert code_of(lambda: any_remote.replace("newest.json", bytes(MAX_POINTER_BYTES + 1))) == "TOO_LARGE"
    for name in ("../up", "/etc/passwd", ".hidden", "a//b", "it's"):
        for call in (lambda: any_remote.get(name), lambda: any_remote.put(name, b""), lambda: any_remote.replace(name, b"")):  # noqa: B023
            assert code_of(call) == "BAD_NAME"
    assert any_remote.get("packs/ab.tar") == b"photographs" and not (tmp_path / "copy").exists()


# -- what it costs ------------------------------------------------------------------------------------------------


def test_a_second_push_moves_nothing(server):
    push(remote_at(server))
    first, moved = len(server.calls), server.moved["in"]
    assert moved == len(BIG) + len(b"small") + len(b"v2")
    assert first == 17, server.calls  # folders are looked up once
    push(remote_at(server))
    assert server.moved["in"] == moved
    assert len(server.calls) - first == 6  # a key, two folders, three names


def test_progress_is_told_in_bytes(server, tmp_path):
    told = []
    remote = remote_at(server, on_progress=lambda *step: told.append(step))
    remote.put("packs/ab.tar", BIG)
    remote.get_to("packs/ab.tar", tmp_path / "copy")
    one_way = [("packs/ab.tar", done, len(BIG)) for done in (PIECE, 2 * PIECE, len(BIG))]
    assert told == one_way * 2


def test_long_lists_come_in_pages(server):
    server.page = 3
    remote = remote_at(server)
    for number in range(7):
        remote.put(f"packs/{number}.tar", b"")
    for number in range(60):  # more folders than one question can name
        server.mounted_write(f"deerml/runs/{number}/result.json", b"{}")
    assert len(remote.list("packs/")) == 7 and len(remote.list("runs/")) == 60


# -- who sees what ------------------------------------------------------------------------------------------------


def test_a_result_written_through_the_mounted_drive_reaches_the_server(server, tmp_path):
    "A wide login sees it, a narrow one is blind to it and says so, and neither may change it"
    wide, narrow = remote_at(server), remote_at(server, scopes=(OWN,))
    wide.put("packs/ab.tar", b"photographs")
    server.mounted_write("deerml/runs/monday/result.json", b'{"ok": true}')
    server.mounted_write("deerml/packs/by-hand.tar", b"checkpoint")
    assert [entry.name for entry in narrow.list("")] == ["packs/ab.tar"] and code_of(lambda: narrow.get("runs/monday/result.json")) == "NOT_THERE"
    assert [entry.name for entry in wide.list("")] == ["packs/ab.tar", "packs/by-hand.tar", "runs/monday/result.json"]
    assert wide.get("runs/monday/result.json") == b'{"ok": true}'
    [result] = [file for file in server.files.values() if file.title == "result.json"]
    assert code_of(lambda: wide.drive.trash(result.id)) == "NOT_MINE" and not result.trashed
    said = {scopes: drive_status(logged_in(server, tmp_path / str(len(scopes)), scopes=scopes)).problems for scopes in ((OWN,), (OWN, SEE))}
    assert any("invisible" in problem for problem in said[OWN,]) and not any("invisible" in problem for problem in said[OWN, SEE])


def test_the_server_writes_beside_a_persons_run(server):
    "Into a folder of the same title, because it may not write into the other program's; readers see one folder"
    remote = remote_at(server)
    server.mounted_write("deerml/runs/monday/result.json", b"{}")
    remote.put("runs/monday/verdict.json", b"promote")
    assert [entry.name for entry in remote_at(server).list("runs/monday/")] == ["runs/monday/result.json", "runs/monday/verdict.json"]
    assert server.tree() == {"deerml/runs/monday/result.json": b"{}", "deerml/runs/monday/verdict.json": b"promote"}
    assert remote.twice == {}


def test_a_pointer_that_two_programs_wrote(server):
    "The one changed last counts, for every reader; it is reported, and the server's own is the one it replaces"
    remote = remote_at(server)
    remote.replace("runs/newest.json", b"server")
    own = next(file for file in server.files.values() if file.title == "newest.json")
    server.add("newest.json", own.parents[0], "mounted", data=b"by hand")
    assert remote.get("runs/newest.json") == b"by hand" and remote.twice == {"runs/newest.json": 2}
    remote.replace("runs/newest.json", b"server again")
    assert own.data == b"server again" and remote_at(server).get("runs/newest.json") == b"server again"
    assert len([file for file in server.files.values() if file.title == "newest.json"]) == 2


def test_a_name_twice_is_the_same_for_everyone(server, tmp_path):
    home = logged_in(server, tmp_path / "home")
    open_drive(home).put("packs/ab.tar", b"first")
    folder = next(file for file in server.files.values() if file.title == "packs").id
    server.add("ab.tar", folder, "server", data=b"second")
    server.add("AB.tar", folder, "server", data=b"another name")
    server.add("packs", top(server), "server", folder=True)
    for remote in (open_drive(home), open_drive(home)):
        assert remote.get("packs/ab.tar") == b"second"
        assert [(entry.name, entry.size) for entry in remote.list("packs/")] == [("packs/AB.tar", 12), ("packs/ab.tar", 6)]
        assert code_of(lambda: remote.put("packs/ab.tar", b"first")) == "EXISTS"  # noqa: B023
    assert [problem for problem in drive_status(home).problems if "packs/ab.tar is there 2 times" in problem]


def test_what_is_no_file_of_deerml_is_passed_over(server):
    server.add("a note (1).txt", top(server), "mounted", data=b"hello")
    server.mounted_write("deerml/holiday pictures/1.jpg", b"private")
    server.mounted_write("deerml/old.json", b"{}").trashed = True
    assert remote_at(server).list("") == []


# -- every call, one by one ---------------------------------------------------------------------------------------

TREE = {"deerml/packs/ab.tar": BIG, "deerml/packs/cd.tar": b"small", "deerml/versions/newest.json": b"v2"}


def push(remote) -> None:
    remote.put("packs/ab.tar", BIG)
    remote.put("packs/cd.tar", b"small")
    remote.replace("versions/newest.json", b"v2")


def with_pointer(server) -> None:
    "A Drive that has been pushed to before"
    folder = server.add("versions", top(server), "server", folder=True)
    server.add("newest.json", folder.id, "server", data=b"v1")


def whole_to_a_reader(server) -> bool:
    "Every file that another program sees is absent, or is the old or the new one"
    old_or_new = {name: {data} for name, data in TREE.items()}
    old_or_new["deerml/versions/newest.json"].add(b"v1")
    return all(data in old_or_new[name] for name, data in server.tree().items())


def until_clean(kind, times, attempt):
    "`attempt(server)` on a new Drive each time, with the fault at every call, until one is not reached"
    for number in range(100):
        with DriveServer() as server:
            with_pointer(server)
            server.fault(number, kind, times)
            attempt(server)
            if len(server.faults) == times:
                return number
    raise AssertionError("no pass without a fault")


KINDS = ("lost", "503", "500", "429", "rate", "html", "drop", "torn", "401")


def kinds(*first: str, of=KINDS) -> list:
    "The first ones always, the others in the slow tier"
    return [pytest.param(kind, marks=() if kind in first else pytest.mark.slow) for kind in of]


@pytest.mark.parametrize("kind", kinds("lost"))
def test_one_fault_at_any_call_is_nobodys_business(kind):
    def attempt(server):
        push(remote_at(server))
        assert server.tree() == TREE and len({server.path_of(file) for file in server.files.values()}) == len(server.files)

    assert until_clean(kind, 1, attempt) > 12


@pytest.mark.parametrize("kind", kinds("503"))
def test_one_fault_while_fetching_is_nobodys_business(kind, tmp_path):
    def attempt(server):
        folder = server.add("packs", top(server), "server", folder=True)
        server.add("ab.tar", folder.id, "server", data=BIG)
        remote = remote_at(server)
        remote.get_to("packs/ab.tar", tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == BIG == remote.get("packs/ab.tar") and len(remote.list("")) == 2

    assert until_clean(kind, 1, attempt) > 8


LASTING = {kind: {"NO_REMOTE"} for kind in ("drop", "lost", "torn", "503", "429", "rate", "daily", "html")} | {"full": {"DRIVE_FULL", "NO_REMOTE"}, "401": {"DRIVE_LOGIN", "NO_REMOTE"}}


@pytest.mark.parametrize("kind", kinds("drop", "full", of=LASTING))
def test_a_fault_that_lasts_leaves_nothing_torn_and_the_repeat_succeeds(kind, tmp_path):
    (tmp_path / "local").write_bytes(BIG)
    seen = set()

    def attempt(server):
        sessions = tmp_path / f"sessions-{len(server.calls)}"
        try:
            push(remote_at(server, sessions))
        except DeermlError as error:
            seen.add(error.code)
        assert whole_to_a_reader(server)
        before, server.faults = dict(server.faults), {}
        push(remote_at(server, sessions))
        assert server.tree() == TREE
        server.faults = before if len(before) == 40 else {}

    assert until_clean(kind, 40, attempt) > 12
    assert seen and seen <= LASTING[kind]
    assert (tmp_path / "local").read_bytes() == BIG


def test_quota_is_never_repeated(server):
    remote = remote_at(server)
    server.fault(1, "full", 50)  # the call after the key
    assert code_of(lambda: remote.list("")) == "DRIVE_FULL"
    assert len(server.calls) == 2


def test_patience_ends(server):
    remote = remote_at(server)
    remote.list("")
    server.fault(0, "503", 50)
    before = len(server.calls)
    with pytest.raises(DeermlError) as caught:
        remote.list("")
    assert (caught.value.code, caught.value.exit_code) == ("NO_REMOTE", 75) and len(server.calls) - before == drive_api.ATTEMPTS


# -- what arrives is what was sent --------------------------------------------------------------------------------


def test_a_download_that_is_cut_short_or_changed(server, tmp_path):
    remote = remote_at(server)
    remote.put("packs/ab.tar", BIG)
    remote.list("")
    server.bend = "out"
    assert code_of(lambda: remote.get("packs/ab.tar")) == "NOT_WHOLE"
    assert code_of(lambda: remote.get_to("packs/ab.tar", tmp_path / "copy")) == "NOT_WHOLE"
    server.bend = ""
    server.fault(2, "torn", 50)
    assert code_of(lambda: remote.get_to("packs/ab.tar", tmp_path / "copy")) == "NO_REMOTE"
    server.faults.clear()
    assert list(tmp_path.iterdir()) == [] and remote.get("packs/ab.tar") == BIG


def test_an_upload_that_arrives_changed_is_taken_back(server):
    remote = remote_at(server)
    server.bend = "in"
    assert code_of(lambda: remote.put("packs/ab.tar", BIG)) == "NOT_WHOLE"
    assert server.tree() == {}
    server.bend = ""
    remote.put("packs/ab.tar", BIG)
    assert server.tree() == {"deerml/packs/ab.tar": BIG}


def test_a_full_disk_while_fetching_is_told_as_that(server, tmp_path, monkeypatch):
    remote = remote_at(server)
    remote.put("packs/ab.tar", BIG)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("deerml.data.drive.os.fsync", full)
    assert code_of(lambda: remote.get_to("packs/ab.tar", tmp_path / "copy")) == "NO_SPACE" and list(tmp_path.iterdir()) == []


# -- a death in the middle ----------------------------------------------------------------------------------------

PUSH_AND_DIE = """
import sys
from pathlib import Path
from deerml.data.drive import DriveRemote
from deerml.data.drive_account import ACCOUNT_FILE, read_account
from deerml.data.drive_api import GoogleDrive
home = Path(sys.argv[1])
account = read_account(home / ACCOUNT_FILE)
DriveRemote(GoogleDrive(account, home / "accounts/uploads", 256 * 1024), account.folder).put("packs/ab.tar", Path(sys.argv[2]))
"""


@pytest.mark.parametrize("forgotten", [False, True], ids=["remembered", "forgotten by Google"])
def test_killed_in_the_middle_of_an_upload(server, tmp_path, forgotten):
    home = logged_in(server, tmp_path / "home")
    (tmp_path / "pack").write_bytes(BIG)
    server.stall_at = 2 * PIECE  # two of three pieces have arrived, and the answer is awaited
    with subprocess.Popen([sys.executable, "-c", PUSH_AND_DIE, home, tmp_path / "pack"], cwd=TESTS.parent) as process:
        assert server.stalled.wait(60)
        process.send_signal(signal.SIGKILL)
    server.go_on.set()
    server.stall_at = None
    assert server.tree() == {} and code_of(lambda: open_drive(home).get("packs/ab.tar")) == "NOT_THERE"
    [kept] = (home / "accounts/uploads").glob("*.json")
    assert kept.stat().st_mode & 0o777 == 0o600 and drive_status(home).unfinished == 1
    if forgotten:
        server.uploads.clear()
    before = server.moved["in"]
    known = read_account(home / ACCOUNT_FILE)
    DriveRemote(GoogleDrive(known, home / "accounts/uploads", PIECE), known.folder).put("packs/ab.tar", tmp_path / "pack")
    assert server.tree() == {"deerml/packs/ab.tar": BIG} and not kept.exists()
    assert server.moved["in"] - before == (len(BIG) if forgotten else len(BIG) - 2 * PIECE)


@pytest.mark.parametrize("damage", ["{", '{"uri": "x"}', '{"uri": "http://127.0.0.1:9/", "begun_at": "2020-01-01T00:00:00+00:00"}'])
def test_an_old_or_damaged_memory_of_an_upload_is_not_used(server, tmp_path, damage):
    remote = remote_at(server, tmp_path)
    server.fault(7, "full")  # after the first piece
    assert code_of(lambda: remote.put("packs/ab.tar", BIG)) == "DRIVE_FULL"
    [kept] = tmp_path.glob("*.json")
    kept.write_text(damage)
    remote_at(server, tmp_path).put("packs/ab.tar", BIG)
    assert server.tree() == {"deerml/packs/ab.tar": BIG} and not kept.exists()


def test_another_content_for_the_same_name_begins_anew(server, tmp_path):
    remote = remote_at(server, tmp_path)
    server.fault(7, "full")
    assert code_of(lambda: remote.put("packs/ab.tar", BIG)) == "DRIVE_FULL"
    remote_at(server, tmp_path).put("packs/ab.tar", BIG[::-1])
    assert server.tree() == {"deerml/packs/ab.tar": BIG[::-1]}


# -- a login that ends, a Drive that is full ----------------------------------------------------------------------


def test_a_revoked_login_is_one_clear_error(server):
    remote = remote_at(server)
    push(remote)
    server.revoke()
    for call in (lambda: remote.list(""), lambda: remote.get("packs/ab.tar"), lambda: remote.put("packs/ef.tar", b""), lambda: remote.replace("newest.json", b""), lambda: remote_at_revoked(server)):
        with pytest.raises(DeermlError) as caught:
            call()
        assert caught.value.code == "DRIVE_LOGIN" and "deerml drive login" in caught.value.next_step


def remote_at_revoked(server):
    known = account(server)
    server.revoke()
    remote_of(known).list("")


def test_an_hour_that_ends_is_not_noticed(server):
    remote = remote_at(server)
    remote.put("packs/ab.tar", b"")
    server.access.clear()
    remote.put("packs/cd.tar", BIG)
    assert len(server.tree()) == 2 and server.calls.count("POST /token") == 2


def test_a_full_drive(server):
    server.total = 100
    with pytest.raises(DeermlError) as caught:
        remote_at(server).put("packs/ab.tar", BIG)
    assert caught.value.code == "DRIVE_FULL" and "bin" in caught.value.next_step and server.tree() == {}


def test_a_computer_without_network(server):
    known = replace(account(server), api="http://127.0.0.1:9")
    offline = replace(known, info=known.info | {"token_uri": "http://127.0.0.1:9/token"})
    for broken in (known, offline):
        with pytest.raises(DeermlError) as caught:
            remote_of(broken).list("")
        assert (caught.value.code, caught.value.exit_code) == ("NO_REMOTE", 75) and "network" in caught.value.next_step


def test_what_is_not_installed_is_named(server, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydrive2.auth", None)
    with pytest.raises(DeermlError) as caught:
        remote_at(server)
    assert caught.value.code == "NO_DRIVE_EXTRA" and "deerml[drive]" in caught.value.next_step


# -- keys for others ----------------------------------------------------------------------------------------------


def test_a_lent_key_writes_what_the_server_sees_and_sees_no_more(server, tmp_path):
    known = account(server)
    server.mounted_write("private/letter.txt", b"private")
    server.mounted_write("deerml/by-hand.json", b"{}")
    lent = lend(known)
    assert known.info["refresh_token"] not in json.dumps(lent.info) and lent.ends_at
    write_account(tmp_path / "lent.json", lent)
    away = read_account(tmp_path / "lent.json")
    there = remote_of(away)
    there.put("runs/monday/result.json", b"{}")
    assert [entry.name for entry in there.list("")] == ["runs/monday/result.json"]
    assert remote_at(server, scopes=(OWN,)).get("runs/monday/result.json") == b"{}"
    server.access.clear()
    assert code_of(lambda: there.list("")) == "DRIVE_LOGIN"
    server.revoke()
    assert code_of(lambda: lend(known)) == "DRIVE_LOGIN"


# -- service accounts ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def service_key():
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()).decode()


def service_client(server, service_key) -> Client:
    info = {"type": "service_account", "client_email": "robot@project.iam.gserviceaccount.com", "private_key": service_key, "token_uri": f"{server.address}/token"}
    return Client(info, True, server.address)


def test_a_service_account_on_a_personal_drive_is_told_so(server, service_key, tmp_path):
    Home.create(tmp_path / "home")
    client = service_client(server, service_key)
    for folder in ("", top(server)):
        with pytest.raises(DeermlError) as caught:
            log_in_service(tmp_path / "home", client, folder)
        assert caught.value.code == "SERVICE_ACCOUNT" and "yourself" in caught.value.next_step
    assert code_of(lambda: log_in_service(tmp_path / "home", replace(client, info=client.info | {"private_key": "torn"}), top(server))) == "BAD_CLIENT"
    assert not (tmp_path / "home" / ACCOUNT_FILE).exists()
    known = Account("service", client.info, (ALL,), top(server), api=server.address)
    with pytest.raises(DeermlError) as caught:  # a folder that became personal afterwards
        DriveRemote(GoogleDrive(known), known.folder).put("packs/ab.tar", b"x")
    assert caught.value.code == "SERVICE_ACCOUNT" and NO_QUOTA.startswith("Service Accounts")


def test_a_service_account_on_a_shared_drive_works(server, service_key, tmp_path):
    Home.create(tmp_path / "home")
    folder = server.add("deer park", ROOT, "an admin", folder=True)
    folder.drive = "0Ashared"
    known = log_in_service(tmp_path / "home", service_client(server, service_key), folder.id)
    assert known.title == "deer park" and (tmp_path / "home" / ACCOUNT_FILE).stat().st_mode & 0o777 == 0o600
    remote = open_drive(tmp_path / "home")
    push(remote)
    remote.replace("versions/newest.json", b"v3")
    assert server.tree()["deer park/versions/newest.json"] == b"v3" and drive_status(tmp_path / "home").free is None


# -- logging in ---------------------------------------------------------------------------------------------------


class Stay(HTTPRedirectHandler):
    def redirect_request(self, *_):
        return None


def agree(url: str) -> str:
    "The owner opens the address and agrees; where the browser is sent"
    with pytest.raises(HTTPError) as moved:
        build_opener(Stay).open(url)
    return moved.value.headers["Location"]


def client_file(server, path: Path) -> Path:
    values = {"client_id": "server", "client_secret": "hush", "auth_uri": f"{server.address}/auth", "token_uri": f"{server.address}/token", "drive_api": server.address}
    path.write_text(json.dumps({"installed": values}))
    return path


def run_login(server, home: Path, answer, *options: str) -> tuple[int, str]:
    "`deerml drive login` in a process of its own; `answer(url, typed)` is what the owner does"
    command = [sys.executable, "-c", "from deerml.app.cli import main; main()", "drive", "login", "--json", "--home", str(home), "--client", str(client_file(server, home / "client.json")), *options]
    with subprocess.Popen(command, cwd=TESTS.parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        said = []
        for line in process.stderr:
            said.append(line)
            if "ssh -L" in line:
                break
        url = re.search(r"^http\S+$", "".join(said), re.M)
        assert url, said
        answer(url[0], process.stdin)
        if process.stdin.closed:
            process.stdin = None
        out, err = process.communicate(timeout=60)
    return process.returncode, out + "".join(said) + err


def paste(url, typed):
    typed.write(agree(url) + "\n")
    typed.close()


def browse(url, typed):
    build_opener().open(agree(url)).read()


@pytest.mark.parametrize("answer", [paste, browse])
def test_a_login_at_a_computer_without_a_screen(server, tmp_path, answer):
    home = tmp_path / "home"
    Home.create(home)
    server.key_days = 7
    code, said = run_login(server, home, answer)
    assert code == 0, said
    told = json.loads(said.splitlines()[0])
    assert told["email"] == server.email and told["sees_all"] and told["ends_at"]
    path = home / ACCOUNT_FILE
    assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o777 == 0o700
    [key] = server.refresh
    assert key not in said and "hush" not in said
    open_drive(home).put("packs/ab.tar", b"photographs")
    assert server.tree() == {"deerml/packs/ab.tar": b"photographs"}
    assert any("Testing" in problem for problem in drive_status(home).problems)


def test_nobody_at_the_terminal(server, tmp_path):
    Home.create(tmp_path / "home")
    code, said = run_login(server, tmp_path / "home", lambda url, typed: typed.close())
    assert code == 1 and "NO_ANSWER" in said and not (tmp_path / "home" / ACCOUNT_FILE).exists()


def a_login(server, tmp_path, narrow=False) -> Login:
    return Login(Client.read(client_file(server, tmp_path / "client.json")), 1, narrow)


def test_a_second_login_finds_the_folder_and_not_a_namesake(server, tmp_path):
    Home.create(tmp_path / "home")
    server.mounted_write("deerml/by-hand.txt", b"made by a person")
    ids = set()
    for narrow in (False, True, False):
        login = a_login(server, tmp_path, narrow)
        known = log_in(tmp_path / "home", login, agree(login.url))
        assert known.sees_all is not narrow
        ids.add(known.folder)
    assert len(ids) == 1 and server.files[ids.pop()].made_by == "server"
    assert any("more than one folder" in problem for problem in drive_status(tmp_path / "home").problems)


def test_a_box_that_was_not_ticked(server, tmp_path):
    server.unticked = (SEE,)
    login = a_login(server, tmp_path)
    with pytest.raises(DeermlError) as caught:
        login.finish(agree(login.url))
    assert caught.value.code == "LOGIN_DENIED" and "readonly" in caught.value.why


def test_a_failed_login_leaves_the_old_one(server, tmp_path):
    home = logged_in(server, tmp_path / "home")
    before = (home / ACCOUNT_FILE).read_bytes()
    login = a_login(server, tmp_path)
    where = agree(login.url)
    assert code_of(lambda: log_in(home, login, where.replace("state=", "state=x"))) == "BAD_ANSWER"
    assert code_of(lambda: log_in(home, login, "http://127.0.0.1:1/?error=access_denied")) == "LOGIN_DENIED"
    log_in_again = a_login(server, tmp_path)
    assert code_of(lambda: log_in(home, log_in_again, re.sub(r"state=[^&]+", f"state={log_in_again.state}", where))) == "DRIVE_LOGIN"  # a code of another attempt
    for number in range(3):  # the key, the owner, the folder
        login = a_login(server, tmp_path)
        where = agree(login.url)
        server.fault(number, "503", 50)
        assert code_of(lambda: log_in(home, login, where)) == "NO_REMOTE"  # noqa: B023
        server.faults.clear()
    assert (home / ACCOUNT_FILE).read_bytes() == before


def test_a_folder_that_was_thrown_away_is_noticed(server, tmp_path):
    home = logged_in(server, tmp_path / "home")
    server.files[top(server)].trashed = True
    assert any("in the bin" in problem for problem in drive_status(home).problems)
    assert code_of(lambda: push(open_drive(home))) == "IN_THE_BIN"  # Drive itself would have said nothing
    del server.files[top(server)]
    assert code_of(lambda: drive_status(home)) == "NO_REMOTE"


def test_status_at_the_prompt(server, tmp_path):
    home = logged_in(server, tmp_path / "home")
    push(open_drive(home))
    ran = subprocess.run([sys.executable, "-c", "from deerml.app.cli import main; main()", "drive", "status", "--json", "--home", home], cwd=TESTS.parent, capture_output=True, text=True)
    told = json.loads(ran.stdout)
    assert ran.returncode == 0 and (told["files"], told["size"], told["sees_all"]) == (3, len(BIG) + 7, True) and told["free"] == server.total - told["size"]
    os.chmod(home / ACCOUNT_FILE, 0o644)
    assert code_of(lambda: drive_status(home)) == "OPEN_SECRET"


def test_two_processes_use_one_login_at_the_same_time(server, tmp_path):
    home = logged_in(server, tmp_path / "home")
    open_drive(home).put("packs/first.tar", b"")
    threads = [threading.Thread(target=lambda number=number: open_drive(home).put(f"packs/{number}.tar", BIG)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(entry.name for entry in open_drive(home).list("")) == ["packs/0.tar", "packs/1.tar", "packs/2.tar", "packs/3.tar", "packs/first.tar"]
