"""The same promises with PostgreSQL: on a real server, and behind a real pooler."""

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import oracle
import psycopg
import pytest
from helpers import (
    AS_ROOT,
    DAY,
    INTERRUPTED,
    KILLS,
    NOON,
    OTHER_OPTIONS,
    ROOT,
    SAMPLE,
    SAMPLE_TABLE,
    TERMINATED,
    Loader,
    Process,
    date_count,
    event,
    free_port,
    is_listening,
    lines,
    numbered_sample,
    other_rule,
    picture_texts,
    unread,
    wait_for,
)
from servers import (
    INITDB,
    PostgresLoader,
    PostgresServer,
    directory_of_server,
    needs_postgres,
    rows_of_query,
    running_postgres,
    unprivileged,
)

import load_active_users
from load_active_users import is_transient

PGBOUNCER = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")


pytestmark = needs_postgres
OURS = "SELECT schemaname FROM pg_tables WHERE tablename = 'active_user_table'"


@pytest.fixture
def loader(tmp_path: Path, server: PostgresServer) -> Iterator[PostgresLoader]:
    loader = PostgresLoader(tmp_path, server)
    yield loader
    loader.drop()


CHANGES = ("added", "removed")


def test_both_databases_hold_the_same(either: Loader) -> None:
    """What overlaps, replaces, comes late or is tried only agrees with the oracle."""
    late = (event(f"u{n % 7}", NOON + n * DAY) for n in range(40))
    more = [event(None), event("a\\b\tc\nd'\"€😀%s?"), event("old", 0)]
    some, sample = lines(*late, *more), SAMPLE.read_bytes()
    name = either.file(some)
    usual, few = oracle.USUAL_DATES, ("2019-12-30", "2020-01-15")
    early = ("2000-01-01", "2019-12-29")
    replace = ["--replace", "--dates", "..".join(few)]
    loads: list[tuple[list[object], bytes, tuple[str, str], bool, bool]] = [
        # arguments, events, dates, whether they are replaced, whether it is a dry run
        (["--dry-run", SAMPLE], sample, usual, False, True),
        ([SAMPLE], sample, usual, False, False),
        (["--dry-run", name], some, usual, False, True),
        (["--dry-run", *replace, name], some, few, True, True),
        ([name, SAMPLE], some + sample, usual, False, False),
        ([*replace, name], some, few, True, False),
        ([*replace, SAMPLE], sample, few, True, False),
        (["--dates", "..2019-12-29", name], some, early, False, False),
    ]
    expected = oracle.Table()
    log = []
    for args, data, dates, is_replaced, is_tried in loads:
        report = expected.load(data, dates, is_replaced, is_tried)
        assert either.load(*args) == report
        if not is_tried:
            sums = [sum(day[name] for day in report["dates"]) for name in CHANGES]
            log.append((*(report[name] for name in oracle.REPORTED), *sums, 0))
        if not log:
            assert not either.content()
            continue
        assert either.table() == dict(sorted(expected.counts.items()))
        users = {day: ids for day, ids in expected.users.items() if ids}
        assert either.all_users() == users

    columns = [*oracle.REPORTED, "added", "removed", "left_out"]
    query = f"SELECT {', '.join(columns)} FROM load_log"
    assert sorted(either.query(query)) == sorted(log)
    view = either.query("SELECT * FROM active_user_trend ORDER BY date")
    trend = [tuple(map(number, row)) for row in view]
    assert trend == [tuple(map(number, row)) for row in oracle.trend(expected.users)]


def number(value: Any) -> Any:
    return value if value is None or isinstance(value, str) else float(value)


def rows_of(loader: Loader, table: str) -> list[dict[str, Any]]:
    """Return the rows of a table, in the order in which schema.sql names its
    columns."""
    schema = (ROOT / "schema.sql").read_text()
    _, _, text = schema.partition(f"CREATE TABLE IF NOT EXISTS {table} (")
    names = re.findall(r"^    ([a-z_]+) [A-Z]", text.partition("\n)")[0], re.MULTILINE)
    rows = loader.query(f"SELECT {', '.join(names)} FROM {table}")
    return [dict(zip(names, row, strict=True)) for row in rows]


def test_final_dates(either: Loader) -> None:
    expected = oracle.Table()
    expected.load(SAMPLE.read_bytes())
    either.load(SAMPLE)
    either.execute("DELETE FROM active_user WHERE date < '2019-12-31'")
    for day in ("2019-12-29", "2019-12-30"):
        expected.forget(day)
    data = lines(event("late"), event("later", NOON + DAY))
    late = either.file(data)
    report = expected.load(data)
    assert report["left_out"] == 1
    assert either.load("--dry-run", late) == report
    assert either.load(late) == report
    assert either.table() == expected.counts == SAMPLE_TABLE | {"2019-12-31": 23}


def test_a_database_keeps_one_rule(loader: PostgresLoader) -> None:
    loader.load(SAMPLE)
    what = other_rule(f"--timezone UTC {OTHER_OPTIONS}")
    said = f"Error: {loader.shown}: {what}\n"
    assert loader.refuse("--timezone", "UTC", SAMPLE) == said


# -- Tables that somebody else has made or changed

AS_IN_SCHEMA = "as in schema.sql; choose another --db"
OTHERS = {
    "CREATE TABLE active_user (date DATE)": (
        f"it has a table active_user, but no active_user_table, {AS_IN_SCHEMA}"
    ),
    "CREATE TABLE load_log (x TEXT)": (
        f"it has a table load_log, but no active_user, {AS_IN_SCHEMA}"
    ),
    "CREATE TABLE loaded_file (x TEXT)": (
        f"it has a table loaded_file, but no active_user, {AS_IN_SCHEMA}"
    ),
}
CHANGES_OF_COLUMNS = {
    "ALTER TABLE active_user_table RENAME active_user_count TO users": (
        "its table active_user_table has no column active_user_count of type BIGINT"
    ),
    "ALTER TABLE active_user_table ALTER active_user_count TYPE INTEGER": (
        "its table active_user_table has no column active_user_count of type BIGINT"
    ),
    "ALTER TABLE loaded_file DROP version": (
        "its table loaded_file has no column version of type TEXT"
    ),
}


@pytest.mark.parametrize(("script", "what"), OTHERS.items(), ids=OTHERS)
def test_tables_of_another_program(
    loader: PostgresLoader, script: str, what: str
) -> None:
    loader.query(script)
    said = f"Error: {loader.shown}: {what}\n"
    assert loader.run_without_end() == (1, b"", said)


@pytest.mark.parametrize(
    ("change", "what"), CHANGES_OF_COLUMNS.items(), ids=CHANGES_OF_COLUMNS
)
def test_tables_with_other_columns(
    loader: PostgresLoader, change: str, what: str
) -> None:
    loader.load(SAMPLE)
    loader.query("DROP VIEW active_user_trend")
    loader.query(change)
    said = f"Error: {loader.shown}: {what}, {AS_IN_SCHEMA}\n"
    assert loader.run_without_end() == (1, b"", said)


def test_tables_without_their_primary_keys(loader: PostgresLoader) -> None:
    loader.load(SAMPLE)
    loader.query("ALTER TABLE active_user DROP CONSTRAINT active_user_pkey")
    what = "there is no unique or exclusion constraint matching the ON CONFLICT "
    what += "specification"
    assert loader.refuse(SAMPLE) == f"Error: {loader.shown}: {what}\n"


def test_other_tables_are_no_matter(loader: PostgresLoader) -> None:
    loader.query("CREATE TABLE other (x TEXT)")
    loader.load(SAMPLE)
    assert loader.table() == SAMPLE_TABLE


