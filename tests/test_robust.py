"""Processes, signals, crashes, crowds, full disks, closed streams and hostile input: a load ends in
the old state or the new one, with one line that says why."""

import fcntl
import gzip
import io
import itertools
import json
import os
import random
import resource
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import plain
import pytest
from conftest import ROOT, SAMPLE, SCRIPT, Loader, event, lines

import load_active_users
from load_active_users import (
    SMALL,
    Batch,
    Load,
    LoadError,
    Memo,
    Range,
    line_start,
    rule_of,
    scan_in_processes,
)

KILLS = int(os.environ.get("KILLS", "30"))
ROWS = SAMPLE.read_bytes().splitlines(keepends=True)
TALLY = "→ 64 active → 64 user-days (64 new)"
KILLED = "Error: a scanning process was killed (out of memory?); try fewer --workers\n"
INTERRUPTED = b"Interrupted: uncommitted changes were rolled back\n"
TERMINATED = b"Terminated: uncommitted changes were rolled back\n"
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a file system")


def usage(error: str) -> str:
    """What click says about a wrong command line."""
    script = SCRIPT.name
    return (
        f"Usage: {script} [OPTIONS] EVENTS...\nTry '{script} --help' for help.\n\nError: {error}\n"
    )


def of_users(number: int, data: bytes = SAMPLE.read_bytes()) -> bytes:
    """The sample, of users who have another number."""
    return data.replace(b'"user_pseudo_id":"', b'"user_pseudo_id":"%d-' % number)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that is large enough for several processes, with a bad record here and there."""
    path = tmp_path_factory.mktemp("large") / "large.jsons"
    samples = [of_users(number) for number in range(7)]
    with path.open("wb") as file:
        for number in range(40):
            file.write(samples[number % 7])
            file.write(b"\n" if number % 3 else b'{"event_name":"user_engagement"}\n{cut off\n')
    assert path.stat().st_size > SMALL
    return path


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that is large enough for several processes, without a bad record."""
    path = tmp_path_factory.mktemp("good") / "good.jsons"
    with path.open("wb") as file:
        file.writelines(itertools.repeat(SAMPLE.read_bytes(), 40))
    assert path.stat().st_size > SMALL
    return path


def start(loader: Loader, *args: object, **more: Any) -> subprocess.Popen[bytes]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more}
    return subprocess.Popen(loader.command(*args), cwd=loader.directory, **pipes)


def children(process: subprocess.Popen[bytes]) -> list[int]:
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    with suppress(OSError):
        return [int(pid) for pid in path.read_text().split()]
    return []


def alive(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


def wait_for(condition: Callable[[], Any], seconds: float = 30) -> Any:
    """What a condition becomes in the end."""
    deadline = time.monotonic() + seconds
    while not (result := condition()) and time.monotonic() < deadline:
        time.sleep(0.005)
    return result


def workers_of(process: subprocess.Popen[bytes], number: int = 2) -> list[int]:
    pids: list[int] = wait_for(lambda: len(children(process)) == number and children(process))
    assert pids, "the workers have not started"
    return pids


def has_read_all(process: subprocess.Popen[bytes]) -> bool:
    assert process.stdin
    return fcntl.ioctl(process.stdin, termios.FIONREAD, bytes(4)) == bytes(4)


def when_it_reads(process: subprocess.Popen[bytes]) -> None:
    """Wait until a load has read what it was sent."""
    assert process.stdin
    process.stdin.write(lines(event("first")))
    process.stdin.flush()
    assert wait_for(lambda: has_read_all(process))


def in_a_process(
    loader: Loader, code: str, *args: object, **more: Any
) -> subprocess.Popen[bytes]:
    """The command, after some code that sees it as `loader`."""
    code = f"import os, signal, sys\nimport load_active_users as loader\n{code}\nloader.main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        cwd=loader.directory,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        **{"stdin": -1, "stdout": -1, "stderr": -1, **more},
    )


def tables(loader: Loader) -> list[str]:
    """What a database holds, but for its log."""
    return [row for row in loader.content() or () if "load_log" not in row]


# -- Many processes


def test_the_number_of_workers_changes_nothing(loader: Loader, large: Path) -> None:
    results = []
    for workers in (1, 2, 3, 5):
        loader.db = loader.directory / f"{workers}.db"
        options = ["--workers", workers, "--db", loader.db, "--max-bad-records", 99]
        outputs = ["--rejects", f"{workers}.rejects", "--format", "json"]
        done = loader.run(*options, *outputs, large, SAMPLE, large)
        assert done.returncode == 0
        rejects = (loader.directory / f"{workers}.rejects").read_bytes()
        results.append((done.stdout, done.stderr, rejects, tables(loader)))
    assert results[1:] == results[:1] * 3

    users, tally, bad = plain.read(large.read_bytes())
    report, messages = json.loads(results[0][0]), results[0][1].decode().splitlines()
    sample = plain.read(SAMPLE.read_bytes())[0]
    assert {date["date"]: date["active_user_count"] for date in report["dates"]} == {
        date: len(users[date] | sample[date]) for date in sorted(users)
    }
    assert report["lines"] == 2 * tally["lines"] + 1000
    assert [line.split(": ")[0] for line in messages[:20]] == [f"{large}:{n}" for n in bad][:20]
    assert messages[20:] == [f"and {2 * len(bad) - 20} more bad records"]
    assert results[0][2] == b"".join(line + b"\n" for line in bad.values()) * 2


