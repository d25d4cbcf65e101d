"""Live loads: endless pipes, signals at any moment, databases that refuse for a
while."""

import gzip
import json
import os
import random
import re
import resource
import shlex
import shutil
import signal
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from functools import cache, partial
from pathlib import Path
from typing import IO, Any

import pytest
from helpers import (
    DAY,
    NOON,
    NOT_AN_OBJECT,
    SAMPLE,
    WITHOUT_CAPABILITIES,
    Loader,
    Process,
    date_count,
    event,
    has_open,
    lines,
    make_rule,
    unread,
    wait_for,
)

import load_active_users
from load_active_users import (
    BATCH_BYTES,
    BLOCK_BYTES,
    Changes,
    DateCount,
    InDoubt,
    Intake,
    Job,
    LiveLoad,
    SQLite,
    Stopped,
    Stopper,
    receive,
)

MOMENTS = int(os.environ.get("MOMENTS", "4"))  # at which each test sends its signal
LOCKED = (
    "active_user_table.db: database is locked; another program keeps it locked; "
    "try again when that is done"
)
FULL = "small/a.db: database or disk is full; free some disk space and load again"
WAITS = "; what was read waits, trying again every 1 s"
COMPRESSED = (
    "is compressed twice, or a compressed live pipe; "
    "decompress it first: zcat, or zstdcat"
)
STOPS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
NAMES = [number.name for number in STOPS]


class Live:
    """A loader at the end of a pipe."""

    def __init__(self, loader: Loader, command: list[str]) -> None:
        self.loader = loader
        self.log = loader.directory / f"stderr{time.monotonic_ns()}"
        with self.log.open("wb") as stderr:
            self.process = Process(
                command,
                cwd=loader.directory,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
            )
        assert self.process.stdin
        self.stdin: IO[bytes] = self.process.stdin

    def write(self, data: bytes) -> None:
        self.stdin.write(data)
        self.stdin.flush()

    def await_read(self) -> None:
        """Wait until nothing is left in the pipe."""
        assert wait_for(lambda: not unread(self.stdin))

    def users(self) -> list[str]:
        if not self.loader.db.exists():
            return []
        try:
            query = "SELECT DISTINCT user_pseudo_id FROM active_user ORDER BY 1"
            return [user for (user,) in self.loader.query(query)]
        except sqlite3.OperationalError as error:
            assert "no such table" in str(error)
            return []

    def await_users(self, *users: str) -> None:
        wait_for(lambda: self.users() == list(users))
        assert self.users() == list(users)

    def await_count(self, count: int) -> None:
        wait_for(lambda: len(self.users()) >= count)
        assert len(self.users()) == count

    def said(self) -> str:
        return self.log.read_text()

    def await_said(self, text: str) -> None:
        wait_for(lambda: len(self.said()) >= len(text))
        assert self.said() == text

    def close(self) -> None:
        self.stdin.close()
        self.process.stdin = None  # which communicate would flush

    def end(self) -> tuple[int, str, str]:
        """End the pipe; return the exit status, standard output and standard error."""
        out, _ = self.process.communicate(timeout=60)
        return self.process.returncode, out.decode(), self.said()


Start = Callable[..., Live]


@pytest.fixture
def live(loader: Loader) -> Iterator[Start]:
    started: list[Live] = []

    def start(*args: object, every: float = 1, **constants: float | None) -> Live:
        """Start a loader, of a program that may have other constants."""
        changed = {name: value for name, value in constants.items() if value}
        other = loader.with_constants(**changed) if changed else loader
        command = other.command("--commit-every", every, *args, "-")
        started.append(Live(loader, command))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        with suppress(BrokenPipeError):
            one.process.communicate()


# -- As it comes


def test_a_pipe_is_committed_as_it_goes(live: Start) -> None:
    pipe = live()
    pipe.write(lines(event("a")))
    pipe.await_users("a")  # also when the pipe goes quiet
    line = lines(event("b"))
    pipe.write(lines(event("c")) + line[:50])
    pipe.await_users("a", "c")  # a partial line waits for its rest
    pipe.write(line[50:])
    pipe.await_users("a", "b", "c")
    pipe.stdin.write(lines(event("d"))[:-1])  # at its end it needs no newline
    status, out, err = pipe.end()
    assert (status, err) == (0, "")
    what = "4 lines → 4 engagement events → 4 active → 4 new user-days"
    assert out.splitlines()[-1] == what
    assert pipe.users() == ["a", "b", "c", "d"]


def test_a_run_has_one_row_in_the_log(live: Start) -> None:
    """Each commit brings it up to date. Users that are sent again are not added."""
    columns = "lines, blank_lines, active_events, added, removed, bytes"
    query = f"SELECT {columns} FROM load_log"
    pipe = live("--format", "json")
    first, second = lines(event("a"), event("b"), b""), lines(event("a"), event("c"))
    pipe.write(first)
    pipe.await_users("a", "b")
    assert pipe.loader.query(query) == [(3, 1, 2, 2, 0, len(first))]
    pipe.write(second)
    pipe.await_users("a", "b", "c")
    pipe.stdin.write(lines(event("b")))
    status, out, err = pipe.end()
    assert (status, err) == (0, "")
    assert json.loads(out) == {
        "dates": [
            {"date": "2019-12-30", "active_user_count": 3, "added": 3, "removed": 0}
        ],
        "lines": 6,
        "engagement_events": 5,
        "active_events": 5,
        "anonymous_events": 0,
        "out_of_range_events": 0,
        "bad_records": 0,
        "left_out": 0,
        "skipped_files": 0,
    }
    row = (6, 1, 5, 3, 0, len(first + second + lines(event("b"))))
    assert pipe.loader.query(query) == [row]

    again = live("-q")
    again.stdin.write(lines(event("a"), event("d")))
    assert again.end() == (0, "", "")
    second_row = (2, 0, 2, 1, 0, len(lines(event("a"), event("d"))))
    assert sorted(pipe.loader.query(query)) == sorted([row, second_row])


def test_an_empty_pipe_loads_nothing(live: Start) -> None:
    pipe = live("-q")
    assert pipe.end() == (0, "", "")
    assert not pipe.loader.db.exists()


def test_an_unfinished_line_holds_no_commit_back(live: Start) -> None:
    """It may trickle in as slowly as it likes."""
    pipe = live("-q")
    pipe.write(lines(event("a")) + b'{"x": "')
    for _ in range(3000):
        pipe.write(b"x")
        time.sleep(0.01)
        if pipe.users():
            break
    assert pipe.users() == ["a"]
    pipe.write(b'"}\n' + lines(event("b")))
    pipe.await_users("a", "b")
    assert pipe.end() == (0, "", "")


