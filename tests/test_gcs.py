"""Events in Google Cloud Storage: the real command and gcsfs, with a little server that
answers as Google's does. Of its habits, these matter here:

- An object that `gsutil cp -Z` has uploaded has the content encoding "gzip". A client
  that accepts gzip gets the bytes as they are stored, and ranges of them. Any other
  client gets the whole object decompressed, whatever range it asks for.
  https://cloud.google.com/storage/docs/transcoding
- Metadata may come compressed to a client that accepts gzip.
"""

import base64
import gzip
import http.server
import importlib.util
import json
import os
import random
import re
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

pytestmark = pytest.mark.skipif(
    not importlib.util.find_spec("gcsfs"), reason="needs pip install gcsfs"
)
SCRIPT = Path(__file__).resolve().parent.parent / "load_active_users.py"
BLOCK = 8 << 20  # bytes that the command asks for at once


def make_event(user: str, padding: str = "") -> bytes:
    """Return a line with an active event of 2019-12-31 in US/Central."""
    parameters = {"engagement_time_msec": "5000", "engaged_session_event": "1"}
    event = {
        "event_timestamp": "1577836800000000",
        "event_name": "user_engagement",
        "event_params": [
            {"key": key, "value": {"int_value": value}}
            for key, value in parameters.items()
        ],
        "user_pseudo_id": user,
        "padding": padding,
    }
    return json.dumps(event).encode() + b"\n"


def make_large_events() -> bytes:
    """Return events that are several blocks long even when they are compressed."""
    numbers = random.Random(0)
    paddings = (numbers.randbytes(50_000).hex() for _ in range(250))
    return b"".join(make_event(f"u{n}", text) for n, text in enumerate(paddings))


