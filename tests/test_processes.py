"""Processes that scan: they change no result, share the work, and end with the load."""

import gzip
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import oracle
import pytest
from helpers import (
    AS_ROOT,
    INTERRUPTED,
    KILLS,
    NOT_AN_OBJECT,
    ROOT,
    SAMPLE,
    SAMPLE_TABLE,
    TERMINATED,
    Loader,
    Process,
    is_alive,
    make_dates,
    make_rule,
    numbered_sample,
    wait_for,
    workers_of,
)

import load_active_users
from load_active_users import POOL_MIN_BYTES

KILLED = "Error: a scanning process was killed (out of memory?); try fewer --workers\n"


def test_the_number_of_workers_changes_nothing(loader: Loader, large: Path) -> None:
    results = []
    for workers in (1, 2, 3, 5):
        loader.db = loader.directory / f"{workers}.db"
        options = ["--workers", workers, "--db", loader.db, "--max-bad-records", 99]
        options += ["--rejects", f"{workers}.rejects", "--format", "json"]
        done = loader.run(*options, large, SAMPLE, large, process=True)
        assert done.returncode == 0
        rejects = (loader.directory / f"{workers}.rejects").read_bytes()
        results.append((done.stdout, done.stderr, rejects, loader.content_but_log()))
    assert results[1:] == results[:1] * 3

    users, tally, bad = oracle.read(large.read_bytes())
    report, messages = json.loads(results[0][0]), results[0][1].decode().splitlines()
    sample = oracle.read(SAMPLE.read_bytes())[0]
    counts = {day["date"]: day["active_user_count"] for day in report["dates"]}
    assert counts == {day: len(users[day] | sample[day]) for day in sorted(users)}
    assert report["lines"] == 2 * tally["lines"] + 1000
    places = [line.split(": ")[0] for line in messages[:20]]
    assert places == [f"{large}:{number}" for number in bad][:20]
    assert messages[20:] == [f"and {2 * len(bad) - 20} more bad records"]
    assert results[0][2] == b"".join(line + b"\n" for line in bad.values()) * 2


def test_compressed_files_are_scanned_by_several_workers(loader: Loader) -> None:
    """If some are damaged, the first is named, whoever comes across it first."""
    names = []
    for number in range(8):
        data = numbered_sample(number) * 4 + b"bad\n"
        names.append(loader.file(gzip.compress(data, 1), f"{number}.gz"))
    sizes = [(loader.directory / name).stat().st_size for name in names]
    assert sum(sizes) * 10 > POOL_MIN_BYTES
    loader.load(SAMPLE)
    results = []
    bad_records = ["--max-bad-records", 8]
    for workers in (1, 2, 4):
        options = ["--workers", workers, "--dry-run", "--format", "json"]
        done = loader.run(*options, *bad_records, *names, process=True)
        results.append((done.returncode, done.stdout, done.stderr.decode()))
    assert results[1:] == results[:1] * 2
    counts = [date["active_user_count"] for date in json.loads(results[0][1])["dates"]]
    assert counts == [9 * 11, 9 * 31, 9 * 22]
    bad = [f"{name}:4001: {NOT_AN_OBJECT}\n" for name in names]
    assert (results[0][0], results[0][2]) == (0, "".join(bad))

    for number in (2, 3):
        path = loader.directory / names[number]
        path.write_bytes(path.read_bytes()[: -1000 * number])
    how = "Compressed file ended before the end-of-stream marker was reached"
    damaged = rf"the compressed data is damaged or cut off \({how}\)"
    messages = {
        loader.refuse("--workers", workers, *bad_records, *names, process=True)
        for workers in (1, 2, 4)
    }
    (message,) = messages
    *shown, error = message.splitlines(keepends=True)
    assert shown == bad[:2]
    assert re.fullmatch(rf"Error: 2\.gz:\d+: {damaged}; fetch the file again\n", error)


# -- Killed, interrupted


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_worker_is_a_clear_error(
    loader: Loader, good: Path, number: int
) -> None:
    loader.load(SAMPLE)
    before = loader.content()
    with loader.start("--workers", 2, *[good] * 40) as process:
        pids = workers_of(process)
        os.kill(pids[0], number)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err.decode()) == (1, b"", KILLED)
    assert not any(map(is_alive, pids))
    assert loader.content() == before


