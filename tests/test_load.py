"""What the command promises: each test runs it as a process, on real files and a real database."""

import gzip
import json
import os
import signal
import sqlite3
import subprocess
import time
from contextlib import closing
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import plain
import pytest
from backports import zstd
from conftest import NOON, ROOT, SAMPLE, Loader, event, lines

SAMPLE_TABLE = {"2019-12-29": 11, "2019-12-30": 31, "2019-12-31": 22}
HOUR = 3600 * 10**6


def usec(text: str, zone: str = "US/Central") -> int:
    """Microseconds UTC of a local time."""
    return (
        datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone)) - datetime(1970, 1, 1, tzinfo=UTC)
    ) // timedelta(microseconds=1)


def params(*pairs: tuple[Any, Any]) -> list[dict[str, Any]]:
    return [{"key": key, "value": value} for key, value in pairs]


# -- The sample


def test_the_sample(loader: Loader) -> None:
    assert loader.load(SAMPLE) == {
        "dates": [{"date": d, "active_user_count": n, "added": n} for d, n in SAMPLE_TABLE.items()],
        "lines": 1000,
        "engagement_events": 75,
        "active_events": 64,
        "anonymous_events": 0,
        "bad_records": 0,
    }
    assert loader.table() == SAMPLE_TABLE


def test_the_report_as_a_table(loader: Loader) -> None:
    done = loader.run(SAMPLE, env={"COLUMNS": "80"})
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode() == (ROOT / "README.md").read_text().split("```text\n")[1].split("```")[0]


def test_the_report_as_csv(loader: Loader) -> None:
    done = loader.run("--format", "csv", SAMPLE)
    assert done.stdout == b"date,active_user_count,added\n2019-12-29,11,11\n2019-12-30,31,31\n2019-12-31,22,22\n"


# -- What counts: an event, and whether it makes its user active

