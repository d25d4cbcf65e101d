# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "click>=8.1,<9",
#     "python-dateutil>=4,<5",
#     "msgspec>=0.20,<1",
#     "stringzilla>=5,<6",
#     "isal>=1.7,<2",
#     "backports.zstd>=1,<2; python_version < '3.14'",
#     "matplotlib>=3.9,<4",
#     "psycopg[binary]>=3.2,<4",
#     "fsspec>=2025.1",
#     "distributed>=2025.1",
# ]
# ///
"""Load the number of active users per day from analytics events (newline-delimited JSON) into an SQL table."""

from __future__ import annotations

import gc
import os
import signal

if __name__ == "__main__":  # what is imported below takes a moment, in which Ctrl-C is to end in silence as well
    gc.disable()
    for stop_signal in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop_signal, lambda number, _: os._exit(128 + number))

import contextlib
import io
import itertools
import math
import select
import sqlite3
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, Generic, NoReturn, TypeVar

import click
import msgspec
import stringzilla
from dateutil import tz
from msgspec import Struct

__version__ = "1.0.0"

K = TypeVar("K")
V = TypeVar("V")


class LoadError(Exception):
    """The input or the database cannot be used; the message says what, where, and what to do."""


class BadRecord(ValueError):  # noqa: N818 - the word of the field
    """A line that is no event, or an engagement event with an impossible field; the message is the reason."""


def to_json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


# -- The event -------------------------------------------------------------------------------------------------------
#
# The fields that decide, of the BigQuery export of Google Analytics: https://support.google.com/analytics/answer/7029846


class ParameterValue(Struct, gc=False):
    """The value of an event parameter. Only engagement_time_msec's has to be an integer, so any type is let in here."""

    int_value: Any = None


class Parameter(Struct, gc=False):
    """An element of event_params."""

    key: str | None = None
    value: ParameterValue | None = None


class Event(Struct, gc=False):
    """An engagement event: event_timestamp in microseconds UTC, integers as JSON strings or JSON numbers."""

    event_name: str | None = None
    event_timestamp: int | str | None = None
    event_params: list[Parameter] | None = None
    user_pseudo_id: str | None = None


class AnyObject(Struct):
    """Any JSON object: its syntax is checked, its fields are not looked at."""


EVENT_NAME = "user_engagement"
decode_event = msgspec.json.Decoder(Event).decode
decode_object = msgspec.json.Decoder(AnyObject).decode


def engagement_event(line: str) -> Event | None:
    """The engagement event that a JSON object is, or None for any other event. Raises BadRecord."""
    try:
        try:
            event = decode_event(line)
        except msgspec.ValidationError:
            # The types matter only in an engagement event, and of a field given twice only the last one counts: what
            # holds is known once the whole line has been read.
            import json

            decode_object(line)  # is stricter than json
            record = json.loads(line)
            if record.get("event_name") != EVENT_NAME:
                return None
            event = msgspec.convert(record, Event)
    except (ValueError, RecursionError) as error:
        raise BadRecord(str(error)) from None
    return event if event.event_name == EVENT_NAME else None


def integer(value: Any, field: str) -> int:
    """The integer that a field holds, as a JSON number or string. Raises BadRecord."""
    if type(value) is int:
        return value
    if type(value) is str and value.isascii() and (value.isdigit() or (value[:1] == "-" and value[1:].isdigit())):
        try:
            return int(value)
        except ValueError:  # more digits than Python converts
            pass
    raise BadRecord(f"{field} is no integer: {to_json(value)[:60]}")


# -- The rule --------------------------------------------------------------------------------------------------------

USEC_PER_HOUR = 3_600_000_000
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
Terms = tuple[str, int, list[str]]  # of a rule: time zone, least engagement time in milliseconds, globs


class Memo(dict[K, V], Generic[K, V]):
    """A function of one argument that remembers up to 65,536 results, looked up at the speed of a dict."""

    def __init__(self, function: Callable[[K], V]) -> None:
        self.function = function

    def __missing__(self, key: K) -> V:
        if len(self) >= 65_536:
            self.clear()
        value = self[key] = self.function(key)
        return value


