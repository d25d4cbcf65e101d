"""Scanning on a real Dask cluster: a scheduler and workers on the loopback
interface."""

import gzip
import json
import os
import platform
import re
import signal
import socket
from collections.abc import Iterator
from importlib.metadata import version as metadata
from pathlib import Path
from typing import Any

import pytest
from helpers import (
    INTERRUPTED,
    SAMPLE,
    SAMPLE_LINES,
    Loader,
    event,
    lines,
    make_rule,
    numbered_sample,
)
from servers import Cluster

from load_active_users import LoadError, Scanner, ranges, scan_on_cluster


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    (tmp_path / "cluster").mkdir()
    cluster = Cluster(tmp_path / "cluster")
    yield cluster
    cluster.stop()


@pytest.fixture(scope="module")
def large_for_a_cluster(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of two ranges and a bit, with five bad records."""
    path = tmp_path_factory.mktemp("large") / "large.jsons"
    samples = [numbered_sample(number) for number in range(7)]
    with path.open("wb") as file:
        for number in range(250):
            file.write(samples[number % 7])
            file.write(b"\n" if number % 50 else b"{cut off\n")
    return path


def test_a_cluster_changes_nothing(
    loader: Loader, cluster: Cluster, large_for_a_cluster: Path
) -> None:
    packed = loader.directory / loader.file(
        gzip.compress(SAMPLE.read_bytes() + b"bad"), "x.gz"
    )
    for _ in range(2):
        cluster.worker()
    results: list[tuple[Any, ...]] = []
    for options in ([], ["--cluster", cluster.address]):
        loader.db = loader.directory / f"{len(results)}.db"
        rejects = loader.directory / f"{len(results)}.rejects"
        args = ["--db", loader.db, "--max-bad-records", 99, "--rejects", rejects]
        done = loader.run(
            *options, *args, "--format", "json", large_for_a_cluster, packed, SAMPLE
        )
        assert done.returncode == 0, done
        content = [row for row in loader.content() or () if "load_log" not in row]
        results.append((done.stdout, done.stderr, rejects.read_bytes(), content))
    assert results[0] == results[1]
    assert json.loads(results[0][0])["bad_records"] == 6


def test_a_worker_that_is_killed_is_made_up_for(
    loader: Loader, cluster: Cluster, large_for_a_cluster: Path
) -> None:
    workers = [cluster.worker() for _ in range(2)]
    options = [
        "--cluster",
        cluster.address,
        "--max-bad-records",
        1000,
        "--format",
        "json",
    ]
    with loader.start(*options, *[large_for_a_cluster] * 4) as load:
        assert cluster.is_scanning(load, large_for_a_cluster)
        workers[0].kill()
        out, _ = load.communicate(timeout=120)
    assert load.returncode == 0
    report = json.loads(out)
    counts = [date["active_user_count"] for date in report["dates"]]
    assert counts == [7 * 11, 7 * 31, 7 * 22]
    assert report["lines"] == 4 * 250 * 1001
    assert report["bad_records"] == 4 * 5


def test_a_cluster_that_loses_all_workers(
    loader: Loader, cluster: Cluster, large_for_a_cluster: Path
) -> None:
    workers = [cluster.worker() for _ in range(2)]
    loader.load(SAMPLE)
    before = loader.content()
    options = ["--cluster", cluster.address, "--max-bad-records", 1000]
    with loader.start(*options, *[large_for_a_cluster] * 40) as load:
        assert cluster.is_scanning(load, large_for_a_cluster)
        for worker in workers:
            worker.kill()
        out, err = load.communicate(timeout=120)
    bad, error = messages(err)
    assert (load.returncode, out, error) == (
        1,
        b"",
        f"Error: {cluster.address}: has no workers any more; start some and load again",
    )
    assert [
        line for line in bad if not line.startswith(f"{large_for_a_cluster}:")
    ] == []
    assert loader.content() == before


def test_a_cluster_whose_scheduler_is_lost(
    loader: Loader, cluster: Cluster, large_for_a_cluster: Path
) -> None:
    cluster.worker()
    options = ["--cluster", cluster.address, "--max-bad-records", 1000]
    with loader.start(*options, *[large_for_a_cluster] * 40) as load:
        assert cluster.is_scanning(load, large_for_a_cluster)
        cluster.processes[0].kill()
        out, err = load.communicate(timeout=120)
    bad, error = messages(err)
    assert (load.returncode, out, error) == (
        1,
        b"",
        (
            f"Error: {cluster.address}: the scheduler was lost; check that it runs, and"
            " load again"
        ),
    )
    assert [
        line for line in bad if not line.startswith(f"{large_for_a_cluster}:")
    ] == []
    assert not loader.db.exists()


def messages(err: bytes) -> tuple[list[str], str]:
    """The lines about bad records, and the one about what ended the load."""
    *bad, error = err.decode().splitlines()
    return [line for line in bad if not line.startswith("and ")], error


def test_ctrl_c_ends_it(
    loader: Loader, cluster: Cluster, large_for_a_cluster: Path
) -> None:
    cluster.worker()
    options = ["--cluster", cluster.address, "--max-bad-records", 1000]
    with loader.start(*options, *[large_for_a_cluster] * 40) as load:
        assert cluster.is_scanning(load, large_for_a_cluster)
        load.send_signal(signal.SIGINT)
        out, err = load.communicate(timeout=60)
    bad, end = messages(err)
    assert (load.returncode, out, f"{end}\n".encode()) == (130, b"", INTERRUPTED)
    assert [
        line for line in bad if not line.startswith(f"{large_for_a_cluster}:")
    ] == []
    assert not loader.db.exists()
    # the cluster is free again
    assert loader.load("--cluster", cluster.address, SAMPLE)["lines"] == 1000


NOBODY = "no Dask scheduler answers there; check the address and that it runs"


def test_clusters_that_cannot_be_used(loader: Loader) -> None:
    for address in ("nonsense://x", "tcp://127.0.0.1:1"):
        assert (
            loader.refuse("--cluster", address, SAMPLE)
            == f"Error: {address}: {NOBODY}\n"
        )
    secret = "tls://bob:S3CRT@127.0.0.1:x"
    assert "S3CRT" not in loader.refuse("--cluster", secret, SAMPLE)
    assert list(loader.directory.iterdir()) == []


def test_a_server_that_is_no_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes what a client sends, and answers nothing."""
    monkeypatch.setattr("load_active_users.CLUSTER_SECONDS", 1)
    rule = make_rule("UTC")
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        found = scan_on_cluster(
            ranges(str(SAMPLE), 1 << 20), Scanner(rule, ("", "9")), address
        )
        with pytest.raises(LoadError) as refused:
            next(found)
    assert str(refused.value) == f"{address}: {NOBODY}"


def test_a_configuration_of_dask_that_cannot_be_read(loader: Loader) -> None:
    file = loader.directory / loader.file(b"{{{", "dask.yaml")
    said = loader.refuse(
        "--cluster", "tcp://127.0.0.1:1", SAMPLE, env={"DASK_CONFIG": str(file)}
    )
    what = f"Error: Dask: ValueError: A dask config file at '{file}' is malformed"
    assert said.startswith(what)
    assert said.count("\n") == 1


def test_a_cluster_without_workers(loader: Loader, cluster: Cluster) -> None:
    what = f"has no workers; start some with: dask worker {cluster.address}"
    assert (
        loader.refuse("--cluster", cluster.address, SAMPLE)
        == f"Error: {cluster.address}: {what}\n"
    )


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
    site = loader.directory / "site"
    package, version = found.split()
    if package != "python":
        information = site / f"{package}-{version}.dist-info"
        information.mkdir(parents=True)
        (information / "METADATA").write_text(f"Name: {package}\nVersion: {version}\n")
    else:
        site.mkdir()
        (site / "sitecustomize.py").write_text(OTHER_PYTHON)
    cluster.worker(PYTHONPATH=str(site))
    said = loader.refuse("--cluster", cluster.address, SAMPLE)
    ours = (
        platform.python_version() + ".final.0"
        if package == "python"
        else metadata(package)
    )
    what = f"has {found}, where {ours} is used here; install the same requirements.txt"
    start = f"Error: {cluster.address}: the worker "
    assert re.fullmatch(rf"{start}tcp://127.0.0.1:\d+ {re.escape(what)}\n", said)


@pytest.mark.skipif(
    os.geteuid() != 0, reason="needs root, to hide a directory from a worker"
)
def test_a_file_that_the_workers_do_not_see(loader: Loader, cluster: Cluster) -> None:
    hidden = loader.directory / "hidden"
    hidden.mkdir()
    (hidden / "x.jsons").write_bytes(lines(event()))
    script = f'mount -t tmpfs none {hidden} && exec "$@"'
    cluster.worker(before=("unshare", "--mount", "sh", "-c", script, "sh"))
    said = loader.refuse("--cluster", cluster.address, SAMPLE, hidden / "x.jsons")
    assert (
        said == f"Error: {hidden}/x.jsons:1: No such file or directory (on a worker of"
        f" {cluster.address})\n"
    )


def test_no_range_is_left_out_while_there_are_no_workers(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a moment, between two tasks: as the scheduler sees it, there is none but at
    the start."""
    import distributed  # which other processes of the tests can do without

    cluster.worker()
    path = tmp_path / "events.jsons"
    path.write_bytes(b"".join(SAMPLE_LINES))
    real, calls = distributed.Client.nthreads, []

    def nthreads(client: distributed.Client) -> dict[str, int]:
        calls.append(client)
        some: dict[str, int] = real(client)  # type: ignore[no-untyped-call]
        return some if len(calls) <= 2 else {}

    monkeypatch.setattr(distributed.Client, "nthreads", nthreads)
    rule = make_rule()
    scan = Scanner(rule, ("2000-01-01", "2099-12-31"))
    parts = ranges(str(path), 200_000)
    found = list(scan_on_cluster(parts, scan, cluster.address))
    assert [part for part, _ in found] == parts
    assert sum(batch.tally.lines for _, batch in found) == 1000
