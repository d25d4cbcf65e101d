"""The scanner agrees with the plain reading, whatever the lines, the blocks and the ranges."""

import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import plain
import pytest
from conftest import NOON, SAMPLE, event, lines
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from load_active_users import (
    GZIP,
    TALLIES,
    ZSTD,
    LoadError,
    Merger,
    Range,
    Rule,
    Scanner,
    blocks,
    ranges,
    scan_in_turn,
)

RULE = Rule("US/Central", 3000, ["*_event"])


def scan(path: Path, cuts: list[int], block_size: int, rule: Rule = RULE) -> tuple[dict, dict, dict]:
    """What plain.read returns, of a file that is scanned in ranges between some offsets."""
    size = path.stat().st_size
    borders = sorted({0, size, *(cut % (size + 1) for cut in cuts)})
    parts = [Range(str(path), *border) for border in itertools.pairwise(borders)]
    return merged(parts, Scanner(rule, keep=True, block_size=block_size))


def merged(parts: list[Range], scanner: Scanner) -> tuple[dict, dict, dict]:
    merger = Merger(parts)
    for index, batch in scan_in_turn(parts, scanner):
        merger.add(index, batch)
    merger.stage()
    users = {date: {user for run in merger.runs(date) for user in json.loads(run)} for date in merger.dates()}
    tally = {name: merger.tally[name] for name in TALLIES if merger.tally[name]}
    return users, tally, {line: record for _, line, _, record in merger.bad_records()}


def without_zeros(result: tuple[dict, dict, dict]) -> tuple[dict, dict, dict]:
    users, tally, bad = result
    return users, {name: count for name, count in tally.items() if count}, bad


# What can stand in a field: mostly what belongs there.
odd = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just([]) | st.just({})
digits = st.sampled_from(["3000", "2999", "-1", "", "+5", " 5", "5.0", "1_0", "٣", "9" * 400, "0003000", "-"])
times = st.integers(NOON - 10**12, NOON + 10**12) | st.integers(-(10**17), 10**18)
times |= st.sampled_from([NOON, 0, -62135596800 * 10**6, 253402300800 * 10**6, 10**400])
keys = st.sampled_from(["engagement_time_msec", "x_event", "_event", "event", "session", "user_engagement"])
values = st.fixed_dictionaries({}, optional={"int_value": st.integers(2990, 3010) | digits | odd, "string_value": odd})
params = st.fixed_dictionaries({}, optional={"key": keys | odd, "value": values | values | odd})
good_params = st.lists(st.tuples(keys, st.integers(2990, 3010)), max_size=4).map(
    lambda pairs: [{"key": key, "value": {"int_value": value}} for key, value in pairs]
)
events = st.fixed_dictionaries(
    {"event_name": st.just("user_engagement") | st.sampled_from(["screen_view", "user_engagement_2"]) | odd},
    optional={
        "event_timestamp": times | times.map(str) | digits | odd,
        "event_params": good_params | st.lists(params, max_size=4) | odd,
        "user_pseudo_id": st.sampled_from("abc") | st.text(max_size=3) | odd,
        "user_properties": st.lists(params, max_size=2) | odd,
    },
)
active = st.builds(event, st.sampled_from("abcdef"), times | times.map(str))


@st.composite
def spelling(draw: st.DrawFn) -> bytes:
    """An event in one of its many spellings: white space, escapes, order, repeated keys, and sometimes broken."""
    record = draw(active | events)
    items = draw(st.permutations(list(record.items())))
    items += draw(st.lists(st.sampled_from(items), max_size=1))
    if draw(st.integers(0, 9)) == 0:
        items.insert(0, (draw(st.sampled_from(sorted(record))), draw(odd)))
    comma, colon = draw(st.sampled_from([(",", ":"), (", ", ": "), (" ,\t", "\r:  ")]))
    ascii_ = draw(st.booleans())
    text = comma.join(
        json.dumps(name) + colon + json.dumps(value, separators=(comma, colon), ensure_ascii=ascii_)
        for name, value in items
    )
    for letter in draw(st.sampled_from(["", "", "", "u", "_", "m", "vn", "t"])):
        text = text.replace(letter, draw(st.sampled_from([f"\\u00{ord(letter):x}", f"\\u00{ord(letter):X}"])))
    line = ("{" + text + "}").encode(errors="surrogatepass")
    if draw(st.integers(0, 9)) == 0:
        at = draw(st.integers(0, len(line)))
        line = line[:at] + draw(st.binary(max_size=3)) + line[at + draw(st.integers(0, 3)) :]
    return line.replace(b"\n", b"")


