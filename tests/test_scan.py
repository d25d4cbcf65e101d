"""The fast path agrees with the oracle, whatever the lines, blocks and ranges."""

import gzip
import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import oracle
import pytest
from helpers import (
    ALL_DATES,
    NOON,
    SAMPLE,
    SAMPLE_TABLE,
    Loader,
    event,
    lines,
    make_dates,
    make_rule,
    params,
    scan,
    scan_ranges,
    zstd_compress,
)
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

import load_active_users
from load_active_users import (
    Event,
    Findings,
    LoadError,
    Matcher,
    Range,
    Scanner,
    choose_needle,
    seek_line,
    split_source,
)

# What can stand in a field: mostly what belongs there.
odd: st.SearchStrategy[Any] = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
)
odd |= st.just([]) | st.just({})
DIGITS = ["3000", "2999", "-1", "", "+5", " 5", "5.0", "1_0", "٣", "0003000", "-"]
digits = st.sampled_from([*DIGITS, "9" * 400, "9" * 5000])
times = st.integers(NOON - 10**12, NOON + 10**12) | st.integers(-(10**17), 10**18)
times |= st.sampled_from([NOON, 0, -62135596800 * 10**6, 253402300800 * 10**6, 10**400])
NAMES = [
    "user_engagement",
    "user_engagement",
    "screen_view",
    "page_view",
    "x",
    "a-ö",
    "ö",
]
names = st.sampled_from(NAMES)
user_ids = st.sampled_from(
    ["a", "b", "c", "", "a\0", "x" * 129, "x" * 512, "x" * 513, "é" * 257]
)
keys = st.sampled_from(
    ["engagement_time_msec", "x_event", "_event", "event", "session", "user_engagement"]
)
values = st.fixed_dictionaries(
    {},
    optional={"int_value": st.integers(2990, 3010) | digits | odd, "string_value": odd},
)
parameters = st.fixed_dictionaries(
    {}, optional={"key": keys | odd, "value": values | values | odd}
)
good_parameters = st.lists(st.tuples(keys, st.integers(2990, 3010)), max_size=4).map(
    lambda pairs: [{"key": key, "value": {"int_value": value}} for key, value in pairs]
)
events = st.fixed_dictionaries(
    {"event_name": names | names | st.just("user_engagement_2") | odd},
    optional={
        "event_timestamp": times | times.map(str) | digits | odd,
        "event_params": good_parameters | st.lists(parameters, max_size=4) | odd,
        "user_pseudo_id": user_ids | st.text(max_size=3) | odd,
        "user_properties": st.lists(parameters, max_size=2) | odd,
    },
)
active = st.builds(
    lambda user, time, name: event(user, time, event_name=name),
    st.sampled_from("abcdef"),
    times | times.map(str),
    names,
)
rules = st.builds(
    oracle.Rule,
    st.sampled_from(["US/Central", "Asia/Kolkata", "UTC"]),
    st.sampled_from(
        [
            ("user_engagement",),
            ("x",),
            ("a-ö",),
            ("ö",),
            ("user_engagement", "page_view"),
            ("*",),
            ("*", "screen_view"),
        ]
    ),
    st.sampled_from([0, 1, 3000]),
    st.sampled_from([("*_event",), ("*",), ("event", "_*"), ("engagement_time_msec",)]),
)
# Among them those whose ends the times above come near to.
ends = st.sampled_from(
    ["0001-01-01", "2000-01-01", "2019-12-29", "2019-12-30", "9999-12-31"]
)
date_ranges = st.tuples(ends, ends).map(lambda pair: (min(pair), max(pair)))


