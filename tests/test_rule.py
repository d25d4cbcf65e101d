"""What counts as active: events, users, names, thresholds; one rule per database."""

import json
import shlex
from typing import Any

import oracle
import pytest
from helpers import (
    HOUR,
    NOON,
    OTHER_OPTIONS,
    SAMPLE,
    SAMPLE_TABLE,
    Loader,
    date_count,
    event,
    lines,
    other_rule,
    params,
)
from records import ACTIVE, INACTIVE, NO_ENGAGEMENT


def test_the_report_of_the_sample(loader: Loader) -> None:
    assert loader.load(SAMPLE) == {
        "dates": [date_count(day, count, count) for day, count in SAMPLE_TABLE.items()],
        "lines": 1000,
        "engagement_events": 75,
        "active_events": 64,
        "anonymous_events": 0,
        "out_of_range_events": 0,
        "bad_records": 0,
        "left_out": 0,
        "skipped_files": 0,
    }
    assert loader.table() == SAMPLE_TABLE


def test_the_oracle_reads_the_sample() -> None:
    users, tally, bad = oracle.read(SAMPLE.read_bytes())
    counts = {day: len(some) for day, some in sorted(users.items())}
    assert (counts, bad) == (SAMPLE_TABLE, {})
    assert tally == {"lines": 1000, "engagement_events": 75, "active_events": 64}


# -- Records

NO_EVENT = (
    "Warning: none of the lines ({}) is an engagement event ({}); "
    "is this BigQuery's export of Google Analytics, one event per line?\n"
)


@pytest.mark.parametrize(
    ("records", "expected"),
    [(ACTIVE, (1, 1)), (INACTIVE, (1, 0)), (NO_ENGAGEMENT, (0, 0))],
    ids=["active", "inactive", "no engagement"],
)
def test_what_counts(
    loader: Loader, records: dict[str, Any], expected: tuple[int, int]
) -> None:
    for case, record in records.items():
        warning = "" if expected[0] else NO_EVENT.format(1, "user_engagement")
        report = loader.load("--dry-run", loader.file(lines(record)), warning=warning)
        assert (report["engagement_events"], report["active_events"]) == expected, case
        assert report["dates"] == [date_count("2019-12-30", 1, 1)] * expected[1], case


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
    """Neither the user_id nor the session counts."""
    data = lines(
        event("a", user_id="1"),
        event("a", user_id="2"),
        event("b", user_id="1"),
        event("B"),
        event("b "),
    )
    loader.load(loader.file(data))
    assert loader.users() == ["B", "a", "b", "b "]


def test_users_are_told_apart_by_every_character(loader: Loader) -> None:
    ids = ["a", "é", "e\u0301", "\\u0000", '"', "'", "\n", "😀", "1", "01", "1.0"]
    ids += ["x" * 512, "é" * 256]
    report = loader.load(loader.file(lines(*map(event, ids))))
    assert report["dates"] == [date_count("2019-12-30", len(ids), len(ids))]
    assert loader.users() == sorted(ids)
    assert loader.load("events.jsons")["dates"] == [
        date_count("2019-12-30", len(ids), 0)
    ]


def test_events_without_a_user_are_tallied_as_anonymous(loader: Loader) -> None:
    absent = event()
    del absent["user_pseudo_id"]
    data = lines(event(None), event(""), absent, event("a"), event(None, msec=1))
    report = loader.load(loader.file(data))
    assert (report["active_events"], report["anonymous_events"]) == (4, 3)
    assert loader.table() == {"2019-12-30": 1}


def test_min_engagement_msec_and_valuable_event(loader: Loader) -> None:
    data = lines(
        event("a", msec=5),
        event("b", msec=4),
        event("c", msec=9, key="buy"),
        event("d", msec=9, key="[x]"),
    )
    globs = ["--valuable-event", "b?y", "--valuable-event", "[[]x]"]
    report = loader.load("--min-engagement-msec", 5, *globs, loader.file(data))
    assert report["active_events"] == 2
    assert loader.users() == ["c", "d"]


