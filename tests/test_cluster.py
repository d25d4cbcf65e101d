"""Scanning on a real Dask cluster: a scheduler and workers that are started as processes on the loopback interface."""

import gzip
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import distributed
import pytest
from conftest import SAMPLE, Loader, event, lines
from test_robust import ROWS, start, wait_for

from load_active_users import Rule, Scanner, ranges, scan_on_cluster


class Cluster:
    """A scheduler, and workers of one thread."""

    def __init__(self, directory: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.directory = directory
        self.address = f"tcp://127.0.0.1:{port}"
        self.processes: list[subprocess.Popen[bytes]] = []
        self.run("scheduler", "--port", str(port))

        def answers() -> bool:
            with socket.socket() as client:
                return client.connect_ex(("127.0.0.1", port)) == 0

        assert wait_for(answers)

    def run(self, what: str, *args: str, before: tuple[str, ...] = (), **env: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", f"distributed.cli.dask_{what}", "--host", "127.0.0.1", "--no-dashboard", *args]
        log = (self.directory / f"{len(self.processes)}.log").open("wb")
        environment = {**os.environ, **env}
        self.processes.append(
            subprocess.Popen([*before, *command], cwd=self.directory, env=environment, stdout=log, stderr=log)
        )
        return self.processes[-1]

    def worker(self, before: tuple[str, ...] = (), **env: str) -> subprocess.Popen[bytes]:
        """Start a worker, and wait until the scheduler knows it."""
        number = len(self.processes)
        options = ["--nthreads", "1", "--local-directory", str(self.directory), "--no-nanny"]
        process = self.run("worker", self.address, *options, before=before, **env)
        log = self.directory / f"{number}.log"
        assert wait_for(lambda: b"Registered to" in log.read_bytes()), log.read_text()
        return process

    def stop(self) -> None:
        for process in reversed(self.processes):
            process.kill()
            process.wait()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    (tmp_path / "cluster").mkdir()
    cluster = Cluster(tmp_path / "cluster")
    yield cluster
    cluster.stop()


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large") / "large.jsons"
    with path.open("wb") as file:
        for number in range(250):
            for row in ROWS:
                file.write(row.replace(b'"user_pseudo_id":"', b'"user_pseudo_id":"%d-' % (number % 7), 1))
            file.write(b"\n" if number % 50 else b"{cut off\n")
    return path


def test_a_cluster_changes_nothing(loader: Loader, cluster: Cluster, large: Path) -> None:
    packed = loader.directory / loader.file(gzip.compress(SAMPLE.read_bytes() + b"bad"), "packed.gz")
    for _ in range(2):
        cluster.worker()
    results = []
    for options in ([], ["--cluster", cluster.address]):
        loader.db = loader.directory / f"{len(results)}.db"
        args = ["--db", loader.db, "--max-bad-records", 99, "--rejects", "rejects", "--format", "json"]
        done = loader.run(*options, *args, large, packed, SAMPLE)
        assert done.returncode == 0, done
        content = [row for row in loader.content() if "load_log" not in row]
        results.append((done.stdout, done.stderr, (loader.directory / "rejects").read_bytes(), content))
    assert results[0] == results[1]
    assert json.loads(results[0][0])["bad_records"] == 6


def test_a_worker_that_is_killed_is_made_up_for(loader: Loader, cluster: Cluster, large: Path) -> None:
    workers = [cluster.worker() for _ in range(2)]
    with start(
        loader, "--cluster", cluster.address, "--max-bad-records", 1000, "--format", "json", *[large] * 20
    ) as load:
        time.sleep(1.2)
        assert load.poll() is None
        workers[0].kill()
        out, _ = load.communicate(timeout=120)
    assert load.returncode == 0
    report = json.loads(out)
    assert [date["active_user_count"] for date in report["dates"]] == [7 * 11, 7 * 31, 7 * 22]
    assert report["lines"] == 20 * 250 * 1001
    assert report["bad_records"] == 20 * 5


def test_ctrl_c_ends_it(loader: Loader, cluster: Cluster, large: Path) -> None:
    cluster.worker()
    with start(loader, "--cluster", cluster.address, "--max-bad-records", 1000, *[large] * 40) as load:
        time.sleep(1.5)
        load.send_signal(signal.SIGINT)
        out, err = load.communicate(timeout=30)
    assert (load.returncode, out) == (130, b"")
    assert err == b"SIGINT: a load that is not committed leaves nothing behind\n"
    assert not loader.db.exists()
    assert loader.load("--cluster", cluster.address, SAMPLE)["lines"] == 1000  # the cluster is free again


def test_clusters_that_cannot_be_used(loader: Loader, cluster: Cluster) -> None:
    name = loader.file(lines(event()))
    nobody = "tcp://127.0.0.1:1"
    assert loader.refuse("--cluster", nobody, name) == (
        f"Error: {nobody}: no Dask scheduler answers there; look after it and its address\n"
    )
    assert "no Dask scheduler answers there" in loader.refuse("--cluster", "nonsense://x", name)
    assert loader.refuse("--cluster", cluster.address, name) == (
        f"Error: {cluster.address}: has no workers; start some with: dask worker {cluster.address}\n"
    )
    for options in (["-"], ["--commit-every", 5, name]):
        said = loader.refuse("--cluster", cluster.address, *options, status=2)
        assert "--cluster can't be combined with --commit-every or standard input" in said


def test_other_versions(loader: Loader, cluster: Cluster) -> None:
    site = loader.directory / "site"
    (site / "msgspec-0.1.2.dist-info").mkdir(parents=True)
    (site / "msgspec-0.1.2.dist-info" / "METADATA").write_text("Name: msgspec\nVersion: 0.1.2\n")
    cluster.worker(PYTHONPATH=str(site))
    said = loader.refuse("--cluster", cluster.address, SAMPLE)
    assert "has msgspec 0.1.2, where " in said
    assert said.endswith("install the same requirements.txt\n")
    assert said.count("\n") == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to hide a directory from a worker")
def test_a_file_that_the_workers_do_not_see(loader: Loader, cluster: Cluster) -> None:
    hidden = loader.directory / "hidden"
    hidden.mkdir()
    (hidden / "x.jsons").write_bytes(lines(event()))
    script = f'mount -t tmpfs none {hidden} && exec "$@"'
    cluster.worker(before=("unshare", "--mount", "sh", "-c", script, "sh"))
    said = loader.refuse("--cluster", cluster.address, SAMPLE, hidden / "x.jsons")
    assert said == (
        f"Error: {hidden}/x.jsons:1: [Errno 2] No such file or directory: '{hidden}/x.jsons' "
        f"(on a worker of {cluster.address})\n"
    )


def test_no_range_is_left_out_while_there_are_no_workers(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a moment, between two tasks: as the scheduler sees it, there is none but at the start."""
    cluster.worker()
    path = tmp_path / "events.jsons"
    path.write_bytes(b"".join(ROWS))
    real, calls = distributed.Client.nthreads, []

    def nthreads(client: distributed.Client) -> dict[str, int]:
        calls.append(client)
        return real(client) if len(calls) <= 2 else {}

    monkeypatch.setattr(distributed.Client, "nthreads", nthreads)
    scan = Scanner(Rule("US/Central", 3000, ["*_event"]))
    parts = ranges([str(path)], 200_000)
    found = list(scan_on_cluster(parts, scan, cluster.address))
    assert sorted(index for index, _ in found) == list(range(len(parts)))
    assert sum(batch.lines for _, batch in found) == 1000