def test_what_comes_is_taken_at_once(live: Start) -> None:
    """The loader waits only where nothing comes, or at the end of a pipe."""
    pipe = live("-q", POLL_SECONDS=1000, LIVE_BYTES=500)
    pipe.write(lines(event("a")))
    pipe.await_users("a")
    pipe.write(lines(event("b")))
    pipe.await_users("a", "b")
    assert pipe.end() == (0, "", "")


def test_a_named_pipe(live: Start, loader: Loader) -> None:
    """Several are read one after another, each to its end."""
    for name in ("one", "two"):
        os.mkfifo(loader.directory / name)
    pipe = live("-q", "one", "two")
    pipe.close()
    for user, name in (("a", "one"), ("b", "two")):
        with (loader.directory / name).open("wb") as file:
            file.write(lines(event(user)))
    assert pipe.process.wait(60) == 0
    assert (pipe.said(), pipe.users()) == ("", ["a", "b"])


def test_files_can_be_committed_in_parts_too(loader: Loader) -> None:
    loader.file(SAMPLE.read_bytes() * 50, "large.jsons")
    report = loader.load("--commit-every", 1, *["large.jsons"] * 4)
    assert report["lines"] == 200_000
    assert loader.query("SELECT lines, added FROM load_log") == [(200_000, 64)]


