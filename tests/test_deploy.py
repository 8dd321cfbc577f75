"""Deployment under faults: it is killed, refused by the disk and cut off from power at every operation that it does.

The fast tier takes every fifth point of a sweep, `--slow` takes all, with the same code. A child process does the work
and dies; this process looks at what it left, lets deerml recover, and repeats the work undisturbed.
"""
import errno
import os
import random
import shutil
import signal
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from deerml.core.errors import DeermlError
from deerml.core.settings import Home
from deerml.model.bundle import Bundle, Thresholds, seal, spot_draft, spot_model
from deerml.ship import deploy as room
from deerml.ship.deploy import Slots, adopt_current, deploy, recover, rollback, slots, state
from deerml.ship.release import latest, list_releases, publish, verify_release

OPERATIONS = ("open", "replace", "rename", "symlink", "link", "fsync", "unlink", "mkdir", "rmdir")
REAL = {name: getattr(os, name) for name in OPERATIONS}
REAL["fsync"] = lambda descriptor: None  # the machine under these tests stays on: only the moment of a sync matters
CREATING = ("open", "symlink", "link", "mkdir", "fsync")  # what a full disk refuses
EVERY = 5  # of a sweep in the fast tier
EX_TEMPFAIL = 75

# -- faults ---------------------------------------------------------------------------------------------------------


class Faults:
    "Counts the operations that change the disk, and does `fault(name)` at the n-th, before or after it"

    def __init__(self, at: int = 0, fault: Callable[[str], None] = lambda name: None, after: bool = False):
        self.at, self.fault, self.after, self.count = at, fault, after, 0

    def call(self, name: str, *args, **kwargs):
        if name == "open" and not args[1] & (os.O_WRONLY | os.O_RDWR):
            return REAL[name](*args, **kwargs)
        self.count += 1
        if self.hits and not self.after:
            self.fault(name)
        try:
            return self.do(name, *args, **kwargs)
        finally:  # also after one that failed, like making a folder that is there
            if self.hits and self.after:
                self.fault(name)

    @property
    def hits(self) -> bool:
        return self.count == self.at

    def do(self, name: str, *args, **kwargs):
        return REAL[name](*args, **kwargs)

    def __enter__(self):
        for name in OPERATIONS:
            setattr(os, name, lambda *args, _name=name, **kwargs: self.call(_name, *args, **kwargs))
        return self

    def __exit__(self, *_):
        for name, function in REAL.items():
            setattr(os, name, function)


def die(name: str) -> None:
    os._exit(9)


def failing(number: int) -> Callable[[str], None]:
    def fault(name: str) -> None:
        raise OSError(number, os.strerror(number))
    return fault


class FullDisk(Faults):
    "From the n-th operation on, nothing can be created any more"

    @property
    def hits(self) -> bool:
        return self.count >= self.at

    def call(self, name: str, *args, **kwargs):
        self.fault = failing(errno.ENOSPC) if name in CREATING else lambda name: None
        return super().call(name, *args, **kwargs)


class PowerCut(Faults):
    """What a disk may make of a cut: files keep a random part of what was not synced, and names that were given in a
    folder that was not synced may be the old ones."""

    def __init__(self, at: int, seed: int, scratch: Path, ignores: str = ""):
        super().__init__(at, self.cut)
        self.random, self.scratch = random.Random(seed), scratch
        self.ignores = ignores  # syncs of "files" or "folders"
        self.unsynced: dict[int, int] = {}  # inode -> descriptor
        self.renamed: list[tuple[str, str, str]] = []  # from, to, what was there before

    def do(self, name: str, *args, **kwargs):
        if name in ("replace", "rename"):
            return self.rename(str(args[0]), str(args[1]))
        if name == "fsync":
            return self.fsync(args[0])
        result = REAL[name](*args, **kwargs)
        if name == "open":
            self.unsynced[os.fstat(result).st_ino] = os.dup(result)
        return result

    def rename(self, source: str, target: str) -> None:
        saved = ""
        if os.path.lexists(target):
            saved = str(self.scratch / str(self.count))
            REAL["link"](target, saved, follow_symlinks=False)
        REAL["rename"](source, target)
        self.renamed.append((source, target, saved))

    def fsync(self, descriptor: int) -> None:
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        if self.ignores == ("folders" if is_folder else "files"):
            return
        self.unsynced.pop(os.fstat(descriptor).st_ino, None)
        if is_folder:
            folder = os.readlink(f"/proc/self/fd/{descriptor}")
            self.renamed = [entry for entry in self.renamed if os.path.realpath(os.path.dirname(entry[1])) != folder]

    def cut(self, name: str) -> None:
        for descriptor in self.unsynced.values():
            os.ftruncate(descriptor, self.random.randint(0, os.fstat(descriptor).st_size))
        for source, target, saved in reversed(self.renamed):
            if self.random.random() < 0.5:
                with suppress(OSError):  # a folder above it has moved since
                    REAL["rename"](target, source)
                    if saved:
                        REAL["rename"](saved, target)
        os._exit(9)


