"""Bad records: reported, counted, tolerated by --max-bad-records, kept by --rejects."""

import gzip
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from helpers import (
    AS_ROOT,
    NOON,
    NOT_AN_OBJECT,
    SAMPLE,
    SAMPLE_LINES,
    SAMPLE_TABLE,
    WITHOUT_CAPABILITIES,
    Loader,
    event,
    lines,
    peak_memory,
)
from records import BAD_RECORDS, malformed

GOOD = lines(event("a"))
REFUSED = "Error: bad records: {}, more than --max-bad-records 0; nothing was loaded\n"


@pytest.mark.parametrize(
    ("record", "reason"),
    [row[1:] for row in BAD_RECORDS],
    ids=[row[0] for row in BAD_RECORDS],
)
def test_a_bad_record(loader: Loader, record: bytes, reason: str) -> None:
    name = loader.file(GOOD + b"\n" + record + b"\n" + lines(event("b")))
    first, last = loader.refuse(name).splitlines(keepends=True)
    assert first == f"{name}:3: {reason}\n"
    assert last == REFUSED.format(1)
    assert not loader.db.exists()

    done = loader.run(
        "--max-bad-records", 1, "--rejects", "rejects", "--format", "json", name
    )
    assert (done.returncode, done.stderr.decode()) == (0, first)
    assert json.loads(done.stdout)["bad_records"] == 1
    assert loader.table() == {"2019-12-30": 2}
    assert (loader.directory / "rejects").read_bytes() == record + b"\n"


NOT_BAD = {
    "another event that is broken inside": b'{"event_name":"x",}',
    "an escape that spells no letter of the name": b'{"a":"\\u003c",}',
    "an escaped NUL": b'{"a":"\\u0000",}',
    "a user with a NUL in another event": lines(event("\0", event_name="x")).strip(),
    "a long user in another event": lines(event("x" * 513, event_name="x")).strip(),
}


@pytest.mark.parametrize("record", NOT_BAD.values(), ids=NOT_BAD)
def test_other_events_are_not_decoded(loader: Loader, record: bytes) -> None:
    assert loader.load(loader.file(GOOD + record))["bad_records"] == 0


def test_validate_decodes_every_line(loader: Loader) -> None:
    name = loader.file(GOOD + b'{"event_name":"x",}')
    what = malformed("trailing comma in object (byte 18)")
    said = f"{name}:2: {what}\n{REFUSED.format(1)}"
    assert loader.refuse("--validate", name) == said
    report = loader.load("--validate", SAMPLE)
    assert (report["engagement_events"], report["bad_records"]) == (75, 0)


def test_every_line_is_good_or_bad_or_blank(loader: Loader) -> None:
    good, timeless = (lines(event("a", time)).strip() for time in (NOON, None))
    rows = [b"", b" ", b"x", b'{"a":}', b'{"a":1}', b"{", good, timeless]
    chosen = random.Random(5).choices(rows, k=5000)
    name = loader.file(b"\n".join(chosen))
    options = ["--validate", "--max-bad-records", 5000, "--rejects", "rejects"]
    done = loader.run(*options, "--format", "json", name)
    report = json.loads(done.stdout)
    rejects = (loader.directory / "rejects").read_bytes().splitlines()
    ((blank, logged),) = loader.query("SELECT blank_lines, bad_records FROM load_log")
    assert rejects == [
        row for row in chosen if row in (b"x", b'{"a":}', b"{", timeless)
    ]
    assert report["bad_records"] == logged == len(rejects)
    decoded = chosen.count(good) + chosen.count(b'{"a":1}')
    assert decoded + logged + blank == report["lines"] == 5000


# -- Messages


def test_the_first_twenty_bad_records_are_shown(loader: Loader) -> None:
    a = loader.file(b"x\n" * 15, "a")
    b = loader.file(gzip.compress(b"\n{}\n" + b"y\n" * 15), "b")
    places = [f"a:{n}" for n in range(1, 16)] + [f"b:{n}" for n in range(3, 8)]
    assert loader.refuse(a, b, "--rejects", "rejects") == (
        "".join(f"{place}: {NOT_AN_OBJECT}\n" for place in places)
        + "and 10 more bad records\n"
        + REFUSED.format(30)
    )
    assert (loader.directory / "rejects").read_bytes() == b"x\n" * 15 + b"y\n" * 15


