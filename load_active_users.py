"""Load the number of active users per day from analytics events (newline-delimited JSON) into SQL.

The file reads in the order of an event's way: what an event is, when it counts, how lines are
scanned, where they come from, who scans them, how users are stored, the report, the command.
"""

from __future__ import annotations

import gc
import os
import signal
import sys

IS_COMMAND = __name__ == "__main__"
STOPS = (signal.SIGINT, signal.SIGTERM)
if IS_COMMAND:
    # What is pickled, for other processes and machines, is of the module that they can import.
    __name__ = "load_active_users"
    sys.modules[__name__] = sys.modules["__main__"]
    gc.disable()  # until the imports are done, which take most of the time of a small load
    IS_LIVE = any(argument.startswith("--commit-every") for argument in sys.argv)
    IS_LIVE = IS_LIVE or "LOAD_ACTIVE_USERS_COMMIT_EVERY" in os.environ
    for number in (*STOPS, signal.SIGHUP) if IS_LIVE else STOPS:  # nothing has been read yet
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda number, _: os._exit(0 if IS_LIVE else 128 + number))

import contextlib
import errno
import io
import itertools
import re
import select
import sqlite3
import stat
import textwrap
import time
import warnings
from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, date, datetime, timedelta
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Annotated, Any, NoReturn

import click
import msgspec
import stringzilla
from dateutil import tz
from msgspec import Meta, Struct
from msgspec.structs import astuple

__version__ = "1.1.0"


# -- What can go wrong -----------------------------------------------------------------------------
#
# Whatever a user, the data, the machine or a library does wrong ends as one line: what it is about,
# what is wrong, what to do. No line shows a password, a token or the query of a URL.


class LoadError(Exception):
    """The load is refused; the message says what is wrong, where, and what to do."""


class Unavailable(LoadError):
    """The database is locked, full or restarting: the same load may succeed later."""


class Refused(Exception):
    """What it is about, as `about` tells, can't be used as it is; the message says why."""


REMEDIES = {  # by what the system, SQLite or PostgreSQL call an error
    "SQLITE_BUSY": "another program keeps it locked; try again when that is done",
    "SQLITE_READONLY": "make the file and its directory writable, or choose another --db",
    "SQLITE_CANTOPEN": "make the file and its directory readable and writable",
    "SQLITE_FULL": "free some disk space and load again",
    "SQLITE_IOERR": "check the disk and load again",
    "SQLITE_NOTADB": "choose another --db",
    "SQLITE_CORRUPT": "restore it from a backup, or load all events into another --db",
    "55P03": "another session keeps it locked; try again when that is done",
    "42501": "grant the role what it needs",
    "ENOSPC": "free some disk space and load again",
    "EISDIR": "name the files in it",
    "EBADF": "give it something to read, or name files",
    "EMFILE": "allow more open files (ulimit -n)",
    "EAGAIN": "allow more processes (ulimit -u), or try fewer --workers",
}
MEANINGS = {  # of errors whose own words, which {} stands for, do not say enough
    "^ModuleNotFoundError": "{}; install it with pip",
    "^(ContentLength|TransferEncoding)Error": "the download was cut off; load again",
    "during recovery": "{}; use the primary server, or load again once this is it",
    "^MemoryError": "out of memory; try fewer --workers, or a machine with more",
    "^FileNotFoundError": "No such file or directory",
    "scheduler-connection-lost": "the scheduler was lost; check that it runs, and load again",
    "ON CONFLICT": "a table lacks its primary key ({}); give it the one that schema.sql has",
    "start new thread": f"can't start a thread; {REMEDIES['EAGAIN']}",
    "too much memory": "its zstd window is larger than 128 MiB; decompress it first: zstd -dc "
    "--long=31",
    "^(EOFError|BadGzipFile|IsalError|ZstdError)": "the compressed data is damaged or cut off "
    "({}); fetch the file again",
}
TRANSIENT = (
    *("SQLITE_BUSY", "SQLITE_FULL", "SQLITE_IOERR", "SQLITE_CANTOPEN", "SQLITE_READONLY"),
    *("0A000", "25006"),  # a PostgreSQL server that may soon be the primary
)
URL = r"[A-Za-z][\w+.-]*:/+"  # its beginning, also if a slash is missing
PLAIN = ("sqlite3", "psycopg", "aiohttp", __name__)  # whose messages need no name of a class


def redacted(name: str) -> str:
    """A source or database fit to be shown: of each URL in it no user, password, query, fragment,
    and nothing that may belong to a password."""
    if not re.search(URL, name):
        return name
    head = re.split(r"[?#]", name, maxsplit=1)[0]
    shown = []
    for url in re.split(f"(?=::{URL})", head):  # but not in an IPv6 address
        scheme, place = re.findall("(.*?:/+|.*)(.*)", url, re.DOTALL)[0]
        if re.match("[^/]*[:@]", place):
            is_cut = "@" in name.partition(place)[2]
            place = "..." if is_cut else place.rpartition("@")[2]
        shown.append(scheme + place)
    return "".join(shown)


def without_secrets(text: str) -> str:
    """A message, with the URLs in it as they may be shown."""
    url = rf"{URL}(?:[^\s/@][^/@]*@)?\S+?(?=[\"';,.)]*(?:\s|$))"
    return re.sub(url, lambda found: redacted(found[0]), text)


def leaks_secret(text: str, name: str) -> bool:
    """Whether a message holds a word of a URL that is not shown; of PostgreSQL's, a password's."""
    hidden = [name]
    if is_postgres(name):
        hidden = re.findall(r"(?<=:)[^:/@]*(?=@)|(?<=password=)[^&]*", name)
    words = set(re.findall(r"\w{3,}", " ".join(hidden)))
    words -= set(re.findall(r"\w{3,}", redacted(name)))
    return any(word in text for word in words)


def code_of(error: BaseException) -> str:
    """The name under which REMEDIES knows an error."""
    sqlite = getattr(error, "sqlite_errorname", None) or ""
    system = errno.errorcode.get(getattr(error, "errno", None) or 0, "")
    return "_".join(sqlite.split("_")[:2]) or getattr(error, "sqlstate", None) or system


def reason(error: Any) -> str:
    """What an error says, in one line, with the remedy if one is known."""
    while cause := error.__cause__:
        # fsspec says "not found" of an HTTP server, whatever went wrong
        kind = type(cause)
        is_other = issubclass(kind, OSError | ValueError) or kind.__module__.startswith("aiohttp")
        is_missing = getattr(cause, "status", 0 if is_other else 404) == 404
        if isinstance(error, FileNotFoundError) and is_missing:
            break
        error = cause
    kind = type(error)
    primary = getattr(getattr(error, "diag", None), "message_primary", None)  # of PostgreSQL
    text = str(primary or getattr(error, "strerror", None) or error) or kind.__name__
    if kind.__name__ == "ClientResponseError":
        text = f"the server answered {error.status} {error.message}"
    text = " ".join(text.split())[:500]
    for sign, meaning in MEANINGS.items():
        if re.search(sign, f"{kind.__name__}: {text}"):
            return meaning.format(text)
    if not (isinstance(error, OSError) or kind.__module__.startswith(PLAIN)):
        text = f"{kind.__name__}: {text}"
    text = without_secrets(text)
    remedy = REMEDIES.get(code_of(error))
    return f"{text}; {remedy}" if remedy else text


@contextlib.contextmanager
def about(what: str | Callable[[], str]) -> Iterator[None]:
    """Raise whatever goes wrong as a LoadError about something: a source, a database, a file."""
    try:
        yield
    except LoadError:
        raise
    except Exception as error:
        name = what if isinstance(what, str) else what()
        text = reason(error).replace(name, redacted(name))
        if leaks_secret(text, name):
            text = f"{type(error).__name__} (what it says quotes the URL, which may be secret)"
        psycopg: Any = sys.modules.get("psycopg")
        is_lost = psycopg and isinstance(error, psycopg.OperationalError | psycopg.InterfaceError)
        kind = Unavailable if is_lost or code_of(error) in TRANSIENT else LoadError
        raise kind(f"{redacted(name)}: {text}") from None


