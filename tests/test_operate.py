"""Every night and every morning: the terminal, progress, cron, and what the view says."""

import errno
import gzip
import os
import pty
import re
import select
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from contextlib import closing
from datetime import date, timedelta
from pathlib import Path

import pytest
from conftest import NOON, ROOT, SAMPLE, Loader, Process, event, lines, wait_for
from hypothesis import example, given
from hypothesis import strategies as st
from test_robust import children

from load_active_users import DateCount, Report, Scanner, Tally, as_table, ranges, rule_of

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

README = (ROOT / "README.md").read_text()
DAY = 86_400 * 10**6
RULE = rule_of("US/Central", ("user_engagement",), 3000, ("*_event",))
DATES = ("2000-01-01", "2100-01-01")
NO_OBJECT = "is not a JSON object, {...}: one event per line is expected"


def on_a_terminal(
    loader: Loader,
    *args: object,
    columns: int = 100,
    env: dict[str, str] | None = None,
    number: int = 2,
) -> tuple[int, str, str]:
    """The exit status of a command whose output is a terminal, and what it printed on it and on
    standard error, which is a terminal of its own, if there are two."""
    terminals = [pty.openpty() for _ in range(number)]
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "NO_COLOR")}
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


# -- The report on a terminal


def test_a_terminal_shows_bars_in_colour(loader: Loader) -> None:
    loader.load(loader.file(lines(event("a"), event("b"))))
    events = loader.file(lines(event("a"), event("c"), event("d")))
    status, out, err = on_a_terminal(loader, "--no-progress", events, columns=50)
    assert (status, err) == (0, "")
    assert out.splitlines() == [  # half of the users were there before
        "date        active_user_count  added",
        "2019-12-30                  4      2  \x1b[34m██████\x1b[0m\x1b[32m██████\x1b[0m",
        "3 lines → 3 engagement events → 3 active → 3",
        "user-days (2 new)",
    ]


def test_a_bar_of_one_new_user_is_all_new(loader: Loader) -> None:
    _, out, _ = on_a_terminal(loader, "--no-progress", loader.file(lines(event())), columns=50)
    assert out.splitlines()[1].endswith(f"      1      1  \x1b[34m\x1b[0m\x1b[32m{12 * '█'}\x1b[0m")


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_no_colour_where_it_is_not_wanted(loader: Loader, name: str, value: str) -> None:
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


def a_report(replace: bool, *counts: DateCount, **tally: int) -> Report:
    return Report(replace, 1, Tally(**tally), {count.date: count for count in counts})


def plain_table(report: Report) -> list[str]:
    return re.sub(r"\x1b\[\d*m", "", as_table(report)).splitlines()


