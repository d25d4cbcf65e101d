"""Events of URLs, through fsspec: in memory, in files, and on a real S3 server."""

import gzip
import importlib.util
import json
import os
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import plain
import pytest
from conftest import ROOT, SAMPLE, Loader, event, lines
from test_cluster import Cluster
from test_robust import ROWS, wait_for

import load_active_users
from load_active_users import Live, LoadError, Merger, Range, Rule, Scanner, ranges, scan_in_turn, sources_of

RULE = Rule("US/Central", 3000, ["*_event"])
HAS_S3 = all(map(importlib.util.find_spec, ("s3fs", "moto", "flask")))
s3_only = pytest.mark.skipif(not HAS_S3, reason="needs an S3 server: pip install s3fs 'moto[server]'")


def read(*urls: str) -> tuple[dict[str, set[str]], int]:
    """The users and the number of lines of some URLs, read in this process."""
    merger = Merger(ranges(sources_of(urls)))
    for index, batch in scan_in_turn(merger.parts, Scanner(RULE)):
        merger.add(index, batch)
    return merger.users, merger.tally["lines"]


@pytest.fixture
def memory() -> Iterator[object]:
    import fsspec

    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_memory(memory: object, compress: object) -> None:
    rows = SAMPLE.read_bytes().splitlines(keepends=True)
    memory.pipe("/some/a.jsons", compress(b"".join(rows[:400])))
    memory.pipe("/some/b.jsons", compress(b"".join(rows[400:])))
    memory.pipe("/some/c.jsons", b"")
    assert read("memory://some/*.jsons") == (plain.read(SAMPLE.read_bytes())[0], 1000)


def test_the_files_of_wildcards_are_in_order(memory: object) -> None:
    for name in ("b", "a", "c"):
        memory.pipe(f"/d/{name}.jsons", lines(event(name)))
    assert sources_of(["memory://d/?.jsons", "x*"]) == [f"memory:///d/{name}.jsons" for name in "abc"] + ["x*"]
    with pytest.raises(LoadError, match=r"memory://d/\*\.gz: there is no such file"):
        sources_of(["memory://d/*.gz"])


def test_ranges_of_a_url(memory: object, monkeypatch: pytest.MonkeyPatch) -> None:
    data = SAMPLE.read_bytes()
    memory.pipe("/x", data)
    monkeypatch.setattr(load_active_users, "BATCH", 25_000)
    parts = ranges(["memory://x"], 100_000)
    assert len(parts) == 25
    merger = Merger(parts)
    for index, batch in scan_in_turn(parts, Scanner(RULE)):
        merger.add(index, batch)
    assert (merger.users, merger.tally["lines"]) == (plain.read(data)[0], 1000)


def test_a_url_that_is_committed_in_parts(memory: object) -> None:
    memory.pipe("/x", SAMPLE.read_bytes())
    (batch,) = Scanner(RULE, live=Live())(Range("memory://x"))
    assert (batch.users, batch.lines) == (plain.read(SAMPLE.read_bytes())[0], 1000)


def test_file_urls(loader: Loader) -> None:
    report = loader.load(f"file://{SAMPLE}")
    assert report["lines"] == 1000
    assert loader.query("SELECT sources FROM load_log") == [(f'["file://{SAMPLE}"]',)]


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("file:///none/x.jsons", "file:///none/x.jsons: No such file"),
        ("memory://none", "memory://none: No such file"),
        ("memory://none*", "memory://none*: there is no such file"),
        ("foo://x", "foo://x: ValueError: Protocol not known: foo"),
        ("http://127.0.0.1:1/x", "http://127.0.0.1:1/x: "),
    ],
)
def test_urls_that_cannot_be_read(loader: Loader, url: str, reason: str) -> None:
    said = loader.refuse(url)
    assert said.startswith(f"Error: {reason}")
    assert said.count("\n") == 1


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an S3 server that has a bucket."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
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
    with subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:

            def answers() -> bool:
                with socket.socket() as client:
                    return client.connect_ex(("127.0.0.1", port)) == 0

            assert wait_for(answers, 60)
            os.environ.update(settings)
            put(f"{address}/events", "", b"")
            yield f"{address}/events"
        finally:
            os.environ.clear()
            os.environ.update(before)
            process.kill()


def put(bucket: str, name: str, data: bytes) -> None:
    headers = {"Content-Type": "application/octet-stream"}
    request = urllib.request.Request(f"{bucket}/{name}".rstrip("/"), data, headers, method="PUT")
    urllib.request.urlopen(request, timeout=60).close()


