"""The rule and the tables, slow and plain: what the loader has to agree with."""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, NoReturn
from zoneinfo import ZoneInfo

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
TIME = "engagement_time_msec"
Result = tuple[dict[str, set[str]], dict[str, int], dict[int, bytes]]


class Rule(NamedTuple):
    """What makes a user active on a date."""

    zone: str = "US/Central"
    names: tuple[str, ...] = ("user_engagement",)
    least: int = 3000
    globs: tuple[str, ...] = ("*_event",)


DEFAULT = Rule()
USUAL_DATES = ("2000-01-01", "9999-12-31")
REPORTED: tuple[str, ...] = ("lines", "engagement_events", "active_events")
NOBODY = (None, None, None)  # where the view has NULL
REPORTED += ("anonymous_events", "out_of_range_events", "bad_records")

# What the first bytes of a file that is no newline-delimited JSON are like.
OTHER_FORMATS = {
    "a JSON array": rb"\s*\[",
    "pretty-printed JSON": rb'\s*\{\s*\n\s*"',
    "a Parquet file": rb"PAR1",
    "an Avro file": rb"Obj\x01",
    "an ORC file": rb"ORC",
    "a zip archive": rb"PK[\x03\x05\x07]",
    "xz-compressed": rb"\xfd7zXZ\0",
    "bzip2-compressed": rb"BZh",
    "lz4-compressed": rb"\x04\x22\x4d\x18",
    "compressed twice": rb"\x1f\x8b|\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18",
    "a tar archive": rb"[\s\S]{257}ustar[\0 ]",
    "UTF-16": rb"\xff\xfe|\xfe\xff|[{\[]\0|\0[{\[]",
    "HTML or XML": rb"\s*<[!?a-zA-Z]",
}


def refuse(*_: object) -> NoReturn:
    raise ValueError


def expect(value: Any, *types: type) -> Any:
    return value if type(value) in types else refuse()


def optional(value: Any, type_: type) -> Any:
    """Return a field, or an empty value if it is null or absent."""
    return type_() if value is None else expect(value, type_)


def json_integer(digits: str) -> int | float:
    """Return a JSON integer, or a float if it has more digits than Python converts."""
    return int(digits) if len(digits.removeprefix("-")) <= 4300 else float(digits)


def integer(value: Any) -> int:
    if type(value) is int:
        return value
    return int(value if re.fullmatch("-?[0-9]+", expect(value, str)) else refuse())


def other_format(data: bytes) -> str | None:
    """Return the name of another format, which the first bytes of a file tell."""
    head = data.removeprefix(b"\xef\xbb\xbf")[:512]
    kinds = (kind for kind, magic in OTHER_FORMATS.items() if re.match(magic, head))
    return next(kinds, None)


def needle(rule: Rule) -> str:
    """Return what each line with an engagement event holds, in some spelling.

    It is a word of the only name, or else the key of the engagement time.
    """
    words = re.findall("[A-Za-z0-9_]+", rule.names[0])
    return max(words, key=len, default="event_name") if is_by_name_alone(rule) else TIME


def is_by_name_alone(rule: Rule) -> bool:
    return len(set(rule.names)) == 1 and rule.names[0] != "*"


def may_hold_engagement(record: bytes, rule: Rule) -> bool:
    """Return whether a line holds the needle, or an escape that may spell it."""
    text = needle(rule)
    rows = {f"{ord(letter) >> 4:x}" for letter in text}  # of the ASCII table
    return text.encode() in record or any(
        rb"\u00" + row.encode() in record for row in rows
    )


def is_engagement(event: Any, rule: Rule) -> bool:
    """Return whether an object is an engagement event.

    It has the only name or, of several names or any, the key of the engagement time.
    Raises ValueError where that can't be told.
    """
    name = event.get("event_name")
    if "*" not in rule.names and not (type(name) is str and name in rule.names):
        return False
    if is_by_name_alone(rule):
        return True
    params = [
        expect(param, dict) for param in optional(event.get("event_params"), list)
    ]
    return TIME in [optional(param.get("key"), str) for param in params]


def active_user(event: Any, rule: Rule = DEFAULT) -> tuple[str, str | None] | None:
    """Return the date and the user that an engagement event makes active, or None.

    Raises ValueError for a bad record.
    """
    params = [
        expect(param, dict) for param in optional(event.get("event_params"), list)
    ]
    keys = [optional(param.get("key"), str) for param in params]
    values = [optional(param.get("value"), dict).get("int_value") for param in params]
    pairs = zip(keys, values, strict=True)
    msecs = [
        integer(value) for key, value in pairs if key == TIME and value is not None
    ]
    user = optional(event.get("user_pseudo_id"), str)
    if "\0" in user or len(user.encode()) > 512:
        refuse()
    try:
        time = EPOCH + timedelta(microseconds=integer(event.get("event_timestamp")))
        day = time.astimezone(ZoneInfo(rule.zone)).date().isoformat()
    except OverflowError:
        refuse()
    named = [param["key"] for param in params if param.get("key") is not None]
    valuable = any(fnmatchcase(key, glob) for key in named for glob in rule.globs)
    return (
        (day, user or None)
        if valuable and any(msec >= rule.least for msec in msecs)
        else None
    )