ADDITIONS = [
    "ALTER TABLE active_user_table ADD UNIQUE (date, active_user_count)",
    (
        "ALTER TABLE active_user ADD FOREIGN KEY (date) REFERENCES active_user_table"
        " DEFERRABLE INITIALLY DEFERRED"
    ),
    "CREATE INDEX ON active_user (user_pseudo_id)",
    "ALTER TABLE load_log ADD CHECK (lines >= 0)",
    "ALTER TABLE load_log ADD note TEXT",
    "ALTER TABLE active_user_table ADD note TEXT DEFAULT 'x'",
    "CREATE VIEW other AS SELECT * FROM active_user_trend",
    "ALTER TABLE active_user SET (fillfactor = 90)",
]


@pytest.mark.parametrize("change", ADDITIONS)
def test_what_an_administrator_may_add(loader: PostgresLoader, change: str) -> None:
    loader.load(SAMPLE)
    loader.query(change)
    loader.load(loader.file(lines(event("new"), event("new", NOON + 5 * DAY))))
    assert loader.table() == SAMPLE_TABLE | {"2019-12-30": 32, "2020-01-04": 1}


def test_a_schema_that_comes_earlier(loader: PostgresLoader) -> None:
    """The tables stay where they are; there are no new ones.

    A schema that is called like the user is the first of the search path.
    """
    loader.load(SAMPLE)
    loader.query("CREATE SCHEMA loader")
    loader.load(loader.file(lines(event("new"))))
    assert loader.query(OURS) == [("public",)]
    assert loader.table() == SAMPLE_TABLE | {"2019-12-30": 32}


def test_a_search_path_without_the_tables(loader: PostgresLoader) -> None:
    """The load is refused: it must not make the tables a second time."""
    loader.load(SAMPLE)
    loader.query("CREATE SCHEMA other")
    loader.administer(f'ALTER DATABASE "{loader.name}" SET search_path = other')
    what = "its tables are in schema public, "
    what += "which search_path leaves out, or the role may not use"
    done = loader.run("-q", SAMPLE)
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.decode() == f"Error: {loader.shown}: {what}\n"
    assert loader.query(OURS) == [("public",)]


VERSION_1 = """
CREATE TABLE active_user_table (
    date DATE PRIMARY KEY NOT NULL, active_user_count BIGINT NOT NULL);
CREATE TABLE active_user (
    date DATE NOT NULL, user_pseudo_id TEXT NOT NULL,
    PRIMARY KEY (date, user_pseudo_id));
CREATE TABLE load_log (
    load_id TEXT PRIMARY KEY NOT NULL, loaded_at TEXT NOT NULL, sources TEXT NOT NULL,
    timezone TEXT NOT NULL, min_engagement_msec BIGINT NOT NULL,
    valuable_events TEXT NOT NULL,
    replaced BIGINT NOT NULL, lines BIGINT NOT NULL, blank_lines BIGINT NOT NULL,
    engagement_events BIGINT NOT NULL, active_events BIGINT NOT NULL,
    anonymous_events BIGINT NOT NULL, bad_records BIGINT NOT NULL,
    added BIGINT NOT NULL);
CREATE VIEW active_user_trend AS
    SELECT date, active_user_count, active_user_count AS weekly_active_users,
        active_user_count AS monthly_active_users, 1.0000 AS stickiness,
        1::BIGINT AS days
    FROM active_user_table;
CREATE VIEW of_an_administrator AS SELECT * FROM active_user_trend;
INSERT INTO active_user VALUES ('2019-12-30', 'a'), ('2019-12-30', 'b');
INSERT INTO active_user_table VALUES ('2019-12-30', 2);
INSERT INTO load_log VALUES ('x', '2020-01-01T00:00:00Z', '["e"]', 'US/Central', 3000,
    '["*_event"]', 0, 2, 0, 2, 2, 0, 0, 2);
"""


def test_a_database_of_version_1_is_upgraded(loader: PostgresLoader) -> None:
    loader.query(VERSION_1)
    name = loader.file(lines(event("b"), event("c")))
    assert "2" in picture_texts(loader.draw("svg"))
    before = loader.content()
    assert "was filled under the rule" in loader.refuse("--timezone", "UTC", name)
    assert loader.load("--dry-run", name)["dates"][0]["added"] == 1
    assert loader.content() == before
    loader.load(name)
    assert loader.table() == {"2019-12-30": 3}
    log = sorted(rows_of(loader, "load_log"), key=lambda row: str(row["loaded_at"]))
    assert [row["added"] for row in log] == [2, 1]
    assert [row["event_names"] for row in log] == ['["user_engagement"]'] * 2
    assert loader.query("SELECT count(*) FROM active_user_trend") == [(1,)]
    assert loader.load(name)["dates"][0]["added"] == 0


# -- What the server refuses

REFUSED = [  # a change of the URL, and what the server says
    (("p%40ss", "wrong"), 'FATAL: password authentication failed for user "loader"'),
    (("/NAME", "/none"), 'FATAL: database "none" does not exist'),
    (("loader:", "nobody:"), 'FATAL: password authentication failed for user "nobody"'),
]


@pytest.mark.parametrize(
    ("change", "reason"), REFUSED, ids=[reason for _, reason in REFUSED]
)
def test_what_the_server_says_is_one_line(
    loader: PostgresLoader, change: tuple[str, str], reason: str
) -> None:
    url = loader.url.replace(f"/{loader.name}", "/NAME").replace(*change)
    url = url.replace("/NAME", f"/{loader.name}")
    place = url.rpartition("@")[2]
    port = place.partition("/")[0].partition(":")[2]
    what = f'connection failed: connection to server at "127.0.0.1", port {port} failed'
    said = f"Error: postgresql://{place}: {what}: {reason}\n"
    assert loader.run_without_end("--db", url) == (1, b"", said)


ENCODINGS = ["LATIN1", "SQL_ASCII", "UTF8"]


