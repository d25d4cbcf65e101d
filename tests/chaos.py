"""Load events while producers, loaders and databases die, and check what loads claim.

    python tests/chaos.py --minutes 10 --seed 1

Each round starts loads of one database. Random blows hit the loads, their producers
and the database. Then the database must hold what the loads said that it holds. The
first round with a difference ends the run with exit status 1. With --minutes 10 or
more, a server sometimes hangs for longer than a minute. Needs Linux.
"""

import argparse
import fcntl
import gzip
import json
import os
import pwd
import random
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import termios
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from datetime import date, timedelta
from functools import partial
from pathlib import Path
from signal import SIGCONT, SIGHUP, SIGINT, SIGKILL, SIGQUIT, SIGSTOP, SIGTERM
from typing import Any, NamedTuple

import psycopg

# The words of a load. A batch load that ends with "Error: " says that it was refused.
LOADED_ALL = re.compile(r"the load is committed")
LOADED_PERHAPS = re.compile(r"may be committed")
LOADED_NOTHING = re.compile(r"rolled back|nothing was loaded|^Error: ", re.MULTILINE)
NOT_STORED = re.compile(r"not stored: .*lines that were read \((\d+)\), up to -:(\d+)")
UNCAUGHT = re.compile(r"Traceback|Exception ignored|Fatal Python error")

# Seconds until a load must have ended or spoken.
AFTER_SIGNAL = 75
AFTER_TWO_SIGNALS = 20
AFTER_SIGNAL_IN_HEALTH = 15  # a batch load while nothing hangs
SILENCE = 75  # of a live load while its database hangs

BLOWS = 8  # seconds
LONG_HANG = 85  # seconds
LONG_ROUNDS = 24  # from each long round to the next
STOPS = (SIGTERM, SIGINT, SIGHUP)
NOON = 1577728800_000000  # 2019-12-30 12:00 in US/Central, in microseconds UTC
DAY = 86_400_000_000  # microseconds
FAR = date(2030, 1, 1)  # load n counts dates until n days later: its mark in load_log
SCRIPT = Path(__file__).resolve().parent.parent / "load_active_users.py"
BIN = max(
    Path("/usr/lib/postgresql").glob("*/bin"),
    default=Path(shutil.which("initdb") or "/none").parent,
)
PRODUCER = """
import os, random, sys, time
piece, pause, linger = map(float, sys.argv[1:])
while os.splice(0, 1, random.randint(1, int(piece))):  # moves the file's offset exactly
    time.sleep(random.random() * pause)
time.sleep(linger)
"""


# -- Loads -----------------------------------------------------------------------------


class Reading(NamedTuple):
    """How much a load has read."""

    lines: int  # with their newlines
    has_rest: bool  # a last line without its newline
    is_event: bool  # that line
    left: int  # bytes in the pipe


