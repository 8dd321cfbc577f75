"""A Google Drive on loopback: version 2 of the API as PyDrive2 calls it, and the three OAuth addresses it needs.

What a client sees follows its permissions, as at Google: with `drive.file` only what the same client made, with
`drive.readonly` everything, and only its own to change. `fault` makes the n-th call fail in one of the ways of `FAULTS`.
"""
import base64
import hashlib
import json
import re
import secrets
import threading
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlencode, urlparse

FOLDER = "application/vnd.google-apps.folder"
SCOPE = "https://www.googleapis.com/auth/"
OWN, SEE, ALL = SCOPE + "drive.file", SCOPE + "drive.readonly", SCOPE + "drive"
ROOT = "0AroOtOfThisDrive"  # "root" is another name for it in questions, and never in answers
PIECE = 256 * 1024  # every piece of an upload but the last is a multiple of this
NO_QUOTA = "Service Accounts do not have storage quota. Leverage shared drives, or use OAuth delegation instead."
FAULTS = {  # status, reason; or a word for what the connection does
    "500": (500, "internalError"), "503": (503, "backendError"), "429": (429, "rateLimitExceeded"), "rate": (403, "userRateLimitExceeded"),
    "full": (403, "storageQuotaExceeded"), "daily": (403, "dailyLimitExceeded"), "401": (401, "authError"), "html": (502, ""),
    "drop": "closed before anything is done", "lost": "done, but the answer is lost", "torn": "half of the answer",
}


@dataclass
class File:
    id: str
    title: str
    parents: list[str]
    made_by: str  # the OAuth client
    folder: bool = False
    data: bytes = b""
    drive: str | None = None  # the id of a shared drive
    created: str = ""
    modified: str = ""
    trashed: bool = False


@dataclass
class Upload:
    client: str
    body: dict
    over: str | None
    total: int
    got: bytearray = field(default_factory=bytearray)
    done: str | None = None  # the id of the file it became


@dataclass
class Grant:
    "What a token stands for"

    client: str
    scopes: tuple[str, ...]
    service: bool = False


class DriveServer:
    "Started by `with`; everything it knows may be looked at"

    email = "owner@example.org"

    def __init__(self):
        self.files = {ROOT: File(ROOT, "My Drive", [], "nobody", folder=True)}
        self.uploads: dict[str, Upload] = {}
        self.refresh: dict[str, Grant] = {}
        self.access: dict[str, Grant] = {}
        self.codes: dict[str, tuple[Grant, str]] = {}
        self.total, self.key_days, self.unticked, self.page = 15 << 30, None, (), 1000
        self.faults: dict[int, str] = {}
        self.calls: list[str] = []
        self.moved: Counter[str] = Counter()  # bytes of contents, "in" and "out"
        self.bend = ""  # "in" or "out": a byte of every content that passes is changed
        self.stall_at: int | None = None  # this many bytes of an upload, and then silence
        self.stalled, self.go_on = threading.Event(), threading.Event()
        self.lock, self.ticks = threading.RLock(), 0
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads, self.http.drive = True, self
        self.address = f"http://127.0.0.1:{self.http.server_port}"

    def __enter__(self):
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.go_on.set()
        self.http.shutdown()
        self.http.server_close()

    # -- for tests

    def fault(self, number: int, kind: str, times: int = 1) -> None:
        "The call after `number` others fails, `times` times. Token calls count too."
        assert kind in FAULTS
        self.faults |= {len(self.calls) + number + turn: kind for turn in range(times)}

    def login(self, client="server", scopes=(OWN, SEE), service=False) -> str:
        "A refresh token, as a person's consent gives it"
        key = f"refresh-{secrets.token_hex(8)}"
        self.refresh[key] = Grant(client, tuple(scopes), service)
        return key

    def revoke(self) -> None:
        "The owner takes every permission back"
        self.refresh.clear()
        self.access.clear()

    def path_of(self, file: File) -> str:
        above = self.files[file.parents[0]] if file.parents else None
        return file.title if above is None or above.id == ROOT else f"{self.path_of(above)}/{file.title}"

    def tree(self) -> dict[str, bytes]:
        "What a person sees on the Drive: paths and contents"
        return {self.path_of(file): file.data for file in list(self.files.values()) if not file.folder and not file.trashed}

    def mounted_write(self, path: str, data: bytes) -> File:
        "A person's notebook writes through the mounted Drive, which is a client of Google's own"
        parent = ROOT
        *folders, title = path.split("/")
        for name in folders:
            found = [file for file in self.files.values() if file.folder and file.title == name and parent in file.parents and not file.trashed]
            parent = (found[0] if found else self.add(name, parent, "mounted", folder=True)).id
        for old in self.files.values():
            if old.title == title and parent in old.parents:
                old.trashed = True  # a rename over a file: the mount keeps the new one's id
        return self.add(title, parent, "mounted", data=data)

    def add(self, title: str, parent: str, client: str, **more) -> File:
        now = self.now()
        file = File(more.pop("id", None) or secrets.token_hex(14), title, [parent], client, created=now, modified=now, drive=self.files[parent].drive, **more)
        self.files[file.id] = file
        return file

    def now(self) -> str:
        self.ticks += 1
        return (datetime(2026, 11, 1, tzinfo=UTC) + timedelta(milliseconds=self.ticks)).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class Refused(Exception):
    def __init__(self, status: int, reason: str, message: str = ""):
        self.status, self.reason, self.message = status, reason, message or reason


