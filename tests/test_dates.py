"""The dates of events: time zones, daylight saving, --dates, wrong clocks."""

import subprocess
from datetime import UTC, date, datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any, Self

import oracle
import pytest
from helpers import (
    AS_ROOT,
    HOUR,
    NOON,
    SAMPLE,
    SAMPLE_TABLE,
    Loader,
    date_count,
    event,
    lines,
    noon,
    scan,
    today,
    usec,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import load_active_users

CENTRAL, INDIA, SYDNEY = "US/Central", "Asia/Kolkata", "Australia/Sydney"
LORD_HOWE = "Australia/Lord_Howe"
FORWARD, BACK = usec("2020-03-08T00:00"), usec("2020-11-01T00:00")
LAST_USEC = 253402300800 * 10**6 - 1
LOCAL_DATES = {
    "first microsecond": (CENTRAL, usec("2019-12-30T00:00"), "2019-12-30"),
    "last microsecond": (CENTRAL, usec("2019-12-30T00:00") - 1, "2019-12-29"),
    "UTC is a date ahead": (CENTRAL, usec("2019-12-30T19:00"), "2019-12-30"),
    "midnight in summer": (CENTRAL, usec("2020-07-01T00:00"), "2020-07-01"),
    "before midnight in summer": (CENTRAL, usec("2020-07-01T00:00") - 1, "2020-06-30"),
    "the clocks go forward": (CENTRAL, FORWARD, "2020-03-08"),
    "its last microsecond": (CENTRAL, usec("2020-03-09T00:00") - 1, "2020-03-08"),
    "after its 23 hours": (CENTRAL, FORWARD + 23 * HOUR, "2020-03-09"),
    "the clocks go back": (CENTRAL, BACK, "2020-11-01"),
    "the last of its 25 hours": (CENTRAL, BACK + 25 * HOUR - 1, "2020-11-01"),
    "after its 25 hours": (CENTRAL, BACK + 25 * HOUR, "2020-11-02"),
    "half hours": (INDIA, usec("2020-01-01T00:00", INDIA) - 1, "2019-12-31"),
    "half hours, midnight": (INDIA, usec("2020-01-01T00:00", INDIA), "2020-01-01"),
    "before 1970": (CENTRAL, -1, "1969-12-31"),
    "after 2037, in summer": (CENTRAL, usec("2050-07-01T00:00") - 1, "2050-06-30"),
    "after 2037, midnight": (CENTRAL, usec("2050-07-01T00:00"), "2050-07-01"),
    "after 2037, in winter": (CENTRAL, usec("2051-01-01T00:00") - 1, "2050-12-31"),
    "2038 in the south": (SYDNEY, usec("2038-01-01T00:00", SYDNEY), "2038-01-01"),
    "1900": (LORD_HOWE, -2195028000000001, "1900-06-11"),
    "the end of the calendar": ("UTC", LAST_USEC, "9999-12-31"),
    "the start of the calendar": ("UTC", -62135596800 * 10**6, "0001-01-01"),
}


@pytest.mark.parametrize(
    ("zone", "timestamp", "day"), LOCAL_DATES.values(), ids=LOCAL_DATES
)
def test_the_date_is_local_to_the_time_zone(
    loader: Loader, zone: str, timestamp: int, day: str
) -> None:
    """The version of python-dateutil does not matter."""
    data = lines(event(time=timestamp, event_date="20010101"))
    dates = ["--dates", "0001-01-01..9999-12-31"]
    report = loader.load("--timezone", zone, *dates, loader.file(data))
    assert report["dates"] == [date_count(day, 1, 1)]


@pytest.mark.parametrize(
    ("timestamp", "day"), [(-1, "1969-12-31"), (4 * 10**15, "2096-10-02")]
)
def test_dates_where_the_machine_has_no_time_zones(
    loader: Loader, timestamp: int, day: str
) -> None:
    """Some Linux distributions keep US/Central in a package of its own."""
    options = ["--format", "csv", "--dates", "0001-01-01..9999-12-31"]
    name = loader.file(lines(event(time=timestamp)))
    done = loader.run(*options, name, env={"PYTHONTZPATH": ""}, process=True)
    report = f"date,active_user_count,added,removed\n{day},1,1,0\n"
    assert (done.returncode, done.stdout.decode(), done.stderr) == (0, report, b"")


DAY_END = 1577858399_000000  # 2019-12-31 23:59:59 in US/Central, in microseconds UTC


@AS_ROOT
@pytest.mark.skipif(
    not Path("/usr/share/zoneinfo/tzdata.zi").exists(),
    reason="needs apt-get install tzdata",
)
def test_time_zone_files_in_the_slim_format(loader: Loader) -> None:
    """Some systems have them. The rule of the database still names the same zone."""
    zones = Path("/usr/share/zoneinfo")
    slim = loader.directory / "slim"
    subprocess.run(["zic", "-b", "slim", "-d", slim, zones / "tzdata.zi"], check=True)
    script = f'mount --bind {slim} {zones} && exec "$@"'
    before = ["unshare", "--mount", "sh", "-c", script, "sh"]
    command = [*before, *loader.command("-q", "-")]
    subprocess.run(
        command, cwd=loader.directory, input=lines(event(time=DAY_END)), check=True
    )
    assert loader.table() == {"2019-12-31": 1}
    other = subprocess.run(
        [*before, *loader.command("--timezone", "Asia/Kathmandu", "-q", "-")],
        cwd=loader.directory,
        capture_output=True,
    )
    assert other.returncode == 1
    assert b"--timezone Asia/Kathmandu" in other.stderr


ZONES = ["US/Central", "Asia/Kolkata", "America/St_Johns", "Australia/Lord_Howe", "UTC"]
any_times = st.integers(-62135596800 * 10**6 - 10**11, 253402300800 * 10**6 + 10**11)
any_times |= st.integers(NOON - 10**12, NOON + 10**12)
any_times |= st.integers(2_100_000_000_000_000, 2_200_000_000_000_000)  # about 2038


@pytest.mark.parametrize("zone", ZONES)
@settings(max_examples=150)
@given(st.lists(any_times | any_times.map(str), max_size=12))
def test_any_time_in_any_zone(
    tmp_path_factory: pytest.TempPathFactory, zone: str, some: list[Any]
) -> None:
    rule = oracle.Rule(zone)
    dates = ("0001-01-01", "9999-12-31")
    data = lines(*(event(str(number), time) for number, time in enumerate(some)))
    path = tmp_path_factory.getbasetemp() / "times.jsons"
    path.write_bytes(data)
    assert scan(path, [], 10**5, rule, dates) == oracle.read(data, rule, dates)


CLOCK_CHANGES = {  # about which instants, in seconds
    "US/Central": [
        *(1583654400, 1604210400),  # 2020-03-08 and 2020-11-01, 08:00 and 06:00 UTC
        *(2151648000, 2172204000),  # 2038-03-14 and 2038-11-07
    ],
    "America/St_Johns": [1194146400],  # 2007-11-04 00:01 back to 23:01
    "America/Havana": [1583643600, 1604206800],  # at midnight
    "Australia/Lord_Howe": [1586012400],  # half an hour
    "Pacific/Apia": [1325239200],  # 2011-12-30 did not take place
    "UTC": [2145916800, 2147483648],  # 2038, and where 31 bits end
}


@pytest.mark.parametrize("zone", CLOCK_CHANGES)
def test_every_minute_around_clock_changes(tmp_path: Path, zone: str) -> None:
    """Where a change is at midnight, or a minute after it, a date comes twice."""
    rule = oracle.Rule(zone)
    seconds = [
        second
        for instant in CLOCK_CHANGES[zone]
        for second in range(instant - 86_400, instant + 86_400, 60)
    ]
    data = lines(
        *(event(f"at {second}", second * 10**6) for second in seconds),
        *(event(f"before {second}", str(second * 10**6 - 1)) for second in seconds),
    )
    path = tmp_path / "minutes.jsons"
    path.write_bytes(data)
    assert scan(path, [], 10**5, rule) == oracle.read(data, rule)


# -- --dates

DAYS = ["1999-12-31", "2000-01-01"]
DAYS += ["2019-12-29", "2019-12-30", "2019-12-31", "2099-06-12"]
DATE_RANGES = {
    "both ends count": (["--dates", "2019-12-29..2019-12-30"], DAYS[2:4]),
    "a single date": (["--dates", "2019-12-30"], DAYS[3:4]),
    "one date from and to": (["--dates", "2019-12-30..2019-12-30"], DAYS[3:4]),
    "without a first": (["--dates", "..2019-12-30"], DAYS[1:4]),
    "without a last": (["--dates", "2019-12-30.."], DAYS[3:5]),
    "without both": (["--dates", ".."], DAYS[1:5]),
    "by default": ([], DAYS[1:5]),
    "before 2000, when it is told": (["--dates", "1990-01-01..2000-01-01"], DAYS[:2]),
    "after tomorrow, when it is told": (
        ["--dates", "2019-12-31..9999-12-31"],
        DAYS[4:],
    ),
    "none that is there": (["--dates", "2010-01-01..2010-12-31"], []),
}


@pytest.mark.parametrize(("args", "counted"), DATE_RANGES.values(), ids=DATE_RANGES)
def test_only_events_on_the_dates_count(
    loader: Loader, args: list[str], counted: list[str]
) -> None:
    data = lines(*(event("a", noon(day)) for day in DAYS))
    report = loader.load(*args, loader.file(data))
    assert report["dates"] == [date_count(day, 1, 1) for day in counted]
    others = len(DAYS) - len(counted)
    assert (report["active_events"], report["out_of_range_events"]) == (6, others)
    assert loader.table() == dict.fromkeys(counted, 1)
    logged = loader.last_log("out_of_range_events", "added")
    assert logged == (others, len(counted))


def test_by_default_dates_count_until_tomorrow(loader: Loader) -> None:
    while True:
        day = today()
        some = [(day + timedelta(n)).isoformat() for n in (0, 1, 2)]
        data = lines(*(event(time=noon(each)) for each in some))
        report = loader.load("--dry-run", loader.file(data))
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
    assert loader.last_log("dates") == (f"2000-01-01..{day + timedelta(1)}",)
    for dates, kept in (
        ("2019-12-30", "2019-12-30..2019-12-30"),
        ("..2019-12-30", "2000-01-01..2019-12-30"),
    ):
        loader.load("--dates", dates, SAMPLE)
        assert loader.last_log("dates") == (kept,)


def test_out_of_range_events_in_the_table_report(loader: Loader) -> None:
    data = lines(
        event("a"), event(None, noon("2099-06-12")), event("b", noon("2099-06-12"))
    )
    done = loader.run(loader.file(data), env={"COLUMNS": "110"})
    assert done.stdout.decode().splitlines()[-1] == (
        "3 lines → 3 engagement events → 3 active → 1 user-day (1 new); "
        "1 anonymous event; 2 out of range events"
    )
    assert loader.table() == {"2019-12-30": 1}


# -- Wrong clocks

TOO_EARLY = (
    "Error: all active events ({}) are dated before 2000: event_timestamp must be in "
    "microseconds UTC (to load such dates, give --dates)\n"
)
TOO_LATE = (
    "Warning: all active events are dated after tomorrow; "
    "is this machine's clock right?\n"
)


def test_milliseconds_are_refused(loader: Loader) -> None:
    data = lines(event("a", NOON // 1000), event("b", str(NOON // 1000)), event(msec=1))
    assert loader.refuse(loader.file(data)) == TOO_EARLY.format(2)
    assert loader.refuse("--dry-run", loader.file(data)) == TOO_EARLY.format(2)
    seconds = loader.file(lines(event(None, NOON // 10**6)))
    assert loader.refuse(seconds) == TOO_EARLY.format(1)
    assert not loader.db.exists()


def test_a_few_wrong_clocks_are_not_refused(loader: Loader) -> None:
    report = loader.load(loader.file(lines(event("a", 0), event("b"))))
    expected = [date_count("2019-12-30", 1, 1)]
    assert (report["dates"], report["out_of_range_events"]) == (expected, 1)
    late = loader.file(lines(event("a", noon("2099-06-12"))))
    report = loader.load(late, warning=TOO_LATE)
    assert (report["dates"], report["out_of_range_events"]) == ([], 1)
    loader.load("--dates", "..2099-12-31", late)
    milliseconds = loader.file(lines(event("a", NOON // 1000)))
    report = loader.load("--dates", "1970-01-01..", milliseconds)
    assert report["dates"] == [date_count("1970-01-19", 1, 1)]


# -- --replace beyond the usual dates


def days_from(day: date, *numbers: int) -> list[str]:
    return [str(day + timedelta(number)) for number in numbers]


def test_replace_around_2000(loader: Loader) -> None:
    """Usual dates outside of --dates are merged into; earlier ones do not count."""
    some = ["1999-12-29", "1999-12-30", "2000-01-02", "2000-01-03", "2019-12-30"]
    old = loader.file(lines(*(event("old", noon(day)) for day in some)))
    loader.load("--dates", "1999-01-01..", old)
    far = days_from(today(), 30)
    new = lines(*(event("new", noon(day)) for day in [*some, *far]))
    dates = ["--dates", "1999-12-30..2000-01-02"]
    report = loader.load("--replace", *dates, loader.file(new))
    assert report["dates"] == [
        date_count("1999-12-30", 1, 1, 1),
        date_count("1999-12-31", 0, 0),
        date_count("2000-01-01", 0, 0),
        date_count("2000-01-02", 1, 1, 1),
        date_count("2000-01-03", 2, 1),
        date_count("2019-12-30", 2, 1),
    ]
    assert (report["active_events"], report["out_of_range_events"]) == (6, 2)
    assert loader.users("1999-12-29") == ["old"]


def test_replace_around_tomorrow(loader: Loader) -> None:
    """Usual dates outside of --dates are merged into; later ones do not count."""
    day = today()
    usual, first, last, later = days_from(day, -9, -1, 5, 6)
    some = ["1999-12-31", "2000-01-01", usual, first, last, later]
    old = loader.file(lines(*(event("old", noon(each)) for each in some)))
    loader.load("--dates", f"1999-01-01..{later}", old)
    new = loader.file(lines(*(event("new", noon(each)) for each in some)))
    report = loader.load("--replace", "--dates", f"{first}..{last}", new)
    assert report["dates"] == [
        date_count("2000-01-01", 2, 1),
        date_count(usual, 2, 1),
        date_count(first, 1, 1, 1),
        *(date_count(each, 0, 0) for each in days_from(day, 0, 1, 2, 3, 4)),
        date_count(last, 1, 1, 1),
    ]
    assert (report["active_events"], report["out_of_range_events"]) == (6, 2)
    assert loader.users("1999-12-31") == loader.users(later) == ["old"]


# -- Tomorrow at both ends of the world


def test_tomorrow_is_that_of_the_zone(loader: Loader) -> None:
    """At any moment, the date of one of these zones is not that of UTC."""
    for zone in ("Pacific/Kiritimati", "Etc/GMT+12"):
        while True:
            day = today(zone)
            some = days_from(day, 0, 1, 2)
            events = [event(time=usec(f"{each}T12:00", zone)) for each in some]
            name = loader.file(lines(*events))
            report = loader.load("--dry-run", "--timezone", zone, name)
            if today(zone) == day:  # else midnight came meanwhile
                break
        assert [each["date"] for each in report["dates"]] == some[:2]
        assert report["out_of_range_events"] == 1


# -- Some early events

SOME_EARLY = {
    "before one of a usual date": ([event("a", 0), event("a")], 1, 1),
    "after one of a usual date": ([event("a"), event("a", 0)], 1, 1),
    "of nobody": ([event(None, 0), event("a")], 1, 1),
    "beside one of nobody": ([event("a", 0), event(None)], 0, 1),
    "beside one after tomorrow": (
        [event("a", 0), event("a", noon("2099-06-12"))],
        0,
        2,
    ),
}


@pytest.mark.parametrize(
    ("events", "added", "number"), SOME_EARLY.values(), ids=SOME_EARLY
)
def test_some_early_events_are_not_refused(
    loader: Loader, events: list[Any], added: int, number: int
) -> None:
    """Not all of them have the wrong unit. There is no warning either."""
    report = loader.load(loader.file(lines(*events)))
    counted = [date_count("2019-12-30", 1, 1)] * added
    assert (report["dates"], report["out_of_range_events"]) == (counted, number)


def test_a_file_of_early_events_beside_a_usual_file(loader: Loader) -> None:
    """All files of a load are judged together."""
    early = loader.file(lines(event("a", 0), event("b", 1)), "early.jsons")
    report = loader.load(early, loader.file(lines(event("c"))))
    assert report["dates"] == [date_count("2019-12-30", 1, 1)]
    assert report["out_of_range_events"] == 2
    assert loader.refuse(early) == TOO_EARLY.format(2)


# -- The clock of this machine


def set_clock(patch: pytest.MonkeyPatch, moment: datetime) -> None:
    """Set the clock by which the loader tells which dates are past."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Self:
            return cls.fromtimestamp(moment.timestamp(), tz)

    patch.setattr(load_active_users, "datetime", Clock)


@pytest.mark.parametrize("options", [[], ["--dates", "2019-12-30"]], ids=str)
def test_a_clock_before_2000(
    loader: Loader, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    """A machine without a battery begins in 1970. The load is refused."""
    for moment, day in (
        (datetime(1970, 1, 1, 12, tzinfo=UTC), "1970-01-01"),
        (datetime(1999, 12, 31, 4, tzinfo=UTC), "1999-12-30"),
    ):
        set_clock(monkeypatch, moment)
        said = loader.refuse(*options, SAMPLE)
        assert said.startswith(f"Error: the clock of this machine says {day}, "), said
        assert not loader.db.exists()
    set_clock(monkeypatch, datetime(2020, 1, 1, tzinfo=UTC))
    loader.load(*options, SAMPLE)


def test_a_clock_that_is_a_month_behind(
    loader: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All events lie after tomorrow: they are tallied, and a warning says so."""
    set_clock(monkeypatch, datetime(2019, 11, 30, tzinfo=UTC))
    why = "after tomorrow; is this machine's clock right?"
    warning = f"Warning: all active events are dated {why}\n"
    report = loader.load(SAMPLE, warning=warning)
    tallies = report["active_events"], report["out_of_range_events"]
    assert (report["dates"], tallies) == ([], (64, 64))
    assert loader.table() == {}
    assert loader.last_log("active_events", "out_of_range_events") == (64, 64)


def test_a_clock_that_is_a_day_behind(
    loader: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Events of tomorrow count, and those after it are tallied, without a warning."""
    set_clock(monkeypatch, datetime(2019, 12, 29, 18, tzinfo=UTC))
    assert loader.load(SAMPLE)["out_of_range_events"] == SAMPLE_TABLE["2019-12-31"]
    expected = {day: SAMPLE_TABLE[day] for day in ("2019-12-29", "2019-12-30")}
    assert loader.table() == expected


def test_events_of_tomorrow_that_are_not_wanted_are_no_wrong_clock(
    loader: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are out of range, as --dates says, without a warning."""
    set_clock(monkeypatch, datetime(2019, 12, 30, 18, tzinfo=UTC))
    name = loader.file(lines(event("a", noon("2019-12-31"))))
    report = loader.load("--dates", "..2019-12-30", name)
    assert (report["dates"], report["out_of_range_events"]) == ([], 1)
