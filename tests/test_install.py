"""The Makefile and tools/install.py, with stand-ins for what would take minutes and gigabytes."""
import os
import shutil
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import install  # noqa: E402


def script(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


# -- which build of PyTorch ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("card", "index", "build", "why"), [
    (True, True, install.ORDINARY, "has an NVIDIA card"),
    (True, False, install.ORDINARY, "has an NVIDIA card"),
    (False, True, install.CPU, "no NVIDIA card"),
    (False, False, install.ORDINARY, "does not answer"),
])
def test_the_small_build_needs_no_card_and_an_index_that_answers(monkeypatch, card, index, build, why):
    monkeypatch.setattr(install, "has_nvidia_card", lambda: card)
    monkeypatch.setattr(install, "answers", lambda address: index)
    chosen, because = install.choose()
    assert chosen is build and why in because


@pytest.mark.parametrize(("body", "expected"), [
    ("echo 'GPU 0: NVIDIA T4 (UUID: GPU-1)'", True),
    ("echo 'No devices were found'; exit 6", False),
    ("echo 'NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver'; exit 9", False),
    ("exit 0", False),
    (None, False),
])
def test_a_card_is_one_that_the_driver_lists(monkeypatch, tmp_path, body, expected):
    monkeypatch.setenv("PATH", str(tmp_path))
    if body:
        script(tmp_path / "nvidia-smi", body)
    assert install.has_nvidia_card() is expected


