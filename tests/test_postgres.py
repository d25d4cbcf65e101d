"""The same promises with PostgreSQL: tests on a real server, started for them and removed afterwards."""

import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from conftest import NOON, SAMPLE, Loader, event, lines
from test_operate import DAY, texts
from test_robust import ROWS, start, wait_for

from load_active_users import Batch, DateCount, Merger, Range, Rule, store

BIN = max(Path("/usr/lib/postgresql").glob("*/bin"), default=Path(shutil.which("initdb") or "/none").parent)
pytestmark = pytest.mark.skipif(not (BIN / "initdb").exists(), reason="needs a PostgreSQL server: its initdb, postgres")


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with running() as url:
        yield url


@contextmanager
def running() -> Iterator[str]:
    """The URL of a server that runs meanwhile, with a user and password."""
    directory = Path(f"/tmp/load_active_users-postgres-{os.getpid()}")
    directory.mkdir(mode=0o700)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (directory / "password").write_text("p@ss")
    user: dict[str, Any] = {}
    if os.geteuid() == 0:  # which PostgreSQL refuses to run as
        nobody = pwd.getpwnam("postgres")
        user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        for path in (directory, directory / "password"):
            os.chown(path, nobody.pw_uid, nobody.pw_gid)
    data = directory / "data"
    initdb = [BIN / "initdb", "-D", data, "-U", "loader", "-A", "scram-sha-256", "-E", "UTF8", "--no-sync"]
    subprocess.run([*initdb, f"--pwfile={directory}/password"], check=True, capture_output=True, cwd="/", **user)
    options = ["-p", str(port), "-k", str(directory), "-c", "listen_addresses=127.0.0.1", "-c", "fsync=off"]
    log = (directory / "log").open("wb")
    process = subprocess.Popen([BIN / "postgres", "-D", data, *options], stdout=log, stderr=log, cwd="/", **user)
    url = f"postgresql://loader:p%40ss@127.0.0.1:{port}/"

    def answers() -> bool:
        try:
            psycopg.connect(url + "postgres").close()
        except psycopg.OperationalError:
            return False
        return True

    try:
        assert wait_for(answers, 60), (directory / "log").read_text()
        yield url
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)
        log.close()
        shutil.rmtree(directory)


class PostgresLoader(Loader):
    """The command, and a database of its own on the server."""

    def __init__(self, directory: Path, server: str) -> None:
        super().__init__(directory)
        self.url = server + directory.name.replace("-", "_").lower()
        with psycopg.connect(server + "postgres", autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{self.url.rpartition("/")[2]}"')

    def command(self, *args: object) -> list[str]:
        return [*super().command(), "--db", self.url, *map(str, args)]

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.url) as connection:
            cursor = connection.execute(sql)
            rows = cursor.fetchall() if cursor.description else []
        return [tuple(str(value) if hasattr(value, "isoformat") else value for value in row) for row in rows]

    def content(self) -> list[Any]:
        if not self.query("SELECT 1 FROM pg_tables WHERE tablename = 'load_log'"):
            return []
        tables = ("active_user_table", "active_user", "load_log")
        return [self.query(f"SELECT * FROM {table} ORDER BY 1, 2") for table in tables]


@pytest.fixture
def loader(tmp_path: Path, server: str) -> PostgresLoader:
    return PostgresLoader(tmp_path, server)


@pytest.fixture
def sqlite(tmp_path: Path) -> Loader:
    return Loader(tmp_path)


def test_all_is_as_with_sqlite(loader: PostgresLoader, sqlite: Loader) -> None:
    """Loads that overlap, replace, come late, and are tried only: reports, tables and the view are the same."""
    late = lines(*(event(f"u{n % 7}", NOON + n * DAY) for n in range(40)), event(None), event("a\\b\tc\nd'\"€😀"))
    loads = [
        ("--dry-run", SAMPLE),
        (SAMPLE,),
        ("--dry-run", loader.file(late)),
        ("--dry-run", "--replace", "events.jsons"),
        ("events.jsons", SAMPLE),
        ("--replace", "events.jsons"),
        ("--max-bad-records", 1, loader.file(b"\n", "empty")),
    ]
    for args in loads:
        assert loader.load(*args) == sqlite.load(*args)
        for table in ("active_user_table", "active_user"):
            if sqlite.db.exists():
                everything = f"SELECT * FROM {table}"
                assert sorted(loader.query(everything)) == sorted(sqlite.query(everything))
            else:
                assert loader.content() == []
    columns = "sources, timezone, min_engagement_msec, valuable_events, replaced, lines, blank_lines, added"
    log = f"SELECT {columns} FROM load_log ORDER BY loaded_at, sources, replaced"
    assert sorted(loader.query(log)) == sorted(sqlite.query(log))
    view = "SELECT * FROM active_user_trend ORDER BY date"
    assert [tuple(map(str, row)) for row in loader.query(view)] == [
        (*map(str, row[:-2]), f"{row[-2]:.4f}", str(row[-1])) for row in sqlite.query(view)
    ]


def test_a_database_keeps_one_rule(loader: PostgresLoader) -> None:
    loader.load(SAMPLE)
    said = loader.refuse("--timezone", "UTC", SAMPLE)
    assert "was filled under the rule --timezone US/Central" in said
    assert "the rule of this load is --timezone UTC" in said
    assert "p%40ss" not in said


@pytest.mark.parametrize(
    "script",
    [
        "CREATE TABLE active_user (date DATE)",
        "CREATE TABLE load_log (x TEXT)",
        "CREATE TABLE active_user_table (date TEXT PRIMARY KEY, active_user_count BIGINT NOT NULL)",
    ],
)
def test_tables_that_are_not_ours(loader: PostgresLoader, script: str) -> None:
    loader.query(script)
    with pytest.raises(psycopg.errors.UndefinedTable):
        loader.query("SELECT * FROM nothing")
    said = loader.run(SAMPLE)
    assert (said.returncode, said.stdout) == (1, b"")
    assert b"one of load_active_users.py; choose another --db\n" in said.stderr