def read(
    data: bytes,
    rule: Rule = DEFAULT,
    dates: tuple[str, str] = USUAL_DATES,
) -> Result:
    """Return the users by date, the tallies that are not 0, the bad lines by number.

    Raises ValueError for another format.
    """
    if other_format(data):
        refuse()
    users: dict[str, set[str]] = defaultdict(set)
    tally = Counter[str]()
    bad = {}
    rows = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    for number, line in enumerate(rows[:-1] if not rows[-1] else rows, 1):
        tally["lines"] += 1
        record = line.strip(b" \t\r")
        if not record:
            tally["blank_lines"] += 1
            continue
        try:
            if not (record.startswith(b"{") and record.endswith(b"}")):
                refuse()
            if not may_hold_engagement(record, rule):
                continue
            event = json.loads(
                record.decode(), parse_int=json_integer, parse_constant=refuse
            )
            json.dumps(
                event, ensure_ascii=False
            ).encode()  # half a surrogate pair is no text
            if not is_engagement(event, rule):
                continue
            active = active_user(event, rule)
        except (ValueError, RecursionError):
            bad[number] = line
            tally["bad_records"] += 1
            continue
        tally["engagement_events"] += 1
        if active:
            day, user = active
            is_counted = dates[0] <= day <= dates[1]
            tally["active_events"] += 1
            tally["anonymous_events"] += user is None
            tally["out_of_range_events"] += not is_counted
            if user and is_counted:
                users[day].add(user)
    return dict(users), {name: count for name, count in tally.items() if count}, bad


class Table:
    """What the tables hold, load by load: users by date, and their counts."""

    def __init__(self) -> None:
        self.users: dict[str, set[str]] = {}
        self.counts: dict[str, int] = {}

    def load(
        self,
        data: bytes,
        dates: tuple[str, str] = USUAL_DATES,
        replace: bool = False,
        dry_run: bool = False,
    ) -> dict[str, Any]:
        """Load events; return the report as JSON has it."""
        bounds = dates
        if replace:  # the other usual dates are merged into
            bounds = min(dates[0], USUAL_DATES[0]), max(dates[1], USUAL_DATES[1])
        found, tally, _ = read(data, DEFAULT, bounds)
        replaced = set(days(*dates)) if replace else set()
        rows, left_out = [], 0
        for day in sorted(replaced | found.keys()):
            new, kept = found.get(day, set()), self.users.get(day, set())
            count = self.counts.get(day, 0)
            if day in replaced:
                after = new
            elif len(kept) < count:  # some were deleted: the date is final
                rows.append(count_of(day, count, 0, 0))
                left_out += len(new)
                continue
            else:
                after = kept | new
            rows.append(count_of(day, len(after), len(after - kept), len(kept - after)))
            if not dry_run:
                self.users[day], self.counts[day] = after, len(after)
        report = {name: tally.get(name, 0) for name in REPORTED}
        return {"dates": rows, **report, "left_out": left_out, "skipped_files": 0}

    def forget(self, day: str) -> None:
        """Delete the users of a date by hand."""
        self.users[day] = set()


def count_of(day: str, count: int, added: int, removed: int) -> dict[str, Any]:
    names = ("date", "active_user_count", "added", "removed")
    return dict(zip(names, (day, count, added, removed), strict=True))


def days(first: str, last: str) -> Iterator[str]:
    day = date.fromisoformat(first)
    while day.isoformat() <= last:
        yield day.isoformat()
        day += timedelta(1)


def trend(users: dict[str, set[str]]) -> list[tuple[Any, ...]]:
    """Return the view active_user_trend of users by date.

    A row has the date, its users, weekly and monthly active users, stickiness, the
    number of days since the first date, and the average of seven days.
    """
    by_day = {date.fromisoformat(day): some for day, some in sorted(users.items())}

    def window(day: date, size: int) -> list[set[str]]:
        return [some for one, some in by_day.items() if 0 <= (day - one).days < size]

    first = min((day for day, some in by_day.items() if some), default=None)
    rows: list[tuple[Any, ...]] = []
    for day, some in by_day.items():
        counts = [len(each) for each in window(day, 7)]
        average = int(sum(counts) / len(counts) * 10 + 0.5) / 10  # half up, as in SQL
        week, month = (len(set().union(*window(day, size))) for size in (7, 28))
        users_of_day = (week, month, round(len(some) / month, 4)) if month else NOBODY
        number = (day - first).days + 1 if first else None
        rows.append((str(day), len(some), *users_of_day, number, average))
    return rows