def test_workers_that_are_killed_at_any_moment(loader: Loader, good: Path) -> None:
    """Whether one or all: the load ends with just the one line, and leaves no
    process."""
    chance = random.Random(3)
    for _ in range(KILLS):
        with loader.start("--dry-run", "-q", "--workers", 3, *[good] * 4) as process:
            pids = workers_of(process, 3)
            time.sleep(chance.choice((0, chance.uniform(0, 0.4))))
            for pid in chance.sample(pids, chance.randint(1, 3)):
                with suppress(ProcessLookupError):
                    os.kill(pid, chance.choice((signal.SIGKILL, signal.SIGTERM)))
            out, err = process.communicate(timeout=60)
        assert (process.returncode, out, err.decode()) in (
            (1, b"", KILLED),
            (0, b"", ""),
        )
        assert not any(map(is_alive, pids))


@pytest.mark.parametrize("whole_group", [True, False])
@pytest.mark.parametrize(
    ("number", "status", "message"),
    [(signal.SIGINT, 130, INTERRUPTED), (signal.SIGTERM, 143, TERMINATED)],
)
def test_a_signal_ends_the_load_and_its_workers(
    loader: Loader,
    good: Path,
    whole_group: bool,
    number: int,
    status: int,
    message: bytes,
) -> None:
    with loader.start("--workers", 2, *[good] * 40, start_new_session=True) as process:
        pids = workers_of(process)
        (os.killpg if whole_group else os.kill)(process.pid, number)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (status, b"", message)
    assert not any(map(is_alive, pids))
    assert not loader.db.exists()


def test_ctrl_c_is_not_for_the_workers(loader: Loader, good: Path) -> None:
    with loader.start("--workers", 2, "--format", "json", *[good] * 20) as process:
        for pid in workers_of(process) * 3:
            time.sleep(0.01)
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    counts = {day["date"]: day["active_user_count"] for day in json.loads(out)["dates"]}
    assert (process.returncode, counts, err) == (0, SAMPLE_TABLE, b"")


def test_no_worker_outlives_its_parent(loader: Loader, good: Path) -> None:
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with loader.start("--workers", 3, *[good] * 40, **silent) as process:
        pids = workers_of(process, 3)
        process.kill()
    assert wait_for(lambda: not any(map(is_alive, pids)))


# -- How the work is shared


SCANNING = """
import os, sys, time
from load_active_users import Batch, LoadError, Range, scan_in_processes
"""