@pytest.mark.parametrize(
    "magic", [b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\x50\x2a\x4d\x18"]
)
def test_a_compressed_pipe_is_not_live(loader: Loader, magic: bytes) -> None:
    said = loader.refuse("--commit-every", 1, "-", input=magic + bytes(100))
    assert said == f"Error: -: {COMPRESSED}\n"


def test_only_the_first_bytes_tell_a_format(live: Start) -> None:
    """Later lines like them are bad records, and so is one with a byte-order mark."""
    pipe = live("-q", "--max-bad-records", 3)
    expected = ""
    starts = [b"", b"[]\n", b"\x1f\x8b\n", b"\xef\xbb\xbf{}\n"]
    for number, start in enumerate(starts):
        pipe.write(start + lines(event(f"{number}")))
        pipe.await_users(*"0123"[: number + 1])
        if start:
            expected += f"-:{2 * number}: {NOT_AN_OBJECT}\n"
    assert pipe.end() == (0, "", expected)


def test_the_end_of_a_compressed_file_that_was_read_ahead(loader: Loader) -> None:
    """Its last batch counts no bytes, and is loaded all the same."""
    other = lines({"x": "y" * 4000})
    rows = other * (BATCH_BYTES // len(other) + 100)
    name = loader.file(gzip.compress(rows + lines(event("a")) + b"bad", 1), "a.gz")
    pipe = Live(
        loader, loader.command("--commit-every", 1000, "--max-bad-records", 1, name)
    )
    number = rows.count(b"\n") + 2
    status, out, said = pipe.end()
    assert (status, said) == (0, f"{name}:{number}: {NOT_AN_OBJECT}\n")
    assert out.splitlines()[-1].startswith(f"{number} lines → 1 engagement event")
    assert pipe.users() == ["a"]


def test_a_directory(loader: Loader) -> None:
    said = loader.refuse("-q", "--commit-every", 1000, loader.directory)
    assert said == f"Error: {loader.directory}: Is a directory; name the files in it\n"


def test_a_file_that_is_called_minus(live: Start) -> None:
    pipe = live("-q")
    pipe.loader.file(b"bad\n", "-")
    pipe.write(lines(event("a")))
    pipe.await_users("a")
    pipe.close()
    assert pipe.end() == (0, "", "")


def test_a_descriptor_of_any_number(tmp_path: Path) -> None:
    """It may be beyond the 1024 that select() knows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(2048, hard), hard))
    os.mkfifo(tmp_path / "pipe")
    with ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        for _ in range(1100):
            stack.enter_context(open(os.devnull))
        found = receive(str(tmp_path / "pipe"), Stopper())
        assert next(found).data == b""
        with open(tmp_path / "pipe", "wb") as writer:
            writer.write(b"a\n")
            writer.flush()
            assert next(part.data for part in found if part.data) == b"a\n"


# -- Bad records


def test_each_interval_may_have_bad_records(live: Start) -> None:
    """It may have --max-bad-records. The rejects have all of them."""
    pipe = live("--max-bad-records", 2, "--rejects", "bad.jsons")
    pipe.write(b"one\ntwo\n" + lines(event("a")))
    pipe.await_users("a")
    rejects = pipe.loader.directory / "bad.jsons"
    assert rejects.read_bytes() == b"one\ntwo\n"
    pipe.write(b"three\n" + lines(event("b")) + b"four\n")
    pipe.await_users("a", "b")
    assert rejects.read_bytes() == b"one\ntwo\nthree\nfour\n"
    pipe.stdin.write(lines(event("c")) + b"five\nsix\nseven\n")
    status, out, err = pipe.end()
    assert (status, out) == (1, "")
    more = "more than --max-bad-records 2; nothing was loaded since the last commit"
    assert err.splitlines() == [
        *(f"-:{number}: {NOT_AN_OBJECT}" for number in (1, 2, 4, 6, 8, 9, 10)),
        "not stored: the last lines that were read (4), up to -:10",
        f"Error: bad records: 3, {more}",
    ]
    assert pipe.users() == ["a", "b"]
    assert rejects.read_bytes() == b"one\ntwo\nthree\nfour\nfive\nsix\nseven\n"
    bad = pipe.loader.query("SELECT lines, active_events, bad_records FROM load_log")
    assert bad == [(6, 2, 4)]


def test_each_interval_shows_its_first_twenty(live: Start) -> None:
    pipe = live("--max-bad-records", 99, "-q")
    expected = []
    line = 0
    users = []
    for user, count, more in (
        ("a", 15, ""),
        ("b", 21, "1 more bad record"),
        ("c", 25, "5 more"),
    ):
        pipe.write(b"bad\n" * count + lines(event(user)))
        users.append(user)
        pipe.await_users(*users)
        expected += [
            f"-:{line + n}: {NOT_AN_OBJECT}" for n in range(1, min(count, 20) + 1)
        ]
        expected += {"": [], "5 more": ["and 5 more bad records"]}.get(
            more, [f"and {more}"]
        )
        line += count + 1
    status, _, err = pipe.end()
    assert (status, err.splitlines()) == (0, expected)


def test_a_source_that_cannot_be_read_ends_it(loader: Loader) -> None:
    """What was read before it is committed first."""
    loader.file(lines(event("a")), "good.jsons")
    pipe = Live(loader, loader.command("-q", "--commit-every", 1000, "good.jsons", "-"))
    pipe.stdin.write(b"\x1f\x8b" + bytes(100))
    assert pipe.end() == (1, "", f"Error: -: {COMPRESSED}\n")
    assert pipe.users() == ["a"]


def test_an_interval_that_is_refused_before_a_source_that_cannot_be_read(
    loader: Loader,
) -> None:
    """Messages tell of both."""
    loader.file(b"[{}]", "array.json")
    pipe = Live(loader, loader.command("-q", "--commit-every", 1000, "-", "array.json"))
    pipe.write(lines(event("a"), event("b"), b"bad"))
    status, out, err = pipe.end()
    assert (status, out) == (1, "")
    assert err.splitlines() == [
        f"-:3: {NOT_AN_OBJECT}",
        "not stored: the last lines that were read (3), up to -:3",
        "Error: array.json:1: is a JSON array; make it one event per line: jq -c '.[]'",
    ]
    assert not loader.db.exists()


def test_rejects_that_cannot_be_kept_end_it(loader: Loader) -> None:
    """What came before them is committed first; a message tells what came with them."""
    loader.file(lines(event("a")), "good.jsons")
    options = ["-q", "--commit-every", 1000]
    options += ["--max-bad-records", 9, "--rejects", "/dev/full"]
    pipe = Live(loader, loader.command(*options, "good.jsons", "-"))
    pipe.write(lines(event("b"), b"bad"))
    status, out, err = pipe.end()
    assert (status, out) == (1, "")
    full = "No space left on device; free some disk space and load again"
    assert err.splitlines() == [
        f"-:2: {NOT_AN_OBJECT}",
        "not stored: the last lines that were read (2), up to -:2",
        f"Error: /dev/full: {full}",
    ]
    assert pipe.users() == ["a"]


def test_a_commit_that_is_refused_says_what_is_lost(live: Start) -> None:
    pipe = live("-q")
    pipe.write(lines(event("a")))
    pipe.await_users("a")
    with closing(sqlite3.connect(pipe.loader.db)) as db:
        db.execute("DROP TABLE active_user")
    pipe.write(lines(event("b"), event("c")))
    what = "it has a table active_user_table, but no active_user, as in schema.sql"
    assert pipe.process.wait(30) == 1
    assert pipe.said().splitlines() == [
        "not stored: the last lines that were read (2), up to -:3",
        f"Error: active_user_table.db: {what}; choose another --db",
    ]


# -- Signals


@cache
def many_events() -> bytes:
    return b"".join(lines(event(f"u{number:05}")) for number in range(20_000))


class Feed:
    """A thread that writes all that a pipe takes, and knows what was read of it."""

    def __init__(self, pause: float, cut: int) -> None:
        self.read_end, write_end = os.pipe()
        self.written = 0
        self.data = many_events()
        self.done = threading.Event()

        def write() -> None:
            with open(write_end, "wb", buffering=0) as file, suppress(BrokenPipeError):
                while not self.done.is_set() and self.written < len(self.data):
                    chunk = self.data[self.written : self.written + cut]
                    self.written += file.write(chunk) or 0
                    self.done.wait(pause)

        self.thread = threading.Thread(target=write)
        self.thread.start()

    def what_was_read(self) -> bytes:
        self.done.set()
        left = 0
        # It ends when the thread has closed the other end.
        while chunk := os.read(self.read_end, 1 << 20):
            left += len(chunk)
        self.thread.join()
        os.close(self.read_end)
        return self.data[: self.written - left]


def has_begun(process: Process) -> bool:
    """Return whether the first lines of the script have set their signal handlers."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = re.search(r"SigCgt:\s+(\w+)", status)
    return bool(caught and int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.parametrize("number", STOPS, ids=NAMES)
@pytest.mark.parametrize(
    ("pause", "cut"),
    [(0, 65_536), (0.003, 50)],
    ids=["a flood", "a trickle of unfinished lines"],
)
def test_a_signal_at_any_moment_loses_nothing(
    loader: Loader, pause: float, cut: int, number: signal.Signals
) -> None:
    """The table has all whole lines that are no longer in the pipe.

    A message tells how much of a last line is left out.
    """
    chance = random.Random(number * cut)
    for moment in range(MOMENTS):
        loader.db = loader.directory / f"{moment}.db"
        feed = Feed(pause, cut)
        command = loader.command("-q", "--db", loader.db, "--commit-every", 1000, "-")
        with Process(
            command, cwd=loader.directory, stdin=feed.read_end, stderr=subprocess.PIPE
        ) as process:
            assert wait_for(partial(has_begun, process))
            time.sleep(chance.random() * 0.7)
            process.send_signal(number)
            _, err = process.communicate(timeout=60)
        *whole, rest = feed.what_was_read().split(b"\n")
        left_out = (
            f"-: the last line had not ended: its {len(rest)} bytes were left out\n"
        )
        expected = [json.loads(line)["user_pseudo_id"] for line in whole]
        there = loader.db.exists() and loader.query(
            "SELECT user_pseudo_id FROM active_user"
        )
        assert (process.returncode, err.decode()) == (0, left_out if rest else "")
        assert [user for (user,) in there or []] == expected


def test_after_a_signal_no_more_of_a_file_is_read(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The next file is not opened, and a message says so.

    The signal comes when the first batch has been taken.
    """
    path = tmp_path / "blank.gz"
    path.write_bytes(gzip.compress((b" " * 1023 + b"\n") * (70 << 10), 1))
    rule = make_rule("UTC")
    live = LiveLoad(Job((), "", rule), Intake(), every=1)
    taken = live.take_batches([str(path), str(tmp_path / "missing")])
    next(taken)
    live.job.stopper.signals.append(signal.SIGTERM)
    assert list(taken) == []
    lines_of_batch = -(-BATCH_BYTES // BLOCK_BYTES) * BLOCK_BYTES // 1024
    assert live.staging.tally.lines == lines_of_batch
    what = "may not have been read to its end; later sources not read: 1"
    assert capfd.readouterr() == ("", f"{path}: {what}\n")


def test_after_a_signal_a_commit_is_that_of_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is due, and memory is full. But the end has more patience, and a limit."""
    monkeypatch.setattr("load_active_users.LIVE_BYTES", 0)
    live = LiveLoad(Job((), "missing/a.db", make_rule()), Intake(), every=0)
    monkeypatch.setattr(live, "commit_interval", lambda: pytest.fail("it commits"))
    live.job.stopper.signals.append(signal.SIGTERM)
    assert live.is_due()
    assert live.is_full()
    live.commit_when_due()


def test_after_a_signal_what_was_read_of_a_pipe_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All its batches are taken, though the signal comes after the first."""
    monkeypatch.setattr("load_active_users.BATCH_BYTES", 1)
    os.mkfifo(tmp_path / "pipe")
    rule = make_rule("UTC")
    live = LiveLoad(Job((), "", rule), Intake(), every=1)
    taken = live.take_batches([str(tmp_path / "pipe")])
    next(taken)  # it is open
    with open(tmp_path / "pipe", "wb", buffering=0) as writer:
        blank = b" " * (BLOCK_BYTES - 1)  # and its newline: a block
        thread = threading.Thread(target=writer.write, args=(blank,))
        thread.start()
        while thread.is_alive():
            next(taken)
        next(taken)  # now the pipe is empty, and what is written comes as a whole
        writer.write(b"\n" + lines(event("a"), event("b")))
        while not live.staging.tally.lines:
            next(taken)
        live.job.stopper.signals.append(signal.SIGTERM)
        assert live.staging.tally.lines == 1
        for _ in taken:
            pass
    assert live.staging.tally.lines == 3


@pytest.mark.parametrize("name", ["pipe", "-"])
@pytest.mark.parametrize("number", STOPS, ids=NAMES)
def test_a_signal_before_anything_came(loader: Loader, name: str, number: int) -> None:
    """A named pipe may still wait to be opened at its other end."""
    os.mkfifo(loader.directory / "pipe")
    command = loader.command("-q", "--commit-every", 1, name)
    with Process(
        command, cwd=loader.directory, stdin=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert wait_for(partial(has_begun, process))
        time.sleep(0.2)
        process.send_signal(number)
        assert process.wait(30) == 0
        assert process.stderr and process.stderr.read() == b""
    assert not loader.db.exists()


@pytest.mark.parametrize("number", STOPS, ids=NAMES)
def test_a_signal_before_the_database_was_looked_at(
    live: Start, loader: Loader, number: int
) -> None:
    """Nothing has been read, so there is nothing to tell."""
    loader.load(SAMPLE)
    with closing(sqlite3.connect(loader.db, isolation_level=None)) as db:
        db.execute("BEGIN EXCLUSIVE")
        pipe = live("-q")
        assert wait_for(partial(has_open, pipe.process.pid, loader.db))
        pipe.process.send_signal(number)
        assert (pipe.process.wait(30), pipe.said()) == (0, "")


@pytest.mark.parametrize("number", STOPS, ids=NAMES)
def test_the_interval_comes_from_the_environment(loader: Loader, number: int) -> None:
    """Then too, an early signal ends the load with exit status 0."""
    env = {**os.environ, "LOAD_ACTIVE_USERS_COMMIT_EVERY": "1000"}
    command = loader.command("-q", "-")
    for moment in range(MOMENTS):
        with Process(
            command,
            cwd=loader.directory,
            env=env,
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as process:
            assert wait_for(partial(has_begun, process))
            time.sleep(0.1 * moment)
            process.send_signal(number)
            assert process.wait(30) == 0
            assert process.stderr and process.stderr.read() == b""


@pytest.mark.parametrize(
    "producer", ["goes on", "is stopped, too", "was stopped before"]
)
@pytest.mark.parametrize("number", STOPS, ids=NAMES)
def test_a_signal_commits_what_was_read(
    live: Start, number: int, producer: str
) -> None:
    """It does not wait for the end of the interval.

    A line that the producer has not ended is left out: Ctrl-C and systemd stop both
    processes at about the same moment.
    """
    pipe = live("--format", "csv", every=1000)
    pipe.write(lines(event("a")) + b'{"event_name":')
    pipe.await_read()
    if producer == "was stopped before":
        pipe.close()
    pipe.process.send_signal(number)
    if producer == "is stopped, too":
        pipe.close()
    assert pipe.process.wait(30) == 0
    assert pipe.process.stdout
    out = pipe.process.stdout.read().decode()
    assert out.splitlines() == [
        "date,active_user_count,added,removed",
        "2019-12-30,1,1,0",
    ]
    left_out = "-: the last line had not ended: its 14 bytes were left out\n"
    assert (pipe.said(), pipe.users()) == (left_out, ["a"])


def test_a_signal_that_comes_after_the_end_of_its_producer(tmp_path: Path) -> None:
    """What stops both stops one of them a moment earlier."""
    os.mkfifo(tmp_path / "pipe")
    stopper = Stopper()
    found = receive(str(tmp_path / "pipe"), stopper)
    next(found)  # it is open
    (tmp_path / "pipe").write_bytes(b"{}\n{")
    assert next(part.data for part in found if part.data) == b"{}\n"
    threading.Timer(0.02, stopper.signals.append, [signal.SIGTERM]).start()
    assert [part.data for part in found] == [b""]


def test_nohup_keeps_a_live_load_alive(live: Start, loader: Loader) -> None:
    command = shlex.join(loader.command("-q", "--commit-every", 1, "-"))
    loader.command = lambda *_: ["sh", "-c", f"trap '' HUP; exec {command}"]  # type: ignore[method-assign]
    pipe = live()
    pipe.write(lines(event("a")))
    pipe.await_users("a")
    pipe.process.send_signal(signal.SIGHUP)
    pipe.write(lines(event("b")))
    pipe.await_users("a", "b")
    assert pipe.end() == (0, "", "")


@pytest.mark.parametrize("number", STOPS[:2], ids=NAMES[:2])
def test_a_signal_that_a_shell_lets_it_ignore(
    live: Start, loader: Loader, number: int
) -> None:
    """A shell does so for commands in the background."""
    command = shlex.join(loader.command("-q", "--commit-every", 1000, "-"))
    shell = f"trap '' INT TERM; exec {command}"
    loader.command = lambda *_: ["sh", "-c", shell]  # type: ignore[method-assign]
    pipe = live()
    pipe.write(lines(event("a")))
    pipe.await_read()
    pipe.process.send_signal(number)
    assert pipe.process.wait(30) == 0
    assert (pipe.said(), pipe.users()) == ("", ["a"])


# -- A database that refuses for a while


def test_a_reader_in_a_transaction(live: Start) -> None:
    """It holds commits back; what comes meanwhile is kept, and one line says so."""
    pipe = live("-q")
    pipe.write(lines(event("a")))
    pipe.await_users("a")
    with closing(sqlite3.connect(pipe.loader.db, isolation_level=None)) as db:
        db.execute("BEGIN")
        assert db.execute("SELECT count(*) FROM active_user").fetchone() == (1,)
        pipe.write(lines(event("b")))
        pipe.await_said(f"{LOCKED}{WAITS}\n")
        for user in "cde":
            pipe.write(lines(event(user)))
            time.sleep(0.4)
        assert db.execute("SELECT count(*) FROM active_user").fetchone() == (1,)
        db.execute("COMMIT")
    pipe.await_users("a", "b", "c", "d", "e")
    assert pipe.end() == (0, "", f"{LOCKED}{WAITS}\n")
    log = pipe.loader.query("SELECT lines, active_events, added FROM load_log")
    assert log == [(5, 5, 5)]


def test_many_users_are_committed_at_once(live: Start) -> None:
    """Memory is bounded, and readers must not be locked out for long."""
    pipe = live("-q", every=1000, LIVE_BYTES=1000)
    pipe.write(lines(*(event(f"{number}") for number in range(200))))
    assert wait_for(pipe.users)
    assert pipe.end() == (0, "", "")


def test_commits_of_many_users_do_not_put_off_the_next_one(
    loader: Loader, live: Start
) -> None:
    """Those that come after them are committed when an interval is over."""
    users = [f"{number:03}" for number in range(100)]
    rows = [lines(event(user), event(user, NOON + DAY)) for user in users]
    sizes = {"RANGE_BYTES": len(rows[0]), "LIVE_BYTES": 700}  # of users on two dates
    pipe = live("-q", loader.file(b"".join(rows)), **sizes)
    pipe.await_count(100)
    pipe.write(lines(event("later")))
    pipe.await_count(101)
    assert pipe.end() == (0, "", "")


def test_a_write_lock(live: Start) -> None:
    """Each spell of it gives one line, and each bad record that waits gives one."""
    pipe = live("-q", "--max-bad-records", 1)
    pipe.write(lines(event("a")))
    pipe.await_users("a")
    expected = ""
    for number, users in enumerate(("bc", "de")):
        with closing(sqlite3.connect(pipe.loader.db, isolation_level=None)) as db:
            db.execute("BEGIN IMMEDIATE")
            pipe.write(b"bad\n" + lines(event(users[0])))
            expected += f"-:{2 + 3 * number}: {NOT_AN_OBJECT}\n{LOCKED}{WAITS}\n"
            pipe.await_said(expected)
            pipe.write(lines(event(users[1])))
            pipe.await_read()
            time.sleep(1)
            db.execute("ROLLBACK")
        pipe.await_users(*"abcde"[: 3 + 2 * number])
    assert pipe.end() == (0, "", expected)
    log = pipe.loader.query("SELECT lines, bad_records, added FROM load_log")
    assert log == [(7, 2, 5)]


def test_the_pipe_is_read_no_further_than_memory_is_bounded(live: Start) -> None:
    """That holds while the database is locked; all of it is loaded afterwards."""
    pipe = live("-q")
    pipe.write(lines(event("a")))
    pipe.await_users("a")
    data = b"".join(lines(event(f"{number:020}")) for number in range(50_000))
    size = rss(pipe.process.pid)
    with closing(sqlite3.connect(pipe.loader.db, isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        written = 0

        def produce() -> None:
            nonlocal written
            for start in range(0, len(data), 1 << 16):
                pipe.write(data[start : start + (1 << 16)])
                written = start

        thread = threading.Thread(target=produce)
        thread.start()
        pipe.await_said(f"{LOCKED}{WAITS}\n")
        before = -1
        while before < written:
            before = written
            time.sleep(1.2)
        assert thread.is_alive()  # the producer has to wait
        assert rss(pipe.process.pid) - size < 16 << 10
        db.execute("ROLLBACK")
    thread.join(60)
    assert pipe.end() == (0, "", f"{LOCKED}{WAITS}\n")
    assert pipe.loader.table() == {"2019-12-30": 50_001}


def test_while_memory_is_full_it_tries_no_more_often_than_it_says(
    live: Start, loader: Loader
) -> None:
    """A signal commits what waits for the next time."""
    users = [f"{number:03}" for number in range(200)]
    loader.load(loader.file(lines(event("a"))))
    with closing(sqlite3.connect(loader.db, isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        pipe = live("-q", every=1000, LIVE_BYTES=1000)
        pipe.write(lines(*map(event, users)))
        waits = f"{LOCKED}{WAITS.replace(' 1 s', ' 1000 s')}\n"
        pipe.await_said(waits)
        db.execute("ROLLBACK")
    time.sleep(1)
    assert pipe.users() == ["a"]
    pipe.process.terminate()
    assert (pipe.process.wait(30), pipe.said()) == (0, waits)
    assert pipe.users() == [*users, "a"]


IN_SMALL = """
mount -t tmpfs -o size=400k none small
"$@"
status=$?
cp small/a.db .
exit $status
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small disk")
def test_a_full_disk(loader: Loader) -> None:
    small = loader.directory / "small"
    small.mkdir()
    command = loader.command("-q", "--db", "small/a.db", "--commit-every", 1, "-")
    pipe = Live(loader, ["unshare", "--mount", "sh", "-c", IN_SMALL, "sh", *command])
    inside = Path(f"/proc/{pipe.process.pid}/root{small}")
    loader.db = loader.directory / "copy.db"

    def users() -> list[str]:
        with suppress(OSError):
            shutil.copy(inside / "a.db", loader.db)
        return pipe.users()

    pipe.write(lines(event("a")))
    assert wait_for(lambda: users() == ["a"])
    filler = inside / "filler"
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(bytes(1000)):
            pass
    some = [f"{number:04}" for number in range(1000)]
    pipe.write(lines(*map(event, some)))
    pipe.await_said(f"{FULL}{WAITS}\n")
    pipe.write(lines(event("b")))
    time.sleep(1.2)
    assert users() == ["a"]
    filler.unlink()
    assert wait_for(lambda: users() == sorted([*some, "a", "b"]))
    assert pipe.end() == (0, "", f"{FULL}{WAITS}\n")
    loader.db = loader.directory / "a.db"
    assert loader.table() == {"2019-12-30": 1002}
    assert loader.query("PRAGMA integrity_check") == [("ok",)]


def test_a_bad_record_after_lines_that_wait(live: Start) -> None:
    """It ends the load, and refuses only its own interval."""
    pipe = live("-q", every=1)
    pipe.write(lines(event("a")))
    pipe.await_users("a")
    with closing(sqlite3.connect(pipe.loader.db, isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        pipe.write(lines(event("b")))
        pipe.await_said(f"{LOCKED}{WAITS}\n")
        pipe.write(lines(event("c")))
        time.sleep(2.5)  # until c waits, too
        pipe.write(lines(event("d"), b"bad"))
        bad = f"{LOCKED}{WAITS}\n-:5: {NOT_AN_OBJECT}\n"
        pipe.await_said(bad)
        db.execute("ROLLBACK")
    refused = "bad records: 1, more than --max-bad-records 0; "
    refused += "nothing was loaded since the last commit"
    assert pipe.process.wait(30) == 1
    lost = "not stored: the last lines that were read (2), up to -:5"
    assert pipe.said() == f"{bad}{lost}\nError: {refused}\n"
    assert pipe.users() == ["a", "b", "c"]


def test_lines_that_wait_are_stored_though_those_after_them_are_refused(
    live: Start, loader: Loader
) -> None:
    """The load ends since its next source is not there, before their interval does."""
    loader.load(loader.file(lines(event("a"))))
    with closing(sqlite3.connect(loader.db, isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        command = loader.command("--commit-every", 3, "-q", "-", "missing")
        pipe = Live(loader, command)
        pipe.write(lines(event("b")))
        waits = f"{LOCKED}{WAITS.replace(' 1 s', ' 3 s')}\n"
        pipe.await_said(waits)
        db.execute("ROLLBACK")
    pipe.write(b"bad\n")
    bad = f"-:2: {NOT_AN_OBJECT}\n"
    lost = "not stored: the last lines that were read (1), up to -:2\n"
    error = "Error: missing: No such file or directory\n"
    assert pipe.end() == (1, "", f"{waits}{bad}{lost}{error}")
    assert pipe.users() == ["a", "b"]


def test_a_bad_record_while_memory_is_full(live: Start) -> None:
    """It ends the load though the database stays locked; messages tell what is lost."""
    pipe = live("-q", every=1, LOCK_SECONDS=1.5)
    pipe.write(lines(event("a")))
    pipe.await_users("a")
    data = lines(*(event(f"{number:0500}") for number in range(350)))
    with closing(sqlite3.connect(pipe.loader.db, isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        pipe.write(data)
        pipe.await_said(f"{LOCKED}{WAITS}\n")
        with suppress(BrokenPipeError):  # not all of it may be read
            pipe.write(b"bad\n" + data)
        assert pipe.process.wait(30) == 1
    bad = f"{LOCKED}{WAITS}\n-:352: {NOT_AN_OBJECT}\n"
    lost = r"not stored: the last lines that were read \((\d+)\), up to -:(\d+)\n"
    refused = "bad records: 1, more than --max-bad-records 0; "
    refused += "nothing was loaded since the last commit"
    errors = re.escape(f"Error: {refused}\n")
    said = re.fullmatch(f"{re.escape(bad)}{lost}{errors}", pipe.said())
    assert said, pipe.said()
    assert int(said[1]) == int(said[2]) - 1 > 351
    assert pipe.users() == ["a"]


@pytest.fixture
def locked(live: Start) -> Iterator[Callable[..., tuple[Live, sqlite3.Connection]]]:
    """A live load that has read three lines, two after its database was locked."""
    with closing(sqlite3.connect(":memory:")) as nothing:
        connections = [nothing]

        def start(
            patience: float | None, tail: bytes = b""
        ) -> tuple[Live, sqlite3.Connection]:
            live("-q").loader.load(SAMPLE)
            pipe = live("-q", every=1000, LOCK_SECONDS=patience)
            pipe.write(lines(event("a")))
            pipe.await_read()
            time.sleep(0.1)
            connections.append(sqlite3.connect(pipe.loader.db, isolation_level=None))
            connections[-1].execute("BEGIN IMMEDIATE")
            pipe.write(lines(event("b"), event("c")) + tail)
            pipe.await_read()
            return pipe, connections[-1]

        yield start
        for connection in connections:
            connection.close()


Locked = Callable[..., tuple[Live, sqlite3.Connection]]
HALF = b'{"half'
LEFT_OUT = "-: the last line had not ended: its 6 bytes were left out\n"


@pytest.mark.parametrize("number", STOPS, ids=NAMES)
def test_a_signal_while_the_database_is_locked(locked: Locked, number: int) -> None:
    """It waits, and then says what was not stored."""
    pipe, _ = locked(0.5, HALF)
    before = pipe.loader.content()
    pipe.process.send_signal(number)
    assert pipe.process.wait(30) == 1
    not_stored = "not stored: the last lines that were read (3), up to -:3\n"
    assert pipe.said() == f"{LEFT_OUT}{not_stored}Error: {LOCKED}\n"
    assert pipe.loader.content() == before


def test_a_signal_while_the_database_is_locked_for_a_while(locked: Locked) -> None:
    pipe, db = locked(None, HALF)
    pipe.process.terminate()
    time.sleep(0.8)
    assert pipe.process.poll() is None
    db.execute("ROLLBACK")
    assert pipe.process.wait(30) == 0
    assert pipe.said() == LEFT_OUT
    assert {"a", "b", "c"} < set(pipe.users())


def test_a_wait_for_two_reasons_is_no_longer_than_for_one(locked: Locked) -> None:
    """The database is away for two of three seconds, and then it is locked."""
    pipe, _ = locked(3)
    before, path = pipe.loader.content(), pipe.loader.db
    away = path.rename(path.with_name("away.db"))
    path.symlink_to("nowhere/a.db")
    begun = time.monotonic()
    pipe.process.terminate()
    time.sleep(2)
    away.rename(path)
    assert pipe.process.wait(30) == 1
    assert 3 <= time.monotonic() - begun < 4.5
    not_stored = "not stored: the last lines that were read (3), up to -:3\n"
    assert pipe.said() == f"{not_stored}Error: {LOCKED}\n"
    assert pipe.loader.content() == before


@pytest.mark.parametrize("number", STOPS, ids=NAMES)
def test_a_signal_after_the_end_of_the_pipe(locked: Locked, number: int) -> None:
    """Ctrl-C may end the producer first; what was read is committed all the same."""
    pipe, db = locked(None)
    pipe.close()
    time.sleep(0.7)
    pipe.process.send_signal(number)
    time.sleep(0.3)
    assert pipe.process.poll() is None
    db.execute("ROLLBACK")
    assert (pipe.process.wait(30), pipe.said()) == (0, "")
    assert {"a", "b", "c"} < set(pipe.users())


def test_a_second_signal_ends_the_wait(locked: Locked) -> None:
    """The second signal ends the wait, and messages tell what is lost."""
    pipe, _ = locked(None, HALF)
    before = pipe.loader.content()
    pipe.process.terminate()
    time.sleep(0.3)
    pipe.process.terminate()
    assert pipe.process.wait(30) == 143
    assert pipe.said().splitlines() == [
        LEFT_OUT.strip(),
        "not stored: the last lines that were read (3), up to -:3",
        "Terminated: uncommitted changes were rolled back",
    ]
    assert pipe.loader.content() == before


def test_a_second_signal_right_after_the_commit_leaves_a_doubt(
    loader: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The load does not know yet that it has succeeded."""
    original = load_active_users.commit

    def interrupted(*args: Any) -> None:
        original(*args)
        raise Stopped(128 + signal.SIGTERM)

    monkeypatch.setattr(load_active_users, "commit", interrupted)
    name = loader.file(lines(event("a"), event("b")))
    done = loader.run("-q", "--commit-every", 1000, name)
    assert (done.returncode, done.stdout) == (143, b"")
    assert done.stderr.decode().splitlines() == [
        f"not stored: the last lines that were read (2), up to {name}:2; "
        "some of them may be committed",
        "Terminated: the load was being committed, and may be committed",
    ]
    assert loader.users() == ["a", "b"]


def test_lost_lines_are_told_with_the_source_that_had_them(
    live: Start, loader: Loader
) -> None:
    """The next source has been opened, and nothing has come from it."""
    loader.load(SAMPLE)
    name = loader.file(lines(event("a"), b"bad"))
    bad = f"{name}:2: {NOT_AN_OBJECT}\n"
    options = ["-q", "--max-bad-records", 1]
    with closing(sqlite3.connect(loader.db, isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        pipe = live(*options, name, every=1000, LOCK_SECONDS=0.5)
        pipe.await_said(bad)
        time.sleep(0.5)
        pipe.process.terminate()
        assert pipe.process.wait(30) == 1
    lost = f"not stored: the last lines that were read (2), up to {name}:2"
    assert pipe.said() == f"{bad}{lost}\nError: {LOCKED}\n"


def test_the_last_line_of_a_file_without_its_newline_is_taken(
    live: Start, loader: Loader
) -> None:
    """It is a batch of its own, whose bytes have been read with the batch before."""
    name = loader.file(lines(event("a"), event("b"))[:-1])
    pipe = live("-q", name, every=1000, BATCH_BYTES=1, RANGE_BYTES=10**9)
    assert pipe.end() == (0, "", "")
    assert pipe.users() == ["a", "b"]


# -- For hours


def rss(pid: int) -> int:
    """Return the memory of a process in KiB."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1])


def test_readers_never_fail_beside_a_busy_load(live: Start) -> None:
    """They have a busy timeout of 1 s, and the load commits all the time."""
    pipe = live("-q")
    pipe.write(lines(event("first")))
    pipe.await_users("first")
    stopped = threading.Event()

    def flood() -> None:
        for start in range(0, 10**9, 1000):
            if stopped.is_set():
                return
            numbers = range(start, start + 1000)
            pipe.write(
                b"".join(lines(event(f"{n * 7919 % 10**9:09}")) for n in numbers)
            )

    thread = threading.Thread(target=flood)
    thread.start()
    counts: list[int] = []
    try:
        query = "SELECT count(*) FROM active_user"
        while len(counts) < 150 or len(set(counts)) < 8:
            with closing(sqlite3.connect(pipe.loader.db, timeout=1)) as db:
                counts += db.execute(query).fetchone()
    finally:
        stopped.set()
        thread.join()
    assert counts == sorted(counts)
    assert pipe.end() == (0, "", "")


def test_memory_and_descriptors_stay_flat(live: Start) -> None:
    # It waits for readers, however slow the machine is.
    pipe = live("-q", "--max-bad-records", 10**9, LIVE_LOCK_SECONDS=30)
    sizes, descriptors = [], []
    for number in range(8):
        some = [lines(event(f"{number}-{n}"), event(None), b"{}") for n in range(3000)]
        pipe.write(b"".join(some))
        pipe.await_count(3000 * (number + 1))
        time.sleep(0.1)
        sizes.append(rss(pipe.process.pid))
        descriptors.append(sorted(os.listdir(f"/proc/{pipe.process.pid}/fd")))
    assert descriptors == descriptors[:1] * 8
    assert max(sizes[4:]) - max(sizes[:4]) < 1024, sizes
    assert pipe.end() == (0, "", "")


# -- Hang-ups, files, early events, a database that may only be read


def test_a_hangup_under_nohup_is_ignored_for_good(live: Start, loader: Loader) -> None:
    """The load has committed something before, and goes on long after."""
    command = ["nohup", *loader.command("-q", "--commit-every", 1, "-")]
    loader.command = lambda *_: command  # type: ignore[method-assign]
    pipe = live()
    pipe.write(lines(event("a")))
    pipe.await_users("a")
    users = ["a"]
    for user in "bcd":
        pipe.process.send_signal(signal.SIGHUP)
        pipe.write(
            lines(event(user))
        )  # an ended load might take this, but not the next
        users.append(user)
        pipe.await_users(*users)
    assert pipe.process.poll() is None
    assert pipe.end() == (0, "", "")


def test_after_a_signal_the_later_ranges_of_a_file_are_not_read(
    loader: Loader,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The signal comes when the second of five ranges has been taken."""
    rows = [lines(event(f"{number:03}")) for number in range(50)]
    monkeypatch.setattr("load_active_users.RANGE_BYTES", 10 * len(rows[0]))
    path = str(loader.directory / loader.file(b"".join(rows)))
    live = LiveLoad(Job((), "", make_rule()), Intake(), every=1)
    taken = live.take_batches([path])
    next(taken)
    next(taken)
    live.job.stopper.signals.append(signal.SIGTERM)
    assert list(taken) == []
    found = [user for some in live.staging.get_users("2019-12-30") for user in some]
    assert found == [f"{number:03}" for number in range(20)]
    what = "may not have been read to its end; later sources not read: 0"
    assert capfd.readouterr() == ("", f"{path}: {what}\n")


@pytest.mark.parametrize(
    "start", [b"", b'{"event_name":"'], ids=["blanks", "an object"]
)
def test_a_line_without_end_is_refused_before_it_fills_the_memory(
    live: Start, start: bytes
) -> None:
    """One byte too many is enough. What came before it is committed."""
    pipe = live("-q", every=1000, MAX_LINE=2 << 20)
    pipe.write(lines(event("a")) + start.ljust((2 << 20) + 1))
    assert pipe.process.wait(30) == 1
    what = "a line of more than 2 MiB; one event per line is expected"
    assert (pipe.said(), pipe.users()) == (f"Error: -: {what}\n", ["a"])


EARLY = "Warning: all active events are dated before 2000; "
EARLY += "is event_timestamp in microseconds?\n"


@pytest.mark.parametrize(("later", "warning"), [([], EARLY), (["b"], "")])
def test_an_interval_of_early_events_is_not_refused(
    live: Start, later: list[str], warning: str
) -> None:
    """A warning comes in the end if no later event has a usual date."""
    pipe = live("--format", "json")
    pipe.write(lines(event("a", 0), event("a", 1)))
    assert wait_for(pipe.loader.db.exists)
    query = "SELECT lines, out_of_range_events FROM load_log"
    assert wait_for(lambda: has_rows(pipe.loader, query, [(2, 2)]))
    pipe.write(lines(*map(event, later)))
    status, out, said = pipe.end()
    assert (status, said) == (0, warning)
    report = json.loads(out)
    assert report["out_of_range_events"] == 2
    assert report["active_events"] == 2 + len(later)
    assert pipe.users() == later


def has_rows(loader: Loader, query: str, rows: list[tuple[int, ...]]) -> bool:
    """Return whether a query finds some rows, of tables that may not be there yet."""
    with suppress(sqlite3.OperationalError):
        return loader.query(query) == rows
    return False


def test_a_file_is_committed_before_its_end(loader: Loader) -> None:
    """A bad record in its last range refuses that range alone."""
    rows = [lines(event(f"{number:03}")) for number in range(50)]
    sizes = {"RANGE_BYTES": 10 * len(rows[0]), "LIVE_BYTES": 500}
    name = loader.file(b"".join(rows) + b"bad\n")
    done = loader.with_constants(**sizes).run("--commit-every", 1000, name)
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.decode().splitlines() == [
        f"{name}:51: {NOT_AN_OBJECT}",
        f"not stored: the last lines that were read (1), up to {name}:51",
        "Error: bad records: 1, more than --max-bad-records 0; "
        "nothing was loaded since the last commit",
    ]
    assert loader.users() == [f"{number:03}" for number in range(50)]
    assert loader.query("SELECT lines, added FROM load_log") == [(50, 50)]


READ_ONLY = "active_user_table.db: attempt to write a readonly database; "
READ_ONLY += "make the file and its directory writable, or use another --db"


def test_a_database_that_may_only_be_read_for_a_while(loader: Loader) -> None:
    """What was read is kept, and stored later; one line says so."""
    command = loader.command("-q", "--commit-every", 1, "-")
    pipe = Live(loader, [*WITHOUT_CAPABILITIES.split(), *command])
    pipe.write(lines(event("a")))
    pipe.await_users("a")
    loader.db.chmod(0o444)
    pipe.write(lines(event("b")))
    pipe.await_said(f"{READ_ONLY}{WAITS}\n")
    pipe.write(lines(event("c")))
    pipe.await_read()
    time.sleep(1.2)  # until c is tried, too
    assert pipe.users() == ["a"]
    loader.db.chmod(0o644)
    pipe.await_users("a", "b", "c")
    assert pipe.end() == (0, "", f"{READ_ONLY}{WAITS}\n")
    assert loader.query("SELECT lines, added FROM load_log") == [(3, 3)]


def test_users_that_are_left_out_add_up_over_commits(live: Start) -> None:
    """In the report, and in the row of the log."""
    pipe = live("--format", "json")
    loader = pipe.loader
    pipe.close()
    assert pipe.end()[0] == 0
    loader.load(loader.file(lines(event("a"), event("b", NOON + DAY))))
    loader.execute("DELETE FROM active_user WHERE date = '2019-12-30'")
    pipe = live("--format", "json")
    query = "SELECT lines, left_out, added FROM load_log ORDER BY rowid DESC LIMIT 1"
    pipe.write(lines(event("late"), event("later"), event("new", NOON + DAY)))
    assert wait_for(lambda: loader.query(query) == [(3, 2, 1)])
    pipe.write(lines(event("latest")))
    assert wait_for(lambda: loader.query(query) == [(4, 3, 1)])
    pipe.write(lines(event("newer", NOON + DAY)))
    assert wait_for(lambda: loader.query(query) == [(5, 3, 2)])
    status, out, said = pipe.end()
    assert (status, said) == (0, "")
    report = json.loads(out)
    assert report["left_out"] == 3
    assert report["dates"] == [
        date_count("2019-12-30", 1, 0),
        date_count("2019-12-31", 3, 2),
    ]
    assert loader.query(query) == [(5, 3, 2)]


# -- A COMMIT without an answer


@pytest.mark.parametrize("is_done", [True, False], ids=["done", "not done"])
def test_a_commit_without_an_answer_is_made_up_for(
    loader: Loader, monkeypatch: pytest.MonkeyPatch, is_done: bool
) -> None:
    """The load finds out whether it was done, and counts each event once."""
    commit = SQLite.commit

    def commit_without_answer(db: SQLite) -> None:
        monkeypatch.setattr(SQLite, "commit", commit)  # there is an answer next time
        if is_done:
            commit(db)
        raise InDoubt("no answer to COMMIT")

    monkeypatch.setattr(SQLite, "commit", commit_without_answer)
    path = str(loader.directory / loader.file(lines(event("a"), event("b"), {})))
    live = LiveLoad(Job((path,), str(loader.db), make_rule()), Intake(), every=1)
    report = live.run([path])
    assert (report.loads, report.tally.lines, live.waiting) == (1, 3, [])
    changes = Changes(added=2, loaded=2)
    assert report.counts == {"2019-12-30": DateCount("2019-12-30", 2, changes)}
    assert loader.table() == {"2019-12-30": 2}
    assert loader.users() == ["a", "b"]
    assert loader.query("SELECT load_id, lines FROM load_log") == [(report.load_id, 3)]


@pytest.mark.parametrize("is_done", [True, False], ids=["done", "not done"])
def test_a_later_commit_without_an_answer_is_made_up_for(
    loader: Loader, monkeypatch: pytest.MonkeyPatch, is_done: bool
) -> None:
    """The log has a row of the run, of its first commit."""
    commits = []
    commit = SQLite.commit

    def commit_without_answer(db: SQLite) -> None:
        commits.append(db)
        if is_done or len(commits) != 2:
            commit(db)
        if len(commits) == 2:
            raise InDoubt("no answer to COMMIT")

    contents = {"one": [event("a")], "two": [event("b"), event("c")]}
    paths = [
        str(loader.directory / loader.file(lines(*events), name))
        for name, events in contents.items()
    ]
    loader.load(loader.file(b""))
    monkeypatch.setattr(SQLite, "commit", commit_without_answer)
    job = Job(tuple(paths), str(loader.db), make_rule())
    live = LiveLoad(job, Intake(), every=0)
    report = live.run(paths)
    assert (report.loads, report.tally.lines, live.waiting) == (2, 3, [])
    changes = Changes(added=3, loaded=3)
    assert report.counts == {"2019-12-30": DateCount("2019-12-30", 3, changes)}
    assert loader.table() == {"2019-12-30": 3}
    assert loader.users() == ["a", "b", "c"]
    assert loader.last_log("load_id", "lines", "added") == (report.load_id, 3, 3)
