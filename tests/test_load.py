"""What the command promises: each test runs it as a process, on real files and a real database."""

import array
import bz2
import datetime as dt
import fcntl
import gzip
import io
import json
import lzma
import os
import re
import shlex
import signal
import sqlite3
import subprocess
import tarfile
import termios
import time
import zipfile
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import click
import plain
import pytest
from backports import zstd
from conftest import NOON, ROOT, SAMPLE, Loader, environment, event, lines

import load_active_users

SAMPLE_TABLE = {"2019-12-29": 11, "2019-12-30": 31, "2019-12-31": 22}
HOUR = 3600 * 10**6


def usec(text: str, zone: str = "US/Central") -> int:
    """Microseconds UTC of a local time."""
    return (
        datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone))
        - datetime(1970, 1, 1, tzinfo=UTC)
    ) // timedelta(microseconds=1)


def date(day: str, count: int, added: int, removed: int = 0) -> dict[str, Any]:
    """A date in the report."""
    return {"date": day, "active_user_count": count, "added": added, "removed": removed}


def today(zone: str = "US/Central") -> dt.date:
    return datetime.now(ZoneInfo(zone)).date()


def users(loader: Loader, day: str = "2019-12-30") -> list[str]:
    """Who is kept as active on a date."""
    query = f"SELECT user_pseudo_id FROM active_user WHERE date = '{day}'"
    return [user for (user,) in loader.query(query)]


def last_log(loader: Loader, *columns: str) -> tuple[Any, ...]:
    """Some columns of the last row of load_log."""
    query = f"SELECT {', '.join(columns)} FROM load_log ORDER BY rowid DESC LIMIT 1"
    return loader.query(query)[0]


def usage(message: str) -> str:
    """What is said about a wrong command line."""
    about = "Usage: load_active_users.py [OPTIONS] EVENTS...\n"
    return f"{about}Try 'load_active_users.py --help' for help.\n\nError: {message}\n"


def params(*pairs: tuple[Any, Any]) -> list[dict[str, Any]]:
    return [{"key": key, "value": value} for key, value in pairs]


# -- The sample


def test_the_sample(loader: Loader) -> None:
    assert loader.load(SAMPLE) == {
        "dates": [date(day, count, count) for day, count in SAMPLE_TABLE.items()],
        "lines": 1000,
        "engagement_events": 75,
        "active_events": 64,
        "anonymous_events": 0,
        "out_of_range_events": 0,
        "bad_records": 0,
    }
    assert loader.table() == SAMPLE_TABLE


def test_the_report_as_a_table(loader: Loader) -> None:
    done = loader.run(SAMPLE, env={"COLUMNS": "80"})
    assert (done.returncode, done.stderr) == (0, b"")
    assert (
        done.stdout.decode()
        == (ROOT / "README.md").read_text().split("```text\n")[1].split("```")[0]
    )


def test_the_report_as_csv(loader: Loader) -> None:
    done = loader.run("--format", "csv", SAMPLE)
    assert (
        done.stdout
        == b"date,active_user_count,added\n2019-12-29,11,11\n2019-12-30,31,31\n2019-12-31,22,22\n"
    )


# -- What counts: an event, and whether it makes its user active

ACTIVE = {
    "it has the least engagement time": event(msec=3000),
    "integers are strings": event(msec="3000", time=str(NOON)),
    "a long engagement": event(msec="9" * 400),
    "another valuable parameter": event(key="_event"),
    "the first of several times is long enough": event(
        event_params=params(
            ("engagement_time_msec", {"int_value": 3000}),
            ("engagement_time_msec", {"int_value": 1}),
            ("a_event", {}),
        )
    ),
    "the last of several times is long enough": event(
        event_params=params(
            ("engagement_time_msec", {"int_value": 1}),
            ("engagement_time_msec", {"int_value": 3000}),
            ("a_event", {"string_value": ""}),
        )
    ),
    "a valuable parameter without value": event(
        event_params=[*params(("engagement_time_msec", {"int_value": 3000})), {"key": "x_event"}]
    ),
    "a valuable parameter that is null": event(
        event_params=params(("engagement_time_msec", {"int_value": 3000}), ("x_event", None))
    ),
    "other parameters are of any kind": event(
        event_params=params(
            ("x_event", {"int_value": []}),
            (None, {"int_value": "x"}),
            ("engagement_time_msec", {"int_value": 3000, "float_value": "x"}),
        )
    ),
    "unknown fields": event(new={"event_name": "x", "deep": [[{}]]}, event_date="20200101"),
    "other order, white space": json.dumps(dict(reversed(event().items())), indent=1)
    .replace("\n", "\t\r ")
    .encode(),
    "escapes": json.dumps(event()).replace("user_eng", "\\u0075ser\\u005Fen\\u0067").encode(),
    **{
        f"an escape: {spelt}": json.dumps(event()).replace("user_engagement", spelt).encode()
        for spelt in (
            "user\\u005Fengagement",
            "user\\u005fengagement",
            "user_engage\\u006dent",
            "user_\\u0065ngagement",
        )
    },
    "escapes in the names of fields": json.dumps(event()).replace("key", "\\u006bey").encode(),
    "BigQuery's escapes": lines(event(text="<&>"))
    .replace(b"<&>", b"\\u003c\\u0026\\u003e")
    .strip(),
    "a number of 5000 digits in an unknown field": lines(event(x=10**4000, y="\0"))
    .replace(b"0" * 4000, b"0" * 5000)
    .strip(),
    "the last of a field given twice": lines(event())
    .replace(b'{"event_t', b'{"event_params":5,"event_t', 1)
    .strip(),
}
INACTIVE = {
    "2999 ms": event(msec=2999),
    "2999 ms as a string": event(msec="2999"),
    "negative": event(msec=-3000),
    "no engagement time": event(event_params=params(("x_event", {"int_value": 9999}))),
    "a null engagement time": event(msec=None),
    "the engagement time is another type": event(
        event_params=params(("engagement_time_msec", {"string_value": "9999"}), ("x_event", {}))
    ),
    "no valuable parameter": event(key="session"),
    "a valuable key in a value": event(key="session", msec=9000, note="x_event")
    | {
        "event_params": params(
            ("engagement_time_msec", {"int_value": 9000}), ("a", {"string_value": "x_event"})
        )
    },
    "a valuable key in user_properties": event(
        key="session", user_properties=params(("x_event", {"int_value": 1}))
    ),
    "the engagement time in user_properties": event(
        event_params=params(("x_event", {})),
        user_properties=params(("engagement_time_msec", {"int_value": 9000})),
    ),
    "the key goes on": event(key="x_events"),
    "the key in capitals": event(key="X_EVENT"),
    "no parameters": event(event_params=None),
}
NO_EVENT = (
    "Warning: none of the lines ({}) is an engagement event ({}); "
    "is this BigQuery's export of Google Analytics, one event per line?\n"
)
NO_ENGAGEMENT = {
    "another event": event(event_name="screen_view"),
    "the name goes on": event(event_name="user_engagement_2"),
    "the name is in another field": event(event_name="x", other="user_engagement"),
    "the name in capitals": event(event_name="USER_ENGAGEMENT"),
    "the name is null": event(event_name=None, other="user_engagement"),
    "the name is a number": event(event_name=5, other="user_engagement"),
    "wrong types in another event": event(event_name="x", event_params=5, other="user_engagement"),
    "the name given twice": lines(event(event_name="x"))
    .replace(b'{"event', b'{"event_name":"user_engagement","event', 1)
    .strip(),
}


@pytest.mark.parametrize(
    ("records", "expected"),
    [(ACTIVE, (1, 1)), (INACTIVE, (1, 0)), (NO_ENGAGEMENT, (0, 0))],
    ids=["active", "inactive", "no engagement"],
)
def test_what_counts(loader: Loader, records: dict[str, Any], expected: tuple[int, int]) -> None:
    for case, record in records.items():
        warning = "" if expected[0] else NO_EVENT.format(1, "user_engagement")
        report = loader.load("--dry-run", "-", input=lines(record), warning=warning)
        assert (report["engagement_events"], report["active_events"]) == expected, case
        assert report["dates"] == [date("2019-12-30", 1, 1)] * expected[1], case


def test_users_are_counted_not_events(loader: Loader) -> None:
    data = lines(
        event("a"),
        event("a", time=NOON + HOUR),
        event("b"),
        event("a"),
        event("a", time=NOON + 24 * HOUR),
    )
    report = loader.load(loader.file(data))
    assert report["active_events"] == 5
    assert loader.table() == {"2019-12-30": 2, "2019-12-31": 1}


def test_the_user_is_the_user_pseudo_id(loader: Loader) -> None:
    """Not the user_id, nor the session."""
    data = lines(
        event("a", user_id="1"),
        event("a", user_id="2"),
        event("b", user_id="1"),
        event("B"),
        event("b "),
    )
    loader.load(loader.file(data))
    assert loader.query("SELECT user_pseudo_id FROM active_user") == [
        ("B",),
        ("a",),
        ("b",),
        ("b ",),
    ]


def test_users_of_all_letters_are_kept_apart(loader: Loader) -> None:
    ids = [
        "a",
        "é",
        "e\u0301",
        "\\u0000",
        '"',
        "'",
        "\n",
        "😀",
        "1",
        "01",
        "1.0",
        "x" * 512,
        "é" * 256,
    ]
    report = loader.load(loader.file(lines(*map(event, ids))))
    assert report["dates"] == [date("2019-12-30", len(ids), len(ids))]
    assert users(loader) == sorted(ids)
    assert loader.load("events.jsons")["dates"] == [date("2019-12-30", len(ids), 0)]


def test_events_without_a_user_are_tallied_as_anonymous(loader: Loader) -> None:
    absent = event()
    del absent["user_pseudo_id"]
    report = loader.load(
        "-", input=lines(event(None), event(""), absent, event("a"), event(None, msec=1))
    )
    assert (report["active_events"], report["anonymous_events"]) == (4, 3)
    assert loader.table() == {"2019-12-30": 1}


