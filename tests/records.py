"""Records that are active, inactive, of other events, and bad: a specification."""

import json
from typing import Any

from helpers import NOON, NOT_AN_OBJECT, event, lines, params

TRUNCATED = f"{NOT_AN_OBJECT} (Input data was truncated)"
TOO_LONG = "user_pseudo_id is longer than 512 bytes"
NO_TIMES: list[Any] = [None, "", "x", "1e15", 1.5, 1.0, "1.0", True, [], {}]
NO_TIMES += ["9" * 400, 10**400, " 1", "+1", "1_0", "٣"]
NO_PARAMETERS: list[Any] = [5, None, [], "x"]


TIME = "engagement_time_msec"


def spelled(old: str, new: str, **fields: Any) -> bytes:
    """Return an active event in which some text is spelled in another way."""
    return json.dumps(event(**fields)).replace(old, new).encode()


def malformed(why: str) -> str:
    """Return what is said of a line that is no JSON."""
    return f"{NOT_AN_OBJECT} (JSON is malformed: {why})"


def not_an_integer(name: str, value: Any) -> str:
    """Return what is said of a value that is no integer, or too large."""
    shown = json.dumps(value, ensure_ascii=False)
    if shown.strip('"').isascii() and shown.strip('"').isdigit():
        return f"{name} is beyond the calendar: {shown.strip(chr(34))[:60]}"
    return f"{name} is not an integer: {shown}"


ACTIVE = {
    "it has the least engagement time": event(msec=3000),
    "integers are strings": event(msec="3000", time=str(NOON)),
    "a long engagement": event(msec="9" * 400),
    "another valuable parameter": event(key="_event"),
    "the first of several times is long enough": event(
        event_params=params(
            (TIME, {"int_value": 3000}), (TIME, {"int_value": 1}), ("a_event", {})
        )
    ),
    "the last of several times is long enough": event(
        event_params=params(
            (TIME, {"int_value": 1}),
            (TIME, {"int_value": 3000}),
            ("a_event", {"string_value": ""}),
        )
    ),
    "a valuable parameter without value": event(
        event_params=[*params((TIME, {"int_value": 3000})), {"key": "x_event"}]
    ),
    "a valuable parameter that is null": event(
        event_params=params((TIME, {"int_value": 3000}), ("x_event", None))
    ),
    "other parameters are of any kind": event(
        event_params=params(
            ("x_event", {"int_value": []}),
            (None, {"int_value": "x"}),
            ("engagement_time_msec", {"int_value": 3000, "float_value": "x"}),
        )
    ),
    "unknown fields": event(
        new={"event_name": "x", "deep": [[{}]]}, event_date="20200101"
    ),
    "other order, white space": (
        json.dumps(dict(reversed(event().items())), indent=1)
        .replace("\n", "\t\r ")
        .encode()
    ),
    "escapes": spelled("user_eng", "\\u0075ser\\u005Fen\\u0067"),
    "an escaped letter, in capitals": spelled("user_e", "user\\u005Fe"),
    "an escaped letter, in small letters": spelled("user_e", "user\\u005fe"),
    "an escaped letter in a word": spelled("user_engagement", "user_engage\\u006dent"),
    "an escaped first letter of a word": spelled("_engagement", "_\\u0065ngagement"),
    "escapes in the names of fields": spelled("key", "\\u006bey"),
    "BigQuery's escapes": spelled("<&>", "\\u003c\\u0026\\u003e", text="<&>"),
    "a number of 5000 digits in an unknown field": (
        spelled("0" * 4000, "0" * 5000, x=10**4000, y="\0")
    ),
    "the last of a field given twice": (
        spelled('{"event_t', '{"event_params":5,"event_t')
    ),
}
INACTIVE = {
    "2999 ms": event(msec=2999),
    "2999 ms as a string": event(msec="2999"),
    "negative": event(msec=-3000),
    "no engagement time": event(event_params=params(("x_event", {"int_value": 9999}))),
    "a null engagement time": event(msec=None),
    "the engagement time is another type": event(
        event_params=params(
            ("engagement_time_msec", {"string_value": "9999"}), ("x_event", {})
        )
    ),
    "no valuable parameter": event(key="session"),
    "a valuable key in a value": (
        event(key="session", msec=9000, note="x_event")
        | {
            "event_params": params(
                ("engagement_time_msec", {"int_value": 9000}),
                ("a", {"string_value": "x_event"}),
            )
        }
    ),
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
NO_ENGAGEMENT = {
    "another event": event(event_name="screen_view"),
    "the name goes on": event(event_name="user_engagement_2"),
    "the name is in another field": event(event_name="x", other="user_engagement"),
    "the name in capitals": event(event_name="USER_ENGAGEMENT"),
    "the name is null": event(event_name=None, other="user_engagement"),
    "the name is a number": event(event_name=5, other="user_engagement"),
    "wrong types in another event": event(
        event_name="x", event_params=5, other="user_engagement"
    ),
    "the name given twice": (
        lines(event(event_name="x"))
        .replace(b'{"event', b'{"event_name":"user_engagement","event', 1)
        .strip()
    ),
}
BAD_RECORDS: list[tuple[str, bytes, str]] = [
    ("an array", b"[{}]", NOT_AN_OBJECT),
    ("a text", b'"user_engagement"', NOT_AN_OBJECT),
    ("cut off", lines(event())[:100], NOT_AN_OBJECT),
    ("its end alone", lines(event())[100:-1], NOT_AN_OBJECT),
    ("another event, cut off", b'{"event_name":"x"', NOT_AN_OBJECT),
    ("CSV", b"a,b,c", NOT_AN_OBJECT),
    (
        "two on a line",
        lines(event()).strip() * 2,
        malformed("trailing characters (byte 222)"),
    ),
    ("cut off in the middle", lines(event())[:100] + b"}", TRUNCATED),
    (
        "no JSON",
        b"{user_engagement}",
        malformed("object keys must be strings (byte 1)"),
    ),
    (
        "a NUL byte",
        lines(event()).replace(b"3000", b'"\0"').strip(),
        malformed("invalid character (byte 144)"),
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
        lines(event(x=0))
        .replace(b'"x": 0', b'"x": ' + b"[" * 20_000 + b"]" * 20_000)
        .strip(),
        "maximum recursion depth exceeded while deserializing an object",
    ),
    (
        "NaN",
        lines(event(x=float("nan"))).strip(),
        malformed("invalid character (byte 227)"),
    ),
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
    (
        "a user with a NUL",
        lines(event("a\0b")).strip(),
        "user_pseudo_id has a NUL character",
    ),
    (
        "a user of a NUL",
        lines(event("\0", msec=1)).strip(),
        "user_pseudo_id has a NUL character",
    ),
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
    (
        "an escaped name that is cut off",
        b'{"event_name":"\\u0075ser_engagement}',
        TRUNCATED,
    ),
]