class Index(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/slow/":
            time.sleep(2)
        self.send_response(404 if self.path == "/gone/" else 200)
        self.end_headers()
        self.wfile.write(b"please log in" if self.path == "/portal/" else b'<a href="torch/">torch</a>')

    def log_message(self, *_):
        pass


@pytest.fixture
def served():
    server = HTTPServer(("127.0.0.1", 0), Index)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(("path", "expected"), [("whl", True), ("gone", False), ("portal", False), ("slow", False)])
def test_an_index_that_answers_in_time(served, monkeypatch, path, expected):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    start = time.monotonic()
    assert install.answers(f"{served}/{path}", patience_s=0.5) is expected
    assert time.monotonic() - start < 1.8


def test_nobody_there(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert not install.answers("http://127.0.0.1:9", patience_s=0.5)
    assert not install.answers("not an address", patience_s=0.5)


# -- what is installed --------------------------------------------------------------------------------------------


@pytest.fixture
def environment(tmp_path) -> Path:
    "The Python of an environment in which `pip` writes down what it was asked for"
    python = tmp_path / "venv" / "bin" / "python"
    script(python, f"""cd {tmp_path}
if [ "$1 $2 $3" = "-m pip install" ]; then
    shift 3
    echo "$@" >> asked
    cat says
    case "$@" in *"$(cat fails)"*) exit 1;; esac
elif [ -e there ]; then
    echo "2.10 and torchvision 0.25"
fi""")
    (tmp_path / "says").write_text("")
    (tmp_path / "fails").write_text("nothing")
    return python


def asked(tmp_path: Path) -> list[str]:
    return (tmp_path / "asked").read_text().splitlines() if (tmp_path / "asked").exists() else []


@pytest.mark.parametrize(("build", "command"), [
    (install.CPU, "--index-url https://download.pytorch.org/whl/cpu torch torchvision"),
    (install.ORDINARY, "torch torchvision"),
])
def test_the_choice_and_its_size_are_said_first(environment, tmp_path, monkeypatch, capfd, build, command):
    monkeypatch.setattr(install, "choose", lambda: (build, "because"))
    monkeypatch.setattr(install, "pip_install", lambda python, *arguments: print("pip", *arguments[1:], flush=True))
    install.install_torch(environment)
    said, pip = capfd.readouterr().out.splitlines()
    assert build.name in said and build.size in said and "because" in said and pip.startswith("pip")
    monkeypatch.undo()
    monkeypatch.setattr(install, "choose", lambda: (build, "because"))
    install.install_torch(environment)
    assert asked(tmp_path) == [f"--no-input --progress-bar off {command}"]


def test_an_index_without_the_files_gives_way_to_the_ordinary_build(environment, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(install, "choose", lambda: (install.CPU, "because"))
    (tmp_path / "fails").write_text("--index-url")
    install.install_torch(environment)
    assert [line.split()[3:] for line in asked(tmp_path)] == [
        ["--index-url", install.CPU_INDEX, "torch", "torchvision"], ["torch", "torchvision"]]
    assert install.ORDINARY.size in capsys.readouterr().out


def test_pytorch_that_is_there_stays(environment, tmp_path, monkeypatch, capsys):
    (tmp_path / "there").touch()
    monkeypatch.setattr(install, "choose", lambda: pytest.fail("nothing is to be chosen"))
    install.install_torch(environment)
    assert asked(tmp_path) == [] and "PyTorch 2.10 and torchvision 0.25 are already there" in capsys.readouterr().out


def test_a_disk_that_is_too_small_is_said_before_the_download(environment, tmp_path, monkeypatch):
    monkeypatch.setattr(install, "choose", lambda: (install.ORDINARY, "because"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**10, 9 * 10**9, 10**9))
    with pytest.raises(SystemExit, match=r"Only 1\.0 GB"):
        install.install_torch(environment)
    assert asked(tmp_path) == []


PIP = """Looking in indexes: https://pypi.org/simple
Collecting torch
  Downloading torch-2.10-cp311-manylinux_2_28_x86_64.whl.metadata (30 kB)
  Downloading https://files/x/torch-2.10-cp311-manylinux_2_28_x86_64.whl (899.1 MB)
Downloading filelock-4.2-py3-none-any.whl (16 kB)
Installing collected packages: filelock, torch
Successfully installed filelock-4.2 torch-2.10
"""


def test_pip_is_quiet_but_not_silent(environment, tmp_path, capsys):
    (tmp_path / "says").write_text(PIP)
    install.pip_install(environment, "torch")
    said = capsys.readouterr().out
    assert said == "  torch-2.10-cp311-manylinux_2_28_x86_64.whl (899.1 MB)\n  unpacking 2 of them\n"
    assert (tmp_path / "venv/install.log").read_text() == PIP


def test_a_failure_shows_what_pip_said(environment, tmp_path, capsys):
    (tmp_path / "says").write_text("ERROR: No matching distribution found for torch\n")
    (tmp_path / "fails").write_text("torch")
    with pytest.raises(SystemExit, match="install.log"):
        install.pip_install(environment, "torch")
    assert "No matching distribution" in capsys.readouterr().out


def test_an_environment_that_works_is_kept_and_a_broken_one_made_again(tmp_path, capsys):
    folder = tmp_path / "venv"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin/python").symlink_to("/nowhere/python3")
    (folder / "mark").touch()
    python = install.make_environment(folder)
    assert not (folder / "mark").exists()
    assert subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode == 0
    (folder / "mark").touch()
    install.make_environment(folder)
    assert (folder / "mark").exists()


# -- make ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path) -> Path:
    "The Makefile beside an installer that writes down that it ran, and with what"
    root = tmp_path / "checkout"
    (root / "tools").mkdir(parents=True)
    shutil.copy(ROOT / "Makefile", root)
    for name in ("settings.ini", "setup.py", "pyproject.toml"):
        (root / name).write_text("")
    (root / "tools/install.py").write_text("""
import pathlib, sys
with open("runs", "a") as runs:
    runs.write(" ".join(sys.argv[1:]) + "\\n")
if pathlib.Path("broken").exists():
    sys.exit(1)
binaries = pathlib.Path(sys.argv[1], "bin")
binaries.mkdir(parents=True, exist_ok=True)
for name in ("pytest", "deerml", "ruff"):
    (binaries / name).write_text(f'#!/bin/sh\\necho {name} "$@"\\n')
    (binaries / name).chmod(0o755)
""")
    return root


def environ(path: str = "") -> dict[str, str]:
    "A bare one: the make around this test must not hand on its options and variables"
    return {"PATH": f"{path}:/usr/bin:/bin" if path else os.environ["PATH"], "HOME": os.environ.get("HOME", "/")}


def make(root: Path, *arguments: str, path: str = "") -> subprocess.CompletedProcess:
    return subprocess.run(["make", *arguments], cwd=root, env=environ(path), capture_output=True, text=True)


def runs(root: Path) -> int:
    return len((root / "runs").read_text().splitlines()) if (root / "runs").exists() else 0


def this_python(root: Path) -> str:
    return f"PYTHON={sys.executable}"


def test_make_alone_says_what_each_target_does(checkout):
    ran = make(checkout)
    targets = [line.split()[1] for line in ran.stdout.splitlines()]
    assert ran.returncode == 0 and {"install", "test", "demo", "lint", "clean"} <= set(targets) and runs(checkout) == 0


@pytest.mark.parametrize(("target", "said"), [
    ("test", "--no-loadscope-reorder --slow"), ("demo", "deerml demo --slow"), ("lint", "ruff check ."),
])
def test_a_target_installs_first_and_then_runs(checkout, target, said):
    ran = make(checkout, target, "ARGS=--slow", this_python(checkout))
    assert ran.returncode == 0 and said in ran.stdout and runs(checkout) == 1, ran.stderr


def test_the_second_time_nothing_is_installed_until_the_settings_change(checkout):
    for _ in range(2):
        assert make(checkout, "install", this_python(checkout)).returncode == 0
    assert runs(checkout) == 1
    for count, name in enumerate(("settings.ini", "setup.py", "tools/install.py"), start=2):
        later = time.time() + 10 * count
        os.utime(checkout / name, (later, later))
        assert make(checkout, "install", this_python(checkout)).returncode == 0
        assert runs(checkout) == count
        os.utime(checkout / ".venv/installed", (later + 1, later + 1))


def test_an_installation_that_failed_is_tried_again(checkout):
    (checkout / "broken").touch()
    assert make(checkout, "test", this_python(checkout)).returncode != 0
    (checkout / "broken").unlink()
    assert make(checkout, "test", this_python(checkout)).returncode == 0 and runs(checkout) == 2


def stub_pythons(folder: Path, **versions: str) -> str:
    "Pythons by name: `works`, `fails` as a version manager's does, or `no venv`, or `old`"
    for name, kind in versions.items():
        if kind == "works":
            script(folder / name, f'echo {name} >> {folder}/used; exec "{sys.executable}" "$@"')
        else:
            script(folder / name, {"fails": "exit 127", "no venv": "exit 1", "old": "exit 1"}[kind])
    return str(folder)


@pytest.mark.parametrize(("there", "expected"), [
    ({"python3.13": "works", "python3.11": "works"}, "python3.13"),
    ({"python3.13": "fails", "python3.12": "works", "python3": "works"}, "python3.12"),
    ({"python3.13": "no venv", "python3.12": "fails", "python3.11": "fails", "python3": "works"}, "python3"),
])
def test_the_newest_python_that_works_is_taken(checkout, tmp_path, there, expected):
    every = {name: "fails" for name in ("python3.13", "python3.12", "python3.11", "python3")}
    ran = make(checkout, "install", path=stub_pythons(tmp_path / "bin", **every | there))
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "bin/used").read_text().split()[-1] == expected


@pytest.mark.parametrize("argument", [None, "PYTHON=/nowhere/python3"])
def test_without_a_suitable_python_it_says_what_is_needed(checkout, tmp_path, argument):
    none = {name: "old" for name in ("python3.13", "python3.12", "python3.11", "python3")}
    ran = make(checkout, "test", *[argument] * bool(argument), path=stub_pythons(tmp_path / "bin", **none))
    assert ran.returncode != 0 and "Python 3.11 or newer" in ran.stderr and "apt install python3-venv" in ran.stderr
    assert runs(checkout) == 0


def test_clean_removes_what_was_made(checkout):
    make(checkout, "install", this_python(checkout))
    before = {"Makefile", "settings.ini", "setup.py", "pyproject.toml", "tools", "runs"}
    for name in ("build", "dist", "deerml.egg-info", "__pycache__"):
        (checkout / name).mkdir()
    assert make(checkout, "clean").returncode == 0
    assert {path.name for path in checkout.iterdir()} == before


def test_ci_runs_lint_and_tests_and_fails_when_they_do(checkout):
    (checkout / ".ci").mkdir()
    shutil.copy(ROOT / ".ci/run", checkout / ".ci/run")
    assert os.access(ROOT / ".ci/run", os.X_OK)
    command = ["bash", str(checkout / ".ci/run")]
    (checkout / "stub").mkdir()
    script(checkout / "stub/apt-get", "exit 100")  # nothing is installed by a test; and CI goes on where nothing can be
    offline = environ() | {"PATH": f"{checkout / 'stub'}:{os.environ['PATH']}"}
    ran = subprocess.run(command, cwd="/", env=offline, capture_output=True, text=True)
    assert ran.returncode == 0 and "ruff check" in ran.stdout and "pytest" in ran.stdout.splitlines()[-1]
    script(checkout / ".venv/bin/pytest", "exit 1")
    assert subprocess.run(command, cwd="/", env=offline, capture_output=True).returncode != 0
