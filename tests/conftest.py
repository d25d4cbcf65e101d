"""What the tests share: events, files of them, and the command as a real process."""

import atexit
import copy
import ctypes
import itertools
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, Self

import pytest
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "load_active_users.py"
DASK = Path(sys.executable).parent / "dask"
SAMPLE = ROOT / "data" / "bq-results-sample-data.jsons"
# variables that Python and libraries read at their start, those of the modules that draw, and what
# these import
AT_START = ("PYTHON", "SQLITE", "TMPDIR")
OF_DRAWING = ("MPL", "MATPLOTLIB", "XDG_")
DRAWING = ("matplotlib.figure", "matplotlib.dates", "matplotlib.backends.backend_agg")
BELOW_DRAWING = ("numpy.ma", "PIL.PngImagePlugin", "pyparsing", "kiwisolver", "contourpy")
NOON = 1577728800_000000  # 2019-12-30 12:00 in US/Central, in microseconds UTC

sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.pop("PYTHONUNBUFFERED", None)  # cron has none: what can't be written stays in a buffer
# Neither nohup nor a shell that runs the tests in the background lets them ignore a signal.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
PR_SET_CHILD_SUBREAPER = 36
ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)  # inherit what a server lets go of
settings.register_profile("here", deadline=None)  # how long an example takes decides nothing
settings.load_profile("here")


def event(
    user: Any = "u", time: Any = NOON, msec: Any = 3000, key: Any = "x_event", **fields: Any
) -> dict[str, Any]:
    """An engagement event that is active unless told otherwise."""
    params = [
        {"key": "engagement_time_msec", "value": {"int_value": msec}},
        {"key": key, "value": {"int_value": 1}},
    ]
    return {
        "event_timestamp": time,
        "event_name": "user_engagement",
        "event_params": params,
        "user_pseudo_id": user,
        **fields,
    }


def lines(*events: Any) -> bytes:
    """Events and raw lines as a file."""
    rows = (e if isinstance(e, bytes) else json.dumps(e).encode() for e in events)
    return b"".join(row + b"\n" for row in rows)


def environment(env: dict[str, str] | None = None) -> dict[str, str]:
    """This environment without settings of the loader, and with some of a test."""
    ours = {k: v for k, v in os.environ.items() if not k.startswith("LOAD_ACTIVE_USERS_")}
    return {**ours, **(env or {})}


def wait_for(condition: Callable[[], Any], seconds: float = 30) -> Any:
    """What a condition becomes in the end; asked for more and more seldom."""
    deadline = time.monotonic() + seconds
    pause = 0.002
    while not (result := condition()) and time.monotonic() < deadline:
        time.sleep(pause)
        pause = min(1.2 * pause, 0.05)
    return result


class Process(subprocess.Popen[bytes]):
    """A process that, where a test waits for it, does not outlive the failure of that test."""

    def __exit__(self, kind: Any, *failure: Any) -> None:
        if kind is not None:
            self.kill()
        super().__exit__(kind, *failure)


def starts_anew(command: list[str], env: dict[str, str], modules: tuple[str, ...]) -> bool:
    """Whether Python has to start, since it is told more than to run a script that has a server, or
    libraries are told what they ask when they are imported."""
    at_start = AT_START + OF_DRAWING * (DRAWING[0] in modules)
    has_server = command[0] == sys.executable and command[1] in (str(SCRIPT), str(DASK))
    return not has_server or any(
        name.startswith(at_start) and os.environ.get(name) != value for name, value in env.items()
    )


class Forked(Process):
    """A process of the command, or of a cluster, that a server has started and let go of."""

    def __init__(self, modules: tuple[str, ...], command: list[str], **more: Any) -> None:
        self.modules = modules
        super().__init__(command, **more)

    def _execute_child(self, args: Any, executable: Any, preexec: Any, *more: Any) -> None:
        """Instead of how Popen starts a process, of the command if it can't be forked."""
        _, _, directory, env, _, _, _, *pipes = more[:13]
        umask, has_session = more[-3:-1]
        is_let_go = preexec is None and not starts_anew(args, env or {}, self.modules)
        if not is_let_go:
            super()._execute_child(args, executable, preexec, *more)  # type: ignore[misc]
            return
        stdin, _, _, stdout, _, stderr = pipes
        streams = [end if end >= 0 else n for n, end in enumerate((stdin, stdout, stderr))]
        server = next(servers(args[1], *self.modules))
        options = [True, has_session, umask]
        request = [args[2:], str(directory), dict(env or os.environ), *options]
        self.pid = server.ask(request, streams)
        assert server.answer() == 0
        self._child_created = True
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]


