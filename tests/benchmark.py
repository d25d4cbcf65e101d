"""Time the loader against other ways to count the same active users, as whole processes that run in turn.

    python tests/benchmark.py --events 2500000

The input is made from the sample in data/; it takes 2.4 KB of disk for each of --events and --worst-events. It is read
from the page cache, so it should fit there. All contenders have to agree on every date, or the exit status is 1.
"""

import contextlib
import gzip
import importlib.util
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
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "data" / "bq-results-sample-data.jsons"
DATABASE = "benchmark.db"
PARTS = ["plain", "gzip", "worst", "startup"]
HAS_DUCKDB = importlib.util.find_spec("duckdb") is not None
CORES = len(os.sched_getaffinity(0))
DAYS, EVENTS_PER_USER, SHARDS = 30, 4, 16
ACTIVE = rb'"user_engagement".*"engagement_time_msec","value":{"int_value":"([3-9]\d{3}|\d{5,})"'  # in the sample

DUCKDB = r"""
import sys, duckdb
for date, count in duckdb.execute(
    r'''SELECT timezone('US/Central', make_timestamptz(event_timestamp))::DATE, count(DISTINCT user_pseudo_id)
       FROM read_ndjson(?, columns = {
           event_name: 'VARCHAR', event_timestamp: 'BIGINT', user_pseudo_id: 'VARCHAR',
           event_params: 'STRUCT("key" VARCHAR, "value" STRUCT(int_value BIGINT))[]'})
       WHERE event_name = 'user_engagement'
         AND len(list_filter(event_params, lambda p: p.key = 'engagement_time_msec' AND p.value.int_value >= 3000)) > 0
         AND len(list_filter(event_params, lambda p: p.key LIKE '%\_event' ESCAPE '\')) > 0
       GROUP BY ALL''', sys.argv[1:]).fetchall():
    print(date, count, sep=",")
"""

# Linux never gives the peak memory of a process as less than that of its parent. So this small one is the parent.
LAUNCHER = """
import os, sys, time
start = time.perf_counter()
_, status, usage = os.wait4(os.posix_spawnp(sys.argv[2], sys.argv[2:], os.environ), 0)
print(time.perf_counter() - start, usage.ru_maxrss * 1024, status, file=open(sys.argv[1], "w"))
"""
# US/Central is an alias of America/Chicago that some systems leave out; `date` would silently take it for UTC.
PYTHON = """
import collections, datetime, json, sys, zoneinfo
zone, users = zoneinfo.ZoneInfo("America/Chicago"), collections.defaultdict(set)
for line in open(sys.argv[1], "rb"):
    event = json.loads(line)
    if event["event_name"] != "user_engagement":
        continue
    values = {parameter["key"]: parameter["value"] for parameter in event["event_params"]}
    msec = values.get("engagement_time_msec", {}).get("int_value", 0)
    if int(msec) >= 3000 and any(key.endswith("_event") for key in values):
        date = datetime.datetime.fromtimestamp(int(event["event_timestamp"]) // 10**6, zone).date()
        users[date].add(event["user_pseudo_id"])
print(*(f"{date},{len(users[date])}" for date in users), sep="\\n")
"""
# The first half of a shell pipeline: a line "DATE USER" for each active event.
JQ = r"""jq -r 'select(.event_name == "user_engagement"
      and any(.event_params[]; .key == "engagement_time_msec" and (.value.int_value // 0 | tonumber) >= 3000)
      and any(.event_params[]; .key | endswith("_event")))
    | (.event_timestamp[:-6] | tonumber | strflocaltime("%Y-%m-%d")) + " " + .user_pseudo_id' "$1" """
GREP = r"""grep '"event_name":"user_engagement"' "$1" | perl -ne '
    my ($params) = /"event_params":\[(.*?)\],"/;
    next unless $params =~ /"key":"[^"]*_event"/;
    next unless $params =~ /"engagement_time_msec","value":\{"int_value":"(\d+)"/ && $1 >= 3000;
    /"event_timestamp":"(\d+)\d{6}".*"user_pseudo_id":"(\w+)"/ && print "$1 $2\n"' |
while read -r seconds user; do echo "$(date -d "@$seconds" +%F) $user"; done"""
COUNT = """ | sort -u | cut -d' ' -f1 | uniq -c | awk '{ print $2 "," $1 }'"""
SHELL = ["env", "LC_ALL=C", "TZ=America/Chicago", "sh", "-c"]


