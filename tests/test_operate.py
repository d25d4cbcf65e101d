"""Run it every night, see it every morning: the terminal, pictures, cron, live pipes, and what the views say."""

import errno
import json
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
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import date, timedelta
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from conftest import NOON, ROOT, SAMPLE, Loader, event, lines
from hypothesis import example, given
from hypothesis import strategies as st
from test_robust import wait_for

from load_active_users import DateCount, as_table, picture, week_averages

README = (ROOT / "README.md").read_text()
DAY = 86_400 * 10**6
TALLY = {"lines": 9, "engagement_events": 8, "active_events": 7, "anonymous_events": 0, "bad_records": 0}


def on_a_terminal(loader: Loader, *args: object, columns: int = 100, **env: str) -> tuple[int, str, str]:
    """The exit status of a command whose output is a terminal, and what it printed on it and on standard error, which
    is a terminal of its own."""
    terminals = [pty.openpty(), pty.openpty()]
    environment = {**{k: v for k, v in os.environ.items() if k not in ("COLUMNS", "NO_COLOR")}, "TERM": "xterm", **env}
    for _, terminal in terminals:
        subprocess.run(["stty", "cols", str(columns), "rows", "24"], stdin=terminal, check=True)
    with subprocess.Popen(
        loader.command(*args),
        cwd=loader.directory,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=terminals[0][1],
        stderr=terminals[1][1],
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
    out, err = (text.decode().replace("\r\n", "\n") for text in texts.values())
    return process.returncode, out, err


# -- The report on a terminal


def test_a_terminal_shows_bars_in_colour(loader: Loader) -> None:
    loader.load(loader.file(lines(event("a"), event("b"))))
    status, out, _ = on_a_terminal(loader, loader.file(lines(event("a"), event("c"), event("d"))), columns=50)
    assert status == 0
    assert "\x1b[34m██████\x1b[0m\x1b[32m██████\x1b[0m\n" in out  # half of the users were there before


@pytest.mark.parametrize("env", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_no_colour_where_it_is_not_wanted(loader: Loader, env: dict[str, str]) -> None:
    status, out, _ = on_a_terminal(loader, SAMPLE, **env)
    assert status == 0
    assert "\x1b" not in out
    assert "31     31  ████" in out


@pytest.mark.parametrize("columns", [45, 60, 100, 200])
def test_the_report_is_as_wide_as_the_terminal(loader: Loader, columns: int) -> None:
    _, out, _ = on_a_terminal(loader, SAMPLE, "--max-bad-records", "9", columns=columns, NO_COLOR="1")
    widths = [len(line) for line in out.splitlines()]
    assert max(widths) <= columns
    assert widths[2] == columns  # the longest bar
    assert out.replace("\n", " ").endswith(" 1000 lines → 75 engagement events → 64 active → 64 user-days (64 new) ")


def test_bars_and_funnels_of_every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    counts = [DateCount("2020-01-01", 10**9, 0, 3), DateCount("2020-01-02", 1, 1, 1), DateCount("2020-01-03", 0, 0, 0)]
    rows = re.sub(r"\x1b\[\d*m", "", as_table(counts, {**TALLY, "bad_records": 2})).splitlines()
    assert rows == [
        "date        active_user_count  added",
        "2020-01-01         1000000000      0  " + 42 * "█",
        "2020-01-02                  1      1  █",
        "2020-01-03                  0      0",
        "9 lines → 8 engagement events → 7 active → 4 user-days (1 new); 2 bad records",
    ]
    assert as_table([], TALLY).splitlines()[1:] == ["9 lines → 8 engagement events → 7 active → 0 user-days (0 new)"]


def test_an_encoding_without_bars(loader: Loader) -> None:
    done = loader.run(SAMPLE, env={"PYTHONIOENCODING": "latin-1"})
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.splitlines()[2].endswith(b"     31  " + 42 * b"#")
    assert done.stdout.endswith(b"\n1000 lines -> 75 engagement events -> 64 active -> 64 user-days (64 new)\n")


def test_user_days_are_those_of_this_load(loader: Loader) -> None:
    loader.load(SAMPLE)
    again = loader.file(lines(event("new"), event("new"), event("new2")) + SAMPLE.read_bytes())
    last = loader.run(again).stdout.decode().splitlines()[-1]
    assert last == "1003 lines → 78 engagement events → 67 active → 66 user-days (2 new)"
    last = loader.run("--replace", again).stdout.decode().splitlines()[-1]
    assert last == "1003 lines → 78 engagement events → 67 active → 66 user-days (0 new)"


# -- Progress


def screen(text: str) -> list[str]:
    """What a terminal shows one after another in its last line."""
    return [line.strip() for line in re.split(r"\r\x1b\[K", text) if line.strip()]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("progress") / "large.jsons"
    path.write_bytes(SAMPLE.read_bytes() * 100)
    return path


@pytest.mark.parametrize("workers", [1, 2])
def test_progress_on_a_terminal(loader: Loader, large: Path, workers: int) -> None:
    status, _, err = on_a_terminal(loader, "--workers", workers, *[large] * 20, columns=70)
    assert status == 0
    *shown, writing = screen(err)
    assert writing == "writing active_user_table.db"
    pattern = r"\[#*\.*\] +\d+% of 4.81 GB  \d+\.\d\d GB/s  \d:\d\d:\d\d left"
    assert [line for line in shown if not re.fullmatch(pattern, line)] == []
    shares = [int(re.search(r"(\d+)%", line)[1]) for line in shown]
    assert shares == sorted(shares)
    assert len(set(shares)) > 2
    assert err.endswith("\r\x1b[K")  # nothing of it is left


def test_progress_of_compressed_files(loader: Loader, large: Path) -> None:
    """In bytes of the files: it ends at all of them."""
    subprocess.run(["gzip", "-1k", large], check=True)
    names = [f"{large}.gz"] * 10
    _, _, err = on_a_terminal(loader, *names)
    shares = [int(share) for share in re.findall(r"(\d+)% of", err)]
    assert shares == sorted(shares)
    assert len(set(shares)) > 1
    assert max(shares) <= 100
    assert f"% of {10 * os.path.getsize(names[0]) / 1e9:.2f} GB" in err


def test_progress_of_a_pipe(loader: Loader, large: Path) -> None:
    command = f"cat {' '.join([str(large)] * 10)} | {shlex.join(loader.command('-'))}"
    loader.command = lambda *_: ["sh", "-c", command]
    status, _, err = on_a_terminal(loader)
    assert status == 0
    pattern = r"[\d,]+ lines  [\d,]+ lines/s"
    assert re.fullmatch(pattern, screen(err)[0])


def test_no_progress_where_it_is_not_wanted(loader: Loader, large: Path) -> None:
    assert on_a_terminal(loader, "--no-progress", *[large] * 10)[2] == ""
    assert loader.run(*[large] * 10).stderr == b""


def test_progress_in_a_file_is_in_lines(loader: Loader) -> None:
    assert loader.run("--progress", SAMPLE).stderr == b"writing active_user_table.db\n"


def test_messages_take_the_place_of_progress(loader: Loader, large: Path) -> None:
    bad = loader.file(b"bad\n")
    _, _, err = on_a_terminal(loader, *[large] * 10, bad)
    assert "\r\x1b[Kevents.jsons:1: not one JSON object" in err
    assert err.endswith("\n\r\x1b[KError: bad records: 1, more than --max-bad-records 0; nothing was loaded\n")


# -- Pictures

TERMS = ("US/Central", 3000, ["*_event"])
MAGIC = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}


def series(days: int, missing: tuple[int, ...] = (), first: str = "2019-12-29") -> list[tuple[str, int]]:
    start = date.fromisoformat(first)
    return [(str(start + timedelta(n)), 1000 + n * 37 % 1001) for n in range(days) if n not in missing]


def texts(svg: bytes) -> str:
    """What is written in a picture: matplotlib leaves it in comments, since it draws the letters."""
    tree = ElementTree.fromstring(svg, ElementTree.XMLParser(target=ElementTree.TreeBuilder(insert_comments=True)))
    return "\n".join(node.text.strip() for node in tree.iter() if node.tag is ElementTree.Comment)


@pytest.mark.parametrize("suffix", MAGIC)
@pytest.mark.parametrize("days", [0, 1, 3, 40, 1000])
def test_a_picture_is_a_function_of_the_table(days: int, suffix: str) -> None:
    drawn = picture(series(days), TERMS, suffix)
    assert drawn.startswith(MAGIC[suffix])
    assert drawn == picture(series(days), TERMS, suffix)
    assert b"Date>" not in drawn
    assert b"CreationDate" not in drawn
    assert drawn != picture(series(days, first="2019-12-28") or series(1), TERMS, suffix)


def test_what_a_picture_says() -> None:
    said = texts(picture(series(3), TERMS, ".svg"))
    assert "Active users per day" in said
    assert "US/Central dates · engagement of at least 3000 ms · *_event · 2019-12-29 to 2019-12-31" in said
    assert all(text in said for text in ("2019-12-29", "2019-12-30", "2019-12-31", "1,000", "1,037", "1,074"))
    assert "average" not in said
    assert "no data" not in said
    assert "7-day average" in texts(picture(series(14), TERMS, ".svg"))
    assert "no data" in texts(picture(series(9, missing=(3, 4, 6)), TERMS, ".svg"))
    assert "no dates yet" in texts(picture([], None, ".svg"))
    assert "2020-01-06" in texts(picture(series(40), TERMS, ".svg"))  # a Monday
    assert "2021-01-01" in texts(picture(series(1000), TERMS, ".svg"))


@pytest.mark.parametrize(
    "rows",
    [
        [("0001-01-01", 1)],
        [("9999-12-31", 1)],
        [("0001-01-01", 0), ("9999-12-31", 10**15)],
        [("2020-02-29", 0)],
        series(400, missing=tuple(range(1, 400, 2))),
    ],
)
def test_pictures_of_strange_tables(rows: list[tuple[str, int]]) -> None:
    assert picture(rows, ("Europe/Berlin", 10**15, ["$\\frac$", "漢字_*", "a" * 500]), ".png").startswith(MAGIC[".png"])


def test_gaps_are_no_zeros() -> None:
    with_gap = picture([("2020-01-01", 5), ("2020-01-03", 5)], TERMS, ".png")
    assert with_gap != picture([("2020-01-01", 5), ("2020-01-02", 0), ("2020-01-03", 5)], TERMS, ".png")


@given(st.sets(st.integers(0, 40), min_size=1).flatmap(lambda days: st.tuples(*[st.just(sorted(days)), st.randoms()])))
def test_week_averages(drawn: tuple[list[int], Any]) -> None:
    days, rng = drawn
    counts = {day: rng.randrange(1000) for day in days}
    for day, average in zip(days, week_averages(days, [counts[day] for day in days]), strict=True):
        week = [counts[d] for d in range(day - 6, day + 1) if d in counts]
        if day - 6 >= days[0] and len(week) >= 4:
            assert average == pytest.approx(sum(week) / len(week))
        else:
            assert average != average  # NaN


def test_plot_draws_the_whole_table(loader: Loader) -> None:
    loader.load(SAMPLE)
    done = loader.run("--quiet", "--plot", "a.svg", loader.file(lines(event("late", time=NOON + 5 * DAY))))
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    said = texts((loader.directory / "a.svg").read_bytes())
    assert "2019-12-29 to 2020-01-04" in said
    assert "no data" in said


def test_plot_without_events(loader: Loader) -> None:
    loader.load("--timezone", "Europe/Berlin", SAMPLE)
    before = loader.content()
    for name in ("a.SVG", "b.svg"):
        done = loader.run("--plot", name)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    drawn = (loader.directory / "a.SVG").read_bytes()
    assert drawn == (loader.directory / "b.svg").read_bytes()
    assert "Europe/Berlin" in texts(drawn)
    assert loader.content() == before
    assert sorted(path.name for path in loader.directory.iterdir()) == ["a.SVG", "active_user_table.db", "b.svg"]


def test_plot_in_an_environment_without_anything(loader: Loader) -> None:
    """As from cron: no display, no home directory for matplotlib's caches; and letters that its font lacks."""
    options = ["--quiet", "--valuable-event", "漢字", "--plot", "a.png"]
    command = ["env", "-i", "HOME=/proc/none", *loader.command(*options, SAMPLE, loader.file(lines(event(key="漢字"))))]
    done = subprocess.run(command, cwd=loader.directory, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert (loader.directory / "a.png").read_bytes().startswith(MAGIC[".png"])


def test_a_dry_run_draws_nothing(loader: Loader) -> None:
    loader.load("--dry-run", "--plot", "a.png", SAMPLE)
    assert list(loader.directory.iterdir()) == []


def test_plots_that_cannot_be_drawn(loader: Loader) -> None:
    assert loader.refuse("--plot", "a.png") == (
        "Error: active_user_table.db: there is no such database; load events into it first\n"
    )
    assert "'a.gif' does not end in .png, .svg, .pdf" in loader.refuse("--plot", "a.gif", SAMPLE, status=2)
    assert "there is no directory" in loader.refuse("--plot", "no/a.png", SAMPLE)
    assert "Missing argument 'EVENTS...'" in loader.refuse(status=2)
    assert not loader.db.exists()
    with closing(sqlite3.connect(loader.db)) as db:
        db.execute("CREATE TABLE other (x)")
    assert "is not one of load_active_users.py" in loader.refuse("--plot", "a.png")
    loader.db.unlink()
    (loader.directory / "d.png").mkdir()
    done = loader.run("--plot", "d.png", SAMPLE)
    assert done.returncode == 1
    assert done.stderr.decode() == "Error: d.png: Is a directory; what was loaded is loaded, but not drawn\n"
    assert sum(loader.table().values()) == 64
    assert len(list(loader.directory.iterdir())) == 2  # nothing half-drawn is left


def test_an_empty_database_is_drawn_too(loader: Loader) -> None:
    loader.db.touch()
    assert loader.run("--plot", "a.svg").returncode == 0
    assert "no dates yet" in texts((loader.directory / "a.svg").read_bytes())


def test_the_picture_in_the_readme(loader: Loader) -> None:
    """It is that of the sample; its bytes depend on the version of matplotlib."""
    assert "![" in README.split("--plot data/active_users.png")[1][:100]
    assert (ROOT / "data" / "active_users.png").read_bytes().startswith(MAGIC[".png"])


# -- Every night


def blocks(language: str) -> list[str]:
    return [block.split("```")[0] for block in README.split(f"```{language}\n")[1:]]


class Night:
    """The README's machine, under another /srv: a clone of the project, and the shards of the last days."""

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
                self.shard(days, shard, lines(*(event(f"{days}-{shard}-{n}", NOON - days * DAY) for n in range(days))))

    def shard(self, days: int, shard: int, data: bytes) -> Path:
        day = date.today() - timedelta(days)
        path = self.srv / "events" / f"{day}-{shard:012}.json.gz"
        path.write_bytes(data)
        return path

    def here(self, text: str) -> str:
        return text.replace("/srv", str(self.srv))

    def crontab(self) -> tuple[dict[str, str], list[str]]:
        """The settings and the commands of the README's crontab."""
        settings, commands = {}, []
        for line in self.here(blocks("crontab")[0]).splitlines():
            if match := re.fullmatch(r"(\w+)=(.*)", line):
                settings[match[1]] = match[2]
            elif line and not line.startswith("#"):
                commands.append(line.split(None, 5)[5])
        return settings, commands

    def run(self, command: str) -> subprocess.CompletedProcess:
        """Run a command as cron does: sh, hardly any environment, another directory, no terminal, % as it reads it."""
        command = re.sub(r"(?<!\\)%.*", "", command).replace("\\%", "%")
        assert "%F" in command or "%" not in command
        environment = {"HOME": "/", "LOGNAME": "root", "SHELL": "/bin/sh", "PATH": "/usr/bin:/bin", **self.crontab()[0]}
        return subprocess.run(
            ["/bin/sh", "-c", command],
            cwd="/",
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            start_new_session=True,
        )


@pytest.fixture
def night(tmp_path: Path) -> Night:
    return Night(tmp_path)


def test_the_crontab_in_the_readme(night: Night) -> None:
    settings, (yesterday, late, rotate) = night.crontab()
    assert settings["LOAD_ACTIVE_USERS_DB"] == str(night.loader.db)
    for _ in range(2):
        done = night.run(yesterday)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
        assert list(night.loader.table().values()) == [2]
    for _ in range(2):
        done = night.run(late)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
        assert list(night.loader.table().values()) == [8, 6, 4, 2]
    assert (night.srv / "active_users.png").read_bytes().startswith(MAGIC[".png"])

    old = night.shard(61, 0, b"")
    os.utime(old, (time.time() - 62 * 86_400,) * 2)
    done = night.run(rotate)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert not old.exists()
    assert len(list((night.srv / "events").iterdir())) == 10


def test_a_failure_is_one_line_for_cron(night: Night) -> None:
    night.run(night.crontab()[1][0])
    for path in (night.srv / "events").iterdir():
        path.unlink()
    for command in night.crontab()[1][:2]:
        done = night.run(command)
        assert (done.returncode, done.stdout) == (1, b"")
        assert re.fullmatch(rb"Error: .*-\*\.json\.gz: No such file or directory\n", done.stderr)
    assert list(night.loader.table().values()) == [2]


def test_two_runs_overlap(night: Night) -> None:
    """Both succeed; with flock, as the README has it, the second one is left out."""
    _, (yesterday, late, _) = night.crontab()
    assert night.run(f"( {yesterday} ) & ( {late} ); status=$?; wait $!; exit $(($? + status))").returncode == 0
    assert list(night.loader.table().values()) == [8, 6, 4, 2]

    flock = re.search(r"`(flock -n \S+) \.venv/bin/python \.\.\.`", README)[1]
    locked = yesterday.replace(".venv/bin/python", night.here(flock) + " .venv/bin/python")
    assert night.run(locked).returncode == 0
    path = night.here(flock.split()[-1])
    with subprocess.Popen(["flock", path, "sh", "-c", "echo; read line"], stdin=-1, stdout=-1) as other:
        other.stdout.readline()
        assert night.run(locked).returncode == 1
        other.stdin.close()


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
    not CRON or os.geteuid() != 0, reason="needs cron, and root to start it apart from the machine's own"
)
def test_a_real_cron_daemon(night: Night) -> None:
    """Runs the README's first line every minute: it is silent, and mails one line when the shards are missing."""
    sbin = night.srv / "sbin"
    sbin.mkdir()
    shutil.copy(CRON, sbin)
    (sbin / "sendmail").write_text(f"#!/bin/sh\ncat >> {night.srv}/mail\n")
    (sbin / "sendmail").chmod(0o755)
    text = night.here(blocks("crontab")[0])
    job = re.search(r"^15 4( .*)$", text, re.M)[1]
    fails = job.replace("events/", "missing/")
    settings = text.split("\n\n")[0]
    marks = [f"* *{line}; echo $? > {night.srv}/{name}" for line, name in ((job, "status"), (fails, "failed"))]
    (night.srv / "crontab").write_text("\n".join([settings, *marks, ""]))
    command = ["unshare", "--mount", "sh", "-c", CRON_NAMESPACE, "sh", night.srv]
    with subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL) as process:
        try:
            assert wait_for(lambda: (night.srv / "failed").exists() and (night.srv / "mail").exists(), 100)
            assert wait_for((night.srv / "status").exists)
            time.sleep(1)  # for a mail that should not come
        finally:
            os.killpg(process.pid, signal.SIGKILL)
    assert ((night.srv / "status").read_text(), (night.srv / "failed").read_text()) == ("0\n", "1\n")
    assert list(night.loader.table().values()) == [2]
    head, _, body = (night.srv / "mail").read_text().partition("\n\n")
    assert head.count("Subject:") == 1
    assert "To: data-team@example.com" in head
    assert re.fullmatch(r"Error: .*/missing/.*\.json\.gz: No such file or directory\n", body)


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze to check the units")
def test_the_systemd_units_in_the_readme(night: Night) -> None:
    service, timer = blocks("ini")
    command = re.search(r"ExecStart=/bin/sh -c '(.*)'", service)[1].replace("$$", "$").replace("%%", "%")
    expected = night.crontab()[1][0].replace("\\%", "%").split("&& ")[1]
    assert night.here(command) == expected
    (night.srv / "load-active-users.service").write_text(night.here(service))
    (night.srv / "load-active-users.timer").write_text(timer)
    units = sorted(night.srv.glob("load-active-users.*"))
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", *units], capture_output=True, text=True)
    assert [line for line in done.stderr.splitlines() if "load-active-users" in line] == []
    assert done.returncode == 0


