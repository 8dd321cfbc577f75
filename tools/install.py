"""Make the environment in which deerml is developed: `make install` runs this, and nothing but Python is needed.

    python3 tools/install.py .venv

PyTorch comes in two builds. On a machine without an NVIDIA card the small one is enough; it lies on PyTorch's own
index, which not every network reaches. So the card is looked for, the index is asked, and the choice and its size are
said before anything is downloaded. The whole of what pip says is kept in `.venv/install.log`.
"""
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from collections import deque
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PATIENCE_S = 5.0  # for the index to answer: who waits longer downloads slower from it than from anywhere else
OLDEST = (3, 11)
# Below this a download is over before one has read its name.
WORTH_A_LINE_MB = 10
DOWNLOAD = re.compile(r"Downloading \S*?(?P<file>[^/\s]+\.(?:whl|tar\.gz)) \((?P<size>[\d.]+) (?P<unit>[kMG]B)\)")
MEGABYTES = {"kB": 0.001, "MB": 1.0, "GB": 1000.0}


@dataclass(frozen=True)
class Build:
    "A build of PyTorch"
    name: str
    size: str
    disk_gb: float  # for it and the packages around it
    options: tuple[str, ...] = ()


CPU = Build("the small CPU build", "about 200 MB to download", 3, ("--index-url", CPU_INDEX))
ORDINARY = Build("the ordinary build", "about 3 GB to download, 6 GB on disk", 8)


def say(text: str) -> None:
    print(text, flush=True)


def has_nvidia_card() -> bool:
    "Does the driver's own tool list a card?"
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return False
    try:
        listed = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.returncode == 0 and "GPU" in listed.stdout


def answers(address: str, patience_s: float = PATIENCE_S) -> bool:
    "Does a package index answer there within `patience_s`, looking up its name included?"
    found = threading.Event()

    def ask() -> None:
        try:
            with urllib.request.urlopen(f"{address}/", timeout=patience_s) as page:
                if b"torch" in page.read():
                    found.set()
        except (OSError, ValueError):
            pass

    # A look-up of a name cannot be interrupted, so it is left behind in a thread that does not keep Python alive.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(patience_s)
    return found.is_set()


def choose() -> tuple[Build, str]:
    "The build of PyTorch for this machine, and why"
    if has_nvidia_card():
        return ORDINARY, "this machine has an NVIDIA card"
    if not answers(CPU_INDEX):
        return ORDINARY, f"no NVIDIA card, but {CPU_INDEX} does not answer"
    return CPU, "no NVIDIA card here"


def version_in(python: Path, code: str) -> str:
    "What `code` prints there, or nothing when it fails"
    try:
        ran = subprocess.run([python, "-c", code], capture_output=True, text=True)
    except OSError:
        return ""
    return ran.stdout.strip() if ran.returncode == 0 else ""


def make_environment(folder: Path) -> Path:
    "A working environment in `folder`: the one that is there, or a new one. Returns its Python"
    python = folder / "bin" / "python"
    if not version_in(python, f"import sys, pip; assert sys.version_info >= {OLDEST}; print(sys.version)"):
        say(f"Making {folder} with Python {sys.version.split()[0]}.")
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    return python


def pip_install(python: Path, *arguments: str) -> None:
    "Runs pip, with a line for each large download; when it fails, shows the end of what it said"
    command = [python, "-m", "pip", "install", "--no-input", "--progress-bar", "off", *arguments]
    calm = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_ROOT_USER_ACTION": "ignore", "PYTHONUNBUFFERED": "1"}
    environ = {name: value for name, value in os.environ.items() if name != "PIP_QUIET"} | calm
    last = deque(maxlen=30)
    log = python.parents[1] / "install.log"
    with log.open("a", encoding="utf-8") as kept, subprocess.Popen(
            command, cwd=ROOT, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as pip:
        for line in pip.stdout:
            kept.write(line)
            last.append(line)
            found = DOWNLOAD.search(line)
            if found and float(found["size"]) * MEGABYTES[found["unit"]] >= WORTH_A_LINE_MB:
                say(f"  {found['file']} ({found['size']} {found['unit']})")
            elif line.startswith("Installing collected packages: "):
                say(f"  unpacking {line.count(',') + 1} of them")
    if pip.returncode:
        say("".join(last).rstrip())
        raise SystemExit(f"pip could not install {' '.join(arguments)}: see above, and all of it in {log}.")


def install_torch(python: Path) -> None:
    "PyTorch and torchvision together, since each release of one fits one of the other"
    both = "from importlib.metadata import version as v; print(v('torch'), 'and torchvision', v('torchvision'))"
    if there := version_in(python, both):
        return say(f"PyTorch {there} are already there.")
    build, why = choose()
    announce(python, build, why)
    try:
        pip_install(python, *build.options, "torch", "torchvision")
    except SystemExit as error:
        if build is not CPU:
            raise
        # The index may answer where the files behind it do not, or have nothing for this Python.
        announce(python, ORDINARY, str(error))
        pip_install(python, "torch", "torchvision")


def announce(python: Path, build: Build, why: str) -> None:
    "Says what comes, and refuses to begin what cannot fit"
    say(f"PyTorch: {build.name}, {build.size} ({why}).")
    free_gb = shutil.disk_usage(python.parent).free / 1e9
    if free_gb < build.disk_gb:
        raise SystemExit(f"Only {free_gb:.1f} GB are free here, {build.disk_gb} GB are needed: free some, then retry.")


def main(folder: str = ".venv") -> None:
    if sys.version_info < OLDEST:
        raise SystemExit(f"deerml needs Python {OLDEST[0]}.{OLDEST[1]} or newer; this is {sys.version.split()[0]}.")
    start = time.monotonic()
    python = make_environment(Path(folder).absolute())
    install_torch(python)
    there = version_in(python, "from importlib.metadata import version; print(version('deerml'))")
    size = "as far as settings.ini asks for more than is there" if there else "about 300 MB to download"
    say(f"deerml and what else it is developed with, {size}.")
    pip_install(python, "--editable", ".[dev]")
    say(f"Installed in {time.monotonic() - start:.0f} s.")


if __name__ == "__main__":
    main(*sys.argv[1:])
