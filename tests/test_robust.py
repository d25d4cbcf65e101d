"""Processes, signals, crashes, crowds, full disks, closed streams and hostile input: a load ends in
the old state or the new one, with one line that says why."""

import fcntl
import gzip
import io
import itertools
import json
import operator
import os
import random
import re
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import termios
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import plain
import pytest
from conftest import NOON, ROOT, SAMPLE, SCRIPT, Loader, Process, event, lines, wait_for
from tqdm import tqdm

import load_active_users
from load_active_users import (
    POOL_MIN_BYTES,
    Batch,
    Load,
    LoadError,
    Range,
    line_start,
    rule_of,
    scan_in_processes,
    scan_in_turn,
)

KILLS = int(os.environ.get("KILLS", "15"))
ROWS = SAMPLE.read_bytes().splitlines(keepends=True)
KILLED = "Error: a scanning process was killed (out of memory?); try fewer --workers\n"
INTERRUPTED = b"Interrupted: uncommitted changes were rolled back\n"
TERMINATED = b"Terminated: uncommitted changes were rolled back\n"
DAY_END = 1577858399_000000  # 2019-12-31 23:59:59 in US/Central, in microseconds UTC
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
        for number in range(28):
            file.write(samples[number % 7])
            file.write(b"\n" if number % 3 else b'{"event_name":"user_engagement"}\n{cut off\n')
    assert path.stat().st_size > POOL_MIN_BYTES
    return path


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that is large enough for several processes, without a bad record."""
    path = tmp_path_factory.mktemp("good") / "good.jsons"
    with path.open("wb") as file:
        file.writelines(itertools.repeat(SAMPLE.read_bytes(), 28))
    assert path.stat().st_size > POOL_MIN_BYTES
    return path


def start(loader: Loader, *args: object, **more: Any) -> Process:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more}
    return loader.start(*args, **pipes)


def children(process: Process) -> list[int]:
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    with suppress(OSError):
        return [int(pid) for pid in path.read_text().split()]
    return []


def alive(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


def workers_of(process: Process, number: int = 2) -> list[int]:
    pids: list[int] = wait_for(lambda: len(children(process)) == number and children(process))
    assert pids, "the workers have not started"
    return pids


def has_read_all(process: Process) -> bool:
    assert process.stdin
    return fcntl.ioctl(process.stdin, termios.FIONREAD, bytes(4)) == bytes(4)


def when_it_reads(process: Process) -> None:
    """Wait until a load has read what it was sent."""
    assert process.stdin
    process.stdin.write(lines(event("first")))
    process.stdin.flush()
    assert wait_for(lambda: has_read_all(process))


COMMAND = "with loader.exit_status():\n    loader.main(standalone_mode=False)"


def in_a_process(loader: Loader, code: str, *args: object, **more: Any) -> Process:
    """The command, after some code that sees it as `loader`."""
    code = f"import os, signal, sys\nimport load_active_users as loader\n{code}\n{COMMAND}"
    return Process(
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
    assert sum((loader.directory / name).stat().st_size for name in names) * 10 > POOL_MIN_BYTES
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
    how = "Compressed file ended before the end-of-stream marker was reached"
    damaged = rf"the compressed data is damaged or cut off \({how}\); fetch the file again"
    assert re.fullmatch(rf"Error: 2\.gz:\d+: {damaged}", error)


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


def test_processes_have_as_much_to_do() -> None:
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


def test_a_process_without_memory_for_its_answer(capfd: pytest.CaptureFixture[str]) -> None:
    def scan(part: Range) -> Iterator[Batch]:
        yield Batch(bad=[(1, "", Huge())])

    with pytest.raises(LoadError) as raised:
        list(scan_in_processes([Range("x", size=1)], scan, 1))  # type: ignore[arg-type]
    assert f"Error: {raised.value}\n" == KILLED
    assert capfd.readouterr().err == ""


WORKERS_NEED_FILES = (
    "Error: scanning processes: Too many open files; allow more open files (ulimit -n)\n"
)
WORKERS_NEED_PROCESSES = (
    "Error: scanning processes: Resource temporarily unavailable; "
    "allow more processes (ulimit -u), or try fewer --workers\n"
)
AS_NOBODY = (  # who, unlike root, may have few processes, but reads and writes all files
    "setpriv --reuid=65500 --clear-groups --inh-caps=+dac_override,+dac_read_search "
    "--ambient-caps=+dac_override,+dac_read_search prlimit --nproc={}"
)


def under(loader: Loader, before: str, *args: object) -> tuple[int, bytes, str]:
    """The command, started by another."""
    command = [*before.split(), *loader.command(*args)]
    done = subprocess.run(command, cwd=loader.directory, stdin=-3, capture_output=True, timeout=120)
    return done.returncode, done.stdout, done.stderr.decode()


@pytest.mark.parametrize("limit", [6, 8, 10, 12])
def test_few_open_files(loader: Loader, good: Path, limit: int) -> None:
    before = f"prlimit --nofile={limit}"
    done = under(loader, before, "-q", "--workers", 8, good)
    assert done == (1, b"", WORKERS_NEED_FILES)
    assert not loader.db.exists()
    assert under(loader, before, "-q", "--workers", 1, good) == (0, b"", "")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be another user than root")
@pytest.mark.parametrize("limit", [1, 2, 3])
def test_few_processes(loader: Loader, good: Path, limit: int) -> None:
    """Beside the loader there are three workers, one for each range."""
    for path in (loader.directory, *loader.directory.parents[:3], good.parent):
        path.chmod(0o777)
    done = under(loader, AS_NOBODY.format(limit), "-q", "--workers", 4, good)
    assert done == (1, b"", WORKERS_NEED_PROCESSES)
    assert not loader.db.exists()
    assert under(loader, AS_NOBODY.format(1), "-q", "--workers", 1, good) == (0, b"", "")


# -- Signals


SIGNALS = [(signal.SIGINT, 130, INTERRUPTED), (signal.SIGTERM, 143, TERMINATED)]


@pytest.mark.parametrize(("number", "status", "message"), SIGNALS)
def test_a_signal_during_the_imports(
    loader: Loader, number: int, status: int, message: bytes
) -> None:
    stub = loader.directory / "stub"
    stub.mkdir()
    (stub / "click.py").write_text(
        "import time\nopen('importing', 'w').close()\nwhile True: time.sleep(0.01)\n"
    )
    with start(loader, SAMPLE, env={**os.environ, "PYTHONPATH": str(stub)}) as process:
        assert wait_for((loader.directory / "importing").exists)
        process.send_signal(number)
        out, err = process.communicate(timeout=10)
    assert (process.returncode, out, err) == (status, b"", b"")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_at_the_very_end_changes_nothing(loader: Loader, name: str) -> None:
    code = f"import atexit\natexit.register(lambda: os.kill(os.getpid(), signal.{name}))"
    with in_a_process(loader, code, "-q", SAMPLE) as process:
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (0, b"", b"")


def reads(descriptors: Path, file: Path) -> bool:
    """Whether one of the descriptors of a process is of a file."""
    with suppress(OSError):
        return str(file) in map(os.readlink, descriptors.iterdir())
    return False


@pytest.mark.parametrize("workers", [1, 3])
def test_two_signals_at_once(loader: Loader, good: Path, workers: int) -> None:
    """Give the one line of one of them."""
    chance = random.Random(workers)
    ends = ((130, b"", INTERRUPTED), (143, b"", TERMINATED))
    for _ in range(KILLS):
        with start(loader, "--workers", workers, *[good] * 40) as process:
            if workers > 1:
                workers_of(process, workers)
            else:
                position = Path(f"/proc/{process.pid}/fd")
                assert wait_for(partial(reads, position, good))
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


# -- Outputs are no file that is read or written otherwise


NAMES = [  # of the file events.jsons, in the directory HERE
    ("itself", "events.jsons", "events.jsons"),
    ("a longer name", "./events.jsons", "events.jsons"),
    ("a whole name", "HERE/events.jsons", "events.jsons"),
    ("a link", "link", "events.jsons"),
    ("a hard link", "hard", "events.jsons"),
    ("the other way round", "events.jsons", "link"),
    ("standard input", "events.jsons", "-"),
    ("standard input by name", "events.jsons", "/dev/stdin"),
    ("standard input by number", "events.jsons", "/dev/fd/0"),
    ("a descriptor of the process", "events.jsons", "/proc/self/fd/0"),
    ("both by descriptor", "/dev/stdin", "-"),
    ("a URL", "events.jsons", "file://HERE/events.jsons"),
    ("a URL of a link", "events.jsons", "file://HERE/link"),
    ("a URL of the other kind", "events.jsons", "local://HERE/events.jsons"),
    ("a URL with wildcards", "events.jsons", "file://HERE/event?.jsons"),
    ("a cached URL", "events.jsons", "simplecache::file://HERE/events.jsons"),
    ("a URL from home", "events.jsons", "file://~/events.jsons"),
    ("a URL in a directory", "events.jsons", "dir://events.jsons::file://HERE"),
]


@pytest.mark.parametrize("option", ["--rejects", "--db", "--plot"])
@pytest.mark.parametrize(("output", "source"), [n[1:] for n in NAMES], ids=[n[0] for n in NAMES])
def test_an_output_is_never_an_input(loader: Loader, option: str, output: str, source: str) -> None:
    data = lines(b"bad", event("a"))
    name = "events.png" if option == "--plot" else "events.jsons"
    path = loader.directory / loader.file(data, name)
    link, hard = ("link.png", "hard.png") if option == "--plot" else ("link", "hard")
    (loader.directory / link).symlink_to(path)
    os.link(path, loader.directory / hard)

    def named(text: str) -> str:
        text = text.replace("events.jsons", name).replace(".jsons", Path(name).suffix)
        text = text.replace("link", link).replace("hard", hard)
        return text.replace("HERE", str(loader.directory))

    output, source = named(output), named(source)
    if option == "--plot" and not output.endswith(".png"):
        assert output == "/dev/stdin"  # which is no name of a picture
        return
    with path.open("rb") as file:
        args = ["--max-bad-records", 9, option, output, source]
        done = loader.run(*args, input=file, env={"HOME": str(loader.directory)})
    found = source.replace("?", "s")  # what the wildcards stand for
    what = usage(f"{option} and the input {found} are the same file: {output!r}")
    assert path.read_bytes() == data
    assert (done.returncode, done.stdout, done.stderr.decode()) == (2, b"", what)
    assert not loader.db.exists()


TWICE = [
    (["--rejects", "active_user_table.db"], "--rejects and --db"),
    (["--rejects", "active_user_table.db-journal"], "--rejects and --db's -journal"),
    (["--rejects", "active_user_table.db-wal"], "--rejects and --db's -wal"),
    (["--rejects", "active_user_table.db-shm"], "--rejects and --db's -shm"),
    (["--rejects", ROOT / "schema.sql"], "--rejects and schema.sql"),
    (["--rejects", "x.png", "--plot", "x.png"], "--plot and --rejects"),
    (["--rejects", "x.png", "--plot", "link.png"], "--plot and --rejects"),
    (["--rejects", "link.png", "--plot", "x.png"], "--plot and --rejects"),
    (["--rejects", "to.db"], "--rejects and --db"),
]


@pytest.mark.parametrize("is_there", [False, True])
@pytest.mark.parametrize(("options", "what"), TWICE, ids=[str(what) for _, what in TWICE])
def test_an_output_is_never_another_output(
    loader: Loader, options: list[object], what: str, is_there: bool
) -> None:
    if is_there:
        loader.load(SAMPLE)
        loader.file(b"some", "x.png")
    (loader.directory / "link.png").symlink_to("x.png")
    (loader.directory / "to.db").symlink_to(loader.db)
    before = {p: p.read_bytes() for p in loader.directory.iterdir() if p.is_file()}
    said = loader.refuse(*options, SAMPLE, status=2)
    assert said == usage(f"{what} are the same file: {str(options[-1])!r}")
    assert {p: p.read_bytes() for p in loader.directory.iterdir() if p.is_file()} == before


@pytest.mark.parametrize("option", ["--rejects", "--db", "--plot"])
@pytest.mark.parametrize(
    ("stream", "name"), [("stdout", "standard output"), ("stderr", "standard error")]
)
def test_an_output_is_never_a_standard_stream(
    loader: Loader, option: str, stream: str, name: str
) -> None:
    path = loader.directory / "x.png"
    for output in ("x.png", "/dev/stdout" if stream == "stdout" else "/dev/stderr"):
        if output != "x.png" and option == "--plot":
            continue
        with (
            path.open("wb") as file,
            start(loader, option, output, SAMPLE, **{stream: file}) as process,
        ):
            out, err = process.communicate(timeout=60)
        what = usage(f"{option} and {name} are the same file: {output!r}").encode()
        written = path.read_bytes()
        assert (process.returncode, out or b"", err if err is not None else written) == (
            2,
            b"",
            what,
        )
        assert written == (what if stream == "stderr" else b"")
    assert not loader.db.exists()


@pytest.mark.parametrize("source", ["ap", "-", "file://HERE/ap", "/dev/fd/0"])
def test_a_report_is_not_appended_to_its_events(loader: Loader, source: str) -> None:
    """Nor is it written to the program; warnings may go where the report goes."""
    path = loader.directory / loader.file(lines(event()), "ap")
    source = source.replace("HERE", str(loader.directory))
    with path.open("rb") as stdin, path.open("ab") as stdout:
        with start(loader, source, stdin=stdin, stdout=stdout, stderr=-1) as process:
            _, err = process.communicate(timeout=60)
    what = usage(f"standard output and the input {source} are the same file")
    assert (process.returncode, err.decode()) == (2, what)
    assert path.read_bytes() == lines(event())
    with (loader.directory / "log").open("wb") as log:
        with start(loader, "--format", "csv", "ap", stdout=log, stderr=log) as process:
            assert process.wait(60) == 0
    rows = b"date,active_user_count,added\n2019-12-30,1,1\n"
    assert (loader.directory / "log").read_bytes() == rows


def test_devices_are_no_files(loader: Loader) -> None:
    """Which may well be written twice."""
    for args in (["--rejects", "/dev/null"], ["--rejects", "/dev/null", "/dev/null"]):
        assert loader.load(*args, SAMPLE)["lines"] == 1000


def test_rejects_are_appended(loader: Loader) -> None:
    """Whatever the loads are like, and also after a line that has not ended."""
    bad = loader.file(b"bad\nworse\r\n", "bad")
    rejects = loader.directory / loader.file(b"an earlier one", "rejects")
    good = ["--rejects", "rejects", SAMPLE]
    loader.load(*good)
    assert rejects.read_bytes() == b"an earlier one\n"
    tries: list[list[object]] = [["--max-bad-records", 2], [], ["--dry-run"]]
    for number, args in enumerate(tries, 1):
        done = loader.run("-q", *args, "--rejects", "rejects", bad)
        assert done.returncode == (0 if number == 1 else 1)
        expected = b"an earlier one\n" + b"bad\nworse\r\n" * min(number, 2)
        assert rejects.read_bytes() == expected
    loader.load(*good)
    assert rejects.read_bytes() == expected


# -- What can be known before the scan


def endless(loader: Loader, *args: object, **more: Any) -> tuple[int, bytes, str]:
    """How a load ends whose standard input does not."""
    with start(loader, *args, "-", **more) as process:
        ended = wait_for(lambda: process.poll() is not None)
        if not ended:
            process.kill()
        assert process.stdout
        assert process.stderr
        out, err = process.stdout.read(), process.stderr.read()
        assert ended, "it waits for its input"
    return process.returncode, out, err.decode()


def of_a_later_version(db: sqlite3.Connection) -> None:
    db.execute("PRAGMA user_version = 99")


def of_another_program(db: sqlite3.Connection) -> None:
    db.executescript("DROP TABLE load_log; CREATE TABLE load_log (x)")


LATER = "is of a later version of load_active_users.py than 1.1.0; use that"
OTHER = (
    "it has no column load_log.load_id of type TEXT: "
    "it is not one of load_active_users.py; choose another --db"
)
RULES = (
    "was filled under the rule --timezone US/Central --event-name user_engagement "
    "--min-engagement-msec 3000 --valuable-event '*_event'; the rule of this load is "
    "--timezone UTC --event-name user_engagement --min-engagement-msec 3000 "
    "--valuable-event '*_event'; "
    "use that rule or another --db"
)
IRREGULAR = "is not a regular file"
EARLY = [
    (["--timezone", "UTC"], f"active_user_table.db: {RULES}"),
    (["--rejects", "none/x"], "none/x: there is no directory HERE/none; create it first"),
    (["--rejects", "."], ".: is a directory; name a file"),
    (["--plot", "none/x.png"], "none/x.png: there is no directory HERE/none; create it first"),
    (["--plot", "dir.png"], "dir.png: is a directory; name a file"),
    (["--db", "none/x"], "none/x: there is no directory HERE/none; create it first"),
    (["--db", "dir.png"], "dir.png: is a directory; name a file"),
    (["--dry-run", "--db", "dir.png"], f"dir.png: {IRREGULAR}; choose another --db"),
    (["--db", "fifo.png"], f"fifo.png: {IRREGULAR}; name another"),
    (["--db", "/dev/null"], f"/dev/null: {IRREGULAR}; name another"),
    (["--dry-run", "--db", "fifo.png"], f"fifo.png: {IRREGULAR}; choose another --db"),
    (["--plot", "fifo.png"], f"fifo.png: {IRREGULAR}; name another"),
    (["--plot", "null.png"], f"null.png: {IRREGULAR}; name another"),
    (["--db", "text"], "text: file is not a database; choose another --db"),
    (["--db", "later.db"], f"later.db: {LATER}"),
    (["--db", "other.db"], f"other.db: {OTHER}"),
]


@pytest.mark.parametrize(("options", "what"), EARLY, ids=[" ".join(o) for o, _ in EARLY])
def test_what_can_be_known_before_the_scan(loader: Loader, options: list[str], what: str) -> None:
    loader.load(SAMPLE)
    (loader.directory / "dir.png").mkdir()
    os.mkfifo(loader.directory / "fifo.png")
    (loader.directory / "null.png").symlink_to("/dev/null")
    loader.file(b"This is no database, but a text that is longer than its header. " * 9, "text")
    for name, change in (("later.db", of_a_later_version), ("other.db", of_another_program)):
        shutil.copy(loader.db, loader.directory / name)
        with closing(sqlite3.connect(loader.directory / name)) as db:
            change(db)
            db.commit()
    before = sorted(loader.directory.iterdir())
    message = f"Error: {what.replace('HERE', str(loader.directory))}\n"
    assert endless(loader, *options) == (1, b"", message)
    assert sorted(loader.directory.iterdir()) == before


WRONG = [
    (["--plot", "x.jpg"], "Invalid value for '--plot': 'x.jpg' does not end in .png, .svg, .pdf"),
    (["--plot", ".png"], "Invalid value for '--plot': '.png' does not end in .png, .svg, .pdf"),
    (
        ["--commit-every", "nan"],
        "Invalid value for '--commit-every': nan is not a number of seconds",
    ),
    (["--cluster", ""], "Invalid value for '--cluster': must not be empty"),
    (["--db", ""], "Invalid value for '--db': must not be empty"),
    (["--event-name", "\udcff"], "Invalid value for '--event-name': must be UTF-8"),
    (["--valuable-event", "a\udcff"], "Invalid value for '--valuable-event': must be UTF-8"),
    (["--rejects", ""], "Invalid value for '--rejects': must not be empty"),
    (["--plot", ""], "Invalid value for '--plot': must not be empty"),
]


@pytest.mark.parametrize(("options", "what"), WRONG, ids=[" ".join(o) for o, _ in WRONG])
def test_a_command_line_that_is_wrong(loader: Loader, options: list[str], what: str) -> None:
    assert endless(loader, *options) == (2, b"", usage(what))
    assert list(loader.directory.iterdir()) == []


def copied(loader: Loader, schema: bool) -> Loader:
    """The program in a directory of its own, with schema.sql or without."""
    place = loader.directory / "program"
    place.mkdir()
    shutil.copy(SCRIPT, place)
    if schema:
        shutil.copy(ROOT / "schema.sql", place)

    class Copied(Loader):
        def command(self, *args: object) -> list[str]:
            return [sys.executable, str(place / SCRIPT.name), *map(str, args)]

    return Copied(loader.directory)


def test_schema_sql_belongs_beside_the_script(loader: Loader) -> None:
    alone = copied(loader, schema=False)
    path = loader.directory / "program" / "schema.sql"
    what = "is missing; it belongs beside load_active_users.py"
    assert endless(alone) == (1, b"", f"Error: {path}: {what}\n")
    assert not loader.db.exists()


def test_a_link_to_a_database_that_is_not_there_yet(loader: Loader) -> None:
    loader.db.symlink_to("data.db")
    for expected in (64, 0):
        assert sum(date["added"] for date in loader.load(SAMPLE)["dates"]) == expected
    assert loader.db.is_symlink()
    assert sum(loader.table().values()) == 64


def test_a_schema_sql_that_is_none(loader: Loader) -> None:
    other = copied(loader, schema=True)
    path = loader.directory / "program" / "schema.sql"
    path.write_text("CREATE TABLE")
    assert other.refuse(SAMPLE) == f"Error: {path}: incomplete input\n"
    assert not loader.db.exists()


def test_a_link_to_the_script_finds_schema_sql(loader: Loader) -> None:
    (loader.directory / "bin").mkdir()
    command = loader.directory / "bin" / "load-active-users"
    command.symlink_to(SCRIPT)
    subprocess.run([sys.executable, command, "-q", SAMPLE], cwd=loader.directory, check=True)
    assert sum(loader.table().values()) == 64


WITHOUT_CAPABILITIES = (  # as any user: root may write everything
    "setpriv --bounding-set=-dac_override,-dac_read_search "
    "--inh-caps=-dac_override,-dac_read_search"
)


@pytest.fixture
def closed(loader: Loader) -> Iterator[Path]:
    """A directory that can't be written."""
    path = loader.directory / "closed"
    path.mkdir()
    yield path
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("option", "name"), [("--db", "x.db"), ("--rejects", "x"), ("--plot", "x.png")]
)
def test_a_directory_that_cannot_be_written(
    loader: Loader, closed: Path, option: str, name: str
) -> None:
    closed.chmod(0o555)
    command = [*WITHOUT_CAPABILITIES.split(), *loader.command(option, f"closed/{name}", "-")]
    with Process(command, cwd=loader.directory, stdin=-1, stdout=-1, stderr=-1) as process:
        ended = wait_for(lambda: process.poll() is not None)
        process.kill()
        assert ended
        out, err = process.communicate()
    what = f"{closed} can't be written; make it writable, or choose another"
    assert (process.returncode, out) == (1, b"")
    assert err.decode() == f"Error: closed/{name}: {what}\n"
    assert not loader.db.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be another user than root")