@pytest.mark.parametrize("client", ["", "LATIN1", "SQL_ASCII", "EUC_JP"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_encodings(
    tmp_path: Path, server: PostgresServer, encoding: str, client: str
) -> None:
    loader = PostgresLoader(tmp_path, server, f"ENCODING '{encoding}' LOCALE 'C'")
    name = loader.file(SAMPLE.read_bytes(), "日本.json")
    env = {"PGCLIENTENCODING": client} if client else {}
    for _ in range(2):
        done = loader.run("-q", name, env=env)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert loader.table() == SAMPLE_TABLE
    done = loader.run("--plot", "x.svg", env=env)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    said = picture_texts((loader.directory / "x.svg").read_bytes())
    assert {"11", "31", "22"} <= set(said)
    done = loader.run("-q", loader.file(lines(event("ü"), event("日本"))), env=env)
    if encoding == "LATIN1":
        character = "character with byte sequence 0xe6 0x97 0xa5"
        what = f'{character} in encoding "UTF8" has no equivalent in encoding "LATIN1"'
        assert (done.returncode, done.stdout) == (1, b"")
        assert done.stderr.decode() == f"Error: {loader.shown}: {what}\n"
    else:
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_a_user_in_another_encoding_than_the_database(
    tmp_path: Path, server: PostgresServer
) -> None:
    """Users with letters of Latin-1 are the same users in each of two loads."""
    loader = PostgresLoader(tmp_path, server, "ENCODING 'LATIN1' LOCALE 'C'")
    name = loader.file(lines(event("ü"), event("a")))
    assert [loader.load(name)["dates"][0]["added"] for _ in range(2)] == [2, 0]


def test_a_url_without_a_port(loader: PostgresLoader) -> None:
    """The environment tells the port, or it is the usual one."""
    start, port, end = re.split(r":(\d+)(?=/)", loader.url)
    loader.load("--db", start + end, SAMPLE, env={"PGPORT": port})
    assert loader.table() == SAMPLE_TABLE


def test_a_timeout_of_the_url(loader: PostgresLoader) -> None:
    """A server takes the connection and says nothing.

    Loads that wait for 2 s end; loads that wait longer, and began earlier, do not.
    """
    with socket.create_server(("127.0.0.1", 0)) as silent, ExitStack() as stack:
        place = f"postgresql://127.0.0.1:{silent.getsockname()[1]}/x"

        def connect(seconds: int, is_in_url: bool) -> Process:
            url = f"{place}?connect_timeout={seconds}" if is_in_url else place
            env = {} if is_in_url else {"PGCONNECT_TIMEOUT": str(seconds)}
            process = loader.start("--db", url, SAMPLE, env={**os.environ, **env})
            return stack.enter_context(process)

        patient = [connect(600, is_in_url) for is_in_url in (True, False)]
        impatient = [connect(2, is_in_url) for is_in_url in (True, False)]
        try:
            for process in impatient:
                out, err = process.communicate(timeout=60)
                assert (process.returncode, out) == (1, b"")
                assert err.decode() == f"Error: {place}: connection timeout expired\n"
            assert [process.poll() for process in patient] == [None, None]
        finally:
            for process in patient:
                process.kill()


def test_a_role_that_may_only_read(loader: PostgresLoader) -> None:
    """It draws the table and tries loads; a load is refused before the scan."""
    loader.load(SAMPLE)
    loader.query("DROP ROLE IF EXISTS dashboard")
    loader.query("CREATE ROLE dashboard LOGIN PASSWORD 'p@ss'")
    loader.query("GRANT SELECT ON ALL TABLES IN SCHEMA public TO dashboard")
    url = loader.url.replace("loader:", "dashboard:")
    done = loader.run("--db", url, "--plot", "x.svg")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    said = picture_texts((loader.directory / "x.svg").read_bytes())
    assert {"11", "31", "22"} <= set(said)
    report = loader.load("--db", url, "--dry-run", SAMPLE)
    expected = [date_count(day, count, 0) for day, count in SAMPLE_TABLE.items()]
    assert report["dates"] == expected
    what = "permission denied for table active_user"
    refused = (1, b"", f"Error: {loader.shown}: {what}\n")
    assert loader.run_without_end("--db", url) == refused


# -- Crowds, kills, locks


def test_a_crowd(loader: PostgresLoader) -> None:
    """Overlapping loads into a database without tables succeed, and are exact."""
    users: set[str] = set()
    processes = []
    for number in range(8):
        some = {f"u{n}" for n in range(number * 50, number * 50 + 200)}
        users |= some
        name = loader.file(lines(*map(event, sorted(some))), f"{number}.jsons")
        processes.append(loader.start("-q", name))
    for process in processes:
        with process:
            out, err = process.communicate(timeout=120)
        assert (process.returncode, out, err) == (0, b"", b"")
    assert loader.table() == {"2019-12-30": len(users)}
    assert loader.all_users() == {"2019-12-30": users}
    assert len(loader.query("SELECT * FROM load_log")) == 8


def test_killed_at_any_moment(loader: PostgresLoader) -> None:
    loader.load(SAMPLE)
    before = loader.content()[:2]
    name = loader.file(b"".join(numbered_sample(number) for number in range(10)))
    after = {day: 11 * count for day, count in SAMPLE_TABLE.items()}
    chance = random.Random(0)
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    others = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
        "AND pid != pg_backend_pid()"
    )
    for _ in range(KILLS // 2):
        with loader.start("-q", name, **silent) as process:
            time.sleep(chance.uniform(0, 0.6))
            process.kill()
        assert wait_for(lambda: loader.query(others) == [(0,)])
        state = loader.content()[:2]
        counted = "SELECT date, count(*) FROM active_user GROUP BY date"
        assert dict(state[0]) == dict(loader.query(counted))
        assert state == before or dict(state[0]) == after
    loader.load(name)
    assert loader.table() == after


LOCKS = {
    "a load": "SELECT pg_advisory_xact_lock(hashtext('load_active_users'))",
    "rows of counts": (
        "UPDATE active_user_table SET active_user_count = active_user_count"
    ),
    "rows of users": "INSERT INTO active_user VALUES ('2019-12-30', 'new')",
    "a table": "LOCK TABLE active_user_table",
    "a table of users": "LOCK TABLE active_user",
    "the log": "LOCK TABLE load_log",
    "a table that is cleaned": "LOCK TABLE active_user IN SHARE UPDATE EXCLUSIVE MODE",
}


@pytest.mark.parametrize("lock", list(LOCKS))
def test_a_lock_held_for_too_long_is_a_clear_error(
    loader: PostgresLoader, lock: str
) -> None:
    loader.load(SAMPLE)
    name = loader.file(lines(event("new")))
    with psycopg.connect(loader.url) as other:
        other.execute(LOCKS[lock].encode())
        done = loader.with_constants(LOCK_SECONDS=0.1).run("-q", name)
        other.rollback()
    if lock == "a table that is cleaned":  # as by VACUUM, which is in nobody's way
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
        return
    what = "canceling statement due to lock timeout; another session keeps it locked"
    said = f"Error: {loader.shown}: {what}; try again when that is done\n"
    assert (done.returncode, done.stdout, done.stderr.decode()) == (1, b"", said)
    assert loader.table() == SAMPLE_TABLE


def waits(other: psycopg.Connection[Any]) -> bool:
    """Wait until another session waits for a lock."""
    query = "SELECT count(*) FROM pg_locks WHERE NOT granted"
    return bool(wait_for(lambda: other.execute(query).fetchone() == (1,)))


def test_a_load_waits_its_turn_and_can_be_stopped_meanwhile(
    loader: PostgresLoader,
) -> None:
    with psycopg.connect(loader.url) as other:
        other.execute(LOCKS["a load"].encode())
        with loader.start(SAMPLE) as process:
            assert waits(other)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=20)
        assert (process.returncode, out, err) == (130, b"", INTERRUPTED)
        with loader.start("-q", SAMPLE) as process:
            assert waits(other)
            other.commit()
            out, err = process.communicate(timeout=20)
        assert (process.returncode, out, err) == (0, b"", b"")


@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
def test_a_load_waits_its_turn_at_any_level_of_isolation(
    loader: PostgresLoader, level: str
) -> None:
    loader.load(loader.file(lines(event("a"))))
    setting = f"default_transaction_isolation = '{level}'"
    loader.administer(f'ALTER DATABASE "{loader.name}" SET {setting}')
    with psycopg.connect(loader.url) as other:
        other.execute(LOCKS["a load"].encode())
        with loader.start("-q", SAMPLE) as process:
            assert waits(other)
            other.execute("INSERT INTO active_user VALUES ('2019-12-30', 'b')")
            other.execute("UPDATE active_user_table SET active_user_count = 2")
            other.commit()
            out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (0, b"", b"")
    assert loader.table()["2019-12-30"] == 33


def test_a_connection_that_breaks(loader: PostgresLoader) -> None:
    loader.load(SAMPLE)
    with psycopg.connect(loader.url, autocommit=True) as other:
        other.execute("SELECT pg_advisory_lock(hashtext('load_active_users'))")
        with loader.start(loader.file(lines(event("new")))) as process:
            assert waits(other)
            other.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE pid != pg_backend_pid() AND datname = current_database()"
            )
            out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (1, b"")
    what = "terminating connection due to administrator command"
    assert err.decode() == f"Error: {loader.shown}: {what}\n"
    assert loader.table() == SAMPLE_TABLE