# -- The view


@given(st.lists(st.tuples(st.integers(0, 70), st.sets(st.sampled_from("abcdef"), min_size=1)), max_size=30))
@example([(0, {"a"}), (7, {"a"}), (28, {"a"}), (29, {"b"})])
@example([(0, {"a"}), (6, {"a"}), (33, {"a"})])
@example([(0, {"a"}), (27, {"b"}), (28, {"b"})])
def test_weekly_and_monthly_active_users(visits: list[tuple[int, set[str]]]) -> None:
    """Against a set of users a window. The last dates that there are included."""
    for first in (date(2020, 1, 1), date(9999, 12, 31) - timedelta(70)):
        active: dict[int, set[str]] = {}
        for day, users in visits:
            active.setdefault(day, set()).update(users)
        with closing(sqlite3.connect(":memory:")) as db:
            db.executescript((ROOT / "schema.sql").read_text())
            for day, users in active.items():
                text = str(first + timedelta(day))
                db.execute("INSERT INTO active_user_table VALUES (?, ?)", (text, len(users)))
                db.executemany("INSERT INTO active_user VALUES (?, ?)", [(text, user) for user in users])
            rows = db.execute("SELECT * FROM active_user_trend ORDER BY date").fetchall()
        expected = []
        for day, users in sorted(active.items()):
            week, month = (len(set().union(*(active.get(day - n, ()) for n in range(size)))) for size in (7, 28))
            row = (len(users), week, month, round(len(users) / month, 4), day - min(active) + 1)
            expected.append((str(first + timedelta(day)), *row))
        assert rows == expected