class Input(NamedTuple):
    """Some files, and the events and bytes (uncompressed) in them."""

    name: str
    events: int
    size: int
    files: list[str]


class Contender(NamedTuple):
    """A command; some neither count active users by date nor even read the events."""

    name: str
    command: list[str]
    counts: bool = True
    reads: bool = True


def write(path: Path, lines: list[bytes], plan: list[tuple[int, int]]) -> None:
    """Write repetitions of some lines, each with the mask that turns their users into others and the days to shift
    them by. A single formatting makes all lines of a repetition: that is quick."""
    if path.exists():
        return
    text = b"".join(lines)
    field = rb'("event_timestamp":")(\d{16})(".*"user_pseudo_id":")([0-9a-f]{32})'
    fields = [(int(match[2]), int(match[4], 16)) for match in re.finditer(field, text)]
    template = re.sub(field, rb"\1%d\3%032x", text.replace(b"%", b"%%"))
    unfinished = path.with_name(path.name + ".unfinished")
    with gzip.open(unfinished, "wb", 6) if path.suffix == ".gz" else unfinished.open("wb") as file:
        for mask, days in plan:
            shift = days * 86_400 * 10**6
            file.write(template % tuple(value for usec, user in fields for value in (usec + shift, user ^ mask)))
    unfinished.rename(path)


