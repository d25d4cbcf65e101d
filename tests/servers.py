"""Real servers for the tests: PostgreSQL, and the scheduler and workers of Dask."""

import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
import pytest
from helpers import Loader, Process, free_port, has_open, is_listening, wait_for

# -- PostgreSQL

INITDB = max(
    Path("/usr/lib/postgresql").glob("*/bin/initdb"),
    default=Path(shutil.which("initdb") or "/none"),
)
needs_postgres = pytest.mark.skipif(
    not INITDB.exists(), reason="needs a PostgreSQL server: its initdb, postgres"
)


class PostgresServer(NamedTuple):
    """A running server: its URL, with user and password, and the file of its log."""

    url: str
    log: Path


def unprivileged() -> dict[str, Any]:
    """Return the arguments by which Popen starts what refuses to run as root."""
    if os.geteuid() != 0:
        return {}
    user = pwd.getpwnam("postgres")
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


@contextmanager
def directory_of_server() -> Iterator[Path]:
    """Make a directory that a server may use, whoever it runs as."""
    directory = Path(tempfile.mkdtemp(prefix="load_active_users-", dir="/tmp"))
    if account := unprivileged():
        os.chown(directory, account["user"], account["group"])
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


@contextmanager
def running_postgres(*signals: str) -> Iterator[PostgresServer]:
    """Run a server, with files beside its data that can make it a standby."""
    account = unprivileged()
    with directory_of_server() as directory:
        password, data = directory / "password", directory / "data"
        password.write_text("p@ss")
        password.chmod(0o644)
        initdb = [
            INITDB,
            "-D",
            data,
            "-U",
            "loader",
            "-A",
            "scram-sha-256",
            "-E",
            "UTF8",
        ]
        subprocess.run(
            [*map(str, initdb), "--no-sync", f"--pwfile={password}"],
            check=True,
            capture_output=True,
            cwd="/",
            **account,
        )
        for name in signals:
            (data / name).touch()
        port = free_port()
        settings = ["-c", "listen_addresses=127.0.0.1", "-c", "fsync=off"]
        options = ["-p", str(port), "-k", str(directory), *settings]
        server = PostgresServer(
            f"postgresql://loader:p%40ss@127.0.0.1:{port}/", directory / "log"
        )

        def answers() -> bool:
            try:
                psycopg.connect(server.url + "postgres").close()
            except psycopg.OperationalError:
                return False
            return True

        with server.log.open("wb") as log:
            process = Process(
                [INITDB.with_name("postgres"), "-D", data, *options],
                stdout=log,
                stderr=log,
                cwd="/",
                **account,
            )
            try:
                assert wait_for(answers, 60), server.log.read_text()
                yield server
            finally:
                process.send_signal(signal.SIGINT)
                process.wait(30)


def rows_of_query(
    connection: psycopg.Connection[Any], sql: str
) -> list[tuple[Any, ...]]:
    """Return what a query finds, dates as texts."""
    cursor = connection.execute(sql.encode())
    rows = cursor.fetchall() if cursor.description else []

    def plain(value: Any) -> Any:
        return str(value) if hasattr(value, "isoformat") else value

    return [tuple(map(plain, row)) for row in rows]


class PostgresLoader(Loader):
    """The command, and a database of its own on the server."""

    def __init__(
        self, directory: Path, server: PostgresServer, options: str = ""
    ) -> None:
        super().__init__(directory)
        self.name = re.sub(r"\W", "_", directory.name).lower()
        self.server = server
        self.url = server.url + self.name
        self.shown = self.url.replace("loader:p%40ss@", "")  # in messages
        create = f'CREATE DATABASE "{self.name}" TEMPLATE template0 {options}'
        self.administer(create)

    def administer(self, sql: str) -> None:
        url = self.server.url + "postgres"
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(sql.encode())

    def drop(self) -> None:
        self.administer(f'DROP DATABASE "{self.name}" WITH (FORCE)')

    def target(self) -> object:
        return self.url

    def arguments(self, *args: object) -> list[str]:
        return ["--db", self.url, *super().arguments(*args)]

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        with self.connected() as connection:
            return rows_of_query(connection, sql)

    def execute(self, script: str) -> None:
        self.query(script)

    def connected(self) -> psycopg.Connection[Any]:
        return psycopg.connect(self.url, client_encoding="UTF8")

    def content(self) -> list[Any]:
        """Return the rows of each of our tables that is there."""
        names = ("active_user_table", "active_user", "load_log", "loaded_file")
        with self.connected() as connection:
            query = "SELECT tablename FROM pg_tables"
            there = {name for (name,) in rows_of_query(connection, query)}
            tables = [name for name in names if name in there]
            everything = [f"SELECT * FROM {table} ORDER BY 1, 2" for table in tables]
            return [rows_of_query(connection, sql) for sql in everything]


# -- Dask

DASK = Path(sys.executable).parent / "dask"


class Cluster:
    """A scheduler, and workers of one thread."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(exist_ok=True)
        port = free_port()
        self.directory = directory
        self.address = f"tcp://127.0.0.1:{port}"
        self.processes: list[Process] = []
        self.run("scheduler", "--port", str(port))
        assert wait_for(lambda: is_listening(port))

    def run(
        self, what: str, *args: str, before: Sequence[str] = (), **env: str
    ) -> Process:
        log = self.directory / f"{len(self.processes)}.log"
        command = [sys.executable, str(DASK), what, "--host", "127.0.0.1"]
        with log.open("wb") as output:
            process = Process(
                [*before, *command, "--no-dashboard", *args],
                cwd=self.directory,
                env={**os.environ, **env},
                stdout=output,
                stderr=output,
            )
        self.processes.append(process)
        return process

    def start_worker(self, before: Sequence[str] = (), **env: str) -> Process:
        """Start a worker without waiting for it."""
        options = ["--nthreads", "1", "--local-directory", str(self.directory)]
        return self.run(
            "worker", self.address, *options, "--no-nanny", before=before, **env
        )

    def workers(self, number: int) -> list[Process]:
        """Start workers, and wait until the scheduler knows them."""
        first = len(self.processes)
        some = [self.start_worker() for _ in range(number)]
        for log in range(first, first + number):
            self.await_registered(log)
        return some

    def worker(self, before: Sequence[str] = (), **env: str) -> Process:
        """Start a worker, and wait until the scheduler knows it."""
        process = self.start_worker(before, **env)
        self.await_registered(len(self.processes) - 1)
        return process

    def await_registered(self, number: int) -> None:
        log = self.directory / f"{number}.log"
        assert wait_for(lambda: b"Registered to" in log.read_bytes()), log.read_text()

    def is_scanning(self, load: Process, source: Path) -> bool:
        """Wait until a worker reads a source, of a load that goes on."""
        pids = [process.pid for process in self.processes]
        found = wait_for(lambda: any(has_open(pid, source) for pid in pids))
        return bool(found) and load.poll() is None

    def close(self) -> None:
        for process in reversed(self.processes):
            process.kill()
            process.wait()