# -- Dates

DATES = [
    ("the first microsecond of a date", "US/Central", usec("2019-12-30T00:00"), "2019-12-30"),
    ("the last microsecond of a date", "US/Central", usec("2019-12-30T00:00") - 1, "2019-12-29"),
    ("UTC is a date ahead", "US/Central", usec("2019-12-30T19:00"), "2019-12-30"),
    ("midnight in summer", "US/Central", usec("2020-07-01T00:00"), "2020-07-01"),
    ("before midnight in summer", "US/Central", usec("2020-07-01T00:00") - 1, "2020-06-30"),
    ("the day the clocks go forward", "US/Central", usec("2020-03-08T00:00"), "2020-03-08"),
    ("its last microsecond", "US/Central", usec("2020-03-09T00:00") - 1, "2020-03-08"),
    ("after its 23 hours", "US/Central", usec("2020-03-08T00:00") + 23 * HOUR, "2020-03-09"),
    ("the day the clocks go back", "US/Central", usec("2020-11-01T00:00"), "2020-11-01"),
    (
        "the last of its 25 hours",
        "US/Central",
        usec("2020-11-01T00:00") + 25 * HOUR - 1,
        "2020-11-01",
    ),
    ("after its 25 hours", "US/Central", usec("2020-11-01T00:00") + 25 * HOUR, "2020-11-02"),
    ("half hours", "Asia/Kolkata", usec("2020-01-01T00:00", "Asia/Kolkata") - 1, "2019-12-31"),
    (
        "half hours, midnight",
        "Asia/Kolkata",
        usec("2020-01-01T00:00", "Asia/Kolkata"),
        "2020-01-01",
    ),
    ("before 1970", "US/Central", -1, "1969-12-31"),
    ("after 2037, in summer", "US/Central", usec("2050-07-01T00:00") - 1, "2050-06-30"),
    ("after 2037, midnight in summer", "US/Central", usec("2050-07-01T00:00"), "2050-07-01"),
    ("after 2037, in winter", "US/Central", usec("2051-01-01T00:00") - 1, "2050-12-31"),
    (
        "2038 in the south",
        "Australia/Sydney",
        usec("2038-01-01T00:00", "Australia/Sydney"),
        "2038-01-01",
    ),
    ("1900", "Australia/Lord_Howe", -2195028000000001, "1900-06-11"),
    ("the last microsecond of the calendar", "UTC", 253402300800 * 10**6 - 1, "9999-12-31"),
    ("the first of it", "UTC", -62135596800 * 10**6, "0001-01-01"),
]


@pytest.mark.parametrize(
    ("zone", "timestamp", "day"), [row[1:] for row in DATES], ids=[row[0] for row in DATES]
)
def test_dates(loader: Loader, zone: str, timestamp: int, day: str) -> None:
    """Whatever version of python-dateutil is installed."""
    data = lines(event(time=timestamp, event_date="20010101"))
    report = loader.load("--timezone", zone, "--dates", "0001-01-01..9999-12-31", "-", input=data)
    assert report["dates"] == [date(day, 1, 1)]


@pytest.mark.parametrize(("timestamp", "day"), [(-1, "1969-12-31"), (4 * 10**15, "2096-10-02")])
def test_dates_where_the_machine_has_no_time_zones(
    loader: Loader, timestamp: int, day: str
) -> None:
    """Nor US/Central, which some Linux distributions keep in a package of its own."""
    options = ["--format", "csv", "--dates", "0001-01-01..9999-12-31", "-"]
    done = loader.run(*options, input=lines(event(time=timestamp)), env={"PYTHONTZPATH": ""})
    report = f"date,active_user_count,added\n{day},1,1\n"
    assert (done.returncode, done.stdout.decode(), done.stderr) == (0, report, b"")


# -- Loads are idempotent


def test_a_second_load_changes_nothing(loader: Loader) -> None:
    loader.load(SAMPLE)
    before = loader.query("SELECT * FROM active_user")
    report = loader.load(SAMPLE)
    assert [(d["active_user_count"], d["added"]) for d in report["dates"]] == [
        (11, 0),
        (31, 0),
        (22, 0),
    ]
    assert (loader.table(), loader.query("SELECT * FROM active_user")) == (SAMPLE_TABLE, before)


def test_halves_and_overlaps_in_any_order(loader: Loader) -> None:
    rows = SAMPLE.read_bytes().splitlines(keepends=True)
    for number, piece in enumerate([rows[600:], rows[300:700], rows[:400], rows[::-1][:50]]):
        loader.load(loader.file(b"".join(piece), f"{number}.jsons"))
    assert loader.table() == SAMPLE_TABLE


def test_several_files_are_one_load(loader: Loader) -> None:
    a, b = (
        loader.file(lines(event("a"), event("b")), "a"),
        loader.file(lines(event("b"), event("c")), "b"),
    )
    report = loader.load(a, "-", b, a, "-", input=lines(event("d")))
    assert report["dates"] == [date("2019-12-30", 4, 4)]
    assert report["lines"] == 7  # at its end, standard input holds no more
    assert loader.query("SELECT sources FROM load_log") == [('["a","-","b","a","-"]',)]


def test_a_late_event_touches_its_own_date_only(loader: Loader) -> None:
    loader.load(SAMPLE)
    report = loader.load("-", input=lines(event("late", time=NOON - 24 * HOUR)))
    assert report["dates"] == [date("2019-12-29", 12, 1)]
    assert loader.table() == SAMPLE_TABLE | {"2019-12-29": 12}


def test_a_count_that_is_too_low_is_counted_anew(loader: Loader) -> None:
    loader.load("-", input=lines(event("a")))
    loader.execute("UPDATE active_user_table SET active_user_count = 0")
    assert loader.load("-", input=lines(event("b")))["dates"] == [date("2019-12-30", 2, 1)]


def test_the_table_is_the_count_of_active_user(loader: Loader) -> None:
    for file in (SAMPLE, loader.file(lines(event("a"), event("b", time=usec("2001-01-01"))))):
        loader.load(file)
    counted = loader.query("SELECT date, count(*) FROM active_user GROUP BY date")
    assert counted == list(loader.table().items())


def test_load_log_has_a_row_per_load(loader: Loader) -> None:
    data = lines(
        *(event("a"), event(None), event("late", time=usec("2020-01-05T12:00")), event(msec=1)),
        *({"event_name": "x"}, b"", b"bad"),
    )
    args = ["--max-bad-records", 1, "--valuable-event", "x_*", "--valuable-event", "b"]
    name = loader.file(gzip.compress(data))
    loader.run(*args, "--dates", "2019-12-01..2019-12-31", name)
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
    }


# -- Which dates count

DAY = 24 * HOUR


def on(day: str) -> int:
    """Noon of a date."""
    return usec(f"{day}T12:00")


DAYS = ["1999-12-31", "2000-01-01", "2019-12-29", "2019-12-30", "2019-12-31", "2099-06-12"]
RANGES = {
    "both ends count": (["--dates", "2019-12-29..2019-12-30"], DAYS[2:4]),
    "a single date": (["--dates", "2019-12-30"], DAYS[3:4]),
    "one date from and to": (["--dates", "2019-12-30..2019-12-30"], DAYS[3:4]),
    "without a first": (["--dates", "..2019-12-30"], DAYS[1:4]),
    "without a last": (["--dates", "2019-12-30.."], DAYS[3:5]),
    "without both": (["--dates", ".."], DAYS[1:5]),
    "by default": ([], DAYS[1:5]),
    "before 2000, when it is told": (["--dates", "1990-01-01..2000-01-01"], DAYS[:2]),
    "after tomorrow, when it is told": (["--dates", "2019-12-31..9999-12-31"], DAYS[4:]),
    "none that is there": (["--dates", "2010-01-01..2010-12-31"], []),
}


@pytest.mark.parametrize(("args", "counted"), RANGES.values(), ids=RANGES)
def test_only_events_on_the_dates_count(
    loader: Loader, args: list[str], counted: list[str]
) -> None:
    data = lines(*(event("a", on(day)) for day in DAYS))
    report = loader.load(*args, "-", input=data)
    assert report["dates"] == [date(day, 1, 1) for day in counted]
    assert (report["active_events"], report["out_of_range_events"]) == (6, 6 - len(counted))
    assert loader.table() == dict.fromkeys(counted, 1)
    assert last_log(loader, "out_of_range_events", "added") == (6 - len(counted), len(counted))


def test_by_default_dates_count_until_tomorrow(loader: Loader) -> None:
    while True:
        day = today()
        some = [(day + timedelta(n)).isoformat() for n in (0, 1, 2)]
        data = lines(*(event(time=on(each)) for each in some))
        report = loader.load("--dry-run", "-", input=data)
        if today() == day:  # else midnight came meanwhile
            break
    assert [each["date"] for each in report["dates"]] == some[:2]
    assert report["out_of_range_events"] == 1


def test_load_log_has_the_dates(loader: Loader) -> None:
    while True:
        day = today()
        loader.load(SAMPLE)
        if today() == day:
            break
    assert last_log(loader, "dates") == (f"2000-01-01..{day + timedelta(1)}",)
    for given, kept in (
        ("2019-12-30", "2019-12-30..2019-12-30"),
        ("..2019-12-30", "2000-01-01..2019-12-30"),
    ):
        loader.load("--dates", given, SAMPLE)
        assert last_log(loader, "dates") == (kept,)


def test_out_of_range_events_in_the_table_report(loader: Loader) -> None:
    data = lines(event("a"), event(None, on("2099-06-12")), event("b", on("2099-06-12")))
    done = loader.run("-", input=data, env={"COLUMNS": "110"})
    assert done.stdout.decode().splitlines()[-1] == (
        "3 lines → 3 engagement events → 3 active → 1 user-day (1 new); "
        "1 anonymous event; 2 out of range events"
    )
    assert loader.table() == {"2019-12-30": 1}


