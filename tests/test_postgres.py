"""The heart of deerml on a real PostgreSQL server: what SQLite does in every other test, PostgreSQL must do here."""
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from deerml.capture import schema
from deerml.capture.backup import verify
from deerml.capture.store import NewFrame, Store, add_frames, frames
from deerml.capture.truth import BoxVerdict, FrameStatement, Undo, complete_truths, record, truths
from deerml.core.errors import DeermlError
from deerml.core.settings import Home
from deerml.data.version import freeze
from deerml.judge.cases import add_case, list_cases
from deerml.judge.collect import Origin, evidence_of
from deerml.judge.ledger import freeze_test, log_use, models_judged
from deerml.judge.replay import make_replay
from deerml.judge.replayed import result_of
from deerml.review.queue import close_night, drawn_windows
from yards import AFTER, SPOT, START, picture, replay_yard, say_what_is_there, spot_bundle, yard

ACCOUNT = "postgres"  # the server refuses to run as root, so then it runs as this user, who comes with the package


def find(program: str) -> str | None:
    "Where distributions put it, the newest version first; else on the PATH"
    packaged = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{program}"), key=lambda path: int(path.parts[4]), reverse=True)
    return str(packaged[0]) if packaged else shutil.which(program)


def as_server() -> list[str]:
    "What goes before a command of the server. Skips where it cannot run."
    if not (find("initdb") and find("postgres")):
        pytest.skip("PostgreSQL is not installed here: apt-get install postgresql")
    if os.getuid():
        return []
    try:
        account = pwd.getpwnam(ACCOUNT)
    except KeyError:
        pytest.skip(f"PostgreSQL does not run as root, and there is no user {ACCOUNT}")
    if shutil.which("runuser"):
        return ["runuser", "-u", ACCOUNT, "--"]
    if shutil.which("setpriv"):
        return ["setpriv", f"--reuid={account.pw_uid}", f"--regid={account.pw_gid}", "--clear-groups"]
    pytest.skip("PostgreSQL does not run as root, and neither runuser nor setpriv is here")


@pytest.fixture(scope="module")
def server() -> Iterator[Path]:
    "A server of its own, reachable through a socket in the folder that is given, and by no network"
    pytest.importorskip("psycopg", reason="the extra `postgres` is not installed")
    before = as_server()
    with tempfile.TemporaryDirectory(prefix="deerml-pg-", dir="/tmp") as folder:  # a socket's path must be short
        if before:
            shutil.chown(folder, ACCOUNT)
        data = f"{folder}/data"
        made = subprocess.run([*before, find("initdb"), "-D", data, "-U", "deerml", "-A", "trust", "-E", "UTF8", "--no-locale", "--no-sync"],
                              capture_output=True, text=True, cwd="/", timeout=120)
        assert made.returncode == 0, made.stderr
        command = [*before, find("postgres"), "-D", data, "-k", folder, "-c", "listen_addresses=", "-c", "fsync=off"]
        with open(f"{folder}/log", "w") as log, subprocess.Popen(command, stdout=log, stderr=log, cwd="/") as running:
            try:
                wait_for(folder)
                yield Path(folder)
            finally:
                # Straight to the server, which the one before may wait to tell; and at once, whoever is connected.
                started = Path(data, "postmaster.pid")
                os.kill(int(started.read_text().split()[0]) if started.exists() else running.pid, signal.SIGINT)
                running.wait(60)


def wait_for(folder: str) -> None:
    engine = engine_of(folder)
    for _ in range(300):
        try:
            with engine.connect():
                return engine.dispose()
        except sa.exc.OperationalError:
            time.sleep(0.1)
    raise AssertionError(Path(folder, "log").read_text())


def url_of(folder: Path | str, database: str = "postgres") -> str:
    return f"postgresql://deerml@/{database}?host={folder}"


def engine_of(folder: Path | str) -> sa.Engine:
    return schema.open_engine(url_of(folder)).execution_options(isolation_level="AUTOCOMMIT")


@pytest.fixture
def url(server, request) -> str:
    "A database for one test"
    name = f"test_{abs(hash(request.node.name)) % 10**9}"
    engine = engine_of(server)
    with engine.connect() as connection:
        connection.exec_driver_sql(f"create database {name}")
    engine.dispose()
    return url_of(server, name)


def new_frame(number: int, animal: bool = False) -> NewFrame:
    return NewFrame(picture(number, animal), "test", str(number), camera="gate", taken_at=START, trigger="scheduled")


def test_ingest_is_idempotent(tmp_path, url):
    with Store.open(Home.create(tmp_path / "yard", database_url=url)) as store:
        first = add_frames(store, [new_frame(1), new_frame(2)])
        assert add_frames(store, [new_frame(2), new_frame(1)]) == first[::-1] and len(frames(store)) == 2
        assert store.engine.dialect.name == "postgresql"
    with Store.open(Home.open(tmp_path / "yard")) as again:  # nothing to migrate, the salt is the same
        assert [frame.id for frame in frames(again)] == first