# -- a home and its releases ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def without_sync():
    real, os.fsync = os.fsync, REAL["fsync"]
    yield
    os.fsync = real


@pytest.fixture(scope="module", autouse=True)
def without_smoke():
    "The smoke test has tests of its own, and takes a second"
    real, room.smoke_test = room.smoke_test, lambda bundle: None
    yield real
    room.smoke_test = real


@dataclass(frozen=True)
class Yard:
    home: Path
    releases: dict[int, Path]
    digests: dict[int, str]

    def copy(self, where: Path) -> Home:
        shutil.copytree(self.home, where, symlinks=True)
        return Home.open(where)


def make_yard(folder: Path) -> Yard:
    "Two releases have acted, a third one watches, a fourth is published. Two bundles stay beside what the slots hold."
    home = Home.create(folder / "home", classes=["deer"], reserve_mb=0, keep_bundles=2)
    (folder / "model.onnx").write_bytes(spot_model(["deer"]))
    releases = folder / "releases"
    releases.mkdir()
    for version, verdict in enumerate(("first", "promote", "not_enough_evidence", "promote", "promote"), 1):
        thresholds = Thresholds(shared={"deer": 0.3 + version / 20})
        bundle = seal(folder / "model.onnx", spot_draft(["deer"]), thresholds, "drawn", folder / "sealed")
        publish(bundle, releases, verdict=verdict)
    paths = {release.version: release.path for release in list_releases(releases)}
    deploy(home, paths[1])
    deploy(home, paths[2], now=True)
    deploy(home, paths[3])
    return Yard(home.path, paths, {release.version: release.digest for release in list_releases(releases)})


@pytest.fixture(scope="module")
def memory() -> Iterator[Path]:
    "A folder in memory where there is such a thing: thousands of small files are renamed here"
    with TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        yield Path(folder)


@pytest.fixture
def tmp_path(memory) -> Iterator[Path]:
    with TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def yard(memory) -> Yard:
    (memory / "yard").mkdir()
    return make_yard(memory / "yard")


def unhealthy(bundle: Bundle) -> bool:
    return False


@dataclass(frozen=True)
class Scenario:
    "Something that changes slots: what may come out of it, and what must when it is repeated"

    act: Callable[[Yard, Home], object]
    outcomes: Callable[[Yard], list[Slots]]  # all that a crash may leave; the last is that of the undisturbed run
    error: str = ""  # code that the undisturbed run ends in; until then the bundle on probation may be seen to serve


def slots_of(yard: Yard, current: int, previous: int, challenger: int | None = None) -> Slots:
    digest = yard.digests.get
    return Slots(current=digest(current), previous=digest(previous), challenger=digest(challenger))


