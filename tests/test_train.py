"""Training: what must not happen to the machine, the store and the network; kills, full disks; every architecture."""
import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import textwrap
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from deerml.core.errors import DeermlError
from deerml.model.bundle import Candidate, Thresholds, seal
from deerml.model.detector import Detector, decode
from deerml.train import checkpoint
from deerml.train.checkpoint import fetch_base, load_checkpoint, load_state, quiet_ultralytics
from deerml.train.copies import spot_dataset
from deerml.train.export import compare, export, kind_of, load_candidate
from deerml.train.recipe import Recipe, read_training, train

ROOT = Path(__file__).resolve().parents[1]
QUICK = Recipe("tiny", image_size=96, epochs=2, batch=4, reserve_mb=10)


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    "Nothing is written into the user's cache"
    before = os.environ.get("DEERML_CACHE")
    os.environ["DEERML_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    os.environ.pop("DEERML_CACHE")
    if before is not None:
        os.environ["DEERML_CACHE"] = before


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return spot_dataset(tmp_path_factory.mktemp("datasets") / "v0001", train=12)


@pytest.fixture(scope="module")
def run(tmp_path_factory, dataset) -> Path:
    "A run that is finished"
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(dataset, folder, QUICK)
    return folder


def python(code: str, folder: Path, **environ: str) -> subprocess.CompletedProcess:
    "Run code in a fresh Python that stands in `folder`"
    env = {name: value for name, value in os.environ.items() if not name.startswith(("YOLO_", "ULTRALYTICS_"))}
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environ}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)


def code_of(function, *args, **kwargs) -> str:
    with pytest.raises(DeermlError) as caught:
        function(*args, **kwargs)
    return caught.value.code


def weights_hash(path: Path) -> str:
    state = load_checkpoint(path).model.state_dict()
    return hashlib.sha256(b"".join(value.numpy().tobytes() for value in state.values())).hexdigest()


# -- the store ------------------------------------------------------------------------------------------------------


def test_a_training_does_not_touch_the_images_of_the_store(tmp_path, dataset):
    "Some cameras write bytes after the end of a JPEG, and Ultralytics writes such files anew"
    odd = shutil.copytree(dataset, tmp_path / "v0001")
    image = next((odd / "images/train").glob("*.jpg"))
    stored = tmp_path / "store.jpg"
    stored.write_bytes(image.read_bytes() + b"camera firmware 1.0")
    image.unlink()
    os.link(stored, image)
    stored.chmod(0o444)
    before, content = stored.stat(), stored.read_bytes()
    train(odd, tmp_path / "run", replace(QUICK, epochs=1))
    after = stored.stat()
    assert stored.read_bytes() == content and os.path.samefile(stored, image)
    assert (after.st_ino, after.st_mtime_ns, after.st_nlink, after.st_mode) == (before.st_ino, before.st_mtime_ns, 2, before.st_mode)
    assert (tmp_path / "run/data/images/train" / image.name).read_bytes() != content, "otherwise this test shows nothing"


def test_test_images_are_not_even_copied(tmp_path, dataset):
    exam = shutil.copytree(dataset, tmp_path / "v0001")
    for kind, suffix in (("images", "jpg"), ("labels", "txt")):
        shutil.copy(next((exam / kind / "train").glob(f"*.{suffix}")), exam / kind / "test" / f"exam.{suffix}")
    train(exam, tmp_path / "run", replace(QUICK, epochs=1))
    assert not list((tmp_path / "run").rglob("exam*"))


# -- the machine and the network ------------------------------------------------------------------------------------

WATCHED = """
import sys
seen = []
def hook(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto", "os.system") or (event == "subprocess.Popen" and "pip" in str(args[:2])):
        seen.append((event, str(args)[:200]))
sys.addaudithook(hook)
"""


def test_training_and_export_call_nobody_print_nothing_and_leave_nothing_behind(tmp_path, dataset):
    here = tmp_path / "here"
    here.mkdir()
    result = python(WATCHED + f"""
from pathlib import Path
from deerml.train.recipe import Recipe, train
from deerml.train.export import export
run = Path({str(tmp_path / "run")!r})
weights = train(Path({str(dataset)!r}), run, Recipe("tiny", image_size=96, epochs=1, batch=4), lambda done, total, left, losses: print(done, total, sorted(losses)))
export(weights, run, ["spot"])
assert not seen, seen
""", here, DEERML_CACHE=str(tmp_path / "cache"), ULTRALYTICS_API_KEY="secret", HOME=str(tmp_path / "home"))
    assert result.returncode == 0, result.stderr
    assert result.stdout == "1 1 ['box_loss', 'cls_loss', 'dfl_loss']\n" and result.stderr == ""
    assert not list(here.iterdir()) and not (tmp_path / "home").exists()


