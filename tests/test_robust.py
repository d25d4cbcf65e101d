"""Many processes, crashes, crowds, full disks and hostile input: the loader ends in the old state or the new one."""

import fcntl
import gzip
import json
import os
import random
import resource
import shutil
import signal
import sqlite3
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
from conftest import ROOT, SAMPLE, Loader, event, lines

import load_active_users
from load_active_users import (
    SMALL,
    Batch,
    LoadError,
    Memo,
    Merger,
    Range,
    Rule,
    batches,
    check,
    connect,
    line_start,
    scan_in_processes,
)

KILLS = int(os.environ.get("KILLS", "30"))
ROWS = SAMPLE.read_bytes().splitlines(keepends=True)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that is large enough for several processes, with many users and a bad record here and there."""
    path = tmp_path_factory.mktemp("large") / "large.jsons"
    with path.open("wb") as file:
        for number in range(40):
            for row in ROWS:
                file.write(row.replace(b'"user_pseudo_id":"', b'"user_pseudo_id":"%d-' % (number % 7), 1))
            file.write(b"\n" if number % 3 else b'{"event_name":"user_engagement"}\n{cut off\n')
    assert path.stat().st_size > SMALL
    return path


def start(loader: Loader, *args: object, **more: Any) -> subprocess.Popen[bytes]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more}
    return subprocess.Popen(loader.command(*args), cwd=loader.directory, **pipes)


def children(process: subprocess.Popen[bytes]) -> list[int]:
    with suppress(OSError):
        return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
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
    pids = wait_for(lambda: len(children(process)) == number and children(process))
    assert pids, "the workers have not started"
    return pids


# -- Many processes


def test_the_number_of_workers_changes_nothing(loader: Loader, large: Path) -> None:
    results = []
    for workers in (1, 2, 3, 5):
        loader.db = loader.directory / f"{workers}.db"
        options = ["--workers", workers, "--db", loader.db, "--max-bad-records", 99, "--rejects", "rejects"]
        done = loader.run(*options, "--format", "json", large, SAMPLE, large)
        assert done.returncode == 0
        content = [row for row in loader.content() if "load_log" not in row]
        results.append((done.stdout, done.stderr, (loader.directory / "rejects").read_bytes(), content))
    assert results[1:] == results[:1] * 3

    users, tally, bad = plain.read(large.read_bytes())
    report, messages = json.loads(results[0][0]), results[0][1].decode().splitlines()
    assert {date["date"]: date["active_user_count"] for date in report["dates"]} == {
        date: len(users[date] | plain.read(SAMPLE.read_bytes())[0][date]) for date in sorted(users)
    }
    assert report["lines"] == 2 * tally["lines"] + 1000
    assert [line.split(": ")[0] for line in messages[:20]] == [f"{large}:{line}" for line in bad][:20]
    assert messages[20:] == [f"and {2 * len(bad) - 20} more bad records"]


def test_compressed_files_are_scanned_by_several_workers(loader: Loader) -> None:
    """Also when one is damaged, the same one is named, whoever comes across it first."""
    names = []
    for number in range(8):
        data = b"".join(row.replace(b'"user_pseudo_id":"', b'"user_pseudo_id":"%d-' % number, 1) for row in ROWS) * 4
        names.append(loader.file(gzip.compress(data + b"bad\n", 1), f"{number}.gz"))
    assert sum((loader.directory / name).stat().st_size for name in names) * 10 > SMALL
    results = []
    for workers in (1, 2, 4):
        done = loader.run("--workers", workers, "--dry-run", "--max-bad-records", 8, "--format", "json", *names)
        results.append((done.returncode, done.stdout, done.stderr))
    assert results[1:] == results[:1] * 2
    assert [date["active_user_count"] for date in json.loads(results[0][1])["dates"]] == [8 * 11, 8 * 31, 8 * 22]
    assert (
        results[0][2].decode().split()
        == " ".join(
            f"{name}:4001: not one JSON object, {{...}}: one event a line is expected" for name in names
        ).split()
    )

    for number in (2, 3):
        path = loader.directory / names[number]
        path.write_bytes(path.read_bytes()[: -1000 * number])
    messages = {loader.refuse("--workers", workers, *names) for workers in (1, 2, 4)}
    assert len(messages) == 1
    assert messages.pop().startswith("Error: 2.gz:")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_worker_is_a_clear_error(loader: Loader, large: Path, number: int) -> None:
    loader.load(SAMPLE)
    before = loader.content()
    with start(loader, "--workers", 2, *[large] * 40) as process:
        pids = workers_of(process)
        os.kill(pids[0], number)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, b"")
    assert err == b"Error: a scanning process was killed (out of memory?); try fewer --workers\n"
    assert not any(map(alive, pids))
    assert loader.content() == before


@pytest.mark.parametrize("whole_group", [True, False])
def test_ctrl_c_ends_all_of_it_at_once(loader: Loader, large: Path, whole_group: bool) -> None:
    with start(loader, "--workers", 2, *[large] * 40, start_new_session=True) as process:
        pids = workers_of(process)
        (os.killpg if whole_group else os.kill)(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=5)
    assert (process.returncode, out) == (130, b"")
    assert err == b"SIGINT: a load that is not committed leaves nothing behind\n"
    assert not any(map(alive, pids))
    assert not loader.db.exists()


def test_ctrl_c_is_not_for_the_workers(loader: Loader, large: Path) -> None:
    with start(loader, "--workers", 2, "--max-bad-records", 10**6, "--format", "json", *[large] * 40) as process:
        for pid in workers_of(process) * 3:
            time.sleep(0.01)
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    assert (process.returncode, len(json.loads(out)["dates"])) == (0, 3)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_during_the_imports(loader: Loader, number: int, status: int) -> None:
    stub = loader.directory / "stub"
    stub.mkdir()
    (stub / "click.py").write_text("import time\nopen('importing', 'w').close()\ntime.sleep(60)\n")
    with start(loader, SAMPLE, env={**os.environ, "PYTHONPATH": str(stub)}) as process:
        assert wait_for((loader.directory / "importing").exists)
        process.send_signal(number)
        out, err = process.communicate(timeout=10)
    assert (process.returncode, out, err) == (status, b"", b"")


def in_a_process(loader: Loader, code: str, *args: object) -> subprocess.Popen[bytes]:
    """The command, after some code that sees it as `loader`."""
    code = f"import os, signal\nimport load_active_users as loader\n{code}\nloader.main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        cwd=loader.directory,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=-1,
        stdout=-1,
        stderr=-1,
    )


def test_a_signal_at_the_very_end_changes_nothing(loader: Loader) -> None:
    code = "import atexit\natexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))"
    with in_a_process(loader, code, "-q", SAMPLE) as process:
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (0, b"", b"")


def test_a_second_signal_does_not_disturb_the_first(loader: Loader) -> None:
    code = "echo = loader.click.echo\n"
    code += "loader.click.echo = lambda *a, **k: (os.kill(os.getpid(), signal.SIGTERM), echo(*a, **k))"
    with in_a_process(loader, code, "-") as process:
        when_it_reads(process)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, b"SIGINT: a load that is not committed leaves nothing behind\n")


def test_no_worker_outlives_its_parent(loader: Loader, large: Path) -> None:
    with start(loader, "--workers", 3, *[large] * 40, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        pids = workers_of(process, 3)
        process.kill()
    assert wait_for(lambda: not any(map(alive, pids)), 5)


def when_it_reads(process: subprocess.Popen[bytes]) -> None:
    """Wait until a load has read what it was sent."""
    process.stdin.write(lines(event("first")))
    process.stdin.flush()
    assert wait_for(lambda: fcntl.ioctl(process.stdin, termios.FIONREAD, b"1234") == bytes(4))


@pytest.mark.parametrize("slow", ["first", "second"])
def test_the_error_of_the_first_range_is_raised(slow: str) -> None:
    """Whichever is found first."""

    def scan(part: Range) -> Iterator[Batch]:
        if part.source == slow:
            time.sleep(0.5)
        raise LoadError(part.source)
        yield Batch()

    with pytest.raises(LoadError, match="first"):
        list(scan_in_processes([Range("first"), Range("second")], scan, 2))


@pytest.mark.parametrize(("count", "more", "pooled"), [(2, 0, False), (2, 1, True), (1, 1, False)])
def test_small_inputs_start_no_pool(count: int, more: int, pooled: bool) -> None:
    size = (SMALL + more * count) // count
    parts = [Range("x", 0, size, size)] * count
    names = {True: "scan_in_processes", False: "scan_in_turn"}
    assert batches(parts, None, 4).__name__ == names[pooled]
    assert batches(parts, None, 1).__name__ == "scan_in_turn"
    assert batches([*parts, Range("-")], None, 4).__name__ == "scan_in_turn"


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
    for _ in range(KILLS // 2):
        shutil.copy(loader.directory / "old.db", loader.db)
        with start(loader, *args, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            # most of them near the end, where the database is written
            time.sleep(seconds * (1.1 - chance.random() ** 2))
            process.kill()
        assert loader.query("PRAGMA integrity_check") == [("ok",)]
        state = loader.table()
        assert state in states
        assert state == dict(loader.query("SELECT date, count(*) FROM active_user GROUP BY date"))
        assert len(loader.query("SELECT * FROM load_log")) == 1 + states.index(state)
    loader.run(*args)
    assert loader.table() == states[1]


# -- Crowds


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
    assert sum(date["added"] for report in reports for date in report["dates"]) == sum(map(len, users.values()))
    assert len(loader.query("SELECT * FROM load_log")) == 16


@pytest.fixture
def locked(loader: Loader) -> Iterator[Loader]:
    loader.load(SAMPLE)
    with closing(sqlite3.connect(loader.db)) as db:
        db.execute("BEGIN IMMEDIATE")
        yield loader


def test_a_lock_held_for_too_long_is_a_clear_error(locked: Loader) -> None:
    patience = "import load_active_users as loader; loader.LOCK_SECONDS = 1.0; loader.main()"  # instead of 60
    command = [sys.executable, "-c", patience, str(SAMPLE)]
    done = subprocess.run(
        command, cwd=locked.directory, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (1, b"")
    message = "active_user_table.db: database is locked; another program keeps it locked; try again when that is done"
    assert done.stderr.decode() == f"Error: {message}\n"


def test_a_load_waits_its_turn_and_can_be_stopped_meanwhile(locked: Loader) -> None:
    with start(locked, SAMPLE) as process:
        time.sleep(1)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=5)
    assert process.returncode == 130


def test_a_reader_is_not_in_the_way_for_long(loader: Loader) -> None:
    loader.load("-", input=lines(event("a")))
    with closing(sqlite3.connect(loader.db, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM active_user_table").fetchall()
        with start(loader, SAMPLE) as process:
            time.sleep(1)
            assert process.poll() is None
            reader.execute("COMMIT")
            process.communicate(timeout=10)
    assert process.returncode == 0


def test_a_refusal_comes_before_the_events_are_read(loader: Loader) -> None:
    loader.load(SAMPLE)
    with start(loader, "--timezone", "UTC", "-") as process:  # whose standard input does not end
        assert wait_for(lambda: process.poll() is not None, 10)
        assert process.returncode == 1


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("CREATE TABLE notes (text)", b"choose another --db"),
        (
            (ROOT / "schema.sql").read_text()
            + "INSERT INTO load_log VALUES ('x', '', '[]', 'UTC', 1, '[\"*\"]', 0, 0, 0, 0, 0, 0, 0, 0);",
            b"was filled under the rule --timezone UTC",
        ),
    ],
)
def test_a_database_that_becomes_another_meanwhile(
    loader: Loader, options: list[str], change: str, message: bytes
) -> None:
    """Before the load has its turn, or while it waits for it."""
    for waits in (False, True):
        loader.db.unlink(missing_ok=True)
        with start(loader, *options, "-") as process, closing(sqlite3.connect(loader.db)) as db:
            when_it_reads(process)
            db.isolation_level = None
            db.execute("BEGIN EXCLUSIVE")
            if waits:
                process.stdin.close()
                process.stdin = None
                time.sleep(0.5)
            for statement in change.split(";\n"):
                db.execute(statement)
            db.execute("COMMIT")
            out, err = process.communicate(timeout=30)
        assert (process.returncode, out) == (1, b"")
        assert message in err
        assert (
            loader.query("SELECT count(*) FROM sqlite_master WHERE name = 'notes'")[0][0]
            + len(loader.query("SELECT * FROM sqlite_master WHERE name = 'load_log'"))
            == 1
        )


def test_each_look_at_the_database_waits_its_turn(loader: Loader) -> None:
    """Also when another program takes it in between, for longer than SQLite itself waits."""
    loader.load(SAMPLE)
    for word in ("sqlite_master", "load_log"):
        seen = []
        with closing(connect(str(loader.db))) as db, closing(sqlite3.connect(loader.db, isolation_level=None)) as other:

            def lock(sql: str, word: str = word, seen: list[str] = seen, other: sqlite3.Connection = other) -> None:
                if word in sql:
                    seen.append(sql)
                    if len(seen) == 1:
                        other.execute("BEGIN EXCLUSIVE")
                    elif len(seen) == 2:
                        other.execute("ROLLBACK")

            db.set_trace_callback(lock)
            check(db, Rule("US/Central", 3000, ["*_event"]))
        assert len(seen) >= 2


# -- Full and failing storage


def with_file_limit(size: int) -> Callable[[], None]:
    """What is to be done in a process so that its files can't grow past a size in bytes."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize("size", [0, 1000, 5000, 20_000, 60_000])