class Handler(BaseHTTPRequestHandler):
    protocol_version, disable_nagle_algorithm = "HTTP/1.1", True

    @property
    def drive(self) -> DriveServer:
        return self.server.drive

    def log_message(self, *_):
        pass

    def handle_one_request(self):
        try:
            super().handle_one_request()
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def answer_call(self):
        url = urlparse(self.path)
        self.query = {name: values[0] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
        method = self.headers.get("X-HTTP-Method-Override", self.command)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.drive.lock:
            number = len(self.drive.calls)
            self.drive.calls.append(f"{method} {url.path}")
            kind = self.drive.faults.pop(number, None)
        if kind == "drop":
            self.close_connection = True
            return
        if kind in FAULTS and isinstance(FAULTS[kind], tuple):
            self.send(*self.refusal(*FAULTS[kind]))
            return
        try:
            with self.drive.lock:
                reply = self.route(method, url.path, body)
        except Refused as refused:
            reply = self.refusal(refused.status, refused.reason, refused.message)
        if self.drive.stalled.is_set() and not self.drive.go_on.is_set():
            self.drive.go_on.wait(30)
        if kind == "lost":
            self.close_connection = True
            return
        self.send(*reply, torn=kind == "torn")

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = answer_call

    def send(self, status: int, body: dict | bytes = b"", headers: dict | None = None, torn: bool = False) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/octet-stream" if isinstance(body, bytes) else "application/json; charset=UTF-8")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[:len(data) // 2] if torn else data)
        self.close_connection |= torn

    def refusal(self, status: int, reason: str, message: str = ""):
        if not reason:
            return status, b"<html>Bad gateway</html>"
        headers = {"Retry-After": "1"} if status == 429 else None
        return status, {"error": {"code": status, "message": message or reason, "errors": [{"domain": "usageLimits", "reason": reason, "message": message or reason}]}}, headers

    def route(self, method: str, path: str, body: bytes):
        if path in ("/auth", "/token"):
            return getattr(self, path[1:])({name: values[0] for name, values in parse_qs(body.decode()).items()})
        self.grant = self.drive.access.get(self.headers.get("Authorization", "").removeprefix("Bearer "))
        if self.grant is None:
            raise Refused(401, "authError", "Invalid Credentials")
        if path.startswith("/upload/drive/v2/files"):
            return self.upload(path, body)
        told = re.fullmatch(r"/drive/v2/(about|files)(?:/([^/]+))?(?:/(trash))?", path)
        if not told:
            raise Refused(404, "notFound")
        kind, item, verb = told[1], unquote(told[2] or ""), told[3]
        if kind == "about":
            return 200, {"kind": "drive#about", "user": {"emailAddress": self.drive.email}, "rootFolderId": ROOT, "quotaType": "LIMITED", "quotaBytesUsed": str(self.used()),
                         "quotaBytesTotal": "0" if self.grant.service else str(self.drive.total)}
        if item == "generateIds":
            return 200, {"kind": "drive#generatedIds", "space": "drive", "ids": [secrets.token_hex(14) for _ in range(int(self.query["maxResults"]))]}
        if not item:
            return self.listed() if method == "GET" else self.inserted(json.loads(body))
        return self.on_one(method, self.seen(item), verb)

    # -- OAuth

    def auth(self, _):
        "The consent page, where the owner has said yes"
        asked = self.query
        assert asked["code_challenge_method"] == "S256" and asked["access_type"] == "offline" and asked["response_type"] == "code"
        code, scopes = secrets.token_hex(6), tuple(one for one in asked["scope"].split() if one not in self.drive.unticked)
        self.drive.codes[code] = Grant(asked["client_id"], scopes), asked["code_challenge"]
        back = urlencode({"state": asked["state"], "code": code, "scope": " ".join(scopes)})
        return 302, b"", {"Location": f"{asked['redirect_uri']}?{back}"}

    def token(self, form):
        more, kind = {}, form["grant_type"]
        if kind == "refresh_token":
            grant = self.drive.refresh.get(form["refresh_token"])
            if grant and form.get("scope"):
                grant = Grant(grant.client, tuple(one for one in form["scope"].split() if one in grant.scopes), grant.service)
        elif kind == "authorization_code":
            grant, challenge = self.drive.codes.pop(form["code"], (None, ""))
            proof = base64.urlsafe_b64encode(hashlib.sha256(form["code_verifier"].encode()).digest()).decode().rstrip("=")
            grant = grant if proof == challenge else None
            if grant:
                more["refresh_token"] = self.drive.login(grant.client, grant.scopes)
                if self.drive.key_days:
                    more["refresh_token_expires_in"] = self.drive.key_days * 86400
        else:  # a service account signs its wish
            claims = json.loads(base64.urlsafe_b64decode(form["assertion"].split(".")[1] + "=="))
            grant = Grant(claims["iss"], tuple(claims["scope"].split()), service=True)
        if grant is None:
            return 400, {"error": "invalid_grant", "error_description": "Token has been expired or revoked."}
        key = f"access-{secrets.token_hex(8)}"
        self.drive.access[key] = grant
        return 200, {"access_token": key, "expires_in": 3599, "scope": " ".join(grant.scopes), "token_type": "Bearer", **more}

    # -- files

    def sees(self, file: File) -> bool:
        return file.id == ROOT or file.made_by == self.grant.client or bool({ALL, SEE} & set(self.grant.scopes))

    def may_change(self, file: File) -> bool:
        return ALL in self.grant.scopes or OWN in self.grant.scopes and (file.made_by == self.grant.client or file.id == ROOT)

    def seen(self, item: str) -> File:
        file = self.drive.files.get(ROOT if item == "root" else item)
        if file is None or not self.sees(file):
            raise Refused(404, "notFound", f"File not found: {item}")
        return file

    def changeable(self, item: str) -> File:
        file = self.seen(item)
        if not self.may_change(file):
            raise Refused(403, "appNotAuthorizedToFile", "The user has not granted the app access to the file.")
        return file

    def used(self) -> int:
        return sum(len(file.data) for file in self.drive.files.values())

    def meta(self, file: File) -> dict:
        told = {
            "kind": "drive#file", "id": file.id, "title": file.title, "mimeType": FOLDER if file.folder else "application/octet-stream",
            "parents": [{"kind": "drive#parentReference", "id": parent, "isRoot": parent == ROOT} for parent in file.parents],
            "createdDate": file.created, "modifiedDate": file.modified, "labels": {"trashed": self.is_trashed(file)},
            "isAppAuthorized": file.made_by == self.grant.client, "alternateLink": f"https://drive.google.com/drive/folders/{file.id}",
        }
        if file.drive:
            told["driveId"] = file.drive
        if not file.folder:
            told |= {"fileSize": str(len(file.data)), "md5Checksum": hashlib.md5(file.data).hexdigest(), "sha256Checksum": hashlib.sha256(file.data).hexdigest()}
        return told

    def only_asked(self, told: dict) -> dict:
        fields = re.sub(r".*items\((.*)\)$", r"\1", self.query.get("fields", "")).strip()
        names = set(re.sub(r"\([^)]*\)", "", fields).split(",")) if fields else set(told)
        return {name: value for name, value in told.items() if name in names}

    def is_trashed(self, file: File) -> bool:
        return file.trashed or any(self.is_trashed(self.drive.files[parent]) for parent in file.parents)

    def listed(self):
        wish = self.query["q"]
        quoted = r"'((?:[^'\\]|\\.)*)'"
        parents = [ROOT if parent == "root" else parent for parent in re.findall(quoted + " in parents", wish)]
        title = re.search("title = " + quoted, wish)
        assert "trashed = false" in wish and self.query["supportsAllDrives"] == "true" and self.query["includeItemsFromAllDrives"] == "true"
        found = [file for file in self.drive.files.values() if self.sees(file) and set(file.parents) & set(parents) and not self.is_trashed(file)]
        if title:
            found = [file for file in found if file.title.lower() == re.sub(r"\\(.)", r"\1", title[1]).lower()]
        start, many = int(self.query.get("pageToken", 0)), min(int(self.query["maxResults"]), self.drive.page)
        page = {"kind": "drive#fileList", "items": [self.only_asked(self.meta(file)) for file in found[start:start + many]]}
        return 200, page | ({"nextPageToken": str(start + many)} if start + many < len(found) else {})

    def parent_for(self, body: dict) -> File:
        parent = self.seen((body.get("parents") or [{"id": "root"}])[0]["id"])
        if not self.may_change(parent):
            raise Refused(403, "appNotAuthorizedToFile", "The user has not granted the app write access to the folder.")
        return parent

    def inserted(self, body: dict):
        assert body["mimeType"] == FOLDER, "contents come by upload"
        parent = self.parent_for(body)
        if body.get("id") in self.drive.files:
            raise Refused(409, "conflict", "A file already exists with the provided ID.")
        return 200, self.only_asked(self.meta(self.drive.add(body["title"], parent.id, self.grant.client, folder=True, id=body.get("id"))))

    def on_one(self, method: str, file: File, verb: str | None):
        if verb == "trash":
            self.changeable(file.id).trashed = True
        elif method == "GET" and self.query.get("alt") == "media":
            return self.content(file.data)
        elif method != "GET":
            raise Refused(400, "notBuilt")
        return 200, self.only_asked(self.meta(file))

    def content(self, data: bytes):
        wish = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not wish:
            return 200, data
        first, last = int(wish[1]), min(int(wish[2]), len(data) - 1)
        if first >= len(data):
            return 416, b"", {"Content-Range": f"bytes */{len(data)}"}
        self.drive.moved["out"] += last + 1 - first
        data = b"?" + data[1:] if self.drive.bend == "out" else data
        return 206, data[first:last + 1], {"Content-Range": f"bytes {first}-{last}/{len(data)}"}

    # -- uploads

    def upload(self, path: str, body: bytes):
        if "upload_id" not in self.query:
            return self.begun(path.removeprefix("/upload/drive/v2/files").strip("/") or None, json.loads(body or b"{}"))
        session = self.drive.uploads.get(self.query["upload_id"])
        if session is None or session.client != self.grant.client:
            raise Refused(404, "notFound")
        wish = re.fullmatch(r"bytes (?:(\d+)-(\d+)|\*)/(\d+)", self.headers.get("Content-Range", ""))
        if not session.done and wish and wish[1] is not None:
            self.piece(session, int(wish[1]), body, int(wish[2]), int(wish[3]))
        if not session.done and len(session.got) == session.total:
            session.done = self.became(session).id
        if session.done:
            return 200, self.only_asked(self.meta(self.drive.files[session.done]))
        return 308, b"", {"Range": f"bytes=0-{len(session.got) - 1}"} if session.got else {}

    def begun(self, over: str | None, body: dict):
        self.parent_for(body) if over is None else self.changeable(over)
        size = int(self.headers["X-Upload-Content-Length"])
        if self.grant.service and not (self.drive.files[over] if over else self.parent_for(body)).drive:
            raise Refused(403, "storageQuotaExceeded", NO_QUOTA)
        if self.used() + size > self.drive.total:
            raise Refused(403, "storageQuotaExceeded", "The user's Drive storage quota has been exceeded.")
        key = secrets.token_hex(8)
        self.drive.uploads[key] = Upload(self.grant.client, body, over, size)
        fields = f"&fields={quote(self.query['fields'])}" if "fields" in self.query else ""
        return 200, b"", {"Location": f"{self.drive.address}{urlparse(self.path).path}?uploadType=resumable&upload_id={key}{fields}"}

    def piece(self, session: Upload, first: int, body: bytes, last: int, total: int):
        assert total == session.total and len(body) == last - first + 1
        if first > len(session.got) or last + 1 != total and len(body) % PIECE:
            raise Refused(400, "badRequest")
        self.drive.moved["in"] += len(body)
        session.got[first:] = b"?" + body[1:] if self.drive.bend == "in" else body
        if self.drive.stall_at is not None and len(session.got) >= self.drive.stall_at:
            self.drive.stalled.set()

    def became(self, session: Upload) -> File:
        if session.over is None:
            return self.drive.add(session.body["title"], self.parent_for(session.body).id, session.client, data=bytes(session.got))
        file = self.drive.files[session.over]
        file.data, file.modified = bytes(session.got), self.drive.now()
        return file