# -- Live


class Live:
    """A loader at the end of a pipe."""

    def __init__(self, loader: Loader, *args: object) -> None:
        self.loader = loader
        self.process = subprocess.Popen(
            loader.command("--commit-every", 1, *args, "-"),
            cwd=loader.directory,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def write(self, data: bytes) -> None:
        self.process.stdin.write(data)
        self.process.stdin.flush()

    def users(self) -> list[str]:
        try:
            return [user for (user,) in self.loader.query("SELECT user_pseudo_id FROM active_user ORDER BY 1")]
        except sqlite3.OperationalError as error:
            assert "no such table" in str(error)
            return []

    def await_users(self, *users: str) -> None:
        assert wait_for(lambda: self.users() == list(users), 10), self.users()

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=30)
        return self.process.returncode, out.decode(), err.decode()


@pytest.fixture
def live(loader: Loader) -> Iterator[Callable[..., Live]]:
    started = []

    def start(*args: object) -> Live:
        started.append(Live(loader, *args))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.communicate()


def test_a_pipe_is_committed_as_it_goes(live: Callable[..., Live]) -> None:
    pipe = live()
    pipe.write(lines(event("a")))
    pipe.await_users("a")  # also when the pipe goes quiet
    line = lines(event("b"))
    pipe.write(lines(event("c")) + line[:50])
    pipe.await_users("a", "c")  # a partial line waits for its rest
    pipe.write(line[50:])
    pipe.await_users("a", "b", "c")
    pipe.process.stdin.write(lines(event("d"))[:-1])  # at its end it needs no newline
    status, out, err = pipe.end()
    assert (status, err) == (0, "")
    assert out.splitlines()[-1] == "4 lines → 4 engagement events → 4 active → 4 new user-days"
    assert pipe.users() == ["a", "b", "c", "d"]
    log = pipe.loader.query("SELECT lines, active_events, added FROM load_log")
    assert log == [(4, 4, 4)]  # one row a load