def test_a_database_that_may_not_be_found(loader: Loader) -> None:
    """It is not one that is missing."""
    secret = loader.directory / "secret"
    secret.mkdir()
    loader.load("--db", "secret/a.db", SAMPLE)
    secret.chmod(0)
    for args in (["--dry-run", SAMPLE], ["--plot", "x.png"]):
        done = under(loader, WITHOUT_CAPABILITIES, "--db", "secret/a.db", *args)
        assert done == (1, b"", "Error: secret/a.db: Permission denied\n")


@pytest.mark.parametrize("mode", ["wal", "delete"])
def test_a_database_that_can_only_be_read(loader: Loader, closed: Path, mode: str) -> None:
    """Also one in WAL mode, whose readers want to write: it is drawn, and loads are tried."""
    loader.db = closed / "x.db"
    loader.load("--db", loader.db, SAMPLE)
    assert loader.query(f"PRAGMA journal_mode = {mode}") == [(mode,)]
    before = loader.db.read_bytes()
    loader.db.chmod(0o444)
    closed.chmod(0o555)
    options = ["--db", loader.db]
    done = under(loader, WITHOUT_CAPABILITIES, *options, "--plot", "x.png")
    assert done == (0, b"", "")
    assert (loader.directory / "x.png").read_bytes().startswith(b"\x89PNG")
    tried = ["--dry-run", "--format", "csv"]
    done = under(loader, WITHOUT_CAPABILITIES, *options, *tried, SAMPLE)
    rows = b"2019-12-29,11,0\n2019-12-30,31,0\n2019-12-31,22,0\n"
    assert done == (0, b"date,active_user_count,added\n" + rows, "")
    what = "can't be written; make it writable, or choose another"
    done = under(loader, WITHOUT_CAPABILITIES, *options, SAMPLE)
    assert done == (1, b"", f"Error: {loader.db}: {what}\n")
    assert [loader.db.read_bytes(), *closed.iterdir()] == [before, loader.db]