# -- Event names

PAGE = event("p", event_name="page_view")
SCROLL = event("s", event_name="scroll")
OLD_EVENT = event(
    "o", event_name="first_open", event_params=params(("x_event", {"int_value": 1}))
)
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
    report = loader.load(*args, loader.file(ALL_NAMES))
    found = (report["engagement_events"], report["active_events"])
    assert (found, loader.users()) == ((engagement_events, len(active)), active)
    kept = json.dumps(sorted(set(names or ["user_engagement"])), separators=(",", ":"))
    assert loader.last_log("event_names") == (kept,)


@pytest.mark.parametrize("name", ["first_open", "first-öpen"])
def test_an_event_without_the_time_is_not_active_even_if_the_minimum_is_0(
    loader: Loader, name: str
) -> None:
    without = OLD_EVENT | {"event_name": name}
    args = ["--event-name", name, "--min-engagement-msec", 0]
    data = lines(without, event("z", msec=0, event_name=name))
    report = loader.load(*args, loader.file(data))
    assert (report["engagement_events"], report["active_events"]) == (2, 1)
    assert loader.users() == ["z"]


def test_googles_own_definition_of_an_active_user(loader: Loader) -> None:
    no_other = event(
        "g", event_params=params(("engagement_time_msec", {"int_value": 1}))
    )
    none = event("z", event_params=params(("engagement_time_msec", {"int_value": 0})))
    args = ["--event-name", "*", "--min-engagement-msec", 1, "--valuable-event", "*"]
    loader.load(*args, loader.file(ALL_NAMES + lines(no_other, none)))
    assert loader.users() == ["e", "g", "m", "n", "p", "s"]


def test_an_escaped_engagement_time_is_found_in_any_event(loader: Loader) -> None:
    data = lines(PAGE).replace(
        b"engagement_time_msec", b"engagement\\u005ftime\\u005Fm\\u0073ec"
    )
    loader.load("--event-name", "*", loader.file(data))
    assert loader.users() == ["p"]