@pytest.mark.parametrize("existing", [True, False])
def test_a_database_that_cannot_grow(loader: Loader, size: int, existing: bool) -> None:
    users = lines(*(event(f"user {number}") for number in range(4000)))
    if existing:
        loader.load(SAMPLE)
    before = loader.content()
    with start(loader, loader.file(users), preexec_fn=with_file_limit(size)) as process:
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, b"")
    assert err.startswith(b"Error: active_user_table.db: ")
    assert (b"make room on its disk" in err) or (b"look after its disk" in err)
    assert loader.content() == before or (before is None and loader.content() == ["BEGIN TRANSACTION;", "COMMIT;"])
    loader.load("events.jsons")
    assert loader.query("SELECT count(*) FROM active_user") == [(4000 + (64 if existing else 0),)]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)]
    if os.geteuid() or shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a small file system to fill")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def test_a_full_disk(loader: Loader, disk: Path) -> None:
    loader.db = disk / "x.db"
    loader.load("--db", loader.db, SAMPLE)
    before = loader.content()
    users = loader.file(lines(*(event(f"user {number}") for number in range(40_000))))
    assert f"{loader.db}: database or disk is full; make room on its disk" in loader.refuse("--db", loader.db, users)
    assert loader.content() == before
    loader.load("--db", loader.db, SAMPLE)

    bad = loader.file(b"x" * 2_000_000, "bad")
    message = loader.refuse("--rejects", disk / "rejects", "--max-bad-records", 9, "--db", loader.db, bad)
    assert f"{disk}/rejects: No space left on device; nothing was loaded" in message

    users = loader.file(lines(*(event("x" * 1000 + f"{number}") for number in range(30_000))))
    done = loader.run("--dry-run", users, env={"SQLITE_TMPDIR": str(disk), "TMPDIR": str(disk)})
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"database or disk is full" in done.stderr
    assert b"TMPDIR" in done.stderr


