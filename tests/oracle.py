"""The rule read slowly and plainly, with json and zoneinfo: what the loader has to
agree with."""

import json
import re
from collections import Counter, defaultdict
from datetime import UTC, datetime, timedelta
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
    """A field that may be null or absent, and is empty then."""
    return type_() if value is None else expect(value, type_)


def json_integer(digits: str) -> int | float:
    """A JSON integer; what Python does not convert is none."""
    return int(digits) if len(digits) < 4300 else float(digits)


def integer(value: Any) -> int:
    if type(value) is int:
        return value
    return int(value if re.fullmatch("-?[0-9]+", expect(value, str)) else refuse())


def other_format(data: bytes) -> str | None:
    """The name of another format that a file is of by its first bytes."""
    head = data.removeprefix(b"\xef\xbb\xbf")[:512]
    kinds = (kind for kind, magic in OTHER_FORMATS.items() if re.match(magic, head))
    return next(kinds, None)


def needle(rule: Rule) -> str:
    """What a line with an engagement event must hold, in some spelling: a word of the
    only name, or else the key of the engagement time."""
    words = re.findall("[A-Za-z0-9_]+", rule.names[0])
    return max(words, key=len, default="event_name") if is_by_name_alone(rule) else TIME


def is_by_name_alone(rule: Rule) -> bool:
    return len(set(rule.names)) == 1 and rule.names[0] != "*"


def may_hold_engagement(record: bytes, rule: Rule) -> bool:
    """Whether a line holds what is searched for, or an escape that may be of one of its
    letters."""
    text = needle(rule)
    rows = {f"{ord(letter) >> 4:x}" for letter in text}  # of the ASCII table
    return text.encode() in record or any(
        rb"\u00" + row.encode() in record for row in rows
    )


def is_engagement(event: Any, rule: Rule) -> bool:
    """Whether an object is an engagement event: of the only name or, of several names
    or any, if it holds the key of the engagement time. Raises ValueError where that
    can't be told."""
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
    """The date and the user that an engagement event makes active, or None. Raises
    ValueError."""
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
        date = time.astimezone(ZoneInfo(rule.zone)).date().isoformat()
    except OverflowError:
        refuse()
    named = [param["key"] for param in params if param.get("key") is not None]
    valuable = any(fnmatchcase(key, glob) for key in named for glob in rule.globs)
    return (
        (date, user or None)
        if valuable and any(msec >= rule.least for msec in msecs)
        else None
    )


def read(
    data: bytes,
    rule: Rule = DEFAULT,
    dates: tuple[str, str] = ("2000-01-01", "9999-12-31"),
) -> Result:
    """The active users by date, the tallies that are not 0 and the bad lines by number.

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
            date, user = active
            is_counted = dates[0] <= date <= dates[1]
            tally["active_events"] += 1
            tally["anonymous_events"] += user is None
            tally["out_of_range_events"] += not is_counted
            if user and is_counted:
                users[date].add(user)
    return dict(users), {name: count for name, count in tally.items() if count}, bad
