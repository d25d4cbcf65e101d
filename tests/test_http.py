"""Events of web servers: the real command, with little servers that compress, are
reached through a proxy, or want a password."""

import base64
import gzip
import http.server
import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(
    not importlib.util.find_spec("aiohttp"), reason="needs pip install aiohttp"
)
ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "load_active_users.py"
SAMPLE = (ROOT / "data" / "bq-results-sample-data.jsons").read_bytes()
LINES = 1000


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves the sample under any name, and to a proxy's clients under any host."""

    requests: list[str]
    body = SAMPLE
    is_encoded = False  # compressed, whether the client accepts that or not
    password = ""  # "USER:PASSWORD", if one is wanted

    def do_GET(self) -> None:
        self.requests.append(f"{self.command} {self.path}")
        body = self.body
        given = base64.b64decode(self.headers.get("Authorization", "")[len("Basic ") :])
        self.send_response(200 if given.decode() == self.password else 401)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        self.send_header("ETag", '"1"')
        if self.is_encoded:
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815

    def do_CONNECT(self) -> None:
        self.requests.append(f"{self.command} {self.path}")
        self.send_error(502)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def serve(**attributes: Any) -> Iterator[tuple[str, list[str]]]:
    """Run a web server. Yield its host and port, and the requests it gets."""
    requests: list[str] = []
    handler = type("Handler", (Handler,), {"requests": requests, **attributes})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()


def run(
    directory: Path, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    names = ("http_proxy", "https_proxy", "no_proxy", "all_proxy", "netrc")
    inherited = {k: v for k, v in os.environ.items() if k.lower() not in names}
    return subprocess.run(
        [sys.executable, str(SCRIPT), "--format", "json", *arguments],
        cwd=directory,
        env={**inherited, "HOME": str(directory), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def load(directory: Path, *arguments: str, **environment: str) -> dict[str, Any]:
    """Return the report of a load that succeeds and says nothing."""
    done = run(directory, *arguments, **environment)
    assert (done.returncode, done.stderr) == (0, "")
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def test_a_server_that_compresses_even_so(tmp_path: Path) -> None:
    """It was asked not to. A body that was cut off when it was stored is noticed."""
    body = gzip.compress(SAMPLE[:1_000_000]) + gzip.compress(SAMPLE[1_000_000:])
    with serve(body=body, is_encoded=True) as (address, _):
        url = f"http://{address}/a.json"
        assert load(tmp_path, url)["lines"] == LINES
        assert load(tmp_path, "--incremental", url)["skipped_files"] == 1
    with serve(body=body[:-100], is_encoded=True) as (address, _):
        done = run(tmp_path, f"http://{address}/a.json")
    assert (done.returncode, done.stdout) == (1, "")
    assert "the compressed data is damaged or cut off" in done.stderr


def test_a_proxy(tmp_path: Path) -> None:
    url = "http://events.example/a.json"
    with serve() as (address, requests):
        report = load(tmp_path, url, http_proxy=f"http://{address}")
    assert report["lines"] == LINES
    assert set(requests) == {f"HEAD {url}", f"GET {url}"}


def test_a_proxy_of_https(tmp_path: Path) -> None:
    """It is asked for a tunnel. This one can't make any."""
    url = "https://events.example/a.json"
    with serve() as (address, requests):
        done = run(tmp_path, url, https_proxy=f"http://{address}")
    assert set(requests) == {"CONNECT events.example:443"}
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"Error: {url}: ")
    assert done.stderr.count("\n") == 1


def test_no_proxy(tmp_path: Path) -> None:
    """For a server that no_proxy names, while another is reached through the proxy."""
    with serve() as (address, requests), serve() as (proxy, proxied):
        urls = [f"http://{address}/a.json", "http://events.example/b.json"]
        settings = {"http_proxy": f"http://{proxy}", "no_proxy": "127.0.0.1"}
        assert load(tmp_path, *urls, **settings)["lines"] == 2 * LINES
    assert set(requests) == {"HEAD /a.json", "GET /a.json"}
    assert set(proxied) == {f"HEAD {urls[1]}", f"GET {urls[1]}"}


def test_netrc(tmp_path: Path) -> None:
    """The password of a server is in ~/.netrc. One in the URL goes first."""
    file = tmp_path / ".netrc"
    file.write_text("machine 127.0.0.1 login bob password S3CRT\n")
    file.chmod(0o600)
    with serve(password="bob:S3CRT") as (address, _):
        assert load(tmp_path, f"http://{address}/a.json")["lines"] == LINES
    assert b"S3CRT" not in (tmp_path / "active_user_table.db").read_bytes()
    with serve(password="eve:other") as (address, _):
        assert load(tmp_path, f"http://eve:other@{address}/a.json")["lines"] == LINES