def test_a_read_only_disk(loader: Loader, disk: Path) -> None:
    loader.db = disk / "x.db"
    loader.load("--db", loader.db, SAMPLE)
    before = loader.db.read_bytes()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    message = loader.refuse("--db", loader.db, SAMPLE)
    assert "attempt to write a readonly database; make the file and its directory writable" in message
    assert "unable to open database file; make the file" in loader.refuse("--db", disk / "new.db", SAMPLE)
    assert loader.load("--dry-run", "--db", loader.db, SAMPLE)["dates"][0]["active_user_count"] == 11
    assert loader.db.read_bytes() == before


def test_output_that_cannot_be_written(loader: Loader) -> None:
    assert "/dev/full: No space left on device" in loader.refuse("--rejects", "/dev/full", loader.file(b"bad"))
    with open("/dev/full", "wb") as full:
        done = subprocess.run(loader.command(SAMPLE), cwd=loader.directory, stdout=full, stderr=-1)
    assert done.returncode == 1
    assert (
        done.stderr == b"Error: the events are loaded, but the report could not be written: No space left on device\n"
    )
    assert loader.table()["2019-12-30"] == 31


def test_files_are_as_readable_as_the_umask_says(loader: Loader) -> None:
    with start(loader, "--rejects", "rejects", SAMPLE, preexec_fn=lambda: os.umask(0o077)) as process:
        process.communicate()
    assert [oct(path.stat().st_mode & 0o777) for path in (loader.db, loader.directory / "rejects")] == ["0o600"] * 2