class Bucket:
    """What is stored, and what has been asked for."""

    def __init__(self) -> None:
        self.objects: dict[str, dict[str, Any]] = {}
        self.contents: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.compresses_metadata = False

    def store(self, name: str, content: bytes, **metadata: str) -> None:
        generation = str(1_700_000_000_000_000 + len(self.objects))
        self.contents[name] = content
        self.objects[name] = {
            "kind": "storage#object",
            "name": name,
            "bucket": "b",
            "size": str(len(content)),
            "generation": generation,
            "metageneration": "1",
            "etag": base64.b64encode(generation.encode()).decode(),
            "contentType": "application/json",
            "timeCreated": "2024-01-01T00:00:00.000Z",
            "updated": "2024-01-01T00:00:00.000Z",
            **metadata,
        }

    def store_encoded(self, name: str, events: bytes) -> int:
        """Store an object as `gsutil cp -Z` does. Return its size in bytes."""
        content = gzip.compress(events, 1, mtime=0)
        self.store(name, content, contentEncoding="gzip")
        return len(content)

    def take_requests(self) -> list[str]:
        """Return the requests since the last call, sorted."""
        requests, self.requests = sorted(self.requests), []
        return requests


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    bucket: Bucket

    def handle(self) -> None:
        with suppress(ConnectionError):  # gcsfs takes back what it no longer needs
            super().handle()

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = {key: value for key, (value,) in parse_qs(url.query).items()}
        self.bucket.headers.append({k.lower(): v for k, v in self.headers.items()})
        found = re.fullmatch(r"(?:/download)?/storage/v1/b/b/o(?:/(.*))?", url.path)
        name = unquote(found[1] or "") if found else ""
        if found and not name:
            self.bucket.requests.append("list")
            self.send_metadata(200, self.list_objects(query))
        elif name not in self.bucket.objects:
            self.bucket.requests.append("missing")
            self.send_metadata(404, {"error": {"code": 404, "message": "Not Found"}})
        elif query.get("alt") == "media":
            self.bucket.requests.append(f"media {name}")
            self.send_media(name)
        else:
            self.bucket.requests.append(f"get {name}")
            self.send_metadata(200, self.bucket.objects[name])

    def list_objects(self, query: dict[str, str]) -> dict[str, Any]:
        prefix = query.get("prefix", "")
        names = [name for name in self.bucket.objects if name.startswith(prefix)]
        items = [self.bucket.objects[name] for name in sorted(names)]
        return {"kind": "storage#objects", "items": items}

    def accepts_gzip(self) -> bool:
        return "gzip" in self.headers.get("Accept-Encoding", "")

    def send_metadata(self, status: int, value: Any) -> None:
        body = json.dumps(value).encode()
        headers = {"Content-Type": "application/json; charset=UTF-8"}
        if self.bucket.compresses_metadata and self.accepts_gzip():
            body = gzip.compress(body)
            headers["Content-Encoding"] = "gzip"
        self.send(status, headers, body)

    def send_media(self, name: str) -> None:
        body = self.bucket.contents[name]
        headers = {"Content-Type": "application/json"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if self.bucket.objects[name].get("contentEncoding") == "gzip":
            if self.accepts_gzip():
                headers["Content-Encoding"] = "gzip"
            else:
                body, wanted = gzip.decompress(body), None
        if wanted:
            first, last = int(wanted[1]), min(int(wanted[2]), len(body) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(body)}"
            body = body[first : last + 1]
        self.send(206 if wanted else 200, headers, body)

    def send(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def serve(handler: type[http.server.BaseHTTPRequestHandler]) -> Iterator[str]:
    """Run a web server. Yield its host and port."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class Google(Bucket):
    """The bucket, its server, and the command that loads from it."""

    def __init__(self, directory: Path, address: str) -> None:
        super().__init__()
        self.directory = directory
        self.environment = {
            "STORAGE_EMULATOR_HOST": address,
            "NO_GCE_CHECK": "true",
        }

    def run(
        self, *arguments: str, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        names = ("http_proxy", "https_proxy", "no_proxy", "all_proxy", "netrc")
        inherited = {k: v for k, v in os.environ.items() if k.lower() not in names}
        return subprocess.run(
            [sys.executable, str(SCRIPT), *arguments],
            cwd=self.directory,
            env={
                **inherited,
                "HOME": str(self.directory),
                **self.environment,
                **environment,
            },
            capture_output=True,
            text=True,
            timeout=120,
        )

    def load(self, *arguments: str, **environment: str) -> dict[str, Any]:
        """Return the report of a load that succeeds and says nothing."""
        done = self.run("--format", "json", *arguments, **environment)
        assert (done.returncode, done.stderr) == (0, "")
        report: dict[str, Any] = json.loads(done.stdout)
        return report

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        with closing(sqlite3.connect(self.directory / "active_user_table.db")) as db:
            return db.execute(sql).fetchall()


@pytest.fixture
def google(tmp_path: Path) -> Iterator[Google]:
    class OwnHandler(Handler):
        pass

    with serve(OwnHandler) as address:
        OwnHandler.bucket = google = Google(tmp_path, address)
        yield google


SMALL = make_event("a") + make_event("b")


@pytest.mark.parametrize("compresses_metadata", [False, True])
def test_objects_of_content_encoding_gzip(
    google: Google, compresses_metadata: bool
) -> None:
    """They are read as they are stored, and the large one in several ranges."""
    google.compresses_metadata = compresses_metadata
    google.store_encoded("small.json", SMALL)
    assert google.store_encoded("large.json", make_large_events()) > BLOCK
    assert google.load("gs://b/small.json")["lines"] == 2
    google.headers.clear()
    assert google.load("gcs://b/large.json")["lines"] == 250
    ranges = {headers["range"] for headers in google.headers if "range" in headers}
    assert len(ranges) > 1


def test_other_objects_beside_them(google: Google) -> None:
    """Compressed or not, they come as before, and the sizes are those stored."""
    google.compresses_metadata = True
    google.store("plain.json", SMALL)
    google.store("packed.json.gz", gzip.compress(SMALL))
    size = google.store_encoded("encoded.json", SMALL)
    assert google.load("gs://b/*.json*")["lines"] == 6
    versions = dict(google.query("SELECT path, version FROM loaded_file"))
    etag = google.objects["encoded.json"]["etag"]
    assert versions["gs://b/encoded.json"] == f"{size} {etag}"
    assert len(versions) == 3


def test_unchanged_objects_cost_one_request(google: Google) -> None:
    for number in range(5):
        google.store_encoded(f"{number}.json.gz", make_event(f"u{number}"))
    url = "gs://b/*.json.gz"
    assert google.load("--incremental", url)["skipped_files"] == 0
    google.take_requests()
    for _ in range(2):
        assert google.load("--incremental", url)["skipped_files"] == 5
        assert google.take_requests() == ["list"]
    google.store_encoded("5.json.gz", make_event("u5"))
    report = google.load("--incremental", url)
    assert (report["skipped_files"], report["lines"]) == (5, 1)
    asked = {request for request in google.take_requests() if request != "list"}
    assert asked == {"get 5.json.gz", "media 5.json.gz"}


def test_quiet(google: Google) -> None:
    """Nothing is said, neither of a session that is open when the program ends."""
    google.store_encoded("a.json", SMALL)
    done = google.run("-q", "gs://b/a.json", PYTHONWARNINGS="always")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_proxy(google: Google) -> None:
    """All requests go through it: its address is the only one that exists."""
    google.store_encoded("a.json", SMALL)
    proxy = {"http_proxy": f"http://{google.environment['STORAGE_EMULATOR_HOST']}"}
    google.environment["STORAGE_EMULATOR_HOST"] = "storage.example"
    assert google.load("gs://b/a.json", **proxy)["lines"] == 2
    assert {headers["host"] for headers in google.headers} == {"storage.example"}


def test_processes_that_scan(google: Google) -> None:
    """They are forked, and gcsfs must have used no gRPC until then."""
    google.store("large.json", make_large_events() * 3)
    settings = json.dumps({"token": "anon", "retry_timeout": 1})
    report = google.load("--workers", "2", "gs://b/large.json", FSSPEC_GS=settings)
    assert report["lines"] == 750


def test_the_settings_of_a_user_stay(google: Google) -> None:
    """A token in fsspec's settings is sent, whatever passwords are in ~/.netrc."""
    google.store_encoded("a.json", SMALL)
    file = google.directory / ".netrc"
    file.write_text("default login bob password S3CRT\n")
    file.chmod(0o600)
    token = {"FSSPEC_GS_TOKEN": "T0KEN", "FETCH_RAW_TOKEN_EXPIRY": "false"}
    assert google.load("gs://b/a.json", **token)["lines"] == 2
    sent = {headers.get("authorization") for headers in google.headers}
    assert sent == {"Bearer T0KEN"}