# -- Behind a pooler


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (psycopg.OperationalError, True),  # the connection fails or breaks
        (psycopg.InterfaceError, True),
        (psycopg.DataError, False),  # of the driver itself: a value is unusable
        (psycopg.errors.AdminShutdown, True),
        (psycopg.errors.SerializationFailure, True),
        (psycopg.errors.InvalidPassword, False),
        (psycopg.errors.UndefinedTable, False),
    ],
)
def test_which_errors_may_go_away(error: type[psycopg.Error], expected: bool) -> None:
    assert is_transient(error()) is expected


def test_a_commit_without_an_answer(loader: PostgresLoader) -> None:
    """The session ends while it commits: a deferred trigger is run at the end."""
    loader.load(SAMPLE)
    loader.query("""
        CREATE FUNCTION vanish() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            PERFORM pg_terminate_backend(pg_backend_pid());
            RETURN NULL;
        END $$;
        CREATE CONSTRAINT TRIGGER vanishing AFTER INSERT ON active_user
            DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION vanish()""")
    said = loader.refuse(loader.file(lines(event("new"))))
    assert said == (
        f"Error: {loader.shown}: no answer to COMMIT (terminating connection due to "
        "administrator command); the load may be committed; load again to be sure\n"
    )


@pytest.fixture
def pooler(loader: PostgresLoader) -> Iterator[str]:
    """The URL of the database behind a pgbouncer, with a connection per transaction."""
    host, server_port = loader.server.url.rpartition("@")[2].rstrip("/").split(":")
    port = free_port()
    assert PGBOUNCER
    with directory_of_server() as directory:
        log = directory / "log"
        settings = directory / "pgbouncer.ini"
        users = directory / "users"
        users.write_text('"loader" "p@ss"\n')
        settings.write_text(f"""
            [databases]
            * = host={host} port={server_port}
            [pgbouncer]
            listen_addr = 127.0.0.1
            listen_port = {port}
            auth_type = plain
            auth_file = {users}
            pool_mode = transaction
            default_pool_size = 1
            unix_socket_dir =
            """)
        with log.open("wb") as output:
            command = [PGBOUNCER, str(settings)]
            account = unprivileged()
            process = Process(command, stdout=output, stderr=output, cwd="/", **account)
        try:
            assert wait_for(lambda: is_listening(port)), log.read_text()
            yield f"postgresql://loader:p%40ss@127.0.0.1:{port}/{loader.name}"
        finally:
            process.terminate()
            process.wait(30)


@pytest.mark.skipif(PGBOUNCER is None, reason="needs pgbouncer")
def test_loads_through_a_pooler(loader: PostgresLoader, pooler: str) -> None:
    """A load has many statements, of which none may be kept by a name."""
    name = loader.file(lines(*(event(f"u{n}", NOON + n * DAY) for n in range(30))))
    for number in range(4):
        report = loader.load("--db", pooler, name)
        assert [date["added"] for date in report["dates"]] == [int(number == 0)] * 30
    done = loader.run("--db", pooler, "--plot", "x.svg")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    said = " ".join(picture_texts((loader.directory / "x.svg").read_bytes()))
    assert "2019-12-30 to 2020-01-28" in said


def test_no_statement_has_a_name(loader: PostgresLoader) -> None:
    """The log of the server has each of them."""
    setting = "log_min_duration_statement = 0"
    loader.administer(f'ALTER DATABASE "{loader.name}" SET {setting}')
    name = loader.file(lines(*(event(f"u{n}", NOON + n * DAY) for n in range(30))))
    for _ in range(2):
        loader.load(name)
    log = loader.server.log.read_text(errors="replace")
    assert "execute <unnamed>: INSERT INTO active_user " in log
    assert re.findall(r"execute (?!<unnamed>).*", log) == []


# -- A live pipe


def has_users(loader: PostgresLoader, number: int) -> bool:
    return bool(loader.content()) and loader.table() == {"2019-12-30": number}


def test_a_live_pipe_and_a_plot(loader: PostgresLoader) -> None:
    with loader.start("-q", "--commit-every", 1, "-") as process:
        assert process.stdin
        for number in range(2):
            process.stdin.write(lines(event(f"{number}")))
            process.stdin.flush()
            assert wait_for(partial(has_users, loader, number + 1))
        process.terminate()
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (0, b"", b"")
    assert loader.query("SELECT lines, added FROM load_log") == [(2, 2)]
    assert "2" in picture_texts(loader.draw("svg"))


def test_a_live_pipe_whose_database_is_away_at_first(loader: PostgresLoader) -> None:
    """A machine may start both at once."""
    loader.administer(f'ALTER DATABASE "{loader.name}" ALLOW_CONNECTIONS false')
    with loader.start("-q", "--commit-every", 1, "-") as process:
        assert process.stdin
        assert process.stderr
        process.stdin.write(lines(event("a")))
        process.stdin.flush()
        end = threading.Timer(30, process.kill)  # if a line does not come
        end.start()
        said = [process.stderr.readline().decode() for _ in range(2)]
        end.cancel()
        assert [line.partition("connections; ")[2] for line in said] == [
            "what is read will wait for it\n",
            "what was read waits, trying again every 1 s\n",
        ]
        loader.administer(f'ALTER DATABASE "{loader.name}" ALLOW_CONNECTIONS true')
        assert wait_for(partial(has_users, loader, 1))
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (0, b"", b"")


def test_a_live_pipe_whose_database_is_away_for_a_while(loader: PostgresLoader) -> None:
    """What was read is kept, and stored when the database is back."""
    with loader.start("-q", "--commit-every", 1, "-") as process:
        assert process.stdin
        assert process.stderr
        process.stdin.write(lines(event("a")))
        process.stdin.flush()
        assert wait_for(partial(has_users, loader, 1))
        loader.administer(f'ALTER DATABASE "{loader.name}" ALLOW_CONNECTIONS false')
        process.stdin.write(lines(event("b")))
        process.stdin.flush()
        said = process.stderr.readline().decode()
        process.stdin.write(lines(event("c")))
        process.stdin.flush()
        time.sleep(1.2)
        loader.administer(f'ALTER DATABASE "{loader.name}" ALLOW_CONNECTIONS true')
        assert wait_for(partial(has_users, loader, 3))
        process.terminate()
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (0, b"", b"")
    port = loader.server.url.rpartition(":")[2].rstrip("/")
    what = f'connection failed: connection to server at "127.0.0.1", port {port} failed'
    why = f'FATAL: database "{loader.name}" is not currently accepting connections'
    waits = "what was read waits, trying again every 1 s"
    assert said == f"{loader.shown}: {what}: {why}; {waits}\n"


def test_a_live_pipe_whose_server_is_a_standby_at_first(tmp_path: Path) -> None:
    """A live load waits until it is the primary server; any other load is refused."""
    loader = Loader(tmp_path)
    why = "cannot set transaction read-write mode during recovery"
    waits = "; what was read waits, trying again every 1 s"
    with running_postgres("standby.signal") as server:
        url = server.url + "postgres"
        shown = url.replace("loader:p%40ss@", "")
        options = ["-q", "--db", url]
        assert loader.refuse(*options, SAMPLE) == f"Error: {shown}: {why}\n"
        with loader.start(*options, "--commit-every", 1, "-") as process:
            assert process.stdin
            assert process.stderr
            process.stdin.write(lines(event("a")))
            process.stdin.flush()
            said = process.stderr.readline().decode()
            with psycopg.connect(url) as connection:
                connection.execute("SELECT pg_promote()")
            _, err = process.communicate(timeout=60)
            with psycopg.connect(url) as connection:
                users = rows_of_query(
                    connection, "SELECT user_pseudo_id FROM active_user"
                )
    assert (process.returncode, said, err) == (0, f"{shown}: {why}{waits}\n", b"")
    assert users == [("a",)]


