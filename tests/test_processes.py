"""Processes that scan: they change no result, share the work, and end with the load."""

import gzip
import json
import operator
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import oracle
import pytest
from helpers import (
    INTERRUPTED,
    KILLS,
    SAMPLE,
    TERMINATED,
    Loader,
    is_alive,
    numbered_sample,
    wait_for,
    workers_of,
)

import load_active_users
from load_active_users import POOL_MIN_BYTES, Batch, LoadError, Range, scan_in_processes

KILLED = "Error: a scanning process was killed (out of memory?); try fewer --workers\n"


def test_the_number_of_workers_changes_nothing(loader: Loader, large: Path) -> None:
    results = []
    for workers in (1, 2, 3, 5):
        loader.db = loader.directory / f"{workers}.db"
        options = ["--workers", workers, "--db", loader.db, "--max-bad-records", 99]
        outputs = ["--rejects", f"{workers}.rejects", "--format", "json"]
        done = loader.run(*options, *outputs, large, SAMPLE, large)
        assert done.returncode == 0
        rejects = (loader.directory / f"{workers}.rejects").read_bytes()
        results.append((done.stdout, done.stderr, rejects, loader.content_but_log()))
    assert results[1:] == results[:1] * 3

    users, tally, bad = oracle.read(large.read_bytes())
    report, messages = json.loads(results[0][0]), results[0][1].decode().splitlines()
    sample = oracle.read(SAMPLE.read_bytes())[0]
    assert {date["date"]: date["active_user_count"] for date in report["dates"]} == {
        date: len(users[date] | sample[date]) for date in sorted(users)
    }
    assert report["lines"] == 2 * tally["lines"] + 1000
    assert [line.split(": ")[0] for line in messages[:20]] == [
        f"{large}:{n}" for n in bad
    ][:20]
    assert messages[20:] == [f"and {2 * len(bad) - 20} more bad records"]
    assert results[0][2] == b"".join(line + b"\n" for line in bad.values()) * 2


