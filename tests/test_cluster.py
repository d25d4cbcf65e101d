"""Scanning on a real Dask cluster: a scheduler and workers on this machine."""

import gzip
import json
import os
import platform
import re
import signal
import socket
from collections.abc import Iterator
from contextlib import closing, suppress
from functools import partial
from importlib.metadata import version as metadata
from pathlib import Path

import oracle
import pytest
from helpers import (
    AS_ROOT,
    INTERRUPTED,
    NOT_AN_OBJECT,
    SAMPLE,
    SAMPLE_TABLE,
    Loader,
    event,
    lines,
    numbered_sample,
    wait_for,
)
from servers import Cluster


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with closing(Cluster(tmp_path / "cluster")) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def huge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of two ranges and a bit, with five bad records."""
    path = tmp_path_factory.mktemp("huge") / "huge.jsons"
    samples = [numbered_sample(number) for number in range(7)]
    with path.open("wb") as file:
        for number in range(250):
            file.write(samples[number % 7])
            file.write(b"\n" if number % 50 else b"{cut off\n")
    return path


def test_a_cluster_changes_nothing(
    loader: Loader, cluster: Cluster, huge: Path
) -> None:
    """Users, tallies, bad records and messages are those of the oracle."""
    cluster.workers(2)
    packed = loader.directory / "x.gz"
    packed.write_bytes(gzip.compress(SAMPLE.read_bytes() + b"bad"))
    options = ["--cluster", cluster.address, "--max-bad-records", 99]
    options += ["--rejects", "rejects", "--format", "json"]
    done = loader.run(*options, huge, packed, SAMPLE, process=True)

    samples = b"".join(numbered_sample(number) for number in range(7))
    users, _, _ = oracle.read(samples + SAMPLE.read_bytes())
    _, one, _ = oracle.read(SAMPLE.read_bytes())
    bad = [*((huge, n * 50 * 1001 + 1001) for n in range(5)), (packed, 1001)]
    said = [f"{path}:{number}: {NOT_AN_OBJECT}\n" for path, number in bad]
    assert (done.returncode, done.stderr.decode()) == (0, "".join(said))
    assert (loader.directory / "rejects").read_bytes() == b"{cut off\n" * 5 + b"bad\n"
    assert loader.all_users() == users
    assert loader.table() == {day: len(users[day]) for day in sorted(users)}
    report = json.loads(done.stdout)
    assert report["lines"] == 250 * 1001 + 1001 + 1000
    for name in ("engagement_events", "active_events"):
        assert report[name] == 252 * one[name]
    assert report["bad_records"] == 6


def test_all_workers_scan_at_once(loader: Loader, cluster: Cluster) -> None:
    """Each opens a named pipe. The load goes on after the last has got its events."""
    cluster.workers(3)
    pipes = [loader.directory / name for name in "abc"]
    for pipe in pipes:
        os.mkfifo(pipe)
    with loader.start("-q", "--cluster", cluster.address, *pipes) as load:
        for pipe in reversed(pipes):
            descriptor = wait_for(partial(open_if_it_is_read, pipe))
            assert descriptor, f"nobody reads {pipe}"
            with open(descriptor, "wb") as file:
                file.write(lines(event(pipe.name)))
        out, err = load.communicate(timeout=60)
    assert (load.returncode, out, err) == (0, b"", b"")
    assert loader.users() == ["a", "b", "c"]


def open_if_it_is_read(pipe: Path) -> int | None:
    """Return a descriptor that writes to a named pipe, if it has a reader."""
    with suppress(OSError):
        return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
    return None


def test_a_worker_that_is_killed_is_made_up_for(
    loader: Loader, cluster: Cluster, huge: Path
) -> None:
    workers = cluster.workers(2)
    options = ["--cluster", cluster.address, "--max-bad-records", 1000]
    with loader.start(*options, "--format", "json", *[huge] * 4) as load:
        assert cluster.is_scanning(load, huge)
        workers[0].kill()
        out, _ = load.communicate(timeout=120)
    assert load.returncode == 0
    report = json.loads(out)
    assert (report["lines"], report["bad_records"]) == (4 * 250 * 1001, 4 * 5)
    samples = b"".join(numbered_sample(number) for number in range(7))
    assert loader.all_users() == oracle.read(samples)[0]


@pytest.mark.begin_early
def test_a_cluster_that_loses_all_workers(
    loader: Loader, cluster: Cluster, huge: Path
) -> None:
    workers = cluster.workers(2)
    loader.load(SAMPLE)
    before = loader.content()
    options = ["--cluster", cluster.address, "--max-bad-records", 1000]
    with loader.start(*options, *[huge] * 40) as load:
        assert cluster.is_scanning(load, huge)
        for worker in workers:
            worker.kill()
        out, err = load.communicate(timeout=120)
    bad, error = messages(err)
    what = "has no workers any more; start some and load again"
    said = f"Error: {cluster.address}: {what}"
    assert (load.returncode, out, error) == (1, b"", said)
    assert [line for line in bad if not line.startswith(f"{huge}:")] == []
    assert loader.content() == before


def test_a_cluster_whose_scheduler_is_lost(
    loader: Loader, cluster: Cluster, huge: Path
) -> None:
    cluster.worker()
    options = ["--cluster", cluster.address, "--max-bad-records", 1000]
    with loader.start(*options, *[huge] * 40) as load:
        assert cluster.is_scanning(load, huge)
        cluster.processes[0].kill()
        out, err = load.communicate(timeout=120)
    bad, error = messages(err)
    assert (load.returncode, out) == (1, b"")
    assert error.startswith(f"Error: {cluster.address}: ")
    assert "Client lost the connection to the scheduler" in error
    assert [line for line in bad if not line.startswith(f"{huge}:")] == []
    assert not loader.db.exists()


def messages(err: bytes) -> tuple[list[str], str]:
    """Return the lines about bad records, and the last one."""
    *bad, error = err.decode().splitlines()
    return [line for line in bad if not line.startswith("and ")], error


def test_ctrl_c_ends_it(loader: Loader, cluster: Cluster, huge: Path) -> None:
    cluster.worker()
    options = ["--cluster", cluster.address, "--max-bad-records", 1000]
    with loader.start(*options, *[huge] * 40) as load:
        assert cluster.is_scanning(load, huge)
        load.send_signal(signal.SIGINT)
        out, err = load.communicate(timeout=60)
    bad, end = messages(err)
    assert (load.returncode, out, f"{end}\n".encode()) == (130, b"", INTERRUPTED)
    assert [line for line in bad if not line.startswith(f"{huge}:")] == []
    assert not loader.db.exists()
    # The cluster is free again.
    loader.load("--cluster", cluster.address, SAMPLE, process=True)
    assert loader.table() == SAMPLE_TABLE


@pytest.mark.begin_early
@pytest.mark.parametrize(
    ("address", "what"),
    [
        ("nonsense://x:1", "ValueError: unknown address scheme 'nonsense' "),
        ("tcp://127.0.0.1:1", "Timed out trying to connect to tcp://127.0.0.1:1 "),
    ],
)
def test_a_cluster_that_does_not_answer(
    loader: Loader, address: str, what: str
) -> None:
    said = loader.refuse("--cluster", address, SAMPLE, process=True)
    assert said.startswith(f"Error: {address}: {what}")
    assert said.count("\n") == 1
    assert list(loader.directory.iterdir()) == []


def test_no_password_of_a_cluster_is_shown(loader: Loader) -> None:
    address = "tls://bob:S3CRT@127.0.0.1:x"
    said = loader.refuse("--cluster", address, SAMPLE, process=True)
    assert re.fullmatch(r"Error: tls://127\.0\.0\.1:x: [^\n]+\n", said)
    assert "S3CRT" not in said
    assert list(loader.directory.iterdir()) == []


def test_a_server_that_is_no_scheduler(loader: Loader) -> None:
    """It takes what a client sends, and answers nothing."""
    hasty = loader.with_constants(CLUSTER_SECONDS=1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        said = hasty.refuse("--cluster", address, SAMPLE)
    assert said == f"Error: {address}: no answer for 1 s\n"


def test_a_configuration_of_dask_that_cannot_be_read(loader: Loader) -> None:
    file = loader.directory / loader.file(b"{{{", "dask.yaml")
    args = ["--cluster", "tcp://127.0.0.1:1", SAMPLE]
    said = loader.refuse(*args, env={"DASK_CONFIG": str(file)}, process=True)
    what = f"ValueError: A dask config file at '{file}' is malformed"
    assert said.startswith(f"Error: tcp://127.0.0.1:1: {what}")
    assert said.count("\n") == 1


def test_a_cluster_without_workers(loader: Loader, cluster: Cluster) -> None:
    what = f"has no workers; start some with: dask worker {cluster.address}"
    said = loader.refuse("--cluster", cluster.address, SAMPLE, process=True)
    assert said == f"Error: {cluster.address}: {what}\n"


OTHER_PYTHON = """
from distributed import versions
def of_packages(names, real=versions.get_package_info):
    return {**real(names), "python": "3.10.1.final.0"}