@pytest.mark.parametrize(
    ("number", "more"), [(20, ""), (21, "and 1 more bad record\n")]
)
def test_one_bad_record_more_than_are_shown(
    loader: Loader, number: int, more: str
) -> None:
    name = loader.file(b"x\n" * number)
    said = loader.refuse(name)
    first = "".join(f"{name}:{n}: {NOT_AN_OBJECT}\n" for n in range(1, 21))
    assert said == first + more + REFUSED.format(number)


def test_control_characters_are_escaped(loader: Loader) -> None:
    name = loader.file(lines(event(time="\x1b[31m\x07\u202e")), "evil\x1b]0;\n.jsons")
    message = loader.refuse(name)
    where = "evil\\x1b]0;\\n.jsons:1: event_timestamp is not an integer: "
    assert message == where + '"\\u001b[31m\\u0007\\u202e"\n' + REFUSED.format(1)
    assert all(c.isprintable() or c == "\n" for c in message)


def test_no_message_steers_the_terminal(loader: Loader) -> None:
    assert "no\\x1b]0;such" in loader.refuse("no\x1b]0;such")
    name = loader.file(lines(event()), "evil\x1b]0;")
    message = loader.refuse("--db", name, name, status=2)
    assert "evil\\x1b]0;" in message
    assert "\x1b" not in message


# -- --rejects


def test_rejects_into_a_pipe(loader: Loader) -> None:
    os.mkfifo(loader.directory / "rejects")
    reader = os.open(loader.directory / "rejects", os.O_RDONLY | os.O_NONBLOCK)
    options = ["-q", "--rejects", "rejects", "--max-bad-records", 1]
    name = loader.file(b"bad\n" + GOOD)
    done = loader.run(*options, name)
    what = f"{name}:1: {NOT_AN_OBJECT}\n".encode()
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", what)
    assert os.read(reader, 100) == b"bad\n"
    os.close(reader)


def test_repaired_rejects_complete_the_counts(loader: Loader) -> None:
    rows = SAMPLE_LINES.copy()
    rows[::3] = [row.replace(b"{", b"(", 1) for row in rows[::3]]
    options = ["--max-bad-records", 1000, "--rejects", "rejects"]
    assert loader.run(*options, loader.file(b"".join(rows))).returncode == 0
    lost = loader.table()
    rejects = (loader.directory / "rejects").read_bytes()
    assert rejects == b"".join(rows[::3])
    loader.load(loader.file(rejects.replace(b"(", b"{"), "repaired"))
    assert lost != loader.table() == SAMPLE_TABLE


def test_rejects_are_appended_and_never_emptied(loader: Loader) -> None:
    """That holds for loads that succeed and that are refused."""
    rejects = loader.directory / "rejects"
    steps = [
        (b"x\n", 1, 0, b"x\n"),
        (GOOD, 0, 0, b"x\n"),
        (GOOD + b"y\r\n \nz", 0, 1, b"x\ny\r\nz\n"),
        (b"x\n", 1, 0, b"x\ny\r\nz\nx\n"),
    ]
    for data, most, status, content in steps:
        options = ["--rejects", rejects, "--max-bad-records", most]
        done = loader.run(*options, loader.file(data))
        assert (done.returncode, rejects.read_bytes()) == (status, content)
    rejects.write_bytes(b"by hand")
    loader.run("--rejects", rejects, loader.file(b"x\n"))
    assert rejects.read_bytes() == b"by hand\nx\n"


def test_rejects_are_appended_after_an_unfinished_line(loader: Loader) -> None:
    """A line that has not ended is ended first, even by a load without bad records."""
    bad = loader.file(b"bad\nworse\r\n", "bad")
    rejects = loader.directory / loader.file(b"an earlier one", "rejects")
    good = ["--rejects", "rejects", SAMPLE]
    loader.load(*good)
    assert rejects.read_bytes() == b"an earlier one\n"
    tries: list[list[object]] = [["--max-bad-records", 2], [], ["--dry-run"]]
    for number, args in enumerate(tries, 1):
        done = loader.run("-q", *args, "--rejects", "rejects", bad)
        assert done.returncode == (0 if number == 1 else 1)
        expected = b"an earlier one\n" + b"bad\nworse\r\n" * min(number, 2)
        assert rejects.read_bytes() == expected
    loader.load(*good)
    assert rejects.read_bytes() == expected