def test_compressed_files_are_scanned_by_several_workers(loader: Loader) -> None:
    """Also when one is damaged, the same one is named, whoever comes across it
    first."""
    names = []
    for number in range(8):
        data = numbered_sample(number) * 4 + b"bad\n"
        names.append(loader.file(gzip.compress(data, 1), f"{number}.gz"))
    assert (
        sum((loader.directory / name).stat().st_size for name in names) * 10
        > POOL_MIN_BYTES
    )
    results = []
    for workers in (1, 2, 4):
        options = [
            "--workers",
            workers,
            "--dry-run",
            "--max-bad-records",
            8,
            "--format",
            "json",
        ]
        loader.load(SAMPLE)
        done = loader.run(*options, *names)
        results.append((done.returncode, done.stdout, done.stderr.decode()))
    assert results[1:] == results[:1] * 2
    counts = [date["active_user_count"] for date in json.loads(results[0][1])["dates"]]
    assert counts == [9 * 11, 9 * 31, 9 * 22]
    why = "is not a JSON object, {...}: one event per line is expected"
    assert results[0][2] == "".join(f"{name}:4001: {why}\n" for name in names)

    for number in (2, 3):
        path = loader.directory / names[number]
        path.write_bytes(path.read_bytes()[: -1000 * number])
    options = ["--max-bad-records", 8]
    messages = {
        loader.refuse("--workers", workers, *options, *names) for workers in (1, 2, 4)
    }
    assert len(messages) == 1
    *bad, error = messages.pop().splitlines()
    assert bad == [f"{name}:4001: {why}" for name in names[:2]]
    how = "Compressed file ended before the end-of-stream marker was reached"
    damaged = (
        rf"the compressed data is damaged or cut off \({how}\); fetch the file again"
    )
    assert re.fullmatch(rf"Error: 2\.gz:\d+: {damaged}", error)


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
    """One of them or all: the load ends, with just the one line, and leaves no
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
    assert (process.returncode, len(json.loads(out)["dates"]), err) == (0, 3, b"")


def test_no_worker_outlives_its_parent(loader: Loader, good: Path) -> None:
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with loader.start("--workers", 3, *[good] * 40, **silent) as process:
        pids = workers_of(process, 3)
        process.kill()
    assert wait_for(lambda: not any(map(is_alive, pids)))


# -- How the work is shared


@pytest.mark.parametrize("slow", ["first", "second"])
def test_the_error_of_the_first_range_is_raised(tmp_path: Path, slow: str) -> None:
    """Whichever is found first: the slow one waits until the other has been found."""
    found = tmp_path / "found"

    def scan(part: Range) -> Iterator[Batch]:
        if part.source == slow:
            assert wait_for(found.exists)
        found.touch()
        raise LoadError(part.source)
        yield Batch()

    with pytest.raises(LoadError, match=r"^first$"):
        parts = [Range("first", size=1), Range("second", size=1)]
        list(scan_in_processes(parts, scan, 2))  # type: ignore[arg-type]


def test_no_process_is_sent_more_than_its_pipe_holds() -> None:
    """Of many small ranges beside large ones, while it waits to answer with much."""
    parts = [Range(f"{n}{'x' * 50_000}", size=1 if n > 1 else 1000) for n in range(20)]

    def scan(part: Range) -> Iterator[Batch]:
        yield Batch(bad=[(1, "", b"x" * 300_000)])

    def alarm(*_: object) -> None:
        raise AssertionError("it hangs")  # TimeoutError would be one of the pipe

    before = signal.signal(signal.SIGALRM, alarm)
    signal.alarm(60)
    try:
        found = list(scan_in_processes(parts, scan, 3))  # type: ignore[arg-type]
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert [part for part, _ in found] == parts


def test_large_and_small_files_are_shared_evenly() -> None:
    """Of large and small files in turn."""
    parts = [Range(f"{n}", size=1 + 999 * (n % 2 == 0)) for n in range(24)]

    def scan(part: Range) -> Iterator[Batch]:
        yield Batch(bad=[(os.getpid(), "", b"")])

    work: dict[int, int] = defaultdict(int)
    for part, batch in scan_in_processes(parts, scan, 2):  # type: ignore[arg-type]
        work[batch.bad[0][0]] += part.work
    assert abs(operator.sub(*work.values())) < 2 * parts[0].work


class Huge(bytes):
    def __reduce__(self) -> Any:
        raise MemoryError


def test_a_process_without_memory_for_its_answer(
    capfd: pytest.CaptureFixture[str],
) -> None:
    def scan(part: Range) -> Iterator[Batch]:
        yield Batch(bad=[(1, "", Huge())])

    with pytest.raises(LoadError) as raised:
        list(scan_in_processes([Range("x", size=1)], scan, 1))  # type: ignore[arg-type]
    assert f"Error: {raised.value}\n" == KILLED
    assert capfd.readouterr().err == ""


# -- Limits of the machine

WORKERS_NEED_FILES = (
    "Error: scanning processes: Too many open files; allow more open files (ulimit"
    " -n)\n"
)
WORKERS_NEED_PROCESSES = (
    "Error: scanning processes: Resource temporarily unavailable; "
    "allow more processes (ulimit -u), or try fewer --workers\n"
)
AS_NOBODY = (  # who, unlike root, may have few processes, but reads and writes all files
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


@pytest.mark.skipif(
    os.geteuid() != 0, reason="needs root, to be another user than root"
)
@pytest.mark.parametrize("limit", [1, 2, 3])
def test_few_processes(loader: Loader, good: Path, limit: int) -> None:
    """Beside the loader there are three workers, one for each range."""
    for path in (loader.directory, *loader.directory.parents[:3], good.parent):
        path.chmod(0o777)
    done = loader.run_under(AS_NOBODY.format(limit), "-q", "--workers", 4, good)
    assert done == (1, b"", WORKERS_NEED_PROCESSES)
    assert not loader.db.exists()
    assert loader.run_under(AS_NOBODY.format(1), "-q", "--workers", 1, good) == (
        0,
        b"",
        "",
    )


def test_the_message_where_no_thread_can_start() -> None:
    said = load_active_users.reason(RuntimeError("can't start new thread"))
    what = (
        "can't start a thread; allow more processes (ulimit -u), or try fewer --workers"
    )
    assert said == what


# -- Start-up

HEAVY = {
    *(
        "multiprocessing",
        "isal",
        "backports.zstd",
        "json",
        "matplotlib",
        "distributed",
        "psycopg",
    ),
    *("fsspec", "numpy", "concurrent.futures"),
}


def test_the_sample_needs_no_heavy_import(loader: Loader) -> None:
    command = [sys.executable, "-X", "importtime", *loader.command(SAMPLE)[1:]]
    done = subprocess.run(command, cwd=loader.directory, capture_output=True, text=True)
    imported = {
        line.rsplit("|", 1)[1].strip()
        for line in done.stderr.splitlines()
        if "|" in line
    }
    assert {"click", "msgspec", "stringzilla"} <= imported
    assert not imported & HEAVY