ACTIVE = {
    "it has the least engagement time": event(msec=3000),
    "integers are strings": event(msec="3000", time=str(NOON)),
    "a long engagement": event(msec="9" * 400),
    "another valuable parameter": event(key="_event"),
    "the first of several times is long enough": event(
        event_params=params(
            ("engagement_time_msec", {"int_value": 3000}), ("engagement_time_msec", {"int_value": 1}), ("a_event", {})
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
    "other order, white space": json.dumps(dict(reversed(event().items())), indent=1).replace("\n", "\t\r ").encode(),
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
    "BigQuery's escapes": lines(event(text="<&>")).replace(b"<&>", b"\\u003c\\u0026\\u003e").strip(),
    "the last of a field given twice": lines(event()).replace(b'{"event_t', b'{"event_params":5,"event_t', 1).strip(),
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
    | {"event_params": params(("engagement_time_msec", {"int_value": 9000}), ("a", {"string_value": "x_event"}))},
    "a valuable key in user_properties": event(key="session", user_properties=params(("x_event", {"int_value": 1}))),
    "the engagement time in user_properties": event(
        event_params=params(("x_event", {})), user_properties=params(("engagement_time_msec", {"int_value": 9000}))
    ),
    "the key goes on": event(key="x_events"),
    "the key in capitals": event(key="X_EVENT"),
    "no parameters": event(event_params=None),
}
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
        report = loader.load("--dry-run", "-", input=lines(record))
        assert (report["engagement_events"], report["active_events"]) == expected, case
        assert [date["date"] for date in report["dates"]] == ["2019-12-30"] * expected[1], case


def test_users_are_counted_not_events(loader: Loader) -> None:
    data = lines(event("a"), event("a", time=NOON + HOUR), event("b"), event("a"), event("a", time=NOON + 24 * HOUR))
    report = loader.load(loader.file(data))
    assert report["active_events"] == 5
    assert loader.table() == {"2019-12-30": 2, "2019-12-31": 1}


def test_the_user_is_the_user_pseudo_id(loader: Loader) -> None:
    """Not the user_id, nor the session."""
    data = lines(event("a", user_id="1"), event("a", user_id="2"), event("b", user_id="1"), event("B"), event("b "))
    loader.load(loader.file(data))
    assert loader.query("SELECT user_pseudo_id FROM active_user") == [("B",), ("a",), ("b",), ("b ",)]


def test_users_of_all_letters_are_kept_apart(loader: Loader) -> None:
    users = ["a", "a\0b", "a\0c", "\0", "é", "e\u0301", "\\u0000", '"', "'", "\n", "😀", "1", "01", "1.0", "x" * 10_000]
    assert loader.load(loader.file(lines(*map(event, users))))["dates"][0]["active_user_count"] == len(users)
    assert [user for (user,) in loader.query("SELECT user_pseudo_id FROM active_user")] == sorted(users)
    assert loader.load("events.jsons")["dates"][0]["added"] == 0


def test_events_without_a_user_are_tallied_as_anonymous(loader: Loader) -> None:
    absent = event()
    del absent["user_pseudo_id"]
    report = loader.load("-", input=lines(event(None), event(""), absent, event("a"), event(None, msec=1)))
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
    ("the last of its 25 hours", "US/Central", usec("2020-11-01T00:00") + 25 * HOUR - 1, "2020-11-01"),
    ("after its 25 hours", "US/Central", usec("2020-11-01T00:00") + 25 * HOUR, "2020-11-02"),
    ("half hours", "Asia/Kolkata", usec("2020-01-01T00:00", "Asia/Kolkata") - 1, "2019-12-31"),
    ("half hours, midnight", "Asia/Kolkata", usec("2020-01-01T00:00", "Asia/Kolkata"), "2020-01-01"),
    ("before 1970", "US/Central", -1, "1969-12-31"),
    ("after 2037", "US/Central", usec("2050-07-01T00:00") - 1, "2050-06-30"),
    ("the last microsecond of the calendar", "UTC", 253402300800 * 10**6 - 1, "9999-12-31"),
    ("the first of it", "UTC", -62135596800 * 10**6, "0001-01-01"),
]


@pytest.mark.parametrize(("zone", "timestamp", "date"), [row[1:] for row in DATES], ids=[row[0] for row in DATES])
def test_dates(loader: Loader, zone: str, timestamp: int, date: str) -> None:
    report = loader.load("--timezone", zone, "-", input=lines(event(time=timestamp, event_date="20010101")))
    assert report["dates"] == [{"date": date, "active_user_count": 1, "added": 1}]


# -- Loads are idempotent


def test_a_second_load_changes_nothing(loader: Loader) -> None:
    loader.load(SAMPLE)
    before = loader.query("SELECT * FROM active_user")
    report = loader.load(SAMPLE)
    assert [(d["active_user_count"], d["added"]) for d in report["dates"]] == [(11, 0), (31, 0), (22, 0)]
    assert (loader.table(), loader.query("SELECT * FROM active_user")) == (SAMPLE_TABLE, before)


def test_halves_and_overlaps_in_any_order(loader: Loader) -> None:
    rows = SAMPLE.read_bytes().splitlines(keepends=True)
    for number, piece in enumerate([rows[600:], rows[300:700], rows[:400], rows[::-1][:50]]):
        loader.load(loader.file(b"".join(piece), f"{number}.jsons"))
    assert loader.table() == SAMPLE_TABLE


def test_several_files_are_one_load(loader: Loader) -> None:
    a, b = loader.file(lines(event("a"), event("b")), "a"), loader.file(lines(event("b"), event("c")), "b")
    report = loader.load(a, "-", b, a, input=lines(event("d")))
    assert report["dates"] == [{"date": "2019-12-30", "active_user_count": 4, "added": 4}]
    assert report["lines"] == 7
    assert loader.query("SELECT sources FROM load_log") == [('["a","-","b","a"]',)]


def test_a_late_event_touches_its_own_date_only(loader: Loader) -> None:
    loader.load(SAMPLE)
    report = loader.load("-", input=lines(event("late", time=NOON - 24 * HOUR)))
    assert report["dates"] == [{"date": "2019-12-29", "active_user_count": 12, "added": 1}]
    assert loader.table() == SAMPLE_TABLE | {"2019-12-29": 12}


def test_replace_makes_a_load_the_whole_truth_for_its_dates(loader: Loader) -> None:
    loader.load(SAMPLE)
    loader.load("-", input=lines(event("old"), event("kept")))
    report = loader.load("--replace", "-", input=lines(event("kept"), event("new"), event("new")))
    assert report["dates"] == [{"date": "2019-12-30", "active_user_count": 2, "added": 1}]
    assert loader.table() == SAMPLE_TABLE | {"2019-12-30": 2}
    assert loader.query("SELECT user_pseudo_id FROM active_user WHERE date = '2019-12-30'") == [("kept",), ("new",)]


def test_replace_on_several_dates_with_the_same_users(loader: Loader) -> None:
    both = lines(event("a"), event("a", time=NOON + 24 * HOUR))
    loader.load("-", input=both)
    assert [date["added"] for date in loader.load("--replace", "-", input=both)["dates"]] == [0, 0]
    assert loader.query("SELECT replaced FROM load_log ORDER BY rowid") == [(0,), (1,)]


def test_a_touched_date_is_counted_anew(loader: Loader) -> None:
    loader.load("-", input=lines(event("a")))
    with closing(sqlite3.connect(loader.db)) as db, db:
        db.execute("UPDATE active_user_table SET active_user_count = 77")
    assert loader.load("-", input=lines(event("b")))["dates"] == [
        {"date": "2019-12-30", "active_user_count": 2, "added": 1}
    ]


def test_the_table_is_the_count_of_active_user(loader: Loader) -> None:
    for file in (SAMPLE, loader.file(lines(event("a"), event("b", time=0)))):
        loader.load(file)
    counted = loader.query("SELECT date, count(*) FROM active_user GROUP BY date")
    assert counted == list(loader.table().items())


def test_load_log_has_a_row_a_load(loader: Loader) -> None:
    data = lines(event("a"), event(None), event(msec=1), {"event_name": "x"}, b"", b"bad")
    loader.run("--max-bad-records", 1, "--valuable-event", "x_*", "--valuable-event", "b", loader.file(data))
    row = dict(
        zip(
            [c[1] for c in loader.query("PRAGMA table_info(load_log)")],
            *loader.query("SELECT * FROM load_log"),
            strict=False,
        )
    )
    assert len(row.pop("load_id")) == 16
    assert abs(datetime.fromisoformat(row.pop("loaded_at")) - datetime.now(UTC)) < timedelta(minutes=5)
    assert row == {
        "sources": '["events.jsons"]',
        "timezone": "US/Central",
        "min_engagement_msec": 3000,
        "valuable_events": '["b","x_*"]',
        "replaced": 0,
        "lines": 6,
        "blank_lines": 1,
        "engagement_events": 3,
        "active_events": 2,
        "anonymous_events": 1,
        "bad_records": 1,
        "added": 1,
    }


# -- Input


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
        "gzip with a byte-order mark": gzip.compress(b"\xef\xbb\xbf" + lines(event("a"), event("b"))),
        "zstd": zstd.compress(lines(event("a"), event("b"))),
        "zstd, two frames": zstd.compress(lines(event("a"))) + zstd.compress(lines(event("b"))),
    }.items(),
    ids=lambda item: item[0],
)
def test_files_of_every_kind(loader: Loader, data: tuple[str, bytes]) -> None:
    loader.load(loader.file(data[1], "any-name.json"))
    assert loader.table() == {"2019-12-30": 2}
    assert loader.load("-", input=data[1])["dates"] == [{"date": "2019-12-30", "active_user_count": 2, "added": 0}]