def test_importing_the_room_imports_no_torch(tmp_path):
    result = python("import sys, deerml.train.recipe, deerml.train.export; print([name for name in ('torch', 'ultralytics') if name in sys.modules])", tmp_path)
    assert result.stdout == "[]\n", result.stderr


PAYLOADS = """
import os, torch, zipfile
class Evil:
    def __reduce__(self): return (os.system, ("touch it-ran",))
torch.save({"model": Evil()}, "evil.pt")
torch.save({"model": 1}, "plain.pt")
with zipfile.ZipFile("plain.pt") as old, zipfile.ZipFile("missing.pt", "w") as new:
    for name in old.namelist():
        thing = b"\\x80\\x02}q\\x00X\\x05\\x00\\x00\\x00modelq\\x01cdeerml_no_such_package\\nThing\\nq\\x02s."
        new.writestr(name, thing if name.endswith("data.pkl") else old.read(name))
"""


@pytest.mark.parametrize("first", ["", "import ultralytics, ultralytics.nn.tasks, ultralytics.utils.checks"], ids=["alone", "after an unsafe import"])
def test_a_hostile_checkpoint_neither_runs_nor_installs(tmp_path, first):
    result = python(f"""{first}
{PAYLOADS}
{WATCHED}
from deerml.core.errors import DeermlError
from deerml.train.checkpoint import load_checkpoint
for name in ("evil", "missing"):
    try:
        load_checkpoint(name + ".pt")
    except DeermlError as error:
        print(error.code)
assert not seen, seen
""", tmp_path, DEERML_CACHE=str(tmp_path / "cache"))
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-2:] == ["UNSAFE_CHECKPOINT"] * 2 and not (tmp_path / "it-ran").exists()


def test_the_payload_of_that_test_works(tmp_path):
    result = python(PAYLOADS + "torch.load('evil.pt', weights_only=False)", tmp_path)
    assert result.returncode == 0 and (tmp_path / "it-ran").exists()


def test_a_hostile_base_is_refused_before_the_training_writes_a_weight(tmp_path, dataset):
    python(PAYLOADS, tmp_path)
    assert code_of(train, dataset, tmp_path / "run", Recipe(str(tmp_path / "evil.pt"), preset="tiny", epochs=1, image_size=96)) == "UNSAFE_CHECKPOINT"
    assert read_training(tmp_path / "run")["state"] == "failed" and not (tmp_path / "it-ran").exists() and not list((tmp_path / "run").glob("*.pt"))


def test_pillow_is_given_back_after_ultralytics_took_it(tmp_path):
    result = python("""
        import io, ultralytics, PIL.Image
        from deerml.train.checkpoint import quiet_ultralytics
        quiet_ultralytics()
        try:
            PIL.Image.open(io.BytesIO(b"no image"))
        except PIL.UnidentifiedImageError:
            print("as ever")
        """, tmp_path, DEERML_CACHE=str(tmp_path / "cache"))
    assert result.stdout.endswith("as ever\n"), result.stderr