@st.composite
def spelling(draw: st.DrawFn) -> bytes:
    """Draw an event in one of its many spellings, which are sometimes broken.

    White space, escapes, the order of keys and repeated keys make the difference.
    """
    record = draw(active | events)
    items = list(draw(st.permutations(list(record.items()))))
    items += draw(st.lists(st.sampled_from(items), max_size=1))
    if draw(st.integers(0, 9)) == 0:
        items.insert(0, (draw(st.sampled_from(sorted(record))), draw(odd)))
    comma, colon = draw(st.sampled_from([(",", ":"), (", ", ": "), (" ,\t", "\r:  ")]))
    ascii_ = draw(st.booleans())
    text = comma.join(
        json.dumps(name)
        + colon
        + json.dumps(value, separators=(comma, colon), ensure_ascii=ascii_)
        for name, value in items
    )
    for letter in draw(st.sampled_from(["", "", "", "u", "_", "m", "vn", "t", "x"])):
        spelt = draw(
            st.sampled_from([f"\\u00{ord(letter):x}", f"\\u00{ord(letter):X}"])
        )
        text = text.replace(letter, spelt)
    line = ("{" + text + "}").encode(errors="surrogatepass")
    if draw(st.integers(0, 9)) == 0:
        at = draw(st.integers(0, len(line)))
        line = (
            line[:at]
            + draw(st.binary(max_size=3))
            + line[at + draw(st.integers(0, 3)) :]
        )
    return line.replace(b"\n", b"")


odd_lines = [
    *(b"{}", b"", b" \t", b"{", b"}", b"[{}]", b"\xef\xbb\xbf{}", b"{}{}", b"null"),
    *(b"\\u0075", b'{"\\u00', b'{"\\u0000",}', b'{"a":"\\u003c",}'),
]
line = spelling() | spelling() | st.sampled_from(odd_lines)
files = st.builds(
    lambda bom, rows, newline, last: (
        bom + newline.join(rows) + (newline if last else b"")
    ),
    st.sampled_from([b"", b"", b"\xef\xbb\xbf"]),
    st.lists(line, max_size=12),
    st.sampled_from([b"\n", b"\n", b"\r\n", b"}\n{", b"\n\n"]),
    st.booleans(),
)
block_sizes = st.sampled_from([1, 2, 3, 7, 16, 61, 300, 1000, 10**5])


@settings(max_examples=600)
@given(
    files, st.lists(st.integers(0, 5000), max_size=6), block_sizes, rules, date_ranges
)
@example(b"{}\n\xef\xbb\xbf{}\n", [], 1, oracle.DEFAULT, ALL_DATES)
@example(b"{}\n\xef\xbb\xbf{}\n", [3], 100, oracle.DEFAULT, ALL_DATES)
@example(b"x}\n{}", [], 1000, oracle.DEFAULT, ALL_DATES)
@example(b"{}\n{x", [], 1000, oracle.DEFAULT, ALL_DATES)
@example(b"x", [], 1000, oracle.DEFAULT, ALL_DATES)
@example(b"{}\n{}\n{x\n", [], 1000, oracle.DEFAULT, ALL_DATES)
@example(lines(event()), [1], 1, oracle.DEFAULT, ALL_DATES)
@example(b'{"a":"user_engagement\xff"}\n', [], 100, oracle.DEFAULT, ALL_DATES)
@example(
    b'{"event_name":"\\u0075ser_engagement","event_timestamp":null}',
    [],
    100,
    oracle.DEFAULT,
    ALL_DATES,
)
def test_any_file_in_any_blocks_and_ranges(
    tmp_path_factory: Any,
    data: bytes,
    cuts: list[int],
    size: int,
    rule: oracle.Rule,
    dates: tuple[str, str],
) -> None:
    assume(not oracle.other_format(data))
    path = tmp_path_factory.getbasetemp() / "drawn.jsons"
    path.write_bytes(data)
    assert scan(path, cuts, size, rule, dates) == oracle.read(data, rule, dates)


ONE = lines(event()).rstrip()


