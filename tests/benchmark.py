"""Time the loader against other ways to count the same active users.

    python tests/benchmark.py --only dense --only startup

Contenders are whole processes and run in turn. Those that print counts have to agree
on every date, or the exit status is 1.

The inputs are made in TMPDIR and read from the page cache. Both should have room for
2.4 KB for each of --events, and for 15 times 360 bytes for each of --growth-events.

CPU is user and system time of all processes; PostgreSQL's own is not in it. The peak
memory is that of the largest process.
"""

import contextlib
import functools
import gzip
import importlib.util
import itertools
import multiprocessing
import os
import platform
import random
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable
from datetime import date, timedelta
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LOADER = ROOT / "load_active_users.py"
SAMPLE = ROOT / "data" / "bq-results-sample-data.jsons"
HAS_DUCKDB = importlib.util.find_spec("duckdb") is not None
CORES = len(os.sched_getaffinity(0))
EVENTS_PER_USER, SHARDS = 4, 16
NIGHTS = 60  # each has its own day
SMALL_FILES = 10_000
TREND_DATES, DATES_PER_USER = 100, 25
NOTES: list[str] = []  # below the table
ACTIVE_USERS = r"""
    SELECT DISTINCT
        timezone('US/Central', make_timestamptz(event_timestamp))::DATE AS date,
        user_pseudo_id
    FROM read_ndjson(?, columns = {
        event_name: 'VARCHAR', event_timestamp: 'BIGINT', user_pseudo_id: 'VARCHAR',
        event_params: 'STRUCT("key" VARCHAR, "value" STRUCT(int_value BIGINT))[]'})
    WHERE event_name = 'user_engagement'
      AND len(list_filter(event_params,
          lambda p: p.key = 'engagement_time_msec' AND p.value.int_value >= 3000)) > 0
      AND len(list_filter(event_params,
          lambda p: p.key LIKE '%\_event' ESCAPE '\')) > 0"""
# Counts and forgets the users: a second load would count them again.
DUCKDB_COUNTS = f'''
import sys, duckdb
query = r"""SELECT date, count(*) FROM ({ACTIVE_USERS}) GROUP BY ALL"""
for row in duckdb.execute(query, [sys.argv[1:]]).fetchall():
    print(*row, sep=",")
'''
# The loader's job: users are kept, so that what is loaded again is not counted twice.
DUCKDB_KEEPS = f'''
import sys, duckdb
db = duckdb.connect(sys.argv[1])
db.execute(r"""
    CREATE TABLE IF NOT EXISTS active_user (
        date DATE, user_pseudo_id VARCHAR, PRIMARY KEY (date, user_pseudo_id));
    CREATE TABLE IF NOT EXISTS active_user_table (
        date DATE PRIMARY KEY, active_user_count BIGINT);
    BEGIN""")
db.execute(r"""INSERT OR IGNORE INTO active_user {ACTIVE_USERS}""", [sys.argv[2:]])
db.execute("""
    INSERT INTO active_user_table SELECT date, count(*) FROM active_user GROUP BY ALL
    ON CONFLICT DO UPDATE SET active_user_count = excluded.active_user_count;
    COMMIT""")
for row in db.execute("FROM active_user_table").fetchall():
    print(*row, sep=",")
db.close()
'''

# Linux never gives the peak memory of a process as less than that of its parent. This
# one is small.
LAUNCHER = """
import os, sys, time
start = time.perf_counter()
_, status, usage = os.wait4(os.posix_spawnp(sys.argv[2], sys.argv[2:], os.environ), 0)
seconds, cpu = time.perf_counter() - start, usage.ru_utime + usage.ru_stime
print(seconds, cpu, usage.ru_maxrss * 1024, status, file=open(sys.argv[1], "w"))
"""

TREND = """
import sqlite3, sys
for row in sqlite3.connect(sys.argv[1]).execute("SELECT * FROM active_user_trend"):
    print(*row, sep=",")
"""

