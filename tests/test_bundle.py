"""Bundles under attack: damage, pickles, crafted ONNX files, crashes and races."""
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import deerml.model.bundle as bundles
from deerml.core.errors import DeermlError
from deerml.model.bundle import Bundle, Candidate, Thresholds, check_model, parse_model, seal, spot_draft, spot_model
from deerml.model.detector import Detector

MODEL, DRAFT = spot_model(["deer"]), spot_draft(["deer"])
THRESHOLDS = Thresholds(shared={"deer": 0.5})


@pytest.fixture
def candidate(tmp_path) -> Path:
    (tmp_path / "candidate.onnx").write_bytes(MODEL)
    return tmp_path / "candidate.onnx"


@pytest.fixture
def bundle(candidate, tmp_path) -> Bundle:
    return seal(candidate, DRAFT, THRESHOLDS, "none", tmp_path / "bundles")


def sealed(model: bytes, folder: Path) -> Bundle:
    (folder / "model.onnx").write_bytes(model)
    return seal(folder / "model.onnx", DRAFT, THRESHOLDS, "none", folder / "bundles")


# -- damage -------------------------------------------------------------------------------------------------------

def damaged(data: bytes, random: Random) -> bytes:
    place = random.randrange(len(data))
    kind = random.choice(("flip", "cut", "zero", "insert"))
    if kind == "flip":
        return data[:place] + bytes([data[place] ^ 1 << random.randrange(8)]) + data[place + 1:]
    if kind == "cut":
        return data[:place]
    if kind == "zero":
        return data[:place] + bytes(64) + data[place + 64:]
    return data[:place] + random.randbytes(3) + data[place:]


@pytest.mark.parametrize("count", [200, pytest.param(3000, marks=pytest.mark.slow)])
def test_no_damage_goes_unnoticed(bundle, tmp_path, count):
    random, folder = Random(count), tmp_path / "copy" / bundle.digest
    whole = {name: (bundle.path / name).read_bytes() for name in ("model.onnx", "serving.json")}
    folder.mkdir(parents=True)
    for _ in range(count):
        name = random.choice(list(whole))
        broken = whole | {name: damaged(whole[name], random)}
        if broken == whole:  # zeros over zeros
            continue
        for file, data in broken.items():
            (folder / file).write_bytes(data)
        with pytest.raises(DeermlError) as caught:
            Bundle.load(folder)
        assert caught.value.code in ("DIGEST", "BAD_BUNDLE")
        with pytest.raises(DeermlError):
            Bundle(folder, bundle.digest, bundle.serving).verify()


def test_a_model_exchanged_after_loading_never_runs(bundle, tmp_path):
    other = spot_model(["deer"]).replace(b"spot", b"trap")
    (bundle.path / "model.onnx").chmod(0o644)
    (bundle.path / "model.onnx").write_bytes(other)
    with pytest.raises(DeermlError, match="not the file that was sealed"):
        Detector(bundle)


@pytest.mark.parametrize("length", range(0, len(MODEL), 23))
def test_a_cut_model_is_refused(length):
    with pytest.raises(DeermlError) as caught:
        check_model(MODEL[:length], DRAFT)
    assert caught.value.code in ("BAD_BUNDLE", "WRONG_SHAPE")


# -- pickles ------------------------------------------------------------------------------------------------------

PROBE = """
import sys
from pathlib import Path
from deerml.model.bundle import Candidate, Thresholds, seal, spot_draft
from deerml.model.detector import Detector
from deerml.core.errors import DeermlError
seen = []
def watch(event, args):
    if event in ("subprocess.Popen", "os.system", "socket.connect", "pickle.find_class"):
        seen.append(event)
    if event == "import" and args[0].split(".")[0] in ("torch", "ultralytics", "pickle_payload"):
        seen.append(args[0])
sys.addaudithook(watch)
draft, thresholds = spot_draft(["deer"]), Thresholds(shared={"deer": 0.5})
for path in sorted(Path(sys.argv[1]).iterdir()):
    for attempt in (lambda: seal(path, draft, thresholds, "none", path.parent / "bundles"),
                    lambda: Detector(Candidate(path, draft))):
        try:
            attempt()
            seen.append(f"{path.name} accepted")
        except DeermlError as error:
            assert error.code == "BAD_BUNDLE", (path, error)
print(seen)
"""