SCENARIOS = {
    "a challenger": Scenario(lambda yard, home: deploy(home, yard.releases[4]),
                             lambda yard: [slots_of(yard, 2, 1, 3), slots_of(yard, 2, 1, 4)]),
    "at once": Scenario(lambda yard, home: deploy(home, yard.releases[4], now=True),
                        lambda yard: [slots_of(yard, 2, 1, 3), slots_of(yard, 4, 2, 3)]),
    "it may act": Scenario(lambda yard, home: deploy(home, yard.releases[3], now=True, owner_decision="I saw it."),
                           lambda yard: [slots_of(yard, 2, 1, 3), slots_of(yard, 3, 2)]),
    "a failing probe": Scenario(lambda yard, home: deploy(home, yard.releases[4], now=True, probe=unhealthy),
                                lambda yard: [slots_of(yard, 2, 1, 3)], "PROBE_FAILED"),
    "a rollback": Scenario(lambda yard, home: rollback(home, to=1, reason="it barks"),
                           lambda yard: [slots_of(yard, 2, 1, 3), slots_of(yard, 1, 2, 3)]),
}


@pytest.fixture(params=SCENARIOS, scope="module")
def scenario(request) -> Scenario:
    return SCENARIOS[request.param]


# -- what must hold after every fault -------------------------------------------------------------------------------


def check_serving(home: Home, allowed: list[str]) -> None:
    "What a server would find that starts at this moment, before anybody has recovered"
    bundle = Bundle.load(home.models / "current", os.readlink(home.models / "current").split("/")[1])
    assert bundle.digest in allowed


def check_tidy(home: Home) -> None:
    "Idle, nothing half written, every bundle whole and known"
    found, present = state(home), slots(home)
    assert found.phase == "idle" and found.attempt is None
    assert {path.name for path in home.models.iterdir()} <= {"bundles", "state.json", ".lock", *Slots.model_fields}
    held = {path.name for path in home.bundles.iterdir()}
    assert held == found.held.keys() and {digest for _, digest in present if digest} <= held
    for digest in held:
        Bundle.load(home.bundles / digest, digest, ["deer"])


def check_afterwards(yard: Yard, home: Home, scenario: Scenario) -> None:
    outcomes = scenario.outcomes(yard)
    check_serving(home, [*(outcome.current for outcome in outcomes), *([yard.digests[4]] if scenario.error else [])])
    recovered = recover(home)
    assert recover(home) == recovered == state(home)
    check_tidy(home)
    assert slots(home) in outcomes and recovered.floor >= 3
    try:
        scenario.act(yard, home)
        assert not scenario.error
    except DeermlError as error:
        assert error.code == scenario.error or (error.code == "REFUSED" and scenario.error)
    check_tidy(home)
    assert slots(home) == outcomes[-1] and state(home).floor >= recovered.floor
    if scenario.error:
        assert yard.digests[4] in state(home).refused and not (home.bundles / yard.digests[4]).exists()


def in_child(work: Callable[[], object]) -> int:
    "Exit code of a process that does this: 0 done, 1 an error of ours, 28 a full disk that was named, 2 anything else"
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 2
    try:
        work()
        code = 0
    except DeermlError as error:
        code = {"NO_SPACE": 28, "BUSY": EX_TEMPFAIL}.get(error.code, 1)
    except OSError:
        code = 3
    finally:
        os._exit(code)


def operations_of(yard: Yard, scenario: Scenario, folder: Path) -> int:
    home = yard.copy(folder)
    with Faults() as counter, suppress(DeermlError):
        scenario.act(yard, home)
    shutil.rmtree(folder)
    return counter.count


def points(total: int, slow: bool) -> Iterator[int]:
    assert total > 10, "a sweep over nothing proves nothing"
    return range(1, total + 1, 1 if slow else EVERY)


@contextmanager
def trial(yard: Yard, folder: Path, told: str) -> Iterator[Home]:
    "A fresh copy of the home; a failure says at which point"
    try:
        yield yard.copy(folder)
    except Exception as error:
        raise AssertionError(f"{told}: {error!r}") from error
    finally:
        shutil.rmtree(folder)


def sweep(yard: Yard, scenario: Scenario, folder: Path, slow: bool, faults: Callable[[int], Faults], codes: set[int],
          told: str) -> None:
    for at in points(operations_of(yard, scenario, folder), slow):
        with trial(yard, folder, f"{told} {at}") as home:
            def work(home=home, at=at):
                with faults(at):
                    scenario.act(yard, home)
            assert in_child(work) in codes
            check_afterwards(yard, home, scenario)