PARAMETERS = (
    '{"key":"firebase_screen_class","value":{"string_value":"MainActivity"}}',
    '{"key":"engaged_session_event","value":{"int_value":"1"}}',
    '{"key":"engagement_time_msec","value":{"int_value":"%d"}}',
)
DENSE = f"""{{"event_date":"20200101","event_timestamp":"%d",\
"event_name":"user_engagement","event_params":[{",".join(PARAMETERS)}],\
"user_pseudo_id":"%032x"}}\n"""


class Input(NamedTuple):
    """Some files; the name tells the events and bytes (uncompressed) in them."""

    name: str
    files: list[str]


class Contender(NamedTuple):
    name: str
    command: list[str]
    before: Callable[[], object] = lambda: None  # is not timed
    prints_all: bool = True  # all dates, with their active users


class Timing(NamedTuple):
    """What one run took."""

    seconds: float
    cpu: float  # seconds
    peak_memory: float  # bytes
    counts: dict[str, int]  # active users by date, as printed


# -- Inputs


class Repetition(NamedTuple):
    """How the users and dates of the sample become others."""

    mask: int  # to XOR with the users
    days: int  # to add to the timestamps


def write_repetitions(path: Path, repetitions: list[Repetition]) -> None:
    """Write repetitions of the sample, unless the file is there already.

    A single formatting makes all lines of a repetition, quickly.
    """
    if path.exists():
        return
    text = SAMPLE.read_bytes()
    field = rb'("event_timestamp":")(\d{16})(".*"user_pseudo_id":")([0-9a-f]{32})'
    fields = [(int(match[2]), int(match[4], 16)) for match in re.finditer(field, text)]
    template = re.sub(field, rb"\1%d\3%032x", text.replace(b"%", b"%%"))
    is_gzip = path.suffix == ".gz"
    with gzip.open(path, "wb", 6) if is_gzip else path.open("wb") as file:
        for mask, days in repetitions:
            shift = days * 86_400 * 10**6
            pairs = ((usec + shift, user ^ mask) for usec, user in fields)
            file.write(template % tuple(itertools.chain.from_iterable(pairs)))