@pytest.mark.parametrize("producer_ends", [False, True])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_commits_what_was_read(live: Callable[..., Live], number: int, producer_ends: bool) -> None:
    pipe = live("--commit-every", 1000, "--format", "json")
    pipe.write(lines(event("a")) + lines(event("b"))[:-2])
    time.sleep(1.5)
    assert pipe.users() == []
    pipe.process.send_signal(number)
    if producer_ends:  # as with Ctrl-C, which ends both
        pipe.process.stdin.close()
        pipe.process.stdin = None
    assert pipe.process.wait(10) == 0
    _, out, err = pipe.end()
    length = len(lines(event("b"))) - 2
    assert err == f"the last line had not ended: its {length} bytes were left out\n"
    assert json.loads(out)["dates"] == [{"date": "2019-12-30", "active_user_count": 1, "added": 1}]
    assert pipe.users() == ["a"]


def test_a_signal_while_the_pipe_floods(live: Callable[..., Live], loader: Loader) -> None:
    flood = subprocess.Popen(["yes", lines(event("a")).decode().strip()], stdout=subprocess.PIPE)
    with subprocess.Popen(
        loader.command("-q", "--commit-every", 1, "-"), stdin=flood.stdout, cwd=loader.directory
    ) as p:
        flood.stdout.close()
        wait_for(loader.db.exists)
        p.terminate()
        assert p.wait(10) == 0
    flood.wait(10)
    ((total, active),) = loader.query("SELECT lines, active_events FROM load_log")
    assert total == active > 1000


