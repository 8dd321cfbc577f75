"""What a push costs after 10 new photographs in a version of 10,000, against copying the dataset file by file.

    python benchmarks/sync.py                       # about two minutes
    python benchmarks/sync.py --images 500 --new 10

Counted are calls of the remote and bytes that are sent. The peers copy the same dataset as single files, which they compare
with what lies there by name, size and hash: PyDrive2 is run for real against a stand-in for Google's server in this
process, which counts its requests (`pip install 'deerml[drive]'`); rclone's requests are counted from what it documents:
a listing for each folder in pages of 1,000, one request for each file to send. The photographs that are there already are
small drawings, so that they fit on the disk; the new ones have the size of a camera's.
"""
import argparse
import json
import logging
import math
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from deerml.capture.store import NewFrame, Store, image_path, insert_rows  # noqa: E402
from deerml.capture.truth import BoxVerdict, FrameStatement, record  # noqa: E402
from deerml.core.box import Box  # noqa: E402
from deerml.core.clock import parse_time  # noqa: E402
from deerml.core.durable import sha256_bytes  # noqa: E402
from deerml.core.image import read_header  # noqa: E402
from deerml.core.settings import Home  # noqa: E402
from deerml.data.pull import files_of  # noqa: E402
from deerml.data.push import push_dataset  # noqa: E402
from deerml.data.remote import FolderRemote  # noqa: E402
from deerml.data.shelf import Shelf, read_shelf, step_name  # noqa: E402
from deerml.data.split import split_of  # noqa: E402
from deerml.data.version import freeze  # noqa: E402

START, DAYS = parse_time("2026-01-01T18:00:00Z"), 200
PAGE = 1000  # files in a page of a listing, Google Drive's most


class Counted:
    "A remote that counts calls and the bytes that are sent"

    def __init__(self, inner):
        self.inner, self.place, self.calls, self.sent = inner, inner.place, [], 0

    def __getattr__(self, operation):
        def call(name, *rest):
            self.calls.append(operation)
            if operation in ("put", "replace"):
                self.sent += rest[0].stat().st_size if isinstance(rest[0], Path) else len(rest[0])
            return getattr(self.inner, operation)(name, *rest)
        return call