TIERS = [False, pytest.param(True, marks=pytest.mark.slow)]


@pytest.mark.parametrize("slow", TIERS)
@pytest.mark.parametrize("after", [False, True])
def test_killed_at_any_operation(yard, scenario, after, slow, tmp_path):
    sweep(yard, scenario, tmp_path / "home", slow, lambda at: Faults(at, die, after), {9}, f"killed, {after=}")


@pytest.mark.parametrize("slow", TIERS)
def test_no_space_at_any_operation(yard, scenario, slow, tmp_path):
    expected = {28, 1} if scenario.error else {28, 0}  # some of it may fail without harm; the rest names the full disk
    sweep(yard, scenario, tmp_path / "home", slow, lambda at: Faults(at, failing(errno.ENOSPC)), expected, "ENOSPC")


@pytest.mark.parametrize("slow", TIERS)
def test_a_disk_that_stays_full(yard, scenario, slow, tmp_path):
    expected = {28, 1} if scenario.error else {28, 0}
    sweep(yard, scenario, tmp_path / "home", slow, FullDisk, expected, "full")


@pytest.mark.slow
@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.EMFILE])
def test_an_error_at_any_operation(yard, scenario, number, tmp_path):
    told = errno.errorcode[number]
    sweep(yard, scenario, tmp_path / "home", True, lambda at: Faults(at, failing(number)), {0, 1, 3}, told)


@pytest.mark.parametrize("slow", TIERS)
def test_power_cut_at_any_operation(yard, scenario, slow, tmp_path):
    (tmp_path / "scratch").mkdir()
    for seed in range(6 if slow else 1):
        def cut(at: int, seed: int = seed) -> PowerCut:
            return PowerCut(at, 1000 * seed + at, scratch(tmp_path))
        sweep(yard, scenario, tmp_path / "home", slow, cut, {9}, f"power cut, {seed=}")


def scratch(folder: Path) -> Path:
    "An empty folder for what the simulated disk remembers"
    shutil.rmtree(folder / "scratch")
    (folder / "scratch").mkdir()
    return folder / "scratch"


# -- the sweeps are able to fail ------------------------------------------------------------------------------------


def notices(yard: Yard, folder: Path, faults: Callable[[int], Faults]) -> bool:
    "Does any point of the sweep find something wrong?"
    action = SCENARIOS["at once"]
    for at in range(1, operations_of(yard, action, folder) + 1):
        with trial(yard, folder, "mutant") as home:
            def work(home=home, at=at):
                with faults(at):
                    action.act(yard, home)
            in_child(work)
            try:
                check_afterwards(yard, home, action)
            except (AssertionError, DeermlError, OSError):
                return True
    return False


@pytest.mark.parametrize("ignores", ["files", "folders"])
def test_a_missing_sync_is_noticed(yard, ignores, tmp_path):
    (tmp_path / "scratch").mkdir()
    assert notices(yard, tmp_path / "home", lambda at: PowerCut(at, at, scratch(tmp_path), ignores))


def test_a_missing_journal_is_noticed(yard, tmp_path, monkeypatch):
    def forgetful(home, found, **changes):
        if changes.get("phase", "idle") == "idle":
            return real(home, found, **changes)
        return found.model_copy(update=changes)

    real = room._save
    monkeypatch.setattr(room, "_save", forgetful)
    assert notices(yard, tmp_path / "home", lambda at: Faults(at, die))


def test_a_link_that_is_missing_for_a_moment_is_noticed(yard, tmp_path, monkeypatch):
    def in_two_steps(link, target):
        if os.path.lexists(link):
            os.unlink(link)
        os.symlink(target, link)

    monkeypatch.setattr(room, "swap_link", in_two_steps)
    assert notices(yard, tmp_path / "home", lambda at: Faults(at, die))