# -- Tables of the same names in another schema

ELSEWHERE = {
    "with other columns": """
        CREATE TABLE other.active_user_table (x TEXT);
        CREATE TABLE other.active_user (x TEXT);
        CREATE TABLE other.load_log (x TEXT);
        CREATE TABLE other.loaded_file (x TEXT);
        INSERT INTO other.active_user_table VALUES ('theirs');
        INSERT INTO other.active_user VALUES ('theirs');
        INSERT INTO other.load_log VALUES ('theirs');
        INSERT INTO other.loaded_file VALUES ('theirs')""",
    "with our columns, under another rule": """
        CREATE TABLE other.active_user_table AS TABLE active_user_table;
        CREATE TABLE other.active_user AS TABLE active_user;
        CREATE TABLE other.load_log AS TABLE load_log;
        CREATE TABLE other.loaded_file AS TABLE loaded_file;
        UPDATE other.load_log SET timezone = 'UTC', lines = 0;
        DELETE FROM other.active_user""",
}


@pytest.mark.parametrize("script", ELSEWHERE.values(), ids=ELSEWHERE)
def test_another_schema_has_tables_of_the_same_names(
    loader: PostgresLoader, script: str
) -> None:
    """Ours are used, and the others stay as they are."""

    def theirs() -> list[Any]:
        names = ("active_user_table", "active_user", "load_log", "loaded_file")
        return [
            loader.query(f"SELECT * FROM other.{name} ORDER BY 1") for name in names
        ]

    loader.load(SAMPLE)
    loader.query("CREATE SCHEMA other")
    loader.query(script)
    before = theirs()
    report = loader.load(loader.file(lines(event("new"))))
    assert report["dates"] == [date_count("2019-12-30", 32, 1)]
    assert loader.load("--incremental", SAMPLE)["skipped_files"] == 1
    loader.load("--replace", "--dates", "2019-12-31", loader.file(lines(event("new"))))
    table = SAMPLE_TABLE | {"2019-12-30": 32, "2019-12-31": 0}
    assert (loader.table(), theirs()) == (table, before)


def test_a_first_load_beside_tables_of_another_schema(loader: PostgresLoader) -> None:
    """It makes tables of its own."""
    loader.query("CREATE SCHEMA other")
    loader.query("CREATE TABLE other.active_user AS SELECT 'theirs' AS x")
    loader.load(SAMPLE)
    assert loader.table() == SAMPLE_TABLE
    assert loader.query(OURS) == [("public",)]
    assert loader.query("SELECT * FROM other.active_user") == [("theirs",)]


# -- The view, and a message that is long


def test_the_trend_of_dates_whose_users_were_deleted(either: Loader) -> None:
    """They keep their count. The series of users begins with the first that are left.

    The average is that of the counts.
    """
    some = [("a", 0), ("b", 0), ("a", 1), ("c", 1), ("b", 2), ("d", 2), ("d", 3)]
    either.load(either.file(lines(*(event(u, NOON + n * DAY) for u, n in some))))
    either.execute("DELETE FROM active_user WHERE date < '2020-01-01'")
    rows = either.query("SELECT * FROM active_user_trend ORDER BY date")
    assert [tuple(map(number, row)) for row in rows] == [
        ("2019-12-30", 2, None, None, None, -1, 2),
        ("2019-12-31", 2, None, None, None, 0, 2),
        ("2020-01-01", 2, 2, 2, 1, 1, 2),
        ("2020-01-02", 1, 2, 2, 0.5, 2, 1.8),
    ]
    either.execute("DELETE FROM active_user")
    rows = either.query("SELECT * FROM active_user_trend ORDER BY date")
    assert [tuple(map(number, row)) for row in rows] == [
        ("2019-12-30", 2, None, None, None, None, 2),
        ("2019-12-31", 2, None, None, None, None, 2),
        ("2020-01-01", 2, None, None, None, None, 2),
        ("2020-01-02", 1, None, None, None, None, 1.8),
    ]


def test_a_long_message_of_the_server_is_cut(loader: PostgresLoader) -> None:
    """A trigger of an administrator has said 10 MB."""
    loader.load(SAMPLE)
    loader.query("""
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            RAISE EXCEPTION '%', repeat('no more users, ', 700000);
        END $$;
        CREATE TRIGGER refusal BEFORE INSERT ON active_user
            FOR EACH ROW EXECUTE FUNCTION refuse()""")
    said = loader.refuse(loader.file(lines(event("new"))))
    assert said == f"Error: {loader.shown}: {('no more users, ' * 40)[:500]}\n"


# -- What an administrator refuses

OPT_OUT = {  # people whom a trigger ignores
    "SQLite": """
        CREATE TABLE opted_out (id TEXT);
        INSERT INTO opted_out VALUES ('out'), ('out too');
        CREATE TRIGGER ignore_opted_out BEFORE INSERT ON active_user
        WHEN new.user_pseudo_id IN (SELECT id FROM opted_out)
        BEGIN SELECT RAISE(IGNORE); END;
    """,
    "PostgreSQL": """
        CREATE TABLE opted_out (id TEXT);
        INSERT INTO opted_out VALUES ('out'), ('out too');
        CREATE FUNCTION ignore_opted_out() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN
            IF new.user_pseudo_id IN (SELECT id FROM opted_out) THEN
                RETURN NULL;
            END IF;
            RETURN new;
        END $$;
        CREATE TRIGGER ignore_opted_out BEFORE INSERT ON active_user
        FOR EACH ROW EXECUTE FUNCTION ignore_opted_out();
    """,
}


def test_people_who_opted_out_are_not_counted(either: Loader) -> None:
    """The count is that of the users who are kept; so the date does not look final."""
    kind = "PostgreSQL" if isinstance(either, PostgresLoader) else "SQLite"
    either.load("--dates", "2000-01-01", either.file(lines(event("nobody"))))
    either.execute(OPT_OUT[kind])
    day = "2019-12-30"
    replace = ["--replace", "--dates", day]
    loads: list[tuple[list[str], list[str], list[str], tuple[int, int]]] = [
        # options, users of the load, users that are kept, added and removed
        ([], ["a", "b", "out"], ["a", "b"], (2, 0)),
        ([], ["c", "out", "out too"], ["a", "b", "c"], (1, 0)),
        ([], ["out"], ["a", "b", "c"], (0, 0)),
        ([], ["a", "b", "c", "d", "out"], ["a", "b", "c", "d"], (1, 0)),
        (replace, ["a", "e", "out"], ["a", "e"], (1, 3)),
        (replace, ["a", "e", "out"], ["a", "e"], (0, 0)),
        (replace, ["out", "out too"], [], (0, 2)),
        ([], ["f", "out"], ["f"], (1, 0)),
    ]
    for options, users, kept, (added, removed) in loads:
        report = either.load(*options, either.file(lines(*map(event, users))))
        assert either.users() == kept
        assert either.table()[day] == len(kept)
        expected = date_count(day, len(kept), added, removed)
        assert (report["dates"], report["left_out"]) == ([expected], 0)
    query = "SELECT sum(added - removed) FROM load_log"
    assert int(either.query(query)[0][0]) == 1