def test_a_signal_before_anything_came(loader: Loader) -> None:
    """Also while a named pipe waits to be opened at its other end."""
    os.mkfifo(loader.directory / "pipe")
    with subprocess.Popen(loader.command("-q", "--commit-every", 1, "pipe"), cwd=loader.directory) as process:
        time.sleep(1)
        process.terminate()
        assert process.wait(10) == 0


def test_bad_records_in_a_pipe(live: Callable[..., Live]) -> None:
    pipe = live("--max-bad-records", 2, "--rejects", "bad.jsons")
    pipe.write(b"one\n" + lines(event("a")))
    pipe.await_users("a")
    rejects = pipe.loader.directory / "bad.jsons"
    assert rejects.read_bytes() == b"one\n"
    pipe.write(b"two\n" + lines(event("b")))
    pipe.await_users("a", "b")
    assert rejects.read_bytes() == b"one\ntwo\n"
    pipe.write(lines(event("c")) + b"three\n")
    status, out, err = pipe.end()
    assert (status, out) == (1, "")
    reason = "not one JSON object, {...}: one event a line is expected"
    assert err.splitlines() == [
        f"-:1: {reason}",
        f"-:3: {reason}",
        f"-:6: {reason}",
        "Error: bad records: 3, more than --max-bad-records 2; nothing was loaded since the last commit",
    ]
    assert pipe.users() == ["a", "b"]
    assert rejects.read_bytes() == b"one\ntwo\nthree\n"