@pytest.mark.parametrize(
    ("mode", "beside", "reason"),
    [
        (
            "DELETE",
            "-journal",
            "attempt to write a readonly database; make the file and its "
            "directory writable, or choose another --db",
        ),
        (
            "WAL",
            "-wal",
            "unable to open database file; make the file and its directory readable and writable",
        ),
    ],
)
def test_a_database_with_a_journal_that_can_only_be_read(
    loader: Loader, closed: Path, mode: str, beside: str, reason: str
) -> None:
    """What a killed load has left is not counted, what it has committed is not passed over, and
    nothing is called corrupt."""
    loader.load(SAMPLE)
    with closing(sqlite3.connect(loader.db, isolation_level=None)) as db:
        db.execute(f"PRAGMA journal_mode = {mode}")
        db.execute("PRAGMA cache_size = 1")
        db.execute("BEGIN")
        for number in range(3000):
            db.execute("INSERT INTO active_user VALUES ('2019-12-30', ?)", (f"user {number}",))
        for path in (loader.db, Path(f"{loader.db}{beside}")):
            shutil.copy(path, closed)
            (closed / path.name).chmod(0o444)
    closed.chmod(0o555)
    loader.db = closed / loader.db.name
    done = under(loader, WITHOUT_CAPABILITIES, "--db", loader.db, "--dry-run", SAMPLE)
    assert done == (1, b"", f"Error: {loader.db}: {reason}\n")