def make(name: str, lines: list[bytes], events: int, path: Path, returning: bool = True) -> Input:
    """Make an input of whole repetitions of some lines, its files in parallel."""
    count = -(-events // len(lines))
    shards, rng = min(SHARDS, count) if "*" in path.name else 1, random.Random(0)
    masks = [rng.getrandbits(128) for _ in range(max(count // EVENTS_PER_USER, 1) if returning else count)]
    plan = [(rng.choice(masks) if returning else masks[n], rng.randrange(DAYS)) for n in range(count)]
    paths = [path.with_name(path.name.replace("*", f"{shard:02}")) for shard in range(shards)]
    with multiprocessing.Pool(min(CORES, shards)) as pool:
        pool.starmap(write, [(path, lines, plan[shard::shards]) for shard, path in enumerate(paths)], chunksize=1)
    events, size = count * len(lines), count * sum(map(len, lines))
    return Input(f"{name} {events:,} events, {size / 1e9:.3g} GB", events, size, [str(path) for path in paths])


def run(contender: Contender, work: Path) -> tuple[float, float, dict[str, int]]:
    """Run a command, the loader into a database that was not there. Return its wall time in seconds, the peak memory in
    bytes of its largest process, and the active users by date."""
    database, usage, output = work / DATABASE, work / "benchmark.usage", work / "benchmark.output"
    database.unlink(missing_ok=True)
    with output.open("wb") as file:
        command = [sys.executable, "-ISc", LAUNCHER, str(usage), *contender.command]
        subprocess.run(command, stdin=subprocess.DEVNULL, stdout=file, check=True)
    seconds, peak_memory, exit_status = map(float, usage.read_text().split())
    if exit_status:
        sys.exit(f"{contender.name} failed")
    counts = {date: int(count) for date, count in re.findall(r"(\d{4}-\d\d-\d\d),(\d+)\n", output.read_text())}
    if database.exists():
        with contextlib.closing(sqlite3.connect(database)) as db:
            counts = dict(db.execute("SELECT date, active_user_count FROM active_user_table"))
    return seconds, peak_memory, counts


def compete(options: Namespace, source: Input, group: list[Contender], loader: float = 0, scale: float = 1) -> float:
    """Run contenders in turn, after an untimed round that warms the page cache; check that they agree; print the rows,
    seconds scaled. The first is the loader: return its seconds, unless given; then it is only there to agree with."""
    runs: list[list[tuple[float, float, dict[str, int]]]] = [[] for _ in group]
    for number in range(options.rounds + 1):
        print(f"{source.name}: round {number} of {options.rounds}", file=sys.stderr)
        for contender, timed in zip(group, runs, strict=True):
            timed.append(run(contender, options.dir))
            counts, expected = timed[-1][2], runs[0][0][2]
            if contender.counts and (counts != expected or not counts):
                dates = sorted(dict(counts.items() ^ expected.items()))
                sys.exit(f"{source.name}: {contender.name} and this loader do not agree on {dates or 'any date'}")
    for (name, _, _, reads), timed in list(zip(group, runs, strict=True))[1 if loader else 0 :]:
        seconds, peak = median(seconds for seconds, _, _ in timed[1:]), max(peak for _, peak, _ in timed)
        loader = loader or seconds
        speed = f"{source.size / seconds / 1e9:.3g} | {source.events / seconds:,.0f}" if reads else "- | -"
        memory = "< 12" if peak < 12e6 else f"{peak / 1e6:.0f}"  # as much as the launcher
        seconds *= scale
        print(f"| {source.name} | {name} | {seconds:.3g} | {speed} | {seconds / loader:.2f} | {memory} |", flush=True)
    return loader


def benchmark(options: Namespace) -> None:
    """Make the inputs, run the contenders, and print the rows of the table."""
    lines, events, parts = SAMPLE.read_bytes().splitlines(keepends=True), options.events, options.only or PARTS

    def loader(source: Input, *arguments: str) -> Contender:
        command = [sys.executable, str(ROOT / "load_active_users.py"), "--quiet", "--db", str(options.dir / DATABASE)]
        return Contender(" ".join(("this loader", *arguments)), [*command, *arguments, *source.files])

    def duckdb(path: Path) -> list[Contender]:
        return [Contender("DuckDB", [sys.executable, "-c", DUCKDB, str(path)])] if HAS_DUCKDB else []

    if "plain" in parts:
        path = options.dir / f"plain-{events}.jsons"
        source = make("plain:", lines, events, path)
        floor = Contender("`wc -l`, the floor", ["wc", "-l", str(path)], counts=False)
        seconds = compete(options, source, [loader(source), loader(source, "--workers=1"), *duckdb(path), floor])

        path = options.dir / f"slow-{min(options.slow_events, events)}.jsons"
        part = make("plain, scaled up from", lines, min(options.slow_events, events), path)
        slow = [loader(part), Contender("Python's json", [sys.executable, "-c", PYTHON, str(path)])]
        slow.append(Contender("grep, perl, date", [*SHELL, GREP + COUNT, "sh", str(path)]))
        if shutil.which("jq"):
            slow.append(Contender("jq", [*SHELL, JQ + COUNT, "sh", str(path)]))
        else:
            print(f"| {part.name} | jq: not installed | - | - | - | - | - |", flush=True)
        compete(options, part, slow, seconds, source.events / part.events)
    if "gzip" in parts:
        path = options.dir / f"gzip-{min(options.gzip_events, events)}-*.jsons.gz"
        source = make(f"gzip, {SHARDS} shards:", lines, min(options.gzip_events, events), path)
        compete(options, source, [loader(source), *duckdb(path)])
    if "worst" in parts:
        path = options.dir / f"worst-{options.worst_events}.jsons"
        active = [line for line in lines if re.search(ACTIVE, line)]
        source = make("all active, all users new:", active, options.worst_events, path, returning=False)
        compete(options, source, [loader(source), *duckdb(path)])
    if "startup" in parts:
        source = Input("start-up: the sample", len(lines), sum(map(len, lines)), [str(SAMPLE)])
        imports = "import click, dateutil.tz, sqlite3"
        bare = Contender(f"`{imports}`", [sys.executable, "-c", imports], counts=False, reads=False)
        compete(options, source, [loader(source), bare])


def machine() -> str:
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    duckdb = f"DuckDB {version('duckdb')}" if HAS_DUCKDB else "no DuckDB (`pip install duckdb` adds its rows)"
    processor = f"{cpu[1] if cpu else platform.machine()}, {CORES} usable cores, {memory:.0f} GB of memory"
    return f"{processor}, Python {platform.python_version()}, {duckdb}"


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    for name, default, meaning in (
        ("--events", 2_500_000, "in the plain file"),
        ("--gzip-events", 500_000, "in the gzip shards, --events at most"),
        ("--worst-events", 2_000_000, "in the worst case"),
        ("--slow-events", 20_000, "for the slow contenders"),
        ("--rounds", 5, "timed runs of each contender, after a warm-up"),
    ):
        parser.add_argument(name, type=int, default=default, help=f"{meaning} (default: {default:,})")
    parser.add_argument("--only", action="append", choices=PARTS, help="repeatable (default: all)")
    parser.add_argument("--dir", type=Path, help="where the input is kept for the next time (default: it is removed)")
    options = parser.parse_args()
    print("| input | contender | median s | GB/s | events/s | ratio | peak MB |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |", flush=True)
    with contextlib.ExitStack() as stack:
        options.dir = options.dir or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        options.dir.mkdir(parents=True, exist_ok=True)
        benchmark(options)
    print(f"\nRatios are of the medians, to this loader. {machine()}.")


if __name__ == "__main__":
    main()