# -- Files that change while they are read


def change_meanwhile(loader: Loader, change: Callable[[], None]) -> tuple[int, bytes]:
    """Load standard input and then a file, which is changed after the loader has looked at it."""
    with start(loader, "--format", "json", "-", "events.jsons") as process:
        process.stdin.write(lines(event("first")))
        process.stdin.flush()
        # It has looked at all files before it empties the pipe.
        assert wait_for(lambda: fcntl.ioctl(process.stdin, 0x541B, b"\0" * 4) == b"\0" * 4)  # FIONREAD
        change()
        out, err = process.communicate(timeout=30)
    return process.returncode, out + err


def test_a_file_that_shrinks(loader: Loader) -> None:
    path = loader.directory / loader.file(lines(event("a"), event("b")))
    status, output = change_meanwhile(loader, lambda: os.truncate(path, 300))
    assert (status, b"events.jsons:1: the file was cut short while it was read" in output) == (1, True)
    assert not loader.db.exists()


def test_a_file_that_is_replaced(loader: Loader) -> None:
    path, other = (loader.directory / loader.file(lines(event("a")) * 2, name) for name in ("events.jsons", "other"))
    status, output = change_meanwhile(loader, lambda: other.rename(path))
    assert (status, b"events.jsons:1: the file was replaced while it was read" in output) == (1, True)