@dataclass
class Load:
    """A run of the loader, maybe with a producer. Its line n is of its user n."""

    number: int
    is_live: bool
    tolerates: bool  # one bad record, as a line is that a producer did not end
    directory: Path
    names: list[str] = field(default_factory=list)  # of files
    in_files: int = 0  # lines
    pace: list[float] = field(default_factory=list)  # of the producer: its arguments
    file: Any = None  # that the producer reads
    pipe: int = -1
    process: Any = None
    producer: Any = None
    sent: list[int] = field(default_factory=list)  # signals
    due: float = float("inf")  # when it must have ended

    def start(self, target: str) -> None:
        options = ["-q", "--db", target, "--dates", f"..{self.mark()}"]
        options += ["--max-bad-records", "1"] * self.tolerates
        options += ["--commit-every", "1"] * self.is_live
        if self.pace:
            self.start_producer()
        events = [*self.names, *["-"] * bool(self.pace)]
        with open(self.path("stderr"), "wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, SCRIPT, *options, *events],
                stdin=self.pipe if self.pace else subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                cwd=self.directory,
                start_new_session=True,
            )

    def start_producer(self) -> None:
        self.file = open(self.path("pipe"), "rb", buffering=0)
        self.pipe, write_end = os.pipe()
        self.producer = subprocess.Popen(
            [sys.executable, "-SEc", PRODUCER, *map(str, self.pace)],
            stdin=self.file,
            stdout=write_end,
            start_new_session=True,
        )
        os.close(write_end)

    def end_producer(self) -> None:
        if self.producer:
            self.producer.kill()
            self.producer.wait()

    def close(self) -> None:
        self.end_producer()
        if self.process:
            self.process.kill()
            self.process.wait()
        if self.producer:
            self.file.close()
            os.close(self.pipe)

    def mark(self) -> date:
        return FAR + timedelta(self.number)

    def path(self, what: object) -> Path:
        return self.directory / f"{self.number}-{what}"

    def write_events(self, what: object, users: range, is_packed: bool = False) -> str:
        """Write a file of one active event for each user; return its name."""
        params = [
            {"key": "x_event", "value": {"int_value": 1}},
            {"key": "engagement_time_msec", "value": {"int_value": "3000"}},
        ]
        lines = []
        for user in users:
            event = {"event_name": "user_engagement"}
            event["event_timestamp"] = str(NOON + user % 3 * DAY)
            event["user_pseudo_id"] = f"{self.number}-{user}"
            lines.append(json.dumps({**event, "event_params": params}) + "\n")
        data = "".join(lines).encode()
        self.path(what).write_bytes(gzip.compress(data, 1) if is_packed else data)
        return self.path(what).name

    def runs(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def handles_stops(self) -> bool:
        """Return whether its script has begun and has work to do."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        caught = re.search(r"SigCgt:\s+(\w+)", status)
        last = SIGHUP if self.is_live else SIGTERM
        return bool(caught and int(caught[1], 16) >> (last - 1) & 1)

    def stops(self) -> list[int]:
        return [number for number in self.sent if number in STOPS]

    def said(self) -> str:
        return self.path("stderr").read_text()

    def measure(self) -> Reading:
        if not self.producer:
            return Reading(self.in_files, False, False, 0)
        answer = fcntl.ioctl(self.pipe, termios.FIONREAD, bytes(4))
        left = int.from_bytes(answer, sys.byteorder)
        data = self.path("pipe").read_bytes()[: self.file.tell() - left]
        rest = data.rpartition(b"\n")[2]
        lines = self.in_files + data.count(b"\n")
        return Reading(lines, bool(rest), rest.endswith(b"}]}"), left)

    def describe(self) -> str:
        kind = "live" if self.is_live else "batch"
        status = self.process.poll() if self.process else "not started"
        return f"load {self.number} ({kind}, pipe {self.pace}, exit status {status})"


# -- Databases -------------------------------------------------------------------------


class Trouble(NamedTuple):
    """What a database suffers for some seconds."""

    name: str
    begin: Callable[[], object]
    end: Callable[[], object]
    is_hang: bool = False  # of all loads
    is_repeated: bool = False  # its beginning


class Sqlite:
    """SQLite, with a file for each round."""

    TABLES = "SELECT name FROM sqlite_master WHERE name = 'load_log'"
    has_server = False

    def renew(self, directory: Path) -> None:
        self.target = str(directory / "round.db")

    def query(self, sql: str) -> list[Any]:
        with closing(sqlite3.connect(self.target)) as db:
            return db.execute(sql).fetchall()

    def lock(self, *statements: str) -> None:
        self.locker = sqlite3.connect(self.target, 1, isolation_level=None)
        with suppress(sqlite3.OperationalError):  # a load is just writing
            for statement in statements:
                self.locker.execute(statement).fetchall()

    def list_troubles(self) -> list[Trouble]:
        ways = {
            "another program writes": ["BEGIN IMMEDIATE"],
            "another program excludes all": ["BEGIN EXCLUSIVE"],
            "another program reads": ["BEGIN", self.TABLES],
        }
        return [
            Trouble(name, partial(self.lock, *way), lambda: self.locker.close())
            for name, way in ways.items()
        ]

    def settle(self) -> None:
        """Wait for nothing: a transaction ends with its process."""


class Postgres:
    """A PostgreSQL server, with a database for each round."""

    TABLES = "SELECT tablename FROM pg_tables WHERE tablename = 'load_log'"
    SESSIONS = """FROM pg_stat_activity WHERE datname LIKE 'round%'
        AND backend_type = 'client backend' AND pid <> pg_backend_pid()"""
    has_server = True

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.user: dict[str, Any] = {}
        self.frozen: list[int] = []
        self.number = 0
        self.name = "round"
        password = directory / "password"
        password.write_text("chaos")
        if os.geteuid() == 0:  # which PostgreSQL refuses to run as
            account = pwd.getpwnam("postgres")
            ids = {"user": account.pw_uid, "group": account.pw_gid}
            self.user = {**ids, "extra_groups": []}
            for path in (directory, password):
                os.chown(path, account.pw_uid, account.pw_gid)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.server_url = f"postgresql://loader@127.0.0.1:{port}/"
        os.environ["PGPASSWORD"] = "chaos"
        initdb = f"{BIN}/initdb -A scram-sha-256 -E UTF8 --wal-segsize=1 --no-sync"
        initdb += f" -U loader --pwfile={password} -D {directory}/data"
        self.command = f"{BIN}/postgres -D {directory}/data -k {directory} -p {port}"
        self.command += " -c listen_addresses=127.0.0.1 -c shared_buffers=16MB"
        silent: Any = {"stdout": subprocess.DEVNULL, "cwd": "/"}
        subprocess.run(initdb.split(), check=True, **silent, **self.user)
        self.start()

    def start(self) -> None:
        with open(self.directory / "log", "ab") as log:
            self.server = subprocess.Popen(
                self.command.split(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                start_new_session=True,
                **self.user,
            )
        self.ask("postgres", "SELECT 1")

    def stop(self, number: int) -> None:
        self.server.send_signal(number)
        self.server.wait(60)

    def renew(self, directory: Path) -> None:
        self.ask("postgres", f"DROP DATABASE IF EXISTS {self.name}")
        self.number += 1
        self.name = f"round{self.number}"
        self.target = self.server_url + self.name
        self.ask("postgres", f"CREATE DATABASE {self.name}")

    def ask(self, database: str, sql: str) -> list[Any]:
        """Return the rows of a query, as soon as the server answers."""
        url = self.server_url + database
        for _ in range(600):
            try:
                with psycopg.connect(url, autocommit=True) as connection:
                    cursor = connection.execute(sql.encode())
                    return cursor.fetchall() if cursor.description else []
            except psycopg.OperationalError:
                time.sleep(0.1)
        raise TimeoutError((self.directory / "log").read_text()[-2000:])

    def query(self, sql: str) -> list[Any]:
        return self.ask(self.name, sql)

    def freeze(self, has_postmaster: bool) -> None:
        """Stop all processes of the server, as a machine that hangs does."""
        if has_postmaster:
            self.server.send_signal(SIGSTOP)
        for path in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):  # it has ended
                parent = path.read_text().rpartition(")")[2].split()[1]
                if int(parent) == self.server.pid:
                    os.kill(int(path.parent.name), SIGSTOP)
                    self.frozen.append(int(path.parent.name))

    def thaw(self) -> None:
        for pid in (self.server.pid, *self.frozen):
            with suppress(ProcessLookupError):
                os.kill(pid, SIGCONT)
        self.frozen = []

    def configure(self, setting: str) -> None:
        self.query(f"ALTER SYSTEM {setting}")
        self.query("SELECT pg_reload_conf()")

    def list_troubles(self) -> list[Trouble]:
        reset = partial(self.configure, "RESET ALL")
        limit = "SET idle_in_transaction_session_timeout = '1ms'"
        idle = partial(self.configure, limit)
        lone = partial(self.configure, "SET synchronous_standby_names = 'missing'")
        kill = partial(self.query, f"SELECT pg_terminate_backend(pid) {self.SESSIONS}")
        fast, crash = partial(self.stop, SIGINT), partial(self.stop, SIGQUIT)
        backends, machine = partial(self.freeze, False), partial(self.freeze, True)
        return [
            Trouble("the server is stopped, -m fast", fast, self.start),
            Trouble("the server is stopped, -m immediate", crash, self.start),
            Trouble("sessions are terminated", kill, kill, is_repeated=True),
            Trouble("idle transactions are ended", idle, reset),
            Trouble("COMMIT waits for a standby", lone, reset, is_hang=True),
            Trouble("backends freeze", backends, self.thaw),
            Trouble("the server freezes", machine, self.thaw, is_hang=True),
        ]

    def settle(self) -> None:
        """Wait until no session is left, which might commit yet."""
        for _ in range(600):
            if not self.query(f"SELECT pid {self.SESSIONS}"):
                return
            time.sleep(0.1)
        raise TimeoutError("sessions remain on the server a minute after their loads")

    def close(self) -> None:
        self.thaw()
        self.stop(SIGQUIT)


Database = Sqlite | Postgres


# -- What loads say, and what is there -------------------------------------------------


def look(database: Database, sql: str) -> list[Any]:
    """Return what is in the tables, if there are any yet."""
    return database.query(sql) if database.query(database.TABLES) else []


def find_users(database: Database, load: Load) -> set[int]:
    pattern = f"'{load.number}-%'"
    sql = f"SELECT user_pseudo_id FROM active_user WHERE user_pseudo_id LIKE {pattern}"
    return {int(user.partition("-")[2]) for [user] in look(database, sql)}


def check_tables(database: Database) -> Iterator[str]:
    """Yield how the tables contradict each other."""
    counts = look(database, "SELECT date, active_user_count FROM active_user_table")
    users = look(database, "SELECT date, count(*) FROM active_user GROUP BY date")
    added = sum(row[0] for row in look(database, "SELECT added FROM load_log"))
    if sorted(counts) != sorted(users) or added != sum(row[1] for row in users):
        yield f"active_user_table {counts}, active_user {users}, load_log {added} added"


def list_counts(load: Load) -> Collection[int]:
    """Return how many users of a load may be there, by what it has said."""
    read, said, status = load.measure(), load.said(), load.process.returncode
    all_ = range(read.lines, read.lines + read.is_event + 1)
    if load.is_live:
        if status < 0:
            return range(all_.stop)
        found = NOT_STORED.search(said)
        if not found:
            return all_
        last = int(found[2])
        stored = last - int(found[1])
        most = min(last, all_[-1]) if LOADED_PERHAPS.search(said) else stored
        return range(stored, max(stored, most) + 1)
    if status == 0 or LOADED_ALL.search(said):
        return all_
    is_open = status < 0 or LOADED_PERHAPS.search(said)
    is_refused = not said or LOADED_NOTHING.search(said)
    return [0] if is_refused and not is_open else [0, *all_]


def is_explained(load: Load, has_server: bool, is_long: bool) -> bool:
    """Return whether the exit status of a load follows from what has hit it."""
    status = load.process.returncode
    if status == 1:
        is_cut = load.measure().has_rest and not load.tolerates
        return is_cut or is_long or (has_server and not load.is_live)
    if status > 0:  # a live load ends so at a second signal only
        return status - 128 in load.sent and len(load.stops()) > load.is_live
    is_killed = status == -SIGKILL or (status == -SIGHUP and not load.is_live)
    return status == 0 or (is_killed and -status in load.sent)


def judge(load: Load, database: Database) -> Iterator[str]:
    """Yield how the database contradicts what a load has said, or a load itself."""
    users = find_users(database, load)
    sql = f"SELECT lines, added FROM load_log WHERE dates LIKE '%..{load.mark()}'"
    rows = look(database, sql)
    read, said, there = load.measure(), load.said(), len(users)
    expected = list_counts(load)
    if there not in expected:
        yield f"{there} users are there, not {sorted({min(expected), max(expected)})}"
    if users != set(range(there)):
        yield f"{there} users are there, and they are not the first"
    lines, added = rows[0] if rows else (0, 0)
    is_logged = there <= lines <= there + read.has_rest and added == there
    is_spurious = len(rows) > (there > 0 or load.is_live)
    if is_spurious or not is_logged:
        yield f"{there} users are there, and in load_log {rows}"
    if load.is_live and load.process.returncode == 0 and read.left and not load.stops():
        yield f"{read.left} bytes are left in the pipe"
    for _, last in NOT_STORED.findall(said):
        if int(last) - read.lines not in (0, read.has_rest):
            yield f"{read.lines} lines were read, not {last}"
    if UNCAUGHT.search(said):
        yield "a traceback"


# -- A round ---------------------------------------------------------------------------


class Step(NamedTuple):
    """What happens at a moment of a round."""

    at: float  # seconds
    do: Callable[[], object]
    name: str = ""


class Blow(NamedTuple):
    """A signal to a process."""

    after: float  # seconds
    number: int


def draw_blows(chance: random.Random, stops: tuple[int, ...]) -> list[Blow]:
    """Return what hits a process: nothing, signals that end it, a freeze."""
    first = 0.1 + chance.choice([0.5, 4]) * chance.random()
    second = first + chance.choice([0.01, 0.3, 3]) * chance.random()
    third = second + 4 * chance.random()
    stop = Blow(first, chance.choice(stops))
    again = Blow(second, chance.choice(stops))
    freeze = Blow(first, SIGSTOP)
    fates = [
        [],
        [stop],
        [stop, again],
        [Blow(first, SIGKILL)],
        [freeze, again, Blow(third, SIGCONT)],
        [freeze, Blow(third, SIGCONT)],
        [freeze, Blow(third, SIGKILL)],
    ]
    return chance.choices(fates, [2, 5, 3, 2, 1, 1, 1])[0]


class Round:
    """Loads of one database at once, and the blows that hit them."""

    def __init__(
        self, chance: random.Random, database: Database, directory: Path, is_long: bool
    ) -> None:
        self.chance = chance
        self.database = database
        self.directory = directory
        self.is_long = is_long
        self.seconds = BLOWS + LONG_HANG * is_long
        self.loads: list[Load] = []
        self.steps: list[Step] = []
        self.blows: Counter[str] = Counter()
        self.account: list[str] = []
        self.differences: list[str] = []
        self.started = time.monotonic()

    def add(self, at: float, do: Callable[[], object], name: str = "") -> None:
        self.steps.append(Step(min(at, self.seconds), do, name))
        self.steps.sort(key=lambda step: step.at)

    def plan(self) -> None:
        chance = self.chance
        hangs = [0.0]
        at = chance.uniform(0.5, 3)
        while at < BLOWS - 3:
            hangs.append(at)
            at += self.plan_trouble(at) + chance.uniform(0.2, 2)
        for number in range(1, chance.randint(9, 15)):
            load = self.make_load(number)
            self.loads.append(load)
            begins = max(0, chance.choice(hangs) + chance.uniform(-0.5, 2))
            start = partial(load.start, self.database.target)
            self.add(begins, start, f"load {number} starts")
            blows_begin = max(begins, 5) if self.is_long else begins
            for blow in draw_blows(chance, STOPS):
                hit = partial(self.hit, load, blow.number)
                self.add(blows_begin + blow.after, hit)
            for blow in draw_blows(chance, (SIGTERM,)) if not self.is_long else ():
                hit = partial(self.hit_producer, load, blow.number)
                self.add(begins + blow.after, hit)

    def plan_trouble(self, at: float) -> float:
        """Let the database suffer; return for how many seconds."""
        troubles = self.database.list_troubles()
        if self.is_long:
            troubles = [trouble for trouble in troubles if trouble.is_hang]
            self.add(at + 3 + SILENCE, self.expect_words)  # since the last load began
        weights = [1 + 2 * trouble.is_hang for trouble in troubles]
        [trouble] = self.chance.choices(troubles, weights)
        seconds = self.chance.choice([0.3, self.chance.uniform(2, 6)])
        seconds = LONG_HANG if self.is_long else seconds
        self.blows[trouble.name] += 1
        self.add(at, trouble.begin, f"{trouble.name}: begins")
        for number in range(1, int(seconds * 20) if trouble.is_repeated else 0):
            self.add(at + number / 20, trouble.begin)
        self.add(at + seconds, trouble.end, f"{trouble.name}: ends")
        return seconds

    def make_load(self, number: int) -> Load:
        chance = self.chance
        kind = chance.choice(["live", "files", "shards and a pipe"])
        is_live = kind == "live"
        load = Load(number, is_live, chance.random() < 0.7, self.directory)
        files, size = 0, 0
        if kind == "files":
            files, size = chance.choice([1, 3]), chance.choice([30, 3000, 20_000])
        elif not is_live:
            files, size = 1000, 1
        for file in range(files):
            users = range(file * size, file * size + size)
            is_packed = kind != "files" or chance.random() < 0.3
            load.names.append(load.write_events(file, users, is_packed))
        load.in_files = files * size
        if kind != "files":
            piece = chance.choice([60, 3000, 60_000])
            pause = chance.choice([0, 0.01, 0.1])
            lines = chance.choice([300, 10_000])
            if self.is_long:
                piece, pause, lines = 300, 0.1, 5000
            users = range(load.in_files, load.in_files + lines)
            load.write_events("pipe", users)
            load.pace = [piece, pause, 0 if is_live and chance.random() < 0.5 else 1000]
        return load

    def note(self, what: str) -> None:
        if what:
            self.account.append(f"{time.monotonic() - self.started:7.2f} s  {what}")

    def differ(self, load: Load, what: str) -> None:
        self.differences.append(f"{load.describe()}: {what}")

    def hit(self, load: Load, number: int) -> None:
        """Send a signal, but none that ends a process before its script has begun."""
        now = time.monotonic()
        if not load.runs():
            return
        if number in STOPS and not load.handles_stops():
            if now - self.started < self.seconds:
                later = now - self.started + 0.02
                self.add(later, partial(self.hit, load, number))
            return
        name = signal.Signals(number).name
        load.process.send_signal(number)
        load.sent.append(number)
        self.blows[f"loader {name}"] += 1
        self.note(f"load {load.number}: {name}")
        if number in STOPS:
            limit = AFTER_TWO_SIGNALS if len(load.stops()) > 1 else AFTER_SIGNAL
            load.due = min(load.due, now + limit)
        if number == SIGCONT:
            load.due = max(load.due, now + AFTER_TWO_SIGNALS)

    def hit_producer(self, load: Load, number: int) -> None:
        if load.producer and load.producer.poll() is None:
            name = signal.Signals(number).name
            load.producer.send_signal(number)
            self.blows[f"producer {name}"] += 1
            self.note(f"producer {load.number}: {name}")

    def expect_words(self) -> None:
        for load in self.loads:
            if load.is_live and load.runs() and not load.said():
                self.differ(load, f"silent though its database hangs {SILENCE} s")

    def end_overdue(self) -> None:
        for load in self.loads:
            if load.runs() and time.monotonic() > load.due:
                self.differ(load, f"has not ended in time after {load.sent}")
                self.note(f"load {load.number} is overdue and killed")
                load.process.kill()
                load.process.wait()
                load.sent.append(SIGKILL)

    def play(self) -> None:
        """Take all steps, end what is endless, and wait for the loads."""
        self.started = time.monotonic()
        while self.steps:
            if time.monotonic() - self.started >= self.steps[0].at:
                step = self.steps.pop(0)
                self.note(step.name)
                step.do()
            self.end_overdue()
            time.sleep(0.005)
        self.note("the blows are over")
        now = time.monotonic()
        for load in self.loads:
            if load.stops() and not load.is_live:  # its pipe stays open
                load.due = min(load.due, now + AFTER_SIGNAL_IN_HEALTH)
            else:
                load.due = min(load.due, now + AFTER_SIGNAL)
                load.end_producer()
        while any(load.runs() for load in self.loads):
            self.end_overdue()
            time.sleep(0.02)
        for load in self.loads:
            load.end_producer()

    def compare(self) -> int:
        """Note the differences; return how many events were acknowledged."""
        self.database.settle()
        self.differences += check_tables(self.database)
        for load in self.loads:
            for what in judge(load, self.database):
                self.differ(load, what)
            if not is_explained(load, self.database.has_server, self.is_long):
                self.differ(load, f"nothing that was sent explains it: {load.sent}")
        ended = [load for load in self.loads if load.process.returncode == 0]
        return sum(len(find_users(self.database, load)) for load in ended)

    def tell(self) -> None:
        """Print the differences, what has happened, and what the loads have said."""
        print(*(f"DIFFERENCE {what}" for what in self.differences), sep="\n")
        print(*self.account, sep="\n")
        for load in self.loads:
            print(f"{load.describe()} said: {load.said()[-2000:].strip()}")

    def close(self) -> None:
        for load in self.loads:
            load.close()
        shutil.rmtree(self.directory)


# -- The run ---------------------------------------------------------------------------


def start_databases(stack: ExitStack) -> list[Database]:
    databases: list[Database] = [Sqlite()]
    if not (BIN / "initdb").exists():
        print("PostgreSQL is skipped: its server is not installed")
        return databases
    directory = Path(tempfile.mkdtemp(prefix="chaos-postgres-"))
    stack.callback(shutil.rmtree, directory)
    server = Postgres(directory)
    stack.callback(server.close)
    return [*databases, server]


def play_rounds(minutes: float, seed: int, goes_on: bool, stack: ExitStack) -> int:
    """Play until the time is over or something differs; count the differences."""
    started = time.monotonic()
    rounds = loads = acknowledged = differences = 0
    blows: Counter[str] = Counter()
    databases = start_databases(stack)
    while not differences or goes_on:
        left = minutes * 60 - (time.monotonic() - started)
        if left < 1.5 * BLOWS and rounds >= len(databases):
            break
        database = databases[min(rounds % 3, len(databases) - 1)]
        rounds += 1
        is_long = minutes >= 10 and rounds % LONG_ROUNDS == 3 and left > 2 * LONG_HANG
        directory = Path(tempfile.mkdtemp(prefix="chaos-"))
        chance = random.Random(f"{seed} {rounds}")
        one = Round(chance, database, directory, is_long and database.has_server)
        with closing(one):
            database.renew(directory)
            one.plan()
            one.play()
            acknowledged += one.compare()
            if one.differences:
                print(f"\n--seed {seed}, round {rounds} in {database.target}:")
                one.tell()
        loads += len(one.loads)
        blows += one.blows
        differences += len(one.differences)
    told = ", ".join(f"{name}: {number}" for name, number in sorted(blows.items()))
    print(
        f"{time.monotonic() - started:.0f} seconds, seed {seed}, {rounds} rounds, "
        f"{acknowledged} events acknowledged, {loads} loads; {told}; "
        f"differences: {differences}"
    )
    return differences


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--go-on", action="store_true", help="after a difference, too")
    options = parser.parse_args()
    # Loads have the same signals and settings, whoever has started this.
    for number in (SIGTERM, SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    signal.signal(SIGINT, signal.default_int_handler)
    for name in list(os.environ):
        if name.startswith(("LOAD_ACTIVE_USERS_", "PG")):
            del os.environ[name]
    with ExitStack() as stack:
        wrong = play_rounds(options.minutes, options.seed, options.go_on, stack)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