@s3_only
def test_s3(loader: Loader, bucket: str, tmp_path: Path) -> None:
    """Plain objects in ranges, compressed ones, wildcards; in one process and in several."""
    data = b"".join(
        row.replace(b'"user_pseudo_id":"', b'"user_pseudo_id":"%d-' % n, 1) for n in range(70) for row in ROWS
    )
    put(bucket, "day/plain.jsons", data + b"bad\n")
    for number in range(3):
        put(bucket, f"day/{number}.jsons.gz", gzip.compress(SAMPLE.read_bytes() * 4, 1))
    users, _, _ = plain.read(data + SAMPLE.read_bytes())
    results = []
    for workers in (1, 2):
        done = loader.run(
            "--dry-run", "--format", "json", "--max-bad-records", 1, "--workers", workers, "s3://events/day/*"
        )
        results.append((done.returncode, done.stdout, done.stderr))
    assert results[0] == results[1]
    status, out, err = results[0]
    assert (status, err.decode()) == (
        0,
        "s3://events/day/plain.jsons:70001: not one JSON object, {...}: one event a line is expected\n",
    )

    report = json.loads(out)
    assert {date["date"]: date["active_user_count"] for date in report["dates"]} == {
        date: len(found) for date, found in users.items()
    }
    assert report["lines"] == 70_001 + 12_000


@pytest.mark.skipif(not importlib.util.find_spec("aiohttp"), reason="needs pip install aiohttp")
def test_http(loader: Loader, tmp_path: Path) -> None:
    """Of a server that does not even know ranges of bytes."""
    data = SAMPLE.read_bytes()
    (tmp_path / "plain.jsons").write_bytes(data * 5)
    (tmp_path / "packed.jsons.gz").write_bytes(gzip.compress(data))
    command = [sys.executable, "-um", "http.server", "-b", "127.0.0.1", "-d", tmp_path, "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        port = process.stdout.readline().split()[5].decode()
        try:
            for name, count in (("plain.jsons", 5000), ("packed.jsons.gz", 1000)):
                assert loader.load(f"http://127.0.0.1:{port}/{name}")["lines"] == count
            assert "No such file" in loader.refuse(f"http://127.0.0.1:{port}/none")
        finally:
            process.kill()


@s3_only
def test_objects_that_are_missing(loader: Loader, bucket: str) -> None:
    assert loader.refuse("s3://events/none.jsons") == "Error: s3://events/none.jsons: No such file\n"
    assert loader.refuse("s3://nowhere/none.jsons") == "Error: s3://nowhere/none.jsons: No such file\n"
    assert "there is no such file" in loader.refuse("s3://events/none-*.jsons")


@s3_only
def test_an_object_that_is_replaced_meanwhile(bucket: str) -> None:
    put(bucket, "replaced.jsons", SAMPLE.read_bytes())
    (part,) = ranges(["s3://events/replaced.jsons"])
    import fsspec

    fsspec.filesystem("s3").pipe("events/replaced.jsons", SAMPLE.read_bytes()[:-1])
    with pytest.raises(LoadError, match="was replaced while it was read"):
        list(Scanner(RULE)(part))


@s3_only
def test_s3_on_a_cluster(loader: Loader, bucket: str, tmp_path: Path) -> None:
    put(bucket, "cluster/plain.jsons", SAMPLE.read_bytes())
    put(
        bucket,
        "cluster/packed.gz",
        gzip.compress(SAMPLE.read_bytes().replace(b'"user_pseudo_id":"', b'"user_pseudo_id":"b-')),
    )
    (tmp_path / "cluster").mkdir()
    cluster = Cluster(tmp_path / "cluster")
    try:
        cluster.worker()
        report = loader.load("--cluster", cluster.address, "s3://events/cluster/*")
    finally:
        cluster.stop()
    assert [date["active_user_count"] for date in report["dates"]] == [22, 62, 44]


def test_a_plain_load_imports_none_of_it(loader: Loader) -> None:
    code = f"""
import sys
sys.argv = ["x", "-q", "--db", "x.db", {str(SAMPLE)!r}]
sys.path.insert(0, {str(ROOT)!r})
import load_active_users
load_active_users.main(standalone_mode=False)
assert not {{"psycopg", "matplotlib", "distributed", "fsspec"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], cwd=loader.directory, check=True)