# -- bases ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path, monkeypatch):
    "A place to download from; what it holds lies in the folder it yields"
    folder = tmp_path / "served"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def log_message(self, *_):
            pass

        def send_header(self, name, value):
            longer = int(value) + 1000 if name == "Content-Length" and self.path.startswith("/yolo11n") else value
            super().send_header(name, str(longer))

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        monkeypatch.setattr(checkpoint, "WEIGHTS_URL", f"http://127.0.0.1:{listening.server_port}")
        monkeypatch.setenv("DEERML_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(checkpoint, "DOWNLOAD_TIMEOUT_S", 2)
        yield folder
        listening.shutdown()


def test_a_base_is_downloaded_once_and_proven_first(tmp_path, server, run):
    python(PAYLOADS, tmp_path)
    shutil.copy(run / "last.pt", server / "yolo26n.pt")
    shutil.copy(run / "last.pt", server / "yolo11n.pt")  # announced as longer than it is
    shutil.copy(tmp_path / "evil.pt", server / "yolo26s.pt")
    found = fetch_base("yolo26n")
    (server / "yolo26n.pt").unlink()
    assert fetch_base("yolo26n") == found and found.read_bytes() == (run / "last.pt").read_bytes()
    assert code_of(fetch_base, "yolo26s") == "UNSAFE_CHECKPOINT" and code_of(fetch_base, "yolo26m") == "DOWNLOAD"
    assert code_of(fetch_base, "yolo11n") == "DOWNLOAD"
    assert [path.name for path in (tmp_path / "cache/weights").iterdir()] == ["yolo26n.pt"] and not (tmp_path / "it-ran").exists()


def test_a_warm_start_begins_where_the_champion_ended(tmp_path, dataset, run):
    "With a rate of almost nothing the weights stay what they were"
    warm = Recipe(str(run / "last.pt"), image_size=96, epochs=1, batch=4, learning_rate=1e-9)
    assert warm.preset == "tiny"
    model = load_checkpoint(train(dataset, tmp_path / "warm", warm)).model.state_dict()
    champion = load_checkpoint(run / "last.pt").model.state_dict()
    for name, value in champion.items():
        if name.endswith((".weight", ".bias")):
            np.testing.assert_allclose(model[name].numpy(), value.numpy(), atol=1e-3, err_msg=name)


@pytest.mark.parametrize("name", ["o'brien.pt", "yolov5n.pt"])
def test_names_that_ultralytics_would_change_are_opened_all_the_same(tmp_path, run, name):
    shutil.copy(run / "last.pt", tmp_path / name)
    assert load_checkpoint(tmp_path / name).names == {0: "spot"}


def test_a_yaml_is_no_program(tmp_path, dataset):
    "Ultralytics evaluates `activation:` of a model's yaml"
    text = checkpoint.TINY_YAML + f"activation: __import__('os').system('touch {tmp_path}/it-ran')\n"
    (tmp_path / "model.yaml").write_text(text)
    assert code_of(train, dataset, tmp_path / "run", Recipe(str(tmp_path / "model.yaml"), preset="tiny", epochs=1, image_size=96)) == "TRAINING_FAILED"
    assert not (tmp_path / "it-ran").exists()


@pytest.mark.data
def test_a_real_yolov5n_fills_backbone_and_neck(sample_data):
    quiet_ultralytics()
    from ultralytics.nn.tasks import DetectionModel
    path = sample_data / "checkpoints/yolov5n_state.npz"
    model = DetectionModel("yolov5n.yaml", nc=1, verbose=False)
    assert load_state(model, path) == (342, 85)
    with np.load(path) as arrays:
        assert len(arrays.files) == 342 + 7
        np.testing.assert_array_equal(model.state_dict()["model.9.cv2.conv.weight"].numpy(), arrays["model.9.cv2.conv.weight"].astype(np.float32))


@pytest.mark.data
@pytest.mark.slow
def test_a_real_yolov5n_trains_and_exports(tmp_path, dataset, sample_data):
    recipe = Recipe(str(sample_data / "checkpoints/yolov5n_state.npz"), image_size=96, epochs=2, batch=4)
    weights = train(dataset, tmp_path / "run", recipe)
    assert weights.name == "best.pt" and load_candidate(export(weights, tmp_path / "run")).serving.output.kind == "raw"


# -- time, chance ---------------------------------------------------------------------------------------------------


def test_the_seed_decides(tmp_path, dataset, run):
    again, other = train(dataset, tmp_path / "again", QUICK), train(dataset, tmp_path / "other", replace(QUICK, seed=1))
    assert weights_hash(again) == weights_hash(run / "last.pt") != weights_hash(other)


def test_a_time_limit_shortens_and_never_lengthens(tmp_path, dataset):
    train(dataset, tmp_path / "short", replace(QUICK, epochs=2000, minutes=0.03))
    record = read_training(tmp_path / "short")
    assert record["state"] == "finished" and 1 <= record["epochs_done"] < 200 and record["seconds"] < 30
    train(dataset, tmp_path / "long", replace(QUICK, minutes=60))
    assert read_training(tmp_path / "long")["epochs_done"] == 2


def test_seconds_left_fall_to_nothing(tmp_path, dataset):
    told = []
    train(dataset, tmp_path / "run", replace(QUICK, epochs=3), lambda *progress: told.append(progress))
    assert [(done, total) for done, total, *_ in told] == [(1, 3), (2, 3), (3, 3)] and told[0][2] > told[1][2] > told[2][2] == 0


# -- kills and full disks -------------------------------------------------------------------------------------------

VICTIM = """
import os, signal
from pathlib import Path
from deerml.train import session
from deerml.train.recipe import Recipe, train
session.CHECKPOINT_S = 0.0
def kill(done, *_):
    if done == {epochs}:
        os.kill(os.getpid(), signal.SIGKILL)
train(Path({dataset!r}), Path({run!r}), Recipe("tiny", image_size=96, epochs=4, batch=4), kill)
"""


@pytest.mark.slow  # test_train_kills does it at random moments, in both tiers
@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_a_killed_training_goes_on(tmp_path, dataset, epochs):
    killed = python(VICTIM.format(epochs=epochs, dataset=str(dataset), run=str(tmp_path / "run")), tmp_path)
    assert killed.returncode == -9, killed.stderr
    assert read_training(tmp_path / "run")["state"] == "interrupted" and read_training(tmp_path / "run")["epochs_done"] == epochs
    told = []
    train(dataset, tmp_path / "run", Recipe("tiny", image_size=96, epochs=4, batch=4), lambda done, *_: told.append(done), resume=True)
    rows = (tmp_path / "run/results.csv").read_text().splitlines()
    assert told[0] == epochs + 1 and [row.split(",")[0] for row in rows[1:]] == ["1", "2", "3", "4"]
    assert read_training(tmp_path / "run")["state"] == "finished"


def test_a_training_that_stopped_before_its_first_checkpoint_begins_again(tmp_path, dataset):
    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(dataset, tmp_path / "run", QUICK, stop)
    (tmp_path / "run/last.pt").unlink()
    assert train(dataset, tmp_path / "run", QUICK, resume=True).exists()
    record = read_training(tmp_path / "run")
    assert (record["state"], record["epochs_done"], record["resumes"]) == ("finished", 2, 1) and record["base_sha256"]


def test_a_resumed_run_does_not_need_its_base(tmp_path, dataset, run):
    base = tmp_path / "base.pt"
    shutil.copy(run / "last.pt", base)
    recipe = Recipe(str(base), preset="tiny", image_size=96, epochs=3, batch=4)

    def stop(done, *_):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(dataset, tmp_path / "run", recipe, stop)
    base.unlink()
    train(dataset, tmp_path / "run", recipe, resume=True)
    assert read_training(tmp_path / "run")["state"] == "finished"


def test_a_stray_checkpoint_in_a_new_folder_is_not_resumed(tmp_path, dataset, run):
    (tmp_path / "run").mkdir()
    shutil.copy(run / "last.pt", tmp_path / "run/last.pt")
    assert weights_hash(train(dataset, tmp_path / "run", QUICK)) == weights_hash(run / "last.pt")


FULL = """
import resource
from pathlib import Path
from deerml.core.errors import DeermlError
from deerml.train.recipe import Recipe, read_training, train
run = Path({run!r})
def grow(done, *_):
    {filling}
try:
    train(Path({dataset!r}), run, Recipe("tiny", image_size=96, epochs=3, batch=4, reserve_mb=0), grow)
except DeermlError as error:
    print(error.code, read_training(run)["state"])
"""


def check_full(result: subprocess.CompletedProcess) -> None:
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    assert result.stdout.split() in (["NO_SPACE", "failed"], ["NO_SPACE", "interrupted"]), result.stdout


def test_a_full_disk_in_the_middle_is_said_and_leaves_a_run_that_goes_on(tmp_path, dataset):
    "No file may grow over 400 KB from the first epoch on: the next checkpoint cannot be written"
    filling = "done == 1 and resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, resource.RLIM_INFINITY))"
    check_full(python(FULL.format(run=str(tmp_path / "run"), dataset=str(dataset), filling=filling), tmp_path))
    assert not (tmp_path / "run/data").exists() and read_training(tmp_path / "run")["error"]["code"] == "NO_SPACE"
    train(dataset, tmp_path / "run", Recipe("tiny", image_size=96, epochs=3, batch=4, reserve_mb=0), resume=True)
    assert read_training(tmp_path / "run")["state"] == "finished"


SMALL_DISK = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size="$1" none "$2" && shift 2 && exec "$@"', "sh"]


@pytest.mark.parametrize("size", ["4m", *(pytest.param(size, marks=pytest.mark.slow) for size in ("40k", "300k", "2m", "8m", "11m"))])
def test_a_really_full_disk(tmp_path, dataset, size):
    "A file system of few megabytes, wherever it happens to run full"
    run = tmp_path / "disk"
    run.mkdir()
    if not shutil.which("unshare") or subprocess.run([*SMALL_DISK, "1m", str(run), "true"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a small disk")
    code = textwrap.dedent(FULL.format(run=str(run), dataset=str(dataset), filling="pass"))
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    check_full(subprocess.run([*SMALL_DISK, size, str(run), sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True))


# -- export ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["yolo26n", *(pytest.param(name, marks=pytest.mark.slow) for name in ("yolo11n", "yolov8n", "yolov5n"))])
def test_architectures_export_and_serve_on_any_rectangle(tmp_path, dataset, name):
    weights = train(dataset, tmp_path / "run", Recipe(f"{name}.yaml", image_size=96, epochs=1, batch=12))
    candidate = load_candidate(export(weights, tmp_path / "run", ["spot"]))
    assert candidate.serving.output.kind == "raw"
    bundle = seal(candidate.model_path, candidate.serving, Thresholds(shared={"spot": 0.5}), "none", tmp_path / "bundles")
    detector = Detector(bundle, threads=1)
    for shape in ((96, 96), (40, 130), (300, 50)):
        detector(np.full((*shape, 3), 90, np.uint8))
    assert len(detector.batch([np.zeros((60, 90, 3), np.uint8)] * 3)) == 3


@pytest.mark.slow
def test_an_end2end_head_is_recognised_and_agrees(tmp_path, dataset):
    import onnx

    from deerml.model.bundle import Input, Output, ServingDraft
    from deerml.train.export import _tell_sides
    model = load_checkpoint(train(dataset, tmp_path / "run", Recipe("yolo26n.yaml", image_size=96, epochs=1, batch=12)))
    model.model.pt_path = str(tmp_path / "model.pt")
    network = onnx.load(model.export(format="onnx", dynamic=True, nms=False, imgsz=96, device="cpu"))
    _tell_sides(network.graph.output[0], 1)
    assert kind_of([None, None, 6], 1) == "end2end"
    network.ClearField("metadata_props")
    onnx.save(network, tmp_path / "model.onnx")
    draft = ServingDraft(classes=["spot"], input=Input(size=96), output=Output(kind="end2end"))
    compare(model, Candidate(tmp_path / "model.onnx", draft), sorted((dataset / "images/val").iterdir()))


def test_a_candidate_tells_where_it_came_from_and_no_folder_of_this_machine(run, tmp_path):
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    candidate = export(copy / "last.pt", copy)
    told = json.loads((candidate / "candidate.json").read_bytes())
    assert told["training"] | {"base": "tiny", "seed": 0, "epochs": 2, "epochs_done": 2} == told["training"]
    assert {"torch", "numpy", "onnx"} <= told["versions"].keys() and told["opset"] == 18 and told["dataset"]["dataset"] == "v0001"
    assert told["parity"]["images"] == 4
    for path in candidate.iterdir():
        content = path.read_bytes()
        assert str(tmp_path).encode() not in content and str(Path.home()).encode() + b"/" not in content


def test_a_failed_export_leaves_the_older_candidate(run, tmp_path, monkeypatch):
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    candidate = export(copy / "last.pt", copy)
    before = (candidate / "candidate.json").read_bytes()
    monkeypatch.setattr("deerml.train.export.PARITY_SCORE", 0.0)
    assert code_of(export, copy / "last.pt", copy) == "PARITY"
    assert (candidate / "candidate.json").read_bytes() == before and not [path for path in copy.iterdir() if path.name.startswith(".cand")]


def test_pictures_with_boxes_are_seen_the_same_way_by_the_sealed_bundle(run, dataset, tmp_path):
    "Candidate and bundle are one model: every score is equal"
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    candidate = load_candidate(export(copy / "last.pt", copy))
    bundle = seal(candidate.model_path, candidate.serving, Thresholds(shared={"spot": 0.5}), "none", tmp_path / "bundles")
    pictures = [decode(path.read_bytes()) for path in sorted((dataset / "images/val").iterdir())]
    assert Detector(candidate, threads=1).batch(pictures) == Detector(bundle, threads=1).batch(pictures)


def test_a_zip_that_is_no_checkpoint(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("a/data.pkl", b"no pickle")
    assert code_of(load_checkpoint, tmp_path / "a.pt") in ("BAD_CHECKPOINT", "UNSAFE_CHECKPOINT")