def drawing(seed: int, size: tuple[int, int]) -> bytes:
    "A JPEG that nothing else has, smooth as a photograph is"
    few = np.random.default_rng(seed).integers(0, 255, (max(size[1] // 12, 4), max(size[0] // 12, 4), 3), np.uint8)
    return cv2.imencode(".jpg", cv2.resize(few, size, interpolation=cv2.INTER_CUBIC), [cv2.IMWRITE_JPEG_QUALITY, 92])[1].tobytes()


def add(store: Store, seeds: range, size: tuple[int, int], nights: list[int]) -> None:
    "Reviewed frames with a deer. Written without syncing each file: this is not what is measured."
    for start in range(seeds.start, seeds.stop, 1000):
        some = range(start, min(start + 1000, seeds.stop))
        new = [NewFrame(drawing(seed, size), "benchmark", str(seed), camera="gate", taken_at=START + timedelta(days=nights[seed % len(nights)], minutes=seed % 600), trigger="scheduled") for seed in some]
        hashes = [sha256_bytes(one.data) for one in new]
        for one, sha256 in zip(new, hashes):
            path = image_path(store.home.images, sha256, "jpeg")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(one.data)
        ids = insert_rows(store, new, [read_header(one.data) for one in new], hashes).ids
        box = Box(size[0] / 4, size[1] / 4, size[0] / 3, size[1] / 3)
        record(store, "ann", [event for frame_id in ids for event in (BoxVerdict(frame_id, "missed", "deer", box), FrameStatement(frame_id, "all_boxed", ("deer",)))])


def tree(shelf: Shelf, sizes: dict[str, int]) -> dict[str, tuple[int, str]]:
    "The dataset as single files: size and hash by path"
    files = {name: (len(content), sha256_bytes(content)) for name, content in files_of(shelf).items()}
    return files | {f"images/{one.split}/{image}.jpg": (sizes[image], image) for image, one in shelf.labels.items()}


def sizes_of(remote: FolderRemote) -> dict[str, int]:
    import io
    import tarfile
    found = {}
    for entry in remote.list("data/packs/"):
        with tarfile.open(fileobj=io.BytesIO(remote.get(entry.name))) as archive:
            found |= {member.name[7:-4]: member.size for member in archive}
    return found


def to_send(before: dict, after: dict) -> dict[str, int]:
    return {name: size for name, (size, sha256) in after.items() if before.get(name, (0, ""))[1] != sha256}


def rclone_requests(before: dict, after: dict) -> int:
    "A listing for each folder, in pages, and one request for each file: it sends files under 8 MB in one"
    folders = {name.rpartition("/")[0] for name in before}
    inside = [sum(name.rpartition("/")[0] == folder for name in before) for folder in folders]
    return sum(max(math.ceil(count / PAGE), 1) for count in inside) + len(to_send(before, after))


class StandIn:
    "As much of Google Drive as PyDrive2 asks for here, without a network; requests and bytes are counted"

    def __init__(self, folders: dict[str, list[str]]):
        self.folders, self.requests, self.sent, self.credentials = folders, 0, 0, None

    def request(self, uri, method="GET", body=None, headers=None, **_):
        from urllib.parse import parse_qs, urlparse

        import httplib2
        self.requests += 1
        if body is not None:
            self.sent += len(body if isinstance(body, (bytes, str)) else body.read())
        answer = {"status": "200", "content-type": "application/json"}
        if "uploadType=resumable" in uri:
            return httplib2.Response(answer | {"location": "https://www.googleapis.com/session"}), b"{}"
        if method == "PUT":
            return httplib2.Response(answer), b'{"id": "x", "title": "x"}'
        asked = parse_qs(urlparse(uri).query)
        names, at = self.folders[asked["q"][0].split("'")[1]], int(asked.get("pageToken", ["0"])[0])
        page = {"items": [{"id": name, "title": name, "md5Checksum": "0", "fileSize": "0"} for name in names[at:at + PAGE]]}
        return httplib2.Response(answer), json.dumps(page | ({"nextPageToken": str(at + PAGE)} if at + PAGE < len(names) else {})).encode()


def pydrive2(before: dict, after: dict) -> tuple[int, int] | None:  # requests, bytes; None when it is not installed
    "A loop over the files with PyDrive2, as its documentation has it: list each folder, then upload what is new or changed"
    try:
        from pydrive2.auth import GoogleAuth
        from pydrive2.drive import GoogleDrive
    except ImportError:
        return None
    names: dict[str, list[str]] = {}
    for name in before:
        folder, _, title = name.rpartition("/")
        names.setdefault(folder.replace("/", "-") or "top", []).append(title)
    server = StandIn(names)
    auth = GoogleAuth(settings={"client_config_backend": "settings", "client_config": {"client_id": "x", "client_secret": "x", "auth_uri": "x", "token_uri": "x", "redirect_uri": "x", "revoke_uri": None}, "oauth_scope": ["x"], "get_refresh_token": False, "save_credentials": False})
    auth._build_http = lambda: server
    auth.credentials = type("Credentials", (), {"access_token_expired": False, "authorize": lambda self, http: http, "access_token": "x"})()
    drive = GoogleDrive(auth)
    there = {(folder, one["title"]): one["id"] for folder in names for one in drive.ListFile({"q": f"'{folder}' in parents and trashed=false"}).GetList()}
    with tempfile.TemporaryDirectory() as scratch:
        for name, size in to_send(before, after).items():
            path = Path(scratch) / "file"
            path.write_bytes(bytes(size))
            folder, _, title = name.rpartition("/")
            folder = folder.replace("/", "-") or "top"
            known = {"id": there[folder, title]} if (folder, title) in there else {}
            file = drive.CreateFile({"title": title, "parents": [{"id": folder}], **known})
            file.SetContentFile(str(path))
            file.Upload()
    return server.requests, server.sent


def s3_requests(store: Store) -> tuple[int, str]:
    "Requests of the same push to S3, as moto's server speaks it; -1 and the reason where it is not installed"
    try:
        import os

        import s3fs
        from moto.server import ThreadedMotoServer

        from deerml.data.bucket import FsspecRemote
    except ImportError as error:
        return -1, f"not counted: {error}"
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server.start()
    host, port = server.get_host_and_port()
    os.environ.update(AWS_ACCESS_KEY_ID="x", AWS_SECRET_ACCESS_KEY="x", AWS_DEFAULT_REGION="us-east-1", AWS_ENDPOINT_URL=f"http://{host}:{port}")
    s3fs.S3FileSystem().mkdir("yard")
    remote, counts = FsspecRemote("s3://yard/deerml"), []
    push_dataset(store, remote, "v0001")
    original = s3fs.S3FileSystem._call_s3

    async def counted(self, method, *arguments, **named):
        counts.append(method)
        return await original(self, method, *arguments, **named)

    s3fs.S3FileSystem._call_s3 = counted
    push_dataset(store, remote, "v0002")
    s3fs.S3FileSystem._call_s3 = original
    server.stop()
    return len(counts), ", ".join(counts)


def row(name: str, ours: float, peer: float | None, peer_name: str, floor: float | None, target: float, unit: str, note: str) -> dict:
    "Where a peer stands there, the ratio says how many times more it needs; else how much more than the floor we need"
    ratio = peer / max(ours, 1) if peer is not None else ours / floor if floor else None
    return {"name": name, "ours": ours, "peer": peer, "peer_name": peer_name, "floor": floor, "ratio": ratio and round(ratio, 3), "target": target, "ok": bool(ours <= target), "unit": unit, "note": note}


def measure(folder: Path, images: int, new: int, wide: int) -> list[dict]:
    (folder / "drive").mkdir()
    store = Store.open(Home.create(folder / "yard", exam_nights=0, negatives_share=0, remote=str(folder / "drive"), leave="labelled", people="show"))
    nights = [n for n in range(DAYS) if split_of("deerml", f"gate/{(START + timedelta(days=n)).date()}") != "test"]
    training = [n for n in nights if split_of("deerml", f"gate/{(START + timedelta(days=n)).date()}") == "train"]
    add(store, range(images), (64, 48), nights)
    freeze(store, START + timedelta(days=2 * DAYS), force=True)
    remote = FolderRemote(folder / "drive")
    push_dataset(store, remote)
    before = read_shelf(remote)
    add(store, range(images, images + new), (wide, wide * 9 // 16), training[-1:])
    freeze(store, START + timedelta(days=2 * DAYS), force=True)
    counted, start = Counted(remote), time.perf_counter()
    done = push_dataset(store, counted)
    seconds = time.perf_counter() - start
    again = Counted(remote)
    push_dataset(store, again)
    after, sizes = read_shelf(remote), sizes_of(remote)
    assert (len(before.labels), done.new, done.snapshot) == (images, new, False)
    copies = sum(sizes[image] for image in after.labels if image not in before.labels)
    delta = len(remote.get(step_name(after.digest)))
    files = tree(before, sizes), tree(after, sizes)
    theirs, by_count = pydrive2(*files), rclone_requests(*files)
    on_s3, which = s3_requests(store)
    what, missing = f"{new} new in {images}", "PyDrive2 is not installed: pip install 'deerml[drive]'"
    rows = [
        row(f"calls of a push, {what}", len(counted.calls), theirs and theirs[0], "PyDrive2", 4, 6, "calls", f"ours: {', '.join(counted.calls)}, {seconds:.1f} s with a folder; PyDrive2: " + ("listings of 1,000 and two requests for each of the changed files, counted" if theirs else missing)),
        row(f"calls of a push, {what}, rclone", len(counted.calls), by_count, "rclone", 4, 6, "calls", "rclone by count: a listing for each folder in pages of 1,000, one request for each changed file"),
        row(f"bytes of a push, {what}", counted.sent, theirs and theirs[1], "PyDrive2", copies + delta, round(1.05 * copies + delta), "bytes", f"photographs {copies} + delta {delta}; ours is {counted.sent / (copies + delta):.4f} of that; target 5 % over the photographs plus the delta"),
        row("bytes of a second push", again.sent, None, "", None, 0, "bytes", f"calls: {', '.join(again.calls)}; a program that lists asks {by_count - len(to_send(*files))} times to learn the same"),
        row(f"requests to S3, {what}", on_s3, None, "", 4, 6, "requests", which),
    ]
    store.close()
    return [one for one in rows if one["ours"] >= 0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--new", type=int, default=10)
    parser.add_argument("--wide", type=int, default=1280, help="width of the new photographs in pixels")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="deerml-sync-") as folder:
        rows = measure(Path(folder).resolve(), arguments.images, arguments.new, arguments.wide)
    print(f"{'what':48} {'ours':>10} {'peer':>10} {'floor':>10} {'at most':>10}")
    for one in rows:
        cells = [f"{one[name]:>10}" if one[name] is not None else f"{'-':>10}" for name in ("ours", "peer", "floor", "target")]
        print(f"{one['name']:48} {' '.join(cells)} {one['unit']:9} {one['peer_name']:9} {'ok' if one['ok'] else 'MISSED'}")
        print(f"    {one['note']}")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