def in_python(directory: Path, code: str, *args: str) -> tuple[int, str, str]:
    """Run code that scans in processes with a scanner of its own; return how it ended.

    It needs a process: this one has threads, and must not fork.
    """
    done = subprocess.run(
        [sys.executable, "-c", SCANNING + code, *args],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout, done.stderr


TWO_ERRORS = """
def scan(part):
    if part.source == sys.argv[1]:
        while not os.path.exists("found"):
            time.sleep(0.01)
    open("found", "w").close()
    raise LoadError(part.source)
    yield Batch()

parts = [Range("first", size=1), Range("second", size=1)]
try:
    list(scan_in_processes(parts, scan, 2))
except LoadError as error:
    print(error)
"""


@pytest.mark.parametrize("slow", ["first", "second"])
def test_the_error_of_the_first_range_is_raised(tmp_path: Path, slow: str) -> None:
    """The slow range waits until the other error has been found."""
    assert in_python(tmp_path, TWO_ERRORS, slow) == (0, "first\n", "")


LONG_ANSWERS = """
parts = [Range(f"{n}{'x' * 50_000}", size=1 if n > 1 else 1000) for n in range(20)]

def scan(part):
    yield Batch(bad=[(1, "", b"x" * 300_000)])

found = list(scan_in_processes(parts, scan, 3))
print([part for part, _ in found] == parts)
"""


def test_no_process_is_sent_more_than_its_pipe_holds(tmp_path: Path) -> None:
    """Of many small ranges beside large ones, while it waits to answer with much.

    If the pipes were full in both directions, nothing would go on.
    """
    assert in_python(tmp_path, LONG_ANSWERS) == (0, "True\n", "")


SHARED_WORK = """
parts = [Range(f"{n}", size=1 + 999 * (n % 2 == 0)) for n in range(24)]

def scan(part):
    yield Batch(bad=[(os.getpid(), "", b"")])

work = {}
for part, batch in scan_in_processes(parts, scan, 2):
    pid = batch.bad[0][0]
    work[pid] = work.get(pid, 0) + part.work
print(*work.values(), parts[0].work)
"""


def test_large_and_small_files_are_shared_evenly(tmp_path: Path) -> None:
    """The files are large and small in turn."""
    status, out, err = in_python(tmp_path, SHARED_WORK)
    assert (status, err) == (0, "")
    one, other, large = map(int, out.split())
    assert abs(one - other) < 2 * large


NO_MEMORY = """
class Huge(bytes):
    def __reduce__(self):
        raise MemoryError

def scan(part):
    yield Batch(bad=[(1, "", Huge())])

try:
    list(scan_in_processes([Range("x", size=1)], scan, 1))
except LoadError as error:
    print(f"Error: {error}")
"""


def test_a_process_without_memory_for_its_answer(tmp_path: Path) -> None:
    assert in_python(tmp_path, NO_MEMORY) == (0, KILLED, "")


# -- Limits of the machine

WORKERS_NEED_FILES = "Error: scanning processes: Too many open files\n"
WORKERS_NEED_PROCESSES = "Error: scanning processes: Resource temporarily unavailable\n"
AS_NOBODY = (  # who may have few processes, but reads and writes all files
    "setpriv --reuid=65500 --clear-groups --inh-caps=+dac_override,+dac_read_search "
    "--ambient-caps=+dac_override,+dac_read_search prlimit --nproc={}"
)


@pytest.mark.parametrize("limit", [6, 8, 10, 12])
def test_few_open_files(loader: Loader, good: Path, limit: int) -> None:
    before = f"prlimit --nofile={limit}"
    done = loader.run_under(before, "-q", "--workers", 8, good)
    assert done == (1, b"", WORKERS_NEED_FILES)
    assert not loader.db.exists()
    assert loader.run_under(before, "-q", "--workers", 1, good) == (0, b"", "")
    assert loader.table() == SAMPLE_TABLE


@AS_ROOT
@pytest.mark.parametrize("limit", [1, 2, 3])
def test_few_processes(loader: Loader, good: Path, limit: int) -> None:
    """Beside the loader there are three workers, one for each range."""
    for path in (loader.directory, *loader.directory.parents[:3], good.parent):
        path.chmod(0o777)
    done = loader.run_under(AS_NOBODY.format(limit), "-q", "--workers", 4, good)
    assert done == (1, b"", WORKERS_NEED_PROCESSES)
    assert not loader.db.exists()
    done = loader.run_under(AS_NOBODY.format(1), "-q", "--workers", 1, good)
    assert done == (0, b"", "")
    assert loader.table() == SAMPLE_TABLE


# -- Start-up

HEAVY = {"json", "multiprocessing", "concurrent.futures", "isal", "backports.zstd"}
HEAVY |= {"compression.zstd", "matplotlib", "numpy", "distributed", "psycopg", "fsspec"}


def test_the_sample_needs_no_heavy_import(loader: Loader) -> None:
    python, *command = loader.command("-q", SAMPLE)
    command = [python, "-X", "importtime", *command]
    done = subprocess.run(command, cwd=loader.directory, capture_output=True, text=True)
    assert (done.returncode, loader.table()) == (0, SAMPLE_TABLE)
    rows = [line.rpartition("|") for line in done.stderr.splitlines()]
    imported = {name.strip() for _, _, name in rows}
    assert {"click", "msgspec", "stringzilla"} <= imported
    assert not imported & HEAVY


# -- How many workers there are

CPUS = {
    # processors, --workers, ranges; the workers, or 0 if the load scans by itself
    "one processor": (1, None, 50, 0),
    "some": (3, None, 50, 3),
    "as many as the most": (16, None, 50, 16),
    "more than the most": (17, None, 50, 16),
    "very many": (200, None, 50, 16),
    "fewer ranges": (8, None, 5, 5),
    "as --workers says": (3, 2, 50, 2),
    "more than processors": (3, 7, 50, 7),
    "more than the most by default": (3, 40, 50, 40),
    "one": (8, 1, 50, 0),
    "more than ranges": (3, 40, 5, 5),
}


@pytest.mark.parametrize(
    ("cpus", "option", "ranges", "expected"), CPUS.values(), ids=CPUS
)
def test_how_many_workers_there_are(
    monkeypatch: pytest.MonkeyPatch,
    cpus: int,
    option: int | None,
    ranges: int,
    expected: int,
) -> None:
    """--workers goes before the processors, of which 16 are used by default."""
    started: list[int] = []

    def start(parts: list[Any], scanner: Any, workers: int) -> Any:
        started.append(workers)
        return iter(())

    monkeypatch.setattr(load_active_users, "count_cpus", lambda: cpus)
    monkeypatch.setattr(load_active_users, "scan_in_processes", start)
    parts = [load_active_users.Range("x", 0, 1, size=1 << 30)] * ranges
    scanner = load_active_users.Scanner(make_rule(), make_dates())
    load_active_users.scan(parts, scanner, option, None)
    assert started == ([expected] if expected else [])


QUOTAS = {
    "one and a half processors": ("150000 100000\n", 2),
    "half of one": ("50000 100000\n", 1),
    "as many as there are": ("max 100000\n", 4),
    "more than there are": ("900000 100000\n", 4),
    "no such file": (None, 4),
}


@pytest.mark.parametrize(("quota", "expected"), QUOTAS.values(), ids=QUOTAS)
def test_the_processors_that_may_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str | None, expected: int
) -> None:
    """Of eight, four may be used by the process, and its cgroup may have a quota."""
    path = tmp_path / "cpu.max"
    if quota:
        path.write_text(quota)

    def open_other(name: str, **more: Any) -> Any:
        assert name == "/sys/fs/cgroup/cpu.max"
        return path.open(**more)

    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 3, 5, 7})
    monkeypatch.setattr(load_active_users, "open", open_other, raising=False)
    assert load_active_users.count_cpus() == expected