@AS_ROOT
def test_a_full_disk_for_the_rejects(loader: Loader, disk: Path) -> None:
    bad = loader.file(b"x" * 2_000_000, "bad")
    full = "No space left on device; free some disk space and load again"
    for path in (disk / "rejects", Path("/dev/full")):
        assert loader.refuse("--rejects", path, "--max-bad-records", 9, bad) == (
            f"bad:1: {NOT_AN_OBJECT}\nError: {path}: {full}\n"
        )
    assert not loader.db.exists()


def test_twenty_bad_records_are_all_that_there_are(loader: Loader) -> None:
    """Nothing is said of others."""
    places = [f"bad:{n}" for n in range(1, 21)]
    said = "".join(f"{place}: {NOT_AN_OBJECT}\n" for place in places)
    assert loader.refuse(loader.file(b"x\n" * 20, "bad")) == said + REFUSED.format(20)


@AS_ROOT
def test_rejects_through_a_pipe_in_a_directory_that_cannot_be_written(
    loader: Loader,
) -> None:
    """Only a new file, or a picture, needs a directory that can be written."""
    pipes = loader.directory / "pipes"
    pipes.mkdir()
    os.mkfifo(pipes / "rejects")
    pipes.chmod(0o555)
    with open(os.open(pipes / "rejects", os.O_RDONLY | os.O_NONBLOCK), "rb") as reader:
        args = ["--max-bad-records", 1, "--rejects", "pipes/rejects"]
        bad = loader.file(b"x\n" + GOOD, "bad")
        done = loader.run_under(WITHOUT_CAPABILITIES, "-q", *args, bad)
        assert done == (0, b"", f"bad:1: {NOT_AN_OBJECT}\n")
        assert reader.read() == b"x\n"


# -- Line numbers in the middle of a file


IN_SMALL_PARTS: dict[str, object] = {
    "BLOCK_BYTES": 500,
    "BATCH_BYTES": 2000,
    "RANGE_BYTES": 5000,
    "POOL_MIN_BYTES": 1,
}
NUMBERED = [b'{"x":"%080d"}' % number for number in range(1, 501)]
NUMBERED[122:500:123] = [b"bad"] * 4  # lines 123, 246, 369 and 492


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("kind", ["ranges", "one range", "a pipe"])
def test_a_line_number_counts_the_batches_and_ranges_before(
    loader: Loader, kind: str, workers: int
) -> None:
    """After one file, the next begins with 1."""
    data = lines(*NUMBERED)
    packed = gzip.compress(data) if kind == "one range" else data
    name = loader.file(packed)
    other = loader.with_constants(**IN_SMALL_PARTS)
    names = [name, "-"] if kind == "a pipe" else [name, name]
    done = other.run("--workers", workers, *names, input=data)
    places = [f"{each}:{n}" for each in names for n in (123, 246, 369, 492)]
    said = "".join(f"{place}: {NOT_AN_OBJECT}\n" for place in places)
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.decode() == said + REFUSED.format(8)


def test_twenty_are_reported_of_many_batches(loader: Loader) -> None:
    name = loader.file(b"bad\n" * 30)
    done = loader.with_constants(BLOCK_BYTES=8, BATCH_BYTES=8, RANGE_BYTES=40).run(name)
    said = [f"{name}:{number}: {NOT_AN_OBJECT}" for number in range(1, 21)]
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.decode().splitlines() == [
        *said,
        "and 10 more bad records",
        "Error: bad records: 30, more than --max-bad-records 0; nothing was loaded",
    ]


LATE_ERRORS = {
    # how it comes, the program's constants, the place that is named
    "in one range": (gzip.compress, {}, "x:501"),
    "in a later range": (bytes, {"RANGE_BYTES": 5000}, "x"),
    "in the first range": (bytes, {"RANGE_BYTES": 10**9}, "x:501"),
}