def test_bars_of_every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    counts = [
        DateCount("2020-01-01", 10**9, 0, 0, 3),
        DateCount("2020-01-02", 1, 1, 0, 1),
        DateCount("2020-01-03", 0, 0, 2, 0),
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


SAID = {
    "nothing": ({}, 0, "0 lines → 0 engagement events → 0 active → 0 user-days (0 new)"),
    "one of each": (
        {
            "lines": 1,
            "engagement_events": 1,
            "active_events": 1,
            "anonymous_events": 1,
            "out_of_range_events": 1,
            "bad_records": 1,
        },
        1,
        "1 line → 1 engagement event → 1 active → 0 user-days (0 new); "
        "1 anonymous event; 1 out of range event; 1 bad record; 1 user left out of final dates",
    ),
    "two of each": (
        {
            "lines": 2,
            "engagement_events": 2,
            "active_events": 2,
            "anonymous_events": 2,
            "out_of_range_events": 2,
            "bad_records": 2,
        },
        2,
        "2 lines → 2 engagement events → 2 active → 0 user-days (0 new); "
        "2 anonymous events; 2 out of range events; 2 bad records; 2 users left out of final dates",
    ),
}


@pytest.mark.parametrize("case", SAID)
def test_the_line_of_tallies(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tallies, left_out, expected = SAID[case]
    monkeypatch.setenv("COLUMNS", "500")
    counts = [DateCount("2020-01-01", 5, left_out=left_out)] * bool(left_out)
    assert plain_table(a_report(False, *counts, **tallies))[-1] == expected


def test_an_encoding_without_bars(loader: Loader) -> None:
    done = loader.run(SAMPLE, env={"PYTHONIOENCODING": "latin-1"})
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.splitlines()[2].endswith(b"     31  " + 42 * b"#")
    last = b"\n1000 lines -> 75 engagement events -> 64 active -> 64 user-days (64 new)\n"
    assert done.stdout.endswith(last)


def test_user_days_are_those_of_this_load(loader: Loader) -> None:
    loader.load(SAMPLE)
    again = loader.file(lines(event("new"), event("new"), event("new2")) + SAMPLE.read_bytes())
    steps = "1003 lines → 78 engagement events → 67 active → 66 user-days"
    assert loader.run(again).stdout.decode().splitlines()[-1] == f"{steps} (2 new)"
    options = ["--replace", "--dates", "2019-12-29..2019-12-31"]
    assert loader.run(*options, again).stdout.decode().splitlines()[-1] == f"{steps} (0 new)"
    steps = "1000 lines → 75 engagement events → 64 active → 64 user-days"
    last = loader.run(*options, SAMPLE).stdout.decode().splitlines()[-1]
    assert last == f"{steps} (0 new, 2 removed)"


# -- Progress


def screen(text: str) -> list[str]:
    """What a terminal shows one after another in its last line."""
    return [line.strip() for line in re.split(r"[\r\n]", text) if line.strip()]


def seen(text: str) -> list[str]:
    """What is left on a terminal in the end."""
    return [line.rpartition("\r")[2] for line in text.split("\n")]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("progress") / "large.jsons"
    path.write_bytes(SAMPLE.read_bytes() * 30)
    return path


BAR = r"(writing: )? *(\d+)%\|.*\| [\d.]+[kMG]?/{}[kMG] \[\d\d:\d\d<[\d?:]+, +[\d.?]+[kMG]?B/s\]"


@pytest.mark.parametrize("workers", [1, 2])
def test_progress_on_a_terminal(loader: Loader, large: Path, workers: int) -> None:
    """In bytes of all files; it ends at all of them, and nothing of it is left."""
    args = ["--workers", workers, "-q", *[large] * 4]
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
    """On a terminal that shows both."""
    status, out, _ = on_a_terminal(loader, "--format", "csv", SAMPLE, number=1)
    assert (status, "writing: " in out) == (0, True)
    rows = ["2019-12-29,11,11", "2019-12-30,31,31", "2019-12-31,22,22"]
    assert seen(out) == ["date,active_user_count,added", *rows, ""]


def test_progress_of_compressed_files(loader: Loader) -> None:
    """In bytes of the files as they are, of which each has three batches."""
    name = loader.file(gzip.compress(SAMPLE.read_bytes(), 1) * 30, "large.gz")
    size = os.path.getsize(loader.directory / name) * 3
    status, _, err = on_a_terminal(loader, "-q", *[name] * 3)
    bars = [re.fullmatch(BAR.format(r"([\d.]+)"), line) for line in screen(err)]
    assert status == 0
    assert None not in bars, screen(err)
    assert bars[-1] and bars[-1][2] == "100"
    assert [float(bar[3]) for bar in bars if bar] == pytest.approx([size / 1e6] * len(bars), 0.01)
    assert loader.query("SELECT bytes FROM load_log") == [(size,)]


def test_progress_of_a_pipe(loader: Loader, large: Path) -> None:
    """Its size is not known."""
    command = f"cat {shlex.quote(str(large))} | {shlex.join(loader.command('-q', '-'))}"
    loader.command = lambda *_: ["sh", "-c", command]  # type: ignore[method-assign]
    status, _, err = on_a_terminal(loader)
    assert status == 0
    last = r"writing: 72.2MB \[\d\d:\d\d, [\d.]+[kMG]B/s\]"
    assert re.fullmatch(last, screen(err)[-1])
    assert seen(err) == [""]


def test_no_progress_where_it_is_not_wanted(loader: Loader, large: Path) -> None:
    assert on_a_terminal(loader, "--no-progress", large)[2] == ""
    assert loader.run(large).stderr == b""


def test_progress_in_a_file_is_in_lines(loader: Loader) -> None:
    done = loader.run("--progress", "-q", SAMPLE)
    assert (done.returncode, done.stdout) == (0, b"")
    assert done.stderr == b"" or done.stderr.endswith(b"\n")


def test_messages_of_a_load_that_is_soon_over(loader: Loader) -> None:
    """Before a bar would have been shown: a message may draw it, and nothing of it is left."""
    bad = loader.file(b"bad\n")
    status, _, err = on_a_terminal(loader, bad)
    what = "bad records: 1, more than --max-bad-records 0; nothing was loaded"
    assert status == 1
    assert seen(err) == [f"{bad}:1: {NO_OBJECT}", f"Error: {what}", ""]


def test_settings_of_progress_that_cannot_be(loader: Loader) -> None:
    what = "ValueError: could not convert string to float: 'x'"
    said = loader.refuse("--progress", SAMPLE, env={"TQDM_MININTERVAL": "x"})
    assert said == f"Error: the progress bar (TQDM_ variables): {what}\n"


def test_messages_take_the_place_of_progress(loader: Loader, large: Path) -> None:
    bad = loader.file(b"bad\n")
    status, _, err = on_a_terminal(loader, large, bad, large, bad)
    what = "bad records: 2, more than --max-bad-records 0; nothing was loaded"
    assert status == 1
    assert seen(err) == [*[f"{bad}:1: {NO_OBJECT}"] * 2, f"Error: {what}", ""]


SHORT = b"\xef\xbb\xbf" + lines(event("a"), b"", b"bad", event("b"), b" ") + lines(event("c"))[:-1]
LONG = SAMPLE.read_bytes() * 14  # of two batches
SIZED: dict[str, tuple[bytes | Callable[[], bytes], int]] = {
    "cut at every byte": (SHORT, 1),
    "cut within lines": (SHORT, 7),
    "cut into a few": (SHORT, 400),
    "not cut": (SHORT, 10**9),
    "of several batches": (LONG, 10**9),
    "of many ranges": (LONG, 10**6 + 7),
    "empty": (b"", 100),
    "gzip": (lambda: gzip.compress(LONG, 1), 1000),
    "gzip of several members": (gzip.compress(SHORT + b"\n") * 3, 1000),
    "gzip, short": (gzip.compress(SHORT), 7),
    "zstd": (lambda: zstd.compress(LONG, 1), 1000),
    "zstd, short": (zstd.compress(SHORT), 7),
}


@pytest.mark.parametrize("case", SIZED)
def test_the_bytes_of_progress_add_up(loader: Loader, case: str) -> None:
    """Over all ranges of a file they are its size."""
    data, cut = SIZED[case]
    content = data if isinstance(data, bytes) else data()
    path = str(loader.directory / loader.file(content))
    scan = Scanner(RULE, DATES)
    parts = ranges(path, cut)
    found = [batch.tally.bytes for part in parts for batch in scan(part)]
    assert (sum(found), min(found, default=0) >= 0) == (len(content), True)
    assert sum(part.size for part in parts) == len(content)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("source", ["plain", "gzip", "zstd", "pipe"])
def test_the_log_has_the_bytes_that_were_read(loader: Loader, source: str, workers: int) -> None:
    content = LONG + b"\n"
    if source == "gzip":
        content = gzip.compress(content, 1)
    elif source == "zstd":
        content = zstd.compress(content, 1)
    if source == "pipe":
        loader.load("--workers", workers, "-", input=content)
    else:
        loader.load("--workers", workers, *[loader.file(content)] * 2)
    times = 1 if source == "pipe" else 2
    expected = [(14_001 * times, times * len(content))]
    assert loader.query("SELECT lines, bytes FROM load_log") == expected


# -- Every night


def blocks(language: str) -> list[str]:
    return [block.split("```")[0] for block in README.split(f"```{language}\n")[1:]]


class Night:
    """The README's machine, under another /srv: a clone of the project, and the shards of five
    days, each of as many users as days ago. The crontab's commands by what they do."""

    def __init__(self, directory: Path) -> None:
        self.srv = directory / "srv"
        project = self.srv / "load_active_users"
        (project / ".venv" / "bin").mkdir(parents=True)
        (self.srv / "events").mkdir()
        for name in ("load_active_users.py", "schema.sql"):
            shutil.copy(ROOT / name, project)
        python = project / ".venv" / "bin" / "python"
        python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
        python.chmod(0o755)
        self.loader = Loader(directory)
        self.loader.db = self.srv / "analytics.db"
        for days in range(1, 6):
            for shard in range(2):
                users = [event(f"{days}-{shard}-{n}", NOON - days * DAY) for n in range(days)]
                self.shard(days, shard, gzip.compress(lines(*users)))
        self.settings: dict[str, str] = {}
        commands = []
        for line in self.here(blocks("crontab")[0]).splitlines():
            if match := re.fullmatch(r"(\w+)=(.*)", line):
                self.settings[match[1]] = match[2]
            elif line and not line.startswith("#"):
                commands.append(line.split(None, 5)[5])
        self.yesterday, self.late, self.rotate, self.forget = commands

    def shard(self, days: int, shard: int, data: bytes) -> Path:
        day = date.today() - timedelta(days)
        path = self.srv / "events" / f"{day}-{shard:012}.json.gz"
        path.write_bytes(data)
        return path

    def keep_only(self, *days: int) -> None:
        """Delete the shards of all other days."""
        kept = {str(date.today() - timedelta(one)) for one in days}
        for path in (self.srv / "events").iterdir():
            if path.name[:10] not in kept:
                path.unlink()

    def here(self, text: str) -> str:
        return text.replace("/srv", str(self.srv))

    def run(self, command: str) -> tuple[int, str, str]:
        """Run a command as cron does: sh, hardly any environment, another directory, no terminal, %
        as it reads it. Returns the exit status, standard output and standard error."""
        command = re.sub(r"(?<!\\)%.*", "", command).replace("\\%", "%")
        assert "%F" in command or "%" not in command
        environment = {"HOME": "/", "LOGNAME": "root", "SHELL": "/bin/sh", "PATH": "/usr/bin:/bin"}
        done = subprocess.run(
            ["/bin/sh", "-c", command],
            cwd="/",
            env={**environment, **self.settings},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            start_new_session=True,
        )
        return done.returncode, done.stdout.decode(), done.stderr.decode()

    def counts(self) -> list[int]:
        return list(self.loader.table().values())

    def missing(self) -> str:
        """What is said where yesterday's shards are missing."""
        day = date.today() - timedelta(1)
        name = f"{self.srv}/events/{day}-*.json.gz"
        return f"Error: {name}: No such file or directory\n"


@pytest.fixture
def night(tmp_path: Path) -> Night:
    return Night(tmp_path)


def test_the_crontab_in_the_readme(night: Night) -> None:
    assert night.settings["LOAD_ACTIVE_USERS_DB"] == str(night.loader.db)
    for _ in range(2):
        assert night.run(night.yesterday) == (0, "", "")
        assert night.counts() == [2]
    for _ in range(2):
        assert night.run(night.late) == (0, "", "")
        assert night.counts() == [8, 6, 4, 2]
    assert (night.srv / "active_users.png").read_bytes().startswith(b"\x89PNG")


def test_old_shards_go(night: Night) -> None:
    old, young = night.shard(62, 0, b""), night.shard(58, 0, b"")
    for days, path in ((62, old), (58, young)):
        os.utime(path, (time.time() - days * 86_400,) * 2)
    assert night.run(night.rotate) == (0, "", "")
    assert (old.exists(), young.exists()) == (False, True)
    assert len(list((night.srv / "events").iterdir())) == 11


@pytest.mark.skipif(not shutil.which("sqlite3"), reason="needs the command sqlite3, as the crontab")
def test_users_are_forgotten_and_their_counts_are_kept(night: Night) -> None:
    assert night.run(night.late) == (0, "", "")
    today = event("today", int(time.time() * 10**6))
    night.loader.load("--db", night.loader.db, "-", input=lines(today))
    assert night.run(night.forget) == (0, "", "")
    assert night.counts() == [8, 6, 4, 2, 1]
    assert night.loader.query("SELECT user_pseudo_id FROM active_user") == [("today",)]
    assert night.run(night.late) == (0, "", "")
    assert night.counts() == [8, 6, 4, 2, 1]


@pytest.mark.parametrize(
    ("days", "counts"), [((1,), [2]), ((1, 2), [4, 2]), ((2, 4), [8, 4]), ((4,), [8])]
)
def test_the_first_nights(night: Night, days: tuple[int, ...], counts: list[int]) -> None:
    """Not all of the last four days have shards yet: what there is, is loaded and drawn."""
    night.keep_only(*days)
    assert night.run(night.late) == (0, "", "")
    assert night.counts() == counts
    assert (night.srv / "active_users.png").exists()


def test_a_night_without_any_shards(night: Night) -> None:
    """Once there is a database, it is drawn as it stands; that shards are missing is told by the
    load of yesterday's, in one line."""
    assert night.run(night.yesterday) == (0, "", "")
    night.keep_only()
    assert night.run(night.yesterday) == (1, "", night.missing())
    assert night.run(night.late) == (0, "", "")
    assert night.counts() == [2]
    assert (night.srv / "active_users.png").exists()


def test_the_very_first_night(night: Night) -> None:
    """Nothing to load and nothing to draw: one line each."""
    night.keep_only()
    no_database = f"{night.loader.db}: there is no such database; load events into it first"
    assert night.run(night.yesterday) == (1, "", night.missing())
    assert night.run(night.late) == (1, "", f"Error: {no_database}\n")
    assert [path.name for path in night.srv.iterdir() if path.is_file()] == []


def test_two_runs_overlap(night: Night) -> None:
    """Both succeed; with flock, as the README has it, the second one is left out."""
    both = f"( {night.yesterday} ) & ( {night.late} ); status=$?; wait $!; exit $(($? + status))"
    assert night.run(both) == (0, "", "")
    assert night.counts() == [8, 6, 4, 2]

    match = re.search(r"`(flock -n \S+) \.venv/bin/python \.\.\.`", README)
    assert match
    flock = night.here(match[1])
    locked = night.yesterday.replace(".venv/bin/python", f"{flock} .venv/bin/python")
    assert night.run(locked) == (0, "", "")
    holder = ["flock", flock.split()[-1], "sh", "-c", "echo; read line"]
    with Process(holder, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout and other.stdout.readline() == b"\n"
        assert night.run(locked) == (1, "", "")
        other.communicate()


CRON = shutil.which("cron", path="/usr/sbin:/usr/bin")
CRON_NAMESPACE = """
set -e
mount -t tmpfs none /var/spool/cron
mount -t tmpfs none /etc/cron.d
mount -t tmpfs none /run
mount --bind /dev/null /etc/crontab
mount --bind "$1/sbin" /usr/sbin
mkdir /var/spool/cron/crontabs
cp "$1/crontab" /var/spool/cron/crontabs/root
chmod 600 /var/spool/cron/crontabs/root
exec /usr/sbin/cron -f
"""


@pytest.mark.skipif(
    not CRON or os.geteuid() != 0, reason="needs cron, and root to start it apart from the machine"
)
def test_a_real_cron_daemon(night: Night) -> None:
    """Runs the first line every minute: silent, and mails one line when the shards are missing."""
    sbin = night.srv / "sbin"
    sbin.mkdir()
    shutil.copy(str(CRON), sbin)
    (sbin / "sendmail").write_text(f"#!/bin/sh\ncat >> {night.srv}/mail\n")
    (sbin / "sendmail").chmod(0o755)
    settings = "\n".join(f"{name}={value}" for name, value in night.settings.items())
    fails = night.yesterday.replace("events/", "missing/")
    jobs = ((night.yesterday, "status"), (fails, "failed"))
    marks = [f"* * * * * {command}; echo $? > {night.srv}/{name}" for command, name in jobs]
    (night.srv / "crontab").write_text("\n".join([settings, *marks, ""]))
    command = ["unshare", "--mount", "sh", "-c", CRON_NAMESPACE, "sh", str(night.srv)]
    with Process(command, start_new_session=True, stdout=subprocess.DEVNULL) as process:
        try:
            assert wait_for((night.srv / "failed").exists, 100)
            assert wait_for((night.srv / "status").exists)
            assert wait_for(lambda: not children(process))  # which send the mail, if there is any
        finally:
            os.killpg(process.pid, signal.SIGKILL)
    assert ((night.srv / "status").read_text(), (night.srv / "failed").read_text()) == (
        "0\n",
        "1\n",
    )
    assert night.counts() == [2]
    head, _, body = (night.srv / "mail").read_text().partition("\n\n")
    assert head.count("Subject:") == 1
    assert f"To: {night.settings['MAILTO']}" in head
    assert body == night.missing().replace("/events/", "/missing/")


@pytest.mark.skipif(
    not shutil.which("systemd-analyze"), reason="needs systemd-analyze to check the units"
)
def test_the_systemd_units_in_the_readme(night: Night) -> None:
    """Are valid, and run what the crontab's first line runs."""
    service, timer = blocks("ini")
    match = re.search(r"ExecStart=/bin/sh -c '(.*)'", service)
    assert match
    command = night.here(match[1]).replace("$$", "$").replace("%%", "%")
    assert command == night.yesterday.replace("\\%", "%").partition("&& ")[2]
    (night.srv / "load-active-users.service").write_text(night.here(service))
    (night.srv / "load-active-users.timer").write_text(timer)
    units = sorted(night.srv.glob("load-active-users.*"))
    verify = ["systemd-analyze", "verify", "--man=no", *map(str, units)]
    done = subprocess.run(verify, capture_output=True, text=True)
    assert [line for line in done.stderr.splitlines() if "load-active-users" in line] == []
    assert done.returncode == 0


# -- The view


@given(
    st.lists(
        st.tuples(st.integers(0, 70), st.sets(st.sampled_from("abcdef"), min_size=1)), max_size=30
    )
)
@example([(0, {"a"}), (7, {"a"}), (28, {"a"}), (29, {"b"})])
@example([(0, {"a"}), (6, {"a"}), (33, {"a"})])
@example([(0, {"a"}), (27, {"b"}), (28, {"b"})])
def test_weekly_and_monthly_active_users(visits: list[tuple[int, set[str]]]) -> None:
    """Against a set of users a window. The last dates that there are included."""
    active: dict[int, set[str]] = {}
    for day, users in visits:
        active.setdefault(day, set()).update(users)

    def window(day: int, size: int) -> list[set[str]]:
        return [active[one] for one in range(day - size + 1, day + 1) if one in active]

    for first in (date(2020, 1, 1), date(9999, 12, 31) - timedelta(70)):
        with closing(sqlite3.connect(":memory:")) as db:
            db.executescript((ROOT / "schema.sql").read_text())
            for day, users in active.items():
                text = str(first + timedelta(day))
                db.execute("INSERT INTO active_user_table VALUES (?, ?)", (text, len(users)))
                rows = [(text, user) for user in users]
                db.executemany("INSERT INTO active_user VALUES (?, ?)", rows)
            columns = "weekly_active_users, monthly_active_users, stickiness, days"
            query = f"""SELECT date, active_user_count, {columns}, seven_day_average
                FROM active_user_trend ORDER BY date"""
            found = db.execute(query).fetchall()
        expected = []
        for day, users in sorted(active.items()):
            week, month = (len(set().union(*window(day, size))) for size in (7, 28))
            counts = [len(some) for some in window(day, 7)]
            average = int(sum(counts) / len(counts) * 10 + 0.5) / 10  # half up, as SQL does
            number = day - min(active) + 1
            row = (len(users), week, month, round(len(users) / month, 4), number, average)
            expected.append((str(first + timedelta(day)), *row))
        assert found == expected
