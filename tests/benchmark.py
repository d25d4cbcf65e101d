"""Time the loader against other ways to count the same active users.

Whole processes run in turn.

    python tests/benchmark.py --only dense --only startup

The inputs are made from the sample in data/, 2.4 KB of disk for each of --events (the
cluster reads them four times) and 360 bytes for each of --dense-events and of up to 15
times --growth-events. They are read from the page cache, so they should fit there.
Contenders have to agree on every date, or the exit status is 1.

CPU is user and system time of all processes, on a cluster those of its scheduler and
workers too, but with PostgreSQL those of the loader alone. The peak memory is that of
the largest process.
"""

import contextlib
import gzip
import importlib.util
import itertools
import multiprocessing
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import tempfile
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "data" / "bq-results-sample-data.jsons"
PARTS = ["plain", "gzip", "dense", "startup", "cluster", "postgres", "growth"]
HAS_DUCKDB = importlib.util.find_spec("duckdb") is not None
CORES = len(os.sched_getaffinity(0))
DAYS, EVENTS_PER_USER, SHARDS = 30, 4, 16
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

PARAMETERS = (
    '{"key":"firebase_screen_class","value":{"string_value":"MainActivity"}}',
    '{"key":"engaged_session_event","value":{"int_value":"1"}}',
    '{"key":"engagement_time_msec","value":{"int_value":"%d"}}',
)
DENSE = f"""{{"event_date":"20200101","event_timestamp":"%d",\
"event_name":"user_engagement","event_params":[{",".join(PARAMETERS)}],"user_pseudo_id":"%032x"}}\n"""


class Input(NamedTuple):
    """Some files; the name tells the events and bytes (uncompressed) in them."""

    name: str
    files: list[str]


class Contender(NamedTuple):
    """A command, and what is done before it. Some do not count active users by date.
    processes are those that work for it besides its own."""

    name: str
    command: list[str]
    before: Callable[[], object] = lambda: None
    counts: bool = True
    processes: tuple[int, ...] = ()


class Timing(NamedTuple):
    """Of a run: seconds of wall time and of CPU, bytes of peak memory, active users by
    date."""

    seconds: float
    cpu: float
    peak_memory: float
    counts: dict[str, int]


def write(path: Path, lines: list[bytes], plan: list[tuple[int, int]]) -> None:
    """Write repetitions of some lines, each with the mask that turns their users into
    others and the days to shift them by. A single formatting makes all lines of a
    repetition, quickly."""
    if path.exists():
        return
    text = b"".join(lines)
    field = rb'("event_timestamp":")(\d{16})(".*"user_pseudo_id":")([0-9a-f]{32})'
    fields = [(int(match[2]), int(match[4], 16)) for match in re.finditer(field, text)]
    template = re.sub(field, rb"\1%d\3%032x", text.replace(b"%", b"%%"))
    unfinished = path.with_name(path.name + ".unfinished")
    with (
        gzip.open(unfinished, "wb", 6)
        if path.suffix == ".gz"
        else unfinished.open("wb") as file
    ):
        for mask, days in plan:
            shift = days * 86_400 * 10**6
            pairs = ((usec + shift, user ^ mask) for usec, user in fields)
            file.write(template % tuple(itertools.chain.from_iterable(pairs)))
    unfinished.rename(path)