@settings(max_examples=150)
@given(
    st.integers(0, 199),
    st.integers(20, 200),
    st.lists(line, min_size=1, max_size=3),
    rules,
)
@example(9, 20, [ONE + ONE], oracle.DEFAULT)
@example(9, 20, [lines(event(time="")).rstrip()], oracle.DEFAULT)
@example(9, 20, [lines(event(msec="")).rstrip()], oracle.DEFAULT)
@example(9, 20, [ONE, lines(event(msec=None)).rstrip()], oracle.DEFAULT)
def test_odd_lines_among_many_usual_ones(
    tmp_path_factory: Any, at: int, number: int, odd: list[bytes], rule: oracle.Rule
) -> None:
    """Such a block is cut into parts more than once."""
    rows = [lines(event(f"user {n}")).rstrip() for n in range(number)]
    for row in odd:
        at = at * 7919 % len(rows)
        rows.insert(at, row)
    data = b"\n".join(rows) + b"\n" * (at % 2)
    assume(not oracle.other_format(data))
    path = tmp_path_factory.getbasetemp() / "many.jsons"
    path.write_bytes(data)
    assert scan(path, [], 5000 if at % 3 else 10**6, rule) == oracle.read(data, rule)


@settings(max_examples=200)
@given(
    st.lists(active, max_size=8).map(lambda events: lines(*events)),
    st.integers(1, 500),
    rules,
    st.data(),
)
def test_a_bad_byte_anywhere(
    tmp_path_factory: Any,
    data: bytes,
    size: int,
    rule: oracle.Rule,
    draw: st.DataObject,
) -> None:
    at = draw.draw(st.integers(0, len(data)))
    some, left_out = draw.draw(st.binary(max_size=2)), draw.draw(st.integers(0, 2))
    data = data[:at] + some + data[at + left_out :]
    assume(not oracle.other_format(data))
    path = tmp_path_factory.getbasetemp() / "broken.jsons"
    path.write_bytes(data)
    assert scan(path, [at], size, rule) == oracle.read(data, rule)


# The first bytes of other formats, and of what is like them.
HEADS = [
    b"[",
    b" \n\t[",
    b"{\n",
    b'{\n  "a": 1',
    b' {\r\n\t"',
    b'\n\n{ \n\n"',
    b'{"a":\n1}',
]
HEADS += [b"PAR1", b"PAR", b"Obj\x01", b"ORC", b"SQLite format 3\0"]
HEADS += [b"PK\3\4", b"PK\5\6", b"PK", b"\xfd7zXZ\0", b"BZh9", b"7z\xbc\xaf\x27\x1c"]
HEADS += [b"\x04\x22\x4d\x18", b"a" * 257 + b"ustar", b"a" * 257 + b"ustar\0"]
HEADS += [b"\xff\xfe{\0", b"\xfe\xff\0{", b"{\0", b"\0{"]
HEADS += [b"<!DOCTYPE", b"\n<html", b"<3", b"<?xml"]
heads = st.sampled_from(HEADS)


@settings(max_examples=300)
@given(
    st.sampled_from([b"", b"", b"\xef\xbb\xbf"]),
    heads,
    st.lists(line, max_size=2).map(b"\n".join),
    block_sizes,
)
def test_other_formats_by_their_first_bytes(
    tmp_path_factory: Any, bom: bytes, head: bytes, more: bytes, size: int
) -> None:
    """A format is named however little of the file the first read brings."""
    data = bom + head + more
    path = tmp_path_factory.getbasetemp() / "other"
    path.write_bytes(data)
    kind = oracle.other_format(data)
    if kind is None:
        assert scan(path, [], size) == oracle.read(data)
    else:
        with pytest.raises(LoadError) as refused:
            scan(path, [], size)
        assert str(refused.value).startswith(f"{path}:1: is {kind}")


def in_two_members(data: bytes) -> bytes:
    return gzip.compress(data[:5000]) + gzip.compress(data[5000:])


@pytest.mark.parametrize("compress", [bytes, gzip.compress, in_two_members])
@pytest.mark.parametrize("size", [1000, 65_536, 10**7])
def test_the_sample_in_blocks_and_ranges(
    tmp_path: Path, compress: Any, size: int
) -> None:
    data = SAMPLE.read_bytes()
    path = tmp_path / "events"
    path.write_bytes(compress(data))
    scanner = Scanner(make_rule(), make_dates(), keep=True, block_bytes=size)
    found = scan_ranges(split_source(str(path), 10**6), scanner)
    assert found == oracle.read(data)
    assert {day: len(users) for day, users in found[0].items()} == SAMPLE_TABLE