# -- killed, and killed again ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [25, pytest.param(1000, marks=pytest.mark.slow)])
def test_killed_again_while_it_recovers(yard, count, tmp_path):
    "Pairs of points, drawn at random: the first in the work, the second in the recovery from it"
    chance = random.Random(count)
    for _ in range(count):
        name = chance.choice(list(SCENARIOS))
        action = SCENARIOS[name]
        first, second = chance.randint(1, operations(yard, name, tmp_path)), chance.randint(1, 16)
        with trial(yard, tmp_path / "home", f"{name}, killed at {first}, then at {second}") as home:
            def work(home=home, first=first, action=action):
                with Faults(first, die):
                    action.act(yard, home)

            def repair(home=home, second=second):
                with Faults(second, die):
                    recover(home)
            assert in_child(work) == 9
            assert in_child(repair) in (0, 9)
            check_afterwards(yard, home, action)


COUNTED: dict[str, int] = {}


def operations(yard: Yard, name: str, folder: Path) -> int:
    if name not in COUNTED:
        COUNTED[name] = operations_of(yard, SCENARIOS[name], folder / "counted")
    return COUNTED[name]


# -- the same for publishing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("slow", TIERS)
@pytest.mark.parametrize("fault, after, codes", [
    pytest.param(die, False, {9}, id="killed before"),
    pytest.param(die, True, {9}, id="killed after"),
    pytest.param(failing(errno.ENOSPC), False, {28, 0}, id="ENOSPC")])
def test_publishing_leaves_nothing_or_a_whole_release(yard, fault, after, codes, slow, tmp_path):
    folder, source = tmp_path / "releases", yard.releases[1].parent
    thresholds = Thresholds(shared={"deer": 0.9})
    bundle = seal(yard.releases[1] / "model.onnx", spot_draft(["deer"]), thresholds, "drawn", tmp_path / "sealed")
    shutil.copytree(source, folder)
    with Faults() as counter:
        publish(bundle, folder, verdict="promote")
    for at in points(counter.count, slow):
        shutil.rmtree(folder)
        shutil.copytree(source, folder)

        def work(at=at):
            with Faults(at, fault, after):
                publish(bundle, folder, verdict="promote")
        assert in_child(work) in codes
        assert latest(folder).version in (5, 6)
        release = publish(bundle, folder, verdict="promote")
        assert release.version == 6 and verify_release(release.path) == release == latest(folder)
        assert {path.name for path in folder.iterdir()} == {".lock", *(f"{version:06d}" for version in range(1, 7))}


# -- several at once ------------------------------------------------------------------------------------------------


def test_the_second_deployer_is_told_to_come_back(yard, tmp_path):
    home = yard.copy(tmp_path / "home")
    codes = []

    def probe(bundle):
        codes.append(in_child(lambda: deploy(home, yard.releases[5], now=True)))
        codes.append(in_child(lambda: rollback(home)))
        codes.append(in_child(lambda: recover(home)))

    deploy(home, yard.releases[4], now=True, probe=probe)
    assert codes == [EX_TEMPFAIL] * 3 and slots(home) == slots_of(yard, 4, 2, 3)


@pytest.mark.parametrize("rounds", [3, pytest.param(100, marks=pytest.mark.slow)])
def test_many_deployers_at_once(yard, rounds, tmp_path):
    for _ in range(rounds):
        with trial(yard, tmp_path / "home", "race") as home:
            read, write = os.pipe()
            children = []
            for _ in range(4):
                if not (child := os.fork()):
                    os.close(write)
                    os.read(read, 1)  # all start when this process closes its end
                    os._exit(in_child(lambda home=home: deploy(home, yard.releases[4], now=True)))
                children.append(child)
            os.close(read)
            os.close(write)
            codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
            assert 0 in codes and set(codes) <= {0, EX_TEMPFAIL}
            check_tidy(home)
            assert slots(home) == slots_of(yard, 4, 2, 3)
            assert [event.version for event in state(home).history].count(4) == 1


def test_the_lock_of_a_killed_deployer_is_free(yard, tmp_path):
    home = yard.copy(tmp_path / "home")
    def probe(bundle):
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(lambda: deploy(home, yard.releases[4], now=True, probe=probe)) == -signal.SIGKILL
    assert recover(home).phase == "idle" and slots(home) == slots_of(yard, 2, 1, 3)


# -- order and memory -----------------------------------------------------------------------------------------------