def make(name: str, events: int, path: Path, shards: int = 1) -> Input:
    """Make an input of whole repetitions of the sample, its shards in parallel.

    They are dealt in turn to the shards, and to NIGHTS days: as many shards as days
    have a day each.
    """
    text = SAMPLE.read_bytes()
    lines = text.count(b"\n")
    number = max(-(-events // lines), shards)
    rng = random.Random(0)
    masks = [rng.getrandbits(128) for _ in range(max(number // EVENTS_PER_USER, 1))]
    repetitions = [Repetition(rng.choice(masks), i % NIGHTS) for i in range(number)]
    paths = [path.with_name(path.name.replace("*", f"{i:02}")) for i in range(shards)]
    dealt = [repetitions[shard::shards] for shard in range(shards)]
    with multiprocessing.Pool(min(CORES, shards)) as pool:
        pool.starmap(write_repetitions, zip(paths, dealt, strict=True), chunksize=1)
    size = f"{number * lines:,} events, {number * len(text) / 1e9:.3g} GB"
    return Input(f"{name} {size}", [str(path) for path in paths])


def make_dense(options: Namespace, events: int, seed: int = 0) -> Input:
    """Make an input of short lines, all active events of new users on four dates."""
    path, rng = options.dir / f"dense-{events}-{seed}.jsons", random.Random(seed)
    if not path.exists():
        with path.open("w") as file:
            for number in range(events):
                second = 1_577_880_000 + rng.randrange(4 * 86_400)
                usec = second * 10**6 + number % 10**6
                msec = rng.randrange(3000, 90_000)
                file.write(DENSE % (usec, msec, rng.getrandbits(128)))
    size = path.stat().st_size / 1e9
    return Input(f"dense: {events:,} events, {size:.3g} GB", [str(path)])


def make_database(path: Path, user_days: int) -> None:
    """Make an SQLite database of users who each come on DATES_PER_USER random dates."""
    rng, count = random.Random(0), user_days // TREND_DATES
    number = user_days // DATES_PER_USER
    users = sorted(f"{rng.getrandbits(128):032x}" for _ in range(number))
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA page_size = 16384")  # as the loader has it
        db.executescript((ROOT / "schema.sql").read_text())
        for days in range(TREND_DATES):
            day = str(date(2020, 1, 1) + timedelta(days))
            active = ((day, users[i]) for i in sorted(rng.sample(range(number), count)))
            db.executemany("INSERT INTO active_user VALUES (?, ?)", active)
            db.execute("INSERT INTO active_user_table VALUES (?, ?)", [day, count])
        db.commit()


# -- Runs


def run(contender: Contender, work: Path) -> Timing:
    """Run a command."""
    contender.before()
    usage, output = work / "benchmark.usage", work / "benchmark.output"
    with output.open("wb") as file:
        command = [sys.executable, "-ISc", LAUNCHER, str(usage), *contender.command]
        subprocess.run(command, stdin=subprocess.DEVNULL, stdout=file, check=True)
    seconds, cpu, peak_memory, exit_status = map(float, usage.read_text().split())
    if exit_status:
        sys.exit(f"{contender.name} failed")
    rows = re.findall(r"(\d{4}-\d\d-\d\d),(\d+)(?=[,\n])", output.read_text())
    return Timing(seconds, cpu, peak_memory, {date: int(count) for date, count in rows})


def check_counts(
    contender: Contender, counts: dict[str, int], expected: dict[str, int]
) -> None:
    """Exit if a contender prints other counts than the first, or lacks some."""
    wrong = counts.items() - expected.items()
    if contender.prints_all:
        wrong |= expected.items() - counts.items()
    if wrong:
        sys.exit(f"{contender.name} disagrees on {sorted(dict(wrong))}")
    if contender.prints_all and not counts:
        sys.exit(f"{contender.name} prints no date")


def compete(options: Namespace, source: Input, group: list[Contender]) -> list[float]:
    """Run contenders in turn; print a row for each, with its ratio to the first.

    An untimed round warms the page cache. Return the CPU seconds of each.
    """
    if not HAS_DUCKDB:
        group = [one for one in group if not one.name.startswith("DuckDB")]
    runs: list[list[Timing]] = [[] for _ in group]
    for number in range(options.rounds + 1):
        print(f"{source.name}: round {number} of {options.rounds}", file=sys.stderr)
        for contender, timings in zip(group, runs, strict=True):
            timings.append(run(contender, options.dir))
            check_counts(contender, timings[-1].counts, runs[0][0].counts)
    timed = [timings[1:] for timings in runs]
    seconds = [median(timing.seconds for timing in timings) for timings in timed]
    cpu = [median(timing.cpu for timing in timings) for timings in timed]
    peaks = [max(timing.peak_memory for timing in timings) for timings in timed]
    for i, contender in enumerate(group):
        times = f"{seconds[i]:.3g} | {cpu[i]:.3g} | {seconds[i] / seconds[0]:.2f}"
        # A smaller peak is that of the launcher.
        peak = f"{peaks[i] / 1e6:.0f}" if peaks[i] >= 12e6 else "< 12"
        print(f"| {source.name} | {contender.name} | {times} | {peak} |", flush=True)
    return cpu


# -- Contenders


def loader(
    options: Namespace, source: Input, *arguments: str, db: str = "first.db"
) -> Contender:
    """Return a first load by this loader."""
    path = options.dir / db
    command = [sys.executable, str(LOADER), "--format", "csv", "--db", str(path)]
    return Contender(
        " ".join(("this loader", *arguments)),
        [*command, *arguments, *source.files],
        functools.partial(path.unlink, missing_ok=True),
    )


def duckdb(options: Namespace, source: Input) -> Contender:
    """Return a first load by DuckDB."""
    path = options.dir / "first.duckdb"
    return Contender(
        "DuckDB, keeping users",
        [sys.executable, "-c", DUCKDB_KEEPS, str(path), *source.files],
        functools.partial(path.unlink, missing_ok=True),
    )


def forgetful_duckdb(source: Input) -> Contender:
    command = [sys.executable, "-c", DUCKDB_COUNTS, *source.files]
    return Contender("DuckDB, keeping nobody", command)


def later(contender: Contender, name: str) -> Contender:
    """Return the same load into what the contender before it has left."""
    return contender._replace(name=name, before=lambda: None)


def first_and_again(contender: Contender) -> list[Contender]:
    """Return a first load, and then the same once more."""
    first = contender._replace(name=f"{contender.name}, first")
    return [first, later(contender, f"{contender.name}, again")]


def copy_database(source: Path, target: Path) -> None:
    """Copy a database to the disk, so that no later commit waits for the copy."""
    shutil.copyfile(source, target)
    with target.open("rb") as file:
        os.fsync(file.fileno())


# -- Parts


def note_size(database: str, size: int, user_days: int) -> None:
    each = f"{size / user_days:.0f} bytes per user-day"
    NOTES.append(f"active_user takes {each} in {database}, of {user_days:,}.")


def benchmark_plain(options: Namespace) -> None:
    path = options.dir / f"plain-{options.events}.jsons"
    source = make("plain:", options.events, path)
    floor = Contender("`wc -l`, the floor", ["wc", "-l", str(path)], prints_all=False)
    group = [loader(options, source), loader(options, source, "--workers=1")]
    group += [forgetful_duckdb(source), duckdb(options, source), floor]
    compete(options, source, group)


def benchmark_gzip(options: Namespace) -> None:
    path = options.dir / f"gzip-{options.gzip_events}-*.jsons.gz"
    source = make(f"gzip, {SHARDS} shards:", options.gzip_events, path, SHARDS)
    compete(options, source, [loader(options, source), forgetful_duckdb(source)])


def benchmark_dense(options: Namespace) -> None:
    source = make_dense(options, options.dense_events)
    group = first_and_again(loader(options, source))
    group += first_and_again(duckdb(options, source))
    compete(options, source, [*group, forgetful_duckdb(source)])


def benchmark_nightly(options: Namespace) -> None:
    """Load the shards of all nights, with one that is new, or none, or all again."""
    path = options.dir / "nightly-*.jsons.gz"
    name = f"nightly, {NIGHTS} shards:"
    source = make(name, options.nightly_events, path, NIGHTS)
    old = source._replace(files=source.files[:-1])
    run(loader(options, old, db="old.db"), options.dir)
    databases = (options.dir / "old.db", options.dir / "first.db")
    copy = functools.partial(copy_database, *databases)
    first = loader(options, source)
    incremental = loader(options, source, "--incremental")._replace(prints_all=False)
    name = "this loader, --incremental, the next night (1 new shard)"
    group = [
        first._replace(name="this loader, first night"),
        incremental._replace(name=name, before=copy),
        later(incremental, "this loader, --incremental, nothing new"),
        later(first, "this loader, all again without --incremental"),
        *first_and_again(duckdb(options, source)),
    ]
    compete(options, source, group)


def benchmark_files(options: Namespace) -> None:
    """Skip many small files. The sample tells how much of that is the start."""
    lines = itertools.cycle(SAMPLE.read_bytes().splitlines(keepends=True))
    files = [options.dir / f"{number:05}.jsons" for number in range(SMALL_FILES)]
    for file in files:
        file.write_bytes(next(lines))
    source = Input(f"{SMALL_FILES:,} files of one line", list(map(str, files)))
    run(loader(options, source, db="small.db"), options.dir)
    skip = loader(options, source, "--incremental", db="small.db")
    skip = later(skip, "this loader, --incremental, unchanged")
    start = loader(options, Input("the sample", [str(SAMPLE)]))
    start = start._replace(name="this loader, the sample instead")
    compete(options, source, [start, skip._replace(prints_all=False)])


def benchmark_startup(options: Namespace) -> None:
    imports = "import click, dateutil.tz, sqlite3"
    command = [sys.executable, "-c", imports]
    bare = Contender(f"`{imports}`", command, prints_all=False)
    source = Input("start-up: the sample", [str(SAMPLE)])
    compete(options, source, [loader(options, source), bare])


def benchmark_postgres(options: Namespace) -> None:
    """Load into PostgreSQL on this machine, where it is installed."""
    import psycopg
    from servers import INITDB, running_postgres

    if not INITDB.exists():
        print("PostgreSQL is not installed: its rows are left out", file=sys.stderr)
        return
    source = make_dense(options, options.dense_events)
    with running_postgres() as server:
        url = f"{server.url}postgres"

        def drop() -> None:
            with psycopg.connect(url) as db:
                tables = "active_user_table, active_user, load_log, loaded_file"
                db.execute(f"DROP TABLE IF EXISTS {tables} CASCADE".encode())

        remote = loader(options, source, "--db", url)  # the last --db counts
        remote = remote._replace(name="this loader, PostgreSQL", before=drop)
        compete(options, source, [loader(options, source), *first_and_again(remote)])
        size = "SELECT pg_total_relation_size('active_user'), count(*) FROM active_user"
        with psycopg.connect(url) as db:
            for total, user_days in db.execute(size):
                note_size("PostgreSQL", total, user_days)


def benchmark_growth(options: Namespace) -> None:
    """Load 1, 2, 4, 8 times the user-days, and new ones beside ever more."""
    one = options.growth_events
    held, grown = 0, options.dir / "grown.db"
    new = make_dense(options, one, seed=9)
    for times in (1, 2, 4, 8):
        source = make_dense(options, one * times, times)
        group = first_and_again(loader(options, source))
        group += first_and_again(duckdb(options, source))
        compete(options, source, group)
        run(later(loader(options, source, db=grown.name), "growth"), options.dir)
        held += one * times
        copy = functools.partial(copy_database, grown, options.dir / "first.db")
        more = loader(options, new)._replace(before=copy)
        beside = new._replace(name=f"{new.name}, new to a table of {held:,}")
        compete(options, beside, [more])
    note_size("SQLite", grown.stat().st_size, held)


def benchmark_trend(options: Namespace) -> None:
    """Query the view active_user_trend: weekly and monthly active users by date."""
    for times in (4, 8):
        user_days = times * options.growth_events
        path = options.dir / f"trend-{user_days}.db"
        make_database(path, user_days)
        source = Input(f"{user_days:,} user-days on {TREND_DATES} dates", [str(path)])
        command = [sys.executable, "-c", TREND, str(path)]
        query = Contender("`SELECT * FROM active_user_trend`", command)
        [cpu] = compete(options, source, [query])
        cost = f"{cpu / user_days * 1e6:.2f} CPU seconds per million user-days"
        NOTES.append(f"active_user_trend takes {cost}, of {user_days:,}.")


# -- The command

PARTS = {
    "plain": benchmark_plain,
    "gzip": benchmark_gzip,
    "dense": benchmark_dense,
    "nightly": benchmark_nightly,
    "files": benchmark_files,
    "startup": benchmark_startup,
    "postgres": benchmark_postgres,
    "growth": benchmark_growth,
    "trend": benchmark_trend,
}


def describe_machine() -> str:
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    processor = f"{cpu[1] if cpu else platform.machine()}, {CORES} usable cores"
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    python = f"Python {platform.python_version()}"
    peer = f"DuckDB {version('duckdb')}" if HAS_DUCKDB else "no DuckDB"
    return f"{processor}, {memory:.0f} GB of memory, {python}, {peer}"


def parse_options() -> Namespace:
    parser = ArgumentParser(
        description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )

    def add_number(name: str, default: int, meaning: str) -> None:
        meaning = f"{meaning} (default: {default:,})"
        parser.add_argument(name, type=int, default=default, help=meaning)

    add_number("--events", 2_500_000, "in the plain file")
    add_number("--gzip-events", 500_000, "in the gzip shards")
    add_number("--dense-events", 2_000_000, "in the dense file")
    add_number("--nightly-events", 600_000, f"in the shards of {NIGHTS} nights")
    add_number("--growth-events", 1_000_000, "in the smallest file of growth")
    add_number("--rounds", 5, "timed runs of each contender, after a warm-up")
    parser.add_argument(
        "--only", action="append", choices=PARTS, help="repeatable (default: all)"
    )
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    print("| input | contender | seconds | CPU s | ratio | peak MB |")
    print("| --- | --- | ---: | ---: | ---: | ---: |", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        options.dir = Path(directory)
        for part in options.only or PARTS:
            PARTS[part](options)
    NOTES.append(f"Ratios are to the first row of each input. {describe_machine()}.")
    print("", *NOTES, sep="\n")


if __name__ == "__main__":
    main()