def test_other_tables_are_no_matter(loader: PostgresLoader) -> None:
    loader.query("CREATE TABLE other (x TEXT)")
    assert loader.load(SAMPLE)["dates"]


def test_what_the_server_says_is_one_line(loader: PostgresLoader) -> None:
    for url, reason in {
        loader.url.replace("p%40ss", "wrong"): "password authentication failed",
        loader.url + "_none": "does not exist",
        "postgresql://someone:secret@127.0.0.1:1/x": "onnection refused",
        "postgresql://someone:secret@127.0.0.1/x?nonsense=1": "nonsense",
    }.items():
        done = super(PostgresLoader, loader).run("--db", url, SAMPLE)
        assert (done.returncode, done.stdout, done.stderr.count(b"\n")) == (1, b"", 1), done
        assert reason in done.stderr.decode()
        assert b"secret" not in done.stderr
        assert b"Traceback" not in done.stderr


def test_users_that_it_cannot_keep(loader: PostgresLoader) -> None:
    loader.load(SAMPLE)
    assert "PostgreSQL keeps no NUL character" in loader.refuse("-", input=lines(event("a\0b")))


def test_users_that_are_staged_twice_are_one(loader: PostgresLoader, sqlite: Loader) -> None:
    for db in (loader.url, str(sqlite.db)):
        merger = Merger([Range("x")])
        for users in ({"a", "b"}, {"b", "c"}):
            merger.add(0, Batch(users={"2020-01-01": users}))
            merger.stage()
        counts = store(db, Rule("UTC", 1, ["*"]), merger, "id", ["x"], replace=False, dry_run=False)
        assert counts == [DateCount("2020-01-01", 3, 3, 3)]


def test_a_crowd(loader: PostgresLoader) -> None:
    """Loads of overlapping files at once into a database without tables all succeed, exactly."""
    users: set[str] = set()
    processes = []
    for number in range(12):
        some = {f"u{n}" for n in range(number * 50, number * 50 + 200)}
        users |= some
        name = loader.file(lines(*(event(user) for user in sorted(some))), f"{number}.jsons")
        processes.append(start(loader, "-q", name))
    for process in processes:
        with process:
            out, err = process.communicate(timeout=120)
        assert (process.returncode, out, err) == (0, b"", b"")
    assert loader.table() == {"2019-12-30": len(users)}
    assert len(loader.query("SELECT * FROM active_user")) == len(users)
    assert len(loader.query("SELECT * FROM load_log")) == 12


def test_killed_at_any_moment(loader: PostgresLoader) -> None:
    loader.load(SAMPLE)
    states = [loader.content()[:2]]
    data = b"".join(
        row.replace(b'"user_pseudo_id":"', b'"user_pseudo_id":"%d-' % n, 1) for n in range(40) for row in ROWS
    )
    name = loader.file(data)
    chance = random.Random(0)
    for _ in range(int(os.environ.get("KILLS", "20")) // 2):
        with start(loader, "-q", name, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            time.sleep(chance.uniform(0.1, 0.9))
            process.kill()
        wait_for(
            lambda: loader.query("SELECT count(*) FROM pg_stat_activity WHERE query ILIKE '%COPY incoming%'") == [(1,)]
        )
        state = loader.content()[:2]
        assert dict(state[0]) == dict(loader.query("SELECT date, count(*) FROM active_user GROUP BY date"))
        assert state == states[0] or sum(dict(state[0]).values()) == 41 * 64
    loader.load(name)
    assert sum(loader.table().values()) == 41 * 64


def test_a_load_waits_its_turn_and_can_be_stopped_meanwhile(loader: PostgresLoader) -> None:
    with psycopg.connect(loader.url) as other:
        other.execute("SELECT pg_advisory_xact_lock(hashtext('load_active_users'))")
        with start(loader, SAMPLE) as process:
            time.sleep(1.5)
            assert process.poll() is None
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=10)
        assert process.returncode == 130
        with start(loader, "-q", SAMPLE) as process:
            time.sleep(1)
            other.commit()
            assert process.wait(10) == 0


def test_a_connection_that_breaks(loader: PostgresLoader) -> None:
    loader.load(SAMPLE)
    with psycopg.connect(loader.url, autocommit=True) as other:
        other.execute("SELECT pg_advisory_lock(hashtext('load_active_users'))")
        with start(loader, "-") as process:
            process.stdin.write(lines(event("new")))
            process.stdin.close()
            process.stdin = None
            query = (
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid != pg_backend_pid() AND datname = %s"
            )
            name = loader.url.rpartition("/")[2]
            time.sleep(1)
            assert other.execute(query, (name,)).fetchall()
            out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err.count(b"\n")) == (1, b"", 1)
    assert b"terminating connection" in err
    assert sum(loader.table().values()) == 64


def test_a_live_pipe_and_a_plot(loader: PostgresLoader) -> None:
    with start(loader, "-q", "--commit-every", 1, "-") as process:
        for number in range(2):
            process.stdin.write(lines(event(f"{number}")))
            process.stdin.flush()
            users = number + 1
            assert wait_for(lambda users=users: loader.content() and loader.table() == {"2019-12-30": users}, 10)
        process.terminate()
        assert process.wait(10) == 0
    assert loader.query("SELECT lines, added FROM load_log") == [(2, 2)]
    assert loader.run("--plot", "a.svg").returncode == 0
    assert "2019-12-30 to 2019-12-30" in texts((loader.directory / "a.svg").read_bytes())