def make(name: str, events: int, path: Path) -> Input:
    """Make an input of whole repetitions of the sample, its files in parallel."""
    lines = SAMPLE.read_bytes().splitlines(keepends=True)
    count = -(-events // len(lines))
    shards, rng = min(SHARDS, count) if "*" in path.name else 1, random.Random(0)
    masks = [rng.getrandbits(128) for _ in range(max(count // EVENTS_PER_USER, 1))]
    plan = [(rng.choice(masks), rng.randrange(DAYS)) for _ in range(count)]
    paths = [
        path.with_name(path.name.replace("*", f"{shard:02}")) for shard in range(shards)
    ]
    parts = [(path, lines, plan[shard::shards]) for shard, path in enumerate(paths)]
    with multiprocessing.Pool(min(CORES, shards)) as pool:
        pool.starmap(write, parts, chunksize=1)
    events, size = count * len(lines), count * sum(map(len, lines))
    return Input(
        f"{name} {events:,} events, {size / 1e9:.3g} GB", [str(path) for path in paths]
    )


def make_dense(options: Namespace, events: int, seed: int = 0) -> Input:
    """Make an input of short lines, all active events of new users on four dates."""
    path, rng = options.dir / f"dense-{events}-{seed}.jsons", random.Random(seed)
    if not path.exists():
        unfinished = path.with_name(path.name + ".unfinished")
        with unfinished.open("w") as file:
            for number in range(events):
                usec = (
                    1_577_880_000 + rng.randrange(4 * 86_400)
                ) * 10**6 + number % 10**6
                file.write(
                    DENSE % (usec, rng.randrange(3000, 90_000), rng.getrandbits(128))
                )
        unfinished.rename(path)
    return Input(
        f"dense: {events:,} events, {path.stat().st_size / 1e9:.3g} GB", [str(path)]
    )


def cpu_time(processes: tuple[int, ...]) -> float:
    """The CPU time in seconds that some running processes have taken."""
    stats = [
        Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        for pid in processes
    ]
    return sum(int(stat[11]) + int(stat[12]) for stat in stats) / os.sysconf(
        "SC_CLK_TCK"
    )


def run(contender: Contender, work: Path) -> Timing:
    """Run a command."""
    contender.before()
    usage, output = work / "benchmark.usage", work / "benchmark.output"
    before = cpu_time(contender.processes)
    with output.open("wb") as file:
        command = [sys.executable, "-ISc", LAUNCHER, str(usage), *contender.command]
        subprocess.run(command, stdin=subprocess.DEVNULL, stdout=file, check=True)
    seconds, cpu, peak_memory, exit_status = map(float, usage.read_text().split())
    cpu += cpu_time(contender.processes) - before
    if exit_status:
        sys.exit(f"{contender.name} failed")
    rows = re.findall(r"(\d{4}-\d\d-\d\d),(\d+)(?=[,\n])", output.read_text())
    return Timing(seconds, cpu, peak_memory, {date: int(count) for date, count in rows})


def compete(options: Namespace, source: Input, group: list[Contender]) -> None:
    """Run contenders in turn, after an untimed round that warms the page cache; check
    that they agree; print the rows, with ratios to the first."""
    if not HAS_DUCKDB:
        group = [
            contender for contender in group if not contender.name.startswith("DuckDB")
        ]
    runs: list[list[Timing]] = [[] for _ in group]
    for number in range(options.rounds + 1):
        print(f"{source.name}: round {number} of {options.rounds}", file=sys.stderr)
        for contender, timed in zip(group, runs, strict=True):
            timed.append(run(contender, options.dir))
            counts, expected = timed[-1].counts, runs[0][0].counts
            if contender.counts and (counts != expected or not counts):
                dates = sorted(dict(counts.items() ^ expected.items()))
                what = f"disagrees on {dates or 'any date'}"
                sys.exit(f"{source.name}: {contender.name} {what}")
    base = 0.0
    for contender, timed in zip(group, runs, strict=True):
        seconds = median(timing.seconds for timing in timed[1:])
        cpu = median(timing.cpu for timing in timed[1:])
        peak = max(timing.peak_memory for timing in timed)
        base = base or seconds
        memory = (
            "< 12" if peak < 12e6 else f"{peak / 1e6:.0f}"
        )  # as much as the launcher
        row = (
            source.name,
            contender.name,
            f"{seconds:.3g}",
            f"{cpu:.3g}",
            f"{seconds / base:.2f}",
        )
        print("|", " | ".join((*row, memory)), "|", flush=True)


def loads(name: str, command: list[str], path: Path, *more: str) -> Contender:
    """A contender that loads into a database that is not there before."""
    before = lambda: path.unlink(missing_ok=True)  # noqa: E731
    return Contender(name, [sys.executable, *command, str(path), *more], before)


def loader(
    options: Namespace, source: Input, *arguments: str, db: str = "first.db"
) -> Contender:
    command = [str(ROOT / "load_active_users.py"), "--format", "csv", "--db"]
    name = " ".join(("this loader", *arguments))
    return loads(name, command, options.dir / db, *arguments, *source.files)


def duckdb(options: Namespace, source: Input) -> Contender:
    command = ["-c", DUCKDB_KEEPS]
    return loads(
        "DuckDB, keeping users", command, options.dir / "first.duckdb", *source.files
    )


def forgetful_duckdb(source: Input) -> Contender:
    return Contender(
        "DuckDB, keeping nobody", [sys.executable, "-c", DUCKDB_COUNTS, *source.files]
    )


def first_and_again(contender: Contender) -> list[Contender]:
    """A first load, and then the same once more."""
    again = contender._replace(name=f"{contender.name}, again", before=lambda: None)
    return [contender._replace(name=f"{contender.name}, first"), again]


def benchmark_plain(options: Namespace) -> None:
    path = options.dir / f"plain-{options.events}.jsons"
    source = make("plain:", options.events, path)
    floor = Contender("`wc -l`, the floor", ["wc", "-l", str(path)], counts=False)
    group = [loader(options, source), loader(options, source, "--workers=1")]
    group += [forgetful_duckdb(source), duckdb(options, source), floor]
    compete(options, source, group)


def benchmark_gzip(options: Namespace) -> None:
    path = options.dir / f"gzip-{options.gzip_events}-*.jsons.gz"
    source = make(f"gzip, {SHARDS} shards:", options.gzip_events, path)
    compete(options, source, [loader(options, source), forgetful_duckdb(source)])


def benchmark_dense(options: Namespace) -> None:
    source = make_dense(options, options.dense_events)
    group = first_and_again(loader(options, source)) + first_and_again(
        duckdb(options, source)
    )
    compete(options, source, [*group, forgetful_duckdb(source)])


def benchmark_startup(options: Namespace) -> None:
    imports = "import click, dateutil.tz, sqlite3"
    bare = Contender(f"`{imports}`", [sys.executable, "-c", imports], counts=False)
    source = Input("start-up: the sample", [str(SAMPLE)])
    compete(options, source, [loader(options, source), bare])


def benchmark_cluster(options: Namespace) -> None:
    """Two workers of a cluster on this machine against two local ones."""
    from servers import Cluster

    source = make(
        "plain:", options.events, options.dir / f"plain-{options.events}.jsons"
    )
    source = Input(f"4 x {source.name}", 4 * source.files)
    with tempfile.TemporaryDirectory() as directory:
        cluster = Cluster(Path(directory))
        try:
            cluster.workers(2)
            remote = loader(options, source, "--cluster", cluster.address)
            processes = tuple(process.pid for process in cluster.processes)
            remote = remote._replace(
                name="this loader, cluster of 2 workers", processes=processes
            )
            compete(options, source, [loader(options, source, "--workers=2"), remote])
        finally:
            cluster.close()


def benchmark_postgres(options: Namespace) -> None:
    """The loader's part of loading into PostgreSQL, on this machine, where it is
    installed."""
    import psycopg
    from servers import INITDB, running_postgres

    if not INITDB.exists():
        print("PostgreSQL is not installed: its rows are left out", file=sys.stderr)
        return
    source = make_dense(options, options.dense_events)
    with running_postgres() as server:

        def drop() -> None:
            with psycopg.connect(f"{server.url}postgres") as db:
                tables = "active_user_table, active_user, load_log"
                db.execute(f"DROP TABLE IF EXISTS {tables} CASCADE".encode())

        remote = loader(options, source, "--db", f"{server.url}postgres")
        remote = remote._replace(name="this loader, PostgreSQL", before=drop)
        compete(options, source, [loader(options, source), *first_and_again(remote)])


def benchmark_growth(options: Namespace) -> None:
    """1, 2, 4, 8 times the user-days; and as many new ones into a table that holds ever
    more."""
    one = options.growth_events
    held, grown = 0, options.dir / "grown.db"
    grown.unlink(missing_ok=True)
    new = make_dense(options, one, seed=9)
    for times in (1, 2, 4, 8):
        source = make_dense(options, one * times, times)
        group = first_and_again(loader(options, source)) + first_and_again(
            duckdb(options, source)
        )
        compete(options, source, group)
        run(
            loader(options, source, db=grown.name)._replace(before=lambda: None),
            options.dir,
        )
        held += one * times
        more = loader(options, new)
        more = more._replace(
            before=lambda: shutil.copyfile(grown, options.dir / "first.db")
        )
        compete(
            options,
            new._replace(name=f"{new.name}, new to a table of {held:,}"),
            [more],
        )
    size = grown.stat().st_size / held
    print(f"\n{size:.0f} bytes per user-day in SQLite, of {held:,}\n")


def machine() -> str:
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    peer = (
        f"DuckDB {version('duckdb')}" if HAS_DUCKDB else "no DuckDB: pip install duckdb"
    )
    processor = f"{cpu[1] if cpu else platform.machine()}, {CORES} usable cores"
    python = f"Python {platform.python_version()}"
    return f"{processor}, {memory:.0f} GB of memory, {python}, {peer}"


def main() -> None:
    parser = ArgumentParser(
        description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    for name, default, meaning in (
        ("--events", 2_500_000, "in the plain file"),
        ("--gzip-events", 500_000, "in the gzip shards"),
        ("--dense-events", 2_000_000, "in the dense file"),
        ("--growth-events", 1_000_000, "in the smallest file of growth"),
        ("--rounds", 5, "timed runs of each contender, after a warm-up"),
    ):
        parser.add_argument(
            name, type=int, default=default, help=f"{meaning} (default: {default:,})"
        )
    parser.add_argument(
        "--only", action="append", choices=PARTS, help="repeatable (default: all)"
    )
    parser.add_argument(
        "--dir", type=Path, help="where to keep the input (default: it is removed)"
    )
    options = parser.parse_args()
    print("| input | contender | seconds | CPU s | ratio | peak MB |")
    print("| --- | --- | ---: | ---: | ---: | ---: |", flush=True)
    with contextlib.ExitStack() as stack:
        temporary = stack.enter_context(tempfile.TemporaryDirectory())
        options.dir = options.dir or Path(temporary)
        options.dir.mkdir(parents=True, exist_ok=True)
        for part in options.only or PARTS:
            globals()[f"benchmark_{part}"](options)
    print(f"\nRatios are of the medians, to the first row of each input. {machine()}.")


if __name__ == "__main__":
    main()