def test_the_floor_never_falls(yard, tmp_path):
    "Releases in any order, rollbacks between them: the highest version that was taken stays the highest"
    chance = random.Random(0)
    home, floor = yard.copy(tmp_path / "home"), 3
    for _ in range(40):
        with suppress(DeermlError):
            if chance.random() < 0.3:
                rollback(home, to=chance.choice([None, 1, 2, 4]))
            else:
                deploy(home, yard.releases[chance.randint(1, 5)], now=chance.random() < 0.5)
        assert state(home).floor >= floor
        floor = state(home).floor
        check_tidy(home)
    assert floor == 5


def test_a_digest_that_failed_stays_refused(yard, tmp_path):
    home = yard.copy(tmp_path / "home")
    for code in ("PROBE_FAILED", "REFUSED", "REFUSED"):
        with pytest.raises(DeermlError) as caught:
            deploy(home, yard.releases[4], now=True, probe=unhealthy)
        assert caught.value.code == code
    assert [event.action for event in state(home).history].count("refused") == 1
    assert deploy(home, yard.releases[5], now=True).slot == "current"  # another bundle may


def test_a_challenger_that_fails_as_champion_leaves_both_slots(yard, tmp_path):
    home = yard.copy(tmp_path / "home")
    with pytest.raises(DeermlError):
        deploy(home, yard.releases[3], now=True, owner_decision="try", probe=unhealthy)
    assert slots(home) == slots_of(yard, 2, 1)


def test_an_interrupted_adoption_is_no_verdict(yard, tmp_path):
    home = yard.copy(tmp_path / "home")
    thresholds = Thresholds(shared={"deer": 0.2})
    bundle = seal(yard.releases[1] / "model.onnx", spot_draft(["deer"]), thresholds, "none", home.bundles)
    assert in_child(lambda: adopt_current(home, bundle.digest, "from before", probe=lambda bundle: os._exit(9))) == 9
    recover(home)
    assert slots(home) == slots_of(yard, 2, 1, 3) and (home.bundles / bundle.digest).exists()
    adopt_current(home, bundle.digest, "from before")
    assert slots(home).current == bundle.digest


def test_a_damaged_bundle_is_no_way_back(yard, tmp_path):
    home = yard.copy(tmp_path / "home")
    model = home.bundles / yard.digests[1] / "model.onnx"
    model.chmod(0o644)
    model.write_bytes(model.read_bytes()[:-1])
    with pytest.raises(DeermlError) as caught:
        rollback(home)
    assert caught.value.code == "DIGEST" and slots(home) == slots_of(yard, 2, 1, 3)


@pytest.mark.parametrize("name", ["model.onnx", "serving.json", "release.json", "card.md", "SHA256SUMS"])
def test_a_damaged_release_changes_nothing(yard, name, tmp_path):
    home = yard.copy(tmp_path / "home")
    release = shutil.copytree(yard.releases[4], tmp_path / "releases" / "000004")
    content, before = bytearray((release / name).read_bytes()), state(home)
    (release / name).chmod(0o644)
    for position in range(0, len(content), max(len(content) // 25, 1)):
        flipped = bytearray(content)
        flipped[position] ^= 1 << position % 8
        (release / name).write_bytes(flipped)
        with pytest.raises(DeermlError) as caught:
            deploy(home, release)
        assert caught.value.code in ("DIGEST", "BAD_RELEASE") and state(home) == before


def test_a_model_that_fails_its_smoke_test_is_not_kept(yard, tmp_path, monkeypatch, without_smoke):
    def no(bundle):
        raise DeermlError("BAD_MODEL", "It answered NaN.")

    home = yard.copy(tmp_path / "home")
    monkeypatch.setattr(room, "smoke_test", no)
    with pytest.raises(DeermlError):
        deploy(home, yard.releases[4], now=True)
    assert slots(home) == slots_of(yard, 2, 1, 3) and not (home.bundles / yard.digests[4]).exists()
    assert state(home).history[-1].reason == "It answered NaN. (staging)"
    monkeypatch.setattr(room, "smoke_test", without_smoke)  # the real one, once
    assert deploy(home, yard.releases[4], now=True).slot == "current"