def test_an_empty_file_is_an_empty_load(loader: Loader) -> None:
    for data in (b"", b"\xef\xbb\xbf", gzip.compress(b"")):
        assert loader.load(loader.file(data))["dates"] == []
    assert (loader.table(), len(loader.query("SELECT * FROM load_log"))) == ({}, 3)


def test_a_named_pipe(loader: Loader) -> None:
    os.mkfifo(loader.directory / "pipe")
    with subprocess.Popen(loader.command("--format", "json", "pipe"), cwd=loader.directory, stdout=-1) as process:
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
    data = lines(event("a", msec=5), event("b", msec=4), event("c", msec=9, key="buy"), event("d", msec=9, key="[x]"))
    report = loader.load(
        "--min-engagement-msec", 5, "--valuable-event", "b?y", "--valuable-event", "[[]x]", "-", input=data
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
    assert report["dates"] == [{"date": "2019-12-30", "active_user_count": 2, "added": 1}]
    report = loader.load("--dry-run", "--replace", "-", input=lines(event("b"), event("c")))
    assert report["dates"] == [{"date": "2019-12-30", "active_user_count": 2, "added": 2}]
    done = loader.run("--dry-run", "--rejects", "rejects", "--max-bad-records", 1, "-", input=lines(b"bad"))
    assert done.returncode == 0
    assert (loader.db.read_bytes(), loader.db.stat()) == before
    assert [path.name for path in loader.directory.iterdir()] == [loader.db.name]


def test_quiet(loader: Loader) -> None:
    done = loader.run("-q", SAMPLE)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert loader.table() == SAMPLE_TABLE


def test_options_from_the_environment(loader: Loader) -> None:
    env = {"LOAD_ACTIVE_USERS_TIMEZONE": "UTC", "LOAD_ACTIVE_USERS_VALUABLE_EVENT": "a_* b_*"}
    env |= {
        "LOAD_ACTIVE_USERS_DB": "env.db",
        "LOAD_ACTIVE_USERS_MIN_ENGAGEMENT_MSEC": "7",
        "LOAD_ACTIVE_USERS_QUIET": "1",
    }
    done = loader.run("-", input=lines(event(msec=7, key="b_x"), event("v", key="c_x")), env=env)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    loader.db = loader.directory / "env.db"
    assert loader.query("SELECT timezone, min_engagement_msec, valuable_events, added FROM load_log") == [
        ("UTC", 7, '["a_*","b_*"]', 1)
    ]


def test_version(loader: Loader) -> None:
    done = loader.run("--version")
    assert (done.returncode, done.stdout) == (0, b"1.0.0\n")


USAGE = [
    ([], "Missing argument 'EVENTS...'"),
    (["--timezon", "UTC", "x"], "Did you mean '--timezone'?"),
    (["--timezone", "Mars/Base", "x"], "'Mars/Base' is no IANA time zone"),
    (["--timezone", "", "x"], "no IANA time zone"),
    (["--timezone", "/etc/localtime", "x"], "no IANA time zone"),
    (["--timezone", "../zoneinfo/UTC", "x"], "no IANA time zone"),
    (["--timezone", "Europe/../UTC", "x"], "no IANA time zone"),
    (["--timezone", "./UTC", "x"], "no IANA time zone"),
    (["--timezone", "Europe", "x"], "no IANA time zone"),
    (["--timezone", "UTC+3", "x"], "no IANA time zone"),
    (["--min-engagement-msec", "3s", "x"], "'3s' is not a valid integer"),
    (["--min-engagement-msec", "-1", "x"], "-1 is not in the range"),
    (["--max-bad-records", "-1", "x"], "-1 is not in the range"),
    (["--workers", "0", "x"], "0 is not in the range"),
    (["--format", "xml", "x"], "'xml' is not one of"),
]


@pytest.mark.parametrize(("args", "message"), USAGE, ids=[" ".join(args) for args, _ in USAGE])
def test_a_wrong_command_line(loader: Loader, args: list[str], message: str) -> None:
    assert message in loader.refuse(*args, status=2)


def test_a_file_is_not_both_read_and_written(loader: Loader) -> None:
    name = loader.file(lines(event()))
    assert "is to be written, but is the same file as" in loader.refuse("--rejects", name, f"./{name}", status=2)
    assert "is to be written, but is the same file as" in loader.refuse("--db", name, name, status=2)
    assert (loader.directory / name).read_bytes() == lines(event())
    loader.load(name)
    assert "is the same file as" in loader.refuse("--rejects", f"./{loader.db.name}", name, status=2)
    assert "is the same file as" in loader.refuse("--rejects", "new.png", "--plot", "./new.png", name, status=2)


# -- Bad records

GOOD = lines(event("a"))
BAD_RECORDS = [
    ("an array", b"[{}]", "not one JSON object"),
    ("a text", b'"user_engagement"', "not one JSON object"),
    ("cut off", lines(event())[:100], "not one JSON object"),
    ("its end alone", lines(event())[100:-1], "not one JSON object"),
    ("another event, cut off", b'{"event_name":"x"', "not one JSON object"),
    ("CSV", b"a,b,c", "one event a line is expected"),
    ("two on a line", lines(event()).strip() * 2, "malformed"),
    ("cut off in the middle", lines(event())[:100] + b"}", "truncated"),
    ("no JSON", b"{user_engagement}", "malformed"),
    ("a NUL byte", lines(event()).replace(b"3000", b'"\0"').strip(), "malformed"),
    ("bad UTF-8", lines(event("?")).replace(b"?", b"\xff").strip(), "invalid UTF-8 (byte"),
    ("bad UTF-8 in another field", lines(event(x="?")).replace(b"?", b"\xc0\x80").strip(), "invalid UTF-8 (byte"),
    ("a half of a surrogate pair", lines(event("\ud800")).strip(), "Input data was truncated"),
    (
        "it nests too deep",
        lines(event(x=0)).replace(b'"x": 0', b'"x": ' + b"[" * 20_000 + b"]" * 20_000).strip(),
        "recursion",
    ),
    ("NaN", lines(event(x=float("nan"))).strip(), "malformed"),
    ("an integer of 5000 digits", lines(event(msec="9" * 5000)).strip(), "engagement_time_msec is no integer"),
    *[
        (f"timestamp {value!r}"[:40], lines(event(time=value)).strip(), "event_timestamp")
        for value in [None, "", "x", "1e15", 1.5, 1.0, "1.0", True, [], {}, "9" * 400, 10**400, " 1", "+1", "1_0", "٣"]
    ],
    ("a timestamp beyond the calendar", lines(event(time=253402400000 * 10**6)).strip(), "beyond the calendar"),
    ("a timestamp before the calendar", lines(event(time=-62135700000 * 10**6)).strip(), "beyond the calendar"),
    *[
        (f"msec {value!r}", lines(event(msec=value)).strip(), "engagement_time_msec is no integer")
        for value in ["", "x", "3000.0", 3000.0, True, [], {}]
    ],
    *[(f"params {value!r}", lines(event(event_params=value)).strip(), "event_params") for value in [5, {}, "x", True]],
    *[
        (f"a param {value!r}", lines(event(event_params=[value])).strip(), "event_params")
        for value in [5, None, [], "x"]
    ],
    ("a key that is no text", lines(event(key=5)).strip(), "event_params[1].key"),
    ("a value that is no object", lines(event(event_params=params(("a", 5)))).strip(), "value"),
    *[(f"user {value!r}", lines(event(value)).strip(), "user_pseudo_id") for value in [5, [], {}, True]],
    ("also when it is not active", lines(event(msec=1, time=None)).strip(), "event_timestamp is no integer: null"),
    ("an escaped name that is cut off", b'{"event_name":"\\u0075ser_engagement}', "truncated"),
]


@pytest.mark.parametrize(("record", "reason"), [row[1:] for row in BAD_RECORDS], ids=[row[0] for row in BAD_RECORDS])
def test_a_bad_record(loader: Loader, record: bytes, reason: str) -> None:
    name = loader.file(GOOD + b"\n" + record + b"\n" + lines(event("b")))
    first, last = loader.refuse(name).splitlines()
    assert first.startswith(f"{name}:3: ")
    assert reason in first
    assert last == "Error: bad records: 1, more than --max-bad-records 0; nothing was loaded"
    assert not loader.db.exists()

    done = loader.run("--max-bad-records", 1, "--rejects", "rejects", "--format", "json", name)
    assert (done.returncode, done.stderr.decode()) == (0, first + "\n")
    assert json.loads(done.stdout)["bad_records"] == 1
    assert loader.table() == {"2019-12-30": 2}
    assert (loader.directory / "rejects").read_bytes() == record + b"\n"


NOT_BAD = {
    "another event that is broken inside": b'{"event_name":"x",}',
    "an escape that spells no letter of the name": b'{"a":"\\u003c",}',
}


@pytest.mark.parametrize("record", NOT_BAD.values(), ids=NOT_BAD)
def test_validate_decodes_every_line(loader: Loader, record: bytes) -> None:
    name = loader.file(GOOD + record)
    assert loader.load(name)["bad_records"] == 0
    assert loader.refuse("--validate", name).startswith(f"{name}:2: JSON is malformed")
    assert loader.load("--validate", SAMPLE)["engagement_events"] == 75


def test_pretty_printed_json_is_explained(loader: Loader) -> None:
    name = loader.file(json.dumps(event(), indent=2).encode())
    assert "one event a line is expected" in loader.refuse(name).splitlines()[0]


def test_the_first_twenty_bad_records_and_how_many_more(loader: Loader) -> None:
    a, b = loader.file(b"x\n" * 15, "a"), loader.file(gzip.compress(b"\n{}\n" + b"y\n" * 15), "b")
    messages = loader.refuse(a, b, "--rejects", "rejects").splitlines()
    assert [line.split(": ")[0] for line in messages[:20]] == [f"a:{n}" for n in range(1, 16)] + [
        f"b:{n}" for n in range(3, 8)
    ]
    assert messages[20:] == [
        "and 10 more bad records",
        "Error: bad records: 30, more than --max-bad-records 0; nothing was loaded",
    ]
    assert (loader.directory / "rejects").read_bytes() == b"x\n" * 15 + b"y\n" * 15


def test_repaired_rejects_complete_the_counts(loader: Loader) -> None:
    rows = SAMPLE.read_bytes().splitlines(keepends=True)
    broken = b"".join(row.replace(b"{", b"(", 1) if number % 3 == 0 else row for number, row in enumerate(rows))
    loader.run("--max-bad-records", 1000, "--rejects", "rejects", loader.file(broken))
    lost, repaired = loader.table(), (loader.directory / "rejects").read_bytes().replace(b"(", b"{")
    loader.load(loader.file(repaired, "repaired"))
    assert lost != loader.table() == SAMPLE_TABLE


def test_rejects_are_written_anew(loader: Loader) -> None:
    loader.file(b"old", "rejects")
    loader.load("--rejects", "rejects", SAMPLE)
    assert (loader.directory / "rejects").read_bytes() == b""


def test_control_characters_are_escaped(loader: Loader) -> None:
    name = loader.file(lines(event(time="\x1b[31m\x07\u202e")), "evil\x1b]0;\n.jsons")
    message = loader.refuse(name)
    assert message.startswith("evil\\x1b]0;\\n.jsons:1: event_timestamp is no integer")
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
    assert done.stderr.startswith(b"\\udcff.jsons:2: ")
    assert loader.query("SELECT sources FROM load_log") == [('["\\\\xff.jsons"]',)]


# -- Input that cannot be read

UNREADABLE = {
    "missing": (None, "No such file or directory"),
    "gzip cut off": (gzip.compress(SAMPLE.read_bytes())[:-100], "damaged or cut off"),
    "gzip without its end": (gzip.compress(GOOD)[:-4], "damaged or cut off"),
    "gzip with a wrong checksum": (gzip.compress(GOOD)[:-8] + b"12345678", "damaged or cut off"),
    "gzip damaged in the middle": (
        gzip.compress(SAMPLE.read_bytes())[:50_000] + b"\xff" * 100 + gzip.compress(SAMPLE.read_bytes())[50_100:],
        "damaged or cut off",
    ),
    "gzip and then something else": (gzip.compress(GOOD) + b"hello", "damaged or cut off"),
    "the second member cut off": (gzip.compress(GOOD) + gzip.compress(GOOD)[:20], "damaged or cut off"),
    "zstd and then something else": (zstd.compress(GOOD) + b"hello", "damaged or cut off"),
    "zstd cut off": (zstd.compress(SAMPLE.read_bytes())[:-100], "damaged or cut off"),
}


@pytest.mark.parametrize(("content", "reason"), UNREADABLE.values(), ids=UNREADABLE)
def test_input_that_cannot_be_read(loader: Loader, content: bytes | None, reason: str) -> None:
    loader.load("-", input=lines(event("before")))
    if content is not None:
        loader.file(content, "x")
    good = loader.file(GOOD, "good")
    assert reason in loader.refuse(good, "x", good)
    if content is not None:
        assert reason in loader.refuse("-", input=content)


def test_a_directory(loader: Loader) -> None:
    assert "is a directory" in loader.refuse(loader.directory)


# -- The database


def test_schema_sql_by_hand_makes_the_database(loader: Loader) -> None:
    with closing(sqlite3.connect(loader.db)) as db:
        db.executescript((ROOT / "schema.sql").read_text())
    loader.load(SAMPLE)
    assert loader.table() == SAMPLE_TABLE
    columns = loader.query("SELECT name, type, \"notnull\", pk FROM pragma_table_info('active_user_table')")
    assert columns == [("date", "DATE", 1, 1), ("active_user_count", "INTEGER", 1, 0)]
    assert loader.query("SELECT DISTINCT length(date), typeof(date) FROM active_user_table") == [(10, "text")]


def test_a_database_keeps_one_rule(loader: Loader) -> None:
    loader.load(SAMPLE)
    for args in (
        ["--timezone", "UTC"],
        ["--min-engagement-msec", 1],
        ["--valuable-event", "*"],
        ["--dry-run", "--timezone", "UTC"],
    ):
        message = loader.refuse(*args, SAMPLE)
        assert "--timezone US/Central --min-engagement-msec 3000 --valuable-event '*_event'" in message
        assert " ".join(map(str, args[-2:])).replace("*", "'*'") in message
    loader.load("--valuable-event", "*_event", "--valuable-event", "*_event", SAMPLE)


FOREIGN = {
    "another program's": "CREATE TABLE notes (text)",
    "only a table to plot, of another shape": "CREATE TABLE active_user_table (date, users)",
    "only the table to plot": (ROOT / "schema.sql").read_text().split(";")[0],
    "an older one": (ROOT / "schema.sql").read_text().replace("    blank_lines INTEGER NOT NULL,\n", ""),
}


@pytest.mark.parametrize("script", FOREIGN.values(), ids=FOREIGN)
def test_a_database_that_is_not_ours(loader: Loader, script: str) -> None:
    with closing(sqlite3.connect(loader.db)) as db:
        db.executescript(script)
    for args in ([], ["--dry-run"]):
        assert "choose another --db" in loader.refuse(*args, SAMPLE)


def test_a_database_that_is_no_database(loader: Loader) -> None:
    loader.db.write_bytes(b"hello, world" * 100)
    done = loader.run(SAMPLE)
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr == b"Error: active_user_table.db: file is not a database; choose another --db\n"
    assert loader.db.read_bytes() == b"hello, world" * 100


def test_a_directory_that_is_missing(loader: Loader) -> None:
    assert f"there is no directory {loader.directory}/no" in loader.refuse("--db", "no/x.db", SAMPLE)


# -- Being stopped


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_load(loader: Loader, number: int, status: int) -> None:
    loader.load("-", input=lines(event("before")))
    before = loader.content()
    pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(loader.command("-"), cwd=loader.directory, **pipe) as process:
        process.stdin.write(SAMPLE.read_bytes())
        process.stdin.flush()
        time.sleep(1)
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (status, b"")
    assert err.decode() == f"{signal.Signals(number).name}: a load that is not committed leaves nothing behind\n"
    assert loader.content() == before


def test_a_reader_that_had_enough(loader: Loader) -> None:
    read, write = os.pipe()
    os.close(read)
    with open(write, "wb") as closed:
        done = subprocess.run(
            loader.command(SAMPLE),
            cwd=loader.directory,
            stdout=closed,
            stderr=-1,
            env={**os.environ, "PYTHONUNBUFFERED": ""},
        )
    assert (done.returncode, done.stderr) == (0, b"")
    assert loader.table() == SAMPLE_TABLE


# -- The README


def test_the_help_in_the_readme(loader: Loader) -> None:
    done = loader.run("--help", env={"COLUMNS": "100"})
    assert done.stdout.decode() in (ROOT / "README.md").read_text()


def test_the_queries_in_the_readme(loader: Loader) -> None:
    loader.load(SAMPLE)
    queries = (ROOT / "README.md").read_text().split("```sql\n")[1:]
    assert len(queries) >= 4
    for query in queries:
        assert loader.query(query.split("```")[0])


def test_requirements_are_those_of_the_script() -> None:
    script = (ROOT / "load_active_users.py").read_text().split("# dependencies = [\n")[1].split("# ]")[0]
    wanted = [line.strip('# ",\n').replace("'", '"') for line in script.splitlines()]
    assert wanted == (ROOT / "requirements.txt").read_text().split("# The loader\n")[1].split("\n\n")[0].split("\n")


def test_the_plain_reading_of_the_sample() -> None:
    users, tally, bad = plain.read(SAMPLE.read_bytes())
    assert ({date: len(ids) for date, ids in sorted(users.items())}, bad) == (SAMPLE_TABLE, {})
    assert tally == {"lines": 1000, "engagement_events": 75, "active_events": 64, "anonymous_events": 0}