class Rule:
    """What makes a user active on a date: the least engagement time in milliseconds, the globs of the valuable event
    parameters, and the time zone whose calendar the date is of. Raises ValueError for an unknown time zone."""

    def __init__(self, timezone: str, min_engagement_msec: int, valuable_events: Iterable[str]) -> None:
        import re
        from fnmatch import translate

        globs = sorted(set(valuable_events))
        self.terms: Terms = (timezone, min_engagement_msec, globs)
        self.zone = time_zone(timezone)
        self.min_engagement_msec = min_engagement_msec
        matches = re.compile("|".join(map(translate, globs))).match
        self.is_valuable = Memo[str | None, bool](lambda key: key is not None and matches(key) is not None)
        self.date_of_hour = Memo[int, str](self.date_throughout)

    def __reduce__(self) -> tuple[Any, ...]:
        return Rule, self.terms

    def active_date(self, event: Event) -> str | None:
        """The date (YYYY-MM-DD) on which an engagement event makes its user active, or None. Raises BadRecord."""
        engaged = valuable = False
        for parameter in event.event_params or ():
            key = parameter.key
            if key == "engagement_time_msec" and parameter.value and parameter.value.int_value is not None:
                engaged |= integer(parameter.value.int_value, key) >= self.min_engagement_msec
            valuable = valuable or self.is_valuable[key]
        date = self.date(integer(event.event_timestamp, "event_timestamp"))
        return date if engaged and valuable else None

    def date(self, timestamp: int) -> str:
        """The date of a timestamp (microseconds UTC). Raises BadRecord beyond the years 1 to 9999."""
        return self.date_of_hour[timestamp // USEC_PER_HOUR] or self.local_time(timestamp).date().isoformat()

    def date_throughout(self, hour: int) -> str:
        """The date of a whole hour since 1970 UTC; empty if it holds a midnight, a change of the clocks, or an end of
        the calendar. So a conversion is done once for all events of an hour."""
        try:
            first = self.local_time(hour * USEC_PER_HOUR)
            last = self.local_time(hour * USEC_PER_HOUR + USEC_PER_HOUR - 1)
        except BadRecord:
            return ""
        same = first.date() == last.date() and first.utcoffset() == last.utcoffset()
        return first.date().isoformat() if same else ""

    def local_time(self, timestamp: int) -> datetime:
        try:
            return (EPOCH + timedelta(microseconds=timestamp)).astimezone(self.zone)
        except (OverflowError, ValueError):
            raise BadRecord(f"event_timestamp is beyond the calendar: {str(timestamp)[:60]}") from None


def time_zone(name: str) -> Any:
    """The dateutil time zone of an IANA name. Raises ValueError."""
    zone = None
    if name and not name.startswith((".", "/")) and ".." not in name:  # gettz would open any file
        with contextlib.suppress(OSError, ValueError):
            zone = tz.gettz(name)
    if not isinstance(zone, tz.tzfile | tz.tzutc):
        raise ValueError(f"{name!r} is no IANA time zone; names are like US/Central, Europe/Berlin, UTC")
    return zone


# -- Scanning --------------------------------------------------------------------------------------------------------

NAME = EVENT_NAME.encode()
ESCAPED_LETTERS = (b"\\u005f", b"\\u005F", b"\\u006", b"\\u007")  # that can spell the name
NEWLINE, OPEN, CLOSE = b"\n{}"
BLANK = b" \t\r\n"
BOM = b"\xef\xbb\xbf"
BLOCK = 384 << 10  # bytes: little enough to stay in the processor's cache while it is searched again and again
MAX_LINE = 128 << 20  # bytes; BigQuery reads and writes up to 100 MB
BATCH = 32 << 20  # bytes of lines
AHEAD = 8 << 20  # bytes to ask a URL for at once
TICK = 0.2  # seconds after which a batch is passed on that has not become full
SHOWN = 20  # bad records to report in full
GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
CUT_SHORT = "the file was cut short while it was read; load it again when it is whole"
REPLACED = "the file was replaced while it was read; load it again"
NOT_LIVE = "a compressed pipe can't be committed as it comes; put zcat before it, or zstdcat"
TOO_LONG = f"a line of more than {MAX_LINE >> 20} MiB: one event a line is expected"


class Range(Struct, frozen=True):
    """The unit of work: the lines of a source that begin in its bytes from start to end, or all of it."""

    source: str
    start: int = 0
    end: int | None = None
    size: int = 0  # of it, where that is known
    version: str | None = None  # of the file when it was cut into ranges: they are to be of one and the same


class Batch(Struct):
    """What was found in some successive lines of a range."""

    size: int = 0  # bytes of the source; of a pipe, 0
    lines: int = 0
    blank_lines: int = 0
    engagement_events: int = 0
    active_events: int = 0
    anonymous_events: int = 0
    bad_records: int = 0
    bad: list[tuple[int, str, bytes]] = []  # line from 1 in the range, reason, the record where it is wanted
    users: dict[str, set[str]] = {}  # the active ones by date


class Live(Struct):
    """Of the reading of a pipe without end: whether it is to stop, and the bytes of a line that had not ended then."""

    stopped: bool = False
    left_out: int = 0


class Scanner:
    """Turns a range into batches. With validate every line is decoded; with keep every bad record is kept whole; with
    live a pipe that is quiet gives a batch nevertheless."""

    def __init__(
        self, rule: Rule, validate: bool = False, keep: bool = False, live: Live | None = None, block_size: int = BLOCK
    ) -> None:
        self.rule = rule
        self.validate = validate
        self.keep = keep
        self.live = live
        self.block_size = block_size

    def __call__(self, part: Range) -> Iterator[Batch]:
        """Yield the batches of a range, of some 32 MiB of lines or 0.2 s each. Raises LoadError."""
        first_line, size, due, batch = 1, 0, time.monotonic() + TICK, Batch()
        try:
            with opened(part.source, self.live) as (stream, file):
                position = part.start
                if part.version not in (None, version(part.source, file)):
                    raise LoadError(REPLACED)
                for buffer, length in blocks(stream, part, self.block_size, self.live):
                    if length:
                        self.scan_block(buffer, length, first_line + batch.lines, batch)
                        size += length
                    now = time.monotonic()
                    if size >= BATCH or now >= due:
                        if file.seekable():
                            batch.size, position = file.tell() - position, file.tell()
                        yield batch
                        first_line, size, due, batch = first_line + batch.lines, 0, now + TICK, Batch()
                if file.seekable():
                    batch.size = file.tell() - position
        except (LoadError, OSError, MemoryError) as error:
            line = f":{first_line + batch.lines}" if part.start == 0 else ""
            raise LoadError(f"{part.source}{line}: {str(error) or 'out of memory'}") from None
        if batch.lines:
            yield batch

    def scan_block(self, buffer: bytearray, length: int, number: int, batch: Batch) -> None:
        """Add the whole lines in the first length bytes of a buffer to a batch; number is the first one's.

        As many "}\\n{" as line ends within the block: every line is framed as an object, and only those that hold the
        event's name are decoded. A block with lines of another kind, or letters spelt as escapes, goes line by line.
        """
        view = memoryview(buffer)
        stop = length - (buffer[length - 1] == NEWLINE)
        ends = stringzilla.count(buffer, b"\n", 0, stop)
        framed = buffer[0] == OPEN and buffer[stop - 1] == CLOSE
        framed = framed and stringzilla.count(buffer, b"}\n{", 0, stop) == ends
        if not framed or spells_letters(buffer, stop) or self.validate:
            start = 0
            for line in range(ends + 1):
                end = buffer.find(b"\n", start, stop) if line < ends else stop
                self.scan_line(view[start:end], number + line, batch)
                start = end + 1
        else:
            at = stringzilla.find(buffer, NAME, 0, stop)
            while at >= 0:
                start = buffer.rfind(b"\n", 0, at) + 1
                end = buffer.find(b"\n", at, stop)
                end = stop if end < 0 else end
                try:
                    self.scan_event(view[start:end], batch)
                except BadRecord as error:
                    line = number + stringzilla.count(buffer, b"\n", 0, start)
                    self.add_bad_record(line, error, view[start:end], batch)
                at = stringzilla.find(buffer, NAME, end, stop)
        batch.lines += ends + 1

    def scan_line(self, line: memoryview, number: int, batch: Batch) -> None:
        """Add a line of any kind, without its newline, to a batch: the plain reading of what scan_block does."""
        record = bytes(line).strip(BLANK)
        try:
            if not record:
                batch.blank_lines += 1
            elif record[0] != OPEN or record[-1] != CLOSE:
                raise BadRecord("not one JSON object, {...}: one event a line is expected")
            elif self.validate or stringzilla.find(record, NAME) >= 0 or spells_letters(record, len(record)):
                self.scan_event(record, batch)
        except BadRecord as error:
            self.add_bad_record(number, error, line, batch)

    def scan_event(self, line: bytes | memoryview, batch: Batch) -> None:
        """Add a line that may hold an engagement event to a batch. Raises BadRecord."""
        try:
            event = engagement_event(str(line, "utf-8"))
        except UnicodeDecodeError as error:
            raise BadRecord(f"invalid UTF-8 (byte {error.start})") from None
        if event is None:
            return
        date = self.rule.active_date(event)
        batch.engagement_events += 1
        if date is None:
            return
        batch.active_events += 1
        if not event.user_pseudo_id:
            batch.anonymous_events += 1
        else:
            try:
                batch.users[date].add(event.user_pseudo_id)
            except KeyError:
                batch.users[date] = {event.user_pseudo_id}

    def add_bad_record(self, number: int, error: BadRecord, line: memoryview, batch: Batch) -> None:
        batch.bad_records += 1
        if self.keep or len(batch.bad) < SHOWN:
            batch.bad.append((number, str(error), bytes(line) if self.keep else b""))


def spells_letters(text: bytes | bytearray, stop: int) -> bool:
    """Whether the first bytes of a text have escapes that can spell the name of the event."""
    escapes = text.find(b"\\", 0, stop) >= 0
    return escapes and any(stringzilla.find(text, letter, 0, stop) >= 0 for letter in ESCAPED_LETTERS)


def blocks(stream: Any, part: Range, size: int, live: Live | None = None) -> Iterator[tuple[bytearray, int]]:
    """Yield the lines of a range as (buffer, length): whole lines in the first length bytes, some size bytes at a time,
    valid until the next are asked for. Only the last may lack its newline. A live stream that is quiet gives a length
    of 0 every 0.2 s. Raises LoadError, OSError."""
    left = sys.maxsize
    if part.end is not None:
        start, end = line_start(stream, part.start), line_start(stream, part.end)
        stream.seek(start)
        left = end - start
    buffer, held, first = bytearray(size), 0, part.start == 0
    while left:
        if held > MAX_LINE:
            raise LoadError(TOO_LONG)
        if held + size > len(buffer):
            longer = bytearray(min(2 * len(buffer), MAX_LINE + 2 * size))
            longer[:held] = memoryview(buffer)[:held]
            buffer = longer
        if live:
            ready = "://" in part.source or select.select([stream], [], [], TICK)[0]
            if live.stopped:
                live.left_out = held
                return
            if not ready:
                yield buffer, 0
                continue
        count = stream.readinto(memoryview(buffer)[held : held + min(size, left)])
        if live and first and buffer.startswith((GZIP, ZSTD)):
            raise LoadError(NOT_LIVE)
        if not count and part.end is not None:
            raise LoadError(CUT_SHORT)
        left = left - count if count else 0
        filled = held + count
        length = buffer.rfind(b"\n", held, filled) + 1 if left else filled
        if length:
            skipped = len(BOM) if first and buffer.startswith(BOM) else 0
            if skipped:
                buffer[: length - skipped] = buffer[skipped:length]
            first = False
            if length > skipped:
                yield buffer, length - skipped
            buffer[: filled - length] = buffer[length:filled]
        held = filled - length


def line_start(stream: Any, offset: int) -> int:
    """The offset of the first line of a file that begins at an offset (bytes) or after it. Raises LoadError."""
    if offset == 0:
        return 0
    stream.seek(offset - 1)
    for position in range(offset - 1, offset + MAX_LINE, 65_536):
        chunk: bytes = stream.read(65_536)
        newline = chunk.find(b"\n")
        if newline >= 0:
            return position + newline + 1
        if len(chunk) < 65_536:
            if not chunk and position == offset - 1:
                raise LoadError(CUT_SHORT)
            return position + len(chunk)
    raise LoadError(TOO_LONG)


@contextlib.contextmanager
def opened(source: str, live: Live | None = None) -> Iterator[tuple[Any, Any]]:
    """A source as a binary stream of its lines, decompressed where it is gzip or zstd by its first bytes, and its file.
    A live pipe is not decompressed: how much of it has come could not be told."""
    with contextlib.ExitStack() as stack:
        raw: Any
        if source == "-":
            raw = stack.enter_context(open(0, "rb", buffering=0, closefd=False))
            is_pipe = not raw.seekable()
        elif "://" in source:
            stack.enter_context(url_errors())
            system, path = file_system(source)
            in_ranges = system.info(path).get("partial", "http" not in system.protocol)
            ahead = AHEAD if in_ranges else 0  # 0: as a stream
            raw = stack.enter_context(system.open(path, "rb", block_size=ahead, cache_type="readahead"))
            is_pipe = not in_ranges
        else:
            raw = stack.enter_context(open(source, "rb", buffering=0))
            is_pipe = not raw.seekable()
        if (live is not None and is_pipe) or not (is_pipe or source == "-" or compressed(raw)):
            yield raw, raw
            return
        stream: Any = stack.enter_context(io.BufferedReader(raw, BLOCK))
        magic = stream.peek(4)
        damage: Any = EOFError
        if magic.startswith(GZIP):
            from isal import igzip, igzip_lib

            stream = stack.enter_context(igzip.IGzipFile(fileobj=stream))  # type: ignore[no-untyped-call]
            damage = (EOFError, igzip_lib.IsalError, igzip.BadGzipFile)
        elif magic.startswith(ZSTD):
            if sys.version_info >= (3, 14):
                from compression import zstd
            else:
                from backports import zstd

            stream = stack.enter_context(zstd.ZstdFile(stream))
            damage = (EOFError, zstd.ZstdError)
        try:
            yield stream, raw
        except damage as error:
            raise LoadError(f"the compressed data is damaged or cut off ({error}); fetch the file again") from None


def compressed(file: Any) -> bool:
    magic: bytes = file.read(4)
    file.seek(0)
    return magic.startswith((GZIP, ZSTD))


@contextlib.contextmanager
def url_errors() -> Iterator[None]:
    """Raise whatever the libraries behind fsspec raise as a LoadError."""
    try:
        yield
    except LoadError:
        raise
    except FileNotFoundError:
        raise LoadError("No such file") from None
    except Exception as error:
        raise LoadError(" ".join(f"{type(error).__name__}: {error}".split())) from None


def file_system(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it."""
    import fsspec

    system, path = fsspec.core.url_to_fs(url)
    return system, path


def version(source: str, file: Any) -> str | None:
    """What changes when another file takes the place of a source."""
    if "://" not in source:
        return str(os.fstat(file.fileno()).st_ino)
    system, path = file_system(source)
    system.invalidate_cache()
    info = system.info(path)
    return next((str(info[key]) for key in ("ETag", "etag", "LastModified", "mtime") if info.get(key)), None)


def sources_of(events: Iterable[str]) -> list[str]:
    """Some EVENTS, with the files that a URL with wildcards stands for. Raises LoadError."""
    sources = []
    for source in events:
        if "://" in source and any(wildcard in source for wildcard in "*?["):
            try:
                with url_errors():
                    system, path = file_system(source)
                    found = [system.unstrip_protocol(name) for name in sorted(system.glob(path))]
            except (LoadError, OSError) as error:
                raise LoadError(f"{source}: {error}") from None
            if not found:
                raise LoadError(f"{source}: there is no such file")
            sources += found
        else:
            sources.append(source)
    return sources


def ranges(sources: Iterable[str], size: int = BATCH) -> list[Range]:
    """The ranges that make up some sources, in order: of some size in bytes (of a URL, 128 MiB or more), or a whole
    source where it can't be split (gzip, a pipe). Raises LoadError for one that can't be read."""
    parts = []
    for source in sources:
        remote = "://" in source
        try:
            if not remote and (source == "-" or not os.path.isfile(source)):
                if os.path.isdir(source):
                    raise LoadError("is a directory; name the files in it")
                os.stat(0 if source == "-" else source)
                parts.append(Range(source))
                continue
            with opened(source) as (stream, file):
                end = file.size if remote else os.fstat(file.fileno()).st_size
                token = version(source, file)
                if stream is not file or end is None:
                    parts.append(Range(source, size=end or 0, version=token))
                else:
                    step = max(size, 4 * BATCH) if remote else size
                    for start in range(0, end, step):
                        length = min(step, end - start)
                        parts.append(Range(source, start, start + length, length, token))
        except (LoadError, OSError) as error:
            raise LoadError(f"{source}: {getattr(error, 'strerror', None) or error}") from None
    return parts


STOPS = (signal.SIGINT, signal.SIGTERM)


def scan_in_turn(parts: list[Range], scan: Scanner) -> Iterator[tuple[int, Batch]]:
    """Yield the batches of some ranges, each with the index of its range. Raises LoadError."""
    for index, part in enumerate(parts):
        for batch in scan(part):
            yield index, batch


def scan_in_processes(parts: list[Range], scan: Scanner, workers: int) -> Iterator[tuple[int, Batch]]:
    """Like scan_in_turn, in some processes at once: the batches of different ranges come in any order, but of all the
    LoadErrors the one of the first range is raised."""
    import multiprocessing
    from multiprocessing.connection import wait

    # A fork starts at once and shares what is imported; elsewhere than on Linux it is not safe.
    context: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    todo = iter(enumerate(parts))
    underway: dict[Any, list[int]] = {}  # by connection to a worker, the indices of the ranges it has been sent
    failed: dict[int, LoadError] = {}
    processes = []

    def hand_out(connection: Any) -> None:
        task = None if failed else next(todo, None)
        if task:
            underway[connection].append(task[0])
            connection.send(task[1])

    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # until a worker knows that they are its parent's to handle
        for _ in range(workers):
            connection, theirs = context.Pipe()
            processes.append(context.Process(target=work, args=(theirs, scan), daemon=True))
            processes[-1].start()
            theirs.close()
            underway[connection] = []
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
        try:
            for connection in underway:
                hand_out(connection)
                if parts[0].end is not None:  # a small range: no worker is to wait for its next one
                    hand_out(connection)
            while any(not failed or index < min(failed) for indices in underway.values() for index in indices):
                ready: Any = wait([connection for connection, indices in underway.items() if indices])
                for connection in ready:
                    result = connection.recv()
                    index = underway[connection][0]
                    if isinstance(result, Batch):
                        yield index, result
                        continue
                    if isinstance(result, LoadError):
                        failed[index] = result
                    del underway[connection][0]
                    hand_out(connection)
        except (EOFError, OSError):
            raise LoadError("a scanning process was killed (out of memory?); try fewer --workers") from None
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.join()
    if failed:
        raise failed[min(failed)]


def work(connection: Any, scan: Scanner) -> None:
    """Scan the ranges that come over a connection, and send back the batches of each and then None or a LoadError."""
    import multiprocessing
    import threading

    def end_with_parent() -> None:
        parent = multiprocessing.parent_process()
        if parent:
            parent.join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
    threading.Thread(target=end_with_parent, daemon=True).start()
    while True:
        part = connection.recv()
        try:
            for batch in scan(part):
                connection.send(batch)
            connection.send(None)
        except LoadError as error:
            connection.send(error)


def scan_on_cluster(parts: list[Range], scan: Scanner, address: str) -> Iterator[tuple[int, Batch]]:
    """Like scan_in_processes, on the workers of a Dask cluster, which see the same files. A worker that is lost is made
    up for by the others. At most two ranges a thread are underway, so that what is found does not pile up here."""
    import logging
    import warnings

    logging.getLogger("distributed").setLevel(logging.CRITICAL)  # it tells of each lost connection, with tracebacks
    warnings.simplefilter("ignore")
    import distributed

    import load_active_users as module  # the name under which the workers import what they are sent

    try:
        client = distributed.Client(address, timeout=10)
    except (OSError, ValueError):
        raise LoadError(f"{address}: no Dask scheduler answers there; look after it and its address") from None
    remote = module.Scanner(module.Rule(*scan.rule.terms), scan.validate, scan.keep)
    todo: Iterator[tuple[int, Range]] = iter(enumerate(parts))
    underway: dict[Any, int] = {}
    failed: dict[int, Exception] = {}
    try:
        check_cluster(client, address)
        client.upload_file(os.path.abspath(__file__))
        while True:
            room = 2 * sum(client.nthreads().values()) - len(underway)
            for index, part in itertools.islice(todo, max(room, 0 if underway else 1)):  # none: all is done
                copy = module.Range(part.source, part.start, part.end, part.size, part.version)
                underway[client.submit(module.scan_range, remote, copy, pure=False)] = index
            if not underway:
                break
            try:
                done = distributed.wait(list(underway), timeout=30, return_when="FIRST_COMPLETED").done
            except TimeoutError:
                if not client.nthreads():
                    raise LoadError(f"{address}: has no workers any more; start some and load again") from None
                continue
            for future in done:
                index, result = underway.pop(future), future.result()
                if isinstance(result, str):
                    failed[index] = LoadError(f"{result} (on a worker of {address})")
                    todo = iter(())
                else:
                    for batch in result:
                        yield index, batch
    except LoadError:
        raise
    except Exception as error:  # of any worker or connection
        raise LoadError(" ".join(f"{address}: {type(error).__name__}: {error}".split())[:500]) from None
    finally:
        client.close()
    if failed:
        raise failed[min(failed)]


def check_cluster(client: Any, address: str) -> None:
    """Raise LoadError unless a cluster has workers, of the versions that are used here."""
    if not client.nthreads():
        raise LoadError(f"{address}: has no workers; start some with: dask worker {address}")
    versions = client.get_versions(packages=["msgspec", "stringzilla"])
    here = versions["client"]["packages"]
    for worker, there in versions["workers"].items():
        for name in ("python", "distributed", "msgspec", "stringzilla"):
            ours, theirs = (str(packages.get(name)).split(".")[:2] for packages in (here, there["packages"]))
            if ours != theirs:
                found = f"{name} {there['packages'].get(name)}, where {here[name]} is used here"
                raise LoadError(f"{address}: the worker {worker} has {found}; install the same requirements.txt")


def scan_range(scan: Scanner, part: Range) -> list[Batch] | str:
    """All batches of a range, or what is wrong with it: what a worker of a cluster does."""
    try:
        return list(scan(part))
    except LoadError as error:
        return str(error)


# -- Merging ---------------------------------------------------------------------------------------------------------

TALLIES = ("lines", "blank_lines", "engagement_events", "active_events", "anonymous_events", "bad_records")
HELD = 32 << 20  # bytes, about, of users to hold in memory before they are staged


class Merger:
    """Adds up batches that come in any order, in bounded memory: users past a bound and all bad records are staged in a
    temporary database of its own, which SQLite keeps in memory while it is small and otherwise in TMPDIR."""

    def __init__(self, parts: list[Range]) -> None:
        self.parts = parts
        self.lines = [0] * len(parts)
        self.tally = dict.fromkeys(TALLIES, 0)
        self.users: dict[str, set[str]] = {}
        self.held = 0
        self.staged = sqlite3.connect("", isolation_level=None)
        self.staged.execute("PRAGMA journal_mode = OFF")
        self.staged.execute("CREATE TABLE run (date TEXT, users TEXT)")  # a sorted JSON array
        self.staged.execute("CREATE INDEX run_date ON run (date)")
        self.staged.execute("CREATE TABLE bad (part INTEGER, line INTEGER, reason TEXT, record BLOB)")
        self.staged.execute("BEGIN")

    def add(self, index: int, batch: Batch) -> None:
        """Add a batch of the range with some index."""
        for name in TALLIES:
            self.tally[name] += getattr(batch, name)
        self.lines[index] += batch.lines
        self.staged.executemany("INSERT INTO bad VALUES (?, ?, ?, ?)", [(index, *bad) for bad in batch.bad])
        for date, users in batch.users.items():
            self.held += 256 + sum(map(len, users)) + 64 * len(users)  # a set and its strings have their own size
            if date in self.users:
                self.users[date] |= users
            else:
                self.users[date] = users
        if self.held > HELD:
            self.stage()

    def stage(self) -> None:
        """Move the users held in memory to the temporary database: a sorted run a date."""
        runs = ((date, to_json(sorted(users))) for date, users in self.users.items())
        self.staged.executemany("INSERT INTO run VALUES (?, ?)", runs)
        self.users, self.held = {}, 0

    def clear(self) -> None:
        """Forget the users and bad records, but neither the tallies nor the line numbers."""
        self.staged.executescript("DELETE FROM run; DELETE FROM bad;")

    def dates(self) -> list[str]:
        """The dates that have an active user, in order, of what is staged."""
        return [date for (date,) in self.staged.execute("SELECT DISTINCT date FROM run ORDER BY date")]

    def runs(self, date: str) -> Iterator[str]:
        """Yield the users of a date as sorted JSON arrays, in which one may be repeated."""
        for (users,) in self.staged.execute("SELECT users FROM run WHERE date = ?", (date,)):
            yield users

    def bad_records(self) -> Iterator[tuple[str, int, str, bytes]]:
        """Yield the bad records in order: source, line, reason, and the record, empty unless the scanner keeps it."""
        lines_before, before = [], 0
        for part, lines in zip(self.parts, self.lines, strict=True):
            before = 0 if part.start == 0 else before
            lines_before.append(before)
            before += lines
        for part, line, reason, record in self.staged.execute("SELECT * FROM bad ORDER BY part, line"):
            yield self.parts[part].source, lines_before[part] + line, reason, record


# -- The store -------------------------------------------------------------------------------------------------------

LOCK_SECONDS = 60.0
REMEDIES = {
    sqlite3.SQLITE_BUSY: "another program keeps it locked; try again when that is done",
    sqlite3.SQLITE_READONLY: "make the file and its directory writable, or choose another --db",
    sqlite3.SQLITE_CANTOPEN: "make the file and its directory readable and writable, or choose another --db",
    sqlite3.SQLITE_FULL: "make room on its disk and load again",
    sqlite3.SQLITE_IOERR: "look after its disk and load again",
    sqlite3.SQLITE_NOTADB: "choose another --db",
    sqlite3.SQLITE_CORRUPT: "restore it from a copy, or load all events into another --db",
}
T = TypeVar("T")


class DateCount(Struct):
    """A row of the report: a date, its active users as they now stand in the table, and how many of them this load
    added, out of how many it held."""

    date: str
    active_user_count: int
    added: int
    held: int | None  # unknown once a load has been committed in parts

    def after(self, earlier: DateCount | None) -> DateCount:
        """The row of a load that was committed earlier too."""
        if earlier is None:
            return self
        return DateCount(self.date, self.active_user_count, self.added + earlier.added, None)


@contextlib.contextmanager
def database_errors(path: str) -> Iterator[None]:
    """Raise what a database says about itself as a LoadError that names the remedy."""
    try:
        yield
    except sqlite3.Error as error:
        remedy = REMEDIES.get(getattr(error, "sqlite_errorcode", 0) & 0xFF)
        raise LoadError(f"{path}: {error}" + (f"; {remedy}" if remedy else "")) from None
    except Exception as error:
        if not type(error).__module__.startswith("psycopg"):
            raise
        raise LoadError(f"{label(path)}: {' '.join(str(error).split())}") from None


def is_url(path: str) -> bool:
    return path.startswith(("postgresql://", "postgres://"))


def label(path: str) -> str:
    """A database as it may be shown: without the user and password of a URL."""
    from urllib.parse import urlsplit

    parts = urlsplit(path)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}" if is_url(path) else path


def patiently(action: Callable[[], T]) -> T:
    """The result of an action that waits up to 60 s for its turn at the database, and lets signals in meanwhile."""
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            return action()
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise


def schema() -> str:
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "schema.sql")
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except OSError as error:
        raise LoadError(f"{path}: {error.strerror}; it belongs beside load_active_users.py") from None


class Sqlite(sqlite3.Connection):
    """A connection to an SQLite file. Postgres has the same methods."""

    name: str
    incoming = "CREATE TEMP TABLE incoming (user_pseudo_id TEXT PRIMARY KEY) WITHOUT ROWID"
    held = "SELECT count(*) FROM incoming"

    def tables(self, prefix: str = "") -> dict[str, list[tuple[Any, ...]]]:
        """The columns of each table: name, type, whether not null, place in the primary key from 1 or 0."""
        found: dict[str, list[tuple[Any, ...]]] = {}
        query = f"""SELECT t.name, c.name, upper(c.type), c."notnull", c.pk FROM {prefix}sqlite_master t,
                    pragma_table_info(t.name, ?) c WHERE t.type = 'table' ORDER BY t.name, c.cid"""
        for table, *column in self.execute(query, (prefix[:-1] or "main",)):
            found.setdefault(table, []).append(tuple(column))
        return found

    def begin(self) -> None:
        """Begin a transaction when it is our turn to write."""
        patiently(lambda: self.execute("BEGIN IMMEDIATE"))
        self.execute("PRAGMA cache_size = -32768")  # KiB

    def make_tables(self) -> None:
        for statement in schema().split(";\n"):  # executescript would commit first
            self.execute(statement)

    def receive(self, users: str) -> None:
        """Put the users of a JSON array, some of which may be there already, into the table incoming."""
        if "\\u0000" not in users:
            self.execute("INSERT OR IGNORE INTO incoming SELECT value FROM json_each(?)", (users,))
        else:  # where SQLite's JSON functions end a text
            rows = [(user,) for user in msgspec.json.decode(users)]
            self.executemany("INSERT OR IGNORE INTO incoming VALUES (?)", rows)


class Postgres:
    """A connection to a PostgreSQL database, whose parameters are written ? as in SQLite."""

    incoming = "CREATE TEMP TABLE incoming (user_pseudo_id TEXT)"
    held = "SELECT count(DISTINCT user_pseudo_id) FROM incoming"

    def __init__(self, url: str) -> None:
        import psycopg

        self.name = label(url)
        self.connection = psycopg.connect(url, autocommit=True, connect_timeout=10)

    def execute(self, sql: str, parameters: tuple[Any, ...] = ()) -> Any:
        return self.connection.execute(sql.replace("?", "%s").encode(), parameters)

    def close(self) -> None:
        self.connection.close()

    def tables(self, prefix: str = "") -> dict[str, list[tuple[Any, ...]]]:
        """Those of our tables that there are, in the terms of SQLite."""
        query = """
            SELECT c.table_name, c.column_name, CASE data_type WHEN 'bigint' THEN 'INTEGER' ELSE upper(data_type) END,
                CASE is_nullable WHEN 'NO' THEN 1 ELSE 0 END, coalesce(k.ordinal_position, 0)
            FROM information_schema.columns c
            JOIN information_schema.tables t USING (table_schema, table_name)
            LEFT JOIN information_schema.key_column_usage k USING (table_schema, table_name, column_name)
            WHERE table_schema = current_schema() AND table_type = 'BASE TABLE'
                AND table_name IN ('active_user', 'active_user_table', 'load_log')
            ORDER BY c.table_name, c.ordinal_position"""
        found: dict[str, list[tuple[Any, ...]]] = {}
        for table, *column in self.execute(query):
            found.setdefault(table, []).append(tuple(column))
        return found

    def begin(self) -> None:
        """Begin a transaction when it is our turn to write: loads that overlap would not see each other's users."""
        deadline = time.monotonic() + LOCK_SECONDS
        self.execute("BEGIN")
        while not self.execute("SELECT pg_try_advisory_xact_lock(hashtext('load_active_users'))").fetchone()[0]:
            if time.monotonic() > deadline:
                raise LoadError(f"{self.name}: is locked by another load; try again when that is done")
            time.sleep(0.1)

    def make_tables(self) -> None:
        """Make what schema.sql has, as PostgreSQL spells it."""
        import re

        if not self.tables():
            text = schema().replace(" WITHOUT ROWID", "").replace(" INTEGER", " BIGINT").replace("julianday", "")
            text = text.replace("VIEW IF NOT EXISTS", "VIEW")
            self.execute(re.sub(r"date\(([\w.]+), '([+-]\d+) days'\)", r"(\1 \2)", text))

    def receive(self, users: str) -> None:
        if "\\u0000" in users:
            raise LoadError(
                f"{self.name}: PostgreSQL keeps no NUL character, which a user_pseudo_id has; take its events out"
            )
        with self.connection.cursor().copy("COPY incoming FROM STDIN") as copy:
            for user in msgspec.json.decode(users):
                copy.write_row((user,))


Database = Sqlite | Postgres


def connect(path: str) -> Database:
    if is_url(path):
        return Postgres(path)
    db = sqlite3.connect(os.path.abspath(path), timeout=0.1, isolation_level=None, factory=Sqlite)
    db.name = path
    return db


def copy_of(path: str, rule: Rule, dates: list[str]) -> Sqlite:
    """A temporary database with what an SQLite file holds of some dates: to try a load on."""
    from pathlib import Path

    db = sqlite3.connect("", timeout=0.1, uri=True, isolation_level=None, factory=Sqlite)
    db.name = path
    db.make_tables()
    if os.path.exists(path):
        uri = Path(path).absolute().as_uri() + "?mode=ro"
        patiently(lambda: db.execute("ATTACH ? AS stored", (uri,)))
        if check(db, rule, "stored."):
            copy = "INSERT INTO active_user SELECT * FROM stored.active_user WHERE date = ?"
            patiently(lambda: db.executemany(copy, [(date,) for date in dates]))
    return db


def check_tables(db: Database, prefix: str = "") -> bool:
    """Whether a database has the tables of schema.sql. Raises LoadError for one that has others."""
    with contextlib.closing(sqlite3.connect(":memory:", factory=Sqlite)) as model:
        model.make_tables()
        expected = model.tables()
    present = patiently(lambda: db.tables(prefix))
    for table, columns in expected.items():
        if present and present.get(table) != columns:
            what = f"its table {table} is not" if table in present else f"it has tables, but no {table}: it is not"
            raise LoadError(f"{db.name}: {what} one of load_active_users.py; choose another --db")
    return bool(present)


def kept_terms(db: Database, prefix: str = "") -> Terms | None:
    """The terms of the rule under which a database was filled."""
    query = f"SELECT timezone, min_engagement_msec, valuable_events FROM {prefix}load_log LIMIT 1"
    for zone, msec, globs in patiently(lambda: db.execute(query).fetchall()):
        return zone, msec, msgspec.json.decode(globs)
    return None


def check(db: Database, rule: Rule, prefix: str = "") -> bool:
    """Whether a database has the tables of schema.sql. Raises LoadError for others, and for another rule."""
    present = check_tables(db, prefix)
    kept = kept_terms(db, prefix) if present else None
    if kept and kept != rule.terms:
        rules = f"{options(*kept)}; the rule of this load is {options(*rule.terms)}"
        raise LoadError(f"{db.name}: was filled under the rule {rules}; use that rule or another --db")
    return present


def options(timezone: str, min_engagement_msec: int, valuable_events: list[str]) -> str:
    """A rule as a user writes it."""
    from shlex import quote

    globs = " ".join(f"--valuable-event {quote(glob)}" for glob in valuable_events)
    return f"--timezone {timezone} --min-engagement-msec {min_engagement_msec} {globs}"


def check_database(path: str, rule: Rule) -> None:
    """Raise LoadError where a load into a database is going to be refused, before the events are read."""
    if is_url(path) or os.path.exists(path):
        with database_errors(path), contextlib.closing(connect(path)) as db:
            check(db, rule)


def store(
    path: str, rule: Rule, merger: Merger, load_id: str, sources: Iterable[str], replace: bool, dry_run: bool
) -> list[DateCount]:
    """Load what was merged into a database in one transaction, and return the dates it touched, in order. A dry run
    does the same to a temporary copy of a file, and does not commit. What has the same load_id is one row of load_log.
    Raises LoadError."""
    dates = merger.dates()
    copied = dry_run and not is_url(path)
    with database_errors(path), contextlib.closing(copy_of(path, rule, dates) if copied else connect(path)) as db:
        db.begin()
        check(db, rule)  # again: others may have been here since the load began
        db.make_tables()
        counts = [store_date(db, date, merger.runs(date), replace) for date in dates]
        names = [os.fsencode(source).decode(errors="backslashreplace") for source in sources]
        zone, msec, globs = rule.terms
        row = {
            "load_id": load_id,
            "loaded_at": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "sources": to_json(names),
            "timezone": zone,
            "min_engagement_msec": msec,
            "valuable_events": to_json(globs),
            "replaced": int(replace),
            **merger.tally,
            "added": sum(count.added for count in counts),
        }
        update = ", ".join(f"{name} = excluded.{name}" for name in ("loaded_at", *TALLIES))
        db.execute(
            f"""INSERT INTO load_log ({", ".join(row)}) VALUES ({", ".join("?" * len(row))})
                ON CONFLICT (load_id) DO UPDATE SET {update}, added = load_log.added + excluded.added""",
            tuple(row.values()),
        )
        if not dry_run:
            patiently(lambda: db.execute("COMMIT"))
    return counts


def store_date(db: Database, date: str, runs: Iterable[str], replace: bool) -> DateCount:
    """Add the users of a date, as sorted JSON arrays, to those in a database, or put them in their place."""
    db.execute(db.incoming)
    for users in runs:
        db.receive(users)
    held, kept = db.execute(db.held).fetchone()[0], 0
    if replace:
        both = (
            "SELECT count(DISTINCT user_pseudo_id) FROM incoming JOIN active_user USING (user_pseudo_id) WHERE date = ?"
        )
        kept = db.execute(both, (date,)).fetchone()[0]
        db.execute("DELETE FROM active_user WHERE date = ?", (date,))
    insert = """INSERT INTO active_user SELECT ?, user_pseudo_id FROM incoming WHERE true ORDER BY user_pseudo_id
                ON CONFLICT DO NOTHING"""
    added = db.execute(insert, (date,)).rowcount - kept
    db.execute("DROP TABLE incoming")
    count = db.execute("SELECT count(*) FROM active_user WHERE date = ?", (date,)).fetchone()[0]
    db.execute(
        """INSERT INTO active_user_table VALUES (?, ?)
           ON CONFLICT (date) DO UPDATE SET active_user_count = excluded.active_user_count""",
        (date, count),
    )
    return DateCount(date, count, added, held)


def stored(path: str) -> tuple[list[tuple[str, int]], Terms | None]:
    """The rows of active_user_table in a database, by date, and the terms of its rule. Raises LoadError."""
    if not is_url(path) and not os.path.exists(path):
        raise LoadError(f"{path}: there is no such database; load events into it first")
    with database_errors(path), contextlib.closing(connect(path)) as db:
        if not check_tables(db):
            return [], None
        query = "SELECT date, active_user_count FROM active_user_table ORDER BY date"
        rows = patiently(lambda: db.execute(query).fetchall())
        return [(str(date), count) for date, count in rows], kept_terms(db)


# -- The report ------------------------------------------------------------------------------------------------------

COLUMNS = ("date", "active_user_count", "added")
ASCII = str.maketrans({"█": "#", "→": "->"})  # for terminals that have no more


def as_json(counts: list[DateCount], tally: dict[str, int]) -> str:
    dates = [{name: getattr(count, name) for name in COLUMNS} for count in counts]
    return to_json({"dates": dates, **{name: tally[name] for name in TALLIES if name != "blank_lines"}})


def as_csv(counts: list[DateCount], tally: dict[str, int]) -> str:
    rows = [",".join(str(getattr(count, name)) for name in COLUMNS) for count in counts]
    return "\n".join([",".join(COLUMNS), *rows])


def as_table(counts: list[DateCount], tally: dict[str, int]) -> str:
    """A line a date, with a bar whose end is what this load added, and a line of tallies, as wide as the terminal."""
    import shutil
    import textwrap

    width = shutil.get_terminal_size().columns
    digits = max([len("added"), *(len(str(count.added)) for count in counts)])
    lines = [f"{'date':<10}  active_user_count  {'added':>{digits}}"]
    room = max(width - len(lines[0]) - 2, 0)
    most = max((count.active_user_count for count in counts), default=0)
    for count in counts:
        length = -(-count.active_user_count * room // max(most, 1))
        new = length * count.added // max(count.active_user_count, 1)
        bar = click.style("█" * (length - new), fg="blue") + click.style("█" * new, fg="green")
        row = f"{count.date}  {count.active_user_count:>17}  {count.added:>{digits}}"
        lines.append(f"{row}  {bar}" if length else row)
    new, held = sum(count.added for count in counts), [count.held for count in counts]
    funnel = (
        f"{tally['lines']} lines → {tally['engagement_events']} engagement events → {tally['active_events']} active"
    )
    funnel += f" → {new} new user-days" if None in held else f" → {sum(filter(None, held))} user-days ({new} new)"
    for name in ("anonymous_events", "bad_records"):
        if tally[name]:
            funnel += f"; {tally[name]} {name.replace('_', ' ')}"
    return "\n".join([*lines, textwrap.fill(funnel, width, break_on_hyphens=False)])


def printable(text: str) -> str:
    """A text with its control characters escaped, so that no file name or datum can steer a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class Progress:
    """Says on standard error how much has been read: on a terminal in one line that changes, elsewhere in one every ten
    seconds. total is the bytes of all sources, or 0 where nobody knows, as of a pipe."""

    def __init__(self, shown: bool, total: int) -> None:
        self.terminal = sys.stderr.isatty()
        self.every = 0.1 if self.terminal else 10.0
        self.total = total
        self.size = self.lines = 0
        now = time.monotonic()
        self.marks = deque([(now, 0, 0)], maxlen=50)  # to take the speed of the last seconds from
        self.due = now + self.every if shown else math.inf

    def add(self, batch: Batch) -> None:
        self.size += batch.size
        self.lines += batch.lines
        now = time.monotonic()
        if now < self.due:
            return
        self.due = now + self.every
        then, size, lines = self.marks[0]
        seconds = now - then
        self.marks.append((now, self.size, self.lines))
        if self.total:
            share, speed = min(self.size / self.total, 1), (self.size - size) / seconds
            left = timedelta(seconds=round((self.total - self.size) / speed)) if speed and share < 1 else timedelta()
            bar = f"{'#' * round(20 * share):.<20}"
            self.show(f"[{bar}] {share:4.0%} of {self.total / 1e9:.2f} GB  {speed / 1e9:.2f} GB/s  {left} left")
        else:
            self.show(f"{self.lines:,} lines  {(self.lines - lines) / seconds:,.0f} lines/s")

    def over(self, found: Iterable[tuple[int, Batch]]) -> Iterator[tuple[int, Batch]]:
        """Pass batches on, and say how far they are."""
        for index, batch in found:
            self.add(batch)
            yield index, batch

    def show(self, text: str) -> None:
        if self.due < math.inf and self.terminal:
            click.echo("\r\x1b[K" + text[: os.get_terminal_size(2).columns - 1], err=True, nl=False)
        elif self.due < math.inf:
            click.echo(text, err=True)

    def clear(self) -> None:
        """Make way for something else to be printed."""
        if self.terminal:
            self.show("")

    close = clear


# -- The plot --------------------------------------------------------------------------------------------------------

PICTURES = (".png", ".svg", ".pdf")


def picture(rows: list[tuple[str, int]], terms: Terms | None, suffix: str) -> bytes:
    """Draw rows of active_user_table, by date. The same rows give the same bytes. suffix is one of PICTURES."""
    import logging
    import textwrap
    import warnings

    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # about its caches, which would be in cron's mail
    import matplotlib
    from matplotlib.figure import Figure

    warnings.simplefilter("ignore")  # about a letter that its font lacks
    matplotlib.rcdefaults()
    matplotlib.rcParams["svg.hashsalt"] = "load_active_users"
    figure = Figure(figsize=(10, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title("Active users per day", loc="left", fontsize=14)
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    small = "no dates yet"
    if rows and terms:
        draw(
            axes, [datetime.fromisoformat(day).toordinal() - EPOCH.toordinal() for day, _ in rows], [n for _, n in rows]
        )
        small = f"{terms[0]} dates · engagement of at least {terms[1]} ms · {' '.join(terms[2])} · "
        small += f"{rows[0][0]} to {rows[-1][0]}"
    else:
        axes.set(xticks=[], yticks=[])
    figure.supxlabel(textwrap.fill(small, 140), fontsize=8, color="0.4", x=0.01, ha="left", parse_math=False)
    file = io.BytesIO()
    undated = {".png": {"Software": None}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}[suffix]
    figure.savefig(file, format=suffix[1:], metadata=undated)
    return file.getvalue()


def draw(axes: Any, days: list[int], counts: list[int]) -> None:
    """Draw a bar for each day (counted from 1970-01-01), and grey where days have none: until two weeks with its
    count, from then on with the 7-day average."""
    from matplotlib import dates, ticker

    first, last = days[0], days[-1]
    span = last - first + 1
    half = 0.4 if span <= 100 else 0.5
    edges = [edge for day in days for edge in (day - half, day + half)]
    between = [value for count in counts for value in (count, math.nan)][:-1]
    axes.stairs(between, edges, fill=True, color="#7fa8d1" if span < 14 else "#b3cce6")
    label: str | None = "no data"
    for before, after in itertools.pairwise(days):
        if after - before > 1:
            axes.axvspan(before + 0.5, after - 0.5, color="0.93", linewidth=0, label=label)
            label = None  # one is enough for the legend
    if span < 14:
        for day, count in zip(days, counts, strict=True):
            axes.annotate(f"{count:,}", (day, count), (0, 3), textcoords="offset points", ha="center", fontsize=9)
    else:
        averages = dict(zip(days, week_averages(days, counts), strict=True))
        ends = {day + 1: math.nan for day in days} | averages  # where a line ends before a gap
        axes.plot(sorted(ends), [ends[day] for day in sorted(ends)], color="#1f3b5c", label="7-day average")
    margin = max(0.6, (7 - span) / 2, span / 100)
    earliest, latest = (day.toordinal() - EPOCH.toordinal() for day in (datetime.min, datetime.max))
    axes.set_xlim(max(first - margin, earliest), min(last + margin, latest))
    axes.set_ylim(0, max(*counts, 1) * 1.08)
    axes.yaxis.set_major_locator(ticker.MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    ticks: Any = ticker.FixedLocator(range(first, last + 1))
    if span > 10:
        ticks = dates.WeekdayLocator(0) if span <= 70 else dates.AutoDateLocator(maxticks=9)
    axes.xaxis.set_major_locator(ticks)
    axes.xaxis.set_major_formatter(dates.DateFormatter("%a\n%Y-%m-%d" if span <= 70 else "%Y-%m-%d"))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, fontsize=9)


def week_averages(days: list[int], counts: list[int]) -> list[float]:
    """The average of each day and the six before it, of those that have a count: NaN in the first six days, and where
    fewer than four have one."""
    averages = []
    for index, day in enumerate(days):
        week = [counts[i] for i in range(max(index - 6, 0), index + 1) if days[i] > day - 7]
        averages.append(sum(week) / len(week) if day - days[0] >= 6 and len(week) >= 4 else math.nan)
    return averages


# -- The command -----------------------------------------------------------------------------------------------------

SMALL = 64 << 20  # bytes of events that are scanned sooner than a pool of processes has started
COUNT = click.IntRange(0, 10**15)
LAYOUTS = {"table": as_table, "json": as_json, "csv": as_csv}


def batches(parts: list[Range], scan: Scanner, workers: int) -> Iterator[tuple[int, Batch]]:
    """Yield the batches of some ranges, each with the index of its range, from a pool of processes if that pays."""
    size = sum(part.size * (10 if part.end is None else 1) for part in parts)
    if workers > 1 and len(parts) > 1 and all(part.size for part in parts) and size > SMALL:
        return scan_in_processes(parts, scan, min(workers, len(parts)))
    return scan_in_turn(parts, scan)


def usable_cpus() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def load_live(
    found: Iterable[tuple[int, Batch]], merger: Merger, commit: Callable[[], None], live: Live, every: float
) -> None:
    """Merge what is found, and commit it every so many seconds and at the end, which a signal is too."""
    begun, committed, due = False, -1, time.monotonic() + every - TICK

    def wind_up(number: int, frame: object) -> None:
        handle_stops(stop)
        live.stopped = True
        if not begun:  # but may be waiting for a pipe to be opened at its other end
            sys.exit()

    handle_stops(wind_up)
    for index, batch in found:
        begun = True
        with temporary_file_errors():
            merger.add(index, batch)
        if time.monotonic() >= due:
            if committed != merger.tally["lines"]:
                commit()
            committed, due = merger.tally["lines"], time.monotonic() + every - TICK
    if committed != merger.tally["lines"]:
        commit()
    if live.left_out:
        click.echo(f"the last line had not ended: its {live.left_out} bytes were left out", err=True)


def check_files(events: tuple[str, ...], *outputs: str | None) -> None:
    """Raise UsageError where one file is to be written and read, or written twice, and LoadError for an output in a
    directory that is not there."""
    written: list[str] = []
    for output in filter(None, outputs):
        directory = os.path.dirname(os.path.abspath(output))
        if not os.path.isdir(directory):
            raise LoadError(f"{output}: there is no directory {directory}; make it first")
        for other in (*events, *written):
            if os.path.realpath(output) == os.path.realpath(other) or (
                os.path.exists(output) and os.path.exists(other) and os.path.samefile(output, other)
            ):
                raise click.UsageError(
                    f"{printable(output)} is to be written, but is the same file as {printable(other)}"
                )
        written.append(output)


@contextlib.contextmanager
def temporary_file_errors() -> Iterator[None]:
    """Raise what SQLite says about the temporary database as a LoadError."""
    try:
        yield
    except sqlite3.Error as error:
        raise LoadError(f"temporary files: {error}; make room in TMPDIR, or set TMPDIR to a larger disk") from None


def report_bad_records(merger: Merger, rejects: str | None, before: int) -> None:
    """Print the bad records as long as they are among the first, and write them all to the file of rejects, after those
    that were reported before."""
    bad = merger.tally["bad_records"]
    try:
        with open(rejects, "ab" if before else "wb") if rejects else contextlib.nullcontext() as file:
            for number, (source, line, reason, record) in enumerate(merger.bad_records(), before):
                if number < SHOWN:
                    click.echo(f"{printable(source)}:{line}: {printable(reason)}", err=True)
                elif not file:
                    break
                if file:
                    file.write(record + b"\n")
    except OSError as error:
        raise LoadError(f"{rejects}: {error.strerror}; nothing was loaded") from None
    if bad > max(before, SHOWN):
        click.echo(f"and {bad - max(before, SHOWN)} more bad records", err=True)


def print_report(text: str) -> None:
    """Print the report of a committed load. Raises LoadError."""
    try:
        text.encode(sys.stdout.encoding)
    except UnicodeEncodeError:
        text = text.translate(ASCII)
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    try:
        click.echo(text, color=False if plain else None)  # None: on a terminal only
    except BrokenPipeError:  # the reader had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        raise LoadError(f"the events are loaded, but the report could not be written: {error.strerror}") from None


def plot(path: str, db: str) -> None:
    """Draw the active_user_table of a database into a file, which is whole at any moment. Raises LoadError."""
    drawn = picture(*stored(db), suffix=os.path.splitext(path)[1].lower())
    unfinished = f"{path}.{os.getpid()}"
    try:
        try:
            with open(unfinished, "wb") as file:
                file.write(drawn)
            os.replace(unfinished, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(unfinished)
    except OSError as error:
        raise LoadError(f"{path}: {error.strerror}; what was loaded is loaded, but not drawn") from None


@click.command(
    context_settings={
        "auto_envvar_prefix": "LOAD_ACTIVE_USERS",
        "help_option_names": ["-h", "--help"],
        "max_content_width": 100,
        "show_default": True,
    },
)
@click.argument("events", nargs=-1, metavar="EVENTS...")
@click.option(
    "--db", default="active_user_table.db", metavar="PATH", help="SQLite file, made when missing, or postgresql:// URL."
)
@click.option("--timezone", default="US/Central", metavar="NAME", help="IANA zone whose calendar dates are counted.")
@click.option("--min-engagement-msec", default=3000, type=COUNT, help="Least engagement time of an active event.")
@click.option(
    "--valuable-event",
    default=["*_event"],
    multiple=True,
    metavar="GLOB",
    help="An event parameter whose key matches makes the event valuable; repeatable.",
)
@click.option("--max-bad-records", default=0, type=COUNT, help="Bad records to tolerate; more, and nothing is loaded.")
@click.option("--rejects", metavar="FILE", help="Write every bad record to FILE, byte for byte, one a line.")
@click.option("--validate", is_flag=True, help="Decode every line, also those that can hold no engagement event.")
@click.option("--replace", is_flag=True, help="Replace the dates in this load, instead of merging into them.")
@click.option("--workers", type=click.IntRange(1), show_default="the usable CPUs", help="Processes that scan.")
@click.option("--cluster", metavar="ADDRESS", help="Scan on a Dask cluster, as in tcp://host:8786.")
@click.option(
    "--commit-every",
    type=click.FloatRange(1, 10**6),
    metavar="SECONDS",
    help="Of a pipe without end, commit what was read so far, every so often.",
)
@click.option("--dry-run", is_flag=True, help="Count and report; write nothing.")
@click.option("--format", "layout", default="table", type=click.Choice(list(LAYOUTS)), help="Of the report.")
@click.option("--plot", "plotted", metavar="FILE", help="Draw all active users per day as .png, .svg or .pdf.")
@click.option(
    "--progress/--no-progress",
    default=None,
    show_default="on a terminal",
    help="Say on standard error how much has been read.",
)
@click.option("-q", "--quiet", is_flag=True, help="No report on standard output.")
@click.version_option(__version__, message="%(version)s")
def main(
    events: tuple[str, ...],
    db: str,
    timezone: str,
    min_engagement_msec: int,
    valuable_event: tuple[str, ...],
    max_bad_records: int,
    rejects: str | None,
    validate: bool,
    replace: bool,
    workers: int | None,
    cluster: str | None,
    commit_every: float | None,
    dry_run: bool,
    layout: str,
    plotted: str | None,
    progress: bool | None,
    quiet: bool,
) -> None:
    """Load the number of active users per day from analytics events into an SQL table.

    \b
    Examples:
      python load_active_users.py data/bq-results-sample-data.jsons
      python load_active_users.py --db /srv/analytics.db --plot users.png /srv/events/*.json.gz
      python load_active_users.py --db /srv/analytics.db --plot users.png
      some-producer | python load_active_users.py --commit-every 5 -

    EVENTS are newline-delimited JSON files as BigQuery exports them, also compressed (gzip, zstd), or - for standard
    input. All are loaded in one transaction or none; what was loaded before is not counted twice. Every option can be
    set in the environment too: LOAD_ACTIVE_USERS_DB, ...
    """
    handle_stops(stop)
    if not events and not plotted:
        raise click.MissingParameter(param_hint="'EVENTS...'", param_type="argument")
    if plotted and not plotted.lower().endswith(PICTURES):
        raise click.BadParameter(f"{plotted!r} does not end in {', '.join(PICTURES)}", param_hint="'--plot'")
    if commit_every and (replace or dry_run):
        raise click.UsageError("--commit-every can't be combined with --replace or --dry-run")
    if cluster and (commit_every or "-" in events):
        raise click.UsageError("--cluster can't be combined with --commit-every or standard input")
    try:
        check_files(events, None if is_url(db) else db, rejects, plotted)
        if events:
            try:
                rule = Rule(timezone, min_engagement_msec, valuable_event)
            except ValueError as error:
                raise click.BadParameter(str(error), param_hint="'--timezone'") from None
            check_database(db, rule)
            merger = Merger(ranges(sources_of(events), 8 * BATCH if cluster else BATCH))
            live = Live() if commit_every else None
            scan = Scanner(rule, validate, keep=rejects is not None, live=live)
            if cluster:
                found = scan_on_cluster(merger.parts, scan, cluster)
            else:
                found = batches(merger.parts, scan, 1 if commit_every else workers or usable_cpus())
            total = sum(part.size for part in merger.parts) if all(part.size for part in merger.parts) else 0
            watch = Progress(sys.stderr.isatty() if progress is None else progress, total)
            load_id, reported = os.urandom(8).hex(), 0
            counts: dict[str, DateCount] = {}

            def commit() -> None:
                nonlocal reported
                with temporary_file_errors():
                    merger.stage()
                    watch.clear()
                    report_bad_records(merger, None if dry_run else rejects, reported)
                reported = merger.tally["bad_records"]
                if reported > max_bad_records:
                    limit = f"more than --max-bad-records {max_bad_records}"
                    since = " since the last commit" if counts else ""
                    raise LoadError(f"bad records: {reported}, {limit}; nothing was loaded{since}")
                watch.show(f"writing {printable(label(db))}")
                for new in store(db, rule, merger, load_id, events, replace, dry_run):
                    counts[new.date] = new.after(counts.get(new.date))
                merger.clear()

            with contextlib.closing(watch):
                if live and commit_every:
                    load_live(watch.over(found), merger, commit, live, commit_every)
                else:
                    with temporary_file_errors():
                        for index, batch in watch.over(found):
                            merger.add(index, batch)
                    commit()
            if not quiet:
                print_report(LAYOUTS[layout]([counts[date] for date in sorted(counts)], merger.tally))
        if plotted and not dry_run:
            plot(plotted, db)
    except (LoadError, OSError, MemoryError) as error:
        raise click.ClickException(printable(str(error) or "out of memory")) from None
    finally:
        handle_stops(signal.SIG_IGN)  # all is done, and what Python does at its end is not to be disturbed


def stop(number: int, frame: object) -> NoReturn:
    """End at a signal with the exit status that a shell expects."""
    handle_stops(signal.SIG_IGN)
    click.echo("\n" if sys.stderr.isatty() else "", nl=False, err=True)  # after what is on the line
    click.echo(f"{signal.Signals(number).name}: a load that is not committed leaves nothing behind", err=True)
    sys.exit(128 + number)


def handle_stops(handler: Any) -> None:
    for number in STOPS:
        signal.signal(number, handler)


if __name__ == "__main__":
    gc.freeze()  # what was imported stays: to look through it, again and again, made up a sixth of a small load
    gc.enable()
    main()
