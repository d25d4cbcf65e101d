"""A load is all or nothing: kills, crowds, locks, full disks, read-only files."""

import json
import random
import shutil
import signal
import sqlite3
import stat
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import oracle
import pytest
from helpers import (
    AS_ROOT,
    INTERRUPTED,
    KILLS,
    NOT_AN_OBJECT,
    OTHER_OPTIONS,
    ROOT,
    SAMPLE,
    SAMPLE_LINES,
    SAMPLE_TABLE,
    WITHOUT_CAPABILITIES,
    Loader,
    Process,
    date_count,
    event,
    has_open,
    lines,
    other_rule,
    wait_for,
    when_it_reads,
)

from load_active_users import transaction

# -- Kills and crowds


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_at_any_moment(loader: Loader, large: Path, workers: int) -> None:
    """The database is whole, in the old state or the new one, and the next load
    completes it."""
    loader.load(SAMPLE)
    states = [loader.table()]
    args = ["--workers", workers, "--max-bad-records", 99, "--quiet", large]
    shutil.copy(loader.db, loader.directory / "old.db")
    started = time.monotonic()
    loader.run(*args, process=True)
    seconds = time.monotonic() - started
    states.append(loader.table())
    assert states[0] != states[1]

    chance = random.Random(workers)
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    for _ in range(KILLS * 2 // 3):
        shutil.copy(loader.directory / "old.db", loader.db)
        with loader.start(*args, **silent) as process:
            # most of them near the end, where the database is written
            time.sleep(seconds * (1.1 - chance.random() ** 2))
            process.kill()
        assert loader.query("PRAGMA integrity_check") == [("ok",)]
        state = loader.table()
        assert state in states
        counted = "SELECT date, count(*) FROM active_user GROUP BY date"
        assert state == dict(loader.query(counted))
        assert len(loader.query("SELECT * FROM load_log")) == 1 + states.index(state)
    loader.run(*args, process=True)
    assert loader.table() == states[1]


def test_a_crowd_loads_into_one_new_database(loader: Loader) -> None:
    """Sixteen loads of overlapping files succeed at once, and the counts are exact."""
    names = [
        loader.file(b"".join(SAMPLE_LINES[at : at + 300]), f"{at}.jsons")
        for at in range(0, 800, 50)
    ]
    crowd = [loader.start("--format", "json", name) for name in names]
    reports = []
    for process in crowd:
        out, err = process.communicate(timeout=120)
        assert (process.returncode, err) == (0, b"")
        reports.append(json.loads(out))
    users = oracle.read(b"".join(SAMPLE_LINES[:1050]))[0]
    assert loader.table() == {date: len(users[date]) for date in sorted(users)}
    added = sum(date["added"] for report in reports for date in report["dates"])
    assert added == sum(map(len, users.values()))
    assert len(loader.query("SELECT * FROM load_log")) == 16


# -- Locks


@pytest.fixture
def locked(loader: Loader) -> Iterator[Loader]:
    loader.load(SAMPLE)
    with closing(sqlite3.connect(loader.db)) as db:
        db.execute("BEGIN IMMEDIATE")
        yield loader


def test_a_lock_held_for_too_long_is_a_clear_error(locked: Loader) -> None:
    done = locked.with_constants(LOCK_SECONDS=0.1).run(SAMPLE)
    what = "database is locked; another program keeps it locked"
    said = f"Error: active_user_table.db: {what}; try again when that is done\n"
    assert (done.returncode, done.stdout, done.stderr.decode()) == (1, b"", said)


def waits(loader: Loader, process: Process) -> bool:
    """Wait until a load has come to its database."""
    return bool(wait_for(lambda: has_open(process.pid, loader.db)))


def test_a_load_waits_its_turn_and_can_be_stopped_meanwhile(locked: Loader) -> None:
    with locked.start("-") as process:
        assert process.stdin
        process.stdin.close()
        process.stdin = None
        assert waits(locked, process)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (130, b"", INTERRUPTED)


def test_a_reader_is_not_in_the_way_for_long(loader: Loader) -> None:
    loader.load(loader.file(lines(event("a"))))
    with closing(sqlite3.connect(loader.db, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM active_user_table").fetchall()
        with loader.start("-q", SAMPLE) as process:
            time.sleep(0.7)
            assert process.poll() is None
            reader.execute("COMMIT")
            out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (0, b"", b"")


OTHER_LOG = (
    (ROOT / "schema.sql").read_text()
    + """INSERT INTO load_log SELECT 'x', '', 0, '[]', 0, 'UTC', '["*"]', 1, '["*"]',
        '', 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0"""
)
BECOMES = {
    "tables of another program": (
        "CREATE TABLE active_user (id)",
        "it has a table active_user, but no active_user_table, as in schema.sql; "
        "choose another --db",
    ),
    "another rule": (
        OTHER_LOG,
        other_rule(
            f"--timezone US/Central {OTHER_OPTIONS}",
            "--timezone UTC --event-name '*' --min-engagement-msec 1 "
            "--valuable-event '*'",
        ),
    ),
}


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
@pytest.mark.parametrize(("change", "what"), BECOMES.values(), ids=BECOMES)
def test_a_database_that_becomes_another_meanwhile(
    loader: Loader, options: list[str], change: str, what: str
) -> None:
    """What was checked before the scan is checked again when the load has its turn."""
    with loader.start(*options, "-") as process:
        when_it_reads(process)
        with closing(sqlite3.connect(loader.db, isolation_level=None)) as db:
            db.executescript(f"BEGIN EXCLUSIVE;{change};COMMIT")
        before = loader.content()
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (1, b"")
    assert err.decode() == f"Error: active_user_table.db: {what}\n"
    assert loader.content() == before


# -- Full disks

FULL_DISK = "database or disk is full; free some disk space and load again"


@pytest.mark.parametrize("size", [0, 1000, 5000, 20_000, 60_000])
@pytest.mark.parametrize("existing", [True, False])
def test_a_database_that_cannot_grow(loader: Loader, size: int, existing: bool) -> None:
    """The old one stays as it is. A new one is empty: another load may have opened
    it."""
    users = lines(*(event(f"user {number}") for number in range(4000)))
    if existing:
        loader.load(SAMPLE)
    before = loader.content()
    name = loader.file(users)
    files = sorted(loader.directory.iterdir())
    status, out, err = loader.run_under(f"prlimit --fsize={size}", name)
    assert (status, out) == (1, b"")
    assert err in {
        f"Error: active_user_table.db: {FULL_DISK}\n",
        "Error: active_user_table.db: disk I/O error; check the disk and load again\n",
    }
    assert set(loader.directory.iterdir()) - {loader.db} == set(files) - {loader.db}
    assert loader.content() == before
    loader.load(name)
    assert loader.query("SELECT count(*) FROM active_user") == [
        (4064 if existing else 4000,)
    ]


FIRST_LOADS = {
    "a bad record": (["-"], b"bad\n", 1, f"-:1: {NOT_AN_OBJECT}\n"),
    "no file": (["nothing"], b"", 1, "Error: nothing: No such file or directory\n"),
    "no zone": (["--timezone", "Nowhere", "-"], b"", 2, "Usage: "),
    "another format": (["-"], b"[1]", 1, "Error: -:1: is a JSON array"),
    "the wrong unit": (
        ["-"],
        lines(event("a", time=0)),
        1,
        "Error: all active events (1) are dated before 2000",
    ),
}


@pytest.mark.parametrize(
    ("args", "input", "status", "said"), FIRST_LOADS.values(), ids=FIRST_LOADS
)
def test_a_first_load_that_fails_leaves_no_file(
    loader: Loader, args: list[str], input: bytes, status: int, said: str
) -> None:
    assert loader.refuse(*args, input=input, status=status).startswith(said)
    assert list(loader.directory.iterdir()) == []


@AS_ROOT
def test_a_full_disk(loader: Loader, disk: Path) -> None:
    loader.db = disk / "x.db"
    loader.load("--db", loader.db, SAMPLE)
    before = loader.content()
    users = loader.file(lines(*(event(f"user {number}") for number in range(40_000))))
    said = loader.refuse("--db", loader.db, users)
    assert said == f"Error: {loader.db}: {FULL_DISK}\n"
    assert loader.content() == before
    new = disk / "new.db"
    assert loader.refuse("--db", new, users) == f"Error: {new}: {FULL_DISK}\n"
    assert {path: path.stat().st_size > 0 for path in disk.iterdir()} == {
        loader.db: True,
        new: False,  # it stays, since another load may have opened it
    }
    loader.load("--db", loader.db, SAMPLE)


@AS_ROOT
def test_a_temporary_directory_that_is_full(loader: Loader, disk: Path) -> None:
    """TMPDIR names it, as for every program. A live load needs no such files."""
    row = lines(event("USER"))
    users = (b"%0128x" % number for number in range(160_000))
    name = loader.file(b"".join(row.replace(b"USER", user) for user in users))
    for variable in ("SQLITE_TMPDIR", "TMPDIR"):
        env = {variable: str(disk)}
        done = loader.run("--dry-run", name, env=env, process=True)
        assert (done.returncode, done.stdout, done.stderr.decode()) == (
            1,
            b"",
            f"Error: temporary files (TMPDIR): {FULL_DISK}\n",
        )
    assert not loader.db.exists()
    # A live load commits users before they are so many.
    live = ["--commit-every", 999, "-q", name]
    done = loader.run(*live, env={"TMPDIR": str(disk)}, process=True)
    assert (done.returncode, done.stdout, done.stderr.decode()) == (0, b"", "")
    assert loader.table() == {"2019-12-30": 160_000}


# -- What may not be written


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
    done = loader.run_without_end(option, f"closed/{name}", under=WITHOUT_CAPABILITIES)
    what = f"{closed} can't be written; make it writable, or choose another"
    assert done == (1, b"", f"Error: closed/{name}: {what}\n")
    assert not loader.db.exists()


@AS_ROOT
def test_a_database_in_a_directory_that_may_not_be_entered(loader: Loader) -> None:
    """It is not taken for one that is missing."""
    secret = loader.directory / "secret"
    secret.mkdir()
    loader.load("--db", "secret/a.db", SAMPLE)
    secret.chmod(0)
    for args in (["--dry-run", SAMPLE], ["--plot", "x.png"]):
        done = loader.run_under(WITHOUT_CAPABILITIES, "--db", "secret/a.db", *args)
        assert done == (1, b"", "Error: secret/a.db: Permission denied\n")


def test_a_database_that_can_only_be_read(loader: Loader, closed: Path) -> None:
    """It is drawn, and loads are tried."""
    loader.db = closed / "x.db"
    loader.load("--db", loader.db, SAMPLE)
    picture = loader.draw("png")
    before = loader.db.read_bytes()
    loader.db.chmod(0o444)
    closed.chmod(0o555)
    options = ["--db", loader.db]
    done = loader.run_under(WITHOUT_CAPABILITIES, *options, "--plot", "x.png")
    assert done == (0, b"", "")
    assert (loader.directory / "x.png").read_bytes() == picture
    tried = ["--dry-run", "--format", "csv"]
    done = loader.run_under(WITHOUT_CAPABILITIES, *options, *tried, SAMPLE)
    rows = b"2019-12-29,11,0,0\n2019-12-30,31,0,0\n2019-12-31,22,0,0\n"
    assert done == (0, b"date,active_user_count,added,removed\n" + rows, "")
    what = "can't be written; make it writable, or choose another"
    done = loader.run_under(WITHOUT_CAPABILITIES, *options, SAMPLE)
    assert done == (1, b"", f"Error: {loader.db}: {what}\n")
    assert [loader.db.read_bytes(), *closed.iterdir()] == [before, loader.db]


READ_ONLY = "attempt to write a readonly database; "
READ_ONLY += "make the file and its directory writable, or use another --db"
CANNOT_OPEN = "unable to open database file; "
CANNOT_OPEN += "make the file and its directory readable and writable"


@pytest.mark.parametrize(
    ("mode", "beside", "reason"),
    [("DELETE", "-journal", READ_ONLY), ("WAL", "-wal", CANNOT_OPEN)],
)
def test_a_database_with_a_journal_that_can_only_be_read(
    loader: Loader, closed: Path, mode: str, beside: str, reason: str
) -> None:
    """The load neither counts what was not committed nor misses what was."""
    loader.load(SAMPLE)
    with closing(sqlite3.connect(loader.db, isolation_level=None)) as db:
        db.execute(f"PRAGMA journal_mode = {mode}")
        db.execute("PRAGMA cache_size = 1")
        db.execute("BEGIN")
        for number in range(3000):
            db.execute(
                "INSERT INTO active_user VALUES ('2019-12-30', ?)", (f"user {number}",)
            )
        for path in (loader.db, Path(f"{loader.db}{beside}")):
            shutil.copy(path, closed)
            (closed / path.name).chmod(0o444)
    closed.chmod(0o555)
    loader.db = closed / loader.db.name
    done = loader.run_under(
        WITHOUT_CAPABILITIES, "--db", loader.db, "--dry-run", SAMPLE
    )
    assert done == (1, b"", f"Error: {loader.db}: {reason}\n")


@AS_ROOT
def test_a_read_only_disk(loader: Loader, disk: Path) -> None:
    loader.db = disk / "x.db"
    loader.load("--db", loader.db, SAMPLE)
    before = loader.db.read_bytes()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for path, place in ((loader.db, ""), (disk / "new.db", f"{disk} ")):
        remedy = f"{place}can't be written; make it writable, or choose another"
        assert loader.refuse("--db", path, SAMPLE) == f"Error: {path}: {remedy}\n"
    tried = loader.load("--dry-run", "--db", loader.db, SAMPLE)
    expected = [date_count(day, count, 0) for day, count in SAMPLE_TABLE.items()]
    assert tried["dates"] == expected
    assert loader.db.read_bytes() == before


def test_files_are_as_readable_as_the_umask_says(loader: Loader) -> None:
    with loader.start("--rejects", "rejects", SAMPLE, umask=0o077) as process:
        assert process.communicate()[1] == b""
    assert process.returncode == 0
    paths = [loader.db, loader.directory / "rejects"]
    assert [stat.S_IMODE(path.stat().st_mode) for path in paths] == [0o600] * 2


# -- The file


def test_a_new_database_has_large_pages(loader: Loader) -> None:
    """Their size is that of the file, for good. A load of many users is quicker."""
    loader.load(SAMPLE)
    assert loader.query("PRAGMA page_size") == [(16_384,)]


def test_a_wait_for_a_lock_is_cut_into_short_ones(tmp_path: Path) -> None:
    """In between, Python handles a signal."""
    with transaction(str(tmp_path / "a.db"), can_write=True) as db:
        assert db.execute("PRAGMA busy_timeout").fetchall() == [(100,)]  # ms