def test_a_line_longer_than_blocks_and_ranges(tmp_path: Path) -> None:
    long = event("long", extra="x" * 1_000_000)
    data = lines(event("a"), long, event("b"), b"bad", long, event("c"))
    path = tmp_path / "long.jsons"
    path.write_bytes(data)
    for cuts in ([], [10, 600_000], list(range(0, len(data), 155_555))):
        assert scan(path, cuts, 4096) == oracle.read(data)
    assert scan(path, [], 4096)[0] == {"2019-12-30": {"a", "b", "c", "long"}}


def test_an_endless_line_before_a_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_active_users, "MAX_LINE", 1 << 20)
    with pytest.raises(load_active_users.Unusable, match="a line of more than"):
        seek_line(io.BytesIO(b"{" + b"x" * (4 << 20)), 1000)


PLAIN = lines(event("a"), b"", b"bad", event("b"), b" ") + lines(event("c"))[:-1]
SHORT = b"\xef\xbb\xbf" + PLAIN
LONG = SAMPLE.read_bytes() * 14  # of two batches
SIZED: dict[str, tuple[bytes | Callable[[], bytes], int]] = {
    "cut at every byte": (PLAIN, 1),
    "cut within lines": (SHORT, 7),
    "cut into a few": (SHORT, 400),
    "not cut": (SHORT, 10**9),
    "of several batches": (LONG, 10**9),
    "of many ranges": (LONG, 10**6 + 7),
    "empty": (b"", 100),
    "gzip": (lambda: gzip.compress(LONG, 1), 1000),
    "gzip of several members": (gzip.compress(SHORT + b"\n") * 3, 1000),
    "gzip, short": (gzip.compress(SHORT), 7),
    "zstd": (lambda: zstd_compress(LONG, 1), 1000),
    "zstd, short": (zstd_compress(SHORT), 7),
}


@pytest.mark.parametrize("case", SIZED)
def test_the_bytes_of_all_ranges_add_up_to_the_file(loader: Loader, case: str) -> None:
    data, cut = SIZED[case]
    content = data if isinstance(data, bytes) else data()
    path = str(loader.directory / loader.file(content))
    scan = Scanner(make_rule(), make_dates())
    parts = split_source(path, cut)
    found = [batch.tally.bytes for part in parts for batch in scan(part)]
    assert (sum(found), min(found, default=0) >= 0) == (len(content), True)
    assert sum(part.size or 0 for part in parts) == len(content)


# -- JSON

# After the kinds of case in https://github.com/nst/JSONTestSuite.
VALUES = [b"-0", b"1E+2", b"0.1e-7", b"123.456", b"1e400", b"9" * 400, b'"\\u0000"']
VALUES += [b'"\\uD834\\uDD1E"', b'"\\/\\b\\f"', b"[]", b'{"":{"":[null,true,false]}}']
VALUES += [b'"\x7f"', '"\u2028é😀"'.encode(), b"[" * 400 + b"]" * 400, b' \t"" \r']
NO_VALUES = [b"01", b"-01", b"+1", b".5", b"1.", b"1e", b"1e+", b"0x1", b"-", b"--1"]
NO_VALUES += [b"1_0", b"NaN", b"-Infinity", b"1 2", b"[1,]", b"[,1]", b"[1", b"1]"]
NO_VALUES += [b'{"a":1,}', b'{"a"}', b"{a:1}", b'{"a":}', b"{1:1}", b"'x'", b'"']
NO_VALUES += [b'"\\x"', b'"\\u00zz"', b'"\\u12"', b'"\t"', b'"\0"', b'"\\"']
NO_VALUES += [b"tru", b"nul", b"True", b"/**/1", b"1//", b"\x0c1", b"\xa01", b""]
NO_VALUES += [b'"\\ud800"', b'"\\udc00\\ud800"', b'"\xff"', b'"\xc0\xaf"']
NO_VALUES += [b'"\xed\xa0\x80"', b"\xef\xbb\xbf1", b"\0"]


