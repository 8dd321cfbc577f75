"""The wheel works where there is no checkout: without torch, and with nothing that its requirements do not name."""
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("settings.ini", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "deerml")
MODULES = sorted(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
                 for path in (ROOT / "deerml").rglob("*.py"))
DATA = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "deerml").rglob("*")
              if path.is_file() and path.suffix not in (".py", ".pyc"))

# Makes the packages in the first argument impossible to import, as if they were not installed.
HIDE = """
import json, sys

class Hidden:
    names = set(json.loads(sys.argv.pop(1)))

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
sys.path.insert(0, sys.argv.pop(1))
import deerml
assert deerml.__file__.startswith(sys.path[0]), deerml.__file__
"""
IMPORT = """
import importlib
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
print(json.dumps(sorted(name for name in ("torch", "ultralytics") if name in sys.modules)))
"""
READ = """
import hashlib
from importlib.resources import files
print(json.dumps({name: hashlib.sha256(files("deerml").joinpath(*name.split("/")[1:]).read_bytes()).hexdigest()
                  for name in json.loads(sys.argv[1])}))
"""
DETECT = """
import pathlib, sys
import cv2, numpy
from deerml.model.bundle import Bundle, Thresholds, seal, spot_draft, spot_model
from deerml.model.detector import Detector, decode

home = pathlib.Path(sys.argv[1])
(home / "candidate.onnx").write_bytes(spot_model(["deer"]))
bundle = seal(home / "candidate.onnx", spot_draft(["deer"]), Thresholds(shared={"deer": 0.5}), "none", home / "bundles")
frame = numpy.zeros((180, 320, 3), "uint8")
frame[64:96, 96:144] = 255
found = Detector(Bundle.load(bundle.path))(decode(cv2.imencode(".png", frame)[1].tobytes()))
assert found and found[0].label == "deer" and abs(found[0].box.x - 96) < 9 and abs(found[0].box.y - 64) < 9, found
assert not {"torch", "ultralytics"} & set(sys.modules)
print("found a deer")
"""
CLI = "from deerml.app.cli import main; main()"


def notebook_of(module: str) -> bool:
    "Is there a notebook for this module? Until there is, and no longer, may its tests be skipped"
    room, name = module.split(".")[-2:]
    return any((ROOT / "nbs").glob(f"[0-9][0-9]_{room}/[0-9][0-9]_{name}.ipynb"))


needs_cli = pytest.mark.skipif(not notebook_of("app.cli"), reason="no notebook makes deerml.app.cli yet")


def run(*command, **options) -> str:
    ran = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    assert ran.returncode == 0, f"{ran.stdout}\n{ran.stderr}"
    return ran.stdout


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    "What a build reads, without the traces of earlier builds"
    root = tmp_path_factory.mktemp("sources")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, root / name)
    return root


@pytest.fixture(scope="module")
def wheel(sources, tmp_path_factory) -> Path:
    return build(sources, tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel)
    return target


def settings() -> dict[str, str]:
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


def required() -> set[str]:
    "The distributions that `pip install deerml` brings, by the metadata of what is installed here"
    found, waiting = set(), [Requirement(line) for line in settings()["requirements"].split()]
    while waiting:
        requirement = waiting.pop()
        key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if key in found:
            continue
        found.add(key)
        try:
            wanted = [Requirement(line) for line in requires(requirement.name) or []]
        except PackageNotFoundError:
            continue
        contexts = [{"extra": name} for name in requirement.extras or {""}]
        waiting += [one for one in wanted if not one.marker or any(map(one.marker.evaluate, contexts))]
    return {name for name, _ in found}


def hidden() -> list[str]:
    "The packages installed here that serving must do without"
    core, kept = required(), {*sys.stdlib_module_names, "deerml"}
    return sorted(package for package, owners in packages_distributions().items()
                  if package not in kept and not core & set(map(canonicalize_name, owners)))


def elsewhere(installed: Path, folder: Path, script: str, *arguments, hide=()) -> str:
    "Runs a script on the installed wheel, in another folder, with no way to the checkout"
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("COV_", "COVERAGE_"))}
    return run(sys.executable, "-I", "-c", HIDE + script, json.dumps(list(hide)), installed, *arguments,
               cwd=folder, env=environ)


def build(sources: Path, folder: Path) -> Path:
    "From the source distribution, as a release is: so that is whole, too"
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, sources)
    return next(folder.glob("*.whl"))


