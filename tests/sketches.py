"""Measure what counting with HyperLogLog sketches would cost in accuracy, against the exact table.

    pip install datasketches
    python tests/sketches.py --users 1000000

Makes events of users who come back at random, loads them, and counts the same users again with one sketch a date.
"""

import json
import random
import sqlite3
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser
from contextlib import closing
from pathlib import Path
from statistics import median

from conftest import NOON, SCRIPT, event
from datasketches import hll_sketch, hll_union, tgt_hll_type

DAY = 86_400 * 10**6
DAYS, SHARE = 28, 0.05  # of the users are active on a date


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--users", type=int, default=1_000_000)
    users, rng = parser.parse_args().users, random.Random(0)
    with tempfile.TemporaryDirectory() as directory:
        path, database = Path(directory, "events.jsons"), Path(directory, "exact.db")
        names = [f"{rng.getrandbits(128):032x}" for _ in range(users)]
        template = json.dumps(event(user="USER", time="TIME")) + "\n"
        with path.open("w") as file:
            for day in range(DAYS):
                lines = template.replace("TIME", str(NOON + day * DAY))
                file.writelines(lines.replace("USER", name) for name in rng.sample(names, round(users * SHARE)))
        subprocess.run([sys.executable, SCRIPT, "-q", "--db", database, path], check=True)
        with closing(sqlite3.connect(database)) as db:
            exact = dict(db.execute("SELECT date, active_user_count FROM active_user_table"))
            monthly = db.execute("SELECT monthly_active_users FROM active_user_trend ORDER BY date DESC").fetchone()[0]
            active = {
                date: db.execute("SELECT user_pseudo_id FROM active_user WHERE date = ?", (date,)) for date in exact
            }
            active = {date: [user for (user,) in rows] for date, rows in active.items()}
        total = sum(exact.values())
        size = database.stat().st_size / total
        print(f"{users:,} users, {DAYS} dates, {total:,} user-days of {size:.0f} bytes in the exact tables\n")
    print("| sketch | bytes a date | error a date: median | largest | of 28 days | user-days/s |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for lg_k in (10, 12, 14, 16):
        start, sketches = time.perf_counter(), {}
        for date, present in active.items():
            sketches[date] = hll_sketch(lg_k, tgt_hll_type.HLL_8)
            for user in present:
                sketches[date].update(user)
        speed = total / (time.perf_counter() - start)
        union = hll_union(lg_k)
        for sketch in sketches.values():
            union.update(sketch)
        errors = [abs(sketch.get_estimate() / exact[date] - 1) for date, sketch in sketches.items()]
        size = max(len(sketch.serialize_compact()) for sketch in sketches.values())
        month = abs(union.get_result(tgt_hll_type.HLL_8).get_estimate() / monthly - 1)
        print(f"| lg k = {lg_k} | {size:,} | {median(errors):.2%} | {max(errors):.2%} | {month:.2%} | {speed:,.0f} |")


if __name__ == "__main__":
    main()