def test_a_database_in_utf_16(loader: Loader) -> None:
    """It sorts users in another order than Python does."""
    with closing(sqlite3.connect(loader.db)) as db:
        db.execute("PRAGMA encoding = 'UTF-16'")
        db.executescript((ROOT / "schema.sql").read_text())
    users = [*(f"a{number}" for number in range(50)), *(f"{chr(256 + n)}z" for n in range(300))]
    data = lines(*map(event, users))
    for added in (350, 0, 0):
        report = loader.load("-", input=data)["dates"]
        expected = {"date": "2019-12-30", "active_user_count": 350, "added": added, "removed": 0}
        assert report == [expected]


# -- Standard streams that are closed, or full


def test_a_signal_while_nobody_reads_the_messages(loader: Loader) -> None:
    """As of a logger that hangs, or a terminal that was stopped by Ctrl-S."""
    bad = loader.file(b"bad\n" * 20, "bad")
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    os.write(writer, b"x" * 4090)
    with start(loader, "--max-bad-records", 20, bad, "-", stderr=writer) as process:
        time.sleep(1)  # until it has a message for which there is no room
        process.terminate()
        status = wait_for(process.poll, 20)
        process.kill()
    assert status == 143
    os.close(writer)
    with open(reader, "rb") as said:
        assert said.read() == b"x" * 4090
    assert not loader.db.exists()