@pytest.mark.parametrize(
    ("values", "good"), [(VALUES, True), (NO_VALUES, False)], ids=["good", "bad"]
)
def test_json_values_are_accepted_and_others_refused(
    tmp_path: Path, values: list[bytes], good: bool
) -> None:
    """The values are in a field that nothing depends on, of an event that counts."""
    rows = []
    for number, value in enumerate(values):
        row = json.dumps(event(str(number), x=0)).encode()
        rows.append(row.replace(b'"x": 0', b'"x": ' + value))
    path = tmp_path / "kinds.jsons"
    path.write_bytes(b"\n".join(rows))
    users, tally, bad = scan(path, [], 1000)
    numbers = range(len(values))
    everybody = {"2019-12-30": {str(number) for number in numbers}}
    assert users == (everybody if good else {})
    assert list(bad) == ([] if good else [number + 1 for number in numbers])
    assert tally["lines"] == len(values)


# -- Which lines leave the fast path


class CountingMatcher(Matcher):
    """A matcher that counts its calls for many events and for single ones."""

    calls = 0
    evaluated = 0

    def find_active(self, events: Iterable[Event]) -> Findings:
        self.calls += 1
        return super().find_active(events)

    def evaluate(self, event: dict[str, Any]) -> Findings:
        self.evaluated += 1
        return super().evaluate(event)


def count_calls(
    path: Path, rule: oracle.Rule = oracle.DEFAULT, is_dense: bool = False
) -> CountingMatcher:
    """Scan a file, whose result must be the oracle's; return what it took."""
    matcher = CountingMatcher(make_rule(*rule))
    scanner = Scanner(matcher.rule, make_dates(), is_dense=is_dense)
    parts = [Range(str(path), 0, path.stat().st_size)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load_active_users, "matcher_for", lambda _: matcher)
        assert scan_ranges(parts, scanner) == oracle.read(path.read_bytes(), rule)
    return matcher


@pytest.mark.parametrize("odd", [{"user": "u" * 200}, {"time": -1}, {"msec": "-5"}])
def test_an_unusual_line_does_not_slow_the_others_down(
    tmp_path: Path, odd: dict[str, Any]
) -> None:
    """It alone is evaluated alone; the others are, but for its neighbours, in
    blocks."""
    fields: list[dict[str, Any]] = [{"user": f"user {n}"} for n in range(1000)]
    fields[500].update(odd)
    path = tmp_path / "events"
    path.write_bytes(lines(*(event(**some) for some in fields)))
    matcher = count_calls(path)
    assert matcher.evaluated == 1
    assert matcher.calls < 50


@pytest.mark.parametrize("end", [b"", b"\r", b" ", b"\t\r", b"\n"])
@pytest.mark.parametrize("null", ["event_params", "value", "user_pseudo_id"])
def test_nulls_and_white_space_stay_on_the_fast_path(
    tmp_path: Path, end: bytes, null: str
) -> None:
    """White space between lines only breaks the block into single lines."""
    fields: dict[str, Any] = {null: None}
    if null == "value":
        fields = {"event_params": event()["event_params"] + params(("other", None))}
    events = [event(**({"user_pseudo_id": f"u{n}"} | fields)) for n in range(20)]
    path = tmp_path / "events"
    path.write_bytes(lines(*events).replace(b"\n", end + b"\n"))
    matcher = count_calls(path)
    assert matcher.evaluated == 0
    assert (matcher.calls == 1) == (end in (b"", b"\r"))


@pytest.mark.parametrize("time", [0, 1, 86_400, 10**9, 10**10, 10**15, 10**16 - 1])
def test_times_since_1970_stay_on_the_fast_path(tmp_path: Path, time: int) -> None:
    path = tmp_path / "events"
    path.write_bytes(lines(*[event(time=time), event(time=str(time))] * 9))
    matcher = count_calls(path)
    assert (matcher.calls, matcher.evaluated) == (1, 0)