@pytest.mark.parametrize("table", ["review_event", "frame", "sighting"])
def test_the_server_refuses_to_change_what_is_append_only(tmp_path, url, table):
    with Store.open(Home.create(tmp_path / "yard", database_url=url)) as store:
        [frame_id] = add_frames(store, [new_frame(1)])
        record(store, "ann", [FrameStatement(frame_id, "nothing_here", ("deer",))])
        for change in (f"delete from {table}", f"update {table} set id = id + 100"):
            with pytest.raises(sa.exc.DBAPIError, match="append-only"), store.write() as connection:
                connection.exec_driver_sql(change)
        assert truths(store, ["deer"])[frame_id].state(["deer"]) == "verified_empty"


def test_the_ledger_of_tests_is_kept(tmp_path, url):
    with Store.open(Home.create(tmp_path / "yard", database_url=url)) as store:
        [frame_id] = add_frames(store, [new_frame(1)])
        record(store, "ann", [FrameStatement(frame_id, "nothing_here", ("deer",))])
        nights = [frames(store)[0].night_key]
        version = freeze_test(store, evidence_of(store, nights), nights)
        assert freeze_test(store, evidence_of(store, nights), nights) == version and version.nights == set(nights)
        with store.write() as connection:
            made = connection.execute(schema.judgement.insert().values(made_at="t", challenger="a", verdict="first", result="{}"))
            log_use(connection, version, "a", None, made.inserted_primary_key[0])
        assert models_judged(store, version) == {"a"}
        for table in ("test_use", "test_version"):
            with pytest.raises(sa.exc.DBAPIError, match="append-only"), store.write() as connection:
                connection.exec_driver_sql(f"delete from {table}")


def test_truth_is_the_fold_of_what_was_said(tmp_path, url):
    with Store.open(Home.create(tmp_path / "yard", database_url=url)) as store:
        ids = add_frames(store, [new_frame(n, True) for n in range(3)])
        record(store, "ann", [BoxVerdict(ids[0], "missed", "deer", SPOT), FrameStatement(ids[0], "all_boxed", ("deer",))])
        record(store, "ann", [BoxVerdict(ids[1], "missed", "deer", SPOT)])
        said = [FrameStatement(ids[2], "nothing_here", ("deer",), operation_id="one")]
        assert record(store, "ann", said) == 1 and record(store, "ann", said) == 0, "the same operation counts once"
        assert [truths(store, ["deer"])[one].state(["deer"]) for one in ids] == ["boxes_complete", "in_progress", "verified_empty"]
        record(store, "ann", [Undo(ids[2], "one")])
        assert complete_truths(store, ["deer"]).keys() == {ids[0]}
        with pytest.raises(DeermlError, match="nothing to undo"):
            record(store, "ann", [Undo(ids[2], "never said")])


def test_a_replay_and_a_case_are_kept_and_cannot_be_changed(tmp_path, url):
    with replay_yard(tmp_path / "yard", database_url=url) as store:
        champion, challenger = spot_bundle(store, 0.8), spot_bundle(store)
        replay = make_replay(store, champion, challenger, [Origin(champion.digest), Origin(challenger.digest)], "2026-08-30..2026-09-30", AFTER)
        say_what_is_there(store)
        add_case(store, 1, "the first")
        assert replay.strata["differs"][0] == result_of(store, replay).pairs.found_by_challenger > 0 and [case.note for case in list_cases(store)] == ["the first"]
        for table in (schema.replay, schema.replay_stratum, schema.replay_window, schema.case_event):
            for change in (sa.delete(table), sa.update(table).values({table.primary_key.columns[0].name: 99})):
                with pytest.raises(sa.exc.DBAPIError, match="append-only"), store.write() as connection:
                    connection.execute(change)


def test_draw_freeze_and_verify(tmp_path, url):
    with yard(tmp_path / "yard", nights=12, database_url=url) as store:
        night = frames(store)[0].night
        close_night(store, night, None, budget=5)
        assert drawn_windows(store) and {window.night for window in drawn_windows(store)} == {night}
        frozen = freeze(store, at=AFTER)
        assert frozen.version.name == "v0001" and freeze(store, at=AFTER).version.digest == frozen.version.digest
        assert verify(store).whole


def test_on_postgresql_and_on_sqlite_the_same_truth_gives_the_same_bytes(tmp_path, url):
    with yard(tmp_path / "here", nights=6, database_url=url) as here, yard(tmp_path / "there", nights=6) as there:
        assert freeze(here, at=AFTER, force=True).version.digest == freeze(there, at=AFTER, force=True).version.digest


def test_two_writers_at_once(tmp_path, url):
    "Both bring the same frames and say the same; each frame and each word is kept once"
    home, failed = Home.create(tmp_path / "yard", database_url=url), []
    Store.open(home).close()
    together = threading.Barrier(2)

    def bring() -> None:
        try:
            with Store.open(home) as store:
                together.wait(30)
                for number in range(25):
                    [frame_id] = add_frames(store, [new_frame(number)])
                    record(store, "ann", [FrameStatement(frame_id, "nothing_here", ("deer",), operation_id=f"say-{number}")])
        except BaseException as error:
            failed.append(error)
            raise

    writers = [threading.Thread(target=bring) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
    assert not failed
    with Store.open(home) as store, store.read() as connection:
        counts = [connection.scalar(sa.select(sa.func.count()).select_from(table)) for table in (schema.frame, schema.sighting, schema.review_event)]
        assert counts == [25, 25, 25]