def test_the_first_twenty_bad_records_of_a_pipe(live: Callable[..., Live]) -> None:
    pipe = live("--max-bad-records", 99)
    for number, user in enumerate("abc"):
        pipe.write(b"bad\n" * 15 + lines(event(user)))
        pipe.await_users(*"abc"[: number + 1])
    pipe.process.stdin.close()
    pipe.process.stdin = None
    status, _, err = pipe.end()
    assert status == 0
    said = err.splitlines()
    assert [line.split(": ")[0] for line in said[:15]] == [f"-:{n}" for n in range(1, 16)]
    assert [line.split(": ")[0] for line in said[15:20]] == [f"-:{n}" for n in range(17, 22)]
    assert said[20:] == ["and 10 more bad records", "and 15 more bad records"]


def test_a_reader_and_a_pipe_at_once(live: Callable[..., Live]) -> None:
    """Neither has to wait long: while a reader holds its lock, what comes is not lost, and committed later."""
    pipe = live()
    pipe.write(lines(event("a")))
    pipe.await_users("a")
    with closing(sqlite3.connect(pipe.loader.db, isolation_level=None)) as db:
        db.execute("BEGIN")
        assert db.execute("SELECT count(*) FROM active_user").fetchone() == (1,)
        pipe.write(lines(event("b")))
        time.sleep(1.5)
        pipe.write(lines(event("c")))
        assert db.execute("SELECT count(*) FROM active_user").fetchone() == (1,)
        db.execute("COMMIT")
    pipe.await_users("a", "b", "c")