def test_a_file_that_grows(loader: Loader) -> None:
    """What was there at the start is loaded, with the rest of its last line."""
    more = lines(event("b"), event("c"))
    path = loader.directory / loader.file(lines(event("a")) + more[:100])
    status, output = change_meanwhile(loader, lambda: path.write_bytes(lines(event("a")) + more))
    assert (status, json.loads(output)["lines"]) == (0, 3)
    assert [user for (user,) in loader.query("SELECT user_pseudo_id FROM active_user")] == ["a", "b", "first"]


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
    done = subprocess.run(command, cwd=loader.directory, stdout=-1, stderr=subprocess.STDOUT, check=True, timeout=300)
    output, measured = done.stdout.rstrip().rpartition(b"\n")[::2]
    megabytes, status = map(int, measured.split())
    return status, output, megabytes


def test_a_line_of_100_mb(loader: Loader) -> None:
    path = loader.directory / loader.file(lines(event("a")))
    with path.open("ab") as file:
        file.write(lines(event("b", pad="x" * 100_000_000)) + b'{"' + b"y" * 100_000_000 + b"\n" + lines(event("c")))
    done = loader.run("--max-bad-records", 1, path)
    assert (done.returncode, done.stderr.decode().split(": ")[0]) == (0, f"{path}:3")
    assert loader.table() == {"2019-12-30": 3}


def test_a_line_without_end(loader: Loader) -> None:
    """A gzip bomb of one line is refused before it fills the memory."""
    bomb = gzip.compress(b"\0" * 10_000_000, 9) * 60
    status, output, megabytes = peak_memory(loader, loader.file(lines(event()), "a"), loader.file(bomb, "bomb.gz"))
    assert (status, output) == (1, b"Error: bomb.gz:1: a line of more than 128 MiB: one event a line is expected")
    assert megabytes < 500