class Payload:
    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


def test_pickles_are_data_that_nobody_opens(tmp_path):
    folder, canary = tmp_path / "payloads", tmp_path / "canary"
    folder.mkdir()
    for protocol in range(6):
        content = pickle.dumps(Payload(canary), protocol=protocol)
        (folder / f"plain{protocol}.pt").write_bytes(content)
        (folder / f"renamed{protocol}.onnx").write_bytes(content)
        with zipfile.ZipFile(folder / f"zipped{protocol}.onnx", "w") as archive:
            archive.writestr("archive/data.pkl", content)
            archive.writestr("archive/version", "3")
        array = np.empty(1, object)
        array[0] = Payload(canary)
        np.savez(folder / f"array{protocol}.npz", array)
        (folder / f"appended{protocol}.onnx").write_bytes(MODEL[:-7] + content)
    done = subprocess.run([sys.executable, "-c", PROBE, folder], capture_output=True, text=True, check=False,
                          cwd=Path(__file__).resolve().parents[1])
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
    assert not canary.exists()


# -- crafted ONNX files -------------------------------------------------------------------------------------------

def changed(edit) -> bytes:
    model = onnx.load_model_from_string(MODEL)
    edit(model)
    return model.SerializeToString()


def external(location: str = "../secret") -> TensorProto:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    return tensor


def graph_with(*nodes, initializers=()):
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])
    return helper.make_graph(list(nodes), "inner", [], [output], list(initializers))


def branching(inner):
    return helper.make_node("If", ["any"], ["z"], then_branch=inner, else_branch=inner)


def add_node(op_type, *, domain="", inputs=("any",), **attributes):
    def edit(model):
        model.graph.node.append(helper.make_node(op_type, list(inputs), ["z"], domain=domain, **attributes))
        if domain:
            model.opset_import.append(helper.make_opsetid(domain, 1))
    return edit


def add_function(model):
    body = [helper.make_node("Relu", ["x"], ["y"])]
    model.functions.append(helper.make_function("own", "Trick", ["x"], ["y"], body, [helper.make_opsetid("", 18)]))


def add_training(model):
    model.training_info.add().algorithm.initializer.append(external())


def rewire(name, op_type):
    def edit(model):
        for node in model.graph.node:
            if node.output[0] == name:
                node.op_type = op_type
    return edit


def half_precision(model):
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT16


def two_inputs(model):
    model.graph.input.append(helper.make_tensor_value_info("extra", TensorProto.FLOAT, [1]))


def claim_size(model):
    model.graph.initializer.append(TensorProto(name="vast", data_type=TensorProto.FLOAT, dims=[2**40, 2**20]))


CONSTANT = helper.make_node("Constant", [], ["y"], value=external())
CRAFTED = {
    **{f"external {location}": lambda model, location=location: model.graph.initializer.append(external(location))
       for location in ("../x", "/etc/passwd", "a/../../x", "", "model.onnx", "file:///etc/passwd")},
    "external in a branch": lambda model: model.graph.node.append(branching(graph_with(CONSTANT))),
    "external in a branch of a branch": lambda model: model.graph.node.append(
        branching(graph_with(branching(graph_with(initializers=[external()]))))),
    "external in an attribute": lambda model: model.graph.node.append(CONSTANT),
    "external sparse values": lambda model: model.graph.sparse_initializer.add(values=external(), dims=[4]),
    "external training data": add_training,
    "operator of a library": add_node("Shell", domain="com.example"),
    "operator of the runtime": add_node("Gelu", domain="com.microsoft"),
    "operator of ONNX-ML": add_node("Normalizer", domain="ai.onnx.ml"),
    "function": add_function,
    "loop": add_node("Loop", inputs=("", ""), body=graph_with(CONSTANT)),
    "scan": add_node("Scan", body=graph_with(), num_scan_inputs=1),
    "unknown operator": add_node("Explode"),
    "no graph": lambda model: model.ClearField("graph"),
    "no operators": lambda model: model.graph.ClearField("node"),
    "no opset": lambda model: model.ClearField("opset_import"),
    "input in half precision": half_precision,
    "another input": two_inputs,
    "claims a petabyte": claim_size,
}