@pytest.mark.parametrize(
    ("compress", "constants", "place"), LATE_ERRORS.values(), ids=LATE_ERRORS
)
def test_a_line_that_cannot_be_read_has_a_number_if_it_is_known(
    loader: Loader, compress: Any, constants: dict[str, object], place: str
) -> None:
    """It lies behind some batches. How many lines other ranges have is not known."""
    data = lines(*NUMBERED[:100] * 5)  # about six lines are a block
    name = loader.file(compress(data + b'{"x":"' + b"x" * 3_000_000 + b'"}'), "x")
    sizes = {"BLOCK_BYTES": 500, "BATCH_BYTES": 2000, "MAX_LINE": 1 << 20}
    done = loader.with_constants(**sizes, **constants).run(name)
    what = "a line of more than 1 MiB; one event per line is expected"
    said = f"Error: {place}: {what}\n"
    assert (done.returncode, done.stdout, done.stderr.decode()) == (1, b"", said)


# -- Long values in messages

LONG_VALUE = "x" * 1_000_000
LONG_VALUES = {
    "event_timestamp is not an integer": event(time=LONG_VALUE),
    "engagement_time_msec is not an integer": event(msec=LONG_VALUE),
    "event_params must be a list": event(event_params=LONG_VALUE),
    "event_params[0] must be an object": event(event_params=[LONG_VALUE]),
    "event_params[0].value must be an object": event(
        event_params=[{"key": "a", "value": LONG_VALUE}]
    ),
    "event_params[1].key must be a string": event(key=[LONG_VALUE]),
    "user_pseudo_id must be a string": event([LONG_VALUE]),
}


@pytest.mark.parametrize("what", LONG_VALUES)
def test_a_long_value_is_cut_in_the_message(loader: Loader, what: str) -> None:
    """Of a value that is no user, sixty characters are shown."""
    name = loader.file(GOOD + lines(LONG_VALUES[what]))
    value = '["' if "must be a string" in what else '"'
    shown = f"{value}{LONG_VALUE}"[:60]
    assert loader.refuse(name) == f"{name}:2: {what}: {shown}\n{REFUSED.format(1)}"


def test_a_long_time_beyond_the_calendar_is_cut_in_the_message(loader: Loader) -> None:
    name = loader.file(GOOD + lines(event(time="9" * 4000)))
    what = f"event_timestamp is beyond the calendar: {'9' * 60}"
    assert loader.refuse(name) == f"{name}:2: {what}\n{REFUSED.format(1)}"


# -- Several objects on a line

ONE, TWO = lines(event("a")).strip(), lines(event("b")).strip()
SEVERAL = {
    "side by side": ONE + TWO,
    "a blank between them": ONE + b" " + TWO,
    "a comma between them": ONE + b"," + TWO,
    "lines that end in CR alone": b"\r".join([ONE, TWO, ONE]),
    "an engagement event after another": b'{"a":1} ' + ONE,
    "no engagement event": b'{"a":1}{"b":2}',
    "no engagement event, CR": b'{"a":1}\r{"b":2}\r{"c":3}',
}


@pytest.mark.parametrize("record", SEVERAL.values(), ids=SEVERAL)
def test_several_objects_on_a_line(loader: Loader, record: bytes) -> None:
    """The reason says what is wrong before it says how the decoder puts it."""
    for data in (record, GOOD + record + b"\n" + GOOD, GOOD * 40 + record):
        said = loader.refuse("--validate", loader.file(data)).splitlines()
        line = 1 + data[: data.index(record)].count(b"\n")
        assert said[0].startswith(f"events.jsons:{line}: {NOT_AN_OBJECT}"), said
        assert said[1:] == [REFUSED.format(1).strip()]


# -- Very many bad records


@pytest.mark.begin_early
@pytest.mark.parametrize("workers", [1, 2])
def test_millions_of_bad_records_in_bounded_memory(
    loader: Loader, workers: int
) -> None:
    """A file of 6 MB of short lines takes no more memory, whoever scans it."""
    bad = b"bad\n" * 1_500_000
    name = loader.file(bad)
    command = loader.with_constants(POOL_MIN_BYTES=0, RANGE_BYTES=3 << 20)
    options = ["--workers", workers, "--max-bad-records", 10**9, "--format", "json"]
    status, output, megabytes = peak_memory(
        command, *options, "--rejects", "rejects", name
    )
    report = json.loads(output.splitlines()[-1])
    assert (status, report["bad_records"]) == (0, 1_500_000)
    assert (loader.directory / "rejects").read_bytes() == bad
    assert megabytes < 180