@pytest.mark.parametrize("line", [b"\n", b"x\n", b'{"event_name":"user_engagement","event_timestamp":0}\n'])
def test_a_bomb_of_many_lines(loader: Loader, line: bytes) -> None:
    size = 8_000_000 // len(line) * len(line)
    bomb = loader.file(gzip.compress(line * (size // len(line) // 20), 9) * 20, "bomb.gz")
    status, output, megabytes = peak_memory(loader, "--max-bad-records", 10**9, "--format", "json", bomb)
    assert status == 0
    assert json.loads(output.splitlines()[-1])["lines"] == size // len(line) // 20 * 20
    assert megabytes < 150


def test_many_users_are_staged_in_bounded_memory(loader: Loader) -> None:
    users = (event(f"{number:032x}", time=number * 86_400 * 10**6 % (40 * 86_400 * 10**6)) for number in range(700_000))
    path = loader.directory / loader.file(b"")
    with path.open("wb") as file:
        file.writelines(json.dumps(user).encode() + b"\n" for user in users)
    status, output, megabytes = peak_memory(loader, "--format", "json", path)
    report = json.loads(output)
    assert (status, len(report["dates"]), sum(date["added"] for date in report["dates"])) == (0, 40, 700_000)
    assert loader.query("SELECT sum(active_user_count) FROM active_user_table") == [(700_000,)]
    assert megabytes < 150


def test_very_many_dates(loader: Loader) -> None:
    """As from clocks gone wild: no step may take longer a date the more dates there are."""
    path = loader.directory / loader.file(b"")
    with path.open("wb") as file:
        file.writelines(lines(event("u", time=day * 86_400 * 10**6)) for day in range(200_000))
    status, output, megabytes = peak_memory(loader, "--format", "json", path)
    assert (status, len(json.loads(output)["dates"])) == (0, 200_000)
    assert megabytes < 250


def test_every_line_is_good_or_bad_or_blank(loader: Loader) -> None:
    rows = [b"", b" ", b"x", b'{"a":}', b'{"a":1}', b"{", lines(event("a")).strip(), lines(event(time=None)).strip()]
    chosen = random.Random(5).choices(rows, k=5000)
    name = loader.file(b"\n".join(chosen))
    done = loader.run("--validate", "--max-bad-records", 5000, "--rejects", "rejects", "--format", "json", name)
    report, rejects = json.loads(done.stdout), (loader.directory / "rejects").read_bytes().splitlines()
    ((blank, logged),) = loader.query("SELECT blank_lines, bad_records FROM load_log")
    good = sum(chosen.count(row) for row in rows[4:7:2])
    assert rejects == [row for row in chosen if row in (b"x", b'{"a":}', b"{", rows[7])]
    assert report["bad_records"] == logged == len(rejects)
    assert good + logged + blank == report["lines"] == 5000


def test_the_sample_needs_no_heavy_import(loader: Loader) -> None:
    command = [sys.executable, "-X", "importtime", *loader.command(SAMPLE)[1:]]
    done = subprocess.run(command, cwd=loader.directory, capture_output=True, text=True)
    imported = {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if "|" in line}
    assert {"click", "msgspec", "stringzilla"} <= imported
    assert not imported & {"multiprocessing", "isal", "backports.zstd", "json", "matplotlib", "distributed", "psycopg"}


def test_a_line_without_end_before_a_range(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_active_users, "MAX_LINE", 1 << 20)
    path = tmp_path / "x"
    path.write_bytes(b"{" + b"x" * (4 << 20))
    with path.open("rb") as stream, pytest.raises(LoadError, match="a line of more than"):
        line_start(stream, 1000)


def test_a_merger_holds_some_users_and_stages_the_rest() -> None:
    merger, most = Merger([Range("x")]), 0
    for number in range(50):
        merger.add(0, Batch(users={"2020-01-01": {f"{number}-{user:032}" for user in range(10_000)}}))
        most = max(most, len(merger.users.get("2020-01-01", ())))
    assert 10_000 < most < 400_000
    merger.stage()
    assert sum(len(json.loads(run)) for run in merger.runs("2020-01-01")) == 500_000
    plan = merger.staged.execute("EXPLAIN QUERY PLAN SELECT users FROM run WHERE date = ?", ("",)).fetchall()
    assert "USING INDEX run_date" in plan[0][-1]


def test_a_memo_is_bounded() -> None:
    memo = Memo[int, int](lambda key: key)
    assert [memo[number] for number in range(200_000)] == list(range(200_000))
    assert len(memo) <= 65_536


def test_the_ends_of_the_calendar() -> None:
    rule = Rule("Asia/Kolkata", 1, ["*"])
    assert rule.date((253402300800 - 19800) * 10**6 - 1) == "9999-12-31"
