"""Where events come from: files, pipes, compression, formats, files that change."""

import bz2
import gzip
import io
import json
import lzma
import os
import re
import subprocess
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import (
    NOT_AN_OBJECT,
    SAMPLE,
    SAMPLE_TABLE,
    Loader,
    date_count,
    event,
    lines,
    unread,
    wait_for,
    when_it_reads,
    zstd_compress,
)

from load_active_users import SNIFFED_BYTES, OpenRange, Unusable

SKIPPABLE = b"\x5a\x2a\x4d\x18\x04\x00\x00\x00size"


def through_a_slow_pipe(
    loader: Loader, data: bytes, first: int
) -> subprocess.CompletedProcess[bytes]:
    """Load data from standard input; the first read brings only a few bytes of it."""
    read, write = os.pipe()
    with loader.start("-", stdin=read) as process:
        os.close(read)
        os.write(write, data[:first])
        while unread(write):
            time.sleep(0.01)
        os.write(write, data[first:])
        os.close(write)
        out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


BOM = b"\xef\xbb\xbf"
A, B = lines(event("a")), lines(event("b"))
TWO_LINES = A + B
FILES = {
    "blank lines": b"\n \t\r\n" + TWO_LINES + b"\n\n",
    "CRLF": TWO_LINES.replace(b"\n", b"\r\n"),
    "a byte-order mark": BOM + TWO_LINES,
    "no final newline": TWO_LINES.rstrip(),
    "white space about events": TWO_LINES.replace(b"\n", b" \t\n "),
    "gzip": gzip.compress(TWO_LINES),
    "gzip, two members": gzip.compress(A) + gzip.compress(B),
    "a line in two members": gzip.compress(A[:50]) + gzip.compress(A[50:] + B),
    "gzip with a byte-order mark": gzip.compress(BOM + TWO_LINES),
    "zstd": zstd_compress(TWO_LINES),
    "zstd, a skippable frame first, as pzstd has it": (
        SKIPPABLE + zstd_compress(A) + SKIPPABLE + zstd_compress(B)
    ),
    "zstd, two frames": zstd_compress(A) + zstd_compress(B),
}


@pytest.mark.parametrize("data", FILES.values(), ids=FILES)
def test_plain_gzip_and_zstd_files(loader: Loader, data: bytes) -> None:
    loader.load(loader.file(data, "any-name.json"))
    assert loader.users() == ["a", "b"]
    assert loader.load("-", input=data)["dates"] == [date_count("2019-12-30", 2, 0)]


def test_an_empty_file_is_an_empty_load(loader: Loader) -> None:
    """It gives no warning: there may be a night without events."""
    empty = (b"", BOM, b"\n \r\n", gzip.compress(b""), zstd_compress(b""))
    for data in empty:
        assert loader.load(loader.file(data))["dates"] == []
    logged = loader.query("SELECT count(*) FROM load_log")
    assert (loader.table(), logged) == ({}, [(len(empty),)])


def test_several_files_are_one_load(loader: Loader) -> None:
    a = loader.file(lines(event("a"), event("b")), "a")
    b = loader.file(lines(event("b"), event("c")), "b")
    report = loader.load(a, "-", b, a, "-", input=lines(event("d")))
    assert report["dates"] == [date_count("2019-12-30", 4, 4)]
    assert report["lines"] == 7  # at its end, standard input holds no more
    assert loader.query("SELECT sources FROM load_log") == [('["a","-","b","a","-"]',)]


def test_a_file_name_that_is_not_utf_8(loader: Loader) -> None:
    name = os.fsdecode(b"\xff.jsons")
    loader.file(lines(event("a")) + b"bad\n", name)
    done = loader.run("--max-bad-records", 1, name)
    assert done.returncode == 0
    assert done.stderr.decode() == f"\\udcff.jsons:2: {NOT_AN_OBJECT}\n"
    assert loader.query("SELECT sources FROM load_log") == [('["\\\\xff.jsons"]',)]


