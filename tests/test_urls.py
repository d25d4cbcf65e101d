"""Events from URLs, through fsspec; no message shows a password or a signature."""

import gzip
import http.client
import http.server
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
import threading
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import oracle
import pytest
from helpers import (
    NOT_AN_OBJECT,
    OTHER_OPTIONS,
    ROOT,
    SAMPLE,
    SAMPLE_LINES,
    SAMPLE_TABLE,
    Loader,
    Process,
    event,
    free_port,
    is_listening,
    lines,
    make_dates,
    make_rule,
    numbered_sample,
    other_rule,
    usage,
    wait_for,
)
from servers import Cluster

import load_active_users
from load_active_users import (
    RANGE_BYTES,
    FileVersion,
    LoadError,
    Scanner,
    describe_error,
    hide_secrets,
    make_url_version,
    redact,
    redact_urls,
    split_source,
)

HAS_S3 = all(map(importlib.util.find_spec, ("s3fs", "moto", "flask")))
s3_only = pytest.mark.skipif(
    not HAS_S3, reason="needs an S3 server: pip install s3fs 'moto[server]'"
)
http_only = pytest.mark.skipif(
    not importlib.util.find_spec("aiohttp"), reason="needs pip install aiohttp"
)
SCAN = Scanner(make_rule(), make_dates())
REPLACED = r"the file was replaced while it was read; load it again$"


@pytest.fixture
def memory() -> Iterator[Any]:
    """The file system of fsspec that is in this process."""
    import fsspec

    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_files_in_memory(
    loader: Loader, memory: Any, compress: Callable[[bytes], bytes]
) -> None:
    memory.pipe("/some/a.jsons", compress(b"".join(SAMPLE_LINES[:400])))
    memory.pipe("/some/b.jsons", compress(b"".join(SAMPLE_LINES[400:])))
    memory.pipe("/some/c.jsons", b"")
    assert loader.load("memory://some/*.jsons")["lines"] == 1000
    assert loader.all_users() == oracle.read(SAMPLE.read_bytes())[0]


def test_the_files_of_wildcards_are_in_order(loader: Loader, memory: Any) -> None:
    for name in ("b", "a", "c"):
        memory.pipe(f"/d/{name}.jsons", b"bad\n" + lines(event(name)))
    done = loader.run("-q", "--max-bad-records", 3, "memory://d/?.jsons")
    places = [line.partition(": ")[0] for line in done.stderr.decode().splitlines()]
    assert done.returncode == 0
    assert places == [f"memory:///d/{name}.jsons:1" for name in "abc"]


def test_wildcards_of_files_are_for_the_shell(loader: Loader) -> None:
    loader.file(b"", "xy")
    assert loader.refuse("x*") == f"Error: x*: {NOT_FOUND}\n"


def test_a_name_that_only_looks_like_wildcards(loader: Loader, memory: Any) -> None:
    memory.pipe("/d/[1].jsons", lines(event("a")))
    loader.load("memory://d/[1].jsons")
    assert loader.all_users() == {"2019-12-30": {"a"}}
    said = loader.refuse("memory://d/*.gz")
    assert said == f"Error: memory://d/*.gz: {NOT_FOUND}\n"


