"""What a load prints: the report as a table, JSON or CSV, and the progress bar."""

import errno
import gzip
import os
import pty
import re
import select
import shlex
import subprocess
import termios
from pathlib import Path

import pytest
from helpers import (
    NOT_AN_OBJECT,
    SAMPLE,
    SAMPLE_TABLE,
    Loader,
    event,
    lines,
    readme_blocks,
)

from load_active_users import Changes, DateCount, Report, Tally, format_table


def test_the_report_as_a_table(loader: Loader) -> None:
    """The README shows it."""
    done = loader.run(SAMPLE, env={"COLUMNS": "80"})
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode() == readme_blocks("text")[0]


def test_the_report_as_csv(loader: Loader) -> None:
    done = loader.run("--format", "csv", SAMPLE)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode().splitlines() == [
        "date,active_user_count,added,removed",
        "2019-12-29,11,11,0",
        "2019-12-30,31,31,0",
        "2019-12-31,22,22,0",
    ]


def test_quiet(loader: Loader) -> None:
    done = loader.run("-q", SAMPLE)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert loader.table() == SAMPLE_TABLE


def test_replace_as_csv_and_as_a_table(loader: Loader) -> None:
    loader.load(loader.file(lines(event("a"), event("b"))))
    args = ["--replace", "--dates", "2019-12-30"]
    done = loader.run("--format", "csv", *args, loader.file(lines(event("c"))))
    assert done.stdout == b"date,active_user_count,added,removed\n2019-12-30,1,1,2\n"
    name = loader.file(lines(event("a"), event("d")))
    done = loader.run(*args, name, env={"COLUMNS": "80"})
    assert done.stdout.decode() == (
        "date        active_user_count  added  removed\n"
        "2019-12-30                  2      2        1  "
        f"{33 * '█'}\n"
        "2 lines → 2 engagement events → 2 active → 2 user-days (2 new, 1 removed)\n"
    )


def test_user_days_are_those_of_this_load(loader: Loader) -> None:
    loader.load(SAMPLE)
    new = lines(event("new"), event("new"), event("new2"))
    again = loader.file(new + SAMPLE.read_bytes())
    replace = ["--replace", "--dates", "2019-12-29..2019-12-31"]

    def last_line(*args: object) -> str:
        return loader.run(*args).stdout.decode().splitlines()[-1]

    steps = "1003 lines → 78 engagement events → 67 active → 66 user-days"
    assert last_line(again) == f"{steps} (2 new)"
    assert last_line(*replace, again) == f"{steps} (0 new)"
    steps = "1000 lines → 75 engagement events → 64 active → 64 user-days"
    assert last_line(*replace, SAMPLE) == f"{steps} (0 new, 2 removed)"


def test_an_encoding_without_bars(loader: Loader) -> None:
    env = {"PYTHONIOENCODING": "latin-1", "COLUMNS": "80"}
    done = loader.run(SAMPLE, env=env, process=True)
    assert (done.returncode, done.stderr) == (0, b"")
    expected = readme_blocks("text")[0].replace("█", "?").replace("→", "?")
    assert done.stdout.decode() == expected


def a_report(replace: bool, *counts: DateCount, **tally: int) -> Report:
    by_date = {count.date: count for count in counts}
    tallies = Tally(**tally)
    return Report(loads=1, tally=tallies, counts=by_date, shows_removed=replace)


def plain_table(report: Report) -> list[str]:
    return re.sub(r"\x1b\[\d*m", "", format_table(report)).splitlines()


def test_bars_of_every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    counts = [
        DateCount("2020-01-01", 10**9, Changes(0, 0, 3)),
        DateCount("2020-01-02", 1, Changes(1, 0, 1)),
        DateCount("2020-01-03", 0, Changes(0, 2, 0)),
    ]
    tallies = {"lines": 9, "engagement_events": 8, "active_events": 7}
    assert plain_table(a_report(False, *counts[:2], **tallies)) == [
        "date        active_user_count  added",
        "2020-01-01         1000000000      0  " + 42 * "█",
        "2020-01-02                  1      1  █",
        "9 lines → 8 engagement events → 7 active → 4 user-days (1 new)",
    ]
    assert plain_table(a_report(True, *counts, **tallies)) == [
        "date        active_user_count  added  removed",
        "2020-01-01         1000000000      0        0  " + 33 * "█",
        "2020-01-02                  1      1        0  █",
        "2020-01-03                  0      0        2",
        "9 lines → 8 engagement events → 7 active → 4 user-days (1 new, 2 removed)",
    ]