versions.get_package_info = of_packages
"""


@pytest.mark.parametrize(
    "found", ["msgspec 0.1.2", "stringzilla 0.1.2", "python 3.10.1.final.0"]
)
def test_other_versions(loader: Loader, cluster: Cluster, found: str) -> None:
    package, version = found.split()
    if package == "python":
        ours = f"{platform.python_version()}.final.0"
        env = loader.with_site(OTHER_PYTHON)
    else:
        ours = metadata(package)
        env = loader.with_site("")
        information = Path(env["PYTHONPATH"]) / f"{package}-{version}.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(f"Name: {package}\nVersion: {version}\n")
    cluster.worker(PYTHONPATH=env["PYTHONPATH"])
    said = loader.refuse("--cluster", cluster.address, SAMPLE, process=True)
    what = f"has {found}, where {ours} is used here; install the same requirements.txt"
    start = f"Error: {cluster.address}: the worker "
    assert re.fullmatch(rf"{start}tcp://127.0.0.1:\d+ {re.escape(what)}\n", said)


@AS_ROOT
def test_a_file_that_the_workers_do_not_see(loader: Loader, cluster: Cluster) -> None:
    hidden = loader.directory / "hidden"
    hidden.mkdir()
    (hidden / "x.jsons").write_bytes(lines(event()))
    script = f'mount -t tmpfs none {hidden} && exec "$@"'
    cluster.worker(before=("unshare", "--mount", "sh", "-c", script, "sh"))
    args = ["--cluster", cluster.address, SAMPLE, hidden / "x.jsons"]
    said = loader.refuse(*args, process=True)
    what = f"No such file or directory (on a worker of {cluster.address})"
    assert said == f"Error: {hidden}/x.jsons:1: {what}\n"


WITHOUT_WORKERS = """
import distributed
real, calls = distributed.Client.nthreads, []
def nthreads(client):
    calls.append(client)
    return real(client) if len(calls) <= 2 else {}
distributed.Client.nthreads = nthreads
"""


def test_no_range_is_left_out_while_there_are_no_workers(
    loader: Loader, cluster: Cluster
) -> None:
    """The scheduler may see none for a moment, between two tasks.

    Here it sees some at the start only. The sample is cut into 13 ranges.
    """
    cluster.worker()
    other = loader.with_constants(CLUSTER_RANGE_BYTES=200_000)
    env = loader.with_site(WITHOUT_WORKERS)
    other.load("--cluster", cluster.address, SAMPLE, env=env)
    assert loader.all_users() == oracle.read(SAMPLE.read_bytes())[0]