line = (
    spelling()
    | spelling()
    | st.sampled_from(
        [b"{}", b"", b" \t", b"{", b"}", b"[{}]", b"\xef\xbb\xbf{}", b"{}{}", b"\\u0075", b'{"\\u00', b"null"]
    )
)
files = st.builds(
    lambda bom, rows, newline, last: bom + newline.join(rows) + (newline if last else b""),
    st.sampled_from([b"", b"", b"\xef\xbb\xbf"]),
    st.lists(line, max_size=12),
    st.sampled_from([b"\n", b"\n", b"\r\n", b"}\n{", b"\n\n"]),
    st.booleans(),
)


@settings(max_examples=500)
@given(files, st.lists(st.integers(0, 5000), max_size=6), st.sampled_from([1, 2, 3, 7, 16, 61, 300, 1000, 10**5]))
@example(b"{}\n\xef\xbb\xbf{}\n", [], 1)
@example(b"{}\n\xef\xbb\xbf{}\n", [3], 100)
@example(b"x}\n{}", [], 1000)
@example(b"{}\n{x", [], 1000)
@example(b"x", [], 1000)
@example(b"{}\n{}\n{x\n", [], 1000)
@example(lines(event()), [1], 1)
@example(b'{"a":"user_engagement\xff"}\n', [], 100)
@example(b'{"event_name":"\\u0075ser_engagement","event_timestamp":null}', [], 100)
def test_any_file_in_any_blocks_and_ranges(tmp_path_factory: Any, data: bytes, cuts: list[int], size: int) -> None:
    assume(not data.startswith((GZIP, ZSTD)))
    path = tmp_path_factory.getbasetemp() / "drawn.jsons"
    path.write_bytes(data)
    assert scan(path, cuts, size) == without_zeros(plain.read(data))


@settings(max_examples=200)
@given(st.lists(active, max_size=8).map(lambda events: lines(*events)), st.integers(1, 500), st.data())
def test_a_bad_byte_anywhere(tmp_path_factory: Any, data: bytes, size: int, draw: st.DataObject) -> None:
    at = draw.draw(st.integers(0, len(data)))
    data = data[:at] + draw.draw(st.binary(max_size=2)) + data[at + draw.draw(st.integers(0, 2)) :]
    assume(not data.startswith((GZIP, ZSTD)))
    path = tmp_path_factory.getbasetemp() / "broken.jsons"
    path.write_bytes(data)
    assert scan(path, [at], size) == without_zeros(plain.read(data))


@pytest.mark.parametrize("zone", ["US/Central", "Asia/Kolkata", "America/St_Johns", "Australia/Lord_Howe", "UTC"])
@settings(max_examples=300)
@given(time=st.integers(-62135596800 * 10**6 - 10**11, 253402300800 * 10**6 + 10**11) | times)
def test_any_time_in_any_zone(zone: str, time: int) -> None:
    rule = Rule(zone, 3000, ["*_event"])
    try:
        expected = plain.active_user(event(time=time), zone)[0]
    except ValueError:
        with pytest.raises(ValueError, match="beyond the calendar"):
            rule.date(time)
        return
    assert rule.date(time) == expected


def test_every_minute_about_the_changes_of_the_clocks() -> None:
    """Also where a change is at midnight, or a minute after it, so that a date comes twice."""
    changes = {
        "US/Central": [1583654400, 1604210400],  # 2020-03-08 and 2020-11-01, 08:00 and 06:00 UTC
        "America/St_Johns": [1194146400],  # 2007-11-04 00:01 back to 23:01
        "America/Havana": [1583643600, 1604206800],  # at midnight
        "Australia/Lord_Howe": [1586012400],  # half an hour
        "Pacific/Apia": [1325239200],  # 2011-12-30 did not take place
    }
    for zone, instants in changes.items():
        rule = Rule(zone, 3000, ["*_event"])
        for instant in instants:
            for second in range(instant - 86_400, instant + 86_400, 60):
                for usec in (second * 10**6, second * 10**6 - 1):
                    assert rule.date(usec) == plain.active_user(event(time=usec), zone)[0], (zone, usec)


