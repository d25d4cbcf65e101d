"""How a load ends: signals at any moment, and streams that are closed or full."""

import fcntl
import gzip
import os
import pty
import random
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from helpers import (
    INTERRUPTED,
    KILLS,
    NOT_AN_OBJECT,
    SAMPLE,
    SAMPLE_TABLE,
    TERMINATED,
    Loader,
    event,
    has_open,
    lines,
    make_rule,
    wait_for,
    when_it_reads,
    workers_of,
)

import load_active_users
from load_active_users import (
    Batch,
    Intake,
    Job,
    Range,
    Report,
    Stopped,
    Stopper,
    list_signals,
    load_once,
    time_limit,
    transaction,
)

# -- Signals

SIGNALS = [(signal.SIGINT, 130, INTERRUPTED), (signal.SIGTERM, 143, TERMINATED)]


@pytest.mark.parametrize(("number", "status", "message"), SIGNALS)
def test_a_signal_ends_a_load(
    loader: Loader, number: int, status: int, message: bytes
) -> None:
    loader.load(loader.file(lines(event("before"))))
    before = loader.content()
    pipe = loader.directory / "pipe"
    os.mkfifo(pipe)
    with loader.start("pipe") as process:
        with pipe.open("wb") as writer:  # which waits for its reader
            # It is more than a pipe holds: some of it has been read.
            writer.write(SAMPLE.read_bytes())
            writer.flush()
            process.send_signal(number)
            out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (status, b"", message)
    assert loader.content() == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_imports(loader: Loader, number: int) -> None:
    """It ends the program at once, without a traceback: nothing has been read."""
    stub = loader.directory / "stub"
    stub.mkdir()
    (stub / "click.py").write_text(
        "import time\nopen('importing', 'w').close()\nwhile True: time.sleep(0.01)\n"
    )
    with loader.start(SAMPLE, env={**os.environ, "PYTHONPATH": str(stub)}) as process:
        assert wait_for((loader.directory / "importing").exists)
        process.send_signal(number)
        out, err = process.communicate(timeout=10)
    assert (process.returncode, out, err) == (-number, b"", b"")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_at_the_very_end_changes_nothing(loader: Loader, name: str) -> None:
    """Python runs what is registered with atexit when all else is done."""
    kill = f"os.kill(os.getpid(), signal.{name})"
    site = f"import atexit, os, signal\natexit.register(lambda: {kill})\n"
    done = loader.run("-q", SAMPLE, env=loader.with_site(site), process=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert loader.table() == SAMPLE_TABLE


@pytest.mark.parametrize("workers", [1, 3])
def test_two_signals_at_once(loader: Loader, good: Path, workers: int) -> None:
    """The load says one line, about one of them."""
    chance = random.Random(workers)
    ends = ((130, b"", INTERRUPTED), (143, b"", TERMINATED))
    for _ in range(KILLS):
        with loader.start("--workers", workers, *[good] * 40) as process:
            if workers > 1:
                workers_of(process, workers)
            else:
                assert wait_for(partial(has_open, process.pid, good))
            time.sleep(chance.uniform(0, 0.1))
            for number in chance.sample((signal.SIGINT, signal.SIGTERM), 2):
                process.send_signal(number)
            try:
                out, err = process.communicate(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        assert (process.returncode, out, err) in ends
    assert not loader.db.exists()


def test_a_signal_while_nobody_reads_the_messages(loader: Loader) -> None:
    """Standard error is a full pipe, as of a logger that hangs or after Ctrl-S."""
    bad = loader.file(b"bad\n" * 20, "bad")
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    os.write(writer, b"x" * 4090)
    with loader.start("--max-bad-records", 20, bad, "-", stderr=writer) as process:
        time.sleep(1)  # until it has a message for which there is no room
        process.terminate()
        status = wait_for(process.poll, 20)
        process.kill()
    assert status == 143
    os.close(writer)
    with open(reader, "rb") as said:
        assert said.read() == b"x" * 4090
    assert not loader.db.exists()


def test_the_last_words_on_a_terminal_begin_a_line(loader: Loader) -> None:
    """The terminal itself shows "^C" without the end of a line."""
    controller, terminal = pty.openpty()
    with loader.start("-q", "--no-progress", "-", stderr=terminal) as process:
        os.close(terminal)
        when_it_reads(process)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
    said = os.read(controller, 65_536)
    os.close(controller)
    expected = b"\n" + INTERRUPTED
    assert (process.returncode, said.replace(b"\r\n", b"\n")) == (130, expected)


@pytest.mark.parametrize("last", [2, 4])
def test_a_signal_that_a_library_swallows_ends_a_load_all_the_same(
    tmp_path: Path, last: int
) -> None:
    """It comes while the second of three batches is scanned, or behind the third."""
    job = Job((), str(tmp_path / "active_user_table.db"), make_rule())
    dates = job.choose_dates()
    scanned = []

    def scan() -> Generator[tuple[Range, Batch], None, None]:
        for number in (1, 2, 3, 4):
            if number == last:
                with suppress(Stopped):
                    job.stopper.handle(signal.SIGINT, None)
            scanned.append(number)
            if number < 4:
                yield Range("events.jsons"), Batch().close(dates)

    with pytest.raises(Stopped) as stopped:
        load_once(job, dates, Intake(), scan(), (), Report())
    assert (stopped.value.code, scanned) == (130, [1, 2, 3, 4][:last])
    with transaction(job.target) as db:
        assert db.execute("SELECT * FROM load_log").fetchall() == []


def test_a_signal_that_a_library_swallows_ends_the_program(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """It ends it at the latest when all else is done."""
    with pytest.raises(Stopped) as stopped:
        with Stopper().handle_signals([signal.SIGINT]):
            with suppress(Stopped):
                signal.raise_signal(signal.SIGINT)
    assert stopped.value.code == 130
    assert capfd.readouterr() == ("", INTERRUPTED.decode())


def test_a_time_limit_that_a_library_swallows_ends_a_block_all_the_same() -> None:
    """It is told again after a second."""
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"^no answer for 0\.1 s$"), time_limit(0.1):
        with suppress(TimeoutError):
            time.sleep(20)
        time.sleep(20)
    assert 1.1 <= time.monotonic() - began < 20


OUTCOMES = {
    # the signal, the place where it comes, what is said
    "while it commits": (
        signal.SIGTERM,
        "SQLite.commit",
        "Terminated: the load was being committed, and may be committed\n",
    ),
    "while it prints": (
        signal.SIGINT,
        "print_report",
        "Interrupted: the load is committed, but its report or picture is not "
        "complete\n",
    ),
}


@pytest.mark.parametrize(("number", "place", "said"), OUTCOMES.values(), ids=OUTCOMES)
def test_what_became_of_a_load_that_a_signal_ended(
    loader: Loader,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    place: str,
    said: str,
) -> None:
    def stop(what: Any) -> None:
        if getattr(what, "can_write", True):  # it is no transaction that only reads
            signal.raise_signal(number)

    monkeypatch.setattr(f"load_active_users.{place}", stop)
    done = loader.run(SAMPLE)
    assert (done.returncode, done.stdout) == (128 + number, b"")
    assert done.stderr.decode() == said
    content = loader.content()
    assert bool(content) == (place == "print_report")


# -- Standard streams


def test_a_report_into_a_closed_pipe(loader: Loader) -> None:
    read, write = os.pipe()
    os.close(read)
    with open(write, "wb") as closed:
        with loader.start(SAMPLE, stdout=closed, stderr=-1) as process:
            _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, b"")
    assert loader.table() == SAMPLE_TABLE


def test_a_reader_that_had_enough(loader: Loader) -> None:
    done = subprocess.run(
        ["bash", "-c", 'set -o pipefail; "$@" | true', "bash", *loader.command(SAMPLE)],
        cwd=loader.directory,
        capture_output=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert loader.table() == SAMPLE_TABLE


REPORT_LOST = (
    "Error: the report could not be written (the load is done): "
    "No space left on device; free some disk space and load again\n"
)
STREAMS = ["<&-", ">&-", "2>&-", "<&- >&-", "<&- 2>&-", ">&- 2>&-", "<&- >&- 2>&-"]
FULL_STREAMS = [
    ">/dev/full",
    "2>/dev/full",
    ">/dev/full 2>/dev/full",
    ">/dev/full 2>&-",
    ">&- 2>/dev/full",
]


def in_a_shell(
    loader: Loader, redirections: str, *args: object
) -> tuple[int, str, str]:
    command = ["sh", "-c", f'exec "$@" {redirections}', "sh", *loader.command(*args)]
    done = subprocess.run(
        command, cwd=loader.directory, capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("streams", STREAMS + FULL_STREAMS)
def test_streams_that_are_closed_or_full(loader: Loader, streams: str) -> None:
    """The load is the same, nothing else gets their descriptors, and what can be said
    is said."""
    report = "date,active_user_count,added,removed\n2019-12-30,2,2,0\n"
    has_output = not ({">&-", ">/dev/full"} & set(streams.split()))
    has_error = "2>" not in streams
    lost = ">/dev/full" in streams.split()
    good = loader.file(lines(event("a"), event("b")), "good")
    done = in_a_shell(loader, streams, "--format", "csv", "--rejects", "rejects", good)
    assert done == (
        1 if lost else 0,
        report if has_output else "",
        REPORT_LOST if lost and has_error else "",
    )
    assert loader.table() == {"2019-12-30": 2}
    assert (loader.directory / "rejects").read_bytes() == b""

    content = loader.content()
    bad = loader.file(b"bad\n", "bad")
    done = in_a_shell(loader, streams, "--rejects", "rejects", bad)
    said = (
        f"bad:1: {NOT_AN_OBJECT}\n"
        "Error: bad records: 1, more than --max-bad-records 0; nothing was loaded\n"
    )
    assert done == (1, "", said if has_error else "")
    assert (loader.directory / "rejects").read_bytes() == b"bad\n"
    assert in_a_shell(loader, streams, "--nonsense")[0] == 2
    status, _, said = in_a_shell(loader, streams, "--help")
    assert status == (1 if lost else 0)
    assert said == (
        "Error: No space left on device; free some disk space and load again\n"
        if lost and has_error
        else ""
    )
    if "<&-" in streams:
        what = "Error: -:1: Bad file descriptor\n"
        assert in_a_shell(loader, streams, "-") == (1, "", what if has_error else "")
    assert loader.content() == content


@pytest.mark.parametrize(
    "args",
    [
        [SAMPLE],
        [f"file://{SAMPLE}"],
        ["--plot", "x.png", SAMPLE],
        ["--max-bad-records", 99, "--rejects", "rejects", "--workers", 2, "LARGE"],
        ["nothing"],
        ["--timezone", "UTC", SAMPLE],
        ["--rejects", "rejects", "BAD"],
    ],
    ids=str,
)
def test_nothing_is_left_open(loader: Loader, large: Path, args: list[object]) -> None:
    """The development mode of Python says nothing that the command does not."""
    loader.load(SAMPLE)
    named = {"LARGE": large, "BAD": loader.file(b"bad\n", "bad")}
    args = [named.get(str(arg), arg) for arg in args]
    usual = loader.run("-q", *args, process=True)
    python, *command = loader.command("-q", *args)
    command = [python, "-X", "dev", "-W", "error", *command]
    done = subprocess.run(
        command, cwd=loader.directory, capture_output=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (
        usual.returncode,
        usual.stdout,
        usual.stderr,
    )


# -- No signal is swallowed


class Interrupted:
    """An object whose finalizer is interrupted: Python clears what it raises."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGTERM)


@pytest.fixture
def cleared(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The exceptions that Python has cleared."""
    seen: list[object] = []
    hook = lambda unraisable: seen.append(unraisable.exc_type)  # noqa: E731
    monkeypatch.setattr(sys, "unraisablehook", hook)
    return seen


def test_a_signal_whose_exception_is_cleared_is_remembered(
    cleared: list[object],
) -> None:
    stopper = Stopper()
    with pytest.raises(Stopped) as raised:
        with stopper.handle_signals([signal.SIGTERM]):
            stopper.check()
            Interrupted()
            assert (cleared, stopper.signals) == ([Stopped], [signal.SIGTERM])
            stopper.check()
            raise AssertionError("check() has not raised it again")
    assert raised.value.code == 143


def test_a_hangup_is_left_to_the_system_by_a_batch_load() -> None:
    """Only a live load commits at a SIGHUP."""
    assert list_signals(is_live=False) == [signal.SIGINT, signal.SIGTERM]
    live = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    assert list_signals(is_live=True) == live


def test_only_the_first_signal_that_is_not_tolerated_raises() -> None:
    """Later ones do not interrupt what is said at the end."""
    stopper = Stopper()
    said = []

    @contextmanager
    def say_more(word: str) -> Iterator[None]:
        try:
            yield
        finally:
            signal.raise_signal(signal.SIGTERM)
            said.append(word)

    with pytest.raises(Stopped), stopper.handle_signals([signal.SIGTERM]):
        with say_more("after both"), stopper.tolerate(sys.maxsize):
            signal.raise_signal(signal.SIGTERM)
            with say_more("after one"), stopper.tolerate(1):
                signal.raise_signal(signal.SIGTERM)
                raise AssertionError("the second signal has not raised")
    assert said == ["after one", "after both"]
    assert stopper.signals == [signal.SIGTERM] * 4


@pytest.mark.parametrize("step", ["log_load", "make_log_row", "refuse_bad_records"])
def test_nothing_is_committed_after_a_signal_whose_exception_is_cleared(
    loader: Loader,
    monkeypatch: pytest.MonkeyPatch,
    cleared: list[object],
    step: str,
) -> None:
    """The signal comes at the last moments before COMMIT."""
    loader.load(loader.file(lines(event("before"))))
    original = getattr(load_active_users, step)

    def interrupted(*args: object) -> object:
        result = original(*args)
        Interrupted()
        return result

    monkeypatch.setattr(load_active_users, step, interrupted)
    before = loader.content()
    done = loader.run(SAMPLE)
    assert cleared == [Stopped]
    assert (done.returncode, done.stdout, done.stderr) == (143, b"", TERMINATED)
    assert loader.content() == before


def test_a_signal_while_streams_are_opened_and_closed(loader: Loader) -> None:
    """Each of very many gzip files has a decompressor, which is closed at its end."""
    chance = random.Random(0)
    member = gzip.compress(lines(event("a")))
    name = loader.file(member * 2, "a.jsons.gz")
    files = [name] * 20_000
    for _ in range(KILLS // 3):
        with loader.start("--workers", 1, *files) as process:
            path = loader.directory / name
            assert wait_for(partial(has_open, process.pid, path))
            time.sleep(chance.uniform(0, 1))
            assert process.poll() is None
            process.terminate()
            out, err = process.communicate(timeout=60)
        assert (process.returncode, out, err) == (143, b"", TERMINATED)
        assert not loader.db.exists()


# -- After the commit

PICTURE_LATER = """
import time
open("drawing", "w").close()
while True: time.sleep(0.01)
"""


@pytest.mark.parametrize(
    ("number", "status", "word"),
    [(signal.SIGINT, 130, "Interrupted"), (signal.SIGTERM, 143, "Terminated")],
)
def test_a_signal_while_the_picture_is_drawn(
    loader: Loader, number: int, status: int, word: str
) -> None:
    """The load is committed, and the message says so."""
    stub = loader.directory / "stub"
    stub.mkdir()
    (stub / "matplotlib.py").write_text(PICTURE_LATER)
    env = {**os.environ, "PYTHONPATH": str(stub)}
    with loader.start("-q", "--plot", "x.png", SAMPLE, env=env) as process:
        assert wait_for((loader.directory / "drawing").exists)
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    said = f"{word}: the load is committed, but its report or picture is not complete\n"
    assert (process.returncode, out, err.decode()) == (status, b"", said)
    assert loader.table() == SAMPLE_TABLE
    assert loader.last_log("lines") == (1000,)
    assert not list(loader.directory.glob("x.png*"))