class Server:
    """Starts the command sooner than Python does, as server.py tells."""

    def __init__(self, script: str, *modules: str) -> None:
        self.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        server = [sys.executable, str(ROOT / "tests" / "server.py"), script]
        with theirs:
            self.process = subprocess.Popen(
                [*server, str(theirs.fileno()), *modules],
                pass_fds=[theirs.fileno()],
                env={**os.environ, "MPLBACKEND": "agg"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        atexit.register(self.stop)

    def stop(self) -> None:
        self.channel.close()
        self.process.communicate()

    def answer(self) -> int:
        text = self.channel.recv(100)
        assert text, self.process.communicate()
        return int(text)

    def ask(self, request: list[Any], streams: list[int]) -> int:
        """The number of a process that is started with some standard streams."""
        socket.send_fds(self.channel, [json.dumps(request).encode()], streams)
        return self.answer()

    def run(
        self,
        arguments: list[str],
        directory: Path,
        input: bytes | BinaryIO,
        env: dict[str, str],
    ) -> tuple[int, bytes, bytes]:
        """The exit status, standard output and standard error of a process."""
        (stdin, feed), (out, stdout), (err, stderr) = (os.pipe() for _ in range(3))
        if not isinstance(input, bytes):
            os.dup2(input.fileno(), stdin)
        pid = self.ask([arguments, str(directory), env, False, False, -1], [stdin, stdout, stderr])
        for end in (stdin, stdout, stderr):
            os.close(end)
        limit = threading.Timer(300, os.kill, (pid, signal.SIGKILL))
        limit.start()
        with ThreadPoolExecutor(2) as pool, open(out, "rb") as output, open(err, "rb") as errors:
            found = [pool.submit(file.read) for file in (output, errors)]
            with suppress(BrokenPipeError), open(feed, "wb") as file:
                file.write(input if isinstance(input, bytes) else b"")
            said = [future.result() for future in found]
        status = self.answer()
        limit.cancel()
        return status, said[0], said[1]


@cache
def servers(script: str, *modules: str) -> Iterator[Server]:
    """Two that take turns, so that two loads have their hashes from two seeds."""
    return itertools.cycle([Server(script, *modules), Server(script, *modules)])


class Loader:
    """The command, run as a process in a directory of its own."""

    modules: tuple[str, ...] = ()  # that most loads import besides

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.db = directory / "active_user_table.db"

    def drawing(self) -> Self:
        """The same, for loads that draw."""
        other = copy.copy(self)
        other.modules = (*self.modules, *DRAWING)
        return other

    def file(self, content: bytes, name: str = "events.jsons") -> str:
        (self.directory / name).write_bytes(content)
        return name

    def command(self, *args: object) -> list[str]:
        return [sys.executable, str(SCRIPT), *map(str, args)]

    def start(self, *args: object, **more: Any) -> Process:
        return Forked(self.modules, self.command(*args), cwd=self.directory, **more)

    def run(
        self, *args: object, input: bytes | BinaryIO = b"", env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[bytes]:
        command = self.command(*args)
        if not starts_anew(command, env or {}, self.modules):
            server = next(servers(command[1], *self.modules))
            done = server.run(command[2:], self.directory, input, environment(env))
            return subprocess.CompletedProcess(command, *done)
        stdin: dict[str, Any] = {"input": input} if isinstance(input, bytes) else {"stdin": input}
        return subprocess.run(
            command,
            cwd=self.directory,
            env=environment(env),
            capture_output=True,
            timeout=300,
            **stdin,
        )

    def load(
        self,
        *args: object,
        input: bytes = b"",
        env: dict[str, str] | None = None,
        warning: str = "",
    ) -> dict[str, Any]:
        """The report of a load that succeeds and says nothing but a warning."""
        done = self.run("--format", "json", *args, input=input, env=env)
        assert (done.returncode, done.stderr.decode()) == (0, warning)
        report: dict[str, Any] = json.loads(done.stdout)
        return report

    def refuse(
        self,
        *args: object,
        input: bytes = b"",
        status: int = 1,
        env: dict[str, str] | None = None,
    ) -> str:
        """What is said about a load that is refused, which changes nothing in the database."""
        before = self.content()
        done = self.run(*args, input=input, env=env)
        assert (done.returncode, done.stdout) == (status, b""), done
        assert b"Traceback" not in done.stderr
        assert self.content() == before
        return done.stderr.decode()

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

    def content(self) -> list[str] | None:
        if not self.db.exists() or not self.db.stat().st_size:
            return None
        with closing(sqlite3.connect(self.db)) as db:
            version = db.execute("PRAGMA user_version").fetchone()
            return [*db.iterdump(), f"version {version[0]}"]


# Modules whose tests are of one process: of its server, or of what it has drawn.
TOGETHER = ("test_postgres", "test_urls", "test_plot", "test_cluster")
FIRST = ("test_a_real_cron_daemon", *TOGETHER[:2], "test_a_line_of_100_mb", *TOGETHER[2:])


class Scheduling(LoadScopeScheduling):  # type: ignore[misc]
    """Gives a process the tests of a server at once, and of others one by one, in their order.

    As --dist loadgroup of xdist 3.8 would, which no longer sees the groups with pytest 9.2."""

    def _split_scope(self, nodeid: str) -> str:
        stem = Path(nodeid.partition("::")[0]).stem
        if "PostgreSQL" in nodeid:
            stem = "test_postgres"
        return stem if stem in TOGETHER else nodeid


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Scheduling:
    config.option.loadscopereorder = False
    return Scheduling(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What takes long begins first, so that in the end no test has to be waited for. What waits for
    a minute has a process of its own meanwhile, and is followed there by a test, not by many."""
    if not config.getoption("numprocesses", 0):
        return  # they run one by one, as they are named
    first = (*FIRST, "test_robust", "test_scan")
    items.sort(key=lambda item: [name not in (item.name, item.path.stem) for name in first])


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """The URL of a PostgreSQL server."""
    from test_postgres import running

    with running() as url:
        yield url


@pytest.fixture
def loader(tmp_path: Path) -> Loader:
    return Loader(tmp_path)
