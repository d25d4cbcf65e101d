"""The tables in SQLite: repeats, --replace, final dates, other databases, upgrades."""

import gzip
import re
import sqlite3
import time
from contextlib import closing
from datetime import UTC, date, datetime, timedelta
from typing import Any

import oracle
import pytest
from helpers import (
    DAY,
    NOON,
    NOT_AN_OBJECT,
    ROOT,
    SAMPLE,
    SAMPLE_LINES,
    SAMPLE_TABLE,
    SCRIPT,
    Loader,
    date_count,
    event,
    lines,
    noon,
    readme_blocks,
    usec,
    when_it_reads,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from servers import PostgresLoader

# -- Loads are idempotent


def test_a_second_load_changes_nothing(loader: Loader) -> None:
    loader.load(SAMPLE)
    before = loader.content_but_log()
    report = loader.load(SAMPLE)
    expected = [date_count(day, count, 0) for day, count in SAMPLE_TABLE.items()]
    assert report["dates"] == expected
    assert loader.table() == SAMPLE_TABLE
    assert loader.content_but_log() == before


def test_halves_and_overlaps_in_any_order(loader: Loader) -> None:
    rows = SAMPLE_LINES
    pieces = [rows[600:], rows[300:700], rows[:400], rows[::-1][:50]]
    for number, piece in enumerate(pieces):
        loader.load(loader.file(b"".join(piece), f"{number}.jsons"))
    assert loader.table() == SAMPLE_TABLE


def test_a_late_event_touches_its_own_date_only(loader: Loader) -> None:
    loader.load(SAMPLE)
    report = loader.load(loader.file(lines(event("late", time=NOON - DAY))))
    assert report["dates"] == [date_count("2019-12-29", 12, 1)]
    assert loader.table() == SAMPLE_TABLE | {"2019-12-29": 12}


def test_a_count_that_is_too_low_is_counted_anew(loader: Loader) -> None:
    loader.load(loader.file(lines(event("a"))))
    loader.execute("UPDATE active_user_table SET active_user_count = 0")
    report = loader.load(loader.file(lines(event("b"))))
    assert report["dates"] == [date_count("2019-12-30", 2, 1)]


def test_the_table_is_the_count_of_active_user(loader: Loader) -> None:
    other = loader.file(lines(event("a"), event("b", time=usec("2001-01-01"))))
    for file in (SAMPLE, other):
        loader.load(file)
    counted = loader.query("SELECT date, count(*) FROM active_user GROUP BY date")
    assert counted == list(loader.table().items())


users = st.sets(st.sampled_from("abcd"), max_size=3)
replaced = st.none() | st.tuples(st.integers(0, 2), st.integers(0, 1))
loads = st.tuples(st.lists(users, max_size=3), replaced, st.booleans())
forgotten = st.integers(0, 2)


@settings(max_examples=40)
@given(st.lists(loads | forgotten, min_size=1, max_size=6))
@example([([{"a", "b"}], None, False), 0, ([{"c"}], (0, 0), False)])
@example([([{"a"}, {"a"}], None, False), 0, ([{"b"}, {"b"}], (1, 1), True)])
def test_any_loads_in_any_order(
    tmp_path_factory: pytest.TempPathFactory, steps: list[Any]
) -> None:
    """Loads merge, replace or only try; in between, the users of a date are deleted."""
    loader = Loader(tmp_path_factory.mktemp("loads"))
    days = ["2019-12-30", "2019-12-31", "2020-01-01", "2020-01-02"]
    expected = oracle.Table()
    loader.load(loader.file(b""))
    for step in steps:
        if isinstance(step, int):
            loader.execute(f"DELETE FROM active_user WHERE date = '{days[step]}'")
            expected.forget(days[step])
            continue
        some, replace, dry_run = step
        args: list[object] = ["--dry-run"] * dry_run
        dates = oracle.USUAL_DATES
        if replace:
            dates = days[replace[0]], days[sum(replace)]
            args += ["--replace", "--dates", "..".join(dates)]
        events = (event(u, NOON + n * DAY) for n, us in enumerate(some) for u in us)
        data = lines(*events)
        report = expected.load(data, dates, bool(replace), dry_run)
        assert loader.load(*args, loader.file(data)) == report
        assert loader.table() == dict(sorted(expected.counts.items()))
        assert loader.all_users() == {
            day: us for day, us in expected.users.items() if us
        }


def test_load_log_has_a_row_per_load(loader: Loader) -> None:
    late = event("late", time=noon("2020-01-05"))
    other = {"event_name": "x"}
    data = lines(event("a"), event(None), late, event(msec=1), other, b"", b"bad")
    args = ["--max-bad-records", 1, "--valuable-event", "x_*", "--valuable-event", "b"]
    name = loader.file(gzip.compress(data))
    done = loader.run(*args, "--dates", "2019-12-01..2019-12-31", name)
    assert (done.returncode, done.stderr.decode()) == (
        0,
        f"{name}:7: {NOT_AN_OBJECT}\n",
    )
    columns = [column[1] for column in loader.query("PRAGMA table_info(load_log)")]
    row = dict(zip(columns, *loader.query("SELECT * FROM load_log"), strict=True))
    assert len(row.pop("load_id")) == 16
    loaded_at = datetime.fromisoformat(row.pop("loaded_at"))
    assert abs(loaded_at - datetime.now(UTC)) < timedelta(minutes=5)
    assert 0 < row.pop("seconds") < 300
    assert row == {
        "sources": '["events.jsons"]',
        "bytes": (loader.directory / name).stat().st_size,
        "timezone": "US/Central",
        "event_names": '["user_engagement"]',
        "min_engagement_msec": 3000,
        "valuable_events": '["b","x_*"]',
        "dates": "2019-12-01..2019-12-31",
        "replaced": 0,
        "lines": 7,
        "blank_lines": 1,
        "engagement_events": 4,
        "active_events": 3,
        "anonymous_events": 1,
        "out_of_range_events": 1,
        "bad_records": 1,
        "added": 1,
        "removed": 0,
        "left_out": 0,
        "skipped_files": 0,
    }


def test_db_names_the_file(loader: Loader) -> None:
    loader.db = loader.directory / "other name?.sqlite"
    loader.load("--db", loader.db, SAMPLE)
    assert loader.table() == SAMPLE_TABLE
    assert [path.name for path in loader.directory.iterdir()] == ["other name?.sqlite"]


def test_dry_run_writes_nothing(loader: Loader) -> None:
    report = loader.load("--dry-run", SAMPLE)
    assert [day["added"] for day in report["dates"]] == [11, 31, 22]
    assert list(loader.directory.iterdir()) == []
    loader.load("-", input=lines(event("a")))
    before = loader.db.read_bytes(), loader.db.stat()
    report = loader.load("--dry-run", "-", input=lines(event("a"), event("b")))
    assert report["dates"] == [date_count("2019-12-30", 2, 1)]
    data = lines(event("b"), event("c"))
    replace = ["--replace", "--dates", "2019-12-30"]
    report = loader.load("--dry-run", *replace, "-", input=data)
    assert report["dates"] == [date_count("2019-12-30", 2, 2, 1)]
    rejects = ["--rejects", "rejects", "--max-bad-records", 1]
    done = loader.run("--dry-run", *rejects, "-", input=b"bad\n")
    assert done.returncode == 0
    assert done.stderr.decode().startswith(f"-:1: {NOT_AN_OBJECT}\nWarning: none of ")
    assert (loader.db.read_bytes(), loader.db.stat()) == before
    assert [path.name for path in loader.directory.iterdir()] == [loader.db.name]


def test_a_database_in_utf_16(loader: Loader) -> None:
    """It sorts users in another order than Python does."""
    with closing(sqlite3.connect(loader.db)) as db:
        db.execute("PRAGMA encoding = 'UTF-16'")
        db.executescript((ROOT / "schema.sql").read_text())
    users = [f"a{number}" for number in range(50)]
    users += [f"{chr(256 + number)}z" for number in range(300)]
    data = lines(*map(event, users))
    for added in (350, 0, 0):
        report = loader.load(loader.file(data))
        assert report["dates"] == [date_count("2019-12-30", 350, added)]


# -- Replacing dates


def test_replace_makes_its_dates_hold_what_the_load_holds(loader: Loader) -> None:
    """Dates without users get a count of 0. Into other dates it merges."""
    loader.load(SAMPLE)
    old = lines(event("old"), event("kept"), event("next", NOON + DAY))
    loader.load(loader.file(old))
    clocks = [event("clock", noon("2099-06-12")), event("clock", 0)]
    others = [event("other", NOON - DAY), *clocks]
    data = lines(event("kept"), event("new"), event("new"), *others)
    replace = ["--replace", "--dates", "2019-12-30..2020-01-01"]
    report = loader.load(*replace, loader.file(data))
    assert report["dates"] == [
        date_count("2019-12-29", 12, 1),
        date_count("2019-12-30", 2, 1, 32),
        date_count("2019-12-31", 0, 0, 23),
        date_count("2020-01-01", 0, 0, 0),
    ]
    assert report["out_of_range_events"] == 2
    assert loader.table() == {
        "2019-12-29": 12,
        "2019-12-30": 2,
        "2019-12-31": 0,
        "2020-01-01": 0,
    }
    assert (loader.users(), loader.users("2019-12-31")) == (["kept", "new"], [])
    logged = loader.last_log("replaced", "dates", "added", "removed", "left_out")
    assert logged == (1, "2019-12-30..2020-01-01", 2, 55, 0)


@pytest.mark.parametrize("day", ["1999-06-12", "2099-06-12"])
def test_replace_of_an_unusual_date(loader: Loader, day: str) -> None:
    """It merges into no other: beside such a date lie other unusual ones."""
    days = ("1995-06-12", "2019-12-30", "2095-06-12")
    others = [event("clock", noon(other)) for other in days]
    data = lines(event("a", noon(day)), *others)
    report = loader.load("--replace", "--dates", day, loader.file(data))
    expected = [date_count(day, 1, 1)]
    assert (report["dates"], report["out_of_range_events"]) == (expected, 3)


def test_replace_by_the_same_changes_nothing(loader: Loader) -> None:
    args = ["--replace", "--dates", "2019-12-29..2019-12-31", SAMPLE]
    expected = [date_count(day, count, 0) for day, count in SAMPLE_TABLE.items()]
    assert [each["added"] for each in loader.load(*args)["dates"]] == [11, 31, 22]
    assert loader.load(*args)["dates"] == expected
    assert loader.load(SAMPLE)["dates"] == expected


def test_replace_by_the_same_writes_no_user(loader: Loader) -> None:
    """Nor is one deleted and added again, which triggers and replicas would see."""
    args = ["--replace", "--dates", "2019-12-29..2019-12-31", SAMPLE]
    loader.load(*args)
    loader.execute(
        """CREATE TABLE seen (user_pseudo_id TEXT);
        CREATE TRIGGER see_deleted AFTER DELETE ON active_user
            BEGIN INSERT INTO seen VALUES (old.user_pseudo_id); END;
        CREATE TRIGGER see_added AFTER INSERT ON active_user
            BEGIN INSERT INTO seen VALUES (new.user_pseudo_id); END"""
    )
    loader.load(*args)
    assert loader.query("SELECT * FROM seen") == []


def test_replace_by_nothing(loader: Loader) -> None:
    loader.load(loader.file(lines(event("a"), event("b", NOON + DAY))))
    report = loader.load("--replace", "--dates", "2019-12-30", "-")
    assert report["dates"] == [date_count("2019-12-30", 0, 0, 1)]
    assert loader.table() == {"2019-12-30": 0, "2019-12-31": 1}
    report = loader.load(loader.file(lines(event("c"))))
    assert report["dates"] == [date_count("2019-12-30", 1, 1)]


# -- Final dates: users were deleted from active_user


def with_final_dates(loader: Loader, where: str) -> None:
    """Load three users on each of two dates, and delete some by hand."""
    some = [event(user, NOON + n * DAY) for user in "abc" for n in (0, 1)]
    loader.load(loader.file(lines(*some)))
    loader.execute(f"DELETE FROM active_user WHERE {where}")


LATE = lines(event("late"), event("a"), event("late", NOON + DAY))
DELETED = {
    "all of a date": ("date < '2019-12-31'", []),
    "some of a date": ("date = '2019-12-30' AND user_pseudo_id = 'b'", ["a", "c"]),
}


@pytest.mark.parametrize(("where", "left"), DELETED.values(), ids=DELETED)
def test_a_date_whose_users_were_deleted_is_final(
    loader: Loader, where: str, left: list[str]
) -> None:
    with_final_dates(loader, where)
    for args in (["--dry-run"], []):
        report = loader.load(*args, loader.file(LATE))
        assert report["dates"] == [
            date_count("2019-12-30", 3, 0),
            date_count("2019-12-31", 4, 1),
        ]
        assert report["left_out"] == 2
    assert loader.table() == {"2019-12-30": 3, "2019-12-31": 4}
    assert loader.users() == left
    assert loader.last_log("added", "left_out") == (1, 2)
    done = loader.run(loader.file(LATE), env={"COLUMNS": "110"})
    assert done.stdout.decode().splitlines()[-1] == (
        "3 lines → 3 engagement events → 3 active → 1 user-day (0 new); "
        "2 users left out of final dates"
    )


def test_a_date_that_is_not_final_leaves_nobody_out(loader: Loader) -> None:
    with_final_dates(loader, "date < '2019-12-30'")
    assert loader.load(loader.file(LATE))["left_out"] == 0
    assert loader.last_log("left_out") == (0,)


@pytest.mark.parametrize(("where", "left"), DELETED.values(), ids=DELETED)
def test_replace_makes_a_final_date_a_normal_one(
    loader: Loader, where: str, left: list[str]
) -> None:
    with_final_dates(loader, where)
    report = loader.load("--replace", "--dates", "2019-12-30", loader.file(LATE))
    removed = len(set(left) - {"a"})
    assert report["dates"] == [
        date_count("2019-12-30", 2, 2 - ("a" in left), removed),
        date_count("2019-12-31", 4, 1),
    ]
    assert report["left_out"] == 0
    report = loader.load(loader.file(lines(event("e"))))
    assert report["dates"] == [date_count("2019-12-30", 3, 1)]
    assert loader.users() == ["a", "e", "late"]


def test_a_neighbour_that_is_final_stays_so_under_replace(loader: Loader) -> None:
    with_final_dates(loader, "date = '2019-12-31'")
    report = loader.load("--replace", "--dates", "2019-12-30", loader.file(LATE))
    assert report["dates"] == [
        date_count("2019-12-30", 2, 1, 2),
        date_count("2019-12-31", 3, 0),
    ]
    assert report["left_out"] == 1
    assert loader.table() == {"2019-12-30": 2, "2019-12-31": 3}


def test_a_person_can_be_deleted_without_making_dates_final(loader: Loader) -> None:
    """The statement in the README does it."""
    with_final_dates(loader, "false")
    blocks = [block for block in readme_blocks("sql") if block.startswith("UPDATE")]
    (statement,) = blocks
    before = loader.table()
    user = "user_pseudo_id = 'b'"
    loader.execute(re.sub(r"user_pseudo_id = '[^']*'", user, statement))
    for day in before:
        ids = loader.users(day)
        assert (ids[:2], len(ids), ids[2][:8]) == (["a", "c"], 3, "deleted-")
    report = loader.load(loader.file(LATE))
    assert report["dates"] == [
        date_count("2019-12-30", 4, 1),
        date_count("2019-12-31", 4, 1),
    ]
    assert before == {"2019-12-30": 3, "2019-12-31": 3}


# -- schema.sql, and the tables of somebody else


def test_schema_sql_by_hand_makes_the_database(loader: Loader) -> None:
    with closing(sqlite3.connect(loader.db)) as db:
        db.executescript((ROOT / "schema.sql").read_text())
    loader.load(SAMPLE)
    assert loader.table() == SAMPLE_TABLE
    columns = loader.query(
        "SELECT name, type, \"notnull\", pk FROM pragma_table_info('active_user_table')"
    )
    assert columns == [("date", "DATE", 1, 1), ("active_user_count", "INTEGER", 1, 0)]
    assert loader.query(
        "SELECT DISTINCT length(date), typeof(date) FROM active_user_table"
    ) == [(10, "text")]


def test_schema_sql_belongs_beside_the_script(loader: Loader) -> None:
    alone = loader.copied()
    path = loader.directory / "program" / "schema.sql"
    what = "No such file or directory"
    assert alone.run_without_end() == (1, b"", f"Error: {path}: {what}\n")
    assert not loader.db.exists()


def test_a_broken_schema_sql(loader: Loader) -> None:
    other = loader.copied("schema.sql")
    (loader.directory / "program" / "schema.sql").write_text("CREATE TABLE")
    said = "Error: active_user_table.db: incomplete input\n"
    assert other.refuse(SAMPLE) == said
    assert not loader.db.exists()


def test_a_link_to_the_script_finds_schema_sql(loader: Loader) -> None:
    (loader.directory / "bin").mkdir()
    command = loader.directory / "bin" / "load-active-users"
    command.symlink_to(SCRIPT)
    loader.script = command
    done = loader.run("-q", SAMPLE)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert loader.table() == SAMPLE_TABLE


def test_a_link_to_a_database_that_is_not_there_yet(loader: Loader) -> None:
    loader.db.symlink_to("data.db")
    for expected in (64, 0):
        assert sum(day["added"] for day in loader.load(SAMPLE)["dates"]) == expected
    assert loader.db.is_symlink()
    assert loader.table() == SAMPLE_TABLE


AS_IN_SCHEMA = "as in schema.sql; choose another --db"
NO_COLUMN = "its table {} has no column {} of type {}, " + AS_IN_SCHEMA
NO_TABLE = "it has a table {}, but no {}, " + AS_IN_SCHEMA
SCHEMA = (ROOT / "schema.sql").read_text()
OLD = (ROOT / "tests" / "database-1.0.0.sql").read_text()
FOREIGN = {
    "a table to plot of another shape": (
        SCHEMA.replace("active_user_count INTEGER", "users INTEGER"),
        NO_COLUMN.format("active_user_table", "active_user_count", "INTEGER"),
    ),
    "only the table to plot": (
        SCHEMA.split(";")[0],
        NO_TABLE.format("active_user_table", "active_user"),
    ),
    "only a log of another program": (
        "CREATE TABLE load_log (x)",
        NO_TABLE.format("load_log", "active_user"),
    ),
    "only files of another program": (
        "CREATE TABLE loaded_file (x)",
        NO_TABLE.format("loaded_file", "active_user"),
    ),
    "one from before 1.0.0": (
        OLD.replace("    blank_lines INTEGER NOT NULL,\n", "")
        .replace(",0,3,3,1,0,2)", ",3,3,1,0,2)")
        .replace(",1,2,2,0,1,1)", ",2,2,0,1,1)"),
        NO_COLUMN.format("load_log", "blank_lines", "INTEGER"),
    ),
    "one whose users are numbers": (
        SCHEMA.replace("user_pseudo_id TEXT", "user_pseudo_id INTEGER"),
        NO_COLUMN.format("active_user", "user_pseudo_id", "TEXT"),
    ),
    "one whose seconds are whole numbers": (  # a column that could be added
        SCHEMA.replace("seconds REAL", "seconds INTEGER"),
        NO_COLUMN.format("load_log", "seconds", "REAL"),
    ),
}


@pytest.mark.parametrize(("script", "what"), FOREIGN.values(), ids=FOREIGN)
def test_tables_of_another_program_or_version(
    loader: Loader, script: str, what: str
) -> None:
    loader.execute(script)
    for args in ([], ["--dry-run"]):
        assert loader.refuse(*args, SAMPLE) == f"Error: active_user_table.db: {what}\n"


def test_tables_without_their_primary_keys(loader: Loader) -> None:
    """Without the keys the same users would be added again and again."""
    key = "PRIMARY KEY (date, user_pseudo_id)"
    loader.execute(SCHEMA.replace(key, "CHECK (1)").replace(") WITHOUT ROWID", ")"))
    what = "ON CONFLICT clause does not match any PRIMARY KEY or UNIQUE constraint"
    assert loader.refuse(SAMPLE) == f"Error: active_user_table.db: {what}\n"


def test_other_tables_are_no_matter(loader: Loader) -> None:
    """They stay as they are, and so does a version that somebody gave the file."""
    loader.execute(
        "PRAGMA user_version = 99; CREATE TABLE notes (text);"
        "INSERT INTO notes VALUES ('x'); CREATE VIEW v AS SELECT * FROM notes"
    )
    before = loader.content()
    loader.load("--dry-run", SAMPLE)
    assert loader.content() == before
    for added in (64, 0):
        assert sum(day["added"] for day in loader.load(SAMPLE)["dates"]) == added
        assert loader.table() == SAMPLE_TABLE
    assert loader.query("SELECT * FROM v") == [("x",)]
    assert loader.query("PRAGMA user_version") == [(99,)]


def test_a_file_that_is_not_a_database(loader: Loader) -> None:
    loader.db.write_bytes(b"hello, world" * 100)
    done = loader.run(SAMPLE)
    assert (done.returncode, done.stdout) == (1, b"")
    said = b"Error: active_user_table.db: file is not a database; choose another --db\n"
    assert done.stderr == said
    assert loader.db.read_bytes() == b"hello, world" * 100


def test_a_directory_that_is_missing(loader: Loader) -> None:
    what = f"there is no directory {loader.directory}/no; create it first"
    assert loader.refuse("--db", "no/x.db", SAMPLE) == f"Error: no/x.db: {what}\n"


def test_a_rule_that_was_changed_by_hand(loader: Loader) -> None:
    loader.load(SAMPLE)
    loader.execute("UPDATE load_log SET valuable_events = 'x_event'")
    what = "DecodeError: JSON is malformed: invalid character (byte 0)"
    for args in ([SAMPLE], ["--dry-run", SAMPLE], ["--plot", "x.png"]):
        assert loader.refuse(*args) == f"Error: active_user_table.db: {what}\n"


# -- A database of version 1.0.0


def test_the_first_load_upgrades_a_database(loader: Loader) -> None:
    """It keeps counts and rule, and becomes what a new database is."""
    loader.execute(OLD)
    report = loader.load(loader.file(lines(event("b"), event("d"))))
    assert report["dates"] == [date_count("2019-12-30", 3, 1)]
    assert loader.table() == {"2019-12-30": 3, "2019-12-31": 1}
    assert (loader.users(), loader.users("2019-12-31")) == (["a", "b", "d"], ["c"])
    names = "seconds, bytes, event_names, dates, out_of_range_events, removed"
    rows = loader.query(f"SELECT {names}, left_out, added FROM load_log ORDER BY rowid")
    assert rows[:2] == [
        (0, 0, '["user_engagement"]', "", 0, 0, 0, 2),
        (0, 0, '["user_engagement"]', "", 0, 0, 0, 1),
    ]
    new = Loader(loader.directory / "new")
    new.directory.mkdir()
    new.load(new.file(lines(event())))
    columns = """SELECT m.name, c.name, c.type, c."notnull", c.dflt_value, c.pk
        FROM sqlite_master m, pragma_table_info(m.name) c ORDER BY m.name, c.name"""
    assert loader.query(columns) == new.query(columns)
    views = "SELECT sql FROM sqlite_master WHERE type = 'view'"
    assert loader.query(views) == new.query(views)


def test_the_upgrade_is_part_of_the_load(loader: Loader) -> None:
    """A load that is refused, a dry run and a plot leave the database as it was."""
    loader.execute(OLD)
    before = loader.content()
    bad = loader.refuse(loader.file(b"bad\n"))
    assert bad.startswith(f"events.jsons:1: {NOT_AN_OBJECT}\n")
    for other in (["--timezone", "UTC"], ["--event-name", "*"]):
        assert "was filled under the rule" in loader.refuse(*other, SAMPLE)
    report = loader.load("--dry-run", loader.file(lines(event("d"))))
    assert report["dates"] == [date_count("2019-12-30", 3, 1)]
    assert loader.draw("svg").startswith(b"<?xml")
    assert loader.content() == before


def test_another_name_of_its_zone_upgrades_too(loader: Loader) -> None:
    loader.execute(OLD)
    loader.load("--timezone", "America/Chicago", loader.file(lines(event("a"))))
    assert loader.table() == {"2019-12-30": 2, "2019-12-31": 1}


# -- The view


@given(
    st.lists(
        st.tuples(st.integers(0, 70), st.sets(st.sampled_from("abcdef"), min_size=1)),
        max_size=30,
    )
)
@example([(0, {"a"}), (7, {"a"}), (28, {"a"}), (29, {"b"})])
@example([(0, {"a"}), (6, {"a"}), (33, {"a"})])
@example([(0, {"a"}), (27, {"b"}), (28, {"b"})])
def test_weekly_and_monthly_active_users(visits: list[tuple[int, set[str]]]) -> None:
    """They agree with sets of users, also on the last dates of the calendar."""
    for first in (date(2020, 1, 1), date(9999, 12, 31) - timedelta(70)):
        active: dict[str, set[str]] = {}
        for number, users in visits:
            active.setdefault(str(first + timedelta(number)), set()).update(users)
        with closing(sqlite3.connect(":memory:")) as db:
            db.executescript((ROOT / "schema.sql").read_text())
            counts = [(day, len(users)) for day, users in active.items()]
            db.executemany("INSERT INTO active_user_table VALUES (?, ?)", counts)
            rows = [(day, user) for day, users in active.items() for user in users]
            db.executemany("INSERT INTO active_user VALUES (?, ?)", rows)
            query = "SELECT * FROM active_user_trend ORDER BY date"
            assert db.execute(query).fetchall() == oracle.trend(active)


# -- Replacing: which users, of which date


def test_a_replaced_date_that_only_gains_users_is_no_final_one(loader: Loader) -> None:
    """The users are stored with their count, so that a later load still adds."""
    loader.load(loader.file(lines(event("a"))))
    more = loader.file(lines(event("a"), event("b"), event("c")))
    report = loader.load("--replace", "--dates", "2019-12-30", more)
    assert report["dates"] == [date_count("2019-12-30", 3, 2)]
    assert loader.users() == ["a", "b", "c"]
    report = loader.load(loader.file(lines(event("d"), event("a"))))
    assert (report["dates"], report["left_out"]) == (
        [date_count("2019-12-30", 4, 1)],
        0,
    )
    assert loader.users() == ["a", "b", "c", "d"]


REPLACE_BY_A = ["--replace", "--dates", "2019-12-31"]
NEXT_DAY = {
    "merged": ([], date_count("2019-12-31", 2, 1)),
    "merged, tried only": (["--dry-run"], date_count("2019-12-31", 2, 1)),
    "replaced": (REPLACE_BY_A, date_count("2019-12-31", 1, 1, 1)),
    "replaced, tried only": (
        [*REPLACE_BY_A, "--dry-run"],
        date_count("2019-12-31", 1, 1, 1),
    ),
}


@pytest.mark.parametrize(("args", "expected"), NEXT_DAY.values(), ids=NEXT_DAY)
def test_a_user_of_the_day_before_is_new_on_a_date(
    loader: Loader, args: list[str], expected: dict[str, Any]
) -> None:
    """The day before keeps its users."""
    loader.load(loader.file(lines(event("a"), event("b"), event("b", NOON + DAY))))
    report = loader.load(*args, loader.file(lines(event("a", NOON + DAY))))
    assert report["dates"] == [expected]
    count = 1 if "--dry-run" in args else expected["active_user_count"]
    assert loader.table() == {"2019-12-30": 2, "2019-12-31": count}
    assert loader.users() == ["a", "b"]


# -- A database of version 1.1.0


def test_a_database_of_version_1_1_0_is_upgraded(either: Loader) -> None:
    """It keeps everything, and gets what was added since; its dates count on."""
    is_postgres = isinstance(either, PostgresLoader)
    dump = "database-1.1.0.postgres.sql" if is_postgres else "database-1.1.0.sql"
    either.execute((ROOT / "tests" / dump).read_text())
    kept = either.query("SELECT * FROM load_log ORDER BY load_id")
    assert len(kept) == 4
    late = [event("late"), event("d", NOON + DAY), event("f", NOON + DAY)]
    name = either.file(lines(*late))
    expected = [date_count("2019-12-30", 2, 0), date_count("2019-12-31", 2, 1)]
    before = either.content()
    assert either.load("--dry-run", name)["dates"] == expected
    assert either.content() == before
    report = either.load("--incremental", name)
    assert (report["dates"], report["left_out"]) == (expected, 1)
    assert either.table() == {"2019-12-30": 2, "2019-12-31": 2, "2020-01-01": 2}
    assert either.all_users() == {"2019-12-31": {"d", "f"}, "2020-01-01": {"a", "e"}}
    ((path, load_id),) = either.query("SELECT path, load_id FROM loaded_file")
    assert path == str(either.directory.resolve() / name)
    log = either.query("SELECT * FROM load_log ORDER BY load_id")
    old = [row for row in log if row[0] != load_id]
    assert old == [(*row, 0) for row in kept]  # no files were skipped
    assert len(log) == len(kept) + 1
    report = either.load("--incremental", name)
    assert (report["dates"], report["skipped_files"]) == ([], 1)
    counted = "SELECT lines FROM load_log WHERE skipped_files = 1"
    assert either.query(counted) == [(0,)]
    if is_postgres:
        [[comment]] = either.query("SELECT obj_description('load_log'::regclass)")
        assert comment == "2"  # as it was


def test_a_column_alone_may_be_missing(either: Loader) -> None:
    """The next load adds it, and what is there gets its default."""
    either.load(SAMPLE)
    either.execute("ALTER TABLE load_log DROP COLUMN skipped_files")
    assert either.load("--dry-run", SAMPLE)["lines"] == 1000
    assert "skipped_files" not in str(either.content())
    name = either.file(lines(event("a")))
    assert either.load(name)["dates"] == [date_count("2019-12-30", 32, 1)]
    log = either.query("SELECT lines, skipped_files FROM load_log ORDER BY lines")
    assert log == [(1, 0), (1000, 0)]


# -- What a load writes down of itself


def test_load_log_and_loaded_file_have_utc(loader: Loader) -> None:
    """Whatever the time zone of the machine, and that of the dates."""
    name = loader.file(lines(event()))
    for zone in ("Asia/Tokyo", "America/New_York"):
        loader.load("--incremental", name, env={"TZ": zone}, process=True)
        loader.file(lines(event(zone)), name)
        times = loader.query("SELECT loaded_at FROM loaded_file")
        assert times == [loader.last_log("loaded_at")]
        ((loaded_at,),) = times
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", loaded_at)
        age = datetime.now(UTC) - datetime.fromisoformat(loaded_at)
        assert abs(age) < timedelta(minutes=30)


def test_load_log_has_the_seconds_from_the_start_of_a_run(loader: Loader) -> None:
    """The input comes to its end after some time, which counts."""
    began = time.monotonic()
    with loader.start("-q", "-") as process:
        when_it_reads(process)
        reads = time.monotonic()
        time.sleep(0.6)
        ends = time.monotonic()
        assert process.communicate() == (b"", b"")
    most = time.monotonic() - began
    (seconds,) = loader.last_log("seconds")
    assert ends - reads < seconds < most


# -- A message that is long

LONG_MESSAGES = {"of many words": "no more users, " * 700_000, "of one": "x" * 10**7}


@pytest.mark.parametrize("said", LONG_MESSAGES.values(), ids=LONG_MESSAGES)
def test_a_long_message_of_the_database_is_cut(loader: Loader, said: str) -> None:
    """A trigger of an administrator has said 10 MB. It takes no minute to cut them."""
    loader.load(SAMPLE)
    loader.execute(
        f"""CREATE TRIGGER refusal BEFORE INSERT ON active_user
            BEGIN SELECT RAISE(ABORT, '{said}'); END"""
    )
    before = loader.content()
    name = loader.file(lines(event("new")))
    done = loader.run_under("timeout --signal=KILL 60", name)
    assert done == (1, b"", f"Error: active_user_table.db: {said[:500]}\n")
    assert loader.content() == before
