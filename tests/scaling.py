"""Measure what a cluster, its client, SQLite and PostgreSQL take, for the README's table of where each gives out.

    python tests/scaling.py --events 2500000

The input is made by benchmark.py and takes 2.4 KB of disk for each event; PostgreSQL is measured where its server is
installed. It is read from the page cache, so it should fit there.
"""

import os
import pickle
import re
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser
from pathlib import Path
from statistics import median

import psycopg
from benchmark import ACTIVE, SAMPLE, make
from conftest import SCRIPT
from test_cluster import Cluster
from test_postgres import BIN, running

from load_active_users import BATCH, Merger, Range, Rule, Scanner, ranges, store


def seconds(*args: object, rounds: int = 3) -> float:
    """The median time of a load into a new database."""
    times = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as directory:
            start = time.perf_counter()
            command = [sys.executable, SCRIPT, "-q", "--db", f"{directory}/x.db", *args]
            subprocess.run(list(map(str, command)), check=True)
            times.append(time.perf_counter() - start)
    return median(times)


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--events", type=int, default=2_500_000)
    parser.add_argument("--users", type=int, default=2_000_000)
    parser.add_argument("--dir", type=Path, help="where the input is kept for the next time (default: it is removed)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        directory = options.dir or Path(temporary)
        lines = SAMPLE.read_bytes().splitlines(keepends=True)
        plain = make("plain:", lines, options.events, directory / f"plain-{options.events}.jsons")
        active = [line for line in lines if re.search(ACTIVE, line)]
        worst = make("", active, options.users, directory / f"worst-{options.users}.jsons", returning=False)

        (Path(temporary) / "cluster").mkdir()
        cluster, files = Cluster(Path(temporary) / "cluster"), plain.files * 4
        for workers in (1, 2):
            cluster.worker()
            seconds("--cluster", cluster.address, SAMPLE, rounds=1)
            local, remote = seconds("--workers", workers, *files), seconds("--cluster", cluster.address, *files)
            print(
                f"{4 * plain.size / 1e9:.3g} GB, {workers} workers: local {local:.2f} s, cluster {remote:.2f} s", end=""
            )
            print(f", {remote / local - 1:.0%} more", flush=True)
        cluster.stop()

        scan, parts = Scanner(Rule("US/Central", 3000, ["*_event"])), ranges(worst.files, 8 * BATCH)[:8]
        sent = [pickle.dumps(list(scan(part)), 5) for part in parts]
        merger, start = Merger([Range("x")] * len(parts)), time.perf_counter()
        for index, message in enumerate(sent):
            for batch in pickle.loads(message):
                merger.add(index, batch)
        merger.stage()
        merged = time.perf_counter() - start
        counts = store(f"{temporary}/x.db", scan.rule, merger, "", [], replace=False, dry_run=False)
        stored = time.perf_counter() - start - merged
        total = sum(count.added for count in counts)
        print(f"{total:,} new user-days: {sum(map(len, sent)) / total:.0f} bytes each on the wire, ", end="")
        print(f"{merged / total * 1e6:.2f} µs to merge, {stored / total * 1e6:.2f} µs and ", end="")
        print(f"{os.path.getsize(f'{temporary}/x.db') / total:.0f} bytes in SQLite", flush=True)

        if (BIN / "initdb").exists():
            with running() as server:
                start = time.perf_counter()
                command = [sys.executable, SCRIPT, "-q", "--db", f"{server}postgres", *worst.files]
                subprocess.run(list(map(str, command)), check=True)
                taken = (
                    time.perf_counter() - start - seconds("--dry-run", "--min-engagement-msec", 10**15, *worst.files)
                )
                with psycopg.connect(f"{server}postgres") as db:
                    size, rows = db.execute(
                        "SELECT pg_total_relation_size('active_user'), (SELECT count(*) FROM active_user)"
                    ).fetchone()
            print(f"{rows:,} new user-days: {taken / rows * 1e6:.1f} µs and {size / rows:.0f} bytes each in PostgreSQL")


if __name__ == "__main__":
    main()