def test_compressed_files_are_scanned_by_several_workers(loader: Loader) -> None:
    """Also when one is damaged, the same one is named, whoever comes across it first."""
    names = []
    for number in range(8):
        data = of_users(number) * 4 + b"bad\n"
        names.append(loader.file(gzip.compress(data, 1), f"{number}.gz"))
    assert sum((loader.directory / name).stat().st_size for name in names) * 10 > SMALL
    results = []
    for workers in (1, 2, 4):
        options = ["--workers", workers, "--dry-run", "--max-bad-records", 8, "--format", "json"]
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
    messages = {loader.refuse("--workers", workers, *options, *names) for workers in (1, 2, 4)}
    assert len(messages) == 1
    *bad, error = messages.pop().splitlines()
    assert bad == [f"{name}:4001: {why}" for name in names[:2]]
    assert error.startswith("Error: 2.gz:")
    assert error.endswith("; fetch the file again")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_worker_is_a_clear_error(loader: Loader, good: Path, number: int) -> None:
    loader.load(SAMPLE)
    before = loader.content()
    with start(loader, "--workers", 2, *[good] * 40) as process:
        pids = workers_of(process)
        os.kill(pids[0], number)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err.decode()) == (1, b"", KILLED)
    assert not any(map(alive, pids))
    assert loader.content() == before


def test_workers_that_are_killed_at_any_moment(loader: Loader, good: Path) -> None:
    """One of them or all: the load ends, with just the one line, and leaves no process."""
    chance = random.Random(3)
    for _ in range(KILLS):
        with start(loader, "--dry-run", "-q", "--workers", 3, *[good] * 4) as process:
            pids = workers_of(process, 3)
            time.sleep(chance.choice((0, chance.uniform(0, 0.4))))
            for pid in chance.sample(pids, chance.randint(1, 3)):
                with suppress(ProcessLookupError):
                    os.kill(pid, chance.choice((signal.SIGKILL, signal.SIGTERM)))
            out, err = process.communicate(timeout=60)
        assert (process.returncode, out, err.decode()) in ((1, b"", KILLED), (0, b"", ""))
        assert not any(map(alive, pids))


@pytest.mark.parametrize("whole_group", [True, False])
@pytest.mark.parametrize(
    ("number", "status", "message"),
    [(signal.SIGINT, 130, INTERRUPTED), (signal.SIGTERM, 143, TERMINATED)],
)
def test_a_signal_ends_all_of_it_at_once(
    loader: Loader, good: Path, whole_group: bool, number: int, status: int, message: bytes
) -> None:
    with start(loader, "--workers", 2, *[good] * 40, start_new_session=True) as process:
        pids = workers_of(process)
        (os.killpg if whole_group else os.kill)(process.pid, number)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (status, b"", message)
    assert not any(map(alive, pids))
    assert not loader.db.exists()


def test_ctrl_c_is_not_for_the_workers(loader: Loader, good: Path) -> None:
    with start(loader, "--workers", 2, "--format", "json", *[good] * 20) as process:
        for pid in workers_of(process) * 3:
            time.sleep(0.01)
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, len(json.loads(out)["dates"]), err) == (0, 3, b"")


def test_no_worker_outlives_its_parent(loader: Loader, good: Path) -> None:
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with start(loader, "--workers", 3, *[good] * 40, **silent) as process:
        pids = workers_of(process, 3)
        process.kill()
    assert wait_for(lambda: not any(map(alive, pids)))


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

    with pytest.raises(LoadError, match="^first$"):
        list(scan_in_processes([Range("first"), Range("second")], scan, 2))  # type: ignore[arg-type]


LIMITS = [  # what is limited, to how many, and what is said
    (
        resource.RLIMIT_NOFILE,
        range(3, 13),
        ["scanning processes: Too many open files; allow more open files (ulimit -n)"],
    ),
    (
        resource.RLIMIT_NPROC,
        range(1),
        ["scanning processes: Resource temporarily unavailable"],
    ),
]


@pytest.mark.parametrize("workers", [1, 8])
def test_few_open_files(loader: Loader, good: Path, workers: int) -> None:
    """Each limit from which Python itself starts is enough, or is spoken of in one line."""
    ended = set()
    for limit in range(4, 40, 1 if workers == 8 else 4):
        done = limited(loader, resource.RLIMIT_NOFILE, limit, "-q", "--workers", workers, good)
        text = done.stderr.decode()
        if "Error: " not in text and done.returncode:
            assert limit < 8, (limit, text)  # Python can't import what it needs
            continue
        if done.returncode == 0:
            assert text == ""
        else:
            assert text.startswith("Error: ")
            assert "Too many open files; allow more open files (ulimit -n)" in text or (
                "unable to open database file" in text
            )
            assert (text.count("\n"), done.returncode) == (1, 1)
        ended.add(done.returncode)
    assert ended == ({0, 1} if workers == 8 else {0, 1})


def limited(
    loader: Loader, what: int, limit: int, *args: object, uid: int | None = None
) -> subprocess.CompletedProcess[bytes]:
    """The command, in a process that may have so many of something."""
    return subprocess.run(
        loader.command(*args),
        cwd=loader.directory,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=120,
        user=uid,
        preexec_fn=lambda: resource.setrlimit(what, (limit, limit)),
    )