@pytest.mark.parametrize("edit", CRAFTED.values(), ids=CRAFTED.keys())
def test_crafted_models_never_become_bundles(edit, tmp_path):
    with pytest.raises(DeermlError) as caught:
        sealed(changed(edit), tmp_path)
    assert caught.value.code in ("BAD_BUNDLE", "WRONG_SHAPE") and caught.value.next_step
    assert not (tmp_path / "bundles").exists()


def field(number: int, content: bytes) -> bytes:
    "A protobuf field that holds a message"
    length, size = len(content), b""
    while length > 127:
        size, length = size + bytes([length & 127 | 128]), length >> 7
    return bytes([number << 3 | 2]) + size + bytes([length]) + content


def test_deep_nesting_is_refused_and_not_followed():
    graph = graph_with(initializers=[external()]).SerializeToString()
    for _ in range(200):
        graph = field(1, field(5, field(6, graph)))  # a graph with a node with an attribute that is the graph before
    with pytest.raises(DeermlError) as caught:
        parse_model(MODEL + field(7, graph))
    assert caught.value.code == "BAD_BUNDLE"


def endless_memory(model):
    "Asks for more memory than can be addressed; nothing in the file shows it"
    model.graph.node.insert(0, helper.make_node("ConstantOfShape", ["vast"], ["filled"]))
    model.graph.node.insert(1, helper.make_node("ReduceMax", ["filled"], ["least"], keepdims=0))
    model.graph.initializer.append(helper.make_tensor("vast", TensorProto.INT64, [1], [2**60]))
    model.graph.node[2].input.append("least")  # as the bias of the convolution


def answer_nan(model):
    model.graph.node[-1].output[0] = "answer"
    model.graph.node.append(helper.make_node("Log", ["answer"], ["negative"]))
    model.graph.node.append(helper.make_node("Sqrt", ["negative"], ["output0"]))


def answer_logits(model):
    rewire("scores", "Identity")(model)
    for node in model.graph.node:
        if node.output[0] == "scores":
            del node.attribute[:]
            node.input[0] = "far"
    at = next(index for index, node in enumerate(model.graph.node) if node.output[0] == "scores")
    model.graph.node.insert(at, helper.make_node("Sub", ["mean", "high"], ["far"]))


def answer_wrong_shape(model):
    model.graph.node[-1].output[0] = "answer"
    model.graph.node.append(helper.make_node("Transpose", ["answer"], ["output0"], perm=[0, 2, 1]))


def opset_of_the_future(model):
    model.opset_import[0].version = 9999


@pytest.mark.parametrize("edit", [opset_of_the_future, endless_memory, answer_nan, answer_logits, answer_wrong_shape])
def test_what_only_running_shows_fails_at_the_start(edit, tmp_path):
    try:
        bundle = sealed(changed(edit), tmp_path)
    except DeermlError as error:
        assert error.code in ("BAD_BUNDLE", "WRONG_SHAPE")
        return
    with pytest.raises(DeermlError) as caught:
        Detector(bundle, threads=1)
    assert caught.value.code in ("BAD_OUTPUT", "BAD_BUNDLE")


# -- sealing ------------------------------------------------------------------------------------------------------

def test_equal_parts_have_equal_bytes(candidate, tmp_path):
    first = seal(candidate, DRAFT, THRESHOLDS, "none", tmp_path / "here")
    second = seal(candidate, DRAFT, THRESHOLDS, "none", tmp_path / "there")
    assert first.digest == second.digest
    for name in ("model.onnx", "serving.json"):
        assert (first.path / name).read_bytes() == (second.path / name).read_bytes()