NOTHING_TO_COUNT = {
    "no time, and the rest is wrong": (
        OLD_EVENT | {"event_timestamp": None, "user_pseudo_id": 5}
    ),
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
    report = loader.load(*args, loader.file(data))
    assert (report["engagement_events"], report["bad_records"]) == (1, 0)


OTHER_EXPORTS = {
    "of Airbyte": {"_airbyte_data": event(), "_airbyte_emitted_at": 1},
    "of Singer": {"type": "RECORD", "stream": "events", "record": event()},
    "names in capitals": {key.upper(): value for key, value in event().items()},
    "of Avro's JSON": {**event(), "event_name": {"string": "user_engagement"}},
    "other events": event(event_name="page_view"),
}


@pytest.mark.parametrize("record", OTHER_EXPORTS.values(), ids=OTHER_EXPORTS)
def test_a_load_without_an_engagement_event_warns(
    loader: Loader, record: dict[str, Any]
) -> None:
    warning = NO_EVENT.format(2, "user_engagement")
    report = loader.load(loader.file(lines(record, record)), warning=warning)
    assert (report["lines"], report["engagement_events"], report["dates"]) == (2, 0, [])
    assert loader.query("SELECT lines FROM load_log") == [(2,)]
    done = loader.run("-q", loader.file(lines(record)))
    assert done.stderr.decode() == NO_EVENT.format(1, "user_engagement")
    report = loader.load(loader.file(lines(record, event(msec=1))))
    assert (report["lines"], report["engagement_events"]) == (2, 1)


def test_the_warning_names_all_event_names(loader: Loader) -> None:
    warning = NO_EVENT.format(1, "page_view, scroll")
    args = ["--event-name", "scroll", "--event-name", "page_view"]
    loader.load(*args, loader.file(lines(event())), warning=warning)


# -- One rule per database

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

    def as_options(rule: dict[str, list[str]]) -> str:
        return " ".join(
            f"{name} {shlex.quote(v)}" for name, some in rule.items() for v in some
        )

    what = other_rule(as_options(rule | other), as_options(rule))
    assert loader.refuse(*args, SAMPLE) == f"Error: active_user_table.db: {what}\n"


def test_the_order_of_names_and_globs_does_not_matter(loader: Loader) -> None:
    names = ["--event-name", "a", "--event-name", "b"]
    globs = ["--valuable-event", "x", "--valuable-event", "*_event"]
    loader.load(*names, *globs, loader.file(lines(event(event_name="b"))))
    names[1::2] = "ba"
    loader.load(
        *names, *globs[2:], *globs, loader.file(lines(event("v", event_name="a")))
    )
    assert loader.table() == {"2019-12-30": 2}


@pytest.mark.parametrize(
    "zones",
    [
        ("US/Central", "America/Chicago"),
        ("UTC", "Etc/UTC"),
        ("Asia/Calcutta", "Asia/Kolkata"),
    ],
)
def test_two_names_of_one_zone_are_one_zone(
    loader: Loader, zones: tuple[str, str]
) -> None:
    for zone in (*zones, zones[0]):
        loader.load("--timezone", zone, loader.file(lines(event(zone))))
    assert loader.table() == {"2019-12-30": 2}
    counted = loader.query(
        "SELECT timezone, count(*) FROM load_log GROUP BY 1 ORDER BY 2"
    )
    assert counted == [(zones[1], 1), (zones[0], 2)]


# -- Several engagement times in one event

SHORT_TIMES = {
    "two whose sum is long enough": [2000, 2000],
    "many whose sum is long enough": [2999] * 50,
    "with one that is negative": [2999, -1, "2999"],
    "as texts": ["2000", "2000"],
    "of which one is null": [None, 2000, 2000],
}


@pytest.mark.parametrize("times", SHORT_TIMES.values(), ids=SHORT_TIMES)
@pytest.mark.parametrize("others", [0, 20])
def test_engagement_times_are_not_added_up(
    loader: Loader, times: list[Any], others: int
) -> None:
    """Also beside many usual events."""
    pairs = [("engagement_time_msec", {"int_value": value}) for value in times]
    short = event("short", event_params=params(*pairs, ("x_event", {"int_value": 1})))
    usual = [event(f"u{number}") for number in range(others)]
    report = loader.load(loader.file(lines(*usual, short, *usual)))
    counted = [date_count("2019-12-30", others, others)] if others else []
    assert report["dates"] == counted
    assert report["engagement_events"] == 2 * others + 1
    assert report["active_events"] == 2 * others


# -- Zones that are the same for a while

UNLIKE_ZONES = {
    "from 1991 to 2006": ("US/Central", "America/Indiana/Knox"),
    "until 2010": ("US/Central", "America/North_Dakota/Beulah"),
    "in summer": ("US/Central", "America/Regina"),
    "in winter": ("Australia/Brisbane", "Australia/Sydney"),
    "from 1996 to 2006": ("Asia/Kolkata", "Asia/Colombo"),
    "for some weeks of the year": ("Europe/Athens", "Africa/Cairo"),
    "since 2016": ("Europe/Moscow", "Europe/Volgograd"),
}


@pytest.mark.parametrize("zones", UNLIKE_ZONES.values(), ids=UNLIKE_ZONES)
def test_zones_that_differ_at_some_dates_are_two(
    loader: Loader, zones: tuple[str, str]
) -> None:
    """Neither may follow the other."""
    for number, (kept, tried) in enumerate((zones, zones[::-1])):
        loader.db = loader.directory / f"{number}.db"
        options = ["--db", loader.db.name]
        loader.load(*options, "--timezone", kept, SAMPLE)
        rules = [f"--timezone {zone} {OTHER_OPTIONS}" for zone in (tried, kept)]
        said = f"Error: {loader.db.name}: {other_rule(*rules)}\n"
        assert loader.refuse(*options, "--timezone", tried, SAMPLE) == said
