"""Count the daily active users in analytics events, and keep the counts in SQL.

The events are those of Google Analytics (Firebase), which BigQuery exports as
newline-delimited JSON. A load streams them, finds out who was active on which
date, and upserts the number of users per date into the table active_user_table:

    python load_active_users.py data/bq-results-sample-data.jsons
    sqlite3 active_user_table.db 'SELECT * FROM active_user_table'

The path of the data:

    EVENTS                files, pipes, URLs
      │ split_source()    into ranges of bytes
      ▼
    Range                 the unit of work
      │ Scanner           here, in worker processes, or on a cluster
      ▼
    Batch                 tallies, bad records, and users as sorted JSON
      │ Intake            takes the batches in input order
      ▼
    Staging               the users of a load by date, in bounded memory
      │ commit()          one transaction
      ▼
    SQLite, Postgres ───▶ report, plot

main(), at the end, turns a command line into one of two calls: load_batch() for
files that end, or load_live() for input that keeps arriving.
"""

from __future__ import annotations

import gc
import signal
import sys

IS_SCRIPT = __name__ == "__main__"
if IS_SCRIPT:
    # Pickle names a class or function by its module. In a worker, "__main__" is
    # another module; so this one takes its file's name.
    __name__ = "load_active_users"
    sys.modules[__name__] = sys.modules["__main__"]
    # Nothing has been read: Ctrl-C may end the program at once.
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    # Garbage collection would only slow the imports; the last lines enable it again.
    gc.disable()

import contextlib
import errno
import io
import itertools
import os
import re
import select
import sqlite3
import stat
import textwrap
import time
import warnings
from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterable, Iterator
from datetime import UTC, date, datetime, timedelta
from fnmatch import fnmatchcase
from functools import lru_cache, partial, reduce
from typing import Annotated, Any, NamedTuple, Self

import click
import msgspec
import stringzilla
from dateutil import tz
from msgspec import Meta, Struct
from msgspec.structs import asdict, astuple

__version__ = "1.2.0"


class LoadError(Exception):
    """The load is refused. The message says what is wrong, where, and what to do."""


class Unavailable(LoadError):
    """The database can't be used now; the same load may succeed later."""


class Unusable(Exception):
    """A file, URL or database can't be used. about() adds its name."""


# -- The event -------------------------------------------------------------------------
#
# A line of the BigQuery export holds one event. An event has many fields; these
# are the ones that the loader uses
# (https://support.google.com/analytics/answer/7029846):
#
#   {"event_timestamp": "1577836800000000",
#    "event_name": "user_engagement",
#    "event_params": [
#      {"key": "engaged_session_event", "value": {"int_value": "1"}},
#      {"key": "engagement_time_msec", "value": {"int_value": "5321"}}],
#    "user_pseudo_id": "0b13a7c0f0e4aa4b1cb7ac6c9a3e2a4d"}
#
# The classes describe an event as BigQuery writes it. msgspec decodes such
# events fast. An event that does not fit, or has an odd value, is decoded as a
# dictionary instead, and Matcher.evaluate() says what it means.

ENGAGEMENT_TIME = "engagement_time_msec"
MAX_USER_BYTES = 512
# Limits of the decoder. Longer texts do not fit into an Event, and evaluate()
# decides. A character has at most 4 bytes in UTF-8. Google's keys have up to 40
# characters.
MAX_USER_CHARACTERS = MAX_USER_BYTES // 4
MAX_KEY_CHARACTERS = 128
JSON_TYPES: dict[type, str] = {str: "a string", list: "a list", dict: "an object"}


class ParameterValue(Struct, gc=False):
    """The value of an event parameter. Only its integer matters."""

    int_value: int | str | None = None


class Parameter(Struct, gc=False):
    """An element of event_params."""

    key: Annotated[str, Meta(max_length=MAX_KEY_CHARACTERS)] | None = None
    value: ParameterValue | None = None


class Event(Struct, gc=False):
    """An event. Integers come as JSON strings or as JSON numbers."""

    event_name: str | None = None
    event_timestamp: int | str | None = None  # microseconds UTC
    event_params: list[Parameter] | None = None
    user_pseudo_id: Annotated[str, Meta(max_length=MAX_USER_CHARACTERS)] | None = None


EVENT_DECODER = msgspec.json.Decoder(Event)
OBJECT_DECODER = msgspec.json.Decoder(dict[str, msgspec.Raw])  # any JSON object
STRINGS_DECODER = msgspec.json.Decoder(list[str])


def encode_json(value: Any) -> str:
    """Return a value as compact JSON."""
    return msgspec.json.encode(value).decode()


def get_field(record: Any, name: str, kind: type, path: str = "") -> Any:
    """Return a field of a JSON object, or None if it is null or absent.

    The path is the position of the object, such as "event_params[2].", for
    messages; that of the event itself, which is always an object, is empty.
    Raises ValueError if the record is not an object or the field has another
    type.
    """
    if type(record) is not dict:
        raise ValueError(f"{path[:-1]} must be an object: {encode_json(record)[:60]}")
    value = record.get(name)
    if value is not None and type(value) is not kind:
        raise ValueError(
            f"{path}{name} must be {JSON_TYPES[kind]}: {encode_json(value)[:60]}"
        )
    return value


def parse_integer(value: Any, name: str) -> int:
    """Return the integer in a JSON number or string. Raises ValueError."""
    if type(value) is int:
        return value
    is_text = type(value) is str and value.isascii()
    if is_text and value.removeprefix("-").isdigit():
        with contextlib.suppress(ValueError):  # more than 4,300 digits
            return int(value)
    raise ValueError(f"{name} is not an integer: {encode_json(value)[:60]}")


# -- Dates -----------------------------------------------------------------------------

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
YEAR_2037 = 2_114_380_800_000_000  # microseconds UTC; see Matcher.find_date()
FIRST_DATE = "2000-01-01"  # earlier ones come from wrong clocks and wrong units


def find_time_zone(name: str) -> Any:
    """Return the dateutil time zone of an IANA name, such as US/Central.

    dateutil brings a copy of the time zones, for machines that have none. The
    standard library's zones are used where dateutil has no rules: for some
    files (below), and for some years (find_date()).

    dateutil opens other names too: paths, "localtime",
    "EST5EDT,M3.2.0,M11.1.0". What they mean can depend on the machine, so they
    are refused with a ValueError.
    """
    zone = None
    if re.fullmatch(r"[A-Z][\w+-]*(/[\w+-]+)*", name, re.ASCII):
        with contextlib.suppress(OSError, ValueError):
            zone = tz.gettz(name)
    if not isinstance(zone, tz.tzfile | tz.tzutc):
        raise ValueError(
            f"{name!r} is not an IANA time zone; "
            "names are like US/Central, Europe/Berlin, UTC"
        )
    # python-dateutil 2.9 finds no rules, and no name, in a file of zic's "slim" format.
    return zone if zone.tzname(EPOCH) else find_zone_info(name)


def find_zone_info(name: str) -> Any:
    """Return the standard library's time zone of an IANA name."""
    from zoneinfo import ZoneInfo

    return ZoneInfo(name)


def is_same_zone(name: str, other: str) -> bool:
    """Tell whether two zones have the same offset on each day from 1970 to 2037.

    US/Central and America/Chicago are two names of one zone.
    """
    one, two = find_time_zone(name), find_time_zone(other)
    moments = (EPOCH + timedelta(days=day) for day in range(24_800))
    return all(
        moment.astimezone(one).utcoffset() == moment.astimezone(two).utcoffset()
        for moment in moments
    )


def is_date(text: str) -> bool:
    """Tell whether a text is a date like 2020-01-31."""
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


class DateRange(Struct, frozen=True):
    """Dates from first to last, inclusive, as YYYY-MM-DD, which sort like dates.

    An end that --dates leaves open is empty until fill() has filled it.
    """

    first: str = ""
    last: str = ""

    @classmethod
    def parse(cls, text: str) -> DateRange:
        """Parse FROM..TO, FROM.., ..TO or a single date. Raises ValueError."""
        first, separator, last = text.partition("..")
        dates = cls(first, last if separator else first)
        for end in (dates.first, dates.last):
            if end and not is_date(end):
                raise ValueError(f"{text!r} is not FROM..TO with dates like 2020-01-31")
        return dates

    def fill(self, other: DateRange) -> DateRange:
        """Return the range with its open ends taken from another. Raises ValueError."""
        dates = DateRange(self.first or other.first, self.last or other.last)
        if dates.first > dates.last:
            raise ValueError(f"{dates} ends before it begins")
        return dates

    def __contains__(self, day: str) -> bool:
        return self.first <= day <= self.last

    def __str__(self) -> str:
        return f"{self.first}..{self.last}"

    def join(self, other: DateRange) -> DateRange:
        """Return one range over both, or this one if they share no date."""
        if self.first > other.last or self.last < other.first:
            return self
        return DateRange(min(self.first, other.first), max(self.last, other.last))

    def days(self) -> set[str]:
        """Return all dates of the range."""
        first, last = map(date.fromisoformat, (self.first, self.last))
        return {str(first + timedelta(days=n)) for n in range((last - first).days + 1)}


class LoadDates(Struct, frozen=True):
    """The dates of one load, set once: it may well run past midnight."""

    usual: DateRange  # from 2000-01-01 to tomorrow
    wanted: DateRange  # --dates, by default the usual ones
    # Dates whose users are stored: the wanted ones. With --replace, also the
    # usual dates, since a file that replaces a date holds late events of
    # earlier ones, whose users are added. (Not if the ranges are apart: this is
    # one range.)
    counted: DateRange

    @classmethod
    def choose(cls, timezone: str, option: DateRange, replace: bool) -> LoadDates:
        """Return the dates of a load that begins now.

        Raises ValueError for a range that is empty, LoadError for an impossible
        clock.
        """
        today = datetime.now(find_time_zone(timezone)).date()
        usual = DateRange(FIRST_DATE, (today + timedelta(days=1)).isoformat())
        if usual.last < usual.first:
            raise LoadError(
                f"the clock of this machine says {today}, which can't be right; "
                "set it and load again"
            )
        wanted = option.fill(usual)
        counted = wanted.join(usual) if replace else wanted
        return cls(usual, wanted, counted)


# -- The rule --------------------------------------------------------------------------
#
# Rule says when an event makes its user active. Matcher applies it, in two ways
# that always agree: evaluate() is the reference implementation, for one event
# of any form; find_active() is the fast path, for many events of the usual
# form.

# The dates of slots of five minutes are memoized. If a slot begins and ends on
# one date, all of its instants are on it; otherwise each instant is looked up.
# 23:57 on 2019-12-31 in US/Central is in the slot from 23:55 to
# 23:59:59.999999, number 5259527 since 1970.
SLOT = 300_000_000  # microseconds
MEMO_SIZE = 65_536  # entries; so many slots cover 228 days
Users = dict[str, list[str | None]]  # by date; None or "" for an anonymous event

# A sentinel in place of the user, compared by identity: a user may have this name.
NOT_ACTIVE = "(not active)"


def sort_unique(values: Iterable[str]) -> tuple[str, ...]:
    """Return the distinct values, sorted, so that equal rules compare equal."""
    return tuple(sorted(set(values)))


class Rule(Struct, frozen=True):
    """When an event makes its user active: a database holds counts under one rule."""

    timezone: str = "US/Central"  # whose calendar dates are counted
    event_names: tuple[str, ...] = ("user_engagement",)  # or "*"
    min_engagement_msec: int = 3000  # inclusive
    valuable_events: tuple[str, ...] = ("*_event",)  # globs for the parameters' keys

    def __str__(self) -> str:
        """Return the rule as options of the command line."""
        from shlex import quote

        names = [f"--event-name {quote(name)}" for name in self.event_names]
        globs = [f"--valuable-event {quote(glob)}" for glob in self.valuable_events]
        minimum = f"--min-engagement-msec {self.min_engagement_msec}"
        return " ".join([f"--timezone {self.timezone}", *names, minimum, *globs])

    def is_same(self, other: Rule) -> bool:
        """Tell whether two rules give the same counts."""
        renamed = msgspec.structs.replace(other, timezone=self.timezone)
        return self == other or (
            self == renamed and is_same_zone(self.timezone, other.timezone)
        )


class Role(NamedTuple):
    """What the key of a parameter says. A glob may match engagement_time_msec, too."""

    is_time: bool
    is_valuable: bool


class Findings(Struct):
    """What a rule finds in events."""

    engagement_events: int = 0
    users: Users = msgspec.field(default_factory=dict)  # of the active events