def test_thresholds_of_numpy_and_of_any_camera_name(candidate, tmp_path):
    name = "Südseite/1 \"alt\""
    thresholds = Thresholds(shared={"deer": np.float64(1 / 3)}, cameras={name: {"deer": np.float32(0.7)}})
    bundle = seal(candidate, DRAFT, thresholds, "drawn", tmp_path / "bundles")
    assert bundle.threshold(None, "deer") == 1 / 3
    assert bundle.threshold(name, "deer") == float(np.float32(0.7))


def test_many_seal_the_same_bundle_at_once(candidate, tmp_path):
    for turn in range(10):
        place = tmp_path / f"turn{turn}"
        with ThreadPoolExecutor(8) as pool:
            waiting = [pool.submit(seal, candidate, DRAFT, THRESHOLDS, "none", place) for _ in range(8)]
        digests = {sealing.result().digest for sealing in waiting}
        assert [path.name for path in place.iterdir()] == list(digests)


def test_a_crash_while_sealing_leaves_nothing_or_all(candidate, tmp_path, monkeypatch):
    steps = [(bundles, "write_file"), (bundles, "fsync_folder"), (Path, "rename"), (Path, "mkdir")]
    crashes = 0
    for owner, name in steps:
        original = getattr(owner, name)
        for nth in (1, 2):
            calls = []

            def failing(*args, original=original, nth=nth, calls=calls, **kwargs):
                calls.append(1)
                if len(calls) == nth:
                    raise KeyboardInterrupt
                return original(*args, **kwargs)

            home = tmp_path / f"{name}{nth}"
            home.mkdir()
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, failing)
                try:
                    seal(candidate, DRAFT, THRESHOLDS, "none", home)
                except KeyboardInterrupt:
                    crashes += 1
            for path in home.iterdir():
                Bundle.load(path)
            assert seal(candidate, DRAFT, THRESHOLDS, "none", home) == Bundle.load(next(home.iterdir()))
    assert crashes >= 5


def test_a_full_disk_leaves_nothing(candidate, tmp_path, monkeypatch):
    def full(path, *args, **kwargs):
        raise DeermlError("NO_SPACE", "The disk is full.")
    monkeypatch.setattr(bundles, "write_file", full)
    with pytest.raises(DeermlError, match="full"):
        seal(candidate, DRAFT, THRESHOLDS, "none", tmp_path / "bundles")
    assert not list((tmp_path / "bundles").iterdir())


def test_a_bundle_that_does_not_fit_its_description_is_not_stored(tmp_path):
    other = spot_draft(["deer", "fox"])
    (tmp_path / "model.onnx").write_bytes(MODEL)
    with pytest.raises(DeermlError) as caught:
        seal(tmp_path / "model.onnx", other, Thresholds(shared={"deer": 0.5, "fox": 0.5}), "none", tmp_path / "bundles")
    assert caught.value.code == "WRONG_SHAPE"
    with pytest.raises(DeermlError):
        Candidate(tmp_path / "model.onnx", other).model()
    assert not (tmp_path / "bundles").exists()


def test_the_name_of_the_folder_counts(bundle, tmp_path):
    renamed = tmp_path / "latest"
    shutil.copytree(bundle.path, renamed)
    with pytest.raises(DeermlError) as caught:
        Bundle.load(renamed)
    assert caught.value.code == "DIGEST"
    assert Bundle.load(renamed, expect_digest=bundle.digest).serving == bundle.serving


def test_serving_json_with_a_key_twice_is_refused(bundle):
    content = (bundle.path / "serving.json").read_bytes()
    twice = content.replace(b'"nms_iou":', b'"nms_iou":0.9,"nms_iou":')
    with pytest.raises(DeermlError) as caught:
        bundles.store_bundle(MODEL, twice, bundle.path.parent)
    assert caught.value.code == "BAD_BUNDLE"
    assert [path.name for path in bundle.path.parent.iterdir()] == [bundle.digest]