def test_a_load_that_may_use_one_processor_starts_no_worker(
    loader: Loader, good: Path
) -> None:
    """Unless --workers tells it to: then it may start none, and says so."""
    if len(os.sched_getaffinity(0)) == 1:
        pytest.skip("needs several processors")
    (cpu, *_) = sorted(os.sched_getaffinity(0))
    under = f"taskset --cpu-list {cpu} prlimit --nofile=8"
    assert loader.run_under(under, "-q", good) == (0, b"", "")
    assert loader.table() == SAMPLE_TABLE
    status, out, _ = loader.run_under(under, "-q", "--workers", 2, good)
    assert (status, out) == (1, b"")


# -- A worker without its parent

ENDLESS = """
def scan(part):
    open(f"begun-{os.getpid()}", "w").close()
    while True:
        time.sleep(0.01)
        yield Batch()

list(scan_in_processes([Range("x", size=1), Range("y", size=1)], scan, 2))
"""


def test_an_orphan_does_not_finish_its_range(tmp_path: Path) -> None:
    """It has nothing to send for long, but sees that its parent is no more."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SCANNING + ENDLESS]
    with Process(command, cwd=tmp_path, env=env) as process:
        pids = workers_of(process)
        files = [tmp_path / f"begun-{pid}" for pid in pids]
        began = wait_for(lambda: all(file.exists() for file in files))
        process.kill()
    ended = wait_for(lambda: not any(map(is_alive, pids)), 10)
    for pid in filter(is_alive, pids):
        os.kill(pid, signal.SIGKILL)
    assert (began, ended) == (True, True)


# -- What a worker sends


def test_a_worker_sends_what_it_found_in_parts(loader: Loader) -> None:
    """A file is one range, of many batches: each is sent by itself."""
    names = [
        loader.file(gzip.compress(numbered_sample(number)), f"{number}.gz")
        for number in (1, 2, 3)
    ]
    sizes = {"BLOCK_BYTES": 5000, "BATCH_BYTES": 20_000, "SEND_BYTES": 0}
    parts = loader.with_constants(**sizes, POOL_MIN_BYTES=0)
    report = parts.load("--workers", 2, *names)
    counts = {day["date"]: day["active_user_count"] for day in report["dates"]}
    assert counts == {day: 3 * count for day, count in SAMPLE_TABLE.items()}
    by_parts = loader.content_but_log()
    loader.db.unlink()
    whole = loader.load("--workers", 1, *names)
    assert {**report, "seconds": 0, "load_id": ""} == {
        **whole,
        "seconds": 0,
        "load_id": "",
    }
    assert loader.content_but_log() == by_parts