def test_the_memory_of_a_live_load_stays_flat(live: Callable[..., Live]) -> None:
    def peak() -> int:
        status = Path(f"/proc/{pipe.process.pid}/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])

    pipe, sizes = live("--max-bad-records", 10**9, "-q"), []
    for number in range(6):
        pipe.write(b"".join(lines(event(f"{number}-{n}"), b"x" * 500) for n in range(3000)))
        expected = 3000 * (number + 1)
        assert wait_for(lambda expected=expected: len(pipe.users()) == expected, 20)
        sizes.append(peak())
    assert sizes[-1] - sizes[1] < 4096, sizes


def test_live_options_that_contradict_each_other(loader: Loader) -> None:
    for option in ("--replace", "--dry-run"):
        said = loader.refuse("--commit-every", 5, option, "-", status=2)
        assert "--commit-every can't be combined with --replace or --dry-run" in said
    assert "Invalid value for '--commit-every'" in loader.refuse("--commit-every", 0, "-", status=2)


def test_a_compressed_pipe_is_not_live(loader: Loader) -> None:
    said = loader.refuse("--commit-every", 1, "-", input=b"\x1f\x8b" + bytes(100))
    assert said == "Error: -:1: a compressed pipe can't be committed as it comes; put zcat before it, or zstdcat\n"


def test_files_can_be_committed_in_parts_too(loader: Loader, large: Path) -> None:
    report = loader.load("--commit-every", 1, *[large] * 20)
    assert report["lines"] == 2_000_000
    assert loader.query("SELECT lines, added FROM load_log") == [(2_000_000, 64)]