def test_ranges_of_a_url(
    loader: Loader, memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are 128 MiB or more, since each is a request."""
    memory.pipe("/x", SAMPLE.read_bytes())
    monkeypatch.setattr(load_active_users, "URL_RANGE_BYTES", 100_000)
    assert len(split_source("memory://x", 100_000)) == 25
    assert len(split_source("memory://x", 10_000)) == 25
    assert loader.load("memory://x")["lines"] == 1000
    assert loader.all_users() == oracle.read(SAMPLE.read_bytes())[0]


def test_file_urls(loader: Loader) -> None:
    loader.load(f"file://{SAMPLE}")
    assert loader.table() == SAMPLE_TABLE
    assert loader.query("SELECT sources FROM load_log") == [(f'["file://{SAMPLE}"]',)]


NOT_FOUND = "No such file or directory"
NO_GCS = pytest.mark.skipif(
    bool(importlib.util.find_spec("gcsfs")), reason="gcsfs is installed"
)
UNREADABLE = [
    ("file:///none/x.jsons", NOT_FOUND),
    ("memory://none", NOT_FOUND),
    ("memory://none*", NOT_FOUND),
    ("foo://x", "ValueError: Protocol not known: foo"),
    pytest.param(
        "gs://b/x",
        "ImportError: Please install gcsfs to access Google Storage",
        marks=NO_GCS,
    ),
    pytest.param(
        "http://127.0.0.1:1/x", "Connect call failed ('127.0.0.1', 1)", marks=http_only
    ),
    pytest.param(
        "http://h:99999/x", "ValueError: Port out of range 0-65535", marks=http_only
    ),
]


@pytest.mark.parametrize(("url", "reason"), UNREADABLE)
def test_urls_that_cannot_be_read(loader: Loader, url: str, reason: str) -> None:
    assert loader.refuse(url) == f"Error: {url}: {reason}\n"


def test_a_file_that_is_replaced_meanwhile(tmp_path: Path) -> None:
    """A URL may name it."""
    path, other = tmp_path / "x", tmp_path / "other"
    path.write_bytes(SAMPLE.read_bytes())
    other.write_bytes(SAMPLE.read_bytes())
    (part,) = split_source(f"file://{path}", RANGE_BYTES)
    other.rename(path)
    with pytest.raises(LoadError, match=REPLACED):
        list(SCAN(part))


# -- A web server


class Handler(http.server.BaseHTTPRequestHandler):
    """A web server of the sample, without ranges.

    It answers /403 with that status, /nothing not at all, and /short with less than it
    says.
    """

    modified = "Mon, 30 Dec 2019 06:00:00 GMT"

    def do_GET(self) -> None:
        name = self.path.partition("?")[0].strip("/").partition(".")[0]
        data = SAMPLE.read_bytes()
        if "packed" in name:
            data = gzip.compress(data)
        if name == "nothing":
            return
        self.send_response(int(name) if name.isdigit() else 200)
        self.send_header("Content-Length", str(len(data) + (name == "short")))
        self.send_header("Last-Modified", self.modified)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def do_HEAD(self) -> None:
        self.do_GET()

    def log_message(self, format: str, *args: Any) -> None:
        pass


class WebServer(http.server.ThreadingHTTPServer):
    """A server that is silent about clients who have read enough."""

    def handle_error(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def web() -> Iterator[str]:
    """The host and port of a web server."""
    server = WebServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@http_only
@pytest.mark.parametrize("name", ["plain.jsons", "packed.jsons.gz"])
def test_http(loader: Loader, web: str, name: str) -> None:
    assert loader.load(f"http://{web}/{name}")["lines"] == 1000
    assert loader.table() == SAMPLE_TABLE


@http_only
def test_a_download_may_take_as_long_as_it_likes() -> None:
    """The defaults of aiohttp would end it after five minutes.

    They would wait for a connection as long as the system does, which is two minutes.
    """
    for url in ("http://x.example/a", "simplecache::https://x.example/a"):
        system, _ = load_active_users.find_file_system(url)
        while hasattr(system, "target_options") and system.fs is not system:
            system = system.fs
        timeout = system.client_kwargs["timeout"]
        limits = (timeout.total, timeout.sock_connect, timeout.sock_read)
        assert limits == (None, 60, 300)


@http_only
def test_a_query_is_no_pattern(loader: Loader, web: str) -> None:
    """Nothing is looked for in the directory of the page, which may not be listed."""
    loader.load(f"http://{web}/403/x.jsons?fields[]=*")
    assert loader.table() == SAMPLE_TABLE


STATUSES = [
    (401, "Unauthorized"),
    (403, "Forbidden"),
    (404, "Not Found"),
    (410, "Gone"),
    (429, "Too Many Requests"),
    (500, "Internal Server Error"),
    (503, "Service Unavailable"),
]


@http_only
@pytest.mark.parametrize(("status", "reason"), STATUSES)
def test_what_a_web_server_answers(
    loader: Loader, web: str, status: int, reason: str
) -> None:
    """The message has its answer, and nothing that may be secret."""
    said = loader.refuse(f"http://bob:S3CRT@{web}/{status}.json?X-Goog-Signature=S3CRT")
    shown = f"http://{web}/{status}.json"
    assert said == f"Error: {shown}: the server answered {status} {reason}\n"


@http_only
def test_a_web_server_that_closes_the_connection(loader: Loader, web: str) -> None:
    url = f"http://{web}/nothing"
    what = "ServerDisconnectedError: Server disconnected"
    assert loader.refuse(url) == f"Error: {url}: {what}\n"
    url = f"http://{web}/short"
    said = loader.refuse(url)
    what = "ClientPayloadError: Response payload is not completed: "
    assert re.fullmatch(rf"Error: {url}:\d+: {what}[^\n]+\n", said)


@http_only
def test_a_page_that_is_replaced_meanwhile(
    web: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (part,) = split_source(f"http://{web}/x", RANGE_BYTES)
    assert sum(batch.tally.lines for batch in SCAN(part)) == 1000
    monkeypatch.setattr(Handler, "modified", "Mon, 30 Dec 2019 06:00:01 GMT")
    with pytest.raises(LoadError, match=REPLACED):
        list(SCAN(part))


# -- Secrets

SEPARATORS = ["", "::", "::x://", "%2F", *"/#?[]@:% &='\"\\"]
SCHEMES = ["http", "https", "HTTP", "s3", "ftp", "hdfs", "dask", "foo"]
SCHEMES += [
    "simplecache::http",
    "zip://x.json::http",
    "zip://d/x.json::http",
    "blockcache::http",
]
SCHEMES += ["zip://*.json::http"]
REFUSE_ALL = """
import json, sys
from click.testing import CliRunner
from load_active_users import main
for url in json.load(sys.stdin):
    result = CliRunner().invoke(main, ["--db", "x.db", "-q", url])
    print(json.dumps([result.exit_code, result.stdout, result.stderr]))
"""


@http_only
@s3_only
def test_no_password_and_no_signature_of_a_source_is_shown(loader: Loader) -> None:
    """That holds for any password, and whatever a library says about its URL."""
    urls = []
    for scheme in SCHEMES:
        for separator in SEPARATORS:
            user = f"bob:S3CRT{separator}S3CRT"
            urls.append(f"{scheme}://{user}@127.0.0.1:1/x.json?X-Goog-Signature=S3CRT")
        urls.append(f"{scheme}://127.0.0.1:1/x.json?X-Goog-Signature=S3CRT&a=S3CRT@b")
        urls.append(f"{scheme}://S3CRT@127.0.0.1:1/x.json#S3CRT")
        urls.append(f"{scheme}:/bob:S3CRT@127.0.0.1:1/x.json?sig=S3CRT")
        urls.append(f"{scheme}://[::1]:1/x.json?sig=S3CRT")
        query = "role=arn:aws:iam::1:S3CRT&sig=S3CRT"
        urls.append(f"{scheme}://127.0.0.1:1/x.json?{query}")
    done = subprocess.run(
        [sys.executable, "-c", REFUSE_ALL],
        input=json.dumps(urls),
        cwd=loader.directory,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "AWS_ENDPOINT_URL": "http://127.0.0.1:1",
            "DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "1s",
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == len(urls)
    for url, (status, out, err) in zip(urls, results, strict=True):
        assert (status, out, err.count("\n")) == (1, "", 1), url
        assert err.startswith("Error: "), url
        assert "S3CRT" not in err, url


@http_only
def test_no_signature_is_kept(loader: Loader, web: str) -> None:
    """That holds for load_log, reports, pictures and messages."""
    url = f"http://bob:S3CRT@{web}/plain.json?X-Goog-Signature=S3CRT#S3CRT"
    shown = f"http://{web}/plain.json"
    for form in ("table", "json", "csv"):
        done = loader.run("--format", form, url)
        assert (done.returncode, done.stderr) == (0, b"")
        assert b"S3CRT" not in done.stdout
    done = loader.run("-q", url, "--plot", "x.svg")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert b"S3CRT" not in (loader.directory / "x.svg").read_bytes()
    sources = loader.query("SELECT DISTINCT sources FROM load_log")
    assert sources == [(json.dumps([shown]),)]
    what = other_rule(f"--timezone UTC {OTHER_OPTIONS}")
    said = f"Error: active_user_table.db: {what}\n"
    assert loader.refuse("--timezone", "UTC", url) == said
    assert b"S3CRT" not in loader.db.read_bytes()


@pytest.mark.parametrize(
    "option", ["--plot", "--workers", "--timezone", "--dates", "--format"]
)
def test_no_password_of_a_mistaken_option_is_shown(loader: Loader, option: str) -> None:
    for password in ("S3CRT", "S3 CRT", "S3CRT S3%CRT"):
        url = f"postgresql://bob:{password}@h/x?sig=S3CRT"
        said = loader.refuse(option, url, "x", status=2)
        assert f"Error: Invalid value for '{option}': 'postgresql://h/x' " in said
        assert "S3" not in said
        assert "CRT" not in said


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("https://bob:S3CRT@h:443/x?sig=S3CRT#S3CRT", "https://h:443/x"),
        ("https:/bob:S3CRT@h/x", "https:/h/x"),
        (
            "https://bob:S3#CRT@h/x",
            "https://...",
        ),  # what follows may be of the password
        ("https://bob:S3/CRT@h/x", "https://h/x"),
        ("https://[::1]:80/x?a@b", "https://..."),
        ("https://S3?CRT@h/x", "https://..."),  # a token in place of the user
        ("https://bob:S3@C?RT@h/x", "https://..."),
        ("zip://x.json::https://bob:S3CRT@h/x.zip", "zip://x.json::https://h/x.zip"),
        ("simplecache::s3://bucket/x.json", "simplecache::s3://bucket/x.json"),
        ("data/bob@h:S3CRT?x#y", "data/bob@h:S3CRT?x#y"),  # a file
        # Words before the URL, or none where its scheme should be.
        ("--dbpostgresql://bob:S3CRT@h/x", "--dbpostgresql://h/x"),
        ("1https://bob:S3CRT@h/x?sig=S3CRT", "1https://h/x"),
        ("éhttps://bob:S3CRT@h/x", "éhttps://h/x"),
        ("zip::1https://bob:S3CRT@h/x", "zip::1https://h/x"),
        ("://bob:S3CRT@h/x", "://h/x"),
    ],
)
def test_what_is_shown_of_a_name(name: str, shown: str) -> None:
    assert redact(name) == shown
    assert redact_urls(f"about '{name}', and more") == f"about '{shown}', and more"


DATABASES = [  # that are refused with a line that says what is expected
    *(f"postgresql://loader:S3CRT{s}S3CRT@127.0.0.1:1/a" for s in "/@ "),
    "postgresql+psycopg2://loader:S3CRT@127.0.0.1:1/a",
    "postgresql+asyncpg://loader:S3CRT@127.0.0.1:1/a",
    "mysql://loader:S3CRT@127.0.0.1:1/a",
    "POSTGRESQL://loader:S3CRT@127.0.0.1:1/a",
    "Postgres://loader:S3CRT@127.0.0.1:1/a",
    "jdbc:postgresql://127.0.0.1:1/a?user=loader&password=S3CRT",
    "postgresql:loader:S3CRT@127.0.0.1/a",
    "postgresql:/loader:S3CRT@127.0.0.1/a",
    " postgresql://loader:S3CRT@127.0.0.1:1/a",
    '"postgresql://loader:S3CRT@127.0.0.1:1/a"',
    "postgresql://loader:S3CRT@[::1/a",
    "postgresql://[::1/a",
    "postgresql://loader:S3CRT@127.0.0.1:S3CRT/a",
    "postgresql://loader:S3CRT%@127.0.0.1:1/a",
    "postgresql://loader:S3CRT%zz@127.0.0.1:1/a",
    "host=127.0.0.1 port=1 user=bob password=S3CRT dbname=x",
    "password = S3CRT host = x",
    "dbname=x",
    "service=x",
    "sqlite:///x.db",
    "sqlite3:x.db",
    "http://bob:S3CRT@127.0.0.1/x.db",
    "s3://bucket/x.db",
    "file:x.db",
    "file:x.db?mode=memory",
    "FILE:x.db",
    ":memory:",
]
EXPECTED = (
    "Invalid value for '--db': expected the path of an SQLite file, or a postgresql:// "
    "URL (USER@HOST:PORT/DATABASE, special characters percent-encoded); "
    "a password is best kept in ~/.pgpass or PGPASSWORD"
)


@pytest.mark.parametrize("db", DATABASES)
def test_db_is_neither_a_path_nor_a_postgresql_url(loader: Loader, db: str) -> None:
    assert loader.refuse("--db", db, SAMPLE, status=2) == usage(EXPECTED)
    assert list(loader.directory.iterdir()) == []


def test_a_wrong_db_is_refused_whatever_is_to_be_done(loader: Loader) -> None:
    """By the option and by the environment: each is a usage error, and leaves
    nothing."""
    todo: list[list[object]] = [[SAMPLE], ["--plot", "x.png"], ["--dry-run", SAMPLE]]
    for db, args in itertools.product(DATABASES, todo):
        for option, variable in ((["--db", db], "x.db"), ([], db)):
            env = {"LOAD_ACTIVE_USERS_DB": variable}
            said = loader.refuse(*option, *args, status=2, env=env)
            assert said == usage(EXPECTED)
    assert list(loader.directory.iterdir()) == []


REFUSED = (
    'connection failed: connection to server at "127.0.0.1", port 1 failed: '
    "Connection refused Is the server running on that host and accepting TCP/IP "
    "connections?"
)
HERE = "127.0.0.1:1/a"
SERVERS = [  # URLs of PostgreSQL, and how they are shown
    (f"postgresql://loader:S3CRT@{HERE}", f"postgresql://{HERE}"),
    (f"postgres://loader:S3CRT@{HERE}", f"postgres://{HERE}"),
    (f"postgresql+psycopg://loader:S3CRT@{HERE}", f"postgresql+psycopg://{HERE}"),
    *[
        (f"postgresql://loader:S3CRT{letter}S3CRT@{HERE}", f"postgresql://{HERE}")
        for letter in ":[]\\"
    ],
    *[  # what follows may be of the password
        (f"postgresql://loader:S3CRT{letter}S3CRT@{HERE}", "postgresql://...")
        for letter in "?#"
    ],
    (f"postgresql://loader:S3%2F%23%3F%5B%40CRT@{HERE}", f"postgresql://{HERE}"),
    (f"postgresql://{HERE}?user=x&password=S3CRT", f"postgresql://{HERE}"),
    ("postgresql:///a?host=127.0.0.1&port=1&password=S3CRT", "postgresql:///a"),
    (f"postgresql://{HERE}?password=S3CRT&passfile=/none/x", f"postgresql://{HERE}"),
    (f"postgresql://{HERE}?application_name=a::S3CRT", f"postgresql://{HERE}"),
    (f"postgresql://{HERE}?options=-c%20work_mem%3D1MB", f"postgresql://{HERE}"),
]


@pytest.mark.parametrize(
    "db", [db for db, _ in SERVERS if "S3CRT" in db and "::" not in db]
)
def test_what_a_server_says_of_a_password_is_not_shown(db: str) -> None:
    """The password is hidden, and the user is not."""
    said = 'no database "a" for "loader" on 127.0.0.1'
    assert hide_secrets(f"{said} with S3CRT", db) == f"{said} with ***"


@pytest.mark.parametrize(
    ("url", "said", "shown"),
    [
        ("webhdfs://h/f#S3CRT==", "f%23S3CRT==?op=1", "f%23***?op=1"),
        ("webhdfs://S3CRT==@h/f", "user=S3CRT%3D%3D&op=1", "user=***&op=1"),
        ("github://u:S3éCRT@r/f", "/repos/u/S3%C3%A9CRT/f", "/repos/***/***/f"),
        ("s3://u:S3\nCRT@b/f", 'no bucket "u:S3 CRT@b"', 'no bucket "***:***@b"'),
        ("s3://S3\n CRT@b/f", 'no bucket "S3 CRT@b"', 'no bucket "***@b"'),
        ("https://h/f?a=S3=CRT&b=S3", "got S3=CRT, S3", "got ***, ***"),
        ("https://h/f?a=S3/CRT", "no f%3Fa=S3%2FCRT", "no f%3Fa=***"),
    ],
)
def test_other_spellings_of_a_secret_are_hidden(
    url: str, said: str, shown: str
) -> None:
    assert describe_error(ValueError(said), url) == f"ValueError: {shown}"


@pytest.mark.parametrize(("db", "shown"), SERVERS, ids=[db for db, _ in SERVERS])
def test_servers_that_are_not_there(loader: Loader, db: str, shown: str) -> None:
    for args in ([SAMPLE], ["--plot", "x.png"]):
        assert loader.refuse("--db", db, *args) == f"Error: {shown}: {REFUSED}\n"


# -- An S3 server


@pytest.fixture(scope="session")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a bucket on an S3 server, which the environment names too."""
    port = free_port()
    log = (tmp_path_factory.mktemp("s3") / "log").open("wb")
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    address = f"http://127.0.0.1:{port}"
    settings = {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": address,
    }
    before = dict(os.environ)
    with Process(command, stdout=log, stderr=log) as process:
        try:
            assert wait_for(lambda: is_listening(port), 60)
            os.environ.update(settings)
            put(f"{address}/events", "", b"")
            yield f"{address}/events"
        finally:
            os.environ.clear()
            os.environ.update(before)
            process.kill()


def put(bucket: str, name: str, data: bytes) -> None:
    headers = {"Content-Type": "application/octet-stream"}
    request = urllib.request.Request(
        f"{bucket}/{name}".rstrip("/"), data, headers, method="PUT"
    )
    urllib.request.urlopen(request, timeout=60).close()


@s3_only
def test_s3(loader: Loader, bucket: str) -> None:
    """Objects may be plain and compressed, and scanned in one process or in several."""
    data = b"".join(numbered_sample(number) for number in range(4))
    assert len(data) > 8 << 20  # which is asked for at once
    put(bucket, "day/plain.jsons", data + b"bad\n")
    packed = gzip.compress(SAMPLE.read_bytes(), 1) * 20
    assert 2 * len(packed) * 10 > 64 << 20  # which one process would scan
    for number in range(2):
        put(bucket, f"day/{number}.jsons.gz", packed)
    users, _, _ = oracle.read(data + SAMPLE.read_bytes())
    results = []
    options = ["--dry-run", "--format", "json", "--max-bad-records", 1]
    loader.load(loader.file(lines(event("a", 10**15))))
    for workers in (1, 2):
        args = [*options, "--workers", workers, "s3://events/day/*"]
        done = loader.run(*args, process=True)
        results.append((done.returncode, done.stdout, done.stderr.decode()))
    assert results[0] == results[1]
    status, out, err = results[0]
    assert (status, err) == (0, f"s3://events/day/plain.jsons:4001: {NOT_AN_OBJECT}\n")
    report = json.loads(out)
    counts = {day["date"]: day["active_user_count"] for day in report["dates"]}
    assert counts == {day: len(found) for day, found in users.items()}
    assert report["lines"] == 4001 + 40_000


@s3_only
def test_ranges_of_an_object(
    loader: Loader, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(bucket, "ranges/x", SAMPLE.read_bytes())
    monkeypatch.setattr(load_active_users, "URL_RANGE_BYTES", 100_000)
    assert len(split_source("s3://events/ranges/x", 100_000)) == 25
    assert loader.load("s3://events/ranges/x")["lines"] == 1000
    assert loader.all_users() == oracle.read(SAMPLE.read_bytes())[0]


@s3_only
@pytest.mark.parametrize("name", ["events/none.jsons", "events/none-*.jsons"])
def test_objects_that_are_missing(loader: Loader, bucket: str, name: str) -> None:
    assert loader.refuse(f"s3://{name}") == f"Error: s3://{name}: {NOT_FOUND}\n"


@s3_only
def test_a_bucket_that_is_missing(loader: Loader, bucket: str) -> None:
    said = loader.refuse("s3://nowhere/none.jsons")
    assert re.fullmatch(
        r"Error: s3://nowhere/none\.jsons: NoSuchBucket: [^\n]+ does not exist\n", said
    )


@s3_only
def test_a_bucket_and_a_prefix_are_directories(loader: Loader, bucket: str) -> None:
    put(bucket, "prefix/plain.jsons", SAMPLE.read_bytes())
    why = "Is a directory; name the files in it"
    for url in ("s3://events", "s3://events/prefix"):
        assert loader.refuse(url) == f"Error: {url}: {why}\n"
    assert loader.refuse("s3://events/pref*") == f"Error: s3://events/prefix: {why}\n"


@s3_only
def test_an_object_that_is_replaced_meanwhile(bucket: str) -> None:
    put(bucket, "replaced.jsons", SAMPLE.read_bytes())
    (part,) = split_source("s3://events/replaced.jsons", RANGE_BYTES)
    import fsspec

    tag = fsspec.filesystem("s3").info("events/replaced.jsons")["ETag"]
    assert part.identity == tag.strip('"')  # the time of the change is of whole seconds
    fsspec.filesystem("s3").pipe("events/replaced.jsons", SAMPLE.read_bytes()[:-1])
    with pytest.raises(LoadError, match=REPLACED):
        list(SCAN(part))


@s3_only
def test_s3_on_a_cluster(loader: Loader, bucket: str, tmp_path: Path) -> None:
    put(bucket, "cluster/plain.jsons", SAMPLE.read_bytes())
    put(bucket, "cluster/packed.gz", gzip.compress(numbered_sample(1)))
    with closing(Cluster(tmp_path / "cluster")) as cluster:
        cluster.worker()
        args = ["--cluster", cluster.address, "s3://events/cluster/*"]
        loader.load(*args, process=True)
    expected, _, _ = oracle.read(SAMPLE.read_bytes() + numbered_sample(1))
    assert loader.all_users() == expected


# -- Libraries that say something

NOISE = """
import builtins, logging, sys, warnings
LOUD = ("psycopg", "fsspec", "aiohttp", "matplotlib")
imported = builtins.__import__
warnings.simplefilter("always")
heard = open("heard", "a")

def noisy(name, *more, **others):
    module = imported(name, *more, **others)
    library = name.partition(".")[0]
    if library in LOUD:
        print(library, file=heard, flush=True)
        warnings.warn(f"a warning of {library}", DeprecationWarning)
        logging.getLogger(library).error("a record of %s", library)
    return module

builtins.__import__ = noisy
"""


@http_only
def test_libraries_are_quiet(loader: Loader, web: str) -> None:
    """Neither what they warn of nor what they log is on standard error."""
    env = loader.with_site(NOISE)
    heard = loader.directory / "heard"
    port = free_port()
    web_away, database = (
        f"http://127.0.0.1:{port}/x",
        f"postgresql://127.0.0.1:{port}/x",
    )
    runs: list[tuple[str, list[object], str]] = [
        ("fsspec", [f"file://{SAMPLE}"], ""),
        ("aiohttp", [f"http://{web}/plain.jsons"], ""),
        ("matplotlib", ["--plot", "x.png", SAMPLE], ""),
        ("aiohttp", [web_away], f"Error: {web_away}: "),
        ("psycopg", ["--db", database, SAMPLE], f"Error: {database}: "),
        ("psycopg", ["--db", database, "--plot", "x.png"], f"Error: {database}: "),
    ]
    said_all = []
    for library, args, start in runs:
        done = loader.run("-q", *args, env=env, process=True)
        said_all.append(said := done.stderr.decode())
        assert library in heard.read_text().split()
        heard.unlink()
        assert (done.returncode, done.stdout) == (int(bool(start)), b""), said
    for (_, _, start), said in zip(runs, said_all, strict=True):
        assert said.startswith(start)
        assert said.count("\n") == int(bool(start)), said


def test_servers_that_are_away_leave_one_line(loader: Loader) -> None:
    """In processes as they are, which have their own warnings and loggers."""
    port = free_port()
    web = f"http://bob:S3CRT@127.0.0.1:{port}/x.json?sig=S3CRT"
    database = f"postgresql://bob:S3CRT@127.0.0.1:{port}/x"
    runs: list[tuple[list[object], str]] = [
        ([web], f"http://127.0.0.1:{port}/x.json"),
        (["--db", database, SAMPLE], f"postgresql://127.0.0.1:{port}/x"),
        (["--db", database, "--plot", "x.png"], f"postgresql://127.0.0.1:{port}/x"),
    ]
    for args, shown in runs:
        done = loader.run(*args, process=True)
        said = done.stderr.decode()
        assert (done.returncode, done.stdout, said.count("\n")) == (1, b"", 1), said
        assert said.startswith(f"Error: {shown}: ")
        assert "S3CRT" not in said


# -- Secrets that are common words, and secrets of any characters


@http_only
@pytest.mark.parametrize("status", [404, 403, 500])
def test_a_status_and_not_the_query(loader: Loader, web: str, status: int) -> None:
    url = f"http://{web}/{status}/export?file=2020-01-05.json"

    class Exports(Handler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

    server = WebServer(("127.0.0.1", 0), Exports)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        place = f"http://127.0.0.1:{server.server_port}/export"
        url = f"{place}?file=2020-01-05.json"
        said = loader.refuse(url)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    reason = http.client.responses[status]
    assert said == f"Error: {place}: the server answered {status} {reason}\n"


PLACES = ["postgresql://bob:{}@h/x", "https://bob:{}@h/x", "s3://bob:{}@bucket/x"]
SECRETS = [  # URLs, and the secrets in them as they are written there
    *((place, f"S3{one}CRT") for place in PLACES for one in "#?[]\\&=:+$!"),
    *((place, f"S3{one}CRT") for place in PLACES for one in ("%2F", "%40", "%25")),
    ("s3://{}@bucket/x", "S3CRT"),  # a token in place of the user
    ("https://{}@h/x", "S3CRT"),
    ("https://{}:@h/x", "S3CRT"),
    ("https://h/x?token={}", "S3%2FCRT"),
    ("https://h/x?{}", "S3CRT"),
    ("https://h/x?a=b&token={}&c=d", "S3CRT"),
    ("https://h/x#{}", "S3CRT"),
    ("postgresql://bob@h/x?password={}", "S3%2FCRT"),
    ("postgresql://h/x?user=bob&password={}&sslmode=require", "S3CRT"),
    ("postgresql://h/x?sslpassword={}", "S3CRT"),
]


@pytest.mark.parametrize(("place", "secret"), SECRETS)
def test_no_secret_of_any_characters_is_shown(place: str, secret: str) -> None:
    """Not in the name, and not in what a library says of it, encoded or not."""
    url = place.format(secret)
    said = [f"can't open {url}", f"wrong: {secret}!", f'no "{url}", sorry']
    said.append(f"wrong: '{urllib.parse.unquote(secret)}'")
    for shown in (redact(url), *(hide_secrets(text, url) for text in said)):
        assert "S3" not in shown
        assert "CRT" not in shown


@pytest.mark.parametrize(
    ("said", "url", "hidden"),
    [
        (
            'password authentication failed for user "app"',
            "postgresql://app:app@h/x",
            'password authentication failed for user "***"',
        ),
        (
            'password authentication failed for user "postgres"',
            "postgresql://postgres:password@h/x",
            '*** authentication failed for user "postgres"',
        ),
        ("404 Not Found", "https://h/x?file=2020-01-05.json", "404 Not Found"),
        ("no 2020-01-05.json", "https://h/x?file=2020-01-05.json", "no ***"),
        ("a b at a", "postgresql://u:a@h/x", "*** b at ***"),  # not in "at"
        ("no database x", "postgresql://bob@h/x", "no database x"),
        ("no database x", "x.db", "no database x"),
    ],
)
def test_what_a_message_keeps(said: str, url: str, hidden: str) -> None:
    assert hide_secrets(said, url) == hidden


def test_the_longest_secret_of_a_message_is_hidden_first() -> None:
    """Otherwise what lies between its words would be shown."""
    name = "postgresql://loader:one-two@host/db"
    assert hide_secrets("password one-two is wrong", name) == "password *** is wrong"


# -- Which version a URL has


@pytest.mark.parametrize(
    ("url", "info", "version"),
    [
        ("https://h/x.json", {"size": 5, "ETag": 'W/"e"', "mtime": 7}, "5 e"),
        ("https://h/x.json", {"size": 5, "mtime": 7}, "5 7"),
        ("https://h/x.json", {"size": 5}, None),
        ("https://h/x.json?sig=a", {"size": 5, "ETag": "e", "mtime": 7}, "5 e"),
        ("https://h/x.json?sig=a", {"size": 5, "mtime": 7}, None),
        ("https://h/x.json#a", {"size": 5, "mtime": 7}, None),
    ],
)
def test_a_time_identifies_no_url_with_a_query(
    url: str, info: dict[str, Any], version: str | None
) -> None:
    """Two URLs that differ in the query alone are kept as one path."""
    found = make_url_version(url, info)
    assert found == (version and FileVersion("https://h/x.json", version))