@pytest.mark.parametrize(
    "names", [["user_engagement"], ["x", "user_engagement"], ["*"]]
)
@pytest.mark.parametrize("is_dense", [False, True])
def test_other_events_stay_on_the_fast_path(
    tmp_path: Path, names: list[str], is_dense: bool
) -> None:
    """They hold what is searched for, and are in one block with those that count."""
    texts = ["user_engagement", "engagement_time_msec"]
    other = event("o", event_name="y", event_params=[{"key": "x_event"}], texts=texts)
    path = tmp_path / "events"
    path.write_bytes(lines(*(row for n in range(9) for row in (event(f"u{n}"), other))))
    rule = oracle.Rule(names=tuple(names))
    matcher = count_calls(path, rule, is_dense)
    assert oracle.read(path.read_bytes(), rule)[0] == {
        "2019-12-30": {f"u{n}" for n in range(9)}
    }
    assert (matcher.calls, matcher.evaluated) == (1, 0)


# -- Integers that are almost too long for Python

DIGIT_COUNTS = [18, 19, 20, 4298, 4299, 4300, 4301]
SIGNS = ["", "-"]


@pytest.mark.parametrize("is_text", [False, True], ids=["number", "text"])
@pytest.mark.parametrize("sign", SIGNS, ids=["positive", "negative"])
@pytest.mark.parametrize("count", DIGIT_COUNTS)
@pytest.mark.parametrize("field", ["msec", "time"])
def test_integers_of_very_many_digits(
    tmp_path: Path, field: str, count: int, sign: str, is_text: bool
) -> None:
    """Python converts 4,300 digits, and a sign. All judge them alike."""
    digits = sign + "9" * count
    row = lines(event("x"), event("a", **{field: "DIGITS"}), event("y"))
    quoted = f'"{digits}"' if is_text else digits
    data = row.replace(b'"DIGITS"', quoted.encode())
    path = tmp_path / "a.jsons"
    path.write_bytes(data)
    usual = oracle.read(data)
    for block_size in (100, 100_000):
        assert scan(path, [], block_size) == usual

    record = data.splitlines()[1]
    is_bad = 2 in usual[2]
    matcher = Matcher(make_rule())
    try:
        slow = matcher.evaluate(load_active_users.decode_record(record))
    except ValueError:
        slow = None
    assert (slow is None) == is_bad
    try:
        fast = matcher.find_active([load_active_users.EVENT_DECODER.decode(record)])
    except (ValueError, TypeError, OverflowError):
        return  # the loader then takes the other path
    assert fast == slow
    assert is_bad == (field == "time" or count > 4300)


def test_4300_digits_are_an_integer_and_4301_are_none(loader: Loader) -> None:
    """An engagement time of so many digits makes active; one digit more is bad."""
    for count, is_bad in ((4299, False), (4300, False), (4301, True)):
        for text in ("9" * count, f'"{"9" * count}"'):
            for sign in SIGNS:
                row = lines(event("a", msec="DIGITS"))
                text = text.replace("9", f"{sign}9", 1)
                name = loader.file(row.replace(b'"DIGITS"', text.encode()))
                options = ["--dry-run", "--max-bad-records", 1, "--format", "json"]
                report = json.loads(loader.run(*options, name).stdout)
                tallies = report["bad_records"], report["active_events"]
                assert tallies == (int(is_bad), int(not is_bad and not sign))


# -- By what lines are searched

NEEDLES = {
    "user_engagement": b"user_engagement",
    "level/completed": b"completed",
    "completed/level": b"completed",
    "first-öpen": b"first",
    "日本": b"event_name",
}


@pytest.mark.parametrize(("name", "needle"), NEEDLES.items(), ids=NEEDLES)
def test_the_longest_word_of_a_name_is_searched_for(name: str, needle: bytes) -> None:
    """It is in the fewest lines."""
    assert choose_needle(name) == needle
