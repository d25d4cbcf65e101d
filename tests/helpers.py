"""What the tests share: events, files of them, and the command, run here or as a
process."""

import array
import contextlib
import copy
import fcntl
import itertools
import json
import logging
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import termios
import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import closing, suppress
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, BinaryIO, Self
from xml.etree import ElementTree
from zoneinfo import ZoneInfo

import pytest
from click.testing import CliRunner

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]  # for those who do not start by pytest

import oracle

import load_active_users as program

SCRIPT = ROOT / "load_active_users.py"
SAMPLE = ROOT / "data" / "bq-results-sample-data.jsons"
README = (ROOT / "README.md").read_text()
SAMPLE_LINES = SAMPLE.read_bytes().splitlines(keepends=True)
SAMPLE_TABLE = {"2019-12-29": 11, "2019-12-30": 31, "2019-12-31": 22}
HOUR = 3600 * 10**6  # microseconds
DAY = 24 * HOUR
NOON = 1577728800_000000  # 2019-12-30 12:00 in US/Central, in microseconds UTC
ALL_DATES = ("2000-01-01", "9999-12-31")
KILLS = int(os.environ.get("KILLS", "15"))  # in each test that kills at random

NOT_AN_OBJECT = program.NOT_AN_OBJECT
INTERRUPTED = b"Interrupted: uncommitted changes were rolled back\n"
TERMINATED = b"Terminated: uncommitted changes were rolled back\n"

AS_ROOT = pytest.mark.skipif(
    os.geteuid() != 0, reason="needs root, to mount a file system or be another user"
)
WITHOUT_CAPABILITIES = (  # as any user: root may write everything
    "setpriv --bounding-set=-dac_override,-dac_read_search "
    "--inh-caps=-dac_override,-dac_read_search"
)


# -- Events


def event(
    user: Any = "u",
    time: Any = NOON,
    msec: Any = 3000,
    key: Any = "x_event",
    **fields: Any,
) -> dict[str, Any]:
    """Return an engagement event that is active unless told otherwise."""
    return {
        "event_timestamp": time,
        "event_name": "user_engagement",
        "event_params": params(
            ("engagement_time_msec", {"int_value": msec}), (key, {"int_value": 1})
        ),
        "user_pseudo_id": user,
        **fields,
    }


def params(*pairs: tuple[Any, Any]) -> list[dict[str, Any]]:
    """Return event_params of keys and values."""
    return [{"key": key, "value": value} for key, value in pairs]


def lines(*events: Any) -> bytes:
    """Return events and raw lines as a file."""
    rows = (e if isinstance(e, bytes) else json.dumps(e).encode() for e in events)
    return b"".join(row + b"\n" for row in rows)


def numbered_sample(number: int, data: bytes = SAMPLE.read_bytes()) -> bytes:
    """Return the sample with other users: those of another number."""
    return data.replace(b'"user_pseudo_id":"', b'"user_pseudo_id":"%d-' % number)


def usec(text: str, zone: str = "US/Central") -> int:
    """Return a local time in microseconds UTC."""
    local = datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone))
    return (local - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)


def noon(day: str) -> int:
    """Return noon of a date in microseconds UTC."""
    return usec(f"{day}T12:00")


def today(zone: str = "US/Central") -> date:
    return datetime.now(ZoneInfo(zone)).date()


def zstd_compress(data: bytes, level: int | None = None) -> bytes:
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    compressed: bytes = zstd.compress(data, level)
    return compressed


# -- What is expected


def date_count(day: str, count: int, added: int, removed: int = 0) -> dict[str, Any]:
    """Return a date of the report in JSON."""
    return {
        "date": day,
        "active_user_count": count,
        "added": added,
        "removed": removed,
    }


def usage(message: str) -> str:
    """Return what is said about a wrong command line."""
    about = "Usage: load_active_users.py [OPTIONS] EVENTS...\n"
    return f"{about}Try 'load_active_users.py --help' for help.\n\nError: {message}\n"


OTHER_OPTIONS = "--event-name user_engagement --min-engagement-msec 3000"
OTHER_OPTIONS += " --valuable-event '*_event'"  # the defaults beside --timezone


def other_rule(tried: str, kept: str = f"--timezone US/Central {OTHER_OPTIONS}") -> str:
    """Return what is said of a database that was filled under another rule."""
    rules = f"was filled under the rule {kept}; the rule of this load is {tried}"
    return f"{rules}; use that rule or another --db"