def test_a_user_who_opted_out_later_is_removed_by_replace(either: Loader) -> None:
    kind = "PostgreSQL" if isinstance(either, PostgresLoader) else "SQLite"
    either.load(either.file(lines(*map(event, ["a", "out", "x"]))))
    either.execute(OPT_OUT[kind])
    name = either.file(lines(*map(event, ["a", "out"])))
    report = either.load("--replace", "--dates", "2019-12-30", name)
    assert report["dates"] == [date_count("2019-12-30", 1, 0, 2)]
    assert either.users() == ["a"]
    changes = either.query("SELECT added, removed FROM load_log WHERE replaced = 1")
    assert changes == [(0, 2)]


DELETED = {  # people whom a trigger deletes
    "SQLite": """
        CREATE TRIGGER delete_opted_out AFTER INSERT ON active_user
        WHEN new.user_pseudo_id LIKE 'out%'
        BEGIN DELETE FROM active_user WHERE user_pseudo_id LIKE 'out%'; END;
    """,
    "PostgreSQL": """
        CREATE FUNCTION delete_opted_out() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN
            DELETE FROM active_user WHERE user_pseudo_id LIKE 'out%';
            RETURN NULL;
        END $$;
        CREATE TRIGGER delete_opted_out AFTER INSERT ON active_user
        FOR EACH STATEMENT EXECUTE FUNCTION delete_opted_out();
    """,
}


def test_people_whom_a_trigger_deletes_are_not_counted(either: Loader) -> None:
    kind = "PostgreSQL" if isinstance(either, PostgresLoader) else "SQLite"
    either.load("--dates", "2000-01-01", either.file(lines(event("nobody"))))
    either.execute(DELETED[kind])
    replace = ["--replace", "--dates", "2019-12-30"]
    loads: list[tuple[list[str], list[str], list[str]]] = [
        ([], ["a", "b", "out"], ["a", "b"]),
        ([], ["c", "out", "out too"], ["a", "b", "c"]),
        (replace, ["a", "d", "out"], ["a", "d"]),
        ([], ["e", "out"], ["a", "d", "e"]),
    ]
    for options, users, kept in loads:
        report = either.load(*options, either.file(lines(*map(event, users))))
        assert either.users() == kept
        assert either.table() == {"2019-12-30": len(kept)}
        assert report["dates"][0]["active_user_count"] == len(kept)
        assert report["left_out"] == 0