def differing(wheel: Path, root: Path) -> list[str]:
    "The files of the package that the wheel lacks, has in another state, or has too many"
    with zipfile.ZipFile(wheel) as archive:
        packed = {name: archive.read(name) for name in archive.namelist() if name.startswith("deerml/")}
    here = {path.relative_to(root).as_posix(): path.read_bytes() for path in (root / "deerml").rglob("*")
            if path.is_file() and path.suffix != ".pyc"}
    return sorted(name for name in here.keys() | packed.keys() if here.get(name) != packed.get(name))


def test_nothing_is_missing_in_the_wheel(wheel, sources):
    assert differing(wheel, sources) == [], "list their kinds under DATA in setup.py"
    with zipfile.ZipFile(wheel) as archive:
        licences = [archive.read(name) for name in archive.namelist() if name.endswith("/LICENSE")]
    assert licences == [(ROOT / "LICENSE").read_bytes()]


def test_a_file_of_an_unlisted_kind_is_noticed(sources, tmp_path):
    root = Path(shutil.copytree(sources, tmp_path / "sources"))
    (root / "deerml/core/static/parts").mkdir(parents=True)
    for name in ("page.html", "static/parts/app.js", "odd.xyz"):
        (root / "deerml/core" / name).write_text("content")
    assert differing(build(root, tmp_path / "dist"), root) == ["deerml/core/odd.xyz"]


def test_every_module_imports_with_the_core_requirements_alone(installed, tmp_path):
    hide = hidden()
    assert {"pytest", "setuptools", "pip"} <= set(hide) and not {"numpy", "onnxruntime", "pydantic"} & set(hide)
    assert json.loads(elsewhere(installed, tmp_path, IMPORT, json.dumps(MODULES), hide=hide)) == []


def test_no_module_imports_torch_even_where_it_is_installed(installed, tmp_path):
    assert json.loads(elsewhere(installed, tmp_path, IMPORT, json.dumps(MODULES))) == []


def test_what_is_hidden_cannot_be_imported(installed, tmp_path):
    with pytest.raises(AssertionError, match="No module named 'pytest'"):
        elsewhere(installed, tmp_path, IMPORT, '["pytest"]', hide=hidden())


def test_the_checkout_cannot_stand_in_for_the_wheel(tmp_path):
    with pytest.raises(AssertionError):
        elsewhere(tmp_path, tmp_path, IMPORT, "[]", hide=hidden())


def test_data_files_can_be_read(installed, tmp_path):
    expected = {name: hashlib.sha256((ROOT / name).read_bytes()).hexdigest() for name in DATA}
    assert json.loads(elsewhere(installed, tmp_path, READ, json.dumps(DATA))) == expected


def test_a_bundle_runs(installed, tmp_path):
    assert "found a deer" in elsewhere(installed, tmp_path, DETECT, tmp_path, hide=hidden())


@needs_cli
def test_the_command_line_runs(installed, tmp_path):
    assert "init" in elsewhere(installed, tmp_path, CLI, "--help", hide=hidden())


def test_the_command_is_the_one_in_the_settings(wheel):
    with zipfile.ZipFile(wheel) as archive:
        entries = next(archive.read(name).decode() for name in archive.namelist() if name.endswith("entry_points.txt"))
    assert "deerml = deerml.app.cli:main" in entries


@pytest.mark.slow
def test_a_clean_environment_gets_no_torch(sources, tmp_path):
    "Downloads what serving needs, about 150 MB"
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    binaries = tmp_path / "venv" / "bin"
    run(binaries / "pip", "install", "--quiet", "--disable-pip-version-check", sources)
    there = {canonicalize_name(line["name"]) for line in json.loads(run(binaries / "pip", "list", "--format", "json"))}
    assert {"deerml", "onnxruntime"} <= there
    assert not [name for name in there if name.startswith(("torch", "ultralytics", "nvidia", "triton"))]
    missing = {name for name in required() if name not in there}
    assert not missing, f"the metadata of this environment and the clean one differ: {missing}"
    (tmp_path / "home").mkdir()
    assert "found a deer" in run(binaries / "python", "-I", "-c", DETECT, tmp_path / "home", cwd=tmp_path)
    if notebook_of("app.cli"):
        assert "init" in run(binaries / "deerml", "--help", cwd=tmp_path)