def readme_blocks(language: str) -> list[str]:
    """Return the blocks of the README that are in a language."""
    parts = README.split(f"```{language}\n")[1:]
    return [part.split("```")[0] for part in parts]


def picture_texts(svg: bytes) -> list[str]:
    """Return what is written in a picture.

    Matplotlib draws the letters, and leaves the texts in comments.
    """
    builder = ElementTree.TreeBuilder(insert_comments=True)
    parser = ElementTree.XMLParser(target=builder)
    nodes: Any = ElementTree.fromstring(svg, parser).iter()
    return [node.text.strip() for node in nodes if node.tag is ElementTree.Comment]


# -- Processes


class Process(subprocess.Popen[bytes]):
    """A process that, where a test waits for it, does not outlive its failure."""

    def __exit__(self, kind: Any, *failure: Any) -> None:
        if kind is not None:
            self.kill()
        super().__exit__(kind, *failure)


def environment(env: dict[str, str] | None = None) -> dict[str, str]:
    """Return this environment without settings of the loader, and with some of a
    test."""
    ours = {
        k: v for k, v in os.environ.items() if not k.startswith("LOAD_ACTIVE_USERS_")
    }
    return {**ours, **(env or {})}


def wait_for(condition: Callable[[], Any], seconds: float = 30) -> Any:
    """Return what a condition becomes in the end; it is asked more and more seldom."""
    deadline = time.monotonic() + seconds
    pause = 0.002
    while not (result := condition()) and time.monotonic() < deadline:
        time.sleep(pause)
        pause = min(1.2 * pause, 0.05)
    return result


def unread(pipe: Any) -> int:
    """Return how many bytes wait in a pipe to be read."""
    count = array.array("i", [0])
    fcntl.ioctl(pipe, termios.FIONREAD, count)
    return count[0]


def when_it_reads(process: Process) -> None:
    """Wait until a load has read what it was sent through standard input."""
    assert process.stdin
    process.stdin.write(lines(event("first")))
    process.stdin.flush()
    assert wait_for(lambda: not unread(process.stdin))


def children(process: Process) -> list[int]:
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    with suppress(OSError):
        return [int(pid) for pid in path.read_text().split()]
    return []


def is_alive(pid: int) -> bool:
    with suppress(OSError):
        stat = Path(f"/proc/{pid}/stat").read_text()
        return stat.rsplit(")", 1)[1].split()[0] != "Z"
    return False


def workers_of(process: Process, number: int = 2) -> list[int]:
    """Wait until a load has started its worker processes; return their numbers."""
    pids: list[int] = wait_for(
        lambda: len(children(process)) == number and children(process)
    )
    assert pids, "the workers have not started"
    return pids


def has_open(pid: int, path: Path) -> bool:
    """Return whether a process has a file open."""
    with suppress(OSError):
        descriptors = Path(f"/proc/{pid}/fd").iterdir()
        return str(path) in map(os.readlink, descriptors)
    return False


