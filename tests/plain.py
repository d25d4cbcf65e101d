"""The rule read slowly and plainly, with json and zoneinfo: what the loader has to agree with."""

import json
import re
from collections import defaultdict
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from typing import Any
from zoneinfo import ZoneInfo

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def refuse(*_: object) -> None:
    raise ValueError


def expect(value: Any, *types: type) -> Any:
    return value if type(value) in types else refuse()


def optional(value: Any, type_: type) -> Any:
    """A field that may be null or absent, and is empty then."""
    return type_() if value is None else expect(value, type_)


def integer(value: Any) -> int:
    return int(value if type(value) is int or re.fullmatch("-?[0-9]+", expect(value, str)) else refuse())


def active_user(
    event: Any, zone: str = "US/Central", least: int = 3000, globs: tuple[str, ...] = ("*_event",)
) -> tuple[str, str | None] | None:
    """The date and the user that an engagement event makes active, or None. Raises ValueError."""
    params = [expect(param, dict) for param in optional(event.get("event_params"), list)]
    keys = [optional(param.get("key"), str) for param in params]
    values = [optional(param.get("value"), dict).get("int_value") for param in params]
    msecs = [integer(v) for k, v in zip(keys, values, strict=True) if k == "engagement_time_msec" and v is not None]
    user = optional(event.get("user_pseudo_id"), str)
    try:
        time = EPOCH + timedelta(microseconds=integer(event.get("event_timestamp")))
        date = time.astimezone(ZoneInfo(zone)).date().isoformat()
    except OverflowError:
        refuse()
    named = [param["key"] for param in params if param.get("key") is not None]
    valuable = any(fnmatchcase(key, glob) for key in named for glob in globs)
    return (date, user or None) if valuable and any(msec >= least for msec in msecs) else None


def read(data: bytes, **rule: Any) -> tuple[dict[str, set[str]], dict[str, int], dict[int, bytes]]:
    """The active users by date, the tallies and the bad lines by number."""
    users, tally, bad = defaultdict(set), defaultdict(int), {}
    lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    for number, line in enumerate(lines[:-1] if not lines[-1] else lines, 1):
        tally["lines"] += 1
        record = line.strip(b" \t\r")
        if not record:
            tally["blank_lines"] += 1
            continue
        try:
            if not (record.startswith(b"{") and record.endswith(b"}")):
                refuse()
            if b"user_engagement" in record or re.search(rb"\\u00(5[fF]|6|7)", record):
                event = json.loads(record.decode(), parse_constant=refuse)
                json.dumps(event, ensure_ascii=False).encode()  # a half of a surrogate pair is no text
                if event.get("event_name") == "user_engagement":
                    active = active_user(event, **rule)
                    tally["engagement_events"] += 1
                    tally["active_events"] += active is not None
                    tally["anonymous_events"] += active is not None and active[1] is None
                    if active and active[1]:
                        users[active[0]].add(active[1])
        except (ValueError, RecursionError):
            bad[number] = line
            tally["bad_records"] += 1
    return dict(users), dict(tally), bad