def test_row_security_that_hides_users_from_the_loader(loader: PostgresLoader) -> None:
    """Counts of what is shown would be wrong: the load is refused."""
    loader.load(SAMPLE)
    role = f"limited_{loader.name}"
    url = loader.url.replace("loader:", f"{role}:")
    shown = loader.query("SELECT min(user_pseudo_id) FROM active_user")[0][0]
    loader.query(f"CREATE ROLE {role} LOGIN PASSWORD 'p@ss'")
    loader.query(f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {role}")
    name = loader.file(lines(event("new"), event("new", NOON - DAY)))
    assert loader.load("--db", url, "--dry-run", name)["dates"][1]["added"] == 1

    for table in ("active_user", "active_user_table", "load_log"):
        loader.query(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
        policy = "true"
        if table == "active_user":
            policy = f"user_pseudo_id = '{shown}'"
        loader.query(f"CREATE POLICY visible ON {table} USING ({policy})")
        before = loader.content()
        what = (
            f'query would be affected by row-level security policy for table "{table}"'
        )
        for options in ([], ["--dry-run"], ["--replace", "--dates", "2019-12-30"]):
            said = loader.refuse("--db", url, *options, name)
            assert said.startswith(f"Error: {loader.shown}: "), said
            if table == "active_user":
                assert what in said
        assert loader.content() == before
        loader.query(f"ALTER TABLE {table} DISABLE ROW LEVEL SECURITY")
    loader.load("--db", url, name)
    assert loader.table() == SAMPLE_TABLE | {"2019-12-29": 12, "2019-12-30": 32}


@pytest.mark.parametrize("is_encoded", [False, True], ids=["as it is", "encoded"])
@pytest.mark.parametrize("password", ["a#b", "a?b", "a[b", "a]b", "a\\b", "#?[]\\&=:"])
def test_passwords_of_unusual_characters(
    loader: PostgresLoader, password: str, is_encoded: bool
) -> None:
    """libpq takes them as they are; only @, / and % must be encoded."""
    role = f"special_{loader.name}"
    loader.query(f"CREATE ROLE {role} LOGIN PASSWORD '{password}'")
    loader.query(f"GRANT ALL ON SCHEMA public TO {role}")
    inside = quote(password, safe="") if is_encoded else password
    url = loader.url.replace("loader:p%40ss", f"{role}:{inside}")
    loader.load("--db", url, SAMPLE)
    assert loader.table() == SAMPLE_TABLE
    done = loader.run("--db", url, "--plot", "x.svg")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert loader.query("SELECT sources FROM load_log") == [(f'["{SAMPLE}"]',)]


# -- A server that does not answer

LOADER_WAITS = """SELECT pid FROM pg_stat_activity
    WHERE datname = current_database() AND pid != pg_backend_pid() AND wait_event = """
IMPATIENT = {"ANSWER_SECONDS": 0.1, "LOCK_SECONDS": 0.1, "LIVE_LOCK_SECONDS": 0.1}
NO_ANSWER = "no answer for 5.1 s"  # the time to wait for a lock, and 5 seconds
IN_DOUBT = f"no answer to COMMIT ({NO_ANSWER}); the load may be committed; "
IN_DOUBT += "load again to be sure"
TRIES = "; what was read waits, trying again every 1 s"
RULED_BY_LOCK = """
    CREATE FUNCTION wait_for_lock() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN PERFORM pg_advisory_xact_lock(1); RETURN NULL; END $$;
    CREATE CONSTRAINT TRIGGER at_commit AFTER INSERT OR UPDATE ON load_log
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION wait_for_lock();
"""


@pytest.fixture(scope="module")
def own_server() -> Iterator[PostgresServer]:
    """A server that nothing else uses while a test spoils it."""
    with running_postgres() as server:
        yield server


class Standby:
    """A database on a server that may wait for a standby that does not exist."""

    def __init__(self, loader: PostgresLoader) -> None:
        self.loader = loader

    def set(self, name: str) -> None:
        self.loader.administer(f"ALTER SYSTEM SET synchronous_standby_names = '{name}'")
        self.loader.administer("SELECT pg_reload_conf()")

    def lose(self) -> None:
        """Return when a COMMIT waits without end."""
        self.loader.query("CREATE TABLE IF NOT EXISTS probe (x INT)")
        self.set("missing")
        for _ in range(1000):  # until the server has read its configuration
            probe = psycopg.connect(self.loader.url)
            probe.execute("INSERT INTO probe VALUES (1)")
            thread = threading.Thread(target=probe.commit)
            thread.start()
            while thread.is_alive() and not self.waiting():
                time.sleep(0.01)
            waits = self.waiting()
            probe.cancel()
            thread.join()
            probe.close()
            if waits:
                assert wait_for(lambda: not self.waiting())
                return
        raise AssertionError("no COMMIT waits for the standby")

    def waiting(self) -> list[int]:
        """Return the backends whose COMMIT waits."""
        return [pid for (pid,) in self.loader.query(f"{LOADER_WAITS} 'SyncRep'")]

    def find(self) -> None:
        """Let every COMMIT end."""
        self.set("")
        assert wait_for(lambda: not self.waiting())


@pytest.fixture
def standby(tmp_path: Path, own_server: PostgresServer) -> Iterator[Standby]:
    loader = PostgresLoader(tmp_path, own_server)
    standby = Standby(loader)
    yield standby
    standby.find()
    loader.drop()


def read_line(process: Process) -> str:
    """Return the next line on standard error, which must come within two minutes."""
    assert process.stderr
    assert wait_for(lambda: unread(process.stderr), 120), "it says nothing"
    return process.stderr.readline().decode()


def write(process: Process, *users: str) -> None:
    assert process.stdin
    process.stdin.write(lines(*map(event, users)))
    process.stdin.flush()


def test_a_commit_that_is_not_answered(standby: Standby) -> None:
    """It may be committed, and the message says so. Loading again makes sure."""
    loader = standby.loader
    loader.load(loader.file(lines(event("before"))))
    standby.lose()
    with loader.with_constants(**IMPATIENT).start(SAMPLE) as process:
        out, err = process.communicate(timeout=60)
    said = f"Error: {loader.shown}: {IN_DOUBT}\n"
    assert (process.returncode, out, err.decode()) == (1, b"", said)
    standby.find()
    loader.load(SAMPLE)
    assert loader.table() == SAMPLE_TABLE | {"2019-12-30": 32}
    query = "SELECT date, count(*) FROM active_user GROUP BY date"
    assert dict(loader.query(query)) == loader.table()
    added = "SELECT sum(added)::INT, (SELECT count(*) FROM active_user) FROM load_log"
    assert loader.query(added) == [(65, 65)]


@pytest.mark.begin_early
def test_a_live_load_whose_commit_is_not_answered(standby: Standby) -> None:
    """One line says so, and it goes on. All is stored and counted once."""
    loader = standby.loader
    command = loader.with_constants(**IMPATIENT)
    with command.start("-q", "--commit-every", 1, "-") as process:
        write(process, "a")
        assert wait_for(partial(has_users, loader, 1))
        standby.lose()
        write(process, "b", "c")
        assert read_line(process) == f"{loader.shown}: {IN_DOUBT}{TRIES}\n"
        write(process, "c", "d")
        assert process.stdin and wait_for(lambda: not unread(process.stdin))
        time.sleep(2.5)  # it tries again meanwhile
        assert process.poll() is None
        standby.find()
        assert wait_for(partial(has_users, loader, 4))
        write(process, "e")
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, b"", b"")
    assert loader.users() == ["a", "b", "c", "d", "e"]
    assert loader.query("SELECT lines, added FROM load_log") == [(6, 5)]


@pytest.mark.begin_early
def test_a_second_signal_while_a_commit_is_not_answered(standby: Standby) -> None:
    """It ends the load, and messages tell what may not be stored."""
    loader = standby.loader
    told = {**IMPATIENT, "LOCK_SECONDS": 600}
    patient = {**told, "LIVE_LOCK_SECONDS": 600}
    for constants, is_told in ((told, True), (patient, False)):
        standby.find()
        loader.query("DROP TABLE IF EXISTS load_log, loaded_file CASCADE")
        loader.query("DROP TABLE IF EXISTS active_user, active_user_table CASCADE")
        command = loader.with_constants(**constants)
        with command.start("-q", "--commit-every", 1, "-") as process:
            write(process, "a")
            assert wait_for(partial(has_users, loader, 1))
            standby.lose()
            write(process, "b", "c")
            assert wait_for(standby.waiting)
            if is_told:
                assert read_line(process) == f"{loader.shown}: {IN_DOUBT}{TRIES}\n"
            process.terminate()
            time.sleep(1)  # it has begun its last tries, or still waits
            assert process.poll() is None
            process.terminate()
            out, err = process.communicate(timeout=60)
        assert (process.returncode, out) == (143, b"")
        lost = "not stored: the last lines that were read (2), up to -:3"
        said = err.decode().splitlines()
        assert said[0] == f"{lost}; some of them may be committed"
        assert said[1].startswith("Terminated: ")
        # The server commits when it finds the standby: nothing is rolled back.
        assert "rolled back" not in said[1]
        assert len(said) == 2


def stop(pids: list[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)


def go_on(pids: list[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


@pytest.mark.begin_early
@AS_ROOT
@pytest.mark.parametrize("moment", ["before", "at COMMIT"])
@pytest.mark.parametrize("is_live", [False, True], ids=["batch", "live"])
def test_a_server_that_is_stopped(standby: Standby, moment: str, is_live: bool) -> None:
    """SIGSTOP comes to it, or its machine hangs: its connections stay open."""
    loader = standby.loader
    loader.load(loader.file(lines(event("a"))))
    if moment == "at COMMIT":
        loader.query(RULED_BY_LOCK)
    lock = "1" if moment == "at COMMIT" else "hashtext('load_active_users')"
    constants = {**IMPATIENT, "LOCK_SECONDS": 8, "LIVE_LOCK_SECONDS": 8}
    options = ["-q", "--commit-every", 1, "-"] if is_live else ["-q", "b.jsons"]
    loader.file(lines(event("b"), event("c")), "b.jsons")
    with ExitStack() as stack:
        other = stack.enter_context(psycopg.connect(loader.url, autocommit=True))
        other.execute(f"SELECT pg_advisory_lock({lock})".encode())
        command = loader.with_constants(**constants)
        process = stack.enter_context(command.start(*options))
        if is_live:
            write(process, "b", "c")
        stopped = wait_for(
            lambda: [row[0] for row in loader.query(f"{LOADER_WAITS} 'advisory'")]
        )
        assert len(stopped) == 1
        stop(stopped)
        stack.callback(go_on, stopped)
        said = read_line(process)
        assert (process.poll() is None) or not is_live
        go_on(stopped)
        other.execute("SELECT pg_advisory_unlock_all()")
        out, err = process.communicate(timeout=90)
    what = "no answer for 13 s"
    if moment == "at COMMIT":
        what = f"no answer to COMMIT ({what}); the load may be committed; "
        what += "load again to be sure"
    if is_live:
        assert said == f"{loader.shown}: {what}{TRIES}\n"
        assert (process.returncode, out, err) == (0, b"", b"")
        assert loader.users() == ["a", "b", "c"]
        log = loader.query("SELECT lines, added FROM load_log ORDER BY lines")
        assert log == [(1, 1), (2, 2)]
    else:
        assert said == f"Error: {loader.shown}: {what}\n"
        assert (process.returncode, out, err) == (1, b"", b"")
        loader.load("b.jsons")
    assert loader.table() == {"2019-12-30": 3}


def test_a_lost_network_is_noticed(loader: PostgresLoader) -> None:
    """By keepalives and a time limit for what is not acknowledged."""

    def settings(more: str) -> dict[str, str]:
        database = load_active_users.Postgres(loader.url + more, 60.0)
        with database.connection as connection:
            found: dict[str, str] = connection.info.get_parameters()
        return found

    usual = {
        "keepalives_idle": "30",
        "keepalives_interval": "10",
        "keepalives_count": "3",
        "tcp_user_timeout": "60000",
        "connect_timeout": "10",
    }
    assert usual.items() <= settings("").items()
    own = {"keepalives_idle": "7", "tcp_user_timeout": "1234", "connect_timeout": "3"}
    query = "&".join(f"{name}={value}" for name, value in own.items())
    assert {**usual, **own}.items() <= settings(f"?{query}").items()
    assert settings("?keepalives=0")["keepalives"] == "0"


# -- What a signal leaves


def test_a_signal_during_commit(standby: Standby) -> None:
    """The load may be committed, and here it is."""
    loader = standby.loader
    loader.load(loader.file(lines(event("before"))))
    standby.lose()
    with loader.start(SAMPLE) as process:
        assert wait_for(standby.waiting)
        process.terminate()
        out, err = process.communicate(timeout=30)
    said = b"Terminated: the load was being committed, and may be committed\n"
    assert (process.returncode, out, err) == (143, b"", said)
    standby.find()
    assert loader.table() == SAMPLE_TABLE | {"2019-12-30": 32}


def test_a_signal_before_commit(loader: PostgresLoader) -> None:
    """It is storing users, and waits for another who stores one. All is rolled
    back."""
    loader.load(loader.file(lines(event("before"))))
    name = loader.file(lines(event("a", NOON - DAY), event("new")))
    with psycopg.connect(loader.url) as other:
        other.execute(LOCKS["rows of users"].encode())
        with loader.start(name) as process:
            assert waits(other)
            process.terminate()
            out, err = process.communicate(timeout=30)
        other.rollback()
    assert (process.returncode, out, err) == (143, b"", TERMINATED)
    assert wait_for(lambda: not loader.query(f"{LOADER_WAITS} 'transactionid'"))
    assert loader.table() == {"2019-12-30": 1}
    assert loader.all_users() == {"2019-12-30": {"before"}}


# -- What a live load outlives


def waiting_for_lock(other: psycopg.Connection[Any]) -> list[int]:
    """Wait until another session waits for an advisory lock; return its process."""
    query = f"{LOADER_WAITS} 'advisory'"
    found: list[int] = wait_for(lambda: [pid for (pid,) in rows_of_query(other, query)])
    assert found, "nobody waits"
    return found


OUTLIVED = {
    "idle": "",  # of a connection that was ended, it may not read why
    "terminated": "terminating connection due to administrator command",
    "cancelled": "canceling statement due to statement timeout",
}


@pytest.mark.parametrize("case", list(OUTLIVED))
def test_what_a_live_load_outlives(loader: PostgresLoader, case: str) -> None:
    """An administrator's settings and commands end its transaction."""
    settings = {
        "idle": "idle_in_transaction_session_timeout = '1ms'",
        "cancelled": "statement_timeout = '1s'",
    }
    role = f'ALTER ROLE loader IN DATABASE "{loader.name}"'
    with ExitStack() as stack:
        # Its session has begun before there are other settings.
        other = stack.enter_context(psycopg.connect(loader.url, autocommit=True))
        command = loader.with_constants(LIVE_LOCK_SECONDS=60)
        process = stack.enter_context(command.start("-q", "--commit-every", 1, "-"))
        write(process, "a")
        assert wait_for(partial(has_users, loader, 1))
        other.execute("SELECT pg_advisory_lock(hashtext('load_active_users'))")
        if case in settings:
            loader.administer(f"{role} SET {settings[case]}")
        write(process, "b")
        (backend,) = waiting_for_lock(other)
        gone = f"SELECT 1 FROM pg_stat_activity WHERE pid = {backend}"
        if case == "idle":
            process.send_signal(signal.SIGSTOP)
            other.execute("SELECT pg_advisory_unlock_all()")
            assert wait_for(lambda: not rows_of_query(other, gone))
            loader.administer(f"{role} RESET ALL")
            process.send_signal(signal.SIGCONT)
        elif case == "terminated":
            rows_of_query(other, f"SELECT pg_terminate_backend({backend})")
        said = read_line(process)
        write(process, "c")
        loader.administer(f"{role} RESET ALL")
        other.execute("SELECT pg_advisory_unlock_all()")
        out, err = process.communicate(timeout=60)
    assert said.startswith(f"{loader.shown}: {OUTLIVED[case]}"), said
    assert said.endswith(f"{TRIES}\n")
    assert said.count("\n") == 1
    assert (process.returncode, out, err) == (0, b"", b"")
    assert loader.users() == ["a", "b", "c"]
    assert loader.query("SELECT lines, added FROM load_log") == [(3, 3)]


def test_a_live_load_outlives_a_restart(tmp_path: Path) -> None:
    with running_postgres() as server:
        loader = PostgresLoader(tmp_path, server)
        data = server.log.parent / "data"
        control = [str(INITDB.with_name("pg_ctl")), "-D", str(data), "-w"]
        account = unprivileged()

        def run(*args: str) -> None:
            subprocess.run(
                [*control, *args],
                check=True,
                cwd="/",
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                **account,
            )

        settings = (data / "postmaster.opts").read_text().split(" ", 1)[1]
        with loader.start("-q", "--commit-every", 1, "-") as process:
            write(process, "a")
            assert wait_for(partial(has_users, loader, 1))
            run("-m", "fast", "stop")
            write(process, "b")
            said = read_line(process)
            write(process, "c")
            run("-o", settings.strip(), "start")
            try:
                assert wait_for(partial(has_users, loader, 3))
                write(process, "d")
                out, err = process.communicate(timeout=60)
                users = loader.users()
                log = loader.query("SELECT lines, added FROM load_log")
            finally:
                run("-m", "immediate", "stop")
    assert said.startswith(f"{loader.shown}: "), said
    assert said.endswith(f"{TRIES}\n")
    assert (process.returncode, out, err) == (0, b"", b"")
    assert (users, log) == (["a", "b", "c", "d"], [(4, 4)])


TRANSIENT = ["08000", "08003", "08006", "08P01", "25P03", "25006", "25P02", "40001"]
TRANSIENT += ["40P01", "53000", "53100", "53200", "53300", "55000", "55006", "55P03"]
TRANSIENT += ["57000", "57014", "57P01", "57P02", "57P03", "57P05", "58000", "58030"]
TRANSIENT += ["0A000"]
LASTING = ["22001", "22P05", "23505", "23502", "23514", "28000", "28P01", "3D000"]
LASTING += ["42501", "42P01", "42703", "42601", "54000", "P0001", "XX000", "XX001"]


@pytest.mark.parametrize(
    ("code", "expected"),
    [*((code, True) for code in TRANSIENT), *((code, False) for code in LASTING)],
)
def test_which_errors_pass(code: str, expected: bool) -> None:
    """The class of an error tells: its first two characters."""
    error = psycopg.errors.lookup(code)("some text")
    assert error.sqlstate == code
    assert load_active_users.is_transient(error) == expected
    kind = load_active_users.Unavailable if expected else load_active_users.LoadError
    with pytest.raises(load_active_users.LoadError) as raised:
        with load_active_users.about("x"):
            raise error
    assert type(raised.value) is kind


def test_which_errors_without_a_code_pass() -> None:
    """Those of a connection that is lost."""
    for error, expected in (
        (psycopg.OperationalError("the connection is lost"), True),
        (psycopg.InterfaceError("the connection is closed"), True),
        (psycopg.ProgrammingError("a wrong program"), False),
        (psycopg.DataError("wrong data"), False),
        (TimeoutError("no answer"), True),
        (ValueError("wrong"), False),
    ):
        assert load_active_users.is_transient(error) == expected


# -- Secrets

GUESSES = [("app", "app"), ("admin", "admin"), ("postgres", "password")]


@pytest.mark.parametrize(("user", "password"), GUESSES)
def test_a_password_that_is_a_common_word(
    loader: PostgresLoader, user: str, password: str
) -> None:
    """The message says what is wrong, with *** where the password stands."""
    place = loader.url.rpartition("@")[2]
    url = f"postgresql://{user}:{password}@{place}"
    said = f'password authentication failed for user "{user}"'.replace(password, "***")
    for args in ([SAMPLE], ["--plot", "x.svg"]):
        err = loader.run("--db", url, *args).stderr.decode()
        assert err.startswith(f"Error: postgresql://{place}: "), err
        assert err.endswith(f"FATAL: {said}\n")
        _, message = err.split(f"postgresql://{place}: ")
        assert password not in message
        assert err.count("\n") == 1