def is_listening(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


# -- The command


def lasting_state() -> dict[str, Any]:
    """Return what belongs to this process, which a run of the command must leave
    alone."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM)
    return {
        "signal handlers": {number: signal.getsignal(number) for number in numbers},
        "logging": logging.root.manager.disable,
        "warnings": list(warnings.filters),
        "environment": dict(os.environ),
        "unraisablehook": sys.unraisablehook,
    }


def fork_nothing(*_: object) -> None:
    raise AssertionError("a process with threads must not fork: use process=True")


def run_here(
    args: list[str], directory: Path, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[bytes]:
    """Run the command in this process, which is afterwards as it was."""
    before = lasting_state()
    with contextlib.chdir(directory), pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "scan_in_processes", fork_nothing)
        result = CliRunner().invoke(
            program.main, args, env=env, catch_exceptions=False, prog_name=SCRIPT.name
        )
        assert Path.cwd() == directory.resolve()
    after = lasting_state()
    assert {name for name in before if before[name] != after[name]} == set()
    return subprocess.CompletedProcess(
        args, result.exit_code, result.stdout_bytes, result.stderr_bytes
    )


class Loader:
    """The command in a directory of its own.

    run, load and refuse run it in this process, which is quick. It is a real process if
    it has standard input, or if process=True says that the process matters: signals,
    streams, worker processes, variables that Python or a library reads at its start.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.db = directory / "active_user_table.db"
        self.script = SCRIPT

    def file(self, content: bytes, name: str = "events.jsons") -> str:
        (self.directory / name).write_bytes(content)
        return name

    def target(self) -> object:
        """Return the database as --db has it."""
        return self.db

    def arguments(self, *args: object) -> list[str]:
        return [*map(str, args)]

    def command(self, *args: object) -> list[str]:
        return [sys.executable, str(self.script), *self.arguments(*args)]

    def start(self, *args: object, **more: Any) -> Process:
        """Start a process, with pipes as its standard streams."""
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        return Process(self.command(*args), cwd=self.directory, **{**pipes, **more})

    def run(
        self,
        *args: object,
        input: bytes | BinaryIO | None = None,
        env: dict[str, str] | None = None,
        process: bool = False,
    ) -> subprocess.CompletedProcess[bytes]:
        """Return the exit status and what was printed."""
        is_here = not (process or input is not None or "-" in args)
        if is_here and self.script == SCRIPT:
            return run_here(self.arguments(*args), self.directory, env)
        is_file = not isinstance(input, bytes | None)
        stdin: dict[str, Any] = {"stdin": input} if is_file else {"input": input or b""}
        return subprocess.run(
            self.command(*args),
            cwd=self.directory,
            env=environment(env),
            capture_output=True,
            timeout=300,
            **stdin,
        )

    def load(
        self,
        *args: object,
        input: bytes | None = None,
        env: dict[str, str] | None = None,
        warning: str = "",
        process: bool = False,
    ) -> dict[str, Any]:
        """Return the report of a load that succeeds and says nothing but a warning."""
        done = self.run(
            "--format", "json", *args, input=input, env=env, process=process
        )
        assert (done.returncode, done.stderr.decode()) == (0, warning)
        report: dict[str, Any] = json.loads(done.stdout)
        return report

    def refuse(
        self,
        *args: object,
        input: bytes | None = None,
        status: int = 1,
        env: dict[str, str] | None = None,
        process: bool = False,
    ) -> str:
        """Return what is said about a load that is refused, and changes no database."""
        before = self.content()
        done = self.run(*args, input=input, env=env, process=process)
        assert (done.returncode, done.stdout) == (status, b""), done
        assert b"Traceback" not in done.stderr
        assert self.content() == before
        return done.stderr.decode()

    def run_under(self, before: str, *args: object) -> tuple[int, bytes, str]:
        """Run a process by means of another command; return how it ended."""
        done = subprocess.run(
            [*before.split(), *self.command(*args)],
            cwd=self.directory,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=120,
        )
        return done.returncode, done.stdout, done.stderr.decode()

    def run_without_end(self, *args: object, under: str = "") -> tuple[int, bytes, str]:
        """Run a process whose standard input does not end; return how it ended."""
        command = [*under.split(), *self.command(*args, "-")]
        pipes: dict[str, Any] = {"stdin": -1, "stdout": -1, "stderr": -1}
        with Process(command, cwd=self.directory, **pipes) as process:
            ended = wait_for(lambda: process.poll() is not None)
            if not ended:
                process.kill()
            assert process.stdout
            assert process.stderr
            out, err = process.stdout.read(), process.stderr.read()
            assert ended, "it waits for its input"
        return process.returncode, out, err.decode()

    def copied(self, *files: str) -> Self:
        """Return the same with a copy of the program, beside copies of some files."""
        other = copy.copy(self)
        other.script = self.directory / "program" / SCRIPT.name
        other.script.parent.mkdir(exist_ok=True)
        for name in (SCRIPT.name, *files):
            shutil.copy(ROOT / name, other.script.parent)
        return other

    def with_constants(self, **constants: object) -> Self:
        """Return the same with a copy of the program that has other constants."""
        other = self.copied("schema.sql")
        text = other.script.read_text()
        for name, value in constants.items():
            pattern = rf"(?m)^({name}(?:: \w+)? = ).*$"
            text, found = re.subn(pattern, rf"\g<1>{value}", text)
            assert found == 1, name
        other.script.write_text(text)
        return other

    def draw(self, suffix: str) -> bytes:
        """Return the picture of the database."""
        path = self.directory / f"drawn.{suffix}"
        done = self.run("--db", self.target(), "--plot", path)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
        picture = path.read_bytes()
        path.unlink()
        return picture

    def with_site(self, code: str) -> dict[str, str]:
        """Return the environment of a process that runs some code at its very start."""
        site = self.directory / "site"
        site.mkdir()
        (site / "sitecustomize.py").write_text(code)
        return {"PYTHONPATH": str(site)}

    def table(self) -> dict[str, int]:
        query = "SELECT date, active_user_count FROM active_user_table ORDER BY date"
        return dict(self.query(query))

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        with closing(sqlite3.connect(self.db)) as db:
            return db.execute(sql).fetchall()

    def execute(self, script: str) -> None:
        """Change the database by hand."""
        with closing(sqlite3.connect(self.db)) as db:
            db.executescript(script)

    def content(self) -> list[Any] | None:
        """Return all that is in the database, or None if there is none."""
        if not self.db.exists() or not self.db.stat().st_size:
            return None
        with closing(sqlite3.connect(self.db)) as db:
            return [*db.iterdump()]

    def content_but_log(self) -> list[Any]:
        """Return the content without what a load says of itself, such as its time."""
        pattern = r"\b(load_log|loaded_file)\b"
        return [row for row in self.content() or () if not re.search(pattern, row)]

    def users(self, day: str = "2019-12-30") -> list[str]:
        """Return who is kept as active on a date."""
        query = (
            f"SELECT user_pseudo_id FROM active_user WHERE date = '{day}' ORDER BY 1"
        )
        return [user for (user,) in self.query(query)]

    def all_users(self) -> dict[str, set[str]]:
        """Return who is kept as active, by date, as the oracle does."""
        found: dict[str, set[str]] = {}
        for day, user in self.query("SELECT date, user_pseudo_id FROM active_user"):
            found.setdefault(day, set()).add(user)
        return found

    def last_log(self, *columns: str) -> tuple[Any, ...]:
        """Return some columns of the last row of load_log."""
        query = f"SELECT {', '.join(columns)} FROM load_log ORDER BY rowid DESC LIMIT 1"
        return self.query(query)[0]


# A process never shows less peak memory than its parent had: this one is small.
MEASURE = """
import os, sys
_, status, usage = os.wait4(os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ), 0)
print(usage.ru_maxrss // 1024, os.waitstatus_to_exitcode(status))
"""


def peak_memory(loader: Loader, *args: object) -> tuple[int, bytes, int]:
    """Return the exit status, the output and the peak memory in MB of a load."""
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


# -- The parts of the program that tests use by themselves


def make_rule(
    timezone: str = "US/Central",
    names: tuple[str, ...] = ("user_engagement",),
    min_msec: int = 3000,
    globs: tuple[str, ...] = ("*_event",),
) -> program.Rule:
    """Return the program's rule of the oracle's."""
    ordered = program.sort_unique(names), program.sort_unique(globs)
    return program.Rule(timezone, ordered[0], min_msec, ordered[1])


def make_dates(dates: tuple[str, str] = ALL_DATES) -> program.LoadDates:
    """Return the dates of a load that counts some dates, on a day in the far future."""
    usual = program.DateRange(*ALL_DATES)
    counted = program.DateRange(*dates)
    return program.LoadDates(usual, counted, counted)


def scan(
    path: Path,
    cuts: list[int],
    block_size: int,
    rule: oracle.Rule = oracle.DEFAULT,
    dates: tuple[str, str] = ALL_DATES,
) -> oracle.Result:
    """Return what oracle.read does, of a file that is cut into ranges at some offsets.

    No range ends within a byte-order mark: they are megabytes long.
    """
    size = path.stat().st_size
    inner = {cut % (size + 1) for cut in cuts} - {1, 2, 3}
    borders = sorted({0, size} | inner)
    parts = [program.Range(str(path), *pair) for pair in itertools.pairwise(borders)]
    scanner = program.Scanner(
        make_rule(*rule), make_dates(dates), keep=True, block_bytes=block_size
    )
    return scan_ranges(parts, scanner)


def scan_ranges(
    parts: Iterable[program.Range], scanner: program.Scanner
) -> oracle.Result:
    """Return what oracle.read does, of the ranges of one file.

    They must report as many bytes as they have.
    """
    parts = list(parts)
    bad = {}
    with closing(program.Staging(scanner.dates)) as load:
        for _, batch in program.scan_in_turn(parts, scanner):
            for line, reason, record in batch.bad:
                assert reason
                bad[load.tally.lines + line] = record
            load.add(batch)
        sizes = [part.end or part.size or 0 for part in parts]
        starts = [part.start for part in parts]
        assert load.tally.bytes == sum(sizes) - sum(starts)
        users = {}
        for day in load.days:
            some = [user for chunk in load.get_users(day) for user in chunk]
            assert some == sorted(set(some))
            users[day] = set(some)
        names = ("blank_lines", *program.TALLIES)
        tally = {name: getattr(load.tally, name) for name in names}
    return users, {name: count for name, count in tally.items() if count}, bad