EARLY = (
    "Error: all active events ({}) are dated before 2000: event_timestamp must be in "
    "microseconds UTC (to load such dates, give --dates)\n"
)


def test_milliseconds_are_refused(loader: Loader) -> None:
    data = lines(event("a", NOON // 1000), event("b", str(NOON // 1000)), event(msec=1))
    assert loader.refuse("-", input=data) == EARLY.format(2)
    assert loader.refuse("--dry-run", "-", input=data) == EARLY.format(2)
    assert loader.refuse("-", input=lines(event(None, NOON // 10**6))) == EARLY.format(1)
    assert not loader.db.exists()


def test_a_few_wrong_clocks_are_not_refused(loader: Loader) -> None:
    report = loader.load("-", input=lines(event("a", 0), event("b")))
    assert (report["dates"], report["out_of_range_events"]) == ([date("2019-12-30", 1, 1)], 1)
    report = loader.load("-", input=lines(event("a", on("2099-06-12"))))
    assert (report["dates"], report["out_of_range_events"]) == ([], 1)
    report = loader.load("--dates", "1970-01-01..", "-", input=lines(event("a", NOON // 1000)))
    assert report["dates"] == [date("1970-01-19", 1, 1)]


# -- Replacing dates


def test_replace_makes_its_dates_hold_what_the_load_holds(loader: Loader) -> None:
    """Nobody included; other dates are merged into."""
    loader.load(SAMPLE)
    loader.load("-", input=lines(event("old"), event("kept"), event("next", NOON + DAY)))
    others = [event("other", NOON - DAY), event("clock", on("2099-06-12")), event("clock", 0)]
    data = lines(event("kept"), event("new"), event("new"), *others)
    report = loader.load("--replace", "--dates", "2019-12-30..2020-01-01", "-", input=data)
    assert report["dates"] == [
        date("2019-12-29", 12, 1),
        date("2019-12-30", 2, 1, 32),
        date("2019-12-31", 0, 0, 23),
        date("2020-01-01", 0, 0, 0),
    ]
    assert report["out_of_range_events"] == 2
    assert loader.table() == {"2019-12-29": 12, "2019-12-30": 2, "2019-12-31": 0, "2020-01-01": 0}
    assert (users(loader), users(loader, "2019-12-31")) == (["kept", "new"], [])
    logged = last_log(loader, "replaced", "dates", "added", "removed", "left_out")
    assert logged == (1, "2019-12-30..2020-01-01", 2, 55, 0)


@pytest.mark.parametrize("day", ["1999-06-12", "2099-06-12"])
def test_replace_of_an_unusual_date(loader: Loader, day: str) -> None:
    """It merges into no other: what lies beside such a date are other unusual ones."""
    others = [event("clock", on(other)) for other in ("1995-06-12", "2019-12-30", "2095-06-12")]
    data = lines(event("a", on(day)), *others)
    report = loader.load("--replace", "--dates", day, "-", input=data)
    assert (report["dates"], report["out_of_range_events"]) == ([date(day, 1, 1)], 3)


def test_replace_as_csv_and_as_a_table(loader: Loader) -> None:
    loader.load("-", input=lines(event("a"), event("b")))
    args = ["--replace", "--dates", "2019-12-30", "-"]
    done = loader.run("--format", "csv", *args, input=lines(event("c")))
    assert done.stdout == b"date,active_user_count,added,removed\n2019-12-30,1,1,2\n"
    done = loader.run(*args, input=lines(event("a"), event("d")), env={"COLUMNS": "80"})
    assert done.stdout.decode() == (
        "date        active_user_count  added  removed\n"
        "2019-12-30                  2      2        1  █████████████████████████████████\n"
        "2 lines → 2 engagement events → 2 active → 2 user-days (2 new, 1 removed)\n"
    )


def test_replace_by_the_same_changes_nothing(loader: Loader) -> None:
    args = ["--replace", "--dates", "2019-12-29..2019-12-31", SAMPLE]
    expected = [date(day, count, 0) for day, count in SAMPLE_TABLE.items()]
    assert [each["added"] for each in loader.load(*args)["dates"]] == [11, 31, 22]
    assert loader.load(*args)["dates"] == expected
    assert loader.load(SAMPLE)["dates"] == expected


def test_replace_by_nothing(loader: Loader) -> None:
    loader.load("-", input=lines(event("a"), event("b", NOON + DAY)))
    report = loader.load("--replace", "--dates", "2019-12-30", "-")
    assert report["dates"] == [date("2019-12-30", 0, 0, 1)]
    assert loader.table() == {"2019-12-30": 0, "2019-12-31": 1}
    assert loader.load("-", input=lines(event("c")))["dates"] == [date("2019-12-30", 1, 1)]


# -- Final dates: whose users were deleted from active_user


def with_final_dates(loader: Loader, where: str) -> None:
    """Load three users on each of two dates, and delete some by hand."""
    some = [event(user, NOON + n * DAY) for user in "abc" for n in (0, 1)]
    loader.load("-", input=lines(*some))
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
        report = loader.load(*args, "-", input=LATE)
        assert report["dates"] == [date("2019-12-30", 3, 0), date("2019-12-31", 4, 1)]
        assert report["left_out"] == 2
    assert loader.table() == {"2019-12-30": 3, "2019-12-31": 4}
    assert users(loader) == left
    assert last_log(loader, "added", "left_out") == (1, 2)
    done = loader.run("-", input=LATE, env={"COLUMNS": "110"})
    assert done.stdout.decode().splitlines()[-1] == (
        "3 lines → 3 engagement events → 3 active → 1 user-day (0 new); "
        "2 users left out of final dates"
    )


def test_a_date_that_is_not_final_leaves_nobody_out(loader: Loader) -> None:
    with_final_dates(loader, "date < '2019-12-30'")
    assert "left_out" not in loader.load("-", input=LATE)
    assert last_log(loader, "left_out") == (0,)


@pytest.mark.parametrize(("where", "left"), DELETED.values(), ids=DELETED)
def test_replace_makes_a_final_date_a_normal_one(
    loader: Loader, where: str, left: list[str]
) -> None:
    with_final_dates(loader, where)
    report = loader.load("--replace", "--dates", "2019-12-30", "-", input=LATE)
    removed = len(set(left) - {"a"})
    assert report["dates"] == [
        date("2019-12-30", 2, 2 - ("a" in left), removed),
        date("2019-12-31", 4, 1),
    ]
    assert "left_out" not in report
    assert loader.load("-", input=lines(event("e")))["dates"] == [date("2019-12-30", 3, 1)]
    assert users(loader) == ["a", "e", "late"]


def test_a_neighbour_that_is_final_stays_so_under_replace(loader: Loader) -> None:
    with_final_dates(loader, "date = '2019-12-31'")
    report = loader.load("--replace", "--dates", "2019-12-30", "-", input=LATE)
    assert report["dates"] == [date("2019-12-30", 2, 1, 2), date("2019-12-31", 3, 0)]
    assert report["left_out"] == 1
    assert loader.table() == {"2019-12-30": 2, "2019-12-31": 3}


def test_a_person_can_be_deleted_without_making_dates_final(loader: Loader) -> None:
    """By the statement in the README."""
    with_final_dates(loader, "false")
    blocks = (ROOT / "README.md").read_text().split("```sql\n")[1:]
    statements = [block.split("```")[0] for block in blocks if block.startswith("UPDATE")]
    (statement,) = statements
    before = loader.table()
    loader.execute(re.sub(r"user_pseudo_id = '[^']*'", "user_pseudo_id = 'b'", statement))
    assert "b" not in users(loader) + users(loader, "2019-12-31")
    assert (len(users(loader)), len(users(loader, "2019-12-31"))) == (3, 3)
    report = loader.load("-", input=LATE)
    assert report["dates"] == [date("2019-12-30", 4, 1), date("2019-12-31", 4, 1)]
    assert before == {"2019-12-30": 3, "2019-12-31": 3}


# -- Input


SKIPPABLE = b"\x5a\x2a\x4d\x18\x04\x00\x00\x00size"


def through_a_slow_pipe(
    loader: Loader, data: bytes, first: int
) -> subprocess.CompletedProcess[bytes]:
    """Load some data from standard input, of which the first read brings so many bytes only."""
    read, write = os.pipe()
    with loader.start("-", env=environment(), stdin=read, stdout=-1, stderr=-1) as process:
        os.close(read)
        os.write(write, data[:first])
        while unread(write):
            time.sleep(0.01)
        os.write(write, data[first:])
        os.close(write)
        out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def unread(pipe: int) -> int:
    """How many bytes in a pipe wait to be read."""
    count = array.array("i", [0])
    fcntl.ioctl(pipe, termios.FIONREAD, count)
    return count[0]


@pytest.mark.parametrize(
    "data",
    {
        "blank lines": b"\n \t\r\n" + lines(event("a"), event("b")) + b"\n\n",
        "CRLF": lines(event("a"), event("b")).replace(b"\n", b"\r\n"),
        "a byte-order mark": b"\xef\xbb\xbf" + lines(event("a"), event("b")),
        "no final newline": lines(event("a"), event("b")).rstrip(),
        "white space about events": lines(event("a"), event("b")).replace(b"\n", b" \t\n "),
        "gzip": gzip.compress(lines(event("a"), event("b"))),
        "gzip, two members": gzip.compress(lines(event("a"))) + gzip.compress(lines(event("b"))),
        "a line in two members": gzip.compress(lines(event("a"))[:50])
        + gzip.compress(lines(event("a"), event("b"))[50:]),
        "gzip with a byte-order mark": gzip.compress(
            b"\xef\xbb\xbf" + lines(event("a"), event("b"))
        ),
        "zstd": zstd.compress(lines(event("a"), event("b"))),
        "zstd, a skippable frame first, as pzstd has it": SKIPPABLE
        + zstd.compress(lines(event("a")))
        + SKIPPABLE
        + zstd.compress(lines(event("b"))),
        "zstd, two frames": zstd.compress(lines(event("a"))) + zstd.compress(lines(event("b"))),
    }.items(),
    ids=lambda item: item[0],
)
def test_files_of_every_kind(loader: Loader, data: tuple[str, bytes]) -> None:
    loader.load(loader.file(data[1], "any-name.json"))
    assert loader.table() == {"2019-12-30": 2}
    assert loader.load("-", input=data[1])["dates"] == [date("2019-12-30", 2, 0)]


def test_an_empty_file_is_an_empty_load(loader: Loader) -> None:
    """It is not warned of: there may be a night without events."""
    empty = (b"", b"\xef\xbb\xbf", b"\n \r\n", gzip.compress(b""), zstd.compress(b""))
    for data in empty:
        assert loader.load(loader.file(data))["dates"] == []
    assert (loader.table(), len(loader.query("SELECT * FROM load_log"))) == ({}, len(empty))


@pytest.mark.parametrize("compress", [bytes, gzip.compress, zstd.compress])
def test_a_pipe_that_brings_its_first_byte_alone(loader: Loader, compress: Any) -> None:
    data = compress(lines(event("a"), event("b")))
    done = through_a_slow_pipe(loader, data, 1)
    assert (done.returncode, done.stderr) == (0, b"")
    assert loader.table() == {"2019-12-30": 2}


def test_a_named_pipe(loader: Loader) -> None:
    os.mkfifo(loader.directory / "pipe")
    with loader.start("--format", "json", "pipe", stdout=-1) as process:
        (loader.directory / "pipe").write_bytes(SAMPLE.read_bytes())
        assert json.loads(process.communicate()[0])["lines"] == 1000
    assert loader.table() == SAMPLE_TABLE


# -- Options


def test_db(loader: Loader) -> None:
    loader.db = loader.directory / "other name?.sqlite"
    loader.load("--db", loader.db, SAMPLE)
    assert loader.table() == SAMPLE_TABLE
    assert [path.name for path in loader.directory.iterdir()] == ["other name?.sqlite"]


def test_min_engagement_msec_and_valuable_event(loader: Loader) -> None:
    data = lines(
        event("a", msec=5),
        event("b", msec=4),
        event("c", msec=9, key="buy"),
        event("d", msec=9, key="[x]"),
    )
    report = loader.load(
        "--min-engagement-msec",
        5,
        "--valuable-event",
        "b?y",
        "--valuable-event",
        "[[]x]",
        "-",
        input=data,
    )
    assert report["active_events"] == 2
    assert loader.query("SELECT user_pseudo_id FROM active_user") == [("c",), ("d",)]


def test_dry_run_writes_nothing(loader: Loader) -> None:
    report = loader.load("--dry-run", SAMPLE)
    assert [date["added"] for date in report["dates"]] == [11, 31, 22]
    assert list(loader.directory.iterdir()) == []
    loader.load("-", input=lines(event("a")))
    before = loader.db.read_bytes(), loader.db.stat()
    report = loader.load("--dry-run", "-", input=lines(event("a"), event("b")))
    assert report["dates"] == [date("2019-12-30", 2, 1)]
    data = lines(event("b"), event("c"))
    report = loader.load("--dry-run", "--replace", "--dates", "2019-12-30", "-", input=data)
    assert report["dates"] == [date("2019-12-30", 2, 2, 1)]
    done = loader.run(
        "--dry-run", "--rejects", "rejects", "--max-bad-records", 1, "-", input=lines(b"bad")
    )
    assert done.returncode == 0
    assert (loader.db.read_bytes(), loader.db.stat()) == before
    assert [path.name for path in loader.directory.iterdir()] == [loader.db.name]


def test_quiet(loader: Loader) -> None:
    done = loader.run("-q", SAMPLE)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert loader.table() == SAMPLE_TABLE


# -- Which events

PAGE = event("p", event_name="page_view")
SCROLL = event("s", event_name="scroll")
OLD_EVENT = event("o", event_name="first_open", event_params=params(("x_event", {"int_value": 1})))
SHORT = event("m", msec=1, event_name="scroll")
NAMELESS = event("n", event_name=None)
OTHER_LETTERS = OLD_EVENT | {"event_name": "first-öpen"}
ALL_NAMES = lines(event("e"), PAGE, SCROLL, OLD_EVENT, SHORT, NAMELESS, OTHER_LETTERS)
EVENT_NAMES = {
    "by default": ([], ["e"], 1),
    "another": (["page_view"], ["p"], 1),
    "without the time it is one, but not active": (["first_open"], [], 1),
    "of other letters": (["first-öpen"], [], 1),
    "two": (["page_view", "user_engagement"], ["e", "p"], 2),
    "one twice": (["page_view", "page_view"], ["p"], 1),
    "of several, those without the time are none": (["first_open", "scroll"], ["s"], 2),
    "any": (["*"], ["e", "n", "p", "s"], 5),
    "any and one": (["*", "page_view"], ["e", "n", "p", "s"], 5),
    "a name with a star is no pattern": (["page*", "page_view"], ["p"], 1),
}


@pytest.mark.parametrize(
    ("names", "active", "engagement_events"), EVENT_NAMES.values(), ids=EVENT_NAMES
)
def test_event_name(
    loader: Loader, names: list[str], active: list[str], engagement_events: int
) -> None:
    args = [arg for name in names for arg in ("--event-name", name)]
    report = loader.load(*args, "-", input=ALL_NAMES)
    found = (report["engagement_events"], report["active_events"])
    assert (found, users(loader)) == ((engagement_events, len(active)), active)
    kept = json.dumps(sorted(set(names or ["user_engagement"])), separators=(",", ":"))
    assert last_log(loader, "event_names") == (kept,)


def test_googles_own_definition_of_an_active_user(loader: Loader) -> None:
    no_other = event("g", event_params=params(("engagement_time_msec", {"int_value": 1})))
    none = event("z", event_params=params(("engagement_time_msec", {"int_value": 0})))
    args = ["--event-name", "*", "--min-engagement-msec", 1, "--valuable-event", "*"]
    loader.load(*args, "-", input=ALL_NAMES + lines(no_other, none))
    assert users(loader) == ["e", "g", "m", "n", "p", "s"]


def test_an_escaped_engagement_time_is_found_in_any_event(loader: Loader) -> None:
    data = lines(PAGE).replace(b"engagement_time_msec", b"engagement\\u005ftime\\u005Fm\\u0073ec")
    loader.load("--event-name", "*", "-", input=data)
    assert users(loader) == ["p"]


NOTHING_TO_COUNT = {
    "no time, and the rest is wrong": OLD_EVENT | {"event_timestamp": None, "user_pseudo_id": 5},
    "no time, and a long user": OLD_EVENT | {"user_pseudo_id": "x" * 513},
    "no time, and a user with a NUL": OLD_EVENT | {"user_pseudo_id": "\0"},
    "another name": event("\0", event_name="x", time=None),
}


@pytest.mark.parametrize("record", NOTHING_TO_COUNT.values(), ids=NOTHING_TO_COUNT)
def test_of_several_names_only_engagement_events_can_be_bad(
    loader: Loader, record: dict[str, Any]
) -> None:
    args = ["--event-name", "page_view", "--event-name", "first_open"]
    data = lines(PAGE, {**record, "other": "engagement_time_msec"})
    report = loader.load(*args, "-", input=data)
    assert (report["engagement_events"], report["bad_records"]) == (1, 0)


# -- The environment

GOOD_ROW = lines(event("a"))
BAD_AND_GOOD = lines(event("a"), event("b", event_name="b c"), b"bad")
FROM_ENVIRONMENT: dict[str, tuple[str, list[str], list[str], bytes]] = {
    # the value there, the same on the command line, more of that, standard input
    "db": ("x.db", ["--db", "x.db"], [], GOOD_ROW),
    "timezone": ("UTC", ["--timezone", "UTC"], [], GOOD_ROW),
    "event_name": (
        "page_view\nb c",
        ["--event-name", "page_view", "--event-name", "b c"],
        ["--max-bad-records", "1"],
        BAD_AND_GOOD,
    ),
    "min_engagement_msec": ("3001", ["--min-engagement-msec", "3001"], [], GOOD_ROW),
    "valuable_event": (
        "engagement time\nx_*",
        ["--valuable-event", "engagement time", "--valuable-event", "x_*"],
        [],
        GOOD_ROW,
    ),
    "dates": ("2020-01-01..", ["--dates", "2020-01-01.."], [], GOOD_ROW),
    "replace": ("1", ["--replace"], ["--dates", "2019-12-30..2019-12-31"], GOOD_ROW),
    "max_bad_records": ("1", ["--max-bad-records", "1"], [], BAD_AND_GOOD),
    "rejects": ("bad.jsons", ["--rejects", "bad.jsons"], [], BAD_AND_GOOD),
    "validate": ("true", ["--validate"], [], GOOD_ROW + b"{,}\n"),
    "workers": ("0", ["--workers", "0"], [], GOOD_ROW),
    "cluster": ("tcp://x:1", ["--cluster", "tcp://x:1"], [], GOOD_ROW),
    "commit_every": ("5", ["--commit-every", "5"], ["--dry-run"], GOOD_ROW),
    "dry_run": ("1", ["--dry-run"], [], GOOD_ROW),
    "format": ("csv", ["--format", "csv"], [], GOOD_ROW),
    "plot": ("users.svg", ["--plot", "users.svg"], [], GOOD_ROW),
    "quiet": ("yes", ["--quiet"], [], GOOD_ROW),
    "version": ("1", ["--version"], [], GOOD_ROW),
}
OPTIONS = [
    str(option.name) for option in load_active_users.main.params if isinstance(option, click.Option)
]


def outcome(
    directory: Path, args: list[str], input: bytes, env: dict[str, str]
) -> tuple[object, ...]:
    """All that a load in an empty directory leaves behind, but for the time."""
    directory.mkdir()
    loader = Loader(directory)
    done = loader.run(*args, "-", input=input, env=env)
    names = sorted(path.name for path in directory.iterdir())
    log = []
    if loader.db.exists():
        log = [row[3:] for row in loader.query("SELECT * FROM load_log")]
    rejects = directory / "bad.jsons"
    bad = rejects.read_bytes() if rejects.exists() else b""
    return done.returncode, done.stdout, done.stderr, names, log, bad


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "progress"])
def test_every_option_can_come_from_the_environment(tmp_path: Path, name: str) -> None:
    """With the same outcome as on the command line, and another than without."""
    value, args, more, data = FROM_ENVIRONMENT[name]
    there = {f"LOAD_ACTIVE_USERS_{name.upper()}": value}
    expected = outcome(tmp_path / "line", [*args, *more], data, {})
    assert outcome(tmp_path / "environment", more, data, there) == expected
    assert outcome(tmp_path / "without", more, data, {}) != expected


def test_progress_can_come_from_the_environment(loader: Loader) -> None:
    """Whether anything is shown depends on the time; so it is told by a value that is none."""
    for value in "10":
        env = {"LOAD_ACTIVE_USERS_PROGRESS": value}
        assert loader.load("-", input=GOOD_ROW, env=env)["lines"] == 1
    said = loader.refuse("-", input=GOOD_ROW, status=2, env={"LOAD_ACTIVE_USERS_PROGRESS": "x"})
    what = "Invalid value for '--progress': 'x' is not a valid boolean."
    assert said.startswith(usage(what)[:-1])


@pytest.mark.parametrize("name", OPTIONS)
def test_an_empty_variable_is_refused(loader: Loader, name: str) -> None:
    variable = f"LOAD_ACTIVE_USERS_{name.upper()}"
    said = loader.refuse("-", input=GOOD_ROW, status=2, env={variable: ""})
    assert said == usage(f"{variable} must not be empty; unset it, or set a value")


@pytest.mark.parametrize("name", ["event_name", "valuable_event"])
def test_an_empty_line_of_a_variable_is_refused(loader: Loader, name: str) -> None:
    variable = f"LOAD_ACTIVE_USERS_{name.upper()}"
    option = "--" + name.replace("_", "-")
    said = loader.refuse("-", input=GOOD_ROW, status=2, env={variable: "a\n\nb"})
    assert said == usage(f"Invalid value for '{option}': must not be empty")


def test_the_command_line_goes_before_the_environment(loader: Loader) -> None:
    env = {"LOAD_ACTIVE_USERS_TIMEZONE": "Asia/Kolkata", "LOAD_ACTIVE_USERS_EVENT_NAME": "x\ny"}
    loader.load(
        "--timezone", "UTC", "--event-name", "user_engagement", "-", input=GOOD_ROW, env=env
    )
    assert last_log(loader, "timezone", "event_names") == ("UTC", '["user_engagement"]')


def test_version(loader: Loader) -> None:
    done = loader.run("--version")
    assert (done.returncode, done.stdout) == (0, f"{load_active_users.__version__}\n".encode())


def no_zone(name: str) -> tuple[list[str], str]:
    names = "names are like US/Central, Europe/Berlin, UTC"
    what = f"Invalid value for '--timezone': {name!r} is not an IANA time zone; {names}"
    return ["--timezone", name, "x"], what


def no_dates(text: str, why: str) -> tuple[list[str], str]:
    return ["--dates", text, "x"], f"Invalid value for '--dates': {text!r}{why}"


def not_in_range(option: str, value: str, bounds: str) -> tuple[list[str], str]:
    what = f"Invalid value for '{option}': {value} is not in the range {bounds}."
    return [option, value, "x"], what


NOT_FROM_TO = " is not FROM..TO with dates like 2020-01-31"
NEEDS_DATES = "--replace needs --dates FROM..TO, the dates that it replaces"
USAGE = [
    ([], "Missing argument 'EVENTS...'."),
    (["--timezon", "UTC", "x"], "No such option '--timezon'. Did you mean '--timezone'?"),
    *map(no_zone, ["Mars/Base", "/etc/localtime", "../zoneinfo/UTC", "Europe/../UTC", "./UTC"]),
    *map(no_zone, ["Europe", "UTC+3", "localtime", "posixrules", "us/central"]),
    *map(no_zone, ["US//Central", "US/Central/", "Europe/"]),
    (
        ["--min-engagement-msec", "3s", "x"],
        "Invalid value for '--min-engagement-msec': '3s' is not a valid integer range.",
    ),
    not_in_range("--min-engagement-msec", "-1", "0<=x<=1000000000000000"),
    not_in_range("--max-bad-records", "-1", "0<=x<=1000000000000000"),
    not_in_range("--workers", "0", "x>=1"),
    not_in_range("--commit-every", "0.0", "1<=x<=1000000"),
    (
        ["--format", "xml", "x"],
        "Invalid value for '--format': 'xml' is not one of 'table', 'json', 'csv'.",
    ),
    no_dates("yesterday", NOT_FROM_TO),
    no_dates("20200101", NOT_FROM_TO),
    no_dates("2020-1-1", NOT_FROM_TO),
    no_dates("2020-01", NOT_FROM_TO),
    no_dates("2020-01-01..x", NOT_FROM_TO),
    no_dates("2020-01-01...2020-01-02", NOT_FROM_TO),
    no_dates("2020-01-01..2020-01-02..2020-01-03", NOT_FROM_TO),
    no_dates("2020-01-01T00:00..2020-01-02", NOT_FROM_TO),
    no_dates("٢020-01-01", NOT_FROM_TO),
    no_dates("2020-02-30", ": day is out of range for month"),
    no_dates("..2020-13-01", ": month must be in 1..12"),
    no_dates("2020-01-02..2020-01-01", " ends before it begins: 2020-01-02..2020-01-01"),
    no_dates("..1999-12-31", " ends before it begins: 2000-01-01..1999-12-31"),
    (["--plot", "x.png", "--dates", "x"], f"Invalid value for '--dates': 'x'{NOT_FROM_TO}"),
    (["--replace", "x"], NEEDS_DATES),
    (["--replace", "--dates", "2020-01-01..", "x"], NEEDS_DATES),
    (["--replace", "--dates", "..2020-01-01", "x"], NEEDS_DATES),
    *[
        ([option, empty, "x"], f"Invalid value for '{option}': must not be empty")
        for option in ("--db", "--timezone", "--event-name", "--valuable-event", "--dates")
        for empty in ("", " ")
    ],
    *[
        ([option, "", "x"], f"Invalid value for '{option}': must not be empty")
        for option in ("--rejects", "--plot", "--cluster")
    ],
]


@pytest.mark.parametrize(("args", "message"), USAGE, ids=[" ".join(args) for args, _ in USAGE])
def test_a_wrong_command_line(loader: Loader, args: list[str], message: str) -> None:
    assert loader.refuse(*args, status=2) == usage(message)


def test_a_file_is_not_both_read_and_written(loader: Loader) -> None:
    name = loader.file(lines(event()))
    for args, message in (
        (["--rejects", f"./{name}", name], f"--rejects and the input {name}"),
        (["--db", name, name], f"--db and the input {name}"),
        (["--rejects", f"./{loader.db.name}", name], "--rejects and --db"),
        (["--rejects", "new.png", "--plot", "./new.png", name], "--plot and --rejects"),
    ):
        said = loader.refuse(*args, status=2)
        file = args[3] if "--plot" in args else args[1]
        assert said == usage(f"{message} are the same file: {file!a}")
    assert (loader.directory / name).read_bytes() == lines(event())


# -- Bad records

GOOD = lines(event("a"))
NOT_AN_OBJECT = "is not a JSON object, {...}: one event per line is expected"
TOO_LONG = "user_pseudo_id is longer than 512 bytes"
REFUSED = "Error: bad records: {}, more than --max-bad-records 0; nothing was loaded\n"
MALFORMED = "JSON is malformed: "
TRUNCATED = "Input data was truncated"
NO_TIMES: list[Any] = [
    None,
    "",
    "x",
    "1e15",
    1.5,
    1.0,
    "1.0",
    True,
    [],
    {},
    "9" * 400,
    10**400,
    " 1",
    "+1",
    "1_0",
    "٣",
]
NO_PARAMETERS: list[Any] = [5, None, [], "x"]


def not_an_integer(name: str, value: Any) -> str:
    """What is said of a value that is none, or too large a one."""
    shown = json.dumps(value, ensure_ascii=False)
    if shown.strip('"').isascii() and shown.strip('"').isdigit():
        return f"{name} is beyond the calendar: {shown.strip(chr(34))[:60]}"
    return f"{name} is not an integer: {shown}"


BAD_RECORDS: list[tuple[str, bytes, str]] = [
    ("an array", b"[{}]", NOT_AN_OBJECT),
    ("a text", b'"user_engagement"', NOT_AN_OBJECT),
    ("cut off", lines(event())[:100], NOT_AN_OBJECT),
    ("its end alone", lines(event())[100:-1], NOT_AN_OBJECT),
    ("another event, cut off", b'{"event_name":"x"', NOT_AN_OBJECT),
    ("CSV", b"a,b,c", NOT_AN_OBJECT),
    ("two on a line", lines(event()).strip() * 2, f"{MALFORMED}trailing characters (byte 222)"),
    ("cut off in the middle", lines(event())[:100] + b"}", TRUNCATED),
    ("no JSON", b"{user_engagement}", f"{MALFORMED}object keys must be strings (byte 1)"),
    (
        "a NUL byte",
        lines(event()).replace(b"3000", b'"\0"').strip(),
        f"{MALFORMED}invalid character (byte 144)",
    ),
    (
        "bad UTF-8",
        lines(event("?")).replace(b"?", b"\xff").strip(),
        "'utf-8' codec can't decode byte 0xff in position 218: invalid start byte",
    ),
    (
        "bad UTF-8 in another field",
        lines(event(x="?")).replace(b"?", b"\xc0\x80").strip(),
        "'utf-8' codec can't decode byte 0xc0 in position 228: invalid start byte",
    ),
    ("a half of a surrogate pair", lines(event("\ud800")).strip(), TRUNCATED),
    (
        "it nests too deep",
        lines(event(x=0)).replace(b'"x": 0', b'"x": ' + b"[" * 20_000 + b"]" * 20_000).strip(),
        "maximum recursion depth exceeded while deserializing an object",
    ),
    ("NaN", lines(event(x=float("nan"))).strip(), f"{MALFORMED}invalid character (byte 227)"),
    (
        "an integer of 5000 digits",
        lines(event(msec="9" * 5000)).strip(),
        'engagement_time_msec is not an integer: "' + "9" * 59,
    ),
    (
        "a number of 5000 digits",
        lines(event(time=10**4000)).replace(b"0" * 4000, b"9" * 5000).strip(),
        'event_timestamp is not an integer: "1' + "9" * 58,
    ),
    *[
        (
            f"timestamp {value!r}"[:40],
            lines(event(time=value)).strip(),
            not_an_integer("event_timestamp", value),
        )
        for value in NO_TIMES
    ],
    (
        "a timestamp beyond the calendar",
        lines(event(time=253402400000 * 10**6)).strip(),
        "event_timestamp is beyond the calendar: 253402400000000000",
    ),
    (
        "a timestamp before the calendar",
        lines(event(time=-62135700000 * 10**6)).strip(),
        "event_timestamp is beyond the calendar: -62135700000000000",
    ),
    *[
        (
            f"msec {value!r}",
            lines(event(msec=value)).strip(),
            not_an_integer("engagement_time_msec", value),
        )
        for value in ["", "x", "3000.0", 3000.0, True, [], {}]
    ],
    *[
        (
            f"params {value!r}",
            lines(event(event_params=value)).strip(),
            f"event_params must be a list: {json.dumps(value)}",
        )
        for value in [5, {}, "x", True]
    ],
    *[
        (
            f"a param {value!r}",
            lines(event(event_params=[value])).strip(),
            f"event_params[0] must be an object: {json.dumps(value)}",
        )
        for value in NO_PARAMETERS
    ],
    (
        "a key that is no text",
        lines(event(key=5)).strip(),
        "event_params[1].key must be a string: 5",
    ),
    (
        "a value that is no object",
        lines(event(event_params=params(("a", 5)))).strip(),
        "event_params[0].value must be an object: 5",
    ),
    *[
        (
            f"user {value!r}",
            lines(event(value)).strip(),
            f"user_pseudo_id must be a string: {json.dumps(value)}",
        )
        for value in [5, [], {}, True]
    ],
    ("a user with a NUL", lines(event("a\0b")).strip(), "user_pseudo_id has a NUL character"),
    ("a user of a NUL", lines(event("\0", msec=1)).strip(), "user_pseudo_id has a NUL character"),
    ("a user of 513 bytes", lines(event("x" * 513)).strip(), TOO_LONG),
    ("a user of 258 letters", lines(event("é" * 258)).strip(), TOO_LONG),
    (
        "a user of 129 wide letters",
        json.dumps(event("😀" * 129), ensure_ascii=False).encode(),
        TOO_LONG,
    ),
    (
        "also when it is not active",
        lines(event(msec=1, time=None)).strip(),
        "event_timestamp is not an integer: null",
    ),
    ("an escaped name that is cut off", b'{"event_name":"\\u0075ser_engagement}', TRUNCATED),
]


@pytest.mark.parametrize(
    ("record", "reason"), [row[1:] for row in BAD_RECORDS], ids=[row[0] for row in BAD_RECORDS]
)
def test_a_bad_record(loader: Loader, record: bytes, reason: str) -> None:
    name = loader.file(GOOD + b"\n" + record + b"\n" + lines(event("b")))
    first, last = loader.refuse(name).splitlines(keepends=True)
    assert first == f"{name}:3: {reason}\n"
    assert last == REFUSED.format(1)
    assert not loader.db.exists()

    done = loader.run("--max-bad-records", 1, "--rejects", "rejects", "--format", "json", name)
    assert (done.returncode, done.stderr.decode()) == (0, first)
    assert json.loads(done.stdout)["bad_records"] == 1
    assert loader.table() == {"2019-12-30": 2}
    assert (loader.directory / "rejects").read_bytes() == record + b"\n"


NOT_BAD = {
    "another event that is broken inside": b'{"event_name":"x",}',
    "an escape that spells no letter of the name": b'{"a":"\\u003c",}',
    "an escaped NUL": b'{"a":"\\u0000",}',
    "a user with a NUL in another event": lines(event("\0", event_name="x")).strip(),
    "a long user in another event": lines(event("x" * 513, event_name="x")).strip(),
}


@pytest.mark.parametrize("record", NOT_BAD.values(), ids=NOT_BAD)
def test_what_is_no_engagement_event_is_not_looked_at(loader: Loader, record: bytes) -> None:
    assert loader.load(loader.file(GOOD + record))["bad_records"] == 0


def test_validate_decodes_every_line(loader: Loader) -> None:
    name = loader.file(GOOD + b'{"event_name":"x",}')
    what = "JSON is malformed: trailing comma in object (byte 18)\n"
    assert loader.refuse("--validate", name) == f"{name}:2: {what}" + REFUSED.format(1)
    assert loader.load("--validate", SAMPLE)["engagement_events"] == 75


def test_the_first_twenty_bad_records_and_how_many_more(loader: Loader) -> None:
    a, b = loader.file(b"x\n" * 15, "a"), loader.file(gzip.compress(b"\n{}\n" + b"y\n" * 15), "b")
    places = [f"a:{n}" for n in range(1, 16)] + [f"b:{n}" for n in range(3, 8)]
    assert loader.refuse(a, b, "--rejects", "rejects") == (
        "".join(f"{place}: {NOT_AN_OBJECT}\n" for place in places)
        + "and 10 more bad records\n"
        + REFUSED.format(30)
    )
    assert (loader.directory / "rejects").read_bytes() == b"x\n" * 15 + b"y\n" * 15


@pytest.mark.parametrize(("number", "more"), [(20, ""), (21, "and 1 more bad record\n")])
def test_one_more_bad_record(loader: Loader, number: int, more: str) -> None:
    said = loader.refuse("-", input=b"x\n" * number)
    first = "".join(f"-:{n}: {NOT_AN_OBJECT}\n" for n in range(1, 21))
    assert said == first + more + REFUSED.format(number)


def test_rejects_into_a_pipe(loader: Loader) -> None:
    os.mkfifo(loader.directory / "rejects")
    reader = os.open(loader.directory / "rejects", os.O_RDONLY | os.O_NONBLOCK)
    options = ["-q", "--rejects", "rejects", "--max-bad-records", 1]
    done = loader.run(*options, "-", input=b"bad\n" + GOOD_ROW)
    what = b"-:1: is not a JSON object, {...}: one event per line is expected\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", what)
    assert os.read(reader, 100) == b"bad\n"
    os.close(reader)


def test_repaired_rejects_complete_the_counts(loader: Loader) -> None:
    rows = SAMPLE.read_bytes().splitlines(keepends=True)
    broken = b"".join(
        row.replace(b"{", b"(", 1) if number % 3 == 0 else row for number, row in enumerate(rows)
    )
    loader.run("--max-bad-records", 1000, "--rejects", "rejects", loader.file(broken))
    lost, repaired = loader.table(), (loader.directory / "rejects").read_bytes().replace(b"(", b"{")
    loader.load(loader.file(repaired, "repaired"))
    assert lost != loader.table() == SAMPLE_TABLE


def test_rejects_are_appended_and_never_emptied(loader: Loader) -> None:
    """Neither by a good load, nor by a refused one, nor by a file without a final newline."""
    rejects = loader.directory / "rejects"
    steps = [
        (b"x\n", 1, 0, b"x\n"),
        (GOOD, 0, 0, b"x\n"),
        (GOOD + b"y\r\n \nz", 0, 1, b"x\ny\r\nz\n"),
        (b"x\n", 1, 0, b"x\ny\r\nz\nx\n"),
    ]
    for data, most, status, content in steps:
        done = loader.run("--rejects", rejects, "--max-bad-records", most, "-", input=data)
        assert (done.returncode, rejects.read_bytes()) == (status, content)
    rejects.write_bytes(b"by hand")
    loader.run("--rejects", rejects, "-", input=b"x\n")
    assert rejects.read_bytes() == b"by hand\nx\n"


def test_control_characters_are_escaped(loader: Loader) -> None:
    name = loader.file(lines(event(time="\x1b[31m\x07\u202e")), "evil\x1b]0;\n.jsons")
    message = loader.refuse(name)
    where = "evil\\x1b]0;\\n.jsons:1: event_timestamp is not an integer: "
    assert message == where + '"\\u001b[31m\\u0007\\u202e"\n' + REFUSED.format(1)
    assert all(c.isprintable() or c == "\n" for c in message)


def test_no_message_steers_the_terminal(loader: Loader) -> None:
    assert "no\\x1b]0;such" in loader.refuse("no\x1b]0;such")
    name = loader.file(lines(event()), "evil\x1b]0;")
    message = loader.refuse("--db", name, name, status=2)
    assert "evil\\x1b]0;" in message
    assert "\x1b" not in message


def test_a_file_name_that_is_no_text(loader: Loader) -> None:
    name = os.fsdecode(b"\xff.jsons")
    loader.file(lines(event("a")) + b"bad\n", name)
    done = loader.run("--max-bad-records", 1, name)
    assert done.returncode == 0
    assert done.stderr.decode() == f"\\udcff.jsons:2: {NOT_AN_OBJECT}\n"
    assert loader.query("SELECT sources FROM load_log") == [('["\\\\xff.jsons"]',)]


# -- Input that cannot be read

PACKED = gzip.compress(SAMPLE.read_bytes())
NO_FILE = "No such file or directory"
DAMAGED = "the compressed data is damaged or cut off"
UNREADABLE = {
    "missing": (None, NO_FILE),
    "gzip cut off": (PACKED[:-100], DAMAGED),
    "gzip without its end": (gzip.compress(GOOD)[:-4], DAMAGED),
    "gzip with a wrong checksum": (gzip.compress(GOOD)[:-8] + b"12345678", DAMAGED),
    "gzip damaged in the middle": (PACKED[:50_000] + b"\xff" * 100 + PACKED[50_100:], DAMAGED),
    "gzip and then something else": (gzip.compress(GOOD) + b"hello", DAMAGED),
    "the second member cut off": (gzip.compress(GOOD) + gzip.compress(GOOD)[:20], DAMAGED),
    "zstd and then something else": (zstd.compress(GOOD) + b"hello", DAMAGED),
    "zstd cut off": (zstd.compress(SAMPLE.read_bytes())[:-100], DAMAGED),
}


@pytest.mark.parametrize(("content", "reason"), UNREADABLE.values(), ids=UNREADABLE)
def test_input_that_cannot_be_read(loader: Loader, content: bytes | None, reason: str) -> None:
    loader.load("-", input=lines(event("before")))
    if content is not None:
        loader.file(content, "x")
    good = loader.file(GOOD, "good")
    (message,) = loader.refuse(good, "x", good).splitlines()
    assert re.match(rf"Error: x(:\d+)?: {reason}", message)
    assert message.endswith("; fetch the file again") == (reason == DAMAGED)
    if content is not None:
        (message,) = loader.refuse("-", input=content).splitlines()
        assert re.match(rf"Error: -(:\d+)?: {reason}.*; fetch the file again$", message)


def test_a_directory(loader: Loader) -> None:
    (loader.directory / "shards").mkdir()
    assert loader.refuse("shards") == "Error: shards: Is a directory; name the files in it\n"


WIDE = b"\x28\xb5\x2f\xfd\x00\xa8\x01\x00\x00"  # a zstd frame with a window of 2 GiB
ROWS = lines(event("a"), event("b"))
OBJECTS = [event("a"), event("b")]
AS_JSON = "export it as newline-delimited JSON"


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("events.jsons", ROWS)
    return file.getvalue()


def tarred(mode: Any) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:
        member = tarfile.TarInfo("events.jsons")
        member.size = len(ROWS)
        archive.addfile(member, io.BytesIO(ROWS))
    return file.getvalue()


ARRAY = "is a JSON array; make it one event per line: jq -c '.[]'"
PRETTY = "is pretty-printed JSON; make it one event per line: jq -c ."
UTF_16 = "is UTF-16; make it UTF-8: iconv -f UTF-16 -t UTF-8"
TWICE = "is compressed twice, or a compressed live pipe; decompress it first: zcat, or zstdcat"
TAR = "is a tar archive; load the files in it: tar -xO"
HTML = f"is HTML or XML; {AS_JSON}"
OTHER_FORMATS = {
    "a JSON array": (json.dumps(OBJECTS).encode(), ARRAY),
    "a JSON array of many lines": (b"[\n" + ROWS.replace(b"}\n{", b"},\n{") + b"]\n", ARRAY),
    "a JSON array after blank lines": (b"\xef\xbb\xbf\r\n\n [{}]", ARRAY),
    "a compressed JSON array": (gzip.compress(json.dumps(OBJECTS).encode()), ARRAY),
    "pretty-printed": (json.dumps(event(), indent=2).encode(), PRETTY),
    "pretty-printed with CRLF": (b'{\r\n\t"a": 1\r\n}\r\n', PRETTY),
    "Parquet": (b"PAR1\x15\x04\x15\x10", f"is a Parquet file; {AS_JSON}"),
    "Avro": (b"Obj\x01\x04\x14avro.codec", f"is an Avro file; {AS_JSON}"),
    "ORC": (b"ORC\x08\x03\x10", f"is an ORC file; {AS_JSON}"),
    "zip": (zipped(), "is a zip archive; decompress it first: unzip -p"),
    "xz": (lzma.compress(ROWS), "is xz-compressed; decompress it first: xzcat"),
    "bzip2": (bz2.compress(ROWS), "is bzip2-compressed; decompress it first: bzcat"),
    "lz4": (b"\x04\x22\x4d\x18\x64\x40", "is lz4-compressed; decompress it first: lz4cat"),
    "UTF-16, little end first": (b"\xff\xfe" + ROWS.decode().encode("utf-16-le"), UTF_16),
    "UTF-16, big end first": (b"\xfe\xff" + ROWS.decode().encode("utf-16-be"), UTF_16),
    "UTF-16 without a mark, little end first": (ROWS.decode().encode("utf-16-le"), UTF_16),
    "UTF-16 without a mark, big end first": (ROWS.decode().encode("utf-16-be"), UTF_16),
    "HTML": (b"<!DOCTYPE html>\n<html><title>Sign in</title></html>", HTML),
    "XML": (b"\n<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", HTML),
    "gzip twice": (gzip.compress(gzip.compress(ROWS)), TWICE),
    "gzip of zstd": (gzip.compress(zstd.compress(ROWS)), TWICE),
    "tar": (tarred("w:"), TAR),
    "tar.gz": (tarred("w:gz"), TAR),
}


@pytest.mark.parametrize(("content", "what"), OTHER_FORMATS.values(), ids=OTHER_FORMATS)
def test_another_format_is_named(loader: Loader, content: bytes, what: str) -> None:
    name = loader.file(content)
    assert loader.refuse(name) == f"Error: {name}:1: {what}\n"
    assert loader.refuse("--max-bad-records", 100, name) == f"Error: {name}:1: {what}\n"
    assert loader.refuse("-", input=content) == f"Error: -:1: {what}\n"
    assert not loader.db.exists()


@pytest.mark.parametrize(
    ("content", "first", "what"),
    [
        (b"PAR1\x15\x04", 1, OTHER_FORMATS["Parquet"][1]),
        (b"\n[{}]", 1, ARRAY),
        (b'{\n"a": 1\n}\n', 2, PRETTY),
    ],
    ids=["Parquet", "JSON array", "pretty-printed"],
)
def test_another_format_that_comes_slowly(
    loader: Loader, content: bytes, first: int, what: str
) -> None:
    done = through_a_slow_pipe(loader, content, first)
    assert (done.returncode, done.stderr.decode()) == (1, f"Error: -:1: {what}\n")


def test_a_zstd_window_beyond_the_limit(loader: Loader) -> None:
    what = "its zstd window is larger than 128 MiB; decompress it first: zstd -dc --long=31"
    name = loader.file(WIDE)
    assert loader.refuse(name) == f"Error: {name}:1: {what}\n"


NO_ENGAGEMENT_AT_ALL = {
    "of Airbyte": {"_airbyte_data": event(), "_airbyte_emitted_at": 1},
    "of Singer": {"type": "RECORD", "stream": "events", "record": event()},
    "names in capitals": {key.upper(): value for key, value in event().items()},
    "of Avro's JSON": {**event(), "event_name": {"string": "user_engagement"}},
    "other events": event(event_name="page_view"),
}


@pytest.mark.parametrize("record", NO_ENGAGEMENT_AT_ALL.values(), ids=NO_ENGAGEMENT_AT_ALL)
def test_a_load_without_an_engagement_event_is_warned_of(
    loader: Loader, record: dict[str, Any]
) -> None:
    warning = NO_EVENT.format(2, "user_engagement")
    report = loader.load("-", input=lines(record, record), warning=warning)
    assert (report["lines"], report["engagement_events"], report["dates"]) == (2, 0, [])
    assert loader.query("SELECT lines FROM load_log") == [(2,)]
    done = loader.run("-q", "-", input=lines(record))
    assert done.stderr.decode() == NO_EVENT.format(1, "user_engagement")
    loader.load("-", input=lines(record, event(msec=1)))


def test_the_warning_names_all_event_names(loader: Loader) -> None:
    warning = NO_EVENT.format(1, "page_view, scroll")
    args = ["--event-name", "scroll", "--event-name", "page_view"]
    loader.load(*args, "-", input=lines(event()), warning=warning)


# -- The database


def test_schema_sql_by_hand_makes_the_database(loader: Loader) -> None:
    with closing(sqlite3.connect(loader.db)) as db:
        db.executescript((ROOT / "schema.sql").read_text())
    loader.load(SAMPLE)
    assert loader.table() == SAMPLE_TABLE
    columns = loader.query(
        "SELECT name, type, \"notnull\", pk FROM pragma_table_info('active_user_table')"
    )
    assert columns == [("date", "DATE", 1, 1), ("active_user_count", "INTEGER", 1, 0)]
    assert loader.query("SELECT DISTINCT length(date), typeof(date) FROM active_user_table") == [
        (10, "text")
    ]


OTHER_RULES = {
    "another zone": ["--timezone", "UTC"],
    "a zone that differs in other years alone": ["--timezone", "America/Menominee"],
    "another minimum": ["--min-engagement-msec", "1"],
    "another glob": ["--valuable-event", "*"],
    "another event": ["--event-name", "page_view"],
    "any event": ["--event-name", "*"],
    "one event more": ["--event-name", "user_engagement", "--event-name", "page_view"],
    "in a dry run too": ["--dry-run", "--timezone", "UTC"],
}


@pytest.mark.parametrize("args", OTHER_RULES.values(), ids=OTHER_RULES)
def test_a_database_keeps_one_rule(loader: Loader, args: list[str]) -> None:
    loader.load(SAMPLE)
    rule = {"--timezone": ["US/Central"], "--event-name": ["user_engagement"]}
    rule |= {"--min-engagement-msec": ["3000"], "--valuable-event": ["*_event"]}
    other: dict[str, list[str]] = {}
    pairs = args[args[0] == "--dry-run" :]
    for name, value in zip(pairs[::2], pairs[1::2], strict=True):
        other[name] = sorted([*other.get(name, []), value])

    def spelt(rule: dict[str, list[str]]) -> str:
        return " ".join(f"{name} {shlex.quote(v)}" for name, some in rule.items() for v in some)

    assert loader.refuse(*args, SAMPLE) == (
        f"Error: active_user_table.db: was filled under the rule {spelt(rule)}; "
        f"the rule of this load is {spelt(rule | other)}; use that rule or another --db\n"
    )


def test_the_order_of_a_rule_does_not_matter(loader: Loader) -> None:
    names = ["--event-name", "a", "--event-name", "b"]
    globs = ["--valuable-event", "x", "--valuable-event", "*_event"]
    loader.load(*names, *globs, "-", input=lines(event(event_name="b")))
    names[1::2] = "ba"
    loader.load(*names, *globs[2:], *globs, "-", input=lines(event("v", event_name="a")))
    assert loader.table() == {"2019-12-30": 2}


@pytest.mark.parametrize(
    "zones",
    [("US/Central", "America/Chicago"), ("UTC", "Etc/UTC"), ("Asia/Calcutta", "Asia/Kolkata")],
)
def test_two_names_of_one_zone_are_one_zone(loader: Loader, zones: tuple[str, str]) -> None:
    for zone in (*zones, zones[0]):
        loader.load("--timezone", zone, "-", input=lines(event(zone)))
    assert loader.table() == {"2019-12-30": 2}
    counted = loader.query("SELECT timezone, count(*) FROM load_log GROUP BY 1 ORDER BY 2")
    assert counted == [(zones[1], 1), (zones[0], 2)]


NO_COLUMN = "it has no column {}: it is not one of load_active_users.py; choose another --db"
SCHEMA = (ROOT / "schema.sql").read_text()
OLD = (ROOT / "tests" / "database-1.0.0.sql").read_text()
LATER = "is of a later version of load_active_users.py than {}; use that"
FOREIGN = {
    "another program's": (
        "CREATE TABLE notes (text)",
        NO_COLUMN.format("active_user_table.date of type DATE"),
    ),
    "a table to plot of another shape": (
        "CREATE TABLE active_user_table (date DATE, users)",
        NO_COLUMN.format("active_user_table.active_user_count of type INTEGER"),
    ),
    "only the table to plot": (
        SCHEMA.split(";")[0],
        NO_COLUMN.format("active_user.date of type DATE"),
    ),
    "one from before 1.0.0": (
        OLD.replace("    blank_lines INTEGER NOT NULL,\n", "")
        .replace(",0,3,3,1,0,2)", ",3,3,1,0,2)")
        .replace(",1,2,2,0,1,1)", ",2,2,0,1,1)"),
        NO_COLUMN.format("load_log.blank_lines of type INTEGER"),
    ),
    "one whose users are numbers": (
        SCHEMA.replace("user_pseudo_id TEXT", "user_pseudo_id INTEGER"),
        NO_COLUMN.format("active_user.user_pseudo_id of type TEXT"),
    ),
    "one of a later version": (
        SCHEMA + "PRAGMA user_version = 3;",
        LATER.format(load_active_users.__version__),
    ),
}


@pytest.mark.parametrize(("script", "what"), FOREIGN.values(), ids=FOREIGN)
def test_a_database_that_is_not_ours(loader: Loader, script: str, what: str) -> None:
    loader.execute(script)
    for args in ([], ["--dry-run"]):
        assert loader.refuse(*args, SAMPLE) == f"Error: active_user_table.db: {what}\n"


def test_tables_without_their_primary_keys(loader: Loader) -> None:
    """Where the same users would be added again and again."""
    key = "PRIMARY KEY (date, user_pseudo_id)"
    loader.execute(SCHEMA.replace(key, "CHECK (1)").replace(") WITHOUT ROWID", ")"))
    what = "ON CONFLICT clause does not match any PRIMARY KEY or UNIQUE constraint"
    what = f"a table lacks its primary key ({what}); give it the one that schema.sql has"
    assert loader.refuse(SAMPLE) == f"Error: active_user_table.db: {what}\n"


def test_a_new_file_that_another_program_has_numbered(loader: Loader) -> None:
    """It has no tables, of whatever version."""
    loader.execute("PRAGMA user_version = 99; CREATE TABLE x (y); DROP TABLE x")
    assert loader.load(SAMPLE)["lines"] == 1000


def test_a_working_directory_that_was_deleted(loader: Loader) -> None:
    """It is no matter where all paths are absolute."""
    (loader.directory / "gone").mkdir()
    loader.file(SAMPLE.read_bytes())
    command = (
        f'cd gone && rmdir ../gone && exec "$@" --db {loader.db} {loader.directory}/events.jsons'
    )
    shell = ["sh", "-c", command, "sh", *loader.command("-q")]
    done = subprocess.run(shell, cwd=loader.directory, env=environment(), capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert loader.table() == {"2019-12-29": 11, "2019-12-30": 31, "2019-12-31": 22}


def test_a_database_that_is_no_database(loader: Loader) -> None:
    loader.db.write_bytes(b"hello, world" * 100)
    done = loader.run(SAMPLE)
    assert (done.returncode, done.stdout) == (1, b"")
    said = b"Error: active_user_table.db: file is not a database; choose another --db\n"
    assert done.stderr == said
    assert loader.db.read_bytes() == b"hello, world" * 100


def test_a_directory_that_is_missing(loader: Loader) -> None:
    what = f"there is no directory {loader.directory}/no; create it first"
    assert loader.refuse("--db", "no/x.db", SAMPLE) == f"Error: no/x.db: {what}\n"


# -- A database of version 1.0.0


def test_the_first_load_upgrades_a_database(loader: Loader) -> None:
    """Keeping counts and rule, to what a new database is."""
    loader.execute(OLD)
    assert loader.load("-", input=lines(event("b"), event("d")))["dates"] == [
        date("2019-12-30", 3, 1)
    ]
    assert loader.table() == {"2019-12-30": 3, "2019-12-31": 1}
    assert (users(loader), users(loader, "2019-12-31")) == (["a", "b", "d"], ["c"])
    names = "seconds, bytes, event_names, dates, out_of_range_events, removed, left_out, added"
    assert loader.query(f"SELECT {names} FROM load_log ORDER BY rowid")[:2] == [
        (0, 0, '["user_engagement"]', "", 0, 0, 0, 2),
        (0, 0, '["user_engagement"]', "", 0, 0, 0, 1),
    ]
    new = Loader(loader.directory / "new")
    new.directory.mkdir()
    new.load("-", input=lines(event()))
    columns = """SELECT m.name, c.name, c.type, c."notnull", c.dflt_value, c.pk
        FROM sqlite_master m, pragma_table_info(m.name) c ORDER BY m.name, c.name"""
    assert loader.query(columns) == new.query(columns)
    views = "SELECT sql FROM sqlite_master WHERE type = 'view'"
    assert loader.query(views) == new.query(views)
    assert loader.query("PRAGMA user_version") == new.query("PRAGMA user_version") == [(2,)]


def test_the_upgrade_is_part_of_the_load(loader: Loader) -> None:
    """A load that is refused, a dry run and a plot leave the database as it was."""
    loader.execute(OLD)
    before = loader.content()
    loader.refuse("-", input=b"bad\n")
    loader.refuse("--timezone", "UTC", SAMPLE)
    loader.refuse("--event-name", "*", SAMPLE)
    assert loader.load("--dry-run", "-", input=lines(event("d")))["dates"] == [
        date("2019-12-30", 3, 1)
    ]
    done = loader.run("--plot", "users.svg")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert loader.content() == before


def test_another_name_of_its_zone_upgrades_too(loader: Loader) -> None:
    loader.execute(OLD)
    loader.load("--timezone", "America/Chicago", "-", input=lines(event("a")))
    assert loader.table() == {"2019-12-30": 2, "2019-12-31": 1}


# -- Being stopped


@pytest.mark.parametrize(
    ("number", "status", "word"),
    [(signal.SIGINT, 130, "Interrupted"), (signal.SIGTERM, 143, "Terminated")],
)
def test_a_signal_ends_a_load(loader: Loader, number: int, status: int, word: str) -> None:
    loader.load("-", input=lines(event("before")))
    before = loader.content()
    os.mkfifo(loader.directory / "pipe")
    with loader.start("pipe", env=environment(), stdout=-1, stderr=-1) as process:
        with (loader.directory / "pipe").open("wb") as pipe:  # opens when it is opened to be read
            pipe.write(SAMPLE.read_bytes())  # more than a pipe holds: some of it has been read
            pipe.flush()
            process.send_signal(number)
            out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (status, b"")
    assert err.decode() == f"{word}: uncommitted changes were rolled back\n"
    assert loader.content() == before


def test_a_reader_that_had_enough(loader: Loader) -> None:
    read, write = os.pipe()
    os.close(read)
    with open(write, "wb") as closed:
        with loader.start(SAMPLE, stdout=closed, stderr=-1) as process:
            _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, b"")
    assert loader.table() == SAMPLE_TABLE


# -- The README


def test_the_help_in_the_readme(loader: Loader) -> None:
    done = loader.run("--help", env={"COLUMNS": "80"})
    assert done.stdout.decode() in (ROOT / "README.md").read_text()


def test_the_plain_reading_of_the_sample() -> None:
    users, tally, bad = plain.read(SAMPLE.read_bytes())
    assert ({date: len(ids) for date, ids in sorted(users.items())}, bad) == (SAMPLE_TABLE, {})
    assert tally == {"lines": 1000, "engagement_events": 75, "active_events": 64}