@pytest.mark.parametrize(
    "compress", [bytes, gzip.compress, lambda data: gzip.compress(data[:5000]) + gzip.compress(data[5000:])]
)
@pytest.mark.parametrize("size", [1000, 65_536, 10**7])
def test_the_sample(tmp_path: Path, compress: Any, size: int) -> None:
    data = SAMPLE.read_bytes()
    path = tmp_path / "events"
    path.write_bytes(compress(data))
    expected = without_zeros(plain.read(data))
    assert merged(ranges([str(path)]), Scanner(RULE, keep=True, block_size=size)) == expected
    assert {date: len(users) for date, users in expected[0].items()} == {
        "2019-12-29": 11,
        "2019-12-30": 31,
        "2019-12-31": 22,
    }


def test_a_line_of_many_blocks_and_ranges(tmp_path: Path) -> None:
    long = event("long", extra="x" * 5_000_000)
    data = lines(event("a"), long, event("b"), b"bad", long, event("c"))
    path = tmp_path / "long.jsons"
    path.write_bytes(data)
    for cuts in ([], [10, 3_000_000], list(range(0, len(data), 777_777))):
        assert scan(path, cuts, 4096) == without_zeros(plain.read(data))
    assert scan(path, [], 4096)[0] == {"2019-12-30": {"a", "b", "c", "long"}}


def test_a_file_that_is_cut_short_in_the_middle_of_a_range(tmp_path: Path) -> None:
    path = tmp_path / "shrinking.jsons"
    path.write_bytes(lines(event()) * 100)
    (part,) = ranges([str(path)])
    with path.open("r+b", buffering=0) as file:
        scanning = blocks(file, part, 1000)
        next(scanning)
        file.truncate(5000)
        with pytest.raises(LoadError, match="cut short"):
            list(scanning)


# After the kinds of case in https://github.com/nst/JSONTestSuite: values that JSON has, and that it has not.
VALUES = [
    b"-0",
    b"1E+2",
    b"0.1e-7",
    b"123.456",
    b"1e400",
    b"9" * 400,
    b'"\\u0000"',
    b'"\\uD834\\uDD1E"',
    b'"\\/\\b\\f"',
]
VALUES += [
    b"[]",
    b'{"":{"":[null,true,false]}}',
    b'"\x7f"',
    '"\u2028é😀"'.encode(),
    b"[" * 400 + b"]" * 400,
    b' \t"" \r',
]
NO_VALUES = [
    b"01",
    b"-01",
    b"+1",
    b".5",
    b"1.",
    b"1e",
    b"1e+",
    b"0x1",
    b"-",
    b"--1",
    b"1_0",
    b"NaN",
    b"-Infinity",
    b"1 2",
]
NO_VALUES += [
    b"[1,]",
    b"[,1]",
    b"[1",
    b"1]",
    b'{"a":1,}',
    b'{"a"}',
    b"{a:1}",
    b'{"a":}',
    b"{1:1}",
    b"'x'",
    b'"',
    b'"\\x"',
]
NO_VALUES += [
    b'"\\u00zz"',
    b'"\\u12"',
    b'"\t"',
    b'"\0"',
    b'"\\"',
    b"tru",
    b"nul",
    b"True",
    b"/**/1",
    b"1//",
    b"\x0c1",
    b"\xa01",
]
NO_VALUES += [
    b"",
    b'"\\ud800"',
    b'"\\udc00\\ud800"',
    b'"\xff"',
    b'"\xc0\xaf"',
    b'"\xed\xa0\x80"',
    b"\xef\xbb\xbf1",
    b"\0",
]


@pytest.mark.parametrize(("values", "good"), [(VALUES, True), (NO_VALUES, False)], ids=["good", "bad"])
def test_kinds_of_json(tmp_path: Path, values: list[bytes], good: bool) -> None:
    """In a field that nothing depends on, of an event that counts."""
    rows = [json.dumps(event(str(number), x=0)).encode() for number in range(len(values))]
    path = tmp_path / "kinds.jsons"
    path.write_bytes(
        b"\n".join(row.replace(b'"x": 0', b'"x": ' + value) for row, value in zip(rows, values, strict=True))
    )
    _, tally, bad = scan(path, [], 1000)
    assert list(bad) == ([] if good else list(range(1, len(values) + 1)))
    assert tally.get("active_events", 0) == (len(values) if good else 0)