REPORT_LOST = (
    "Error: the events are loaded, but the report could not be written: "
    "No space left on device; free some disk space and load again\n"
)
STREAMS = ["<&-", ">&-", "2>&-", "<&- >&-", "<&- 2>&-", ">&- 2>&-", "<&- >&- 2>&-"]
FULL = [">/dev/full", "2>/dev/full", ">/dev/full 2>/dev/full", ">/dev/full 2>&-", ">&- 2>/dev/full"]


def in_a_shell(loader: Loader, redirections: str, *args: object) -> tuple[int, str, str]:
    command = ["sh", "-c", f'exec "$@" {redirections}', "sh", *loader.command(*args)]
    done = subprocess.run(command, cwd=loader.directory, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("streams", STREAMS + FULL)
def test_streams_that_are_closed_or_full(loader: Loader, streams: str) -> None:
    """The load is the same, nothing else gets their descriptors, and what can be said is said."""
    report = "date,active_user_count,added\n2019-12-30,2,2\n"
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
        "bad:1: is not a JSON object, {...}: one event per line is expected\n"
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
        what = "Error: -:1: Bad file descriptor; give it something to read, or name files\n"
        assert in_a_shell(loader, streams, "-") == (1, "", what if has_error else "")
    assert loader.content() == content


def test_a_reader_that_had_enough(loader: Loader) -> None:
    done = subprocess.run(
        ["bash", "-c", 'set -o pipefail; "$@" | true', "bash", *loader.command(SAMPLE)],
        cwd=loader.directory,
        capture_output=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert sum(loader.table().values()) == 64


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
    """As the development mode of Python would say."""
    loader.load(SAMPLE)
    named = {"LARGE": large, "BAD": loader.file(b"bad\n", "bad")}
    args = [named.get(str(arg), arg) for arg in args]
    usual = loader.run("-q", *args)
    command = [sys.executable, "-X", "dev", "-W", "error", *loader.command("-q", *args)[1:]]
    done = subprocess.run(command, cwd=loader.directory, capture_output=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (
        usual.returncode,
        usual.stdout,
        usual.stderr,
    )


# -- Rows that were changed by hand


CHANGES = [
    (
        "UPDATE load_log SET valuable_events = 'x_event'",
        "load_log has a rule that can't be read (JSON is malformed: invalid character (byte 0)); "
        "correct the row",
        [[SAMPLE], ["--dry-run", SAMPLE], ["--plot", "x.png"]],
    ),
    (
        "UPDATE load_log SET valuable_events = '{}'",
        "load_log has a rule that can't be read (Expected `array`, got `object`); correct the row",
        [[SAMPLE], ["--dry-run", SAMPLE], ["--plot", "x.png"]],
    ),
    (
        "UPDATE load_log SET event_names = '[1]'",
        "load_log has a rule that can't be read (Expected `str`, got `int` - at `$[0]`); "
        "correct the row",
        [[SAMPLE], ["--dry-run", SAMPLE], ["--plot", "x.png"]],
    ),
    (
        "UPDATE load_log SET timezone = '/etc/passwd'",
        "load_log has a rule that can't be read ('/etc/passwd' is not an IANA time zone; "
        "names are like US/Central, Europe/Berlin, UTC); correct the row",
        [[SAMPLE], ["--dry-run", SAMPLE], ["--plot", "x.png"]],
    ),
    (
        "UPDATE load_log SET min_engagement_msec = 'many'",
        "load_log has a rule that can't be read (invalid literal for int() with base 10: 'many'); "
        "correct the row",
        [[SAMPLE], ["--dry-run", SAMPLE], ["--plot", "x.png"]],
    ),
    (
        "INSERT INTO active_user_table VALUES ('2020-02-30', 1)",
        "active_user_table has a row that is not a date and a count: '2020-02-30', 1; "
        "correct or delete it",
        [["--plot", "x.png"]],
    ),
    (
        "UPDATE active_user_table SET active_user_count = '12 000' WHERE date = '2019-12-30'",
        "active_user_table has a row that is not a date and a count: '2019-12-30', '12 000'; "
        "correct or delete it",
        [[SAMPLE], ["--dry-run", SAMPLE], ["--plot", "x.png"]],
    ),
]


@pytest.mark.parametrize(("change", "what", "runs"), CHANGES, ids=[c[0] for c in CHANGES])
def test_rows_that_were_changed_by_hand(
    loader: Loader, change: str, what: str, runs: list[list[object]]
) -> None:
    loader.load(SAMPLE)
    with closing(sqlite3.connect(loader.db)) as db:
        db.execute(change)
        db.commit()
    for args in runs:
        assert loader.refuse(*args) == f"Error: active_user_table.db: {what}\n"


def test_standard_input_that_does_not_block(loader: Loader) -> None:
    """As some who start others leave it: it is waited for."""
    read_end, write_end = os.pipe()
    os.set_blocking(read_end, False)
    with open(read_end) as stdin, start(loader, "-q", "-", stdin=stdin) as process:
        with open(write_end, "wb") as file:
            for user in "ab":
                time.sleep(0.2)
                file.write(lines(event(user)))
                file.flush()
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (0, b"", b"")
    assert loader.table() == {"2019-12-30": 2}


# -- Crashes


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_at_any_moment(loader: Loader, large: Path, workers: int) -> None:
    """The database is whole, in the old state or the new one, and the next load completes it."""
    loader.load(SAMPLE)
    states = [loader.table()]
    args = ["--workers", workers, "--max-bad-records", 99, "--quiet", large]
    shutil.copy(loader.db, loader.directory / "old.db")
    started = time.monotonic()
    loader.run(*args)
    seconds = time.monotonic() - started
    states.append(loader.table())
    assert states[0] != states[1]

    chance = random.Random(workers)
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    for _ in range(KILLS * 2 // 3):
        shutil.copy(loader.directory / "old.db", loader.db)
        with start(loader, *args, **silent) as process:
            # most of them near the end, where the database is written
            time.sleep(seconds * (1.1 - chance.random() ** 2))
            process.kill()
        assert loader.query("PRAGMA integrity_check") == [("ok",)]
        state = loader.table()
        assert state in states
        counted = "SELECT date, count(*) FROM active_user GROUP BY date"
        assert state == dict(loader.query(counted))
        assert len(loader.query("SELECT * FROM load_log")) == 1 + states.index(state)
    loader.run(*args)
    assert loader.table() == states[1]


# -- Crowds and locks


def test_a_crowd_loads_into_one_new_database(loader: Loader) -> None:
    """Sixteen loads of overlapping files at once: each succeeds, and together they are exact."""
    names = [loader.file(b"".join(ROWS[at : at + 300]), f"{at}.jsons") for at in range(0, 800, 50)]
    crowd = [start(loader, "--format", "json", name) for name in names]
    reports = []
    for process in crowd:
        out, err = process.communicate(timeout=120)
        assert (process.returncode, err) == (0, b"")
        reports.append(json.loads(out))
    users = plain.read(b"".join(ROWS[:1050]))[0]
    assert loader.table() == {date: len(users[date]) for date in sorted(users)}
    added = sum(date["added"] for report in reports for date in report["dates"])
    assert added == sum(map(len, users.values()))
    assert len(loader.query("SELECT * FROM load_log")) == 16


@pytest.fixture
def locked(loader: Loader) -> Iterator[Loader]:
    loader.load(SAMPLE)
    with closing(sqlite3.connect(loader.db)) as db:
        db.execute("BEGIN IMMEDIATE")
        yield loader


def impatient(loader: Loader) -> Loader:
    """The program, waiting for a tenth of a second where it waits for 60."""
    other = copied(loader, schema=True)
    path = loader.directory / "program" / SCRIPT.name
    text = path.read_text()
    assert text.count("LOCK_SECONDS = 60.0") == 1
    path.write_text(text.replace("LOCK_SECONDS = 60.0", "LOCK_SECONDS = 0.1"))
    return other


def test_a_lock_held_for_too_long_is_a_clear_error(locked: Loader) -> None:
    done = impatient(locked).run(SAMPLE)
    assert (done.returncode, done.stdout, done.stderr.decode()) == (
        1,
        b"",
        "Error: active_user_table.db: database is locked; another program keeps it locked; "
        "try again when that is done\n",
    )


def waits(loader: Loader, process: Process) -> bool:
    """Whether a load has come to the database and waits for it."""
    fds = Path(f"/proc/{process.pid}/fd")
    return bool(wait_for(partial(reads, fds, loader.db)))


def test_a_load_waits_its_turn_and_can_be_stopped_meanwhile(locked: Loader) -> None:
    with start(locked, "-") as process:
        assert process.stdin
        process.stdin.close()
        process.stdin = None
        assert waits(locked, process)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (130, b"", INTERRUPTED)


def test_a_reader_is_not_in_the_way_for_long(loader: Loader) -> None:
    loader.load("-", input=lines(event("a")))
    with closing(sqlite3.connect(loader.db, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM active_user_table").fetchall()
        with start(loader, "-q", SAMPLE) as process:
            time.sleep(0.7)
            assert process.poll() is None
            reader.execute("COMMIT")
            out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (0, b"", b"")


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
@pytest.mark.parametrize(
    ("change", "what"),
    [
        (
            "CREATE TABLE notes (text)",
            "it has no column active_user_table.date of type DATE: "
            "it is not one of load_active_users.py; choose another --db",
        ),
        (
            (ROOT / "schema.sql").read_text()
            + "INSERT INTO load_log SELECT 'x', '', 0, '[]', 0, 'UTC', '[\"*\"]', 1, '[\"*\"]',"
            " '', 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0",
            "was filled under the rule --timezone UTC --event-name '*' --min-engagement-msec 1 "
            "--valuable-event '*'; the rule of this load is --timezone US/Central "
            "--event-name user_engagement --min-engagement-msec 3000 --valuable-event '*_event'; "
            "use that rule or another --db",
        ),
    ],
    ids=["other tables", "another rule"],
)
def test_a_database_that_becomes_another_meanwhile(
    loader: Loader, options: list[str], change: str, what: str
) -> None:
    """Before the load has its turn: what was checked before the scan is checked again."""
    with start(loader, *options, "-") as process:
        when_it_reads(process)
        with closing(sqlite3.connect(loader.db, isolation_level=None)) as db:
            db.executescript(f"BEGIN EXCLUSIVE;{change};COMMIT")
        before = loader.content()
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (1, b"")
    assert err.decode() == f"Error: active_user_table.db: {what}\n"
    assert loader.content() == before


# -- Full and failing storage


FULL_DISK = "database or disk is full; free some disk space and load again"


@pytest.mark.parametrize("size", [0, 1000, 5000, 20_000, 60_000])
@pytest.mark.parametrize("existing", [True, False])
def test_a_database_that_cannot_grow(loader: Loader, size: int, existing: bool) -> None:
    """The old one stays as it is; a new one is empty, since another load may have opened it."""
    users = lines(*(event(f"user {number}") for number in range(4000)))
    if existing:
        loader.load(SAMPLE)
    before = loader.content()
    name = loader.file(users)
    files = sorted(loader.directory.iterdir())
    status, out, err = under(loader, f"prlimit --fsize={size}", name)
    assert (status, out) == (1, b"")
    assert err in {
        f"Error: active_user_table.db: {FULL_DISK}\n",
        "Error: active_user_table.db: disk I/O error; check the disk and load again\n",
    }
    assert set(loader.directory.iterdir()) - {loader.db} == set(files) - {loader.db}
    assert loader.content() == before
    loader.load(name)
    assert loader.query("SELECT count(*) FROM active_user") == [(4064 if existing else 4000,)]


@pytest.mark.parametrize(
    ("args", "input"),
    [
        (["-"], b"bad\n"),
        (["nothing"], b""),
        (["--timezone", "Nowhere", "-"], b""),
        (["-"], b"[1]"),
        (["-"], lines(event("a", time=0))),
    ],
    ids=["a bad record", "no file", "no zone", "another format", "the wrong unit"],
)
def test_a_first_load_that_fails_leaves_no_file(
    loader: Loader, args: list[str], input: bytes
) -> None:
    done = loader.run(*args, input=input)
    assert done.returncode in (1, 2)
    assert list(loader.directory.iterdir()) == []


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)], check=True)
    yield path
    subprocess.run(["umount", str(path)], check=True)


def test_what_a_machine_without_more_threads_says() -> None:
    said = load_active_users.reason(RuntimeError("can't start new thread"))
    what = "can't start a thread; allow more processes (ulimit -u), or try fewer --workers"
    assert said == what


def test_what_a_rule_remembers_is_bounded() -> None:
    rule = rule_of("US/Central", ("user_engagement",), 3000, ("*_event",))
    assert [rule.role_of(f"{number}_event") for number in range(70_000)] == [1] * 70_000
    assert rule.role_of.cache_info().currsize == 65_536


def test_a_bar_that_cannot_be_drawn(tmp_path: Path) -> None:
    rule = rule_of("US/Central", ("user_engagement",), 3000, ("*_event",))
    with suppress(OSError), open("/dev/full", "w") as full:  # which can't be closed either
        bar = tqdm(total=len(SAMPLE.read_bytes()), file=full, mininterval=0, delay=1e-9)
        with pytest.raises(OSError, match="No space left"):
            bar.refresh()
        loader = load_active_users.Loader((), str(tmp_path / "a.db"), rule, None, bar=bar)
        loader.load_once(scan_in_turn([Range(str(SAMPLE))], loader.scanner()))
        bar.disable = True  # it is not to try once more when it goes
    assert loader.report.tally.lines == 1000


@AS_ROOT
@pytest.mark.skipif(
    not Path("/usr/share/zoneinfo/tzdata.zi").exists(), reason="needs apt-get install tzdata"
)
def test_files_of_time_zones_in_the_slim_format(loader: Loader) -> None:
    """As zic writes them if a system does not ask for others."""
    zones = Path("/usr/share/zoneinfo")
    slim = loader.directory / "slim"
    subprocess.run(["zic", "-b", "slim", "-d", slim, zones / "tzdata.zi"], check=True)
    script = f'mount --bind {slim} {zones} && exec "$@"'
    before = ["unshare", "--mount", "sh", "-c", script, "sh"]
    command = [*before, *loader.command("-q", "-")]
    subprocess.run(command, cwd=loader.directory, input=lines(event(time=DAY_END)), check=True)
    assert loader.table() == {"2019-12-31": 1}
    other = subprocess.run(
        [*before, *loader.command("--timezone", "Asia/Kathmandu", "-q", "-")],
        cwd=loader.directory,
        capture_output=True,
    )
    assert other.returncode == 1
    assert b"--timezone Asia/Kathmandu" in other.stderr


@AS_ROOT
def test_a_full_disk(loader: Loader, disk: Path) -> None:
    loader.db = disk / "x.db"
    loader.load("--db", loader.db, SAMPLE)
    before = loader.content()
    users = loader.file(lines(*(event(f"user {number}") for number in range(40_000))))
    assert loader.refuse("--db", loader.db, users) == f"Error: {loader.db}: {FULL_DISK}\n"
    assert loader.content() == before
    new = disk / "new.db"
    assert loader.refuse("--db", new, users) == f"Error: {new}: {FULL_DISK}\n"
    assert {path: path.stat().st_size > 0 for path in disk.iterdir()} == {
        loader.db: True,
        new: False,  # it stays, since another load may have opened it
    }
    loader.load("--db", loader.db, SAMPLE)


@AS_ROOT
def test_a_full_disk_for_the_rejects(loader: Loader, disk: Path) -> None:
    bad = loader.file(b"x" * 2_000_000, "bad")
    options = ["--rejects", disk / "rejects", "--max-bad-records", 9]
    assert loader.refuse(*options, bad) == (
        "bad:1: is not a JSON object, {...}: one event per line is expected\n"
        f"Error: {disk}/rejects: No space left on device; free some disk space and load again\n"
    )
    assert not loader.db.exists()
    assert loader.refuse("--rejects", "/dev/full", "--max-bad-records", 9, loader.file(b"bad")) == (
        "events.jsons:1: is not a JSON object, {...}: one event per line is expected\n"
        "Error: /dev/full: No space left on device; free some disk space and load again\n"
    )


@AS_ROOT
@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_a_full_disk_for_the_picture(loader: Loader, disk: Path, suffix: str) -> None:
    loader.load(SAMPLE)
    (disk / "other").write_bytes(bytes((1 << 20) - 4096))
    path = f"{disk}/x.{suffix}"
    what = "No space left on device; free some disk space and load again"
    said = f"Error: {path}: what was loaded is loaded, but not drawn: {what}\n"
    assert loader.drawing().refuse("--plot", path) == said
    assert [file.name for file in disk.iterdir()] == ["other"]


@AS_ROOT
def test_a_temporary_directory_that_is_full(loader: Loader, disk: Path) -> None:
    """Named by TMPDIR, as every program knows it."""
    row = lines(event("USER"))
    users = (b"%0128x" % number for number in range(160_000))
    name = loader.file(b"".join(row.replace(b"USER", user) for user in users))
    for variable in ("SQLITE_TMPDIR", "TMPDIR"):
        done = loader.run("--dry-run", name, env={variable: str(disk)})
        assert (done.returncode, done.stdout, done.stderr.decode()) == (
            1,
            b"",
            f"Error: temporary files (TMPDIR): {FULL_DISK}\n",
        )
    assert not loader.db.exists()
    # A live load commits users before they are so many.
    done = loader.run("--commit-every", 999, "-q", name, env={"TMPDIR": str(disk)})
    assert (done.returncode, done.stdout, done.stderr.decode()) == (0, b"", "")
    assert loader.table() == {"2019-12-30": 160_000}


@AS_ROOT
def test_a_read_only_disk(loader: Loader, disk: Path) -> None:
    loader.db = disk / "x.db"
    loader.load("--db", loader.db, SAMPLE)
    before = loader.db.read_bytes()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for path, what in ((loader.db, ""), (disk / "new.db", f"{disk} ")):
        remedy = f"{what}can't be written; make it writable, or choose another"
        assert loader.refuse("--db", path, SAMPLE) == f"Error: {path}: {remedy}\n"
    tried = loader.load("--dry-run", "--db", loader.db, SAMPLE)
    assert tried["dates"][0]["active_user_count"] == 11
    assert loader.db.read_bytes() == before


def test_files_are_as_readable_as_the_umask_says(loader: Loader) -> None:
    with start(loader, "--rejects", "rejects", SAMPLE, umask=0o077) as process:
        process.communicate()
    paths = [loader.db, loader.directory / "rejects"]
    assert [stat.S_IMODE(path.stat().st_mode) for path in paths] == [0o600] * 2


# -- Files that change while they are read


def change_meanwhile(loader: Loader, change: Callable[[], object]) -> tuple[int, bytes, str]:
    """Load standard input and then a file, which is changed after the loader has looked at it."""
    with start(loader, "--format", "json", "-", "events.jsons") as process:
        when_it_reads(process)  # it has looked at all files before
        change()
        out, err = process.communicate(timeout=30)
    return process.returncode, out, err.decode()


def test_a_file_that_shrinks(loader: Loader) -> None:
    path = loader.directory / loader.file(lines(event("a"), event("b")))
    what = "the file was cut short while it was read; load it again when it is whole"
    done = change_meanwhile(loader, lambda: os.truncate(path, 300))
    assert done == (1, b"", f"Error: events.jsons:1: {what}\n")
    assert not loader.db.exists()


def test_a_file_that_is_replaced(loader: Loader) -> None:
    data = lines(event("a")) * 2
    path, other = (loader.directory / loader.file(data, n) for n in ("events.jsons", "other"))
    what = "the file was replaced while it was read; load it again"
    done = change_meanwhile(loader, lambda: other.rename(path))
    assert done == (1, b"", f"Error: events.jsons:1: {what}\n")
    assert not loader.db.exists()


def test_a_file_that_grows(loader: Loader) -> None:
    """What was there at the start is loaded, with the rest of its last line."""
    more = lines(event("b"), event("c"))
    path = loader.directory / loader.file(lines(event("a")) + more[:100])
    status, out, err = change_meanwhile(loader, lambda: path.write_bytes(lines(event("a")) + more))
    assert (status, json.loads(out)["lines"], err) == (0, 3, "")
    assert loader.query("SELECT user_pseudo_id FROM active_user") == [("a",), ("b",), ("first",)]


# -- Hostile sizes


# A process never shows less peak memory than its parent had: this one is small.
MEASURE = """
import os, sys
_, status, usage = os.wait4(os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ), 0)
print(usage.ru_maxrss // 1024, os.waitstatus_to_exitcode(status))
"""


def peak_memory(loader: Loader, *args: object) -> tuple[int, bytes, int]:
    """The exit status, the output and the peak memory in MB of a load."""
    command = [sys.executable, "-ISc", MEASURE, *loader.command(*args)]
    done = subprocess.run(
        command,
        cwd=loader.directory,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=True,
        timeout=300,
    )
    output, measured = done.stdout.rstrip().rpartition(b"\n")[::2]
    megabytes, status = map(int, measured.split())
    return status, output, megabytes


def test_a_line_of_100_mb(loader: Loader) -> None:
    path = loader.directory / loader.file(lines(event("a")))
    with path.open("ab") as file:
        file.write(lines(event("b", pad="PAD")).replace(b"PAD", b"x" * 100_000_000))
        file.write(b'{"' + b"y" * 100_000_000 + b"\n" + lines(event("c")))
    done = loader.run("-q", "--max-bad-records", 1, path)
    why = "is not a JSON object, {...}: one event per line is expected"
    assert (done.returncode, done.stderr.decode()) == (0, f"{path}:3: {why}\n")
    assert loader.table() == {"2019-12-30": 3}


def test_a_line_without_end(loader: Loader) -> None:
    """A gzip bomb of one line is refused before it fills the memory."""
    bomb = gzip.compress(b"x" * 10_000_000, 9) * 60
    names = [loader.file(lines(event()), "a"), loader.file(bomb, "bomb.gz")]
    status, output, megabytes = peak_memory(loader, *names)
    what = b"a line of more than 128 MiB; one event per line is expected"
    assert (status, output) == (1, b"Error: bomb.gz:1: " + what)
    assert megabytes < 500


BOMB = b'{"event_name":"user_engagement","event_timestamp":0}\n'


@pytest.mark.parametrize("line", [b"\n", b"x\n", BOMB])
def test_a_bomb_of_many_lines(loader: Loader, line: bytes) -> None:
    count = 1_000_000 // len(line) // 20 * 20
    bomb = loader.file(gzip.compress(line * (count // 20), 9) * 20, "bomb.gz")
    options = ["--max-bad-records", 10**9, "--format", "json"]
    status, output, megabytes = peak_memory(loader, *options, bomb)
    assert (status, json.loads(output.splitlines()[-1])["lines"]) == (0, count)
    assert megabytes < 150


def test_long_keys_are_not_remembered(loader: Loader) -> None:
    rows = (lines(event(key=f"{number:040000}")) for number in range(3000))
    name = loader.file(b"".join(map(gzip.compress, rows)))
    status, output, megabytes = peak_memory(loader, "--format", "json", name)
    assert (status, json.loads(output)["engagement_events"]) == (0, 3000)
    assert megabytes < 100


def test_many_users_are_staged_in_bounded_memory(loader: Loader) -> None:
    row = lines(event("USER", "TIME"))
    with (loader.directory / loader.file(b"")).open("wb") as file:
        for number in range(250_000):
            time_utc = b"%d" % (NOON + number % 40 * 86_400 * 10**6)
            file.write(row.replace(b"USER", b"%064x" % number).replace(b"TIME", time_utc))
    status, output, megabytes = peak_memory(loader, "--format", "json", "events.jsons")
    report = json.loads(output)
    added = sum(date["added"] for date in report["dates"])
    assert (status, len(report["dates"]), added) == (0, 40, 250_000)
    counted = "SELECT sum(active_user_count) FROM active_user_table"
    assert loader.query(counted) == [(250_000,)]
    assert megabytes < 200


def test_very_many_dates(loader: Loader) -> None:
    """As from clocks gone wild: no step may take longer a date the more dates there are."""
    row = lines(event("u", "TIME"))
    with (loader.directory / loader.file(b"")).open("wb") as file:
        for day in range(30_000):
            file.write(row.replace(b"TIME", b"%d" % (day * 86_400 * 10**6)))
    options = ["--dates", "1900-01-01..2999-12-31", "--format", "json"]
    status, output, megabytes = peak_memory(loader, *options, "events.jsons")
    assert (status, len(json.loads(output)["dates"])) == (0, 30_000)
    assert megabytes < 200


def test_every_line_is_good_or_bad_or_blank(loader: Loader) -> None:
    good, timeless = (lines(event("a", time)).strip() for time in (NOON, None))
    rows = [b"", b" ", b"x", b'{"a":}', b'{"a":1}', b"{", good, timeless]
    chosen = random.Random(5).choices(rows, k=5000)
    name = loader.file(b"\n".join(chosen))
    options = ["--validate", "--max-bad-records", 5000, "--rejects", "rejects"]
    done = loader.run(*options, "--format", "json", name)
    report = json.loads(done.stdout)
    rejects = (loader.directory / "rejects").read_bytes().splitlines()
    ((blank, logged),) = loader.query("SELECT blank_lines, bad_records FROM load_log")
    assert rejects == [row for row in chosen if row in (b"x", b'{"a":}', b"{", timeless)]
    assert report["bad_records"] == logged == len(rejects)
    decoded = chosen.count(good) + chosen.count(b'{"a":1}')
    assert decoded + logged + blank == report["lines"] == 5000


HEAVY = {
    *("multiprocessing", "isal", "backports.zstd", "json", "matplotlib", "distributed", "psycopg"),
    *("fsspec", "numpy", "concurrent.futures"),
}


def test_the_sample_needs_no_heavy_import(loader: Loader) -> None:
    command = [sys.executable, "-X", "importtime", *loader.command(SAMPLE)[1:]]
    done = subprocess.run(command, cwd=loader.directory, capture_output=True, text=True)
    imported = {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if "|" in line}
    assert {"click", "msgspec", "stringzilla"} <= imported
    assert not imported & HEAVY


def test_a_line_without_end_before_a_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_active_users, "MAX_LINE", 1 << 20)
    with pytest.raises(load_active_users.Refused, match="a line of more than"):
        line_start(io.BytesIO(b"{" + b"x" * (4 << 20)), 1000)


def test_a_load_holds_some_users_and_stages_the_rest() -> None:
    """And gives them back in order, each once."""
    load, most = Load(), 0
    rule = rule_of("UTC", ("user_engagement",), 1, ("*",))
    scan = load_active_users.Scanner(rule, ("2019-01-01", "2020-12-31"))
    row = lines(event("USER", str(NOON)))
    for number in range(8):
        users = (b"%d-%0120d" % (number % 4, user) for user in range(18_000))
        data = b"".join(row.replace(b"USER", user) for user in users)
        for batch in scan(Range("x", data=data)):
            load.add(batch)
            most = max(most, load.size)
    assert load_active_users.SPILL_BYTES // 2 < most < 2 * load_active_users.SPILL_BYTES
    found = [user for some in load.users("2019-12-30") for user in some]
    load.close()
    assert found == sorted({f"{n}-{user:0120}" for n in range(4) for user in range(18_000)})