def printable(text: str) -> str:
    """A text with its control characters escaped: no name and no datum can steer a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def say(text: str) -> None:
    """Print a line on standard error, above a progress bar, if it can be printed at all."""
    bars: Any = sys.modules.get("tqdm")
    with contextlib.suppress(OSError):
        with bars.tqdm.external_write_mode(sys.stderr) if bars else contextlib.nullcontext():
            click.echo(printable(text), err=True)


# -- The event -------------------------------------------------------------------------------------
#
# A line of the BigQuery export of Google Analytics, with the fields that decide, among many more
# (https://support.google.com/analytics/answer/7029846):
#
#   {"event_timestamp": "1577836800000000", "event_name": "user_engagement",
#    "event_params": [{"key": "engaged_session_event", "value": {"int_value": "1"}},
#                     {"key": "engagement_time_msec", "value": {"int_value": "5321"}}],
#    "user_pseudo_id": "0b13a7c0f0e4aa4b1cb7ac6c9a3e2a4d"}

ENGAGEMENT_TIME = "engagement_time_msec"
MAX_USER = 512  # bytes, which 128 characters never exceed
MAX_KEY = 128  # characters of keys to remember; Google's have up to 40
JSON_TYPES: dict[type, str] = {str: "a string", list: "a list", dict: "an object"}


class ParameterValue(Struct, gc=False):
    """The value of an event parameter. Of its types only the integer matters."""

    int_value: int | str | None = None


class Parameter(Struct, gc=False):
    """An element of event_params."""

    key: Annotated[str, Meta(max_length=MAX_KEY)] | None = None
    value: ParameterValue | None = None


class Event(Struct, gc=False):
    """An event as it usually is: event_timestamp in microseconds UTC, integers also as strings."""

    event_name: str | None = None
    event_timestamp: int | str | None = None
    event_params: list[Parameter] | None = None
    user_pseudo_id: Annotated[str, Meta(max_length=MAX_USER // 4)] | None = None


usual_event = msgspec.json.Decoder(Event)
any_object = msgspec.json.Decoder(dict[str, msgspec.Raw])  # checks the syntax, and no field
to_users = msgspec.json.Decoder(list[str]).decode


def to_json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def field(record: Any, name: str, kind: type, path: str = "") -> Any:
    """A field of a JSON object, which may be null or absent. Raises ValueError."""
    if type(record) is not dict:
        raise ValueError(f"{path[:-1]} must be an object: {to_json(record)[:60]}")
    value = record.get(name)
    if value is not None and type(value) is not kind:
        raise ValueError(f"{path}{name} must be {JSON_TYPES[kind]}: {to_json(value)[:60]}")
    return value


def integer(value: Any, name: str) -> int:
    """The integer that a field holds, as a JSON number or string. Raises ValueError."""
    if type(value) is int:
        return value
    if type(value) is str and value.isascii() and value.removeprefix("-").isdigit():
        with contextlib.suppress(ValueError):  # more digits than Python converts
            return int(value)
    raise ValueError(f"{name} is not an integer: {to_json(value)[:60]}")


# -- The rule --------------------------------------------------------------------------------------

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
YEAR_2037 = 2_114_380_800_000_000  # microseconds UTC
STRETCH = 300_000_000  # microseconds: midnights and changes of the clocks are between two of them
MEMO = 65_536  # results to remember
FIRST_DATE = "2000-01-01"
VALUABLE, HAS_TIME = 1, 2  # what the key of a parameter can say, or both
NOT_VALUABLE = "(not valuable)"  # a mark, in place of a user
Terms = tuple[str, tuple[str, ...], int, tuple[str, ...]]
Dates = tuple[str, str]  # the first and the last, as YYYY-MM-DD
Users = dict[str, list[str | None]]  # by date, of the active events; None or empty: anonymous


class Rule:
    """What makes a user active on a date, by its terms: the time zone of the dates, the names of
    engagement events, the minimum engagement time in milliseconds, the globs of valuable event
    parameters. Raises ValueError for an unknown time zone."""

    def __init__(self, *terms: Any) -> None:
        timezone, names, self.minimum_msec, globs = terms
        self.names = tuple(sorted({*names}))
        self.terms: Terms = (timezone, self.names, self.minimum_msec, tuple(sorted({*globs})))
        self.zone = time_zone(timezone)
        # The events of a single name are found by that; others only if they hold the parameter.
        self.has_any_name = "*" in self.names
        self.needs_time = self.has_any_name or len(self.names) > 1
        words = re.findall(r"\w+", ENGAGEMENT_TIME if self.needs_time else self.names[0], re.ASCII)
        self.needle = max(words, key=len, default="event_name").encode()
        # Most escapes are those of <, > and &. These can spell the needle.
        self.escapes = tuple({b"\\u00%x" % (letter >> 4) for letter in self.needle})
        self.role_of = lru_cache(MEMO)(self.role)
        self.date_of = lru_cache(MEMO)(self.date_throughout)

    def __reduce__(self) -> tuple[Any, ...]:
        return rule_of, self.terms  # which keeps what it remembers, on a cluster

    def role(self, key: str | None) -> int:
        """What the key of a parameter says."""
        is_valuable = key is not None and any(fnmatchcase(key, glob) for glob in self.terms[3])
        return VALUABLE * is_valuable + HAS_TIME * (key == ENGAGEMENT_TIME)

    def evaluate(self, event: dict[str, Any]) -> tuple[int, Users]:
        """The number of engagement events, 1 or 0, and its user if it is active: this says what an
        event means. Raises ValueError."""
        if not self.has_any_name and event.get("event_name") not in self.names:
            return 0, {}
        parameters = list(enumerate(field(event, "event_params", list) or ()))
        keys = [field(item, "key", str, f"event_params[{index}].") for index, item in parameters]
        if self.needs_time and ENGAGEMENT_TIME not in keys:
            return 0, {}
        msecs = []
        for index, item in parameters:
            value = field(item, "value", dict, f"event_params[{index}].") or {}
            if keys[index] == ENGAGEMENT_TIME and value.get("int_value") is not None:
                msecs.append(integer(value["int_value"], ENGAGEMENT_TIME))
        user = field(event, "user_pseudo_id", str)
        if user and len(user.encode()) > MAX_USER:
            raise ValueError(f"user_pseudo_id is longer than {MAX_USER} bytes")
        if user and "\0" in user:
            raise ValueError("user_pseudo_id has a NUL character")
        day = self.date_at(integer(event.get("event_timestamp"), "event_timestamp"))
        is_engaged = any(msec >= self.minimum_msec for msec in msecs)
        is_active = is_engaged and any(self.role(key) & VALUABLE for key in keys)
        return 1, {day: [user]} if is_active else {}

    def active_users(self, events: Iterable[Event]) -> tuple[int, Users]:
        """The number of engagement events among some events, and the users of the active ones: what
        reading says of each, all at once. Raises whatever, where it can't tell as quickly."""
        role_of = self.role_of
        date_of = self.date_of
        times: list[Any] = []
        msecs: list[Any] = []
        users: list[str | None] = []
        for event in events:
            if not self.has_any_name and event.event_name not in self.names:
                continue
            msec = None
            is_valuable = False
            for parameter in event.event_params or ():
                role = role_of(parameter.key)
                if role == VALUABLE:
                    is_valuable = True
                elif role:
                    value = parameter.value
                    if msec is not None or value is None or value.int_value is None:
                        raise ValueError("there is not one engagement time")
                    msec = value.int_value
                    is_valuable = is_valuable or role != HAS_TIME
            if msec is None:
                if self.needs_time:
                    continue
                msec = "0"
                is_valuable = False
            times.append(event.event_timestamp)
            msecs.append(msec)
            users.append(event.user_pseudo_id if is_valuable else NOT_VALUABLE)
        if not times:
            return 0, {}
        try:
            digits = "".join(times + msecs)
        except TypeError:  # they are JSON numbers
            digits = "".join(map(str, times + msecs))
        if not digits.encode().isdigit():
            raise ValueError("there is an unusual number")
        found: Users = defaultdict(list)
        for timestamp, msec, user in zip(map(int, times), map(int, msecs), users, strict=True):
            day = date_of(timestamp // STRETCH) or self.date_at(timestamp)
            if msec >= self.minimum_msec and user is not NOT_VALUABLE:
                found[day].append(user)
        return len(times), found

    def date_throughout(self, stretch: int) -> str:
        """The date of a stretch, by its number since 1970 UTC; empty if it ends on another. In no
        zone has a stretch that begins and ends on one date another date between."""
        first = self.date_at(stretch * STRETCH)
        last = self.date_at(stretch * STRETCH + STRETCH - 1)
        return first if first == last else ""

    def date_at(self, timestamp: int) -> str:
        """The date of a timestamp (microseconds UTC), by the standard library outside of 1970 to
        2036, all that python-dateutil 2.9 knows. Raises ValueError."""
        try:
            zone = self.zone if 0 <= timestamp < YEAR_2037 else zone_info(self.terms[0])
            time_utc = EPOCH + timedelta(microseconds=timestamp)
            return time_utc.astimezone(zone).date().isoformat()
        except (OverflowError, ValueError):
            what = f"event_timestamp is beyond the calendar: {str(timestamp)[:60]}"
            raise ValueError(what) from None


@lru_cache(maxsize=8)
def rule_of(*terms: Any) -> Rule:
    return Rule(*terms)


def time_zone(name: str) -> Any:
    """The dateutil time zone of an IANA name, which begins with a capital; what else gettz opens is
    files, or depends on the machine. Raises ValueError."""
    zone = None
    if re.fullmatch(r"[A-Z][\w+-]*(/[\w+-]+)*", name, re.ASCII):
        with contextlib.suppress(OSError, ValueError):
            zone = tz.gettz(name)
    if not isinstance(zone, tz.tzfile | tz.tzutc):
        examples = "names are like US/Central, Europe/Berlin, UTC"
        raise ValueError(f"{name!r} is not an IANA time zone; {examples}")
    # python-dateutil 2.9 finds nothing in a file of zic's "slim" format.
    return zone if zone.tzname(EPOCH) else zone_info(name)


def zone_info(name: str) -> Any:
    """The standard library's time zone of an IANA name."""
    from zoneinfo import ZoneInfo

    return ZoneInfo(name)


def is_same_zone(name: str, other: str) -> bool:
    """Whether two names are of time zones that do the same, on each day from 1970 to 2037."""
    one, two = time_zone(name), time_zone(other)
    times = (EPOCH + timedelta(days) for days in range(24_800))
    return name == other or all(
        time.astimezone(one).utcoffset() == time.astimezone(two).utcoffset() for time in times
    )


def parse_dates(text: str | None, rule: Rule) -> Dates:
    """The dates FROM..TO, or one; 2000-01-01, tomorrow for what is left out. Raises ValueError."""
    tomorrow = (datetime.now(rule.zone).date() + timedelta(1)).isoformat()
    first, separator, last = (text or "..").partition("..")
    ends = (first or FIRST_DATE, (last or tomorrow) if separator else first)
    for end in ends:
        if not re.fullmatch(r"\d{4}-\d\d-\d\d", end, re.ASCII):
            raise ValueError(f"{text!r} is not FROM..TO with dates like 2020-01-31")
        try:
            date.fromisoformat(end)
        except ValueError as error:
            raise ValueError(f"{text!r}: {error}") from None
    if ends[0] > ends[1]:
        raise ValueError(f"{text!r} ends before it begins: {'..'.join(ends)}")
    return ends


# -- Scanning lines --------------------------------------------------------------------------------
#
# What a line means is said by Scanner.scan_line. Blocks of lines go a quicker way, which agrees
# with it or gives up: whatever is in doubt goes line by line.

BLANK = b" \t\r\n"
BOM = b"\xef\xbb\xbf"
BATCH = 32 << 20  # bytes of lines
BLOCK = 384 << 10  # bytes: they stay in the processor's cache while they are searched repeatedly
SPLIT = 8  # parts into which lines are cut of which one is unusual
RUN_USERS = 256  # users in one JSON array: few, since many are merged at once
MAX_REPORTED = 20  # bad records of a load to report in full
Buffer = bytes | bytearray
Run = tuple[str, str, str]  # date, first user, sorted JSON array of users


class Tally(Struct):
    """What was read, in the terms of load_log; too_early are active events before 2000."""

    lines: int = 0
    blank_lines: int = 0
    engagement_events: int = 0
    active_events: int = 0
    anonymous_events: int = 0
    out_of_range_events: int = 0
    bad_records: int = 0
    bytes: int = 0
    too_early: int = 0

    def plus(self, other: Tally) -> Tally:
        return Tally(*map(int.__add__, astuple(self), astuple(other)))


class Batch(Struct):
    """What was found in some successive lines of a range."""

    tally: Tally = msgspec.field(default_factory=Tally)
    bad: list[tuple[int, str, bytes]] = []  # line of the batch, from 1; reason; record, if wanted
    users: Users = {}  # until the batch is closed, which makes runs of them
    runs: list[Run] = []

    def add(self, engagement_events: int, users: Users) -> None:
        """Add what Rule.active_users found."""
        self.tally.engagement_events += engagement_events
        for day, some in users.items():
            self.users.setdefault(day, []).extend(some)

    def close(self, dates: Dates) -> Batch:
        """Make runs of the users on some dates, and tally the others."""
        for day, users in self.users.items():
            self.tally.active_events += len(users)
            named = list(filter(None, users))
            self.tally.anonymous_events += len(users) - len(named)
            if not dates[0] <= day <= dates[1]:
                self.tally.out_of_range_events += len(users)
                self.tally.too_early += len(users) * (day < FIRST_DATE)
                continue
            each = list(dict.fromkeys(map(named.__getitem__, stringzilla.Strs(named).argsort())))
            for start in range(0, len(each), RUN_USERS):
                some = each[start : start + RUN_USERS]
                self.runs.append((day, some[0], to_json(some)))
        self.users = {}
        return self


class Scanner(Struct):
    """Turns a range into batches of what counts under a rule on some dates."""

    rule: Rule
    dates: Dates
    validate: bool = False  # decode every line
    keep: bool = False  # every bad record, and whole
    block_size: int = BLOCK
    is_dense: bool = False  # whether most lines were engagement events

    def __call__(self, part: Range) -> Iterator[Batch]:
        """Yield the batches of a range, one for some 32 MiB of lines. Raises LoadError."""
        batch = Batch()
        lines = size = 0

        def place() -> str:
            is_known = part.start == 0 and part.data is None
            return f"{part.source}:{lines + batch.tally.lines + 1}" if is_known else part.source

        with about(place), opened(part) as (stream, file, length):
            position = file.tell()
            for buffer, filled in blocks(stream, length, part.start == 0, self.block_size):
                self.scan_block(buffer, filled, batch)
                size += filled
                if size >= BATCH:
                    batch.tally.bytes = file.tell() - position
                    yield batch.close(self.dates)
                    position += batch.tally.bytes
                    lines += batch.tally.lines
                    size, batch = 0, Batch()
            batch.tally.bytes = file.tell() - position
            yield batch.close(self.dates)

    def scan_block(self, buffer: bytearray, length: int, batch: Batch) -> None:
        """Add the whole lines in the first bytes of a buffer to a batch: all at once, or in parts
        where one of them is unusual."""
        end = length - buffer.endswith(b"\n", 0, length)
        if not self.scan_quickly(buffer, end, batch):
            self.scan_lines(bytes(memoryview(buffer)[:end]).split(b"\n"), batch)

    def scan_lines(self, lines: list[bytes], batch: Batch) -> None:
        """Add lines, without their newlines, to a batch in parts, and those with an unusual line in
        smaller ones, so that few go one by one."""
        size = max(len(lines) // SPLIT, 1)
        for start in range(0, len(lines), size):
            some = lines[start : start + size]
            text = b"\n".join(some)
            if size == 1:
                self.scan_line(text, batch)
            elif not self.scan_quickly(text, len(text), batch):
                self.scan_lines(some, batch)

    def scan_quickly(self, text: Buffer, end: int, batch: Batch) -> bool:
        """Whether all lines in the first bytes of a text could be added to a batch at once."""
        # Every line is framed as an object if all that is between them is "}\n{", or with CRLF.
        last = b"}\r" if text.endswith(b"\r", 0, end) else b"}"
        lines = stringzilla.count(text, b"\n", 0, end) + 1
        is_framed = text.startswith(b"{", 0, end) and text.endswith(last, 0, end)
        is_framed = is_framed and stringzilla.count(text, last + b"\n{", 0, end) == lines - 1
        if not is_framed or self.has_escape(text, end, b"\\u0000"):
            return False
        try:
            engagement_events, users = self.rule.active_users(self.events(text, end, lines))
        except (ValueError, TypeError, RecursionError):
            return False  # the plain reading finds out which line it is
        if lines > SPLIT:
            self.is_dense = engagement_events > lines // 2
        batch.add(engagement_events, users)
        batch.tally.lines += lines
        return True

    def scan_line(self, line: bytes, batch: Batch) -> None:
        """Add a line, without its newline, to a batch: this says what a line means."""
        record = line.strip(BLANK)
        if record and self.scan_quickly(record, len(record), batch):
            return
        batch.tally.lines += 1
        try:
            if not record:
                batch.tally.blank_lines += 1
            elif not (record.startswith(b"{") and record.endswith(b"}")):
                raise ValueError("is not a JSON object, {...}: one event per line is expected")
            elif (
                self.validate
                or stringzilla.find(record, self.rule.needle) >= 0
                or self.has_escape(record, len(record))
            ):
                batch.add(*self.rule.evaluate(decoded(record)))
        except (ValueError, RecursionError) as error:
            batch.tally.bad_records += 1
            if self.keep or len(batch.bad) < MAX_REPORTED:
                batch.bad.append((batch.tally.lines, str(error), line if self.keep else b""))

    def has_escape(self, text: Buffer, end: int, *escapes: bytes) -> bool:
        """Whether a text has an escape that can spell the needle, or one of some others."""
        escapes += self.rule.escapes
        return text.find(b"\\", 0, end) >= 0 and any(  # most have no backslash at all
            stringzilla.find(text, escape, 0, end) >= 0 for escape in escapes
        )

    def events(self, text: Buffer, end: int, lines: int) -> list[Event]:
        """The events of the lines that hold the needle, or of all lines where most of them do.
        Raises ValueError or RecursionError if one is unusual in any way."""
        view = memoryview(text)
        wants_all = self.is_dense or self.validate
        found = []
        if not wants_all:
            at = stringzilla.find(text, self.rule.needle, 0, end)
            while 0 <= at < end:
                start = text.rfind(b"\n", 0, at) + 1
                stop = text.find(b"\n", at, end)
                stop = end if stop < 0 else stop
                found.append(view[start:stop])
                at = stringzilla.find(text, self.rule.needle, stop, end)
        decodable = str(view[:end] if wants_all else b"\n".join(found), "utf-8")
        events = usual_event.decode_lines(decodable)
        if len(events) != (lines if wants_all else len(found)):
            raise ValueError("there are two objects on a line")
        return events


def decoded(record: bytes) -> Any:
    """A JSON object, of whose fields given twice the last one counts. Raises ValueError or
    RecursionError."""
    import json
    from decimal import Decimal

    text = str(record, "utf-8")
    any_object.decode(text)  # is stricter than json
    # Python converts fewer digits than 4301, and no field of ours may be a Decimal.
    return json.loads(text, parse_int=lambda n: int(n) if len(n) < 4300 else Decimal(n))


# -- Sources ---------------------------------------------------------------------------------------
#
# EVENTS are files, standard input, pipes and URLs, each compressed or not. All are read as blocks
# of whole lines.

MAX_LINE = 128 << 20  # bytes; BigQuery reads and writes up to 100 MB
ENDLESS = float("inf")  # bytes: to the end of a stream
SNIFFED_BYTES = 512  # bytes by which another format is known
READAHEAD_BYTES = 8 << 20  # bytes to ask a URL for at once
GZIP = rb"\x1f\x8b"
ZSTD = rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"
CUT_SHORT = "the file was cut short while it was read; load it again when it is whole"
TOO_LONG = f"a line of more than {MAX_LINE >> 20} MiB; one event per line is expected"
AS_JSON = "export it as newline-delimited JSON"
FORMATS = {  # by their first bytes
    rb"\xff\xfe|\xfe\xff|[{\[]\0|\0[{\[]": "UTF-16; make it UTF-8: iconv -f UTF-16 -t UTF-8",
    rb"\s*\[": "a JSON array; make it one event per line: jq -c '.[]'",
    rb'\s*\{\s*\n\s*"': "pretty-printed JSON; make it one event per line: jq -c .",
    rb"PAR1": f"a Parquet file; {AS_JSON}",
    rb"Obj\x01": f"an Avro file; {AS_JSON}",
    rb"ORC": f"an ORC file; {AS_JSON}",
    rb"PK[\x03\x05\x07]": "a zip archive; decompress it first: unzip -p",
    rb"\xfd7zXZ\0": "xz-compressed; decompress it first: xzcat",
    rb"BZh": "bzip2-compressed; decompress it first: bzcat",
    rb"\x04\x22\x4d\x18": "lz4-compressed; decompress it first: lz4cat",
    GZIP + rb"|" + ZSTD: "compressed twice, or a compressed live pipe; decompress it first: zcat, "
    "or zstdcat",
    rb"[\s\S]{257}ustar[\0 ]": "a tar archive; load the files in it: tar -xO",
    rb"\s*<[!?a-zA-Z]": f"HTML or XML; {AS_JSON}",
}


class Range(Struct, frozen=True):
    """The unit of work: the lines of a source that begin in its bytes from start to end, or all of
    it where it can't be split; data are the bytes of lines that have been read already."""

    source: str
    start: int = 0
    end: int | None = None
    version: str | None = None  # of the file when it was cut into ranges: all are of the same
    data: bytes | None = None
    size: int = 0  # in bytes, where that is known

    @property
    def work(self) -> int:
        """Bytes to scan, about: what is compressed holds some ten times its size."""
        return self.size * (10 if self.end is None else 1)


class Pipe(io.RawIOBase):
    """A file that is read from beginning to end, of which one read brings enough to know its
    format; tell() is what was read."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.position = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = 0
        while count < SNIFFED_BYTES and (some := self.file.readinto(buffer[count:])):
            count += some
        self.position += count
        return count

    def tell(self) -> int:
        return self.position


def file_system(url: str) -> Any:
    """The fsspec file system of a URL, and the path in it."""
    import fsspec

    if re.search("https?://", url):
        with contextlib.suppress(ImportError):  # which fsspec tells
            from aiohttp import ClientTimeout

            # A download may take as long as it likes, but for minutes without a byte.
            timeout = ClientTimeout(total=None, sock_connect=60, sock_read=300)
            fsspec.config.conf.setdefault("http", {"client_kwargs": {"timeout": timeout}})
    return fsspec.core.url_to_fs(url)


@contextlib.contextmanager
def opened_source(source: str) -> Iterator[tuple[io.BufferedReader, str]]:
    """A source as a binary file, seekable where it can be read in ranges; and what changes when
    another file takes its place."""
    if "://" in source:
        system, path = file_system(source)
        system.invalidate_cache()
        info = system.info(path)
        if info.get("type") == "directory":  # which some open as an empty file
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        tokens = map(info.get, ("ETag", "etag", "ino", "Last-Modified", "mtime"))
        version = next(filter(None, tokens), None)
        in_ranges = info.get("partial", "http" not in system.protocol)
        ahead = READAHEAD_BYTES if in_ranges else 0  # 0: as a stream
        opening = system.open(path, "rb", block_size=ahead, cache_type="readahead")
    else:
        opening = open(0 if source == "-" else source, "rb", buffering=0, closefd=source != "-")
        os.set_blocking(opening.fileno(), True)  # whatever who started us has set
        version = os.fstat(opening.fileno()).st_ino
        in_ranges = source != "-" and opening.seekable()
    with opening as file:
        yield io.BufferedReader(file if in_ranges else Pipe(file)), str(version)


@contextlib.contextmanager
def opened(part: Range) -> Iterator[tuple[Any, Any, float]]:
    """A range as a binary stream of its lines, decompressed where its first bytes say so; the file
    behind it, whose tell() is what was read of it; and how many bytes of the stream to read."""
    if part.data is not None:
        stream: Any = io.BufferedReader(io.BytesIO(part.data))
        yield stream, stream, len(part.data)
        return
    with opened_source(part.source) as (file, version):
        if part.version and part.version != version:
            raise Refused("the file was replaced while it was read; load it again")
        if part.end is None:
            yield decompressed(file), file, ENDLESS
        else:
            end = line_start(file, part.end)
            yield file, file, end - line_start(file, part.start)


def decompressed(file: io.BufferedReader) -> Any:
    """What a file holds, if its first bytes say that it is compressed; or else the file itself."""
    head = file.peek()
    if re.match(GZIP, head):
        from isal import igzip

        return igzip.IGzipFile(fileobj=file)  # type: ignore[no-untyped-call]
    if re.match(ZSTD, head):
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd

        return zstd.ZstdFile(file)
    return file


def skip_mark(stream: Any) -> int:
    """Pass over a byte-order mark at the start of a source; return how many bytes of it there are.
    Raises Refused for another format."""
    head = stream.peek(SNIFFED_BYTES)[:SNIFFED_BYTES]
    mark = BOM if head.startswith(BOM) else b""
    for magic, name in FORMATS.items():
        if re.match(magic, head[len(mark) :]):
            raise Refused(f"is {name}")
    return len(stream.read(len(mark)))


def blocks(stream: Any, left: float, is_start: bool, size: int) -> Iterator[tuple[bytearray, int]]:
    """Yield the lines in the next bytes (left) of a stream as (buffer, length), some size bytes and
    the rest of a line at a time, which stay until the next are asked for; only the last line may
    lack its newline. Raises Refused, at the start of a source for another format as well."""
    if is_start:
        left -= skip_mark(stream)
    buffer = bytearray(size)
    while left > 0 and (length := stream.readinto(memoryview(buffer)[: int(min(size, left))])):
        if not buffer.endswith(b"\n", 0, length):
            for rest in line_rest(stream):
                buffer[length : length + len(rest)] = rest
                length += len(rest)
        left -= length
        yield buffer, length
    if 0 < left < ENDLESS:
        raise Refused(CUT_SHORT)


def line_rest(stream: io.BufferedIOBase) -> Iterator[bytes]:
    """Yield what is left of a line in a stream, in pieces."""
    left = MAX_LINE
    while (rest := stream.readline(BLOCK)) and left > 0:
        yield rest
        left -= len(rest)
        if rest.endswith(b"\n"):
            return
    if rest:
        raise Refused(TOO_LONG)


def line_start(file: io.BufferedIOBase, offset: int) -> int:
    """Go to the first line of a file that begins at an offset (bytes) or after it; return where."""
    file.seek(max(offset - 1, 0))
    if offset and not sum(map(len, line_rest(file))):
        raise Refused(CUT_SHORT)
    return file.tell()


# -- Scanning ranges, here or elsewhere ------------------------------------------------------------
#
# Sources are cut into ranges, which are handed out a bounded number ahead; what was found in them
# is taken in the order of the input. So line numbers, bad records and the first error need no care.

POOL_MIN_BYTES = 64 << 20  # of events: fewer are scanned sooner than processes have started
PER_WORKER = 3  # ranges that a worker has been given and that have not had their turn
SPILL_BYTES = 8 << 20  # of users in memory: more are kept in a temporary database
CLUSTER_SECONDS = 30  # to wait for a scheduler
Found = Iterator[tuple[Range, Batch]]  # ranges with their batches, in order


def expanded(source: str) -> list[str]:
    """A source, or the files that it stands for as a URL with wildcards. Raises LoadError."""
    if "://" not in source or source.startswith("http") or not set("*?[") & set(source):
        return [source]
    with about(source):
        system, path = file_system(source)
        found = [system.unstrip_protocol(name) for name in sorted(system.glob(path))]
    return found or [source]  # which is not found when it is opened


def is_pipe(source: str) -> bool:
    """Whether a source is to be opened only once."""
    is_file = os.path.isfile(source) or os.path.isdir(source)
    return source == "-" or (os.path.exists(source) and not is_file)


def ranges(source: str, size: int) -> list[Range]:
    """The ranges that make up a source, in order: of some size in bytes (of a URL 128 MiB or more),
    or all of it where it can't be split. Raises LoadError if it can't be read."""
    if is_pipe(source):
        return [Range(source)]
    with about(source), opened_source(source) as (file, version):
        is_whole = not file.seekable() or decompressed(file) is not file
        end = file.seek(0, os.SEEK_END) if file.seekable() else 0
    if is_whole:
        return [Range(source, version=version, size=end)]
    step = max(size, 4 * BATCH) if "://" in source else size
    borders = itertools.pairwise([*range(0, end, step), end])
    return [Range(source, start, stop, version, size=stop - start) for start, stop in borders]


def begun_ahead(
    parts: Iterable[Range], begin: Callable[[Range], Any], number: int
) -> Iterator[tuple[Range, Any]]:
    """Yield ranges with what begins them, in order, each when so many have been begun."""
    begun = ((part, begin(part)) for part in parts)
    waiting = deque(itertools.islice(begun, number))
    while waiting:
        yield waiting.popleft()
        waiting.extend(itertools.islice(begun, 1))


def scan_in_turn(parts: Iterable[Range], scan: Scanner) -> Found:
    """Scan ranges in this process. Raises LoadError."""
    return ((part, batch) for part in parts for batch in scan(part))


def scan_in_processes(parts: list[Range], scan: Scanner, workers: int) -> Found:
    """Like scan_in_turn, in processes, each with a pipe of its own for its ranges and batches."""
    with about("scanning processes"), contextlib.ExitStack() as stack:
        assigned = dict.fromkeys(started(workers, scan, stack), 0)  # bytes to scan
        waiting = dict.fromkeys(assigned, 0)  # ranges: few, so that they do not fill a pipe

        def send(part: Range) -> Any:
            free = [one for one, number in waiting.items() if number <= PER_WORKER]
            connection = min(free, key=assigned.__getitem__)
            assigned[connection] += part.work
            waiting[connection] += 1
            connection.send(part)
            return connection

        try:
            for part, connection in begun_ahead(parts, send, PER_WORKER * workers):
                end = None
                while not end:
                    batches, end = connection.recv()
                    for batch in batches:
                        yield part, batch
                if isinstance(end, LoadError):
                    raise end
                waiting[connection] -= 1
        except (EOFError, OSError):
            what = "a scanning process was killed (out of memory?); try fewer --workers"
            raise LoadError(what) from None


def started(number: int, scan: Scanner, stack: contextlib.ExitStack) -> list[Any]:
    """Start processes that scan until a stack is closed; return connections to them."""
    import multiprocessing

    # A fork starts at once and shares what is imported; beyond Linux it is unsafe.
    context: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    connections = []
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # until workers handle them
    try:
        for _ in range(number):
            ours, theirs = context.Pipe()
            process = context.Process(target=work, args=(theirs, ours, scan), daemon=True)
            process.start()
            stack.callback(process.kill)
            theirs.close()
            connections.append(ours)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return connections


def work(connection: Any, other_end: Any, scan: Scanner) -> None:
    """Scan the ranges that come over a connection, until its other end is closed; answer each with
    some lists of batches, each with whether it is the last: False, True or a LoadError."""
    other_end.close()  # which a fork inherits: it ends with the parent
    parent = os.getppid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
    with contextlib.suppress(EOFError, OSError, MemoryError):  # the parent tells
        while True:
            part = connection.recv()
            batches: list[Batch] = []
            end: bool | LoadError = True
            held = 0
            try:
                for batch in scan(part):
                    batches.append(batch)
                    held += sum(len(users) for *_, users in batch.runs)
                    held += sum(len(record) for *_, record in batch.bad)
                    if held > SPILL_BYTES:
                        connection.send((batches, False))
                        batches, held = [], 0
                    if os.getppid() != parent:
                        return
            except LoadError as error:
                end = error
            connection.send((batches, end))


def scan_on_cluster(parts: list[Range], scan: Scanner, address: str) -> Found:
    """Like scan_in_turn, on a Dask cluster, whose workers see the same files and may be lost."""
    import logging

    logging.disable()  # of lost connections it logs tracebacks
    warnings.simplefilter("ignore")
    with about("Dask"):
        import distributed

    name = redacted(address)
    with about(address), contextlib.ExitStack() as stack:
        signal.signal(signal.SIGALRM, give_up)
        signal.alarm(CLUSTER_SECONDS)  # for another server there, which Dask lets say nothing
        try:
            client = stack.enter_context(distributed.Client(address, timeout=10))
        except (OSError, ValueError):
            what = "no Dask scheduler answers there; check the address and that it runs"
            raise Refused(what) from None
        finally:
            signal.alarm(0)
        check_cluster(client, name)
        client.upload_file(os.path.realpath(__file__))

        def result(future: Any) -> Any:
            while True:
                try:
                    return future.result(timeout=10)
                except TimeoutError:
                    if not client.nthreads():
                        what = "has no workers any more; start some and load again"
                        raise Refused(what) from None
                except LoadError as error:
                    raise LoadError(f"{error} (on a worker of {name})") from None

        def submit(part: Range) -> Any:
            return client.submit(lambda: list(scan(part)), pure=False)

        threads = sum(client.nthreads().values())
        for part, future in begun_ahead(parts, submit, 2 * threads + 1):
            for batch in result(future):
                yield part, batch


def give_up(*_: object) -> NoReturn:
    raise TimeoutError


def check_cluster(client: Any, name: str) -> None:
    """Raise Refused unless a cluster has workers, of the versions that are used here."""
    if not client.nthreads():
        raise Refused(f"has no workers; start some with: dask worker {name}")
    versions = client.get_versions(packages=["msgspec", "stringzilla"])
    here = versions["client"]["packages"]
    for worker, there in versions["workers"].items():
        for package in ("python", "distributed", "msgspec", "stringzilla"):
            theirs, ours = (str(side.get(package)) for side in (there["packages"], here))
            if theirs.split(".")[:2] != ours.split(".")[:2]:
                found = f"the worker {worker} has {package} {theirs}, where {ours} is used here"
                raise Refused(f"{found}; install the same requirements.txt")


# -- A load ----------------------------------------------------------------------------------------
#
# A load holds the users of some batches by date in bounded memory, and gives them back in order,
# each once.

CHUNK = 32_768  # users that are compared with a database and stored at once


class Load:
    """Adds up batches; runs past a bound are kept in a temporary database."""

    def __init__(self) -> None:
        self.tally = Tally()
        self.runs: dict[str, list[tuple[str, str]]] = {}  # by date: first user, JSON array
        self.size = 0  # bytes in memory, about
        self.days: set[str] = set()
        self.spilled: sqlite3.Connection | None = None

    def add(self, batch: Batch) -> None:
        """Add a batch, or nothing of it. Raises LoadError if temporary files can't be written."""
        if self.size > SPILL_BYTES:
            self.spill()
        self.tally = self.tally.plus(batch.tally)
        for day, first, users in batch.runs:
            self.runs.setdefault(day, []).append((first, users))
            self.days.add(day)
            self.size += len(users) + 256

    def spill(self) -> None:
        """Move the runs in memory to the temporary database. Raises LoadError."""
        with about("temporary files (TMPDIR)"):
            if self.spilled is None:
                self.spilled = sqlite3.connect("", check_same_thread=False)
                self.spilled.execute("PRAGMA journal_mode = MEMORY")
                self.spilled.execute("CREATE TABLE run (date TEXT, first TEXT, users TEXT)")
                self.spilled.execute("CREATE INDEX run_order ON run (date, first)")
            rows = ((day, *run) for day, some in self.runs.items() for run in some)
            with self.spilled:
                self.spilled.executemany("INSERT INTO run VALUES (?, ?, ?)", rows)
        self.runs = {}
        self.size = 0

    def users(self, day: str) -> Iterator[list[str]]:
        """Yield the users of a date in order, each once, some 32,768 at a time; of a large load the
        next are made while the database stores the last."""
        runs = sorted(self.runs.get(day, ()))
        if self.spilled is None:
            yield from merged(runs)
            return
        from concurrent.futures import ThreadPoolExecutor
        from heapq import merge

        query = "SELECT first, users FROM run WHERE date = ? ORDER BY first"
        found = merged(merge(runs, self.spilled.execute(query, (day,))))
        block = (signal.SIG_BLOCK, STOPS)  # signals are for the main thread
        with ThreadPoolExecutor(1, initializer=signal.pthread_sigmask, initargs=block) as executor:
            following = executor.submit(next, found, None)
            while users := following.result():
                following = executor.submit(next, found, None)
                yield users

    def close(self) -> None:
        if self.spilled is not None:
            self.spilled.close()


def merged(runs: Iterable[tuple[str, str]]) -> Iterator[list[str]]:
    """Yield the users of runs, which are sorted by their first user: in order, each once."""
    pending: list[str] = []
    left = 0
    for first, users in runs:
        if len(pending) >= left + CHUNK:
            pending.sort()
            complete = bisect_left(pending, first)  # no later run has any of these
            if complete:
                yield list(dict.fromkeys(pending[:complete]))
                del pending[:complete]
            left = len(pending)
        pending += to_users(users)
    if pending:
        yield list(dict.fromkeys(sorted(pending)))


# -- The database ----------------------------------------------------------------------------------
#
# What is new to a date is told by the database as it stores a load. A dry run asks it for the same,
# without the writing.

LOCK_SECONDS = 60.0
SCHEMA = os.path.join(os.path.dirname(os.path.realpath(__file__)), "schema.sql")


class DateCount(Struct):
    """What became of a date, and of the users that this load has on it."""

    date: str
    active_user_count: int  # as it now stands in the table
    added: int = 0
    removed: int = 0
    loaded: int = 0  # new or not
    left_out: int = 0  # because the date is final


def schema() -> str:
    """The text of schema.sql. Raises LoadError."""
    with about(SCHEMA):
        if not os.path.exists(SCHEMA):
            raise Refused("is missing; it belongs beside load_active_users.py")
        with open(SCHEMA, encoding="utf-8") as file:
            return file.read()


class Database:
    """A transaction with an SQLite file, or where there is none to read with one in memory; ?: a
    parameter. Of its SQL, Postgres can translate whatever SQLite alone knows."""

    DIALECT: tuple[tuple[str, str], ...] = ()
    # Of each column its table, name and type, none if there are no tables yet; here its default
    COLUMNS = """SELECT t.name, c.name, c.type, c.dflt_value
        FROM sqlite_master t, pragma_table_info(t.name) c WHERE t.type = 'table'"""
    # Of large pages new users fill less; the cache holds what a load of old users changes.
    SETTINGS = ("PRAGMA page_size = 16384", "PRAGMA cache_size = -16384")  # bytes, KiB

    def __init__(self, target: str, lock_timeout: float) -> None:
        self.target = target
        self.lock_timeout = lock_timeout
        self.connection: Any = sqlite3.connect(":memory:", isolation_level=None)

    def begin(self, write: bool) -> None:
        """Begin, to write when it is our turn. An empty file that a failed first load has made
        stays, since others may have opened it. In a directory that can't be written, a database in
        WAL mode is read as one at rest."""
        path = os.path.realpath(self.target)  # the file itself, should it be a link
        uri = re.sub(rb"[^\w/.-]", lambda c: b"%%%02X" % ord(c[0]), os.fsencode(path)).decode()
        modes = ["rwc"] if write else ["rw", "ro&immutable=1"]
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise Refused("is not a regular file; choose another --db")
        except FileNotFoundError:
            modes = modes if write else []
        for mode in modes:
            try:
                name = f"file:{uri}?mode={mode}"
                connection = sqlite3.connect(name, 0.1, isolation_level=None, uri=True)
                self.connection.close()
                self.connection = connection
                for statement in (*self.SETTINGS, "BEGIN IMMEDIATE" if write else "BEGIN"):
                    self.execute(statement)
                self.execute("SELECT count(*) FROM sqlite_master")
                break
            except sqlite3.OperationalError as error:
                is_closed = code_of(error) in ("SQLITE_CANTOPEN", "SQLITE_READONLY")
                is_at_rest = not any(os.path.exists(path + end) for end in ("-wal", "-journal"))
                if mode != "rw" or not is_closed or not is_at_rest:
                    raise
        else:
            self.execute("BEGIN")  # there is nothing to read

    def spelt(self, sql: str) -> str:
        """Some SQL, as the database spells it."""
        for pattern, spelling in self.DIALECT:
            sql = re.sub(pattern, spelling, sql)
        return sql

    def execute(self, sql: str, *values: Any) -> Any:
        """Execute a statement, and let signals in while waiting for a lock."""
        deadline = time.monotonic() + self.lock_timeout
        while True:
            try:
                return self.connection.execute(sql, values)
            except sqlite3.OperationalError as error:
                if code_of(error) != "SQLITE_BUSY" or time.monotonic() > deadline:
                    raise

    def close(self) -> None:
        """Roll back what is not committed."""
        self.connection.close()

    def upgrade(self, write: bool) -> None:
        """Make the tables those of schema.sql, or only see whether they can be. Raises Refused if
        they are not ours, or of a later version."""
        with contextlib.closing(in_memory()) as new:
            wanted = new.execute(new.COLUMNS).fetchall()
            [latest] = new.execute("PRAGMA user_version").fetchone()
        present = {(row[0], row[1]): row[2].upper() for row in self.execute(self.COLUMNS)}
        statements = []
        for table, name, kind, default in wanted if present else ():
            found = present.get((table, name))
            if not found and default is not None:  # it is newer than version 1.0.0
                column = f"{name} {kind} NOT NULL DEFAULT {default}"
                statements.append(f"ALTER TABLE {table} ADD COLUMN {column}")
            elif found != self.spelt(kind):
                what = "it is not one of load_active_users.py; choose another --db"
                raise Refused(f"it has no column {table}.{name} of type {self.spelt(kind)}: {what}")
        stored = str(self.execute("PRAGMA user_version").fetchone()[0])
        if present and stored.isdecimal() and int(stored) > latest:  # a comment may say anything
            what = f"is of a later version of load_active_users.py than {__version__}; use that"
            raise Refused(what)
        if write and (statements or not present):
            for statement in [*statements, *schema().split(";\n")]:
                self.execute(statement)  # SQLite's executescript would commit first

    def kept_terms(self) -> Terms | None:
        """The terms of the rule under which the database was filled. Raises Refused."""
        cursor = self.execute("SELECT * FROM load_log LIMIT 1")
        row = cursor.fetchone()
        if row is None:
            return None
        kept = dict(zip((column[0] for column in cursor.description), row, strict=True))
        # Version 1.0.0 had the default event name alone.
        names = kept.get("event_names", '["user_engagement"]')
        minimum, globs = kept["min_engagement_msec"], kept["valuable_events"]
        try:
            time_zone(kept["timezone"])
            return kept["timezone"], tuple(to_users(names)), int(minimum), tuple(to_users(globs))
        except (TypeError, ValueError) as error:
            what = f"load_log has a rule that can't be read ({error}); correct the row"
            raise Refused(what) from None

    def check(self, rule: Rule) -> None:
        """Raise Refused if the database was filled under another rule: zones are the same that do
        the same, whatever they are called."""
        kept = self.kept_terms()
        if kept and (kept[1:] != rule.terms[1:] or not is_same_zone(kept[0], rule.terms[0])):
            rules = f"{options(kept)}; the rule of this load is {options(rule.terms)}"
            raise Refused(f"was filled under the rule {rules}; use that rule or another --db")

    def counts(self, condition: str = "", *values: str) -> dict[str, int]:
        """The counts of active_user_table by date. Raises Refused if something else is there."""
        query = f"SELECT date, active_user_count FROM active_user_table {condition} ORDER BY date"
        rows = self.execute(query, *values).fetchall()
        for day, count in rows:
            is_right = False
            with contextlib.suppress(ValueError):
                is_right = type(count) is int and str(date.fromisoformat(str(day))) == str(day)
            if not is_right:
                row = f"{day!r}, {count!r}; correct or delete it"
                raise Refused(f"active_user_table has a row that is not a date and a count: {row}")
        return {str(day): count for day, count in rows}

    def upsert(self, table: str, row: dict[str, Any]) -> None:
        """Insert a row, or bring it up to date; its first column is the key."""
        key, *others = row
        marks = ", ".join("?" * len(row))
        update = ", ".join(f"{name} = excluded.{name}" for name in others)
        insert = f"INSERT INTO {table} ({', '.join(row)}) VALUES ({marks})"
        self.execute(f"{insert} ON CONFLICT ({key}) DO UPDATE SET {update}", *row.values())

    def merge(self, day: str, load: Load, write: bool) -> tuple[int, int]:
        """Add a load's users on a date; return how many it has, and how many of them are new."""
        insert = """INSERT INTO active_user (date, user_pseudo_id)
            SELECT ?, value FROM json_each(?) AS value WHERE true
            ON CONFLICT (date, user_pseudo_id) DO NOTHING"""  # refused without the primary key
        new = """SELECT count(*) FROM json_each(?) AS value WHERE NOT EXISTS (
            SELECT 1 FROM active_user WHERE date = ? AND user_pseudo_id = value)"""
        held = added = 0
        for users in load.users(day):
            held += len(users)
            if write:
                added += self.execute(insert, day, to_json(users)).rowcount
            else:
                added += self.execute(new, to_json(users), day).fetchone()[0]
        return held, added

    def store(self, day: str, load: Load, replace: bool, write: bool) -> DateCount:
        """Store the users that a load has on a date, with those that are kept or in their place."""
        query = "SELECT count(*) FROM active_user WHERE date = ?"
        [kept] = self.execute(query, day).fetchone()
        counted = self.counts("WHERE date = ?", day).get(day)
        if write and counted is None:
            self.upsert("active_user_table", {"date": day, "active_user_count": 0})
            counted = 0  # before its users, which somebody's foreign key may need
        if replace and kept:
            held, added = self.merge(day, load, write=False)
            count = DateCount(day, held, added, kept - (held - added), held)
            if write and (count.added or count.removed):
                self.execute("DELETE FROM active_user WHERE date = ?", day)
                self.merge(day, load, write)
        elif counted and kept < counted and not replace:  # users were deleted: it is final
            count = DateCount(day, counted, left_out=sum(map(len, load.users(day))))
        else:
            held, added = self.merge(day, load, write)
            count = DateCount(day, kept + added, added, loaded=held)
        if write and count.active_user_count != counted:
            row = {"date": day, "active_user_count": count.active_user_count}
            self.upsert("active_user_table", row)
        return count


def options(terms: Terms) -> str:
    """A rule as it is written on the command line."""
    from shlex import quote

    timezone, names, minimum, globs = terms
    events = [f"--event-name {quote(name)}" for name in names]
    valuable = [f"--valuable-event {quote(glob)}" for glob in globs]
    minimum_msec = f"--min-engagement-msec {minimum}"
    return " ".join([f"--timezone {timezone}", *events, minimum_msec, *valuable])


# -- PostgreSQL ------------------------------------------------------------------------------------


class Postgres(Database):
    """A transaction with a PostgreSQL database, to which each statement is translated."""

    COLUMNS = """SELECT relname, attname, format_type(atttypid, atttypmod)
        FROM pg_class JOIN pg_attribute ON attrelid = pg_class.oid
        WHERE relname IN ('active_user_table', 'active_user', 'load_log')
            AND pg_table_is_visible(attrelid) AND attnum > 0 AND NOT attisdropped"""
    DIALECT = (  # what SQLite says, and what is the same here
        (r" WITHOUT ROWID", ""),
        (r"\bINTEGER\b", "BIGINT"),
        (r"\bREAL\b", "DOUBLE PRECISION"),
        (r"PRAGMA user_version = (\d+)", r"COMMENT ON TABLE load_log IS '\1'"),
        (r"PRAGMA user_version$", "SELECT obj_description(to_regclass('load_log'))"),
        (r"DROP VIEW IF EXISTS \w+", ""),  # others' views may depend on it
        (r"CREATE VIEW", "CREATE OR REPLACE VIEW"),
        (r"date\(([\w.]+), '([+-]\d+) days'\)", r"CAST(\1 + INTERVAL '\2 days' AS DATE)"),
        (r"julianday", ""),
        (r"json_each", "json_array_elements_text"),
        (r"\?", "%s"),
    )

    def __init__(self, target: str, lock_timeout: float) -> None:
        import psycopg

        self.lock_timeout = lock_timeout
        os.environ.setdefault("PGCONNECT_TIMEOUT", "10")  # seconds, if the URL does not say
        self.connection = psycopg.connect(
            target.replace("+psycopg", "", 1),
            autocommit=True,
            client_encoding="UTF8",
            prepare_threshold=None,  # named statements don't pass through a transaction pooler
        )

    def begin(self, write: bool) -> None:
        """Begin, to write when it is our turn: loads that overlap don't see each other's users."""
        mode = "READ WRITE" if write else "READ ONLY"
        self.execute(f"BEGIN ISOLATION LEVEL READ COMMITTED {mode}")
        self.execute(f"SET LOCAL lock_timeout = {max(1, round(self.lock_timeout * 1000))}")
        if write:
            self.execute("SELECT pg_advisory_xact_lock(hashtext('load_active_users'))")
        elsewhere = """SELECT relnamespace::regnamespace FROM pg_class
            WHERE relname = 'load_log' AND relkind = 'r' AND to_regclass('load_log') IS NULL"""
        for [name] in self.execute(elsewhere).fetchall():
            what = "which search_path leaves out, or the role may not use"
            raise Refused(f"its tables are in schema {name}, {what}")

    def execute(self, sql: str, *values: Any) -> Any:
        return self.connection.execute(self.spelt(sql).encode(), values or None)


def is_postgres(target: str) -> bool:
    return re.match(r"postgres(ql(\+psycopg)?)?://", target) is not None


def in_memory() -> Database:
    """A transaction with the tables of schema.sql, and no rows. Raises LoadError."""
    db = Database("", LOCK_SECONDS)
    with about(SCHEMA):
        db.connection.executescript(schema())
        db.execute("BEGIN")
    return db


@contextlib.contextmanager
def transaction(
    target: str, write: bool = False, lock_timeout: float = LOCK_SECONDS
) -> Iterator[Database]:
    """A transaction, committed at the end, rolled back at any error: to write makes what tables are
    missing, to read finds nothing in them. Raises LoadError."""
    with about(target), contextlib.ExitStack() as stack:
        connect = Postgres if is_postgres(target) else Database
        db = stack.enter_context(contextlib.closing(connect(target, lock_timeout)))
        db.begin(write)
        if not (write or db.execute(db.COLUMNS).fetchone()):
            db = stack.enter_context(contextlib.closing(in_memory()))
        db.upgrade(write)
        yield db
        db.execute("COMMIT")


def stored_counts(target: str) -> tuple[list[tuple[str, int]], Terms | None]:
    """The rows of active_user_table by date, and the rule if that may be read. Raises LoadError."""
    with transaction(target) as db:
        if not (is_postgres(target) or os.path.exists(target)):
            raise Refused("there is no such database; load events into it first")
        counts = list(db.counts().items())
        try:
            return counts, db.kept_terms()
        except Exception as error:
            if code_of(error) != "42501":  # a dashboard's role that may read the counts alone
                raise
            return counts, None


# -- Loading ---------------------------------------------------------------------------------------

CHANGES = ("added", "removed", "loaded", "left_out")


class Report(Struct):
    """What was loaded so far: by one load, or with --commit-every by many."""

    shows_removed: bool = False
    loads: int = 0
    tally: Tally = msgspec.field(default_factory=Tally)
    counts: dict[str, DateCount] = {}

    def sum(self, change: str) -> int:
        return sum(getattr(count, change) for count in self.counts.values())

    def after(self, load: Load, counts: list[DateCount]) -> Report:
        """The report once one more load is committed."""
        sums = {count.date: count for count in counts}
        for day, count in self.counts.items():
            latest = sums.setdefault(day, DateCount(day, count.active_user_count))
            for change in CHANGES:
                setattr(latest, change, getattr(latest, change) + getattr(count, change))
        tally = self.tally.plus(load.tally)
        return Report(self.shows_removed, self.loads + 1, tally, dict(sorted(sums.items())))


class Loader(Struct):
    """Loads what is found in the ranges of some events into a database."""

    events: tuple[str, ...]
    target: str
    rule: Rule
    dates: str | None
    replace: bool = False
    validate: bool = False
    dry_run: bool = False
    max_bad_records: int = 0
    rejects: Any = None  # a file that all of them are appended to
    bar: Any = None
    report: Report = msgspec.field(default_factory=Report)
    started: float = msgspec.field(default_factory=time.monotonic)
    load_id: str = msgspec.field(default_factory=lambda: os.urandom(8).hex())
    part: Range | None = None  # the latest
    lines: int = 0  # of its source, before the next batch
    every: float = 0  # seconds between commits; 0: there is one

    def scanner(self) -> Scanner:
        """A scanner for the dates, of which the last may be tomorrow; beside those that it replaces
        a load has others that are merged, if they are usual ones."""
        first, last = parse_dates(self.dates, self.rule)
        usual = parse_dates(None, self.rule)
        if self.replace and first <= usual[1] and last >= usual[0]:
            first, last = min(first, usual[0]), max(last, usual[1])
        return Scanner(self.rule, (first, last), self.validate, self.rejects is not None)

    def take(self, load: Load, part: Range, batch: Batch) -> None:
        """Add a batch to a load, bad records to the rejects; say the first. Raises LoadError."""
        if part is not self.part and part.start == 0:
            self.lines = 0
        self.part = part
        for number, (line, why, _) in enumerate(batch.bad, load.tally.bad_records):
            if number < MAX_REPORTED:
                say(f"{redacted(part.source)}:{self.lines + line}: {why}")
        self.lines += batch.tally.lines
        if self.rejects and batch.bad:
            with about(self.rejects.name):
                self.rejects.writelines(record + b"\n" for *_, record in batch.bad)
                self.rejects.flush()
        load.add(batch)
        if self.bar is not None:
            with contextlib.suppress(OSError):
                self.bar.update(batch.tally.bytes)

    def check(self, load: Load) -> None:
        """Raise LoadError if the bad records or the dates of a load refuse it."""
        number = load.tally.bad_records
        if number > MAX_REPORTED:
            say(f"and {number - MAX_REPORTED} more bad record{'s' * (number > MAX_REPORTED + 1)}")
        if number > self.max_bad_records:
            what = f"bad records: {number}, more than --max-bad-records {self.max_bad_records}"
            since = " since the last commit" * bool(self.report.loads)
            raise LoadError(f"{what}; nothing was loaded{since}")
        early = load.tally.too_early
        if early and early == load.tally.active_events and not (self.dates or self.every):
            what = "event_timestamp must be in microseconds UTC (to load such dates, give --dates)"
            raise LoadError(f"all active events ({early}) are dated before 2000: {what}")

    def commit(self, load: Load, lock_timeout: float = LOCK_SECONDS) -> None:
        """Commit a load in one transaction. Raises LoadError, Unavailable."""
        dates = parse_dates(self.dates, self.rule)
        first, last = (date.fromisoformat(end).toordinal() for end in dates)
        days = range(first, last + 1) if self.replace else ()
        replaced = {date.fromordinal(day).isoformat() for day in days}
        with transaction(self.target, not self.dry_run, lock_timeout) as db:
            db.check(self.rule)  # again: others may have been here since it began
            counts = [
                db.store(day, load, day in replaced, not self.dry_run)
                for day in sorted(replaced.union(load.days))
            ]
            report = self.report.after(load, counts)
            if not self.dry_run:
                db.upsert("load_log", self.log_row(dates, report))
        self.report = report

    def log_row(self, dates: Dates, report: Report) -> dict[str, Any]:
        names = map(os.fsencode, map(redacted, self.events))
        tally = {name: getattr(report.tally, name) for name in Tally.__struct_fields__}
        del tally["too_early"]
        return {
            "load_id": self.load_id,
            "loaded_at": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "seconds": round(time.monotonic() - self.started, 3),
            "sources": ascii_json([name.decode(errors="backslashreplace") for name in names]),
            "timezone": self.rule.terms[0],
            "event_names": ascii_json(self.rule.terms[1]),
            "min_engagement_msec": self.rule.terms[2],
            "valuable_events": ascii_json(self.rule.terms[3]),
            "dates": "..".join(dates),
            "replaced": int(self.replace),
            **tally,
            **{change: report.sum(change) for change in CHANGES if change != "loaded"},
        }

    def load_once(self, found: Found) -> None:
        """Load what is found in some ranges. Raises LoadError."""
        with contextlib.closing(Load()) as load:
            for part, batch in found:
                self.take(load, part, batch)
            if self.bar is not None:
                with contextlib.suppress(OSError):
                    self.bar.set_description_str("writing", refresh=sys.stderr.isatty())
            self.check(load)
            self.commit(load)

    def warn(self) -> None:
        """Warn of a load that held nothing of what it is about."""
        tally = self.report.tally
        if tally.lines > tally.blank_lines and not tally.engagement_events:
            what = f"none of the lines ({tally.lines}) is an engagement event"
            hint = "is this BigQuery's export of Google Analytics, one event per line?"
            say(f"Warning: {what} ({', '.join(self.rule.terms[1])}); {hint}")
        elif tally.too_early and tally.too_early == tally.active_events:
            what = "all active events are dated before 2000"
            say(f"Warning: {what}; is event_timestamp in microseconds?")


def ascii_json(value: Any) -> str:
    """A value as JSON that a database of any encoding can hold."""
    text = to_json(value)
    if not text.isascii():
        import json

        text = json.dumps(value)
    return text


@contextlib.contextmanager
def opened_rejects(path: str) -> Iterator[Any]:
    """A file or pipe to append bad records to, each on a line of its own. Raises LoadError."""
    with about(path):
        file = open(path, "ab" if os.path.exists(path) and not os.path.isfile(path) else "a+b")
        if file.seekable() and file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            file.write(b"" if file.read(1) == b"\n" else b"\n")
    try:
        yield file
    finally:
        with contextlib.suppress(OSError):  # all has been flushed, or that has failed
            file.close()


# -- Loading what arrives --------------------------------------------------------------------------
#
# A live load is a sequence of ordinary loads, each of the whole lines that came in an interval.

LIVE_LOCK_SECONDS = 0.5  # to wait for a lock: meanwhile it locks out new readers
LIVE_BYTES = 256 << 10  # of users to commit at once: readers are locked out for moments only
POLL_SECONDS = 0.2  # without input, after which to look at the clock


def arriving(source: str, stopped: list[int]) -> Iterator[Range]:
    """Yield the whole lines that come through a pipe as ranges, empty where there are none for a
    moment; files and URLs are cut into ranges as ever. Something in stopped ends it."""
    if not is_pipe(source):
        yield from itertools.takewhile(lambda _: not stopped, ranges(source, BATCH))
        return
    # Without blocking: it may be long until a named pipe is opened at its other end.
    descriptor = 0 if source == "-" else os.open(source, os.O_RDONLY | os.O_NONBLOCK)
    with open(descriptor, "rb", buffering=0, closefd=source != "-"):
        held = bytearray()
        start = 0
        is_open = True
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        while is_open and not stopped:
            known = len(held)
            if poll.poll(POLL_SECONDS * 1000):
                held += os.read(descriptor, 1 << 20)
                is_open = len(held) > known
            if held and not is_open:
                time.sleep(POLL_SECONDS)  # what stopped its producer may be about to stop us
            length = held.rfind(b"\n", known) + 1 if is_open or stopped else len(held)
            yield Range(source, start, data=bytes(held[:length]))
            start += length
            del held[:length]
            if len(held) > MAX_LINE:
                raise Refused(TOO_LONG)
        if held:
            say(f"{source}: the last line had not ended: its {len(held)} bytes were left out")


class LiveLoader(Loader):
    """Loads what comes through pipes, until their end or a signal. While the database is locked,
    full or restarting, what was read is kept, and no more is read than a bound."""

    load: Load = msgspec.field(default_factory=Load)  # of this interval
    waiting: list[Load] = []  # those of earlier intervals that are not committed yet
    stopped: list[int] = []  # the signals that have come
    lines_read: int = 0

    def load_arriving(self, sources: list[str]) -> None:
        """Load what comes, every so many seconds. Raises LoadError, and says what is not stored."""
        for number in (*STOPS, signal.SIGHUP):
            if number in STOPS or signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
                signal.signal(number, lambda number, _: self.stopped.append(number))
        due = time.monotonic() + self.every
        try:
            try:
                for _ in self.taken(sources):
                    while not self.stopped and (time.monotonic() >= due or self.is_full()):
                        if self.waiting and time.monotonic() < due:
                            time.sleep(POLL_SECONDS)
                            continue
                        self.commit_interval()
                        due = time.monotonic() + self.every
                self.finish_interval()
            finally:  # an error ends it when what was read before is committed
                with contextlib.suppress(LoadError):
                    self.finish_interval()
                self.commit_at_last()
        except (LoadError, SystemExit):
            lost = self.lines_read - self.report.tally.lines
            if lost and self.part:
                last = f"{redacted(self.part.source)}:{self.lines}"
                say(f"not stored: the last lines that were read ({lost}), up to {last}")
            raise

    def is_full(self) -> bool:
        """Whether as many users wait for a commit as are to be held."""
        return sum(load.size + 256 for load in (self.load, *self.waiting)) > LIVE_BYTES

    def finish_interval(self) -> None:
        """Let the load of an interval wait for its commit. Raises LoadError if its bad records
        refuse it."""
        load, self.load = self.load, Load()
        self.check(load)
        if load.tally.lines:
            self.waiting.append(load)

    def taken(self, sources: list[str]) -> Iterator[None]:
        """Take what arrives batch by batch; yield after each, also when nothing has come for a
        while. Raises LoadError."""
        for number, source in enumerate(sources, 1):
            with about(source):
                for part in arriving(source, self.stopped):
                    for batch in self.scanner()(part):
                        self.lines_read += batch.tally.lines
                        if batch.tally.lines or batch.tally.bytes:
                            self.take(self.load, part, batch)
                        yield
                        if self.stopped and part.data is None:
                            break  # of a file, more can be read another time
            if self.stopped:
                left = len(sources) - number
                if left or not is_pipe(source):
                    what = "may not have been read to its end"
                    say(f"{redacted(source)}: {what}; later sources not read: {left}")
                return

    def commit_interval(self) -> None:
        """Commit what came, or keep it while the database is unavailable, and say so once."""
        is_told = bool(self.waiting)
        self.finish_interval()
        try:
            self.commit_waiting(0)
        except Unavailable as error:
            if not is_told:
                say(f"{error}; what was read waits, trying again every {self.every:g} s")

    def commit_waiting(self, patience: float) -> None:
        """Commit the loads that wait, each in a transaction, and try so many seconds. Raises
        LoadError, Unavailable."""
        deadline = time.monotonic() + patience
        while self.waiting:
            try:
                self.commit(self.waiting[0], max(deadline - time.monotonic(), LIVE_LOCK_SECONDS))
                self.waiting.pop(0).close()
            except Unavailable:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(POLL_SECONDS)

    def commit_at_last(self) -> None:
        """Commit what is left when a live load ends; wait as long as any load does, or until one
        more signal. Raises LoadError."""
        again = self.stopped
        handle_stops(lambda number, frame: stop(number, frame) if again else again.append(number))
        self.commit_waiting(LOCK_SECONDS)


# -- The report ------------------------------------------------------------------------------------

REMARKS = ("anonymous_events", "out_of_range_events", "bad_records")
TALLIES = ("lines", "engagement_events", "active_events", *REMARKS)
ASCII = str.maketrans({"█": "#", "→": "->"})  # for terminals that have no more


def as_json(report: Report) -> str:
    """The report as one JSON object; left_out is in it if users came too late for final dates."""
    names = ("date", "active_user_count", "added", "removed")
    dates = [{name: getattr(count, name) for name in names} for count in report.counts.values()]
    tally = {name: getattr(report.tally, name) for name in TALLIES}
    left_out = report.sum("left_out")
    return to_json({"dates": dates, **tally, **({"left_out": left_out} if left_out else {})})


def cells(report: Report) -> list[list[str]]:
    """The head of the report, and a row per date."""
    names = ["date", "active_user_count", "added", *["removed"] * report.shows_removed]
    rows = ([str(getattr(count, name)) for name in names] for count in report.counts.values())
    return [names, *rows]


def as_csv(report: Report) -> str:
    return "\n".join(map(",".join, cells(report)))


def as_table(report: Report) -> str:
    """A line per date, with a bar whose end is what was added, and what became of the lines."""
    import shutil

    width = shutil.get_terminal_size().columns
    rows = cells(report)
    sizes = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        day, *numbers = map(str.rjust, row, sizes)
        lines.append("  ".join([day.strip().ljust(10), *numbers]))
    room = max(width - len(lines[0]) - 2, 0)
    counts = list(report.counts.values())
    most = max((count.active_user_count for count in counts), default=0)
    for index, count in enumerate(counts, 1):
        length = -(-count.active_user_count * room // max(most, 1))
        new = length * count.added // max(count.active_user_count, 1)
        bar = click.style("█" * (length - new), fg="blue") + click.style("█" * new, fg="green")
        lines[index] += f"  {bar}" if length else ""
    return "\n".join([*lines, textwrap.fill(summary(report), width, break_on_hyphens=False)])


def summary(report: Report) -> str:
    """What became of the lines."""

    def plural(number: int, nouns: str) -> str:
        return f"{number} {nouns[:-1] if number == 1 else nouns}"

    tally = report.tally
    changes = f"{report.sum('added')} new"
    if report.sum("removed"):
        changes += f", {report.sum('removed')} removed"
    user_days = f"{plural(report.sum('loaded'), 'user-days')} ({changes})"
    steps = [
        plural(tally.lines, "lines"),
        plural(tally.engagement_events, "engagement events"),
        f"{tally.active_events} active",
        f"{changes} user-days" if report.loads > 1 else user_days,  # each load held its own
    ]
    numbers = {name.replace("_", " "): getattr(tally, name) for name in REMARKS}
    remarks = [plural(number, name) for name, number in numbers.items() if number]
    if report.sum("left_out"):
        remarks.append(f"{plural(report.sum('left_out'), 'users')} left out of final dates")
    return "; ".join([" → ".join(steps), *remarks])


def print_report(text: str) -> None:
    """Print the report of a committed load. Raises LoadError."""
    try:
        text.encode(sys.stdout.encoding)
    except UnicodeEncodeError:
        text = text.translate(ASCII)
    is_plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    with about("the events are loaded, but the report could not be written"):
        with contextlib.suppress(BrokenPipeError):  # the reader had enough
            click.echo(text, color=False if is_plain else None)  # None: on a terminal only


# -- The plot --------------------------------------------------------------------------------------

PICTURES: Any = {".png": {"Software": None}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
NAN = float("nan")


def drawn(rows: list[tuple[str, int]], terms: Terms | None) -> Any:
    """The matplotlib figure of some rows of active_user_table."""
    import logging

    logging.disable()  # about caches and fonts, which would be in cron's mail
    warnings.simplefilter("ignore")  # about a letter that its font lacks
    os.environ.update(MPLBACKEND="agg", MATPLOTLIBRC=os.devnull)  # whatever a notebook has set
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcdefaults()  # there may be a /matplotlibrc
    matplotlib.rcParams["svg.hashsalt"] = "load_active_users"
    figure = Figure(figsize=(10, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title("Active users per day", loc="left", fontsize=14)
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    caption = " to ".join(sorted({day for day, _ in (*rows[:1], *rows[-1:])})) or "no dates yet"
    if rows:
        first = EPOCH.toordinal()
        draw_counts(axes, {date.fromisoformat(day).toordinal() - first: n for day, n in rows})
    else:
        axes.set(xticks=[], yticks=[])
    if rows and terms:
        rule = f"{terms[0]} dates · {', '.join(terms[1])} of at least {terms[2]} ms"
        caption = f"{rule} · {' '.join(terms[3])} · {caption}"
    caption = textwrap.fill(caption, 140)
    figure.supxlabel(caption, fontsize=8, color="0.4", x=0.01, ha="left", parse_math=False)
    return figure


def draw_counts(axes: Any, counts: dict[int, int]) -> None:
    """Draw a bar for each day (counted from 1970-01-01), and grey where days have none: up to 13
    days with its count, from then on with the 7-day average."""
    from matplotlib import dates, ticker

    first = min(counts)
    last = max(counts)
    span = last - first + 1
    half = 0.4 if span <= 100 else 0.5
    edges = [edge for day in counts for edge in (day - half, day + half)]
    heights = [value for count in counts.values() for value in (count, NAN)][:-1]
    axes.stairs(heights, edges, fill=True, color="#7fa8d1" if span < 14 else "#b3cce6")
    gaps = [(one, other) for one, other in itertools.pairwise(counts) if other - one > 1]
    for number, (before, after) in enumerate(gaps):
        label = None if number else "no data"  # one is enough for the legend
        axes.axvspan(before + 0.5, after - 0.5, color="0.93", linewidth=0, label=label)
    if span < 14:
        longest = len(f"{max(counts.values()):,}")
        points = min(9, 1000 / max(span, 7) / longest)  # neighbours do not touch
        style = {"textcoords": "offset points", "ha": "center", "fontsize": points}
        for day, count in counts.items():
            axes.annotate(f"{count:,}", (day, count), (0, 3), **style)
    else:
        line = week_averages(counts).items()
        axes.plot(*zip(*line, strict=True), color="#1f3b5c", label="7-day average")
    margin = max(0.6, (7 - span) / 2, span / 100)
    earliest, latest = (day.toordinal() - EPOCH.toordinal() for day in (date.min, date.max))
    axes.set_xlim(max(first - margin, earliest), min(last + margin, latest))
    axes.set_ylim(0, max(*counts.values(), 1) * 1.08)
    axes.yaxis.set_major_locator(ticker.MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    ticks: Any = ticker.FixedLocator(range(first, last + 1))
    if span > 10:
        ticks = dates.WeekdayLocator(0) if span <= 70 else dates.AutoDateLocator(maxticks=9)
    axes.xaxis.set_major_locator(ticks)
    labels = "%a\n%Y-%m-%d" if span <= 70 else "%Y-%m-%d"
    axes.xaxis.set_major_formatter(dates.DateFormatter(labels))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, fontsize=9)


def week_averages(counts: dict[int, int]) -> dict[int, float]:
    """The average of each day and the six before it, of those that have a count: NaN in the first
    six days, where fewer than four have one, and on the day after the last of a stretch."""
    averages = {}
    first = min(counts)
    for day in counts:
        week = [counts[one] for one in range(day - 6, day + 1) if one in counts]
        is_known = day >= first + 6 and len(week) >= 4
        averages[day] = sum(week) / len(week) if is_known else NAN
        averages[day + 1] = NAN  # if that has no count: there the line ends
    return averages


def plot_table(path: str, target: str) -> None:
    """Draw the active_user_table of a database into a file, which is whole at any moment; behind
    a link, the file that it links to. The same rows give the same bytes. Raises LoadError."""
    rows, terms = stored_counts(target)
    with about(f"{path}: what was loaded is loaded, but not drawn"):
        suffix = os.path.splitext(path)[1].lower()
        path = os.path.realpath(path)
        os.chdir("/")  # matplotlib reads a matplotlibrc of the working directory
        content = io.BytesIO()
        drawn(rows, terms).savefig(content, format=suffix[1:], metadata=PICTURES[suffix])
        unfinished = f"{path}.{os.urandom(4).hex()}"
        try:
            with open(unfinished, "xb") as file:
                file.write(content.getvalue())
            if os.path.exists(path):
                os.chmod(unfinished, stat.S_IMODE(os.stat(path).st_mode))
            os.replace(unfinished, path)
        finally:
            with contextlib.suppress(OSError):
                os.unlink(unfinished)


# -- Checks, before anything is read ---------------------------------------------------------------

PART = r"(?:[^\s/?#\[\]@%\\]|%(?!00)[0-9A-Fa-f]{2})*"  # of a URL
VALUE = r"(?:[^\s?#&@%\\]|%(?!00)[0-9A-Fa-f]{2})*"
HOST = r"(?:[^\s:/?#\[\]@]*|\[[0-9A-Fa-f:.%]+\])(?::\d*)?"
POSTGRES_URL = (
    rf"[a-z+]+://(?:{PART}@)?{HOST}(?:,{HOST})*(?:/{PART})?(?:\?\w+={VALUE}(?:&\w+={VALUE})*)?"
)
OTHER_DB = (  # another scheme, what may hold a password, and libpq's key=value
    r":|[A-Za-z][\w+.-]+:|.*://|.*:.*@|"
    r"(?:.*\s)?(?:host|hostaddr|port|dbname|user|password|service)\s*="
)
DB_EXPECTED = (
    "expected the path of an SQLite file, or a postgresql:// URL (USER@HOST:PORT/DATABASE, special "
    "characters percent-encoded); a password is best kept in ~/.pgpass or PGPASSWORD"
)


def check_options(
    events: tuple[str, ...],
    db: str,
    dates: str | None,
    replace: bool,
    cluster: str | None,
    every: float | None,
    dry_run: bool,
    plot: str | None,
) -> None:
    """Raise UsageError for options that contradict each other, or have values that can't be."""
    context = click.get_current_context()
    for parameter in context.command.params:
        variable = f"{context.auto_envvar_prefix}_{str(parameter.name).upper()}"
        if os.environ.get(variable) == "":  # which click passes over
            raise click.UsageError(f"{variable} must not be empty; unset it, or set a value")
    if not events and not plot:
        raise click.MissingParameter(param_hint="'EVENTS...'", param_type="argument")
    if plot and os.path.splitext(plot)[1].lower() not in PICTURES:
        what = f"{plot!r} does not end in {', '.join(PICTURES)}"
        raise click.BadParameter(what, param_hint="'--plot'")
    if every != every:
        raise click.BadParameter("nan is not a number of seconds", param_hint="'--commit-every'")
    if every and (replace or dry_run):
        raise click.UsageError("--commit-every can't be combined with --replace or --dry-run")
    if cluster and (every or "-" in events):
        raise click.UsageError("--cluster can't be combined with --commit-every or standard input")
    if replace and not all((dates or "..").split("..")):
        raise click.UsageError("--replace needs --dates FROM..TO, the dates that it replaces")
    is_url = is_postgres(db)
    if (is_url and not re.fullmatch(POSTGRES_URL, db)) or (not is_url and re.match(OTHER_DB, db)):
        raise click.BadParameter(DB_EXPECTED, param_hint="'--db'")


def make_rule(dates: str | None, *terms: Any) -> Rule:
    """The rule of some terms. Raises BadParameter, also if the dates are none."""
    hint = "'--timezone'"
    try:
        rule = rule_of(*terms)
        hint = "'--dates'"
        parse_dates(dates, rule)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint=hint) from None
    return rule


def identity(file: str | int) -> object:
    """What is equal for two names of one file, and for nothing else: a terminal is no file."""
    try:
        status = os.stat(file)
    except OSError:
        return os.path.realpath(str(file))
    is_file = stat.S_ISREG(status.st_mode) or stat.S_ISFIFO(status.st_mode)
    return (status.st_dev, status.st_ino) if is_file else object()


def check_files(sources: list[str], db: str, rejects: str | None, plot: str | None) -> None:
    """Raise UsageError if an output is a file that is read or written otherwise."""
    files: dict[object, str] = {identity(SCHEMA): "schema.sql", identity(__file__): "the program"}
    for source in sources:
        paths = [re.sub(r"^(file|local|dir)://", "", part) for part in source.split("::")]
        paths = [*map(os.path.expanduser, paths), os.path.join(paths[-1], paths[0])]
        for path in paths if source != "-" else [0]:
            files[identity(path)] = f"the input {redacted(source)}"
    if other := files.get(identity(1)):
        raise click.UsageError(printable(f"standard output and {other} are the same file"))
    files |= {identity(1): "standard output", identity(2): "standard error"}
    path = os.path.realpath(db)
    beside = {f"--db's {end}": path + end for end in ("-journal", "-wal", "-shm")}
    outputs = {"--db": db, **beside, "--rejects": rejects, "--plot": plot}
    for name, output in outputs.items():
        if name in ("--rejects", "--plot") and re.match(URL, output or ""):
            raise click.UsageError(f"{name} must be a local file, not a URL")
        if output and (other := files.setdefault(identity(output), name)) != name:
            raise click.UsageError(printable(f"{name} and {other} are the same file: {output!r}"))


def check_writable(path: str, may_be_pipe: bool) -> None:
    """Raise LoadError if a file can't be written."""
    directory = os.path.dirname(os.path.realpath(path))
    with about(path):
        if not os.path.isdir(directory):
            raise Refused(f"there is no directory {directory}; create it first")
        if os.path.isdir(path):
            raise Refused("is a directory; name a file")
        if os.path.exists(path) and not (os.path.isfile(path) or may_be_pipe):
            raise Refused("is not a regular file; name another")
        for place, name in ((path, ""), (directory, f"{directory} ")):
            if os.path.exists(place) and not os.access(place, os.W_OK):
                raise Refused(f"{name}can't be written; make it writable, or choose another")


def check_database(target: str, rule: Rule, dry_run: bool, may_wait: bool) -> None:
    """Raise LoadError where a load is going to be refused, before the events are read; a live load
    begins all the same while the database is unavailable."""
    try:
        with transaction(target) as db:
            db.check(rule)
            if not dry_run:
                for table in ("active_user_table", "active_user", "load_log"):
                    db.execute(f"EXPLAIN INSERT INTO {table} DEFAULT VALUES")  # is it permitted?
    except Unavailable as error:
        if not may_wait:
            raise
        say(f"{error}; what is read will wait for it")


# -- The command -----------------------------------------------------------------------------------

COUNT = click.IntRange(0, 10**15)
LAYOUTS = {"table": as_table, "json": as_json, "csv": as_csv}
CLUSTER_RANGE = 256 << 20  # bytes
Decorator = Callable[[Callable[..., None]], Callable[..., None]]


class Text(click.types.StringParamType):
    """A text that is not empty; in the environment one a line."""

    def split_envvar_value(self, rv: str) -> list[str]:
        return rv.strip("\n").split("\n")

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        if not str(value).strip():
            self.fail("must not be empty", param, ctx)
        if param.multiple and re.search("[\ud800-\udfff]", value):  # files have names of any bytes
            self.fail("must be UTF-8", param, ctx)
        return super().convert(value, param, ctx)


def option(name: str, metavar: str | None, help: str, **more: Any) -> Decorator:
    """An option of the command."""
    more.setdefault("type", Text() if metavar else None)
    return click.option(*name.split(", "), metavar=metavar, help=help, **more)


def scanned(parts: list[Range], scan: Scanner, workers: int | None, cluster: str | None) -> Found:
    """What is found in some ranges, by whoever scans them soonest."""
    if cluster:
        return scan_on_cluster(parts, scan, cluster)
    cpus = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    number = min(workers or cpus, len(parts))
    is_large = sum(part.work for part in parts) > POOL_MIN_BYTES
    if number > 1 and is_large and all(part.size for part in parts):
        return scan_in_processes(parts, scan, number)
    return scan_in_turn(parts, scan)


def progress_bar(is_wanted: bool | None, parts: list[Range]) -> Any:
    """A bar on standard error, in bytes, or what enters as None; if that is left open, a bar on a
    terminal."""
    is_terminal = sys.stderr.isatty()
    if not (is_terminal if is_wanted is None else is_wanted):
        return contextlib.nullcontext()
    total = sum(part.size for part in parts) if all(part.size for part in parts) else 0
    style: Any = {"unit": "B", "unit_scale": True, "leave": False, "dynamic_ncols": True}
    seldom: Any = {} if is_terminal else {"mininterval": 10, "delay": 10}  # seconds, in a log
    with about("the progress bar (TQDM_ variables)"):
        from tqdm import tqdm

        tqdm.monitor_interval = 0  # no thread beside those that fork
        return tqdm(total=total or None, **style, **seldom)


@contextlib.contextmanager
def exit_status() -> Iterator[None]:
    """End with a line on standard error at whatever refuses the load or its command line."""
    try:
        yield
    except click.ClickException as error:
        shown = without_secrets(error.message)  # a URL may stand after a wrong option
        error.message = shown  # type: ignore[misc]
        with contextlib.suppress(OSError):
            error.show()
        sys.exit(error.exit_code)
    except (LoadError, OSError, MemoryError) as error:
        say(f"Error: {error if isinstance(error, LoadError) else reason(error)}")
        sys.exit(1)
    finally:
        # All is done, and what Python does at its end is not to be disturbed, nor to fail.
        for number in (*STOPS, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                discard(stream)


def discard(stream: Any) -> None:
    """Let what is written to a stream, also what waits in its buffer, go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def stop(number: int, frame: object) -> NoReturn:
    """End at a signal with the exit status that a shell expects."""
    handle_stops(lambda *_: None)  # only the first counts
    sys.unraisablehook = lambda _: os._exit(128 + number)  # where Python would pass over our exit
    word = "Interrupted" if number == signal.SIGINT else "Terminated"
    line_end = "\n" * sys.stderr.isatty()  # after what is on the line
    text = f"{line_end}{word}: uncommitted changes were rolled back\n"
    if select.select([], [2], [], 0)[1]:
        with contextlib.suppress(OSError):
            os.write(2, text.encode())  # not by sys.stderr, which may be writing just now
    else:
        discard(sys.stderr)  # nobody reads it
    discard(sys.stdout)
    sys.exit(128 + number)


def handle_stops(handler: Any) -> None:
    for number in STOPS:
        signal.signal(number, handler)


def open_standard_streams() -> None:
    """Give nothing else the descriptors of standard streams that a daemon has closed: output goes
    nowhere, and input can't be read."""
    descriptor = 0
    while descriptor < 3:  # each time the first that is free
        descriptor = os.open(os.devnull, os.O_WRONLY)
    os.close(descriptor)
    sys.stdout = sys.stdout or open(1, "w")
    sys.stderr = sys.stderr or open(2, "w")


@contextlib.contextmanager
def as_it_was() -> Iterator[None]:
    """SHIM: leave this process as it was."""
    import logging

    numbers = (*STOPS, signal.SIGHUP, signal.SIGALRM)
    handlers = {number: signal.getsignal(number) for number in numbers}
    disabled, filters = logging.root.manager.disable, warnings.filters[:]
    variables, directory, hook = dict(os.environ), os.getcwd(), sys.unraisablehook
    try:
        yield
    finally:
        if not os.environ.get("SHIM_OFF"):
            for number, handler in handlers.items():
                signal.signal(number, handler)
            logging.disable(disabled)
            warnings.filters[:] = filters  # type: ignore[index]
            os.environ.clear()
            os.environ.update(variables)
            os.chdir(directory)
            sys.unraisablehook = hook


class Shim(click.Command):
    """SHIM: main reports errors itself, and leaves nothing behind in this process."""

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        run: Any = super().main
        if not standalone_mode:
            return run(*args, standalone_mode=False, **extra)
        with as_it_was(), exit_status():
            sys.exit(run(*args, standalone_mode=False, **extra) or 0)


# fmt: off
@click.command(cls=Shim, context_settings={
    "auto_envvar_prefix": "LOAD_ACTIVE_USERS", "help_option_names": ["-h", "--help"],
    "max_content_width": 80, "show_default": True})
@click.argument("events", nargs=-1, type=Text(), metavar="EVENTS...")
@option("--db", "PATH", "SQLite file, created if missing, or postgresql:// URL.",
        default="active_user_table.db")
@option("--timezone", "NAME", "IANA time zone whose calendar dates are counted.",
        default="US/Central")
@option("--event-name", "NAME", "Event that can make a user active; repeatable; *: any event that "
        "holds an engagement_time_msec.", default=["user_engagement"], multiple=True)
@option("--min-engagement-msec", "N", "Minimum engagement time of an active event, inclusive.",
        default=3000, type=COUNT)
@option("--valuable-event", "GLOB", "An event parameter whose key matches makes the event "
        "valuable; repeatable.", default=["*_event"], multiple=True)
@option("--dates", "FROM..TO", "Count only events on these dates; either end may be left out.",
        show_default="2000-01-01.. to tomorrow")
@option("--replace", None, "These events are the whole truth for --dates, both ends of which "
        "must be given.", is_flag=True)
@option("--max-bad-records", "N", "Bad records to tolerate; if there are more, nothing is loaded.",
        default=0, type=COUNT)
@option("--rejects", "FILE", "Append every bad record to FILE, byte for byte, one per line.")
@option("--validate", None, "Decode every line in full, also those that cannot hold an engagement "
        "event.", is_flag=True)
@option("--workers", "N", "Processes that scan.", type=click.IntRange(1),
        show_default="the usable CPUs")
@option("--cluster", "ADDRESS", "Scan on a Dask cluster, as in tcp://host:8786.")
@option("--commit-every", "SECONDS", "Endless input: load what has come, every so often.",
        type=click.FloatRange(1, 10**6))
@option("--dry-run", None, "Count and report; write nothing.", is_flag=True)
@option("--format", None, "Report on standard output.", default="table",
        type=click.Choice(list(LAYOUTS)))
@option("--plot", "FILE", "Draw the whole active_user_table as .png, .svg or .pdf.")
@option("--progress/--no-progress", None, "Progress bar on standard error.", default=None,
        show_default="on a terminal")
@option("-q, --quiet", None, "No report on standard output.", is_flag=True)
@click.version_option(__version__, message="%(version)s")
def main(
    events: tuple[str, ...], db: str, timezone: str, event_name: tuple[str, ...],
    min_engagement_msec: int, valuable_event: tuple[str, ...], dates: str | None, replace: bool,
    max_bad_records: int, rejects: str | None, validate: bool, workers: int | None,
    cluster: str | None, commit_every: float | None, dry_run: bool, format: str,
    plot: str | None, progress: bool | None, quiet: bool,
) -> None:
    """Load the number of active users per day from analytics events into SQL.

    \b
    Examples:
      python load_active_users.py data/bq-results-sample-data.jsons
      python load_active_users.py --db /srv/a.db /srv/events/*.json.gz
      python load_active_users.py --db /srv/a.db --plot users.png
      some-producer | python load_active_users.py --commit-every 5 -

    EVENTS are newline-delimited JSON files as BigQuery exports them, also
    compressed (gzip, zstd), URLs, or - for standard input. They are loaded in
    one transaction; what was loaded before is not counted twice. Every option
    can be set in the environment too: LOAD_ACTIVE_USERS_DB, ...
    """
    if not commit_every:
        handle_stops(stop)
    with contextlib.ExitStack() as stack:
        check_options(events, db, dates, replace, cluster, commit_every, dry_run, plot)
        sources = [source for event in events for source in expanded(event)]
        check_files(sources, db, rejects, plot)
        for output in (rejects, plot, None if is_postgres(db) or not events else db):
            if output and not dry_run:
                check_writable(output, may_be_pipe=output == rejects)
        rule = make_rule(dates, timezone, event_name, min_engagement_msec, valuable_event)
        if events:
            check_database(db, rule, dry_run, may_wait=bool(commit_every))
            file = stack.enter_context(opened_rejects(rejects)) if rejects and not dry_run else None
            size = CLUSTER_RANGE if cluster else BATCH
            at_once = [] if commit_every else sources
            parts = [part for source in at_once for part in ranges(source, size)]
            kind = LiveLoader if commit_every else Loader
            with progress_bar(progress, parts) as bar:  # which is wiped before the report
                loader = kind(
                    events, db, rule, dates, replace=replace, validate=validate, dry_run=dry_run,
                    max_bad_records=max_bad_records, rejects=file, bar=bar,
                    every=commit_every or 0, report=Report(shows_removed=replace),
                )
                if isinstance(loader, LiveLoader):
                    loader.load_arriving(sources)
                else:
                    loader.load_once(scanned(parts, loader.scanner(), workers, cluster))
            loader.warn()
            if not quiet:
                print_report(LAYOUTS[format](loader.report))
        if plot and not dry_run:
            plot_table(plot, db)
# fmt: on


if IS_COMMAND:
    open_standard_streams()
    gc.freeze()  # what was imported stays: to look through it again and again takes a tenth
    gc.enable()
    with exit_status():
        main(standalone_mode=False)