STEPS = ["lines", "engagement_events", "active_events"]
STEPS += ["anonymous_events", "out_of_range_events", "bad_records"]
SAID = {
    0: "0 lines → 0 engagement events → 0 active → 0 user-days (0 new)",
    1: "1 line → 1 engagement event → 1 active → 0 user-days (0 new); "
    "1 anonymous event; 1 out of range event; 1 bad record; "
    "1 user left out of final dates",
    2: "2 lines → 2 engagement events → 2 active → 0 user-days (0 new); "
    "2 anonymous events; 2 out of range events; 2 bad records; "
    "2 users left out of final dates",
}


@pytest.mark.parametrize("number", SAID)
def test_the_line_of_tallies(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It shows as many of each as there are, and leaves out remarks on none."""
    monkeypatch.setenv("COLUMNS", "500")
    counts = [DateCount("2020-01-01", 5, Changes(left_out=number))] * bool(number)
    report = a_report(False, *counts, **dict.fromkeys(STEPS, number))
    assert plain_table(report)[-1] == SAID[number]


# -- On a terminal


def on_a_terminal(
    loader: Loader,
    *args: object,
    columns: int = 100,
    env: dict[str, str] | None = None,
    number: int = 2,
) -> tuple[int, str, str]:
    """Return the exit status of a command, and what it printed on terminals.

    Standard output is a terminal, and standard error is another, if there are two.
    """
    terminals = [pty.openpty() for _ in range(number)]
    unset = ("COLUMNS", "NO_COLOR")
    environment = {k: v for k, v in os.environ.items() if k not in unset}
    for _, terminal in terminals:
        termios.tcsetwinsize(terminal, (24, columns))
    with loader.start(
        *args,
        env={**environment, "TERM": "xterm", **(env or {})},
        stdin=subprocess.DEVNULL,
        stdout=terminals[0][1],
        stderr=terminals[-1][1],
    ) as process:
        for _, terminal in terminals:
            os.close(terminal)
        texts = {controller: b"" for controller, _ in terminals}
        todo = set(texts)
        while todo:
            for controller in select.select(todo, [], [], 60)[0]:
                try:
                    chunk = os.read(controller, 65_536)
                except OSError as error:  # how Linux says that the other end was closed
                    assert error.errno == errno.EIO
                    chunk = b""
                texts[controller] += chunk
                if not chunk:
                    todo.remove(controller)
        process.wait(60)
    for controller in texts:
        os.close(controller)
    printed = [text.decode().replace("\r\n", "\n") for text in texts.values()]
    return process.returncode, printed[0], printed[-1]


def test_a_terminal_shows_bars_in_colour(loader: Loader) -> None:
    loader.load(loader.file(lines(event("a"), event("b"))))
    events = loader.file(lines(event("a"), event("c"), event("d")))
    status, out, err = on_a_terminal(loader, "--no-progress", events, columns=50)
    assert (status, err) == (0, "")
    bars = "\x1b[34m██████\x1b[0m\x1b[32m██████\x1b[0m"
    assert out.splitlines() == [  # half of the users were there before
        "date        active_user_count  added",
        f"2019-12-30                  4      2  {bars}",
        "3 lines → 3 engagement events → 3 active → 3",
        "user-days (2 new)",
    ]


def test_a_bar_of_one_new_user_is_all_new(loader: Loader) -> None:
    args = ["--no-progress", loader.file(lines(event()))]
    status, out, err = on_a_terminal(loader, *args, columns=50)
    assert (status, err) == (0, "")
    bars = f"\x1b[34m\x1b[0m\x1b[32m{12 * '█'}\x1b[0m"
    assert out.splitlines()[1] == f"2019-12-30                  1      1  {bars}"


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_no_colour_where_it_is_not_wanted(
    loader: Loader, name: str, value: str
) -> None:
    status, out, _ = on_a_terminal(loader, SAMPLE, env={name: value})
    assert status == 0
    assert out.splitlines()[2] == f"2019-12-30                 31     31  {62 * '█'}"


@pytest.mark.parametrize("columns", [45, 60, 100, 200])
def test_the_report_is_as_wide_as_the_terminal(loader: Loader, columns: int) -> None:
    _, out, _ = on_a_terminal(loader, SAMPLE, columns=columns, env={"NO_COLOR": "1"})
    widths = [len(line) for line in out.splitlines()]
    assert max(widths) <= columns
    assert widths[2] == columns  # the longest bar
    text = " 1000 lines → 75 engagement events → 64 active → 64 user-days (64 new)"
    assert " ".join(["", *out.splitlines()[4:]]) == text


# -- Progress


def screen(text: str) -> list[str]:
    """Return what a terminal shows one after another in its last line."""
    return [line.strip() for line in re.split(r"[\r\n]", text) if line.strip()]


def seen(text: str) -> list[str]:
    """Return what is left on a terminal in the end."""
    return [line.rpartition("\r")[2] for line in text.split("\n")]


@pytest.fixture(scope="module")
def thirty_samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("progress") / "large.jsons"
    path.write_bytes(SAMPLE.read_bytes() * 30)
    return path


BAR = (
    r"(writing: )? *(\d+)%\|.*\| [\d.]+[kMG]?/{}[kMG] \[\d\d:\d\d<[\d?:]+,"
    r" +[\d.?]+[kMG]?B/s\]"
)


@pytest.mark.parametrize("workers", [1, 2])
def test_progress_on_a_terminal(
    loader: Loader, thirty_samples: Path, workers: int
) -> None:
    """It counts the bytes of all files up to the end, and leaves nothing behind."""
    args = ["--workers", workers, "-q", *[thirty_samples] * 4]
    status, out, err = on_a_terminal(loader, *args, columns=70)
    bars = [re.fullmatch(BAR.format("289"), line) for line in screen(err)]
    assert (status, out) == (0, "")
    assert None not in bars, screen(err)
    shares = [int(bar[2]) for bar in bars if bar]
    assert shares == sorted(shares)
    assert bars[-1] and bars[-1].groups() == ("writing: ", "100")
    assert {bar[1] for bar in bars[:-1] if bar} <= {None}
    assert seen(err) == [""]


def test_the_report_takes_the_place_of_the_bar(loader: Loader) -> None:
    """One terminal shows both."""
    status, out, _ = on_a_terminal(loader, "--format", "csv", SAMPLE, number=1)
    assert (status, "writing: " in out) == (0, True)
    rows = ["2019-12-29,11,11,0", "2019-12-30,31,31,0", "2019-12-31,22,22,0"]
    assert seen(out) == ["date,active_user_count,added,removed", *rows, ""]


def test_progress_of_compressed_files(loader: Loader) -> None:
    """It counts the bytes of the files as they are. Each has three batches."""
    name = loader.file(gzip.compress(SAMPLE.read_bytes(), 1) * 30, "large.gz")
    size = os.path.getsize(loader.directory / name) * 3
    status, _, err = on_a_terminal(loader, "-q", *[name] * 3)
    bars = [re.fullmatch(BAR.format(r"([\d.]+)"), line) for line in screen(err)]
    assert status == 0
    assert None not in bars, screen(err)
    assert bars[-1] and bars[-1][2] == "100"
    totals = [float(bar[3]) for bar in bars if bar]
    assert totals == pytest.approx([size / 1e6] * len(bars), 0.01)
    assert loader.query("SELECT bytes FROM load_log") == [(size,)]


@pytest.mark.parametrize(("files", "size"), [(0, "72.2"), (1, "144")])
def test_progress_of_a_pipe(
    loader: Loader, thirty_samples: Path, files: int, size: str
) -> None:
    """Its size is not known, nor is that of a file and a pipe."""
    load = shlex.join(loader.command("-q", *[thirty_samples] * files, "-"))
    command = f"cat {shlex.quote(str(thirty_samples))} | {load}"
    loader.command = lambda *_: ["sh", "-c", command]  # type: ignore[method-assign]
    status, _, err = on_a_terminal(loader)
    assert status == 0
    assert "%" not in err
    last = rf"writing: {size}MB \[\d\d:\d\d, [\d.]+[kMG]B/s\]"
    assert re.fullmatch(last, screen(err)[-1])
    assert seen(err) == [""]


def test_no_progress_where_it_is_not_wanted(
    loader: Loader, thirty_samples: Path
) -> None:
    status, _, err = on_a_terminal(loader, "--no-progress", thirty_samples)
    assert (status, err) == (0, "")
    done = loader.run(thirty_samples, process=True)
    assert (done.returncode, done.stderr) == (0, b"")


QUICK_CLOCK = """
import time
real = time.time
time.time = lambda: 200 * real()
"""


def test_progress_in_a_file_begins_after_ten_seconds(
    loader: Loader, thirty_samples: Path
) -> None:
    """The clock of the bar runs 200 times as fast in the second load."""
    args = ["--progress", "-q", "--workers", 1, *[thirty_samples] * 4]
    done = loader.run(*args, process=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    done = loader.run(*args, env=loader.with_site(QUICK_CLOCK), process=True)
    assert (done.returncode, done.stdout) == (0, b"")
    bars = screen(done.stderr.decode())
    assert bars
    assert [bar for bar in bars if not re.fullmatch(BAR.format("289"), bar)] == []


def test_a_bar_that_cannot_be_drawn(loader: Loader, thirty_samples: Path) -> None:
    args = ["--progress", "-q", "--workers", 1, *[thirty_samples] * 4]
    env = {**os.environ, **loader.with_site(QUICK_CLOCK)}
    with open("/dev/full", "wb") as full:
        with loader.start(*args, env=env, stderr=full) as process:
            out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, b"")
    assert loader.table() == SAMPLE_TABLE


def test_messages_of_a_short_load_leave_no_bar(loader: Loader) -> None:
    """A message may draw a bar before its time; nothing of it is left."""
    bad = loader.file(b"bad\n")
    status, _, err = on_a_terminal(loader, bad)
    what = "bad records: 1, more than --max-bad-records 0; nothing was loaded"
    assert status == 1
    assert seen(err) == [f"{bad}:1: {NOT_AN_OBJECT}", f"Error: {what}", ""]


def test_messages_take_the_place_of_progress(
    loader: Loader, thirty_samples: Path
) -> None:
    bad = loader.file(b"bad\n")
    status, _, err = on_a_terminal(loader, thirty_samples, bad, thirty_samples, bad)
    what = "bad records: 2, more than --max-bad-records 0; nothing was loaded"
    assert status == 1
    assert seen(err) == [*[f"{bad}:1: {NOT_AN_OBJECT}"] * 2, f"Error: {what}", ""]


# -- The same columns and keys in every load


def test_every_load_has_the_same_columns_and_keys(loader: Loader) -> None:
    """Whatever reads them need not know how it was loaded."""
    name = loader.file(lines(event("a"), event("b")))
    other = loader.file(lines(event("c"), event("d"), event("e")), "other.jsons")
    nobody = loader.file(lines(event("x", msec=1)), "nobody.jsons")
    dates = ["--dates", "2019-12-30..2019-12-30"]
    header = "date,active_user_count,added,removed"
    tallies = ["lines", "engagement_events", "active_events", "anonymous_events"]
    tallies += ["out_of_range_events", "bad_records", "left_out", "skipped_files"]
    loads: list[tuple[list[str], list[str]]] = [
        (["--dry-run", name], ["2019-12-30,2,2,0"]),
        ([name], ["2019-12-30,2,2,0"]),
        (["--dry-run", "--replace", *dates, other], ["2019-12-30,3,3,2"]),
        (["--replace", *dates, other], ["2019-12-30,3,3,2"]),
        (["--incremental", other], []),
        (["--commit-every", "1000", name], ["2019-12-30,5,2,0"]),
        ([nobody], []),
    ]
    database = loader.db
    for number, (args, rows) in enumerate(loads):
        before = database.read_bytes() if database.exists() else b""
        done = loader.run("--format", "csv", *args)
        assert (done.returncode, done.stderr) == (0, b"")
        assert done.stdout.decode().splitlines() == [header, *rows]
        loader.db.unlink(missing_ok=True)  # once more
        if before:
            database.write_bytes(before)
        report = loader.load(*args)
        assert list(report) == ["dates", *tallies]
        expected = [list(day.values()) for day in report["dates"]]
        assert [",".join(map(str, day)) for day in expected] == rows
        assert {tuple(day) for day in report["dates"]} <= {tuple(header.split(","))}
        assert (report["left_out"], report["skipped_files"]) == (0, int(number == 4))

    loader.execute("DELETE FROM active_user")
    assert loader.load(loader.file(lines(event("z"))))["left_out"] == 1