class Matcher:
    """Applies a rule to events, and memoizes what keys and times mean under it.

    An engagement event has the event name of the rule. If the rule has several
    names, or "*", the event must also have the parameter engagement_time_msec.

    Most lines hold no engagement event. A substring search for the needle (the
    event name, or that parameter) finds those that may. JSON can spell a letter
    as an escape, as in "\\u0075ser_engagement"; so a line that has an escape
    with which the needle could be spelt is decoded as well.

    Raises ValueError for an unknown time zone.
    """

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.zone = find_time_zone(rule.timezone)
        self.has_any_name = "*" in rule.event_names
        self.needs_time = self.has_any_name or len(rule.event_names) > 1
        text = ENGAGEMENT_TIME if self.needs_time else rule.event_names[0]
        self.needle = choose_needle(text)
        self.escapes = list_escapes(self.needle)
        self.role_of = lru_cache(MEMO_SIZE)(self.find_role)
        self.date_of_slot = lru_cache(MEMO_SIZE)(self.find_date_of_slot)

    def find_role(self, key: str | None) -> Role:
        """Return what the key of a parameter says."""
        globs = self.rule.valuable_events
        is_valuable = key is not None and any(fnmatchcase(key, glob) for glob in globs)
        return Role(key == ENGAGEMENT_TIME, is_valuable)

    def evaluate(self, event: dict[str, Any]) -> Findings:
        """Return what the rule says about one event. Raises ValueError.

        This is the reference implementation.
        """
        rule = self.rule
        if not self.has_any_name and event.get("event_name") not in rule.event_names:
            return Findings()
        parameters = get_field(event, "event_params", list) or []
        places = [(one, f"event_params[{n}].") for n, one in enumerate(parameters)]
        keys = [get_field(one, "key", str, path) for one, path in places]
        if self.needs_time and ENGAGEMENT_TIME not in keys:
            return Findings()
        values = [get_field(one, "value", dict, path) or {} for one, path in places]
        msecs = [
            parse_integer(value["int_value"], ENGAGEMENT_TIME)
            for key, value in zip(keys, values, strict=True)
            if key == ENGAGEMENT_TIME and value.get("int_value") is not None
        ]
        user = get_field(event, "user_pseudo_id", str)
        if user and len(user.encode()) > MAX_USER_BYTES:
            raise ValueError(f"user_pseudo_id is longer than {MAX_USER_BYTES} bytes")
        if user and "\0" in user:
            raise ValueError("user_pseudo_id has a NUL character")
        day = self.find_date(
            parse_integer(event.get("event_timestamp"), "event_timestamp")
        )
        roles = map(self.find_role, keys)  # not memoized: the keys may be long
        is_valuable = any(role.is_valuable for role in roles)
        is_engaged = any(msec >= rule.min_engagement_msec for msec in msecs)
        return Findings(1, {day: [user]} if is_valuable and is_engaged else {})

    def find_active(self, events: Iterable[Event]) -> Findings:
        """Return what the rule says about many events: the fast path.

        Raises ValueError for anything unusual, and does not tell for which
        event. The caller then scans line by line. Users that are too long have
        been refused by Event, and escapes of NUL characters by
        Scanner.scan_fast().
        """
        role_of = self.role_of
        times: list[Any] = []
        msecs: list[Any] = []
        users: list[str | None] = []
        for event in events:
            if not self.has_any_name and event.event_name not in self.rule.event_names:
                continue
            msec = None
            is_valuable = False
            for parameter in event.event_params or ():
                is_time, is_match = role_of(parameter.key)
                if is_match:
                    is_valuable = True
                if is_time:
                    value = parameter.value
                    if msec is not None or value is None or value.int_value is None:
                        raise ValueError("there is not exactly one engagement time")
                    msec = value.int_value
            if msec is None:
                if self.needs_time:
                    continue
                # It is an engagement event, but not active, even if the minimum is 0.
                msec = "0"
                is_valuable = False
            times.append(event.event_timestamp)
            msecs.append(msec)
            users.append(event.user_pseudo_id if is_valuable else NOT_ACTIVE)
        check_digits(times + msecs)
        return self.group_by_date(times, msecs, users)

    def group_by_date(
        self, times: list[Any], msecs: list[Any], users: list[str | None]
    ) -> Findings:
        """Return the findings of engagement events, given as three parallel lists."""
        date_of_slot = self.date_of_slot
        minimum = self.rule.min_engagement_msec
        found: Users = defaultdict(list)
        for time_, msec, user in zip(
            map(int, times), map(int, msecs), users, strict=True
        ):
            day = date_of_slot(time_ // SLOT) or self.find_date(time_)
            if msec >= minimum and user is not NOT_ACTIVE:
                found[day].append(user)
        return Findings(len(times), found)

    def find_date_of_slot(self, slot: int) -> str:
        """Return the date of a slot of five minutes, or "" if it has two dates."""
        first = self.find_date(slot * SLOT)
        last = self.find_date(slot * SLOT + SLOT - 1)
        return first if first == last else ""

    def find_date(self, timestamp: int) -> str:
        """Return the date of a timestamp (microseconds UTC). Raises ValueError.

        python-dateutil 2.9 knows the years 1970 to 2036; the standard library
        knows the others.
        """
        is_usual = 0 <= timestamp < YEAR_2037
        zone = self.zone if is_usual else find_zone_info(self.rule.timezone)
        try:
            moment = EPOCH + timedelta(microseconds=timestamp)
            return moment.astimezone(zone).date().isoformat()
        except (OverflowError, ValueError):
            raise ValueError(
                f"event_timestamp is beyond the calendar: {str(timestamp)[:60]}"
            ) from None


def choose_needle(text: str) -> bytes:
    """Return the longest word of ASCII in a text, by which to search for the text.

    JSON can spell other characters in several ways, such as "/" and "\\/". So
    the needle of "level/completed" is "completed". A text without such a word
    is searched for by "event_name", the key that each event has.
    """
    words: list[str] = re.findall(r"\w+", text, re.ASCII) or ["event_name"]
    return max(words, key=len).encode()


def list_escapes(needle: bytes) -> tuple[bytes, ...]:
    """Return the beginnings of the escapes by which JSON can spell a needle.

    A "u" can be spelt \\u0075, and "_" \\u005f; so user_engagement gives
    \\u007, \\u006 and \\u005. A needle with a digit gives \\u003 as well, and
    more lines have to be decoded: BigQuery writes "<" as \\u003c.
    """
    return tuple({b"\\u00%x" % (byte >> 4) for byte in needle})


@lru_cache(maxsize=8)
def matcher_for(rule: Rule) -> Matcher:
    """Return the matcher of a rule. A worker keeps it, and its memo, between ranges."""
    return Matcher(rule)


def check_digits(numbers: list[Any]) -> None:
    """Raise ValueError unless all are strings of digits, or integers >= 0.

    One isdigit() over all numbers is faster than one for each of them. An empty
    string passes; int() refuses it afterwards.
    """
    try:
        digits = "".join(numbers)
    except TypeError:  # there are JSON numbers
        digits = "".join(map(str, numbers))
    # Bytes, since str.isdigit() accepts the digits of other scripts as well.
    if numbers and not digits.encode().isdigit():
        raise ValueError("there is an unusual number")


# -- Batches ---------------------------------------------------------------------------
#
# What is found in some lines: tallies, bad records, and the users by date.

BAD_RECORD_BYTES = 8 << 20  # memory for bad records; a batch ends when it is exceeded
OBJECT_OVERHEAD = 256  # bytes of memory that Python takes for a record beside its text
RUN_USERS = 256  # hundreds of runs are merged at once, each with one array in memory
MAX_REPORTED = 20  # bad records of a load that are reported one by one


class Sums(Struct):
    """Numbers that are added up by name."""

    def plus(self, other: Self) -> Self:
        return type(self)(*map(int.__add__, astuple(self), astuple(other)))


class Tally(Sums):
    """How many lines, events and bytes were read. All but the last two are logged."""

    lines: int = 0
    blank_lines: int = 0
    engagement_events: int = 0
    active_events: int = 0
    anonymous_events: int = 0
    out_of_range_events: int = 0
    bad_records: int = 0
    bytes: int = 0
    too_early: int = 0  # active events before 2000
    too_late: int = 0  # active events after tomorrow


class BadRecord(NamedTuple):
    line: int  # of the batch, from 1
    reason: str
    record: bytes  # the whole line, if it is to be kept


class Run(NamedTuple):
    """Distinct users of a date, sorted.

    They stay JSON text until they are merged: a set of Python strings takes 200
    bytes a user, the text 35. Sorted runs of bounded size can be merged in
    bounded memory.
    """

    date: str
    first_user: str
    users: str  # JSON array of up to 256


class Batch(Struct):
    """What was found in successive lines of a range."""

    tally: Tally = msgspec.field(default_factory=Tally)
    bad: list[BadRecord] = msgspec.field(default_factory=list)
    bad_bytes: int = 0  # that the bad records take in memory
    users: Users = msgspec.field(default_factory=dict)  # until close()
    runs: list[Run] = msgspec.field(default_factory=list)  # from close() on

    def add(self, findings: Findings) -> None:
        self.tally.engagement_events += findings.engagement_events
        for day, users in findings.users.items():
            self.users.setdefault(day, []).extend(users)

    def add_bad_record(self, reason: str, record: bytes) -> None:
        self.bad.append(BadRecord(self.tally.lines, reason, record))
        self.bad_bytes += len(record) + OBJECT_OVERHEAD

    def size(self) -> int:
        """Return the bytes that the batch takes in memory, roughly."""
        return self.bad_bytes + sum(len(run.users) for run in self.runs)

    def close(self, dates: LoadDates) -> Batch:
        """Make sorted runs of the users on the dates that count; tally the others."""
        for day, users in self.users.items():
            self.tally.active_events += len(users)
            named = list(filter(None, users))
            self.tally.anonymous_events += len(users) - len(named)
            if day not in dates.counted:
                self.tally.out_of_range_events += len(users)
                if day < dates.usual.first:
                    self.tally.too_early += len(users)
                if day > dates.usual.last:
                    self.tally.too_late += len(users)
                continue
            # This takes half the time of sorted(set(named)).
            order = stringzilla.Strs(named).argsort()
            unique = list(dict.fromkeys(map(named.__getitem__, order)))
            for start in range(0, len(unique), RUN_USERS):
                array = unique[start : start + RUN_USERS]
                self.runs.append(Run(day, array[0], encode_json(array)))
        self.users = {}
        return self


# -- Scanning lines --------------------------------------------------------------------
#
# Blocks of lines take a fast path. It gives the same result as scanning the
# lines one by one, or gives up; then smaller parts are tried, and at last lines.

BATCH_BYTES = 32 << 20  # size of the input lines of one batch
BLOCK_BYTES = 384 << 10  # fits a processor's cache, and is searched several times
SPLIT = 8  # a block that the fast path rejects is tried again in this many parts
MANY_LINES = 8  # fewer lines say nothing about the input
NOT_AN_OBJECT = "not one JSON object on the line; one event per line is expected"
Buffer = bytes | bytearray


class Scanner(Struct):
    """Turns a range into batches of what counts under a rule on some dates."""

    rule: Rule
    dates: LoadDates
    validate: bool = False  # decode every line
    keep: bool = False  # hold every bad record, and all of its bytes
    block_bytes: int = BLOCK_BYTES
    is_dense: bool = False  # most lines of the last block were engagement events

    def __call__(self, range_: Range) -> Generator[Batch, None, None]:
        """Yield the batches of a range, one for about 32 MiB. Raises LoadError."""
        batch = Batch()
        lines = 0  # before this batch

        def find_line() -> str:
            """Return the line as ":12", or "" if lines before the range are unknown."""
            if range_.start or range_.data is not None:  # data comes from a live pipe
                return ""
            return f":{lines + batch.tally.lines + 1}"

        with about(range_.source, find_line), open_range(range_) as opened:
            size = 0
            for buffer, length in opened.read_blocks(self.block_bytes):
                self.scan_block(buffer, length, batch)
                size += length
                if size >= BATCH_BYTES or batch.bad_bytes > BAD_RECORD_BYTES:
                    batch.tally.bytes = opened.count_new_bytes()
                    yield batch.close(self.dates)
                    lines += batch.tally.lines
                    batch = Batch()
                    size = 0
            batch.tally.bytes = opened.count_new_bytes()
            yield batch.close(self.dates)

    def scan_block(self, buffer: bytearray, length: int, batch: Batch) -> None:
        """Scan the whole lines in the first bytes of a buffer."""
        has_line_end = buffer.endswith(b"\n", 0, length)
        end = length - 1 if has_line_end else length
        if not self.scan_fast(buffer, end, batch):
            text = bytes(memoryview(buffer)[:end])
            self.scan_lines(text.split(b"\n"), batch)

    def scan_lines(self, lines: list[bytes], batch: Batch) -> None:
        """Scan lines, without their newlines, of which at least one is unusual.

        The lines are split again and again, so that the fast path takes all
        parts but those with an unusual line, and few lines go one by one.
        """
        size = max(len(lines) // SPLIT, 1)
        for start in range(0, len(lines), size):
            part = lines[start : start + size]
            text = b"\n".join(part)
            if size == 1:
                self.scan_line(text, batch)
            elif not self.scan_fast(text, len(text), batch):
                self.scan_lines(part, batch)

    def scan_fast(self, text: Buffer, end: int, batch: Batch) -> bool:
        """Scan all lines in the first bytes of a text, or do nothing and return False.

        The lines must look like objects: the text begins with "{", ends with
        "}", and has "}\\n{" (or "}\\r\\n{") at each line end. A line without
        the needle is not decoded, so nothing else would notice that it is no
        object.
        """
        close = b"}\r" if text.endswith(b"\r", 0, end) else b"}"
        if not (text.startswith(b"{", 0, end) and text.endswith(close, 0, end)):
            return False
        line_ends = stringzilla.count(text, b"\n", 0, end)
        if stringzilla.count(text, close + b"\n{", 0, end) != line_ends:
            return False
        # An escape may spell the needle, which has_escape() looks for, or a NUL
        # character, which evaluate() refuses.
        if self.has_escape(text, end, b"\\u0000"):
            return False
        lines = line_ends + 1
        matcher = matcher_for(self.rule)
        try:
            findings = matcher.find_active(self.decode_events(text, end, lines))
        except (ValueError, RecursionError):
            return False
        if lines > MANY_LINES:
            self.is_dense = findings.engagement_events > lines // 2
        batch.add(findings)
        batch.tally.lines += lines
        return True

    def scan_line(self, line: bytes, batch: Batch) -> None:
        """Scan one line, without its newline.

        The fast path is tried once more, without the white space around the
        line. Matcher.evaluate() decides the lines that the fast path rejects.
        """
        record = line.strip(b" \t\r\n")
        if record and self.scan_fast(record, len(record), batch):
            return
        batch.tally.lines += 1
        if not record:
            batch.tally.blank_lines += 1
            return
        try:
            if not (record.startswith(b"{") and record.endswith(b"}")):
                raise ValueError(NOT_AN_OBJECT)
            if self.may_count(record):
                batch.add(matcher_for(self.rule).evaluate(decode_record(record)))
        except (ValueError, RecursionError) as error:
            batch.tally.bad_records += 1
            if self.keep or len(batch.bad) < MAX_REPORTED:
                batch.add_bad_record(str(error), line if self.keep else b"")

    def may_count(self, record: bytes) -> bool:
        """Tell whether a record must be decoded: it may hold an engagement event."""
        needle = matcher_for(self.rule).needle
        is_found = stringzilla.find(record, needle) >= 0
        return self.validate or is_found or self.has_escape(record, len(record))

    def has_escape(self, text: Buffer, end: int, *others: bytes) -> bool:
        """Tell whether a text has an escape that can spell the needle, or another."""
        if text.find(b"\\", 0, end) < 0:  # most texts have no escape at all
            return False
        escapes = matcher_for(self.rule).escapes + others
        return any(stringzilla.find(text, escape, 0, end) >= 0 for escape in escapes)

    def decode_events(self, text: Buffer, end: int, lines: int) -> list[Event]:
        """Decode the lines with the needle; or all, if most lines of a block have it.

        Raises ValueError or RecursionError if a line is unusual in any way.
        """
        if self.is_dense or self.validate:
            wanted = memoryview(text)[:end]
        else:
            found = list(self.find_lines(text, end))
            lines = len(found)
            wanted = memoryview(b"\n".join(found))
        events = EVENT_DECODER.decode_lines(str(wanted, "utf-8"))
        if len(events) != lines:  # decode_lines() takes {...}{...} for two lines
            raise ValueError("there are two objects on a line")
        return events

    def find_lines(self, text: Buffer, end: int) -> Iterator[memoryview]:
        """Yield the lines that contain the needle."""
        needle = matcher_for(self.rule).needle
        view = memoryview(text)
        at = stringzilla.find(text, needle, 0, end)
        while at >= 0:
            start = text.rfind(b"\n", 0, at) + 1
            stop = text.find(b"\n", at, end)
            stop = end if stop < 0 else stop
            yield view[start:stop]
            at = stringzilla.find(text, needle, stop, end)


def decode_record(record: bytes) -> Any:
    """Decode a JSON object. If a key is repeated, the last value is used.

    Raises ValueError or RecursionError.
    """
    import json

    text = str(record, "utf-8")
    try:
        # Unlike the json module, this refuses NaN and Infinity.
        OBJECT_DECODER.decode(text)
    except msgspec.DecodeError as error:
        raise ValueError(f"{NOT_AN_OBJECT} ({error})") from None
    return json.loads(text, parse_int=parse_json_integer)


def parse_json_integer(digits: str) -> Any:
    """Parse a JSON integer. One of more than 4,300 digits becomes a Decimal.

    Python's int() refuses such numbers, and no field used here accepts a
    Decimal.
    """
    from decimal import Decimal

    is_small = len(digits.removeprefix("-")) <= 4300
    return int(digits) if is_small else Decimal(digits)


# -- Sources ---------------------------------------------------------------------------
#
# EVENTS are files, standard input, pipes and URLs. Those that do not change
# between two loads have a version, by which --incremental knows them again.

# Keys of fsspec's info that tell whether a file has changed. An ETag identifies
# the content; the others only tell that the file was written.
ETAG_KEYS = ("ETag", "etag")
TIME_KEYS = ("generation", "Last-Modified", "LastModified", "mtime")


class FileVersion(NamedTuple):
    """What loaded_file remembers of a file or URL, to see whether it has changed."""

    path: str  # absolute and without symbolic links, or the URL without its query
    version: str  # "SIZE MTIME_NS" of a file, "SIZE MARK" of a URL; see find_mark()


def is_url(source: str) -> bool:
    return "://" in source


def is_pipe(source: str) -> bool:
    """Tell whether a source can be opened only once: a pipe, or standard input."""
    is_stored = os.path.isfile(source) or os.path.isdir(source)
    return source == "-" or (os.path.exists(source) and not is_stored)


def find_file_system(url: str) -> tuple[Any, str]:
    """Return the fsspec file system of a URL, and the path in it."""
    import fsspec

    # The settings "http" and "gs" hold for https and gcs as well.
    if re.search("(https?|gc?s)://", url):
        with contextlib.suppress(ImportError):  # fsspec says what is missing
            configure_sessions(fsspec.config.conf)
    system, path = fsspec.core.url_to_fs(url)
    return system, path


def configure_sessions(settings: dict[str, Any]) -> None:
    """Set how fsspec talks to web servers and to Google, unless the user has set it.

    Compressed content comes as it is stored: only then do lengths and ranges
    fit.
    """
    from urllib.request import getproxies

    from aiohttp import ClientTimeout, TraceConfig

    as_stored = TraceConfig()
    as_stored.on_request_start.append(accept_stored_object)
    session = {
        "headers": {"Accept-Encoding": "identity"},
        "auto_decompress": False,  # if a server compresses even so
        "trace_configs": [as_stored],
    }
    web = {
        **session,
        # A download may last long, but not for minutes without a byte.
        "timeout": ClientTimeout(total=None, sock_connect=60, sock_read=300),
        "trust_env": True,  # the proxies of the environment, and ~/.netrc
    }
    # Only if there are proxies: trust_env also reads ~/.netrc, and if that has
    # a default password, aiohttp refuses to send Google's token.
    google = {**session, "trust_env": bool(getproxies())}
    settings.setdefault("http", {}).setdefault("client_kwargs", web)
    settings.setdefault("gs", {}).setdefault("session_kwargs", google)


async def accept_stored_object(_session: Any, _context: Any, request: Any) -> None:
    """Accept gzip for the content of an object in Google Cloud Storage.

    For a client that does not accept gzip, Google decompresses an object of
    that content encoding, and sends the whole object, whatever range was asked
    for. Metadata must not come compressed.
    https://cloud.google.com/storage/docs/transcoding
    """
    if request.url.query.get("alt") == "media":
        request.headers["Accept-Encoding"] = "gzip"


def expand_wildcards(source: str) -> list[str]:
    """Return the URLs that match a URL with wildcards, or the source itself.

    The shell expands the wildcards of local files. In a URL of HTTP, "?" begins
    the query. Raises LoadError.
    """
    is_pattern = re.search(r"[*?\[]", source) and not re.search("https?://", source)
    if not (is_url(source) and is_pattern):
        return [source]
    with about(source):
        system, path = find_file_system(source)
        found = [system.unstrip_protocol(name) for name in sorted(system.glob(path))]
    return found or [source]  # opening the source itself reports that nothing matches


def find_version(source: str) -> FileVersion | None:
    """Return the version of a file or URL without opening it. Raises LoadError.

    After a wildcard, fsspec answers from the listing, without a request.
    """
    if source == "-":
        return None
    with about(source):
        if is_url(source):
            system, path = find_file_system(source)
            return make_url_version(source, system.info(path))
        return make_file_version(source, os.stat(source))


def make_file_version(path: str, status: os.stat_result) -> FileVersion | None:
    """Return the version of a local file, or None for anything but a regular file."""
    if not stat.S_ISREG(status.st_mode):
        return None
    version = f"{status.st_size} {status.st_mtime_ns}"
    return FileVersion(escape_beyond_ascii(os.path.realpath(path)), version)


def make_url_version(url: str, info: dict[str, Any]) -> FileVersion | None:
    """Return the version of a URL, from fsspec's info; None if the server tells none.

    The path is stored without the query, which may contain a signature. Two
    URLs that differ only in the query then share a path; only an ETag can
    identify the content.
    """
    keys = ETAG_KEYS if re.search("[?#]", url) else ETAG_KEYS + TIME_KEYS
    mark = find_mark(info, keys)
    if not mark:
        return None
    return FileVersion(escape_beyond_ascii(redact(url)), f"{info.get('size')} {mark}")


def find_mark(info: dict[str, Any], keys: Iterable[str]) -> str:
    """Return a mark of the content: the first of these keys in fsspec's info, or ""."""
    values = (str(info.get(key) or "") for key in keys)
    return next(filter(None, values), "").removeprefix("W/").strip('"')


def escape_beyond_ascii(text: str) -> str:
    """Return a text with escapes like \\u65e5, for a database of any encoding."""
    if text.isascii():
        return text
    import json

    return re.sub(r"[^\x00-\x7f]+", lambda found: json.dumps(found[0])[1:-1], text)


# -- Reading sources -------------------------------------------------------------------
#
# A source is opened as a stream of bytes, which is decompressed if its first
# bytes say so, and read in blocks of whole lines.

MAX_LINE = 128 << 20  # bytes; BigQuery reads and writes rows of up to 100 MB
TO_THE_END = float("inf")  # bytes to read of a stream
SNIFFED_BYTES = 512  # enough to recognize another format
READAHEAD_BYTES = 8 << 20  # to ask an object store for at once
BOM = b"\xef\xbb\xbf"
# Regular expressions for the first bytes of a file.
GZIP = rb"\x1f\x8b"
ZSTD = rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"
COMPRESSED = GZIP + rb"|" + ZSTD  # what decompress() opens; its errors are in DAMAGED
CUT_SHORT = "the file was cut short while it was read; load it again when it is whole"
TOO_LONG = f"a line of more than {MAX_LINE >> 20} MiB; one event per line is expected"
AS_JSON = "export it as newline-delimited JSON"
FORMATS = {
    rb"\xff\xfe|\xfe\xff|[{\[]\0|\0[{\[]": "UTF-16; make it UTF-8: "
    "iconv -f UTF-16 -t UTF-8",
    rb"\s*\[": "a JSON array; make it one event per line: jq -c '.[]'",
    rb'\s*\{\s*\n\s*"': "pretty-printed JSON; make it one event per line: jq -c .",
    rb"PAR1": f"a Parquet file; {AS_JSON}",
    rb"Obj\x01": f"an Avro file; {AS_JSON}",
    rb"ORC": f"an ORC file; {AS_JSON}",
    rb"PK[\x03\x05\x07]": "a zip archive; decompress it first: unzip -p",
    rb"\xfd7zXZ\0": "xz-compressed; decompress it first: xzcat",
    rb"BZh": "bzip2-compressed; decompress it first: bzcat",
    rb"\x04\x22\x4d\x18": "lz4-compressed; decompress it first: lz4cat",
    COMPRESSED: "compressed twice, or a compressed live pipe; "
    "decompress it first: zcat, or zstdcat",
    rb"[\s\S]{257}ustar[\0 ]": "a tar archive; load the files in it: tar -xO",
    rb"\s*<[!?a-zA-Z]": f"HTML or XML; {AS_JSON}",
}


class Range(Struct, frozen=True):
    """The unit of work. It is one of three things:

    - bytes of a file, from start to end: the lines that begin in them. Of "ab\\ncd\\n"
      the range from 0 to 2 has the line "ab", and the range from 2 to 6 has "cd".
    - a whole source that can't be split (end is None): compressed, or a pipe.
    - lines that came on a live pipe (data). Their start is 0 for the first ones only.
    """

    source: str
    start: int = 0
    end: int | None = None
    # Identity and version of the file when it was split.
    identity: str | None = None
    version: FileVersion | None = None
    data: bytes | None = None
    size: int | None = None  # bytes of the range in the source, if that is known

    @property
    def work(self) -> int:
        """The approximate bytes to scan: compressed JSON expands about tenfold."""
        return (self.size or 0) * (10 if self.end is None else 1)


class OpenSource(NamedTuple):
    file: io.BufferedReader  # seekable, if it can be read in ranges
    identity: str  # changes if another file takes the place of this one
    version: FileVersion | None  # None for a pipe, or a server that tells no version


class OpenRange:
    """A range as a stream of lines. The stream has been decompressed."""

    def __init__(self, stream: Any, length: float, file: Any, is_start: bool) -> None:
        self.stream = stream
        self.length = length  # bytes to read; the last line is read to its end
        self.file = file  # whose tell() is the number of bytes read of the source
        self.is_start = is_start  # the stream begins where the source begins
        self.position = file.tell()

    def count_new_bytes(self) -> int:
        """Return the bytes read of the source since the last call."""
        before = self.position
        self.position = self.file.tell()
        return int(self.position - before)

    def read_blocks(self, size: int) -> Iterator[tuple[bytearray, int]]:
        """Yield (buffer, length) of whole lines, about size bytes.

        The buffer is used again for the next block. Only the last line of the
        source may lack its newline. Raises Unusable for another format, a line
        that is too long, and a file that was cut short.
        """
        unread = self.length
        if self.is_start:
            unread -= self.check_format()
        buffer = bytearray(2 * size)
        kept = 0  # bytes at the start of the buffer, of a line that has not ended
        while unread > 0:
            # Read behind the kept bytes.
            if len(buffer) < kept + size:
                buffer.extend(bytes(size))
            stop = kept + int(min(size, unread))
            count = self.stream.readinto(memoryview(buffer)[kept:stop])
            if not count:
                break
            unread -= count
            # Yield whole lines, and keep the rest.
            filled = kept + count
            end = buffer.rfind(b"\n", kept, filled) + 1
            if end:
                yield buffer, end
                buffer[: filled - end] = buffer[end:filled]
            kept = filled - end
            if kept > MAX_LINE:
                raise Unusable(TOO_LONG)
        if 0 < unread < TO_THE_END:
            raise Unusable(CUT_SHORT)
        if kept:
            # The last line of the range ends beyond it, or lacks its newline.
            for piece in read_rest_of_line(self.stream):
                buffer[kept : kept + len(piece)] = piece
                kept += len(piece)
            yield buffer, kept

    def check_format(self) -> int:
        """Raise Unusable if the first bytes are those of another format.

        Passes over a byte-order mark, and returns its length in bytes.
        """
        head = self.stream.peek(SNIFFED_BYTES)[:SNIFFED_BYTES]
        mark = BOM if head.startswith(BOM) else b""
        for magic, name in FORMATS.items():
            if re.match(magic, head[len(mark) :]):
                raise Unusable(f"is {name}")
        return len(self.stream.read(len(mark)))


class Pipe(io.RawIOBase):
    """A file that can't seek.

    A read returns at least SNIFFED_BYTES unless the input ends, since a slow
    producer may send fewer at first. tell() counts the bytes that have been
    read.
    """

    def __init__(self, file: Any) -> None:
        self.file = file
        self.position = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = 0
        while count < SNIFFED_BYTES and (read := self.file.readinto(buffer[count:])):
            count += read
        self.position += count
        return count

    def tell(self) -> int:
        return self.position


@contextlib.contextmanager
def open_source(source: str) -> Iterator[OpenSource]:
    """Open a file, pipe, "-" or URL to read it."""
    if is_url(source):
        system, path = find_file_system(source)
        system.invalidate_cache()  # a worker of a cluster may have an old listing
        info = system.info(path)
        if info.get("type") == "directory":  # S3 opens a directory as an empty file
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        version = make_url_version(source, info)
        identity = find_mark(info, ("ino", *ETAG_KEYS, *TIME_KEYS))  # "ino": file://
        # HTTP is read as a stream unless the server says that it serves ranges.
        can_seek = info.get("partial", "http" not in system.protocol)
        opened = system.open(
            path,
            "rb",
            block_size=READAHEAD_BYTES if can_seek else 0,  # 0: a stream
            cache_type="readahead",
        )
    else:
        is_input = source == "-"
        opened = open(
            0 if is_input else source, "rb", buffering=0, closefd=not is_input
        )
        os.set_blocking(opened.fileno(), True)  # a parent may have set it otherwise
        status = os.fstat(opened.fileno())
        version = None if is_input else make_file_version(source, status)
        identity = str(status.st_ino)  # a file may grow while it is read
        can_seek = not is_input and opened.seekable()
    with opened:
        file = io.BufferedReader(opened if can_seek else Pipe(opened))
        yield OpenSource(file, identity, version)


@contextlib.contextmanager
def open_range(range_: Range) -> Iterator[OpenRange]:
    """Open a range, positioned at its first line."""
    if range_.data is not None:
        data = io.BufferedReader(io.BytesIO(range_.data))
        yield OpenRange(data, len(range_.data), data, range_.start == 0)
        return
    with open_source(range_.source) as opened:
        file = opened.file
        if range_.identity not in (None, opened.identity):
            raise Unusable("the file was replaced while it was read; load it again")
        if range_.end is None:
            with decompress(file) as stream:
                yield OpenRange(stream, TO_THE_END, file, True)
        else:
            start = seek_line(file, range_.start)
            yield OpenRange(file, range_.end - start, file, range_.start == 0)


def is_compressed(file: io.BufferedReader) -> bool:
    """Tell whether a file is compressed, by its first bytes."""
    return re.match(COMPRESSED, file.peek()) is not None


@contextlib.contextmanager
def decompress(file: io.BufferedReader) -> Iterator[Any]:
    """Yield the decompressed content of a file, or the file if it is not compressed.

    The stream is closed here, and not by a finalizer, where Python would drop
    the exception of a signal.
    """
    if not is_compressed(file):
        yield file
        return
    if re.match(GZIP, file.peek()):
        from isal import igzip

        stream: Any = igzip.IGzipFile(fileobj=file)  # type: ignore[no-untyped-call]
    else:
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd

        stream = zstd.ZstdFile(file)
    with contextlib.closing(stream):
        yield stream


def read_rest_of_line(stream: io.BufferedIOBase) -> Iterator[bytes]:
    """Yield the rest of a line in pieces. Raises Unusable if the line is too long."""
    left = MAX_LINE
    while left > 0:
        piece = stream.readline(BLOCK_BYTES)
        if piece:
            yield piece
        if not piece or piece.endswith(b"\n"):
            return
        left -= len(piece)
    raise Unusable(TOO_LONG)


def seek_line(file: io.BufferedIOBase, offset: int) -> int:
    """Go to the first line that begins at an offset or after it; return where.

    Of "ab\\ncd\\n", a line begins at 0 and at 3; from offset 1 the next one is
    at 3.
    """
    if offset == 0:
        return file.seek(0)
    file.seek(offset - 1)
    for _ in read_rest_of_line(file):
        pass
    return file.tell()


# -- Scanning ranges, here or elsewhere ------------------------------------------------
#
# Sources are split into ranges. Ranges are submitted a bounded number ahead,
# and their batches are taken in input order. Therefore the first error wins,
# line numbers are a running sum, and one process, many processes and a cluster
# give the same result.

RANGE_BYTES = BATCH_BYTES
URL_RANGE_BYTES = 128 << 20  # each range opens its URL anew
CLUSTER_RANGE_BYTES = 256 << 20
POOL_MIN_BYTES = 64 << 20  # for less, starting processes takes longer than scanning
# Unless --workers says otherwise. The parent needs 1/24 of the CPU that its
# workers need for full exports, 1/35 for gzip, 1/3 for short events. With more
# workers, the parent or the disk is the limit.
MAX_WORKERS = 16
QUEUE_PER_WORKER = 3  # ranges that are sent to workers ahead, on average
SEND_BYTES = 8 << 20  # of batches that a worker collects before it sends them
CLUSTER_SECONDS = 30  # to wait for a scheduler
Scanned = Generator[tuple[Range, Batch], None, None]  # in input order


def split_source(name: str, size: int) -> list[Range]:
    """Split a source into ranges of some bytes, if it can be split. Raises LoadError.

    The version is taken here, before the first byte is read: a file that
    changes while it is read has another version afterwards, and is loaded
    again.
    """
    if is_pipe(name):
        return [Range(name)]
    with about(name), open_source(name) as opened:
        can_split = opened.file.seekable() and not is_compressed(opened.file)
        end = opened.file.seek(0, os.SEEK_END) if opened.file.seekable() else None
    whole = Range(name, 0, None, opened.identity, opened.version, size=end)
    if end is None or not can_split:
        return [whole]
    step = max(size, URL_RANGE_BYTES) if is_url(name) else size
    starts = range(0, end, step) or [0]  # an empty file has an empty range
    return [
        msgspec.structs.replace(
            whole, start=start, end=min(start + step, end), size=min(step, end - start)
        )
        for start in starts
    ]


def submit_ahead(
    ranges: Iterable[Range], submit: Callable[[Range], Any], number: int
) -> Iterator[tuple[Range, Any]]:
    """Submit up to a number of ranges ahead of the consumer.

    Yields each range with what submit() returned for it, in input order.
    """
    submitted = ((range_, submit(range_)) for range_ in ranges)
    waiting = deque(itertools.islice(submitted, number))
    while waiting:
        yield waiting.popleft()
        waiting.extend(itertools.islice(submitted, 1))


def scan_in_turn(ranges: Iterable[Range], scanner: Scanner) -> Scanned:
    """Scan ranges in this process. Raises LoadError."""
    for range_ in ranges:
        with contextlib.closing(scanner(range_)) as batches:
            for batch in batches:
                yield range_, batch


class Worker(Struct):
    """A process that scans ranges, as its parent sees it."""

    connection: Any
    queued: int = 0  # ranges that it was sent, and that are not finished
    assigned: int = 0  # bytes to scan, ever


def scan_in_processes(ranges: list[Range], scanner: Scanner, number: int) -> Scanned:
    """Scan ranges in a number of worker processes. Raises LoadError.

    Each worker has a pipe of its own. concurrent.futures has one pipe for the
    results of all workers: if a worker is killed while it writes, the parent
    waits for ever. Here the parent reads the end of that worker's pipe, and
    says so.
    """
    with about("scanning processes"), contextlib.ExitStack() as stack:
        workers = start_workers(number, scanner, stack)
        ahead = QUEUE_PER_WORKER * number
        is_killed = False
        try:
            for range_, worker in submit_ahead(ranges, partial(send, workers), ahead):
                for batch in receive_batches(worker.connection):
                    yield range_, batch
                worker.queued -= 1
        except (EOFError, OSError):  # the connection has ended
            is_killed = True
        # Raised outside the except clause: as its context, the first exception
        # would keep a buffer, and Python 3.12 and 3.13 crash when they free it.
        if is_killed:
            raise LoadError(
                "a scanning process was killed (out of memory?); try fewer --workers"
            )


def send(workers: list[Worker], range_: Range) -> Worker:
    """Send a range to the worker that was given the least work; return that worker.

    Workers have at most QUEUE_PER_WORKER ranges on average, so there is always
    one with no more than that. None ever has more than one beyond it.
    """
    free = [worker for worker in workers if worker.queued <= QUEUE_PER_WORKER]
    chosen = min(free, key=lambda worker: worker.assigned)
    chosen.assigned += range_.work
    chosen.queued += 1
    chosen.connection.send(range_)
    return chosen


class Answer(NamedTuple):
    """A message of a worker about a range."""

    batches: list[Batch]
    is_last: bool
    error: LoadError | None = None


def receive_batches(connection: Any) -> Iterator[Batch]:
    """Yield the batches of the range that a worker scans. Raises LoadError."""
    is_last = False
    while not is_last:
        batches, is_last, error = connection.recv()
        yield from batches
        if error:
            raise error


def start_workers(
    number: int, scanner: Scanner, stack: contextlib.ExitStack
) -> list[Worker]:
    """Start processes that scan until a stack is closed."""
    import multiprocessing

    # A fork starts at once and shares what is imported; on other systems it is
    # unsafe. Signals wait until the worker has handlers of its own.
    method = "fork" if sys.platform == "linux" else None
    context: Any = multiprocessing.get_context(method)
    workers = []
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        for _ in range(number):
            ours, theirs = context.Pipe()
            arguments = (theirs, ours, scanner)
            process = context.Process(target=run_worker, args=arguments, daemon=True)
            process.start()
            stack.callback(process.kill)
            theirs.close()
            workers.append(Worker(ours))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return workers


def run_worker(connection: Any, parents_end: Any, scanner: Scanner) -> None:
    """Scan the ranges that come over a connection, and send answers, until it ends."""
    # If the parent is killed, recv() ends only when no process holds the
    # parent's end any more. Later workers inherit the ends of earlier ones, so
    # they exit from the last to the first.
    parents_end.close()
    parent = os.getppid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent as well
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    # The parent notices if the connection ends, and says why.
    with contextlib.suppress(EOFError, OSError, MemoryError):
        while os.getppid() == parent:
            answer_range(connection, connection.recv(), scanner, parent)


def answer_range(connection: Any, range_: Range, scanner: Scanner, parent: int) -> None:
    """Scan a range, and send its batches; stop if the parent has been killed."""
    batches: list[Batch] = []
    try:
        for batch in scanner(range_):
            batches.append(batch)
            if sum(batch.size() for batch in batches) > SEND_BYTES:
                connection.send(Answer(batches, is_last=False))
                batches = []
            if os.getppid() != parent:
                return
    except LoadError as error:
        connection.send(Answer(batches, is_last=True, error=error))
    else:
        connection.send(Answer(batches, is_last=True))


def scan_on_cluster(ranges: list[Range], scanner: Scanner, address: str) -> Scanned:
    """Scan ranges on a Dask cluster, whose workers see the same files.

    The work of a lost worker is repeated by others. Raises LoadError.
    """
    with about(address), contextlib.ExitStack() as stack:
        import distributed

        # Dask waits for ever for a server that accepts a connection and says nothing.
        with time_limit(CLUSTER_SECONDS):
            client = distributed.Client(address, timeout=10)  # seconds
        stack.enter_context(client)
        check_cluster(client, redact(address))
        client.upload_file(os.path.realpath(__file__))

        def submit(range_: Range) -> Any:
            return client.submit(lambda: list(scanner(range_)), pure=False)

        threads = sum(client.nthreads().values())
        for range_, future in submit_ahead(ranges, submit, 2 * threads + 1):
            for batch in wait_for_result(client, future, redact(address)):
                yield range_, batch


def wait_for_result(client: Any, future: Any, name: str) -> Any:
    """Return the batches of a range. Raises LoadError, Unusable."""
    while True:
        try:
            return future.result(timeout=10)
        except TimeoutError:
            if not client.nthreads():
                raise Unusable(
                    "has no workers any more; start some and load again"
                ) from None
        except LoadError as error:
            raise LoadError(f"{error} (on a worker of {name})") from None


def check_cluster(client: Any, name: str) -> None:
    """Raise Unusable unless a cluster has workers, with the versions used here."""
    if not client.nthreads():
        raise Unusable(f"has no workers; start some with: dask worker {name}")
    versions = client.get_versions(packages=["msgspec", "stringzilla"])
    here = versions["client"]["packages"]
    for worker, there in versions["workers"].items():
        for package in ("python", "distributed", "msgspec", "stringzilla"):
            theirs, ours = str(there["packages"].get(package)), str(here.get(package))
            if theirs.split(".")[:2] != ours.split(".")[:2]:
                raise Unusable(
                    f"the worker {worker} has {package} {theirs}, where {ours} is used "
                    "here; install the same requirements.txt"
                )


def count_cpus() -> int:
    """Return the processors that this process may use, as its cgroup limits them."""
    cpus = os.cpu_count() or 1
    if sys.platform == "linux":
        cpus = len(os.sched_getaffinity(0))
        # "150000 100000": one and a half processors. "max 100000": all of them.
        with contextlib.suppress(OSError, ValueError):
            with open("/sys/fs/cgroup/cpu.max", encoding="ascii") as file:
                quota, period = map(int, file.read().split())
            cpus = min(cpus, -(-quota // period))
    return cpus


def scan(
    ranges: list[Range], scanner: Scanner, workers: int | None, cluster: str | None
) -> Scanned:
    """Scan ranges in the fastest way. Raises LoadError."""
    if cluster and ranges:
        return scan_on_cluster(ranges, scanner, cluster)
    workers = min(workers or min(count_cpus(), MAX_WORKERS), len(ranges))
    # Such as a pipe, which no other process can open.
    has_unknown_size = any(range_.size is None for range_ in ranges)
    is_large = sum(range_.work for range_ in ranges) > POOL_MIN_BYTES
    if workers > 1 and is_large and not has_unknown_size:
        return scan_in_processes(ranges, scanner, workers)
    return scan_in_turn(ranges, scanner)


# -- Staging ---------------------------------------------------------------------------
#
# The users of a load wait here, by date and in bounded memory, until they are stored.

SPILL_BYTES = 8 << 20  # of runs in memory; more are moved to a temporary database
CHUNK_USERS = 32_768  # that are compared with the database and stored at once


class Staging:
    """Adds up the batches of a load, and gives its users back, sorted and distinct."""

    def __init__(self, dates: LoadDates) -> None:
        self.dates = dates
        self.tally = Tally()
        self.days: set[str] = set()  # on which there are users
        self.runs: dict[str, list[Run]] = defaultdict(list)  # by date
        self.size = 0  # bytes that the runs take, roughly
        self.spilled: sqlite3.Connection | None = None
        # Set by commit() if COMMIT had no answer: the report to give if it succeeded.
        self.unanswered: Report | None = None

    def add(self, batch: Batch) -> None:
        """Add a batch. Raises LoadError before any of it is added."""
        if self.size > SPILL_BYTES:
            self.spill()
        self.tally = self.tally.plus(batch.tally)
        for run in batch.runs:
            self.runs[run.date].append(run)
            self.days.add(run.date)
            self.size += len(run.users) + OBJECT_OVERHEAD

    def spill(self) -> None:
        """Move the runs to a temporary database, in one transaction."""
        with about("temporary files (TMPDIR)"):
            if self.spilled is None:
                # The thread of get_users() reads it.
                self.spilled = sqlite3.connect("", check_same_thread=False)
                self.spilled.executescript(
                    "PRAGMA journal_mode = MEMORY;"
                    "CREATE TABLE run (date, first_user, users);"
                    "CREATE INDEX run_order ON run (date, first_user);"
                )
            runs = itertools.chain.from_iterable(self.runs.values())
            with self.spilled:
                self.spilled.executemany("INSERT INTO run VALUES (?, ?, ?)", runs)
        self.runs.clear()
        self.size = 0

    def get_users(self, day: str) -> Iterator[list[str]]:
        """Yield the users of a date, sorted and distinct, about 32,768 at a time.

        In a large load, a thread prefetches the next chunk while the database
        stores the last one.
        """
        runs = sorted(self.runs.get(day, ()))
        if self.spilled is None:
            yield from merge_runs(runs)
            return
        from concurrent.futures import ThreadPoolExecutor
        from heapq import merge

        query = (
            "SELECT date, first_user, users FROM run WHERE date = ? ORDER BY first_user"
        )
        spilled = map(Run._make, self.spilled.execute(query, (day,)))
        chunks = merge_runs(merge(runs, spilled))
        with ThreadPoolExecutor(
            1,
            initializer=signal.pthread_sigmask,  # leave signals to the other threads
            initargs=(signal.SIG_BLOCK, STOP_SIGNALS),
        ) as executor:
            future = executor.submit(next, chunks, None)
            while users := future.result():
                future = executor.submit(next, chunks, None)
                yield users

    def close(self) -> None:
        if self.spilled is not None:
            self.spilled.close()


def merge_runs(runs: Iterable[Run]) -> Iterator[list[str]]:
    """Merge runs, which come in the order of their first users.

    Yields the users, sorted and distinct, in lists that are not empty. When a
    run comes, the users below its first one are complete: no later run holds
    any of them.
    """
    pending: list[str] = []
    rest = 0  # users that the last sort left in pending
    for run in runs:
        # Sorting a long rest again for each run would take quadratic time.
        if len(pending) >= rest + CHUNK_USERS:
            pending.sort()
            complete = bisect_left(pending, run.first_user)
            if complete:
                yield list(dict.fromkeys(pending[:complete]))
                del pending[:complete]
            rest = len(pending)
        pending += STRINGS_DECODER.decode(run.users)
    if pending:
        yield list(dict.fromkeys(sorted(pending)))


# -- Databases -------------------------------------------------------------------------
#
# Database is what SQLite and PostgreSQL have in common. SQL is written in
# SQLite's dialect, with ? as the placeholder; Postgres translates it.
# is_postgres() tells which of the two --db names; the parsing of options,
# redaction and plotting ask it, too. is_transient() and REMEDIES know the
# errors of both.
#
# active_user holds who was active on which date. It makes loads idempotent: the
# database tells how many users are new while it inserts them, and a dry run
# counts them with SELECTs instead. A date that has fewer users than its count
# is final: its users were deleted (retention, privacy), and its count can't be
# computed any more.

LOCK_SECONDS = 60.0  # to wait for other writers
ANSWER_SECONDS = 60.0  # to wait for a PostgreSQL server
TABLES = ("active_user_table", "active_user", "load_log", "loaded_file")
ADDED_TABLES = {"loaded_file"}  # since version 1.0.0
# "AS value" suits both databases, as translate_query() says. Without "WHERE
# true", SQLite would take ON CONFLICT for the ON of a join.
INSERT_USERS = """INSERT INTO active_user (date, user_pseudo_id)
    SELECT ?, value FROM json_each(?) AS value WHERE true
    ON CONFLICT (date, user_pseudo_id) DO NOTHING"""
COUNT_NEW_USERS = """SELECT count(*) FROM json_each(?) AS value WHERE NOT EXISTS (
    SELECT 1 FROM active_user WHERE date = ? AND user_pseudo_id = value)"""
SCHEMA = os.path.join(os.path.dirname(os.path.realpath(__file__)), "schema.sql")


class Changes(Sums):
    """What a load did on a date, in users."""

    added: int = 0
    removed: int = 0
    loaded: int = 0  # users of the load, new or not
    left_out: int = 0  # because the date is final

    def correct(self, net: int) -> None:
        """Make added - removed the net change of a table; keep removed if possible."""
        self.added = max(net + self.removed, 0)
        self.removed = self.added - net


class DateCount(NamedTuple):
    """A row of the report."""

    date: str
    active_user_count: int  # as it now stands in the table
    changes: Changes


class Column(NamedTuple):
    table: str
    name: str
    type: str
    default: str | None  # in schema.sql


class InDoubt(Unavailable):
    """The database did not answer to COMMIT: the transaction may be committed."""


def read_schema() -> str:
    """Return the text of schema.sql. Raises LoadError."""
    with about(SCHEMA), open(SCHEMA, encoding="utf-8") as file:
        return file.read()


class Database:
    """One transaction on a database that has the tables of schema.sql."""

    connection: Any = None
    lock_timeout: float  # seconds
    can_write = False
    COLUMNS_QUERY = ""  # for the columns of some tables
    SCHEMA_DIALECT: tuple[tuple[str, str], ...] = ()  # translates schema.sql
    tables: frozenset[str] = frozenset()  # those of ours that are there

    def execute(self, sql: str, *values: Any) -> Any:
        """Execute a statement in SQLite's dialect; return its cursor."""
        raise NotImplementedError

    def find_columns(self) -> list[Column]:
        """Return the columns of our tables, as far as they are there."""
        return [
            Column(*row)
            for row in self.execute(self.COLUMNS_QUERY, encode_json(TABLES))
        ]

    def translate_schema(self, sql: str) -> str:
        """Return a part of schema.sql in the dialect of the database."""
        for pattern, replacement in self.SCHEMA_DIALECT:
            sql = re.sub(pattern, replacement, sql)
        return sql

    def upgrade(self) -> None:
        """Make the tables those of schema.sql; a reader only checks them.

        A column that is missing is added if it has a default. Other tables are
        ignored. Raises Unusable if our tables have other columns.
        """
        columns = {
            (column.table, column.name): column for column in self.find_columns()
        }
        self.tables = frozenset(table for table, _ in columns)
        missing = set(TABLES) - self.tables
        if self.tables and missing - ADDED_TABLES:
            raise Unusable(
                f"it has a table {min(self.tables)}, but no "
                f"{min(missing - ADDED_TABLES)}, as in schema.sql; choose another --db"
            )
        statements = []
        for table, name, type_, default in find_schema_columns():
            type_ = self.translate_schema(type_)
            found = columns.get((table, name))
            if table in missing:
                continue  # schema.sql makes the whole table
            if found is None and default is not None:
                added = f"{name} {type_} NOT NULL DEFAULT {default}"
                statements.append(f"ALTER TABLE {table} ADD COLUMN {added}")
            elif found is None or found.type.upper() != type_:
                raise Unusable(
                    f"its table {table} has no column {name} of type {type_}, as in "
                    "schema.sql; choose another --db"
                )
        if self.can_write and (statements or missing):
            statements += self.translate_schema(read_schema()).split(";\n")
            for statement in statements:  # SQLite's executescript() would commit first
                self.execute(statement)
            self.tables = frozenset(TABLES)

    def commit(self) -> None:
        self.execute("COMMIT")

    def close(self) -> None:
        """Roll back what is not committed."""
        if self.connection is not None:
            self.connection.close()

    def check_rule(self, rule: Rule) -> None:
        """Raise Unusable if the database was filled under another rule."""
        kept = self.read_rule()
        if kept and not kept.is_same(rule):
            raise Unusable(
                f"was filled under the rule {kept}; the rule of this load is {rule}; "
                "use that rule or another --db"
            )

    def read_rule(self) -> Rule | None:
        """Return the rule under which the database was filled, if it was."""
        cursor = self.execute("SELECT * FROM load_log LIMIT 1")
        row = cursor.fetchone()
        if row is None:
            return None
        columns = [column[0] for column in cursor.description]
        kept = dict(zip(columns, row, strict=True))
        # Version 1.0.0 knew no other event name.
        names = STRINGS_DECODER.decode(kept.get("event_names", '["user_engagement"]'))
        globs = STRINGS_DECODER.decode(kept["valuable_events"])
        minimum = kept["min_engagement_msec"]
        return Rule(kept["timezone"], tuple(names), minimum, tuple(globs))

    def read_counts(self, condition: str = "", *values: str) -> dict[str, int]:
        """Return the counts of active_user_table by date, in order."""
        query = f"SELECT date, active_user_count FROM active_user_table {condition}"
        rows = self.execute(f"{query} ORDER BY date", *values)
        return {str(day): count for day, count in rows}

    def count_users(self, day: str) -> int:
        """Return how many users active_user holds on a date."""
        query = "SELECT count(*) FROM active_user WHERE date = ?"
        return int(self.execute(query, day).fetchone()[0])

    def is_committed(self, report: Report) -> bool:
        """Tell whether load_log has the row of this report, with all of its lines."""
        query = "SELECT count(*) FROM load_log WHERE load_id = ? AND lines = ?"
        cursor = self.execute(query, report.load_id, report.tally.lines)
        return bool(cursor.fetchone()[0])

    def find_loaded(self, paths: list[str], dates: DateRange) -> set[FileVersion]:
        """Return the versions of files that were loaded with all of these dates."""
        if "loaded_file" not in self.tables:
            return set()
        # last_date is NULL if the load reached tomorrow; see log_load().
        query = """SELECT path, version FROM loaded_file
            WHERE path IN (SELECT value FROM json_each(?) AS value)
                AND first_date <= ? AND (last_date >= ? OR last_date IS NULL)"""
        rows = self.execute(query, encode_json(paths), dates.first, dates.last)
        return set(map(FileVersion._make, rows))

    def upsert(self, table: str, row: dict[str, Any]) -> None:
        """Insert a row, or bring it up to date. The first column is the key."""
        key, *others = row
        columns = ", ".join(row)
        marks = ", ".join("?" * len(row))
        updates = ", ".join(f"{name} = excluded.{name}" for name in others)
        sql = f"""INSERT INTO {table} ({columns}) VALUES ({marks})
            ON CONFLICT ({key}) DO UPDATE SET {updates}"""
        self.execute(sql, *row.values())

    def add_users(self, day: str, staging: Staging, is_trial: bool) -> Changes:
        """Add the users of a load to a date. Count the new ones; a trial adds none."""
        changes = Changes()
        for users in staging.get_users(day):
            array = encode_json(users)
            changes.loaded += len(users)
            if is_trial:
                changes.added += self.execute(COUNT_NEW_USERS, array, day).fetchone()[0]
            else:
                changes.added += self.execute(INSERT_USERS, day, array).rowcount
        return changes

    def store_date(self, day: str, staging: Staging, replace: bool) -> DateCount:
        """Store the users of a load on a date, beside those that are there.

        With replace, they take the place of those that are there.
        """
        held = self.count_users(day)
        table_count = self.read_counts("WHERE date = ?", day).get(day)
        if table_count is not None and held < table_count and not replace:  # final
            left_out = sum(map(len, staging.get_users(day)))
            return DateCount(day, table_count, Changes(left_out=left_out))
        if replace and held:
            changes = self.replace_users(day, staging, held)
        else:
            changes = self.add_users(day, staging, is_trial=not self.can_write)
        count = held + changes.added - changes.removed
        if self.can_write and (changes.added or changes.removed):
            # A trigger may have rejected or deleted users.
            count = self.count_users(day)
            changes.correct(count - held)
        if self.can_write and count != table_count:
            row = {"date": day, "active_user_count": count}
            self.upsert("active_user_table", row)
        return DateCount(day, count, changes)

    def replace_users(self, day: str, staging: Staging, held: int) -> Changes:
        """Put the users of a load in the place of those on a date."""
        changes = self.add_users(day, staging, is_trial=True)
        common = changes.loaded - changes.added  # users that are there, and stay
        changes.removed = held - common
        if self.can_write and (changes.added or changes.removed):
            self.execute("DELETE FROM active_user WHERE date = ?", day)
            self.add_users(day, staging, is_trial=False)
        return changes


# -- SQLite and PostgreSQL -------------------------------------------------------------


class SQLite(Database):
    """A transaction on an SQLite file, or in memory if there is no file to read."""

    COLUMNS_QUERY = """SELECT t.name, c.name, c.type, c.dflt_value
        FROM sqlite_master AS t, pragma_table_info(t.name) AS c
        WHERE t.type = 'table' AND t.name IN (SELECT value FROM json_each(?))"""

    def __init__(self, path: str, lock_timeout: float) -> None:
        self.path = path
        self.lock_timeout = lock_timeout

    def begin(self, can_write: bool) -> None:
        """Open the file and begin a transaction. A writer waits for its turn.

        A file that a failed first load has created stays, since another process
        may have opened it.
        """
        self.can_write = can_write
        exists = False
        with contextlib.suppress(FileNotFoundError):
            os.stat(self.path)  # os.path.exists() would hide a PermissionError
            exists = True
        if exists and not os.path.isfile(self.path):
            raise Unusable("is not a regular file; choose another --db")
        if exists or can_write:
            # A reader may have to roll back the journal of a killed writer.
            # SQLite falls back to reading if the file is read-only.
            mode = "rwc" if can_write else "rw"
            self.connect(f"file:{quote_path(self.path)}?mode={mode}")
            # Large pages need fewer page splits when users are inserted; the
            # cache holds the pages that a load touches when it is repeated.
            self.execute("PRAGMA page_size = 16384")  # bytes
            self.execute("PRAGMA cache_size = -16384")  # KiB, if it is negative
        else:
            self.connect("file::memory:")
            self.connection.executescript(read_schema())
        self.execute("BEGIN IMMEDIATE" if can_write else "BEGIN")

    def connect(self, uri: str) -> None:
        # The busy timeout is short, because execute() tries again: so a signal
        # is handled while the loader waits for a lock.
        self.connection = sqlite3.connect(
            uri, timeout=0.1, isolation_level=None, uri=True
        )

    def execute(self, sql: str, *values: Any) -> Any:
        """Execute a statement, again and again while another program has the lock."""
        deadline = time.monotonic() + self.lock_timeout
        while True:
            try:
                return self.connection.execute(sql, values)
            except sqlite3.OperationalError as error:
                is_locked = find_error_code(error) == "SQLITE_BUSY"
                if not is_locked or time.monotonic() > deadline:
                    raise


def quote_path(path: str) -> str:
    """Return an absolute path with symbolic links resolved, as a part of a URI.

    Importing urllib.parse for this would take 2 % of a small load.
    """
    real = os.fsencode(os.path.realpath(path))
    return re.sub(rb"[^\w/.-]", lambda byte: b"%%%02X" % ord(byte[0]), real).decode()


@lru_cache(maxsize=1)
def find_schema_columns() -> list[Column]:
    """Return the columns of schema.sql. Raises LoadError."""
    with contextlib.closing(SQLite("", LOCK_SECONDS)) as db, about(SCHEMA):
        db.begin(can_write=False)
        return db.find_columns()


class Postgres(Database):
    """A transaction on a PostgreSQL database."""

    SCHEMA_DIALECT = (  # translates schema.sql, as translate_query() does queries
        (r" WITHOUT ROWID", ""),
        (r"\bINTEGER\b", "BIGINT"),
        (r"\bREAL\b", "DOUBLE PRECISION"),
        (r"DROP VIEW IF EXISTS \w+", ""),  # views of others may depend on ours
        (r"CREATE VIEW", "CREATE OR REPLACE VIEW"),
        (
            r"date\(([\w.]+), '([+-]\d+) days'\)",
            r"CAST(\1 + INTERVAL '\2 days' AS DATE)",
        ),
        (r"julianday", ""),  # the difference of two dates is a number of days
    )
    COLUMNS_QUERY = """SELECT relname, attname, format_type(atttypid, atttypmod), NULL
        FROM pg_class JOIN pg_attribute ON attrelid = pg_class.oid
        WHERE relname IN (SELECT value FROM json_each(?) AS value)
            AND pg_table_is_visible(attrelid) AND attnum > 0 AND NOT attisdropped"""

    def __init__(self, url: str, lock_timeout: float) -> None:
        import psycopg

        self.url = url
        self.lock_timeout = lock_timeout
        self.answer_seconds = max(ANSWER_SECONDS, lock_timeout + 5)
        parameters: dict[str, Any] = {
            "connect_timeout": os.environ.get("PGCONNECT_TIMEOUT", 10),  # seconds
            # The system's own keepalives notice a lost network after two hours.
            "keepalives_idle": 30,  # seconds
            "keepalives_interval": 10,  # seconds
            "keepalives_count": 3,
            "tcp_user_timeout": 60_000,  # milliseconds
            **parse_postgres_url(url),
            "client_encoding": "UTF8",
            # Named prepared statements don't pass through a transaction pooler.
            "prepare_threshold": None,
        }
        self.connection = psycopg.connect(autocommit=True, **parameters)

    def begin(self, can_write: bool) -> None:
        """Begin a transaction. A writer waits until loads before it are committed."""
        self.can_write = can_write
        mode = "READ WRITE" if can_write else "READ ONLY"
        self.execute(f"BEGIN ISOLATION LEVEL READ COMMITTED {mode}")
        milliseconds = max(1, round(self.lock_timeout * 1000))
        self.execute(f"SET LOCAL lock_timeout = {milliseconds}")
        # Raise an error rather than return only the rows that row security
        # shows, which would give wrong counts.
        self.execute("SET LOCAL row_security = off")
        if can_write:
            self.execute("SELECT pg_advisory_xact_lock(hashtext('load_active_users'))")
        query = """SELECT relnamespace::regnamespace FROM pg_class
            WHERE relname = 'load_log' AND relkind = 'r'
                AND to_regclass('load_log') IS NULL"""
        row = self.execute(query).fetchone()
        if row:
            raise Unusable(
                f"its tables are in schema {row[0]}, which search_path leaves out, or "
                "the role may not use"
            )

    def execute(self, sql: str, *values: Any) -> Any:
        with time_limit(self.answer_seconds):
            return self.connection.execute(translate_query(sql), values or None)

    def commit(self) -> None:
        """Commit. Raises InDoubt if the server does not say that it has committed.

        COMMIT may wait for a standby without end, and is done all the same if
        the client goes away.
        """
        import psycopg

        try:
            self.execute("COMMIT")
        except (psycopg.OperationalError, TimeoutError) as error:
            raise InDoubt(
                f"{redact(self.url)}: no answer to COMMIT "
                f"({describe_error(error, self.url)}); the load may be committed; "
                "load again to be sure"
            ) from None


@lru_cache(maxsize=256)
def translate_query(sql: str) -> bytes:
    """Translate a query from SQLite's dialect to PostgreSQL's.

    "json_each(?) AS value" suits both. In SQLite, json_each() has a column
    named "value". In PostgreSQL, the alias of a function names its only column.
    """
    sql = sql.replace("json_each", "json_array_elements_text")
    return sql.replace("?", "%s").encode()


def is_postgres(target: str) -> bool:
    return re.match(r"postgres(ql(\+psycopg)?)?://", target) is not None


def parse_postgres_url(url: str) -> dict[str, Any]:
    """Return the connection parameters in a PostgreSQL URL. Raises ValueError.

    libpq accepts almost any URL: in loader:S3CRT/x@db it sees the host
    "loader", the port "S3CRT" and a database "x@db". Such a URL is refused.
    """
    with silence_libraries():
        from psycopg import ProgrammingError
        from psycopg.conninfo import conninfo_to_dict

    try:
        parameters = conninfo_to_dict(url.replace("+psycopg", "", 1))
    except ProgrammingError:
        raise ValueError(TARGET_EXPECTED) from None
    place = "".join(str(parameters.get(name)) for name in ("host", "port", "dbname"))
    if "@" in place or not re.fullmatch(r"[\d,]*", str(parameters.get("port") or "")):
        raise ValueError(TARGET_EXPECTED)
    return parameters


@contextlib.contextmanager
def transaction(
    target: str, can_write: bool = False, lock_timeout: float = LOCK_SECONDS
) -> Iterator[SQLite | Postgres]:
    """Open a transaction, which commits on success and rolls back on an error.

    A writer creates the tables that are missing. A reader that finds none gets
    an empty SQLite database in memory, even if the target is PostgreSQL. Raises
    LoadError.
    """
    with about(target), contextlib.ExitStack() as stack:
        kind = Postgres if is_postgres(target) else SQLite
        db: SQLite | Postgres = kind(target, lock_timeout)
        stack.callback(db.close)
        db.begin(can_write)
        db.upgrade()
        if not (can_write or db.tables):
            db = SQLite("", lock_timeout)
            stack.callback(db.close)
            db.begin(can_write)
        yield db
        db.commit()


# -- Loading ---------------------------------------------------------------------------


class Job(Struct):
    """What is to be loaded, into which database, and under which rule."""

    events: tuple[str, ...]  # as given
    target: str  # --db
    rule: Rule
    dates: DateRange = DateRange()  # --dates
    replace: bool = False
    validate: bool = False
    dry_run: bool = False
    max_bad_records: int = 0
    stopper: Stopper = msgspec.field(default_factory=lambda: Stopper())  # defined below

    def choose_dates(self) -> LoadDates:
        """Return the dates of a load that begins now. Raises ValueError, LoadError."""
        return LoadDates.choose(self.rule.timezone, self.dates, self.replace)


class Report(Struct):
    """What a run has loaded so far: in one load, or with --commit-every in many."""

    load_id: str = msgspec.field(default_factory=lambda: os.urandom(8).hex())
    started: float = msgspec.field(default_factory=time.monotonic)  # seconds
    loads: int = 0
    tally: Tally = msgspec.field(default_factory=Tally)
    counts: dict[str, DateCount] = msgspec.field(default_factory=dict)  # by date
    files_read: int = 0
    skipped_files: int = 0  # unchanged, with --incremental
    shows_removed: bool = False  # with --replace

    def changes(self) -> Changes:
        """Return the changes on all dates, added up."""
        changes = (count.changes for count in self.counts.values())
        return reduce(Changes.plus, changes, Changes())

    def add(self, tally: Tally, counts: list[DateCount]) -> Report:
        """Return the report with one more load."""
        latest = dict(self.counts)
        for count in counts:
            before = self.counts.get(count.date)
            changes = count.changes.plus(before.changes) if before else count.changes
            latest[count.date] = count._replace(changes=changes)
        return msgspec.structs.replace(
            self,
            loads=self.loads + 1,
            tally=self.tally.plus(tally),
            counts=dict(sorted(latest.items())),
        )


class Intake:
    """Takes batches into a load: shows bad records and progress, keeps the rejects."""

    def __init__(self, rejects: Any = None, bar: Any = None) -> None:
        self.rejects = rejects  # a file, to which all bad records are appended
        self.bar = bar
        self.range_: Range | None = None  # of the latest batch
        self.lines = 0  # of its source, so far

    def take(self, staging: Staging, range_: Range, batch: Batch) -> None:
        """Add a batch to a load. Raises LoadError."""
        if range_ is not self.range_ and range_.start == 0:
            self.lines = 0  # a source begins
        self.range_ = range_
        may_report = max(MAX_REPORTED - staging.tally.bad_records, 0)
        for bad in batch.bad[:may_report]:
            place = f"{redact(range_.source)}:{self.lines + bad.line}"
            say(f"{place}: {bad.reason}")
        self.lines += batch.tally.lines
        if self.rejects and batch.bad:
            with about(self.rejects.name):
                self.rejects.writelines(bad.record + b"\n" for bad in batch.bad)
                self.rejects.flush()
        staging.add(batch)
        if self.bar is not None:
            with contextlib.suppress(OSError):
                self.bar.update(batch.tally.bytes)

    def show_writing(self) -> None:
        """Show that everything has been read."""
        if self.bar is not None:
            with contextlib.suppress(OSError):
                self.bar.set_description_str("writing", refresh=sys.stderr.isatty())


@contextlib.contextmanager
def open_rejects(path: str) -> Iterator[Any]:
    """Open a file or pipe to append bad records to, each on its own line."""
    is_file = os.path.isfile(path) or not os.path.exists(path)
    with about(path):
        file = open(path, "a+b" if is_file else "ab")
        if file.seekable() and file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            file.write(b"" if file.read(1) == b"\n" else b"\n")
    try:
        yield file
    finally:
        with contextlib.suppress(OSError):  # what could be written has been flushed
            file.close()


def skip_unchanged(job: Job, dates: LoadDates, sources: list[str]) -> list[str]:
    """Return the sources without those that --incremental need not read.

    A file is skipped if an earlier load has read the same version of it, and
    counted all dates that this load counts. Raises LoadError.
    """
    counted = dates.counted
    if counted.last > dates.usual.last:
        return sources  # no load can have seen all events after tomorrow
    versions = {source: find_version(source) for source in sources}
    with transaction(job.target) as db:
        paths = [version.path for version in versions.values() if version]
        loaded = db.find_loaded(paths, counted)
    return [source for source in sources if versions[source] not in loaded]


def load_once(
    job: Job,
    dates: LoadDates,
    intake: Intake,
    scanned: Scanned,
    versions: Iterable[FileVersion],
    report: Report,
) -> Report:
    """Load what is scanned in one transaction; return the report with this load.

    The versions are those of the files that are scanned. Raises LoadError.
    """
    staging = Staging(dates)
    with contextlib.closing(staging), contextlib.closing(scanned):
        for range_, batch in scanned:
            job.stopper.check()
            intake.take(staging, range_, batch)
        intake.show_writing()
        refuse_bad_records(job, staging, report)
        # With --dates, early dates are wanted. If files were skipped, a small
        # new file may well hold nothing else.
        if job.dates == DateRange() and not report.skipped_files:
            refuse_early_events(staging.tally)
        report = commit(job, staging, report, versions)
        if not job.dry_run:
            job.stopper.outcome = COMMITTED
        return report


def refuse_early_events(tally: Tally) -> None:
    """Raise LoadError if all active events are dated before 2000: a wrong unit."""
    if tally.too_early and tally.too_early == tally.active_events:
        raise LoadError(
            f"all active events ({tally.too_early}) are dated before 2000: "
            "event_timestamp must be in microseconds UTC "
            "(to load such dates, give --dates)"
        )


def refuse_bad_records(job: Job, staging: Staging, report: Report) -> None:
    """Raise LoadError if a load has more bad records than are tolerated."""
    number = staging.tally.bad_records
    if number > MAX_REPORTED:
        say(f"and {format_number(number - MAX_REPORTED, 'more bad records')}")
    if number > job.max_bad_records:
        raise LoadError(
            f"bad records: {number}, more than --max-bad-records "
            f"{job.max_bad_records}; nothing was loaded"
            + (" since the last commit" if report.loads else "")
        )


# -- Committing a load -----------------------------------------------------------------


def commit(
    job: Job,
    staging: Staging,
    report: Report,
    versions: Iterable[FileVersion] = (),
    lock_timeout: float = LOCK_SECONDS,
) -> Report:
    """Store a load in one transaction; return the report with this load.

    Nothing is stored if an earlier COMMIT of this load had no answer, but has
    succeeded. While it runs, job.stopper.outcome says what becomes of the load
    if a signal ends it. Raises LoadError, Unavailable, InDoubt.
    """
    job.stopper.outcome = MAYBE_COMMITTED if staging.unanswered else ROLLED_BACK
    try:
        with transaction(job.target, not job.dry_run, lock_timeout) as db:
            if staging.unanswered and db.is_committed(staging.unanswered):
                report = staging.unanswered
            else:
                report = store_load(db, job, staging, report, versions)
            if db.can_write:
                job.stopper.check()
                job.stopper.outcome = MAYBE_COMMITTED
            # The end of this block commits.
    except InDoubt:
        staging.unanswered = report
        raise
    return report


def store_load(
    db: Database,
    job: Job,
    staging: Staging,
    report: Report,
    versions: Iterable[FileVersion],
) -> Report:
    """Store a load; return the report with it."""
    db.check_rule(job.rule)  # another load may have filled it meanwhile
    replaced = staging.dates.wanted.days() if job.replace else set()
    counts = [
        db.store_date(day, staging, day in replaced)
        for day in sorted(staging.days | replaced)
    ]
    report = report.add(staging.tally, counts)
    if db.can_write:
        log_load(db, job, staging.dates, report, versions)
    return report


def log_load(
    db: Database,
    job: Job,
    dates: LoadDates,
    report: Report,
    versions: Iterable[FileVersion],
) -> None:
    """Store the rows of a load in load_log and loaded_file."""
    loaded_at = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    db.upsert("load_log", make_log_row(job, dates, report, loaded_at))
    # NULL if the load reached tomorrow, the usual last date. Stored as a date,
    # it would make the next night's load, which wants one date more, read every
    # file.
    is_open = dates.counted.last >= dates.usual.last
    shared = {
        "loaded_at": loaded_at,
        "load_id": report.load_id,
        "first_date": dates.counted.first,
        "last_date": None if is_open else dates.counted.last,
    }
    for version in versions:
        db.upsert("loaded_file", version._asdict() | shared)


def make_log_row(
    job: Job, dates: LoadDates, report: Report, loaded_at: str
) -> dict[str, Any]:
    """Return the row of load_log for a run."""
    tally = asdict(report.tally)
    del tally["too_early"], tally["too_late"]
    changes = asdict(report.changes())
    del changes["loaded"]
    return {
        "load_id": report.load_id,
        "loaded_at": loaded_at,
        "seconds": round(time.monotonic() - report.started, 3),
        "sources": encode_names([redact(source) for source in job.events]),
        "timezone": job.rule.timezone,
        "event_names": encode_names(job.rule.event_names),
        "min_engagement_msec": job.rule.min_engagement_msec,
        "valuable_events": encode_names(job.rule.valuable_events),
        "dates": str(dates.wanted),
        "replaced": int(job.replace),
        **tally,
        **changes,
        "skipped_files": report.skipped_files,
    }


def encode_names(names: Iterable[str]) -> str:
    """Return names as a JSON array that a database of any encoding can hold."""
    valid = [os.fsencode(name).decode(errors="backslashreplace") for name in names]
    return escape_beyond_ascii(encode_json(valid))


def warn(job: Job, report: Report) -> None:
    """Warn of a load without any event that could be counted."""
    tally = report.tally
    if report.skipped_files:
        return  # a small new file may well hold nothing else
    if tally.lines > tally.blank_lines and not tally.engagement_events:
        say(
            f"Warning: none of the lines ({tally.lines}) is an engagement event "
            f"({', '.join(job.rule.event_names)}); is this BigQuery's export of Google "
            "Analytics, one event per line?"
        )
    for number, text in (
        (tally.too_early, "before 2000; is event_timestamp in microseconds?"),
        (tally.too_late, "after tomorrow; is this machine's clock right?"),
    ):
        if number and number == tally.active_events:
            say(f"Warning: all active events are dated {text}")


# -- Loading what arrives --------------------------------------------------------------
#
# A live load is a sequence of ordinary loads, each of the whole lines that came
# in an interval. If the database can't be used, intervals wait in memory and
# are tried again. Memory is bounded: then the pipe is read no further, and its
# producer has to wait.

LIVE_LOCK_SECONDS = 0.5  # to wait for a lock; meanwhile SQLite lets no new reader in
# Bytes of users in memory. If there are more, they are committed before the
# interval is over, so that a commit locks readers out for a moment only.
LIVE_BYTES = 256 << 10
POLL_SECONDS = 0.2  # to wait for input before looking whether a commit is due
READ_BYTES = 1 << 20


def receive(pipe: str, stopper: Stopper) -> Iterator[Range]:
    """Yield what arrives on a pipe as ranges of whole lines, until it ends or a signal.

    A range is empty if nothing arrived for POLL_SECONDS. Raises Unusable.
    """
    is_input = pipe == "-"
    # It may be long until the other end of a named pipe is opened: do not wait for it.
    descriptor = 0 if is_input else os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with open(descriptor, "rb", buffering=0, closefd=not is_input):
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        held = bytearray()  # a line that has not ended
        start = 0
        has_ended = False
        while not (has_ended or stopper.signals):
            searched = len(held)  # these bytes hold no line end
            if poll.poll(POLL_SECONDS * 1000):
                held += os.read(descriptor, READ_BYTES)
                has_ended = len(held) == searched
            length = held.rfind(b"\n", searched) + 1
            yield Range(pipe, start, data=bytes(held[:length]))
            start += length
            del held[:length]
            if len(held) > MAX_LINE:
                raise Unusable(TOO_LONG)
        if held and not stopper.signals:
            # A signal that ended the producer may be on its way to us as well.
            time.sleep(POLL_SECONDS)
        if held and not stopper.signals:  # the last line may lack its newline
            yield Range(pipe, start, data=bytes(held))
        elif held:
            say(
                f"{pipe}: the last line had not ended: "
                f"its {len(held)} bytes were left out"
            )


class LiveLoad:
    """Loads what arrives, and commits it every few seconds."""

    def __init__(self, job: Job, intake: Intake, every: float) -> None:
        self.job = job
        self.intake = intake
        self.every = every  # seconds between commits
        self.due = time.monotonic() + every
        self.report = Report()
        self.staging = Staging(job.choose_dates())  # of this interval
        self.waiting: list[Staging] = []  # intervals that are not committed yet
        self.lines_read = 0

    def run(self, sources: list[str]) -> Report:
        """Load the sources, one after another. Raises LoadError, Stopped."""
        stopper = self.job.stopper
        stopper.ends_quietly = False
        # While it reads, signals are only recorded: they end the reading.
        with stopper.tolerate(sys.maxsize), self.tell_loss():
            try:
                # Each step has taken a batch, or found no input for a moment.
                for _ in self.take_batches(sources):
                    self.commit_when_due()
                self.close_interval()
            except LoadError:
                self.commit_after_failure()
                raise
            self.commit_waiting(LOCK_SECONDS)
            stopper.outcome = COMMITTED
        return self.report

    @contextlib.contextmanager
    def tell_loss(self) -> Iterator[None]:
        """If the load fails, say which lines are not stored."""
        try:
            yield
        except (LoadError, Stopped):
            lost = self.lines_read - self.report.tally.lines
            if lost and self.intake.range_:
                place = f"{redact(self.intake.range_.source)}:{self.intake.lines}"
                in_doubt = self.job.stopper.outcome == MAYBE_COMMITTED
                say(
                    f"not stored: the last lines that were read ({lost}), up to {place}"
                    + ("; some of them may be committed" if in_doubt else "")
                )
            raise

    def commit_after_failure(self) -> None:
        """Commit what was read before the load failed, as far as possible.

        If this fails as well, tell_loss() says which lines are not stored.
        """
        with contextlib.suppress(LoadError):
            self.close_interval()
        with contextlib.suppress(LoadError):
            self.commit_waiting(LOCK_SECONDS)

    def take_batches(self, sources: list[str]) -> Iterator[None]:
        """Take what arrives; yield after each batch, and if nothing has come."""
        stopper = self.job.stopper
        for number, source in enumerate(sources, 1):
            is_endless = is_pipe(source)
            with about(source):
                ranges: Iterable[Range] = (
                    receive(source, stopper)
                    if is_endless
                    else split_source(source, RANGE_BYTES)
                )
                for range_ in ranges:
                    # More of a file can be read another time, but not of a pipe.
                    if stopper.signals and not is_endless:
                        break
                    yield from self.take_range(range_)
            if stopper.signals:
                later = len(sources) - number
                if later or not is_endless:
                    say(
                        f"{redact(source)}: may not have been read to its end; "
                        f"later sources not read: {later}"
                    )
                return

    def take_range(self, range_: Range) -> Iterator[None]:
        """Take the batches of a range."""
        keep = self.intake.rejects is not None
        dates = self.staging.dates
        scanner = Scanner(self.job.rule, dates, self.job.validate, keep)
        with contextlib.closing(scanner(range_)) as batches:
            for batch in batches:
                self.lines_read += batch.tally.lines
                if batch.tally.lines or batch.tally.bytes:
                    self.intake.take(self.staging, range_, batch)
                yield
                if self.job.stopper.signals and range_.data is None:
                    return

    def commit_when_due(self) -> None:
        """Commit if the interval is over, or if there is no room for more users.

        If the database is unavailable and there is no room, wait here, so that
        no more is read, and try again whenever an interval is over.
        """
        stopper = self.job.stopper
        is_early = self.is_full() and not self.waiting
        if (is_early or self.is_due()) and not stopper.signals:
            self.commit_interval()
        while self.is_full() and not stopper.signals:
            time.sleep(POLL_SECONDS)
            if self.is_due():
                self.commit_interval()

    def is_due(self) -> bool:
        return time.monotonic() >= self.due

    def is_full(self) -> bool:
        """Tell whether no more users may wait in memory."""
        stagings = [self.staging, *self.waiting]
        return sum(one.size + OBJECT_OVERHEAD for one in stagings) > LIVE_BYTES

    def close_interval(self) -> None:
        """Begin a new interval. Raises LoadError if bad records refuse the old one."""
        staging = self.staging
        self.staging = Staging(self.job.choose_dates())
        refuse_bad_records(self.job, staging, self.report)
        if staging.tally.lines:
            self.waiting.append(staging)

    def commit_interval(self) -> None:
        """Commit the interval. Raises LoadError.

        If the database is unavailable, keep it, and print a message the first
        time.
        """
        is_told = bool(self.waiting)
        self.close_interval()
        try:
            self.commit_waiting(0)
        except Unavailable as error:
            if not is_told:
                say(
                    f"{error}; what was read waits, trying again every {self.every:g} s"
                )
        self.due = time.monotonic() + self.every

    def commit_waiting(self, patience: float) -> None:
        """Commit the intervals that wait, each in a transaction.

        Retries until some seconds have passed. Signals that came before are
        tolerated; if none came, one is. The next raises Stopped. Raises
        LoadError, Unavailable.
        """
        deadline = time.monotonic() + patience
        stopper = self.job.stopper
        with stopper.tolerate(max(1, len(stopper.signals))):
            while self.waiting:
                staging = self.waiting[0]
                timeout = max(deadline - time.monotonic(), LIVE_LOCK_SECONDS)
                try:
                    self.report = commit(self.job, staging, self.report, (), timeout)
                    stopper.outcome = ROLLED_BACK  # of the intervals that wait
                    self.waiting.pop(0).close()
                except Unavailable:
                    if time.monotonic() >= deadline:
                        raise
                    time.sleep(POLL_SECONDS)


# -- The report ------------------------------------------------------------------------

REMARKS = ("anonymous_events", "out_of_range_events", "bad_records")
TALLIES = ("lines", "engagement_events", "active_events", *REMARKS)
COLUMN_NAMES = ("date", "active_user_count", "added", "removed")


def list_rows(report: Report) -> list[tuple[str, int, int, int]]:
    """Return the rows of the report, with the columns COLUMN_NAMES."""
    return [
        (date_, count, changes.added, changes.removed)
        for date_, count, changes in report.counts.values()
    ]


def format_json(report: Report) -> str:
    """Return the report as one JSON object."""
    dates = [dict(zip(COLUMN_NAMES, row, strict=True)) for row in list_rows(report)]
    tallies = {name: getattr(report.tally, name) for name in TALLIES}
    return encode_json(
        {
            "dates": dates,
            **tallies,
            "left_out": report.changes().left_out,
            "skipped_files": report.skipped_files,
        }
    )


def format_csv(report: Report) -> str:
    rows = [COLUMN_NAMES, *list_rows(report)]
    return "\n".join(",".join(map(str, row)) for row in rows)


def format_table(report: Report) -> str:
    """Return a line with a bar for each date, then a summary of the input lines.

    Users that this load added are the end of the bar, in another colour.
    """
    import shutil

    skipped = format_number(report.skipped_files, "unchanged files") + " skipped"
    if report.skipped_files and not report.files_read:
        return skipped
    width = shutil.get_terminal_size().columns
    lines = align_columns(report)
    counts = list(report.counts.values())
    largest = max((count.active_user_count for count in counts), default=0)
    room = max(width - len(lines[0]) - 2, 0)
    bars = ["", *(draw_bar(count, room, largest) for count in counts)]
    lines = [f"{line}  {bar}".rstrip() for line, bar in zip(lines, bars, strict=True)]
    text = summarize(report) + (f"; {skipped}" if report.skipped_files else "")
    return "\n".join([*lines, textwrap.fill(text, width, break_on_hyphens=False)])


def align_columns(report: Report) -> list[str]:
    """Return the heading and the rows: a date to the left, numbers to the right."""
    names = COLUMN_NAMES if report.shows_removed else COLUMN_NAMES[:-1]
    rows = [row[: len(names)] for row in list_rows(report)]
    cells = [names, *(tuple(map(str, row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join([day.ljust(10), *map(str.rjust, numbers, widths[1:])])
        for day, *numbers in cells
    ]


def draw_bar(count: DateCount, room: int, largest: int) -> str:
    """Return a bar, which is as wide as the room for the largest count."""
    users = count.active_user_count
    length = -(-users * room // max(largest, 1))
    if not length:
        return ""
    new = min(length * count.changes.added // users, length)
    old = click.style("█" * (length - new), fg="blue")
    return old + click.style("█" * new, fg="green")


def format_number(number: int, nouns: str) -> str:
    """Return a number with its noun: "1 line", "2 lines"."""
    return f"{number} {nouns[:-1] if number == 1 else nouns}"


def summarize(report: Report) -> str:
    """Return what became of the lines, in words."""
    tally = report.tally
    changes = report.changes()
    removed = f", {changes.removed} removed" if changes.removed else ""
    new = f"{changes.added} new{removed}"
    user_days = f"{format_number(changes.loaded, 'user-days')} ({new})"
    steps = [
        format_number(tally.lines, "lines"),
        format_number(tally.engagement_events, "engagement events"),
        f"{tally.active_events} active",
        # The users of several loads overlap, so they can't be added up.
        f"{new} user-days" if report.loads > 1 else user_days,
    ]
    remarks = [
        format_number(getattr(tally, name), name.replace("_", " "))
        for name in REMARKS
        if getattr(tally, name)
    ]
    if changes.left_out:
        users = format_number(changes.left_out, "users")
        remarks.append(f"{users} left out of final dates")
    return "; ".join([" → ".join(steps), *remarks])


def print_report(text: str) -> None:
    """Print the report. Raises LoadError."""
    is_plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    with (
        about("the report could not be written (the load is done)"),
        contextlib.suppress(BrokenPipeError),  # the reader has seen enough
    ):
        click.echo(text, color=False if is_plain else None)  # None: on a terminal


# -- The plot --------------------------------------------------------------------------

# Without a time of creation, the same rows give the same bytes.
PICTURE_METADATA: dict[str, dict[str, None]] = {
    ".png": {"Software": None},
    ".svg": {"Date": None},
    ".pdf": {"CreationDate": None},
}
NAN = float("nan")
MAX_NUMBERED_DAYS = 13  # that have room for their numbers and dates


def plot_table(path: str, target: str) -> None:
    """Draw the active_user_table of a database into a file. Raises LoadError.

    The file is replaced atomically when the picture is complete. If it is a
    symbolic link, its target is replaced.
    """
    # The error is raised inside, where the message gets the name of the database.
    with transaction(target) as db:
        if not (is_postgres(target) or os.path.exists(target)):
            raise Unusable("there is no such database; load events into it first")
        counts = db.read_counts()
        rule = db.read_rule()
    with about(f"{path}: the plot could not be drawn (any load is committed)"):
        path = os.path.realpath(path)
        unfinished = f"{path}.{os.urandom(4).hex()}"
        content = draw_picture(counts, rule, os.path.splitext(path)[1].lower())
        try:
            with open(unfinished, "xb") as file:
                file.write(content)
            if os.path.exists(path):
                os.chmod(unfinished, stat.S_IMODE(os.stat(path).st_mode))
            os.replace(unfinished, path)
        finally:
            with contextlib.suppress(OSError):
                os.unlink(unfinished)


def draw_picture(counts: dict[str, int], rule: Rule | None, suffix: str) -> bytes:
    """Return the picture of some counts by date, as a PNG, SVG or PDF file."""
    from matplotlib import style

    content = io.BytesIO()
    # The defaults, whatever a matplotlibrc says.
    with style.context(["default", {"svg.hashsalt": "load_active_users"}]):
        figure = draw_figure(counts, rule)
        figure.savefig(content, format=suffix[1:], metadata=PICTURE_METADATA[suffix])
    return content.getvalue()


def draw_figure(counts: dict[str, int], rule: Rule | None) -> Any:
    """Return a matplotlib figure of counts by date, with the rule below it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title("Active users per day", loc="left", fontsize=14)
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    parts = ["no dates yet"]
    if counts:
        draw_counts(axes, number_days(counts))
        parts = [" to ".join(sorted({min(counts), max(counts)}))]
    else:
        axes.set(xticks=[], yticks=[])
    if counts and rule:
        names, globs = ", ".join(rule.event_names), " ".join(rule.valuable_events)
        events = f"{names} of at least {rule.min_engagement_msec} ms"
        parts = [f"{rule.timezone} dates", events, globs, *parts]
    caption = textwrap.fill(" · ".join(parts), 140)
    figure.supxlabel(
        caption, parse_math=False, fontsize=8, color="0.4", x=0.01, ha="left"
    )
    return figure


def number_days(counts: dict[str, int]) -> dict[int, int]:
    """Return counts by the number of days since 1970-01-01, which matplotlib uses."""
    return {
        (date.fromisoformat(day) - EPOCH.date()).days: count
        for day, count in counts.items()
    }


def draw_counts(axes: Any, counts: dict[int, int]) -> None:
    """Draw a bar for each day, and grey where days have no count.

    A few days get their numbers. More days get the 7-day average.
    """
    first, last = min(counts), max(counts)
    span = last - first + 1
    is_short = span <= MAX_NUMBERED_DAYS
    half = 0.4 if span <= 100 else 0.5  # many bars touch each other
    # One outline of all bars, with NaN between them: axes.bar() would draw each
    # bar on its own, which takes seconds for many years.
    edges = [edge for day in counts for edge in (day - half, day + half)]
    heights = [height for count in counts.values() for height in (count, NAN)]
    color = "#7fa8d1" if is_short else "#b3cce6"
    axes.stairs(heights[:-1], edges, fill=True, color=color)
    draw_gaps(axes, list(counts))
    if is_short:
        draw_numbers(axes, counts, span)
    else:
        averages = week_averages(counts)
        axes.plot(
            list(averages),
            list(averages.values()),
            color="#1f3b5c",
            label="7-day average",
        )
    margin = max(0.6, (7 - span) / 2, span / 100)
    epoch = EPOCH.toordinal()
    earliest, latest = date.min.toordinal() - epoch, date.max.toordinal() - epoch
    axes.set_xlim(max(first - margin, earliest), min(last + margin, latest))
    axes.set_ylim(0, max(*counts.values(), 1) * 1.08)
    label_axes(axes, first, last)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(
            loc="lower right",
            bbox_to_anchor=(1, 1),
            ncols=2,
            frameon=False,
            fontsize=9,
        )


def draw_gaps(axes: Any, days: list[int]) -> None:
    """Draw grey where days are missing."""
    label: str | None = "no data"
    for before, after in itertools.pairwise(days):
        if after - before > 1:
            left, right = before + 0.5, after - 0.5
            axes.axvspan(left, right, color="0.93", linewidth=0, label=label)
            label = None  # one is enough for the legend


def draw_numbers(axes: Any, counts: dict[int, int], span: int) -> None:
    """Write each count above its bar, small enough that neighbours do not touch."""
    longest = len(f"{max(counts.values()):,}")
    points = min(9, 1000 / max(span, 7) / longest)
    for day, count in counts.items():
        axes.annotate(
            f"{count:,}",
            (day, count),
            (0, 3),
            textcoords="offset points",
            ha="center",
            fontsize=points,
        )


def label_axes(axes: Any, first: int, last: int) -> None:
    """Label the days and the counts."""
    from matplotlib import dates, ticker

    span = last - first + 1
    counts: Any = ticker.MaxNLocator(integer=True, steps=[1, 2, 5, 10])
    axes.yaxis.set_major_locator(counts)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    days: Any = dates.AutoDateLocator(maxticks=9)
    if span <= MAX_NUMBERED_DAYS:
        days = ticker.FixedLocator(range(first, last + 1))
        axes.tick_params(axis="x", labelsize=min(10, 100 / span))  # points
    elif span <= 70:
        days = dates.WeekdayLocator(dates.MONDAY)
    axes.xaxis.set_major_locator(days)
    label = "%a\n%Y-%m-%d" if span <= 70 else "%Y-%m-%d"
    axes.xaxis.set_major_formatter(dates.DateFormatter(label))


def week_averages(counts: dict[int, int]) -> dict[int, float]:
    """Return the average of each day and the six before it, over those with a count.

    It is NaN (no line) on the first six days, on days with fewer than four
    counts in their seven, and on the first day of a gap.
    """
    averages = {}
    first = min(counts)
    for day in counts:
        week = [counts[one] for one in range(day - 6, day + 1) if one in counts]
        is_known = day >= first + 6 and len(week) >= 4
        averages[day] = sum(week) / len(week) if is_known else NAN
        averages[day + 1] = NAN  # overwritten next, if that day has a count
    return averages


# -- Errors ----------------------------------------------------------------------------
#
# Whatever a user, the data, the machine or a library does wrong ends as one line:
#
#     NAME: what is wrong; what to do
#
# The sections above use about(), which makes such a line of any exception, and
# say(). No line shows a password, a token or the query of a URL.

REMEDIES = {  # by the code of an error
    "SQLITE_BUSY": "another program keeps it locked; try again when that is done",
    "SQLITE_READONLY": "make the file and its directory writable, or use another --db",
    "SQLITE_CANTOPEN": "make the file and its directory readable and writable",
    "SQLITE_FULL": "free some disk space and load again",
    "SQLITE_IOERR": "check the disk and load again",
    "SQLITE_NOTADB": "choose another --db",
    "SQLITE_CORRUPT": "restore it from a backup, or load all events into another --db",
    "55P03": "another session keeps it locked; try again when that is done",
    "ENOSPC": "free some disk space and load again",
    "EISDIR": "name the files in it",
}
# Beginnings of the codes of errors after which the same load may succeed.
# PostgreSQL's classes of two digits are: connection exception, invalid
# transaction state (ended by a timeout, or read-only), transaction rollback,
# insufficient resources, object not in prerequisite state (locked), operator
# intervention (shutdown, cancelled), system error.
# https://www.postgresql.org/docs/current/errcodes-appendix.html
TRANSIENT_CODES = (
    "SQLITE_BUSY",
    "SQLITE_CANTOPEN",
    "SQLITE_FULL",
    "SQLITE_IOERR",
    "SQLITE_READONLY",
    "0A000",  # a PostgreSQL server that is a standby, and may become the primary
    *("08", "25", "40", "53", "55", "57", "58"),
)
DAMAGED = ("EOFError", "BadGzipFile", "IsalError", "ZstdError")  # names of exceptions
MAX_MESSAGE = 500  # characters of what a library says
GCSFS_GRPC = "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"  # a variable; see silence_libraries()
# The start of a URL, also if a slash is missing, or something stands before it:
# --dbpostgresql://. Because of the lookbehind, a long word is tried once, and
# not from each of its letters.
URL_START = r"(?<![\w+.-])[\w+.-]*:/+"
PLAIN_MODULES = ("sqlite3", "psycopg", __name__)  # whose messages need no class name


@contextlib.contextmanager
def about(name: str, find_line: Callable[[], str] = lambda: "") -> Iterator[None]:
    """Raise whatever goes wrong in a block as a LoadError, or as Unavailable.

    Its message begins with the name: a source, a database or a file. If the
    block fails, find_line() is called for a line number to append, such as
    ":12".
    """
    try:
        yield
    except LoadError:
        raise
    except Exception as error:
        kind = Unavailable if is_transient(error) else LoadError
        text = describe_error(error, name)
        raise kind(f"{redact(name)}{find_line()}: {text}") from None


def say(text: str) -> None:
    """Print a line on standard error, above a progress bar, if it can be printed."""
    tqdm: Any = sys.modules.get("tqdm")
    with (
        contextlib.suppress(OSError),
        tqdm.tqdm.external_write_mode(sys.stderr) if tqdm else contextlib.nullcontext(),
    ):
        click.echo(escape_control_characters(text), err=True)


def escape_control_characters(text: str) -> str:
    """Escape what is not printable, so that data can't send commands to a terminal."""
    return "".join(
        one if one.isprintable() else one.encode("unicode_escape").decode()
        for one in text
    )


def describe_error(error: Any, about_name: str = "") -> str:
    """Return what an exception says, in one line, with a remedy if one is known.

    Secrets in about_name, the source or database that failed, are replaced.
    """
    if isinstance(error, FileNotFoundError) and error.__cause__:
        error = error.__cause__  # fsspec says "not found" whatever went wrong
    kind = type(error)
    message = getattr(getattr(error, "diag", None), "message_primary", None)  # libpq's
    message = message or getattr(error, "strerror", None) or str(error) or kind.__name__
    text = hide_secrets(" ".join(message.split()), about_name)[:MAX_MESSAGE]
    # Some messages say less than their kind.
    if isinstance(error, FileNotFoundError):
        text = os.strerror(errno.ENOENT)
    elif kind.__name__ == "ClientResponseError":  # of aiohttp
        text = f"the server answered {error.status} {error.message}"
    elif kind.__name__ in DAMAGED:
        text = (
            f"the compressed data is damaged or cut off ({text}); fetch the file again"
        )
    elif not (isinstance(error, OSError) or kind.__module__.startswith(PLAIN_MODULES)):
        text = f"{kind.__name__}: {text}"
    remedy = REMEDIES.get(find_error_code(error))
    return f"{text}; {remedy}" if remedy else text


def find_error_code(error: BaseException) -> str:
    """Return the name that the system, SQLite or PostgreSQL gives an error, or ""."""
    sqlite = getattr(error, "sqlite_errorname", None)
    if sqlite:
        return "_".join(sqlite.split("_")[:2])  # SQLITE_IOERR of SQLITE_IOERR_WRITE
    number = getattr(error, "errno", None)
    return getattr(error, "sqlstate", None) or errno.errorcode.get(number or 0, "")


def is_transient(error: BaseException) -> bool:
    """Tell whether the same load may succeed later."""
    code = find_error_code(error)
    kinds: tuple[Any, ...] = (TimeoutError,)
    psycopg: Any = sys.modules.get("psycopg")
    if psycopg and not code:  # a connection that fails or breaks
        kinds += (psycopg.OperationalError, psycopg.InterfaceError)
    return isinstance(error, kinds) or code.startswith(TRANSIENT_CODES)


def redact(name: str) -> str:
    """Return a source or database as it may be shown and stored.

    User, password, query and fragment of a URL are left out:

        postgresql://loader:S3CRT@db/analytics  postgresql://db/analytics
        https://store/a.json?signature=S3CRT    https://store/a.json
        simplecache::s3://key:S3CRT@bucket/a    simplecache::s3://bucket/a
        zip://a.json::https://me:S3CRT@store/a  zip://a.json::https://store/a
        s3://bucket/me@home.json                s3://bucket/me@home.json
        https://me:S3?CRT@store/a.json          https://...

    If an "@" follows a "?" or "#", these may belong to a password, as in the
    last example, and everything is hidden.
    """
    start = re.search(URL_START, name)
    if start is None:
        return name
    shown = re.split("[?#]", name, maxsplit=1)[0]
    if "@" in name[len(shown) :]:
        return f"{name[: start.end()]}..."
    another_url = rf"[^/:@]*::{URL_START}"  # as in zip://a.json::s3://
    has_user = "[^/]*[:@]"  # ":" or "@" comes before the next "/"
    scheme = re.search(rf"{URL_START}(?!{another_url})(?={has_user})", shown)
    if scheme is None or "@" not in shown[scheme.end() :]:
        return shown
    # The last "@" ends the user: a password may contain "/" and "@" as well.
    return shown[: scheme.end()] + shown.rpartition("@")[2]


def redact_urls(text: str) -> str:
    """Redact the URLs in a text.

    A URL has a scheme, a user with a password (which may contain spaces), and
    then everything up to punctuation that ends a word.
    """
    user = r"(?:[^\s/@][^/@]*@)?"
    pattern = rf"{URL_START}{user}\S+?(?=[\"';,.)]*(?:\s|$))"
    return re.sub(pattern, lambda found: redact(found[0]), text)


def find_secrets(name: str) -> set[str]:
    """Return the texts in a URL that no message may show.

    They are the password and its words (libpq may quote one of them). Of a
    PostgreSQL URL also the passwords in the query; of any other URL a token in
    place of the user, and all values of the query.
    """
    from urllib.parse import quote, unquote

    secrets = set()
    for password in re.findall(r"(?s):/+[^:/?#@]*:(.*)@", name):  # ://USER:PASSWORD@
        secrets |= {password, *re.findall(r"\w{3,}", password)}
    if is_postgres(name):  # ?password=PASSWORD&sslpassword=PASSWORD
        secrets |= set(re.findall(r"[?&]\w*password=([^&]*)", name))
    else:
        secrets |= set(re.findall(r":/+([^/?#@:]+)(?=[^/]*@)", name))  # ://TOKEN@
        _, *fields = re.split("[?#&]", name)
        for field in fields:
            secrets |= {field, field.partition("=")[2]}
    spellings = {
        spelling
        for secret in secrets
        for spelling in (secret, unquote(secret), quote(secret, safe=""))
    }
    # As describe_error() shows white space.
    return {" ".join(spelling.split()) for spelling in spellings} - {""}


def hide_secrets(text: str, name: str) -> str:
    """Replace the secrets of a source or database in a message by ***."""
    if not re.search(URL_START, name):
        return redact_urls(text)
    text = redact_urls(text.replace(name, redact(name)))
    for secret in sorted(find_secrets(name), key=len, reverse=True):
        pattern = re.escape(secret)
        if len(secret) < 3:  # not every "a" in the message
            pattern = rf"(?<!\w){pattern}(?!\w)"
        text = re.sub(pattern, "***", text)
    return text


@contextlib.contextmanager
def silence_libraries() -> Iterator[None]:
    """Keep the logs and warnings of libraries off standard error, which cron mails.

    What matters in them comes as an exception too. gcsfs asks by gRPC for the
    type of a bucket, and processes that are forked after that hang; so it is
    told not to, unless the user has set the variable (for zonal buckets, to
    "true").
    """
    import logging

    before = logging.root.manager.disable
    had_variable = GCSFS_GRPC in os.environ
    os.environ.setdefault(GCSFS_GRPC, "false")
    logging.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
        if not had_variable:
            del os.environ[GCSFS_GRPC]


# -- Stopping --------------------------------------------------------------------------
#
# In a batch load, SIGINT and SIGTERM end the program with the exit status that
# shells expect, and with a line that says what became of the load. A live load
# stops reading, commits, and ends with 0.

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
STOP_SECONDS = 3.0  # to write the last message
ROLLED_BACK = "uncommitted changes were rolled back"
MAYBE_COMMITTED = "the load was being committed, and may be committed"
COMMITTED = "the load is committed, but its report or picture is not complete"


class Stopped(SystemExit):
    """A signal has ended the program. The exit status is 128 + its number."""


class Stopper:
    """Handles the signals that end the program.

    A signal raises Stopped, wherever the program is. It is recorded as well:
    Python clears an exception in a finalizer, and C libraries may clear one in
    a callback, so check() raises it again before something is committed.

    While a live load reads, signals are only recorded; the first one ends the
    reading. Another one, while it commits, raises Stopped.
    """

    def __init__(self) -> None:
        self.signals: list[int] = []  # that have come
        self.tolerated = 0  # the number of signals that do not raise Stopped
        self.outcome = ROLLED_BACK  # what becomes of the load if a signal comes now
        self.ends_quietly = False  # a signal ends the program with 0 and no message
        self.has_raised = False

    @contextlib.contextmanager
    def handle_signals(self, numbers: Iterable[int]) -> Iterator[None]:
        """Handle signals in a block. Say what became of the load if one ends it."""
        before = {number: signal.signal(number, self.handle) for number in numbers}
        try:
            yield
            self.check()
        except Stopped as stopped:
            word = (
                "Interrupted" if stopped.code == 128 + signal.SIGINT else "Terminated"
            )
            start = "\n" if sys.stderr.isatty() else ""  # after the "^C" on a terminal
            # Standard error may be a pipe that nobody reads.
            with contextlib.suppress(OSError), time_limit(STOP_SECONDS):
                click.echo(f"{start}{word}: {self.outcome}", err=True)
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            if IS_SCRIPT:  # the exit status is decided
                for number in (*STOP_SIGNALS, signal.SIGHUP):
                    signal.signal(number, signal.SIG_IGN)

    @contextlib.contextmanager
    def tolerate(self, total: int) -> Iterator[None]:
        """Raise Stopped only beyond a total of signals since the program began.

        Those that come before the block ends never raise it afterwards.
        """
        before = self.tolerated
        self.tolerated = total
        try:
            yield
        finally:
            self.tolerated = max(before, len(self.signals))

    def handle(self, number: int, frame: object) -> None:
        self.signals.append(number)
        if not self.has_raised:  # a later one must not interrupt the last message
            self.check()

    def check(self) -> None:
        """Raise Stopped if a signal should have ended the program."""
        if len(self.signals) > self.tolerated:
            self.has_raised = True
            status = 128 + self.signals[-1]
            # handle_signals() prints a message for Stopped only.
            raise SystemExit(0) if self.ends_quietly else Stopped(status)


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError if a block takes longer than that.

    It is raised again every second, in case a library suppresses it.
    """

    def give_up(*_: object) -> None:
        raise TimeoutError(f"no answer for {seconds:g} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def list_signals(is_live: bool) -> list[signal.Signals]:
    """Return the signals that end a load, without a SIGHUP that nohup ignores."""
    is_ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    hangup = [signal.SIGHUP] if is_live and not is_ignored else []
    return [*STOP_SIGNALS, *hangup]


@contextlib.contextmanager
def standard_streams() -> Iterator[None]:
    """Open the standard streams that a daemon has closed, and flush them at the end.

    Otherwise the next file to be opened, such as the database, would be number
    1 and get the report. Errors while flushing are ignored: the exit status is
    decided.
    """
    descriptor = 0
    while descriptor <= 2:  # open() returns the lowest number that is free
        descriptor = os.open(os.devnull, os.O_WRONLY)
    os.close(descriptor)
    sys.stdout = sys.stdout or open(1, "w")
    sys.stderr = sys.stderr or open(2, "w")
    # What the encoding of a terminal lacks is shown as "?".
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        yield
    finally:
        flush_or_discard(sys.stdout)
        flush_or_discard(sys.stderr)


def flush_or_discard(stream: Any) -> None:
    """Write what waits in the buffer of a stream, or let it go nowhere.

    It may be a pipe that nobody reads.
    """
    try:
        with time_limit(STOP_SECONDS):
            stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


# -- Options ---------------------------------------------------------------------------

VARIABLE_PREFIX = "LOAD_ACTIVE_USERS"
TARGET_EXPECTED = (
    "expected the path of an SQLite file, or a postgresql:// URL "
    "(USER@HOST:PORT/DATABASE, special characters percent-encoded); a password is "
    "best kept in ~/.pgpass or PGPASSWORD"
)
NOT_A_PATH = r"""(?x)
    ^ [A-Za-z][\w+.-]+ : | ://  # a URL
    | ^ : | : .* @               # a URL without its scheme
    | \b (host|hostaddr|port|dbname|user|password|service) \s* =  # libpq's
"""


class Text(click.types.StringParamType):
    """A string that is not empty, and that a function may parse.

    A repeatable option's environment variable holds one value a line.
    """

    def __init__(self, parse: Callable[[str], Any] = str) -> None:
        self.parse = parse

    def split_envvar_value(self, rv: str) -> list[str]:
        return rv.strip("\n").split("\n")

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        if not isinstance(value, str):
            return value  # a default
        if not value.strip():
            self.fail("must not be empty", param, ctx)
        try:
            return self.parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


def parse_utf8(value: str) -> str:
    """Return a value that can be stored as JSON. Raises ValueError."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("must be UTF-8") from None
    return value


def parse_time_zone(name: str) -> str:
    """Return the name if it is a known time zone. Raises ValueError."""
    find_time_zone(name)
    return name


def parse_target(target: str) -> str:
    """Return --db, if it names an SQLite file or a PostgreSQL database."""
    if is_postgres(target):
        parse_postgres_url(target)
    elif re.search(NOT_A_PATH, target):
        raise ValueError(TARGET_EXPECTED)
    return target


def parse_picture(path: str) -> str:
    """Return --plot, if its suffix tells a format."""
    if os.path.splitext(path)[1].lower() not in PICTURE_METADATA:
        raise ValueError(f"{path!r} does not end in {', '.join(PICTURE_METADATA)}")
    return path


def parse_seconds(text: str) -> float:
    """Return --commit-every in seconds. Raises ValueError, also for NaN."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0
    if not 1 <= seconds <= 10**6:
        raise ValueError(f"{text!r} is not a number of seconds from 1 to 1000000")
    return seconds


class Command(click.Command):
    """A command that ends with one line and an exit status, whatever goes wrong."""

    def main(self, *args: Any, **more: Any) -> Any:
        """Run the command. Print an error without secrets, if it can be printed.

        A URL with a password may stand after a mistyped option.
        """
        more["standalone_mode"] = False
        try:
            return super().main(*args, **more)
        except click.ClickException as error:
            message = escape_control_characters(redact_urls(error.message))
            error.message = message  # type: ignore[misc]
            with contextlib.suppress(OSError):
                error.show()
            sys.exit(error.exit_code)
        except LoadError as error:
            say(f"Error: {error}")
        except (OSError, MemoryError) as error:
            say(f"Error: {describe_error(error)}")
        sys.exit(1)


def check_environment() -> None:
    """Raise UsageError for an empty variable, which click takes for no variable."""
    for parameter in click.get_current_context().command.params:
        name = f"{VARIABLE_PREFIX}_{str(parameter.name).upper()}"
        is_read = isinstance(parameter, click.Option) and parameter.allow_from_autoenv
        if is_read and os.environ.get(name) == "":
            raise click.UsageError(
                f"{name} must not be empty; unset it, or set a value"
            )


def identify_file(file: str | int) -> object:
    """Return a key that is equal for two names of one regular file or named pipe."""
    try:
        status = os.stat(file)
    except OSError:
        return os.path.realpath(str(file))
    if stat.S_ISREG(status.st_mode) or stat.S_ISFIFO(status.st_mode):
        return (status.st_dev, status.st_ino)
    return object()  # a terminal or /dev/null may have two uses


def check_files(sources: list[str], outputs: dict[str, str | None]) -> None:
    """Raise UsageError if an output is also an input, or another output."""
    names: dict[object, str] = {}
    for source in sources:
        path = 0 if source == "-" else re.sub("^(file|local)://", "", source)
        names[identify_file(path)] = f"the input {redact(source)}"
    if clash := names.get(identify_file(1)):
        raise click.UsageError(f"standard output and {clash} are the same file")
    # These two may well be the same file: 2>&1.
    names |= {identify_file(1): "standard output", identify_file(2): "standard error"}
    for name, output in outputs.items():
        if output:
            file = identify_file(output)
            if file in names:
                both = f"{name} and {names[file]}"
                raise click.UsageError(f"{both} are the same file: {output!r}")
            names[file] = name


def check_writable(path: str, is_appended: bool) -> None:
    """Raise LoadError if a file can't be written, before a long load begins.

    A file that is appended to may be a pipe. Any other file needs a directory
    that can be written: SQLite makes a journal there, and a picture replaces
    the old one.
    """
    directory = os.path.dirname(os.path.realpath(path))
    exists = os.path.exists(path)
    is_special = exists and not os.path.isfile(path)
    with about(path):
        if not os.path.isdir(directory):
            raise Unusable(f"there is no directory {directory}; create it first")
        if os.path.isdir(path) or (is_special and not is_appended):
            raise Unusable("is not a regular file; name another")
        advice = "can't be written; make it writable, or choose another"
        if exists and not os.access(path, os.W_OK):
            raise Unusable(advice)
        makes_file = not exists or not is_appended
        if makes_file and not os.access(directory, os.W_OK):
            raise Unusable(f"{directory} {advice}")


def check_database(job: Job, may_wait: bool) -> None:
    """Raise LoadError if the load is going to be refused, before the events are read.

    A live load may begin while the database is unavailable.
    """
    try:
        with transaction(job.target) as db:
            db.check_rule(job.rule)
            if not job.dry_run:
                for table in sorted(db.tables):
                    # EXPLAIN checks the permission and writes nothing.
                    db.execute(f"EXPLAIN INSERT INTO {table} DEFAULT VALUES")
    except Unavailable as error:
        if not may_wait:
            raise
        say(f"{error}; what is read will wait for it")


def check_options(
    job: Job,
    is_incremental: bool,
    plot: str | None,
    cluster: str | None,
    commit_every: float | None,
) -> None:
    """Raise UsageError for options that do not go together."""
    check_environment()
    if not job.events and not plot:
        raise click.MissingParameter(param_hint="'EVENTS...'", param_type="argument")
    for one, other, are_given in (
        ("--commit-every", "--replace", commit_every and job.replace),
        ("--commit-every", "--dry-run", commit_every and job.dry_run),
        ("--commit-every", "--incremental", commit_every and is_incremental),
        ("--commit-every", "--cluster", commit_every and cluster),
        ("--incremental", "--replace", is_incremental and job.replace),
        ("--cluster", "standard input", cluster and "-" in job.events),
    ):
        if are_given:
            raise click.UsageError(f"{one} can't be combined with {other}")
    if job.replace and not (job.dates.first and job.dates.last):
        raise click.UsageError(
            "--replace needs --dates FROM..TO, the dates that it replaces"
        )
    try:
        job.choose_dates()
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="'--dates'") from None


# -- The command -----------------------------------------------------------------------

DEFAULT_RULE = Rule()
FORMATTERS = {"table": format_table, "json": format_json, "csv": format_csv}
Decorator = Callable[[Callable[..., None]], Callable[..., None]]


def make_progress_bar(is_wanted: bool | None, ranges: list[Range]) -> Any:
    """Return a tqdm bar that counts bytes, or a null context.

    By default, it is shown only if standard error is a terminal.
    """
    is_terminal = sys.stderr.isatty()
    if not (is_terminal if is_wanted is None else is_wanted):
        return contextlib.nullcontext()
    is_known = bool(ranges) and all(range_.size is not None for range_ in ranges)
    total = sum(range_.size or 0 for range_ in ranges) if is_known else None
    with about("the progress bar"):
        from tqdm import tqdm

        tqdm.monitor_interval = 0  # no thread: it would be forked
        return tqdm(
            total=total,
            unit="B",
            unit_scale=True,
            leave=False,
            dynamic_ncols=True,
            mininterval=0.1 if is_terminal else 10,  # seconds; a log gets few lines
            delay=0 if is_terminal else 10,
        )


def load_batch(
    job: Job,
    sources: list[str],
    rejects: Any,
    progress: bool | None,
    is_incremental: bool,
    workers: int | None,
    cluster: str | None,
) -> Report:
    """Load the sources in one transaction. Raises LoadError."""
    dates = job.choose_dates()
    unread = skip_unchanged(job, dates, sources) if is_incremental else sources
    report = Report(
        files_read=len(unread),
        skipped_files=len(sources) - len(unread),
        shows_removed=job.replace,
    )
    range_bytes = CLUSTER_RANGE_BYTES if cluster else RANGE_BYTES
    ranges = [range_ for name in unread for range_ in split_source(name, range_bytes)]
    versions = dict.fromkeys(range_.version for range_ in ranges if range_.version)
    scanner = Scanner(job.rule, dates, job.validate, keep=rejects is not None)
    with make_progress_bar(progress, ranges) as bar:
        scanned = scan(ranges, scanner, workers, cluster)
        return load_once(job, dates, Intake(rejects, bar), scanned, versions, report)


def load_live(
    job: Job, sources: list[str], rejects: Any, progress: bool | None, every: float
) -> Report:
    """Load what arrives from the sources. Raises LoadError."""
    with make_progress_bar(progress, []) as bar:
        return LiveLoad(job, Intake(rejects, bar), every).run(sources)


def option(name: str, metavar: str | None, help: str, **more: Any) -> Decorator:
    """Make an option of the command."""
    more.setdefault("type", Text() if metavar else None)
    return click.option(*name.split(", "), metavar=metavar, help=help, **more)


@click.command(
    cls=Command,
    context_settings={
        "auto_envvar_prefix": VARIABLE_PREFIX,
        "help_option_names": ["-h", "--help"],
        "max_content_width": 80,
        "show_default": True,
    },
)
@click.argument("events", nargs=-1, type=Text(), metavar="EVENTS...")
@option(
    "--db",
    "PATH",
    "SQLite file, created if missing, or postgresql:// URL.",
    type=Text(parse_target),
    default="active_user_table.db",
)
@option(
    "--timezone",
    "NAME",
    "IANA time zone whose calendar dates are counted.",
    type=Text(parse_time_zone),
    default=DEFAULT_RULE.timezone,
)
@option(
    "--event-name",
    "NAME",
    "Event that can make a user active; repeatable; *: any event that has an "
    "engagement_time_msec.",
    type=Text(parse_utf8),
    default=DEFAULT_RULE.event_names,
    multiple=True,
)
@option(
    "--min-engagement-msec",
    "N",
    "Minimum engagement time of an active event in milliseconds, inclusive.",
    type=click.IntRange(min=0),
    default=DEFAULT_RULE.min_engagement_msec,
)
@option(
    "--valuable-event",
    "GLOB",
    "An event parameter whose key matches makes the event valuable; repeatable.",
    type=Text(parse_utf8),
    default=DEFAULT_RULE.valuable_events,
    multiple=True,
)
@option(
    "--dates",
    "FROM..TO",
    "Count only events on these dates; either end may be left out.",
    type=Text(DateRange.parse),
    show_default="2000-01-01 to tomorrow",
)
@option(
    "--incremental",
    None,
    "Skip files that an earlier load has read and that have not changed since.",
    is_flag=True,
)
@option(
    "--replace",
    None,
    "Replace the users of --dates by those of these events; both ends of --dates must "
    "be given.",
    is_flag=True,
)
@option(
    "--max-bad-records",
    "N",
    "Bad records to tolerate; if there are more, nothing is loaded.",
    type=click.IntRange(min=0),
    default=0,
)
@option(
    "--rejects",
    "FILE",
    "Append every bad record to FILE, byte for byte, one per line.",
)
@option(
    "--validate",
    None,
    "Decode every line in full, also those that cannot hold an engagement event.",
    is_flag=True,
)
@option(
    "--workers",
    "N",
    "Processes that scan.",
    type=click.IntRange(min=1),
    show_default=f"the usable CPUs, at most {MAX_WORKERS}",
)
@option("--cluster", "ADDRESS", "Scan on a Dask cluster, as in tcp://host:8786.")
@option(
    "--commit-every",
    "SECONDS",
    "Read endless input, and commit what has come every SECONDS.",
    type=Text(parse_seconds),
)
@option("--dry-run", None, "Count and report; write nothing.", is_flag=True)
@option(
    "--format",
    None,
    "Report on standard output.",
    type=click.Choice(list(FORMATTERS)),
    default="table",
)
@option(
    "--plot",
    "FILE",
    "Draw the whole active_user_table as .png, .svg or .pdf.",
    type=Text(parse_picture),
)
@option(
    "--progress/--no-progress",
    None,
    "Progress bar on standard error.",
    default=None,
    show_default="on a terminal",
)
@option("-q, --quiet", None, "No report on standard output.", is_flag=True)
@click.version_option(__version__, message="%(version)s", allow_from_autoenv=False)
def main(
    events: tuple[str, ...],
    db: str,
    timezone: str,
    event_name: tuple[str, ...],
    min_engagement_msec: int,
    valuable_event: tuple[str, ...],
    dates: DateRange | None,
    incremental: bool,
    replace: bool,
    max_bad_records: int,
    rejects: str | None,
    validate: bool,
    workers: int | None,
    cluster: str | None,
    commit_every: float | None,
    dry_run: bool,
    format: str,
    plot: str | None,
    progress: bool | None,
    quiet: bool,
) -> None:
    """Load the number of active users per day from analytics events into SQL.

    \b
    Examples:
      python load_active_users.py data/bq-results-sample-data.jsons
      python load_active_users.py --incremental --db /srv/a.db /srv/events/*.json.gz
      python load_active_users.py --db /srv/a.db --plot users.png
      some-producer | python load_active_users.py --commit-every 5 -

    EVENTS are newline-delimited JSON files as BigQuery exports them, also
    compressed (gzip, zstd), URLs, or - for standard input. They are loaded in
    one transaction; a user is counted once per date, however often files are
    loaded. Every option can be set in the environment too:
    LOAD_ACTIVE_USERS_DB, ...
    """
    names, globs = sort_unique(event_name), sort_unique(valuable_event)
    job = Job(
        events,
        db,
        Rule(timezone, names, min_engagement_msec, globs),
        dates or DateRange(),
        replace=replace,
        validate=validate,
        dry_run=dry_run,
        max_bad_records=max_bad_records,
    )
    with contextlib.ExitStack() as stack:
        is_live = commit_every is not None
        job.stopper.ends_quietly = is_live  # until the live load begins
        stack.enter_context(job.stopper.handle_signals(list_signals(is_live)))
        check_options(job, incremental, plot, cluster, commit_every)
        if plot or cluster or any(map(is_url, (db, *events))):
            stack.enter_context(silence_libraries())
        sources = [source for event in events for source in expand_wildcards(event)]
        check_files(sources, {"--db": db, "--rejects": rejects, "--plot": plot})
        if not dry_run:
            database = db if events and not is_postgres(db) else None
            for path in filter(None, (rejects, plot, database)):
                check_writable(path, is_appended=path == rejects)
        if events:
            check_database(job, may_wait=is_live)
            file = None
            if rejects and not dry_run:
                file = stack.enter_context(open_rejects(rejects))
            if commit_every is not None:
                report = load_live(job, sources, file, progress, commit_every)
            else:
                report = load_batch(
                    job, sources, file, progress, incremental, workers, cluster
                )
            warn(job, report)
            if not quiet:
                print_report(FORMATTERS[format](report))
        if plot and not dry_run:
            plot_table(plot, db)


if IS_SCRIPT:
    gc.freeze()  # the collector need not look through what was imported
    gc.enable()
    with standard_streams():
        main()