def test_a_working_directory_that_was_deleted(loader: Loader) -> None:
    """It does not matter where all paths are absolute."""
    (loader.directory / "gone").mkdir()
    loader.file(SAMPLE.read_bytes())
    paths = ["--db", loader.db, loader.directory / "events.jsons"]
    script = 'cd gone && rmdir ../gone && exec "$@"'
    shell = ["sh", "-c", script, "sh", *loader.command("-q", *paths)]
    done = subprocess.run(shell, cwd=loader.directory, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert loader.table() == SAMPLE_TABLE


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("source", ["plain", "gzip", "zstd", "pipe"])
def test_the_log_has_the_bytes_that_were_read(
    loader: Loader, source: str, workers: int
) -> None:
    content = SAMPLE.read_bytes() * 14 + b"\n"  # two batches
    if source == "gzip":
        content = gzip.compress(content, 1)
    elif source == "zstd":
        content = zstd_compress(content, 1)
    if source == "pipe":
        loader.load("--workers", workers, "-", input=content)
    else:  # large enough for two processes
        names = [loader.file(content)] * 2
        loader.load("--workers", workers, *names, process=True)
    times = 1 if source == "pipe" else 2
    expected = [(14_001 * times, times * len(content))]
    assert loader.query("SELECT lines, bytes FROM load_log") == expected


# -- Pipes


@pytest.mark.parametrize("compress", [bytes, gzip.compress, zstd_compress])
def test_a_pipe_that_brings_its_first_byte_alone(loader: Loader, compress: Any) -> None:
    data = compress(lines(event("a"), event("b")))
    done = through_a_slow_pipe(loader, data, 1)
    assert (done.returncode, done.stderr) == (0, b"")
    assert loader.table() == {"2019-12-30": 2}


def test_a_named_pipe(loader: Loader) -> None:
    os.mkfifo(loader.directory / "pipe")
    with loader.start("--format", "json", "pipe") as process:
        (loader.directory / "pipe").write_bytes(SAMPLE.read_bytes())
        out, err = process.communicate(timeout=60)
    assert (process.returncode, json.loads(out)["lines"], err) == (0, 1000, b"")
    assert loader.table() == SAMPLE_TABLE


def test_standard_input_that_does_not_block(loader: Loader) -> None:
    """Some programs leave it so for those that they start: the load waits for it."""
    read_end, write_end = os.pipe()
    os.set_blocking(read_end, False)
    with open(read_end) as stdin, loader.start("-q", "-", stdin=stdin) as process:
        with open(write_end, "wb") as file:
            for user in "ab":
                time.sleep(0.2)
                file.write(lines(event(user)))
                file.flush()
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (0, b"", b"")
    assert loader.table() == {"2019-12-30": 2}


# -- Input that cannot be read

PACKED = gzip.compress(SAMPLE.read_bytes())
NO_FILE = "No such file or directory"
DAMAGED = "the compressed data is damaged or cut off"
UNREADABLE = {
    "missing": (None, NO_FILE),
    "gzip cut off": (PACKED[:-100], DAMAGED),
    "gzip without its end": (gzip.compress(A)[:-4], DAMAGED),
    "gzip with a wrong checksum": (gzip.compress(A)[:-8] + b"12345678", DAMAGED),
    "gzip damaged in the middle": (
        PACKED[:50_000] + b"\xff" * 100 + PACKED[50_100:],
        DAMAGED,
    ),
    "gzip and then something else": (gzip.compress(A) + b"hello", DAMAGED),
    "the second member cut off": (
        gzip.compress(A) + gzip.compress(A)[:20],
        DAMAGED,
    ),
    "zstd and then something else": (zstd_compress(A) + b"hello", DAMAGED),
    "zstd cut off": (zstd_compress(SAMPLE.read_bytes())[:-100], DAMAGED),
}


@pytest.mark.parametrize(("content", "reason"), UNREADABLE.values(), ids=UNREADABLE)
def test_input_that_cannot_be_read(
    loader: Loader, content: bytes | None, reason: str
) -> None:
    loader.load(loader.file(lines(event("before"))))
    if content is not None:
        loader.file(content, "x")
    good = loader.file(A, "good")
    (message,) = loader.refuse(good, "x", good).splitlines()
    assert re.match(rf"Error: x(:\d+)?: {reason}", message)
    assert message.endswith("; fetch the file again") == (reason == DAMAGED)
    if content is not None:
        (message,) = loader.refuse("-", input=content).splitlines()
        assert re.match(rf"Error: -(:\d+)?: {reason}.*; fetch the file again$", message)


def test_a_directory(loader: Loader) -> None:
    (loader.directory / "shards").mkdir()
    said = "Error: shards: Is a directory; name the files in it\n"
    assert loader.refuse("shards") == said


# -- Other formats

OBJECTS = [event("a"), event("b")]
AS_JSON = "export it as newline-delimited JSON"


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("events.jsons", TWO_LINES)
    return file.getvalue()


def tarred(mode: Any) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:
        member = tarfile.TarInfo("events.jsons")
        member.size = len(TWO_LINES)
        archive.addfile(member, io.BytesIO(TWO_LINES))
    return file.getvalue()


ARRAY = "is a JSON array; make it one event per line: jq -c '.[]'"
PRETTY = "is pretty-printed JSON; make it one event per line: jq -c ."
UTF_16 = "is UTF-16; make it UTF-8: iconv -f UTF-16 -t UTF-8"
TWICE = "is compressed twice, or a compressed live pipe; "
TWICE += "decompress it first: zcat, or zstdcat"
TAR = "is a tar archive; load the files in it: tar -xO"
HTML = f"is HTML or XML; {AS_JSON}"
OTHER_FORMATS = {
    "a JSON array": (json.dumps(OBJECTS).encode(), ARRAY),
    "a JSON array of many lines": (
        b"[\n" + TWO_LINES.replace(b"}\n{", b"},\n{") + b"]\n",
        ARRAY,
    ),
    "a JSON array after blank lines": (b"\xef\xbb\xbf\r\n\n [{}]", ARRAY),
    "a compressed JSON array": (gzip.compress(json.dumps(OBJECTS).encode()), ARRAY),
    "pretty-printed": (json.dumps(event(), indent=2).encode(), PRETTY),
    "pretty-printed with CRLF": (b'{\r\n\t"a": 1\r\n}\r\n', PRETTY),
    "Parquet": (b"PAR1\x15\x04\x15\x10", f"is a Parquet file; {AS_JSON}"),
    "Avro": (b"Obj\x01\x04\x14avro.codec", f"is an Avro file; {AS_JSON}"),
    "ORC": (b"ORC\x08\x03\x10", f"is an ORC file; {AS_JSON}"),
    "zip": (zipped(), "is a zip archive; decompress it first: unzip -p"),
    "xz": (lzma.compress(TWO_LINES), "is xz-compressed; decompress it first: xzcat"),
    "bzip2": (
        bz2.compress(TWO_LINES),
        "is bzip2-compressed; decompress it first: bzcat",
    ),
    "lz4": (
        b"\x04\x22\x4d\x18\x64\x40",
        "is lz4-compressed; decompress it first: lz4cat",
    ),
    "UTF-16, little end first": (
        b"\xff\xfe" + TWO_LINES.decode().encode("utf-16-le"),
        UTF_16,
    ),
    "UTF-16, big end first": (
        b"\xfe\xff" + TWO_LINES.decode().encode("utf-16-be"),
        UTF_16,
    ),
    "UTF-16 without a mark, little end first": (
        TWO_LINES.decode().encode("utf-16-le"),
        UTF_16,
    ),
    "UTF-16 without a mark, big end first": (
        TWO_LINES.decode().encode("utf-16-be"),
        UTF_16,
    ),
    "HTML": (b"<!DOCTYPE html>\n<html><title>Sign in</title></html>", HTML),
    "XML": (b"\n<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", HTML),
    "gzip twice": (gzip.compress(gzip.compress(TWO_LINES)), TWICE),
    "gzip of zstd": (gzip.compress(zstd_compress(TWO_LINES)), TWICE),
    "tar": (tarred("w:"), TAR),
    "tar.gz": (tarred("w:gz"), TAR),
}


@pytest.mark.parametrize(("content", "what"), OTHER_FORMATS.values(), ids=OTHER_FORMATS)
def test_another_format_is_named(loader: Loader, content: bytes, what: str) -> None:
    name = loader.file(content)
    assert loader.refuse(name) == f"Error: {name}:1: {what}\n"
    assert loader.refuse("--max-bad-records", 100, name) == f"Error: {name}:1: {what}\n"
    assert loader.refuse("-", input=content) == f"Error: -:1: {what}\n"
    assert not loader.db.exists()


@pytest.mark.parametrize(
    ("content", "first", "what"),
    [
        (b"PAR1\x15\x04", 1, OTHER_FORMATS["Parquet"][1]),
        (b"\n[{}]", 1, ARRAY),
        (b'{\n"a": 1\n}\n', 2, PRETTY),
    ],
    ids=["Parquet", "JSON array", "pretty-printed"],
)
def test_another_format_through_a_slow_pipe(
    loader: Loader, content: bytes, first: int, what: str
) -> None:
    done = through_a_slow_pipe(loader, content, first)
    assert (done.returncode, done.stderr.decode()) == (1, f"Error: -:1: {what}\n")


def test_another_format_is_refused_before_the_pipe_ends(loader: Loader) -> None:
    """The bytes that tell it are enough: the load does not wait for one more."""
    with loader.start("-") as process:
        assert process.stdin
        process.stdin.write(b"PAR1".ljust(SNIFFED_BYTES))
        process.stdin.flush()
        assert wait_for(lambda: process.poll() is not None)
        out, err = process.communicate()
    said = f"Error: -:1: {OTHER_FORMATS['Parquet'][1]}\n"
    assert (process.returncode, out, err.decode()) == (1, b"", said)


# -- Files that change while they are read


def change_meanwhile(
    loader: Loader, change: Callable[[], object]
) -> tuple[int, bytes, str]:
    """Load standard input and then a file, which changes after it has been opened."""
    with loader.start("--format", "json", "-", "events.jsons") as process:
        when_it_reads(process)  # when it has looked at all files
        change()
        out, err = process.communicate(timeout=30)
    return process.returncode, out, err.decode()


def test_a_file_that_shrinks(loader: Loader) -> None:
    path = loader.directory / loader.file(lines(event("a"), event("b")))
    what = "the file was cut short while it was read; load it again when it is whole"
    done = change_meanwhile(loader, lambda: os.truncate(path, 300))
    assert done == (1, b"", f"Error: events.jsons:2: {what}\n")
    assert not loader.db.exists()


def test_a_file_that_is_replaced(loader: Loader) -> None:
    data = lines(event("a")) * 2
    names = ("events.jsons", "other")
    path, other = (loader.directory / loader.file(data, name) for name in names)
    what = "the file was replaced while it was read; load it again"
    done = change_meanwhile(loader, lambda: other.rename(path))
    assert done == (1, b"", f"Error: events.jsons:1: {what}\n")
    assert not loader.db.exists()


def test_a_file_that_grows(loader: Loader) -> None:
    """The load has what was there at the start, and the rest of its last line."""
    whole = lines(event("a"), event("b"), event("c"))
    path = loader.directory / loader.file(whole[: len(A) + 100])
    status, out, err = change_meanwhile(loader, lambda: path.write_bytes(whole))
    assert (status, json.loads(out)["lines"], err) == (0, 3, "")
    assert loader.users() == ["a", "b", "first"]


def test_a_file_that_is_cut_short_in_the_middle_of_a_range(tmp_path: Path) -> None:
    path = tmp_path / "shrinking.jsons"
    path.write_bytes(lines(event()) * 100)
    size = path.stat().st_size
    with path.open("r+b") as file:
        scanning = OpenRange(file, size, file, True).read_blocks(1000)
        next(scanning)
        file.truncate(5000)
        why = (
            "^the file was cut short while it was read; load it again when it is whole"
        )
        with pytest.raises(Unusable, match=why):
            list(scanning)


def test_lines_that_are_appended_while_a_range_is_read(tmp_path: Path) -> None:
    """They are no lines of its range, nor is a line that had not ended cut in two."""
    path = tmp_path / "growing.jsons"
    path.write_bytes(b'{"a":1}\n{"b":')
    with path.open("r+b") as file:
        size = path.stat().st_size
        scanning = OpenRange(file, size, file, True).read_blocks(8)
        found = [bytes(buffer[:length]) for buffer, length in [next(scanning)]]
        with path.open("ab") as other:
            other.write(b'2}\n{"c":3}\n' * 9)
        found += [bytes(buffer[:length]) for buffer, length in scanning]
    assert found == [b'{"a":1}\n', b'{"b":2}\n']
