"""What the README tells one to type, typed as it stands there."""

import gzip
import io
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, date, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import oracle
import pytest
from helpers import (
    DAY,
    NOON,
    NOT_AN_OBJECT,
    README,
    ROOT,
    SAMPLE,
    SAMPLE_TABLE,
    Loader,
    Process,
    children,
    environment,
    event,
    free_port,
    lines,
    noon,
    readme_blocks,
    wait_for,
)
from PIL import Image
from servers import PostgresLoader, needs_postgres

REPORT, HELP = readme_blocks("text")


def the_block(language: str, start: str) -> str:
    (block,) = [block for block in readme_blocks(language) if block.startswith(start)]
    return block


def inline(start: str) -> str:
    """Return the command in the text that starts so."""
    (command,) = re.findall(rf"`({re.escape(start)}[^`]*)`", README)
    return str(command)


class Clone:
    """A clone of the project; the programs in its .venv are those of these tests."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "clone"
        shutil.copytree(ROOT / "data", self.directory / "data")
        for name in ("load_active_users.py", "schema.sql"):
            shutil.copy(ROOT / name, self.directory)
        (self.directory / "tests").symlink_to(ROOT / "tests")
        programs = self.directory / ".venv" / "bin"
        programs.mkdir(parents=True)
        python = [sys.executable]
        for name, start in (("python", python), ("dask", [*python, "-m", "dask"])):
            (programs / name).write_text(f'#!/bin/sh\nexec {shlex.join(start)} "$@"\n')
            (programs / name).chmod(0o755)
        self.loader = Loader(self.directory)

    def run(self, command: str, **env: str) -> tuple[int, str, str]:
        """Return the exit status and the outputs of a command."""
        done = subprocess.run(
            ["sh", "-c", command],
            cwd=self.directory,
            env=environment({"COLUMNS": "80", **env}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )
        return done.returncode, done.stdout, done.stderr


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    return Clone(tmp_path)


class Night:
    """The README's machine, under another /srv.

    It has a clone of the project, and shards of the last five days: a shard has as many
    users as days have passed since. The crontab's commands are named by what they do.
    """

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
                names = (f"{days}-{shard}-{n}" for n in range(days))
                users = [event(name, NOON - days * DAY) for name in names]
                self.shard(days, shard, gzip.compress(lines(*users)))
        self.settings: dict[str, str] = {}
        commands = []
        for line in self.here(readme_blocks("crontab")[0]).splitlines():
            if match := re.fullmatch(r"(\w+)=(.*)", line):
                self.settings[match[1]] = match[2]
            elif line and not line.startswith("#"):
                commands.append(line.split(None, 5)[5])
        self.load, self.check, self.rotate, self.forget = commands

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
        """Run a command as cron does; return the exit status and the outputs.

        Cron uses sh, hardly any environment, another directory, no terminal, and reads
        % in its own way.
        """
        command = re.sub(r"(?<!\\)%.*", "", command).replace("\\%", "%")
        assert "%F" in command or "%" not in command
        environment = {"HOME": "/", "LOGNAME": "root"}
        environment |= {"SHELL": "/bin/sh", "PATH": "/usr/bin:/bin"}
        done = subprocess.run(
            ["/bin/sh", "-c", command],
            cwd="/",
            env={**environment, **self.settings},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            start_new_session=True,
        )
        return done.returncode, done.stdout.decode(), done.stderr.decode()

    def assert_drawn(self) -> None:
        """Compare the picture with one of the same database."""
        picture = (self.srv / "active_users.png").read_bytes()
        assert picture == self.loader.draw("png")

    def counts(self) -> list[int]:
        return list(self.loader.table().values())

    def missing(self) -> str:
        """Return what is said where there are no shards at all."""
        name = f"{self.srv}/events/*.json.gz"
        return f"Error: {name}: No such file or directory\n"


@pytest.fixture
def night(tmp_path: Path) -> Night:
    return Night(tmp_path)


NEEDS_SQLITE3 = pytest.mark.skipif(
    not shutil.which("sqlite3"), reason="needs the command sqlite3, as the crontab"
)


# -- The README as a whole


def blocks_and_tests() -> dict[str, list[tuple[str, Callable[..., None]]]]:
    """Return by language how each block starts, and the test that runs it."""
    load = ".venv/bin/python load_active_users.py"
    return {
        "sh": [("python3 -m venv", test_the_two_commands_of_the_start)] * 2,
        "text": [
            ("date ", test_the_two_commands_of_the_start),
            ("Usage: ", test_the_help_in_the_readme),
        ],
        "console": [
            ("bq extract ", test_the_shell_hands_bigquery_what_is_meant),
            ("bq query ", test_the_shell_hands_bigquery_what_is_meant),
            (f"{load} --db google.db", test_a_rule_closer_to_that_of_google),
            ("sqlite3 /srv/analytics.db", test_files_that_were_never_loaded),
            ("some-producer | ", test_the_live_command),
            (f"{load} --db postgresql:", test_where_the_password_belongs),
            (f"{load} --incremental 'gs:", test_shards_of_a_bucket),
            (".venv/bin/dask scheduler", test_a_cluster),
        ],
        "crontab": [("MAILTO=", test_the_crontab_in_the_readme)],
        "sql": [
            ("SELECT date, seven_day_average", test_the_trend),
            ("SELECT date, active_user_count, lag", test_a_night_is_missing),
            ("SELECT loaded_at, ", test_the_last_loads),
            ("UPDATE active_user", test_a_person_is_deleted),
        ],
    }


def test_there_is_a_test_for_every_block() -> None:
    languages = set(re.findall(r"^```(\w+)$", README, re.MULTILINE))
    tests = blocks_and_tests()
    assert languages == tests.keys()
    for language, rows in tests.items():
        for block, (start, _) in zip(readme_blocks(language), rows, strict=True):
            assert block.startswith(start)


def test_what_it_links_to_is_there() -> None:
    headings = re.findall(r"^## (.*)$", README, re.MULTILINE)
    anchors = {f"#{heading.lower().replace(' ', '-')}" for heading in headings}
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    tests = [f"tests/{name}" for name in re.findall(r"`(\w+\.py)`", README)]
    assert len(links) >= 3
    assert len(tests) >= 10
    named = {*links, *tests} - anchors
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_options_in_the_text_are_options() -> None:
    text, _, _ = README.partition(HELP)
    options = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", HELP))
    named = set(re.findall(r"`(--[a-z][a-z-]+)", text))
    assert len(named) >= 8
    assert named - options == set()


def test_the_help_in_the_readme(tmp_path: Path) -> None:
    """It is as wide as on a terminal, and not as click's own runner has it."""
    done = Loader(tmp_path).run("--help", env={"COLUMNS": "80"}, process=True)
    assert (done.returncode, done.stdout.decode(), done.stderr) == (0, HELP, b"")


def pixels(png: bytes) -> list[int]:
    """Return the shades of grey of a picture that is made much smaller."""
    small = Image.open(io.BytesIO(png)).convert("L").resize((60, 30))
    return list(small.tobytes())


def test_the_picture_in_the_readme(tmp_path: Path) -> None:
    """It is that of the sample. Another version of matplotlib may draw other
    letters."""
    assert re.search(r"!\[[^]]{20,}\]\(data/active_users\.png\)", README)
    loader = Loader(tmp_path)
    loader.load(SAMPLE)
    shown = (ROOT / "data" / "active_users.png").read_bytes()
    pairs = zip(pixels(shown), pixels(loader.draw("png")), strict=True)
    assert sum(abs(one - other) > 40 for one, other in pairs) < 18  # of 1800


# -- Start


def test_the_two_commands_of_the_start(clone: Clone) -> None:
    """Here are their last steps; .ci/run runs all of them, in a new .venv."""
    install = "python3 -m venv .venv && .venv/bin/pip install -q -r requirements.txt"
    load, test = (block.removeprefix(f"{install} && ") for block in readme_blocks("sh"))
    assert test == ".venv/bin/python -m pytest -q\n"
    assert clone.run(load) == (0, REPORT, "")
    again = re.sub(r"(\d+)  █", "0  █", REPORT).replace("(64 new)", "(0 new)")
    status, out, err = clone.run(load)
    assert (status, out.split(), err) == (0, again.split(), "")
    picture = clone.directory / "data" / "active_users.png"
    picture.unlink()
    status, _, err = clone.run(f"{load.strip()} {inline('--plot ')}")
    assert (status, err) == (0, "")
    assert picture.read_bytes() == clone.loader.draw("png")


# -- Getting the events out of BigQuery


def test_the_shell_hands_bigquery_what_is_meant(clone: Clone) -> None:
    """A stand-in for bq shows its arguments: bq itself needs an account."""
    bq = clone.directory / "bq"
    bq.write_text("#!/bin/sh\nprintf '<%s>' \"$@\"\n")
    bq.chmod(0o755)
    path = f"{clone.directory}:/usr/bin:/bin"
    status, out, err = clone.run(the_block("console", "bq extract"), PATH=path)
    uri = "gs://my-bucket/events/2020-01-05-*.json.gz"
    assert (status, err) == (0, "")
    assert re.findall("<([^>]*)>", out) == [
        "extract",
        "--destination_format",
        "NEWLINE_DELIMITED_JSON",
        "--compression",
        "GZIP",
        "my-project:analytics_123456789.events_20200105",
        uri,
    ]
    status, out, err = clone.run(the_block("console", "bq query"), PATH=path)
    assert (status, err) == (0, "")
    command, option, sql = re.findall("<([^>]*)>", out)
    assert (command, option) == ("query", "--use_legacy_sql=false")
    expected = f"""
        EXPORT DATA OPTIONS (uri = '{uri}', format = 'JSON', compression = 'GZIP',
            overwrite = true) AS
        SELECT event_name, event_timestamp, event_params, user_pseudo_id
        FROM `my-project.analytics_123456789.events_20200105`
        WHERE event_name = 'user_engagement'"""
    assert sql.split() == expected.split()
    load = ".venv/bin/python load_active_users.py --incremental"
    assert "gs://my-bucket/events/*.json.gz" in the_block("console", f"{load} 'gs:")


# -- What counts as active


def test_a_rule_closer_to_that_of_google(clone: Clone) -> None:
    load = ".venv/bin/python load_active_users.py"
    command = the_block("console", f"{load} --db google.db")
    status, _, err = clone.run(command)
    assert (status, err) == (0, "")
    clone.loader.db = clone.directory / "google.db"
    rule = oracle.Rule(names=("*",), least=1, globs=("*",))
    assert clone.loader.all_users() == oracle.read(SAMPLE.read_bytes(), rule)[0]
    assert list(clone.loader.table().values()) == [11, 40, 24]
    status, out, err = clone.run(re.sub(r"--event-name \S+ ", "", command))
    assert (status, out) == (1, "")
    assert "was filled under the rule" in err


def test_a_correction(clone: Clone) -> None:
    """The date in the README has exactly the users of its new export afterwards."""
    (found,) = re.findall(r"`(--replace --dates (\S+))`", README)
    options, day = found
    noon = NOON + (date.fromisoformat(day) - date(2019, 12, 30)).days * DAY
    spam = [event(user, noon) for user in ("a", "spam")] + [event("spam", noon + DAY)]
    loader = Loader(clone.directory)
    loader.load(loader.file(lines(*spam)))
    new = loader.file(lines(event("a", noon), event("b", noon)))
    loader.load(*options.split(), new)
    next_day = str(date.fromisoformat(day) + timedelta(1))
    assert loader.all_users() == {day: {"a", "b"}, next_day: {"spam"}}


# -- Every night


ALL_NIGHTS = [10, 8, 6, 4, 2]


def test_the_crontab_in_the_readme(night: Night) -> None:
    """Each shard is read once; one that comes late, or again, is read then."""
    assert night.settings["LOAD_ACTIVE_USERS_DB"] == str(night.loader.db)
    for _ in range(2):
        assert night.run(night.load) == (0, "", "")
        assert night.counts() == ALL_NIGHTS
    late = lines(event("late", NOON - 3 * DAY))
    night.shard(3, 2, gzip.compress(late))
    assert night.run(night.load) == (0, "", "")
    assert night.counts() == [10, 8, 7, 4, 2]
    log = night.loader.query("SELECT lines, skipped_files FROM load_log ORDER BY rowid")
    assert log == [(30, 0), (0, 10), (1, 10)]
    night.assert_drawn()


@NEEDS_SQLITE3
def test_a_mail_if_a_day_has_no_users(night: Night) -> None:
    day = datetime.now(UTC).date() - timedelta(2)
    assert night.run(night.load) == (0, "", "")
    assert night.run(night.check) == (0, f"no users|{day}\n", "")
    users = lines(event("a", noon(str(day))))
    night.shard(2, 2, gzip.compress(users))
    assert night.run(night.load) == (0, "", "")
    assert night.run(night.check) == (0, "", "")


def test_old_shards_go(night: Night) -> None:
    old, young = night.shard(62, 0, b""), night.shard(58, 0, b"")
    for days, path in ((62, old), (58, young)):
        os.utime(path, (time.time() - days * 86_400,) * 2)
    assert night.run(night.rotate) == (0, "", "")
    assert (old.exists(), young.exists()) == (False, True)
    assert len(list((night.srv / "events").iterdir())) == 11


@NEEDS_SQLITE3
def test_the_crontab_forgets_users_and_keeps_their_counts(night: Night) -> None:
    assert night.run(night.load) == (0, "", "")
    today = event("today", int(time.time() * 10**6))
    night.loader.load("--db", night.loader.db, night.loader.file(lines(today)))
    assert night.run(night.forget) == (0, "", "")
    assert night.counts() == [*ALL_NIGHTS, 1]
    assert night.loader.query("SELECT user_pseudo_id FROM active_user") == [("today",)]
    assert night.run(night.load) == (0, "", "")
    assert night.counts() == [*ALL_NIGHTS, 1]


def test_shards_that_retention_has_deleted(night: Night) -> None:
    """Nothing happens to the counts."""
    assert night.run(night.load) == (0, "", "")
    night.keep_only(1, 2)
    assert night.run(night.load) == (0, "", "")
    assert night.counts() == ALL_NIGHTS
    night.assert_drawn()


def test_the_very_first_night(night: Night) -> None:
    """There is nothing to load: one line says so."""
    night.keep_only()
    assert night.run(night.load) == (1, "", night.missing())
    assert [path.name for path in night.srv.iterdir() if path.is_file()] == []


def test_two_runs_overlap(night: Night) -> None:
    """Both succeed."""
    both = f"( {night.load} ) & ( {night.load} ); status=$?; wait $!"
    both += "; exit $(($? + status))"
    assert night.run(both) == (0, "", "")
    assert night.counts() == ALL_NIGHTS


def test_a_night_without_an_engagement_event_is_told(night: Night) -> None:
    night.keep_only()
    night.shard(1, 0, lines({"event_name": "first_visit"}))
    status, out, err = night.run(night.load)
    what = "none of the lines (1) is an engagement event (user_engagement)"
    assert (status, out, err.count("\n")) == (0, "", 1)
    assert err.startswith(f"Warning: {what}; ")


class Health(BaseHTTPRequestHandler):
    """A server that notes what it is asked for, and answers with one status."""

    asked: list[str]
    status: int

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_response(self.status)
        self.send_header("Content-Length", "3")
        self.end_headers()
        self.wfile.write(b"OK\n")

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def health() -> Iterator[tuple[str, type[Health]]]:
    """The URL of a health check, and what it is asked for."""
    handler = type("Handler", (Health,), {"asked": [], "status": 200})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}", handler
        server.shutdown()


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
def test_the_health_check(night: Night, health: tuple[str, type[Health]]) -> None:
    """It is told the exit status of each line. If it does not answer, curl says so."""
    url, handler = health
    place = "https://health.example.com"
    report = inline("; curl ")
    assert (report.count(place), report.count(" -m 10 ")) == (1, 1)

    def run(command: str, url: str = url) -> tuple[int, str, str]:
        return night.run(command + report.replace(place, url))

    assert run(night.load) == (0, "", "")
    assert run(night.load) == (0, "", "")
    assert night.counts() == ALL_NIGHTS
    night.keep_only()
    assert run(night.load) == (0, "", night.missing())
    assert run(night.rotate) == (0, "", "")
    assert handler.asked == [f"/active-users/{status}" for status in (0, 0, 1, 0)]
    handler.status = 500
    status, out, err = run(night.rotate)
    assert (status, out, err.count("\n")) == (22, "", 1)
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        silent_url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        report = report.replace("-m 10 ", "-m 1 ")
        status, out, err = run(night.rotate, silent_url)
    assert (status, out, err.count("\n")) == (28, "", 1)


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


@pytest.mark.begin_early
@pytest.mark.skipif(
    not CRON or os.geteuid() != 0,
    reason="needs cron, and root to start it apart from the machine",
)
def test_a_real_cron_daemon(night: Night) -> None:
    """It runs the first line every minute, and mails one line when shards are
    missing."""
    sbin = night.srv / "sbin"
    sbin.mkdir()
    shutil.copy(str(CRON), sbin)
    (sbin / "sendmail").write_text(f"#!/bin/sh\ncat >> {night.srv}/mail\n")
    (sbin / "sendmail").chmod(0o755)
    settings = "\n".join(f"{name}={value}" for name, value in night.settings.items())
    fails = night.load.replace("events/", "missing/")
    jobs = ((night.load, "status"), (fails, "failed"))
    each = "* * * * *"
    marks = [f"{each} {job}; echo $? > {night.srv}/{name}" for job, name in jobs]
    (night.srv / "crontab").write_text("\n".join([settings, *marks, ""]))
    command = ["unshare", "--mount", "sh", "-c", CRON_NAMESPACE, "sh", str(night.srv)]
    with Process(command, start_new_session=True, stdout=subprocess.DEVNULL) as process:
        try:
            assert wait_for((night.srv / "failed").exists, 100)
            assert wait_for((night.srv / "status").exists)
            # The children of cron send the mail, if there is any.
            assert wait_for(lambda: not children(process))
        finally:
            os.killpg(process.pid, signal.SIGKILL)
    files = (night.srv / "status", night.srv / "failed")
    assert [file.read_text() for file in files] == ["0\n", "1\n"]
    assert night.counts() == ALL_NIGHTS
    head, _, body = (night.srv / "mail").read_text().partition("\n\n")
    assert head.count("Subject:") == 1
    assert f"To: {night.settings['MAILTO']}" in head
    assert body == night.missing().replace("/events/", "/missing/")


@pytest.mark.skipif(not shutil.which("crontab"), reason="needs crontab, to check it")
def test_cron_takes_the_crontab(tmp_path: Path) -> None:
    (tmp_path / "crontab").write_text(readme_blocks("crontab")[0])
    check = ["crontab", "-n", str(tmp_path / "crontab")]
    done = subprocess.run(check, capture_output=True, text=True)
    if "invalid option" in done.stderr:
        pytest.skip("this crontab can't check")
    assert done.returncode == 0, done.stderr


# -- Tables and queries: the same on both databases


@pytest.fixture
def loader(either: Loader) -> Loader:
    return either


def day_of(number: int) -> str:
    return str(date(2019, 12, 30) + timedelta(number))


def load_days(loader: Loader, *days: int) -> None:
    """Load days, each on the morning after it."""
    for day in days:
        users = lines(*(event(user, NOON + day * DAY) for user in users_of(day)))
        loader.load(loader.file(users))
        newest = "loaded_at = (SELECT max(loaded_at) FROM load_log)"
        morning = morning_after(day)
        loader.execute(f"UPDATE load_log SET loaded_at = '{morning}' WHERE {newest}")


def users_of(day: int) -> set[str]:
    """Return a user who comes on every day, and others who do not."""
    return {"always", *(f"{day}-{number}" for number in range(day % 3))}


def morning_after(day: int) -> str:
    return f"{day_of(day + 1)}T04:15:00Z"


def rows(loader: Loader, query: str) -> list[tuple[Any, ...]]:
    """Return rows as text and numbers, whatever the database has for them."""

    def plain(value: Any) -> Any:
        return value if value is None or isinstance(value, str) else float(value)

    return [tuple(map(plain, row)) for row in loader.query(query)]


def test_the_trend(loader: Loader) -> None:
    days = [*range(8), *range(27, 30)]
    load_days(loader, *days)
    trend = oracle.trend({day_of(day): users_of(day) for day in days})
    expected = [
        (day, average, week, month, stickiness, number)
        for day, _, week, month, stickiness, number, average in trend
    ]
    assert rows(loader, the_block("sql", "SELECT date, seven_day_average")) == expected


def test_a_night_is_missing(loader: Loader) -> None:
    """Two of them are, before the newest date but one."""
    load_days(loader, 1, 2, 5, 6)
    query = the_block("sql", "SELECT date, active_user_count, lag")
    count = {day: len(users_of(day)) for day in (1, 2, 5, 6)}
    assert rows(loader, query) == [
        (day_of(6), count[6], day_of(5), morning_after(6)),
        (day_of(5), count[5], day_of(2), morning_after(5)),
        (day_of(2), count[2], day_of(1), morning_after(2)),
        (day_of(1), count[1], None, morning_after(1)),
    ]
    loader.execute(f"DELETE FROM load_log WHERE loaded_at < '{day_of(5)}'")
    assert rows(loader, query)[-1] == (day_of(1), count[1], None, morning_after(5))


def test_the_last_loads(loader: Loader) -> None:
    load_days(loader, *range(9))
    loader.execute("UPDATE load_log SET seconds = 0.5")
    expected = []
    for day in reversed(range(2, 9)):
        number = len(users_of(day))
        row = (morning_after(day), 0.5, '["events.jsons"]', 0, number, 0)
        # The user who always comes is new on each date.
        expected.append((*row, number, 0))
    assert rows(loader, the_block("sql", "SELECT loaded_at, ")) == expected


@NEEDS_SQLITE3
def test_files_that_were_never_loaded(night: Night) -> None:
    command = night.here(the_block("console", "sqlite3 /srv/analytics.db"))
    command = command.replace("/tmp/loaded", f"{night.srv}/loaded")
    assert night.run(night.load) == (0, "", "")
    assert night.run(command) == (1, "", "")
    path = night.shard(1, 7, b"")
    assert night.run(command) == (0, f"{path}\n", "")


@NEEDS_SQLITE3
def test_a_dashboard_stores_the_trend(night: Night) -> None:
    assert night.run(night.load) == (0, "", "")
    store = night.here(inline("sqlite3 /srv/analytics.db 'BEGIN"))
    for _ in range(2):
        assert night.run(store) == (0, "", "")
    stored = night.loader.query("SELECT * FROM trend ORDER BY date")
    assert stored == night.loader.query("SELECT * FROM active_user_trend ORDER BY date")
    assert night.run(night.load) == (0, "", "")


def test_a_person_is_deleted(loader: Loader) -> None:
    """No count and no trend changes, since all the rows have one new id."""
    statement = the_block("sql", "UPDATE active_user")
    (user,) = re.findall(r"user_pseudo_id = '([^']+)'", statement)
    events = [event(user), event(user, NOON + DAY), event("b"), event("b", NOON + DAY)]
    loader.load(loader.file(lines(*events)))
    trend = "SELECT * FROM active_user_trend ORDER BY date"
    before = rows(loader, trend)
    loader.execute(statement)
    assert rows(loader, trend) == before
    found = loader.query("SELECT user_pseudo_id, count(*) FROM active_user GROUP BY 1")
    (deleted,) = (name for name, _ in found if name != "b")
    assert deleted.startswith("deleted-")
    assert sorted(found) == [("b", 2), (deleted, 2)]


# -- Live


def test_the_live_command(clone: Clone) -> None:
    """Its pipe has a producer that ends."""
    command = the_block("console", "some-producer")
    clone.loader.file(lines(event("a"), b"bad", event("b")))
    status, _, err = clone.run(command.replace("some-producer", "cat events.jsons"))
    assert (status, err) == (0, f"-:2: {NOT_AN_OBJECT}\n")
    assert clone.loader.users() == ["a", "b"]
    assert (clone.directory / "bad.jsons").read_bytes() == b"bad\n"


# -- Past one machine

of_postgres = pytest.mark.parametrize(
    "either", [pytest.param("PostgreSQL", marks=needs_postgres)], indirect=True
)


def here(loader: PostgresLoader, command: str) -> str:
    """Return a command of the README, for this server."""
    place = "postgresql://loader@db.example.com/analytics"
    assert command.count(place) == 1
    return command.replace(place, loader.url.replace(":p%40ss@", "@"))


@of_postgres
@pytest.mark.parametrize("place", ["~/.pgpass", "PGPASSWORD"])
def test_where_the_password_belongs(
    clone: Clone, loader: PostgresLoader, place: str
) -> None:
    assert f"`{place}`" in README
    python = ".venv/bin/python"
    load = the_block("console", f"{python} load_active_users.py --db postgresql:")
    env = {"HOME": str(clone.directory)}
    if place == "PGPASSWORD":
        env[place] = "p@ss"
    else:
        (clone.directory / ".pgpass").write_text("*:*:*:loader:p@ss\n")
        (clone.directory / ".pgpass").chmod(0o600)
    assert clone.run(here(loader, load), **env) == (0, REPORT, "")
    assert loader.table() == SAMPLE_TABLE


@of_postgres
@pytest.mark.skipif(not shutil.which("psql"), reason="needs psql")
def test_psql_forgets_users_and_keeps_their_counts(
    clone: Clone, loader: PostgresLoader
) -> None:
    now = int(time.time()) * 10**6
    old = lines(*(event(f"{n}", now - n * DAY) for n in (398, 403)))
    loader.load(loader.file(old))
    before = loader.query("SELECT * FROM active_user_table ORDER BY date")
    status, out, err = clone.run(here(loader, inline("psql -c ")), PGPASSWORD="p@ss")
    assert (status, out, err) == (0, "DELETE 1\n", "")
    assert loader.query("SELECT user_pseudo_id FROM active_user") == [("398",)]
    assert loader.query("SELECT * FROM active_user_table ORDER BY date") == before


def test_shards_of_a_bucket(clone: Clone) -> None:
    """A directory stands for the bucket: it has a URL of fsspec too."""
    load = ".venv/bin/python load_active_users.py --incremental"
    command = the_block("console", f"{load} 'gs:")
    events = clone.directory / "events"
    events.mkdir()
    shards = {"05-000000000000": "a", "05-000000000001": "b", "06-000000000000": "c"}
    for name, user in shards.items():
        path = events / f"2020-01-{name}.json.gz"
        path.write_bytes(lines(event(user)))
    url = f"file://{clone.directory}"
    status, _, err = clone.run(command.replace("gs://my-bucket", url))
    assert (status, err) == (0, "")
    assert clone.loader.users() == ["a", "b", "c"]


def test_a_cluster(clone: Clone) -> None:
    block = the_block("console", ".venv/bin/dask scheduler")
    port = free_port()
    block = block.replace("scheduler:8786", f"127.0.0.1:{port}")
    block = block.replace("s3://my-bucket", f"file://{clone.directory}")
    scheduler, worker, load = block.splitlines()
    scheduler += f" --host 127.0.0.1 --port {port} --no-dashboard"
    worker += " --host 127.0.0.1 --no-dashboard --local-directory ."
    events = clone.directory / "events"
    events.mkdir()
    (events / "2020-01-05-0.json").write_bytes(lines(event("a"), event("b")))
    log = clone.directory / "log"
    processes = []
    try:
        with log.open("ab") as output:
            for command in (scheduler, worker):
                process = Process(
                    ["sh", "-c", f"exec {command}"],
                    cwd=clone.directory,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                )
                processes.append(process)
        assert wait_for(lambda: b"Registered to" in log.read_bytes()), log.read_text()
        status, _, err = clone.run(load)
    finally:
        for process in reversed(processes):
            process.terminate()
            process.wait(60)
    assert (status, err) == (0, "")
    assert clone.loader.users() == ["a", "b"]


# -- How fast


def test_the_benchmark(clone: Clone) -> None:
    """Here is its quickest part. It fails if counts disagree."""
    command = inline(".venv/bin/pip install duckdb && ").partition(" && ")[2]
    status, out, err = clone.run(f"{command} --only startup")
    assert (status, err.count("round")) == (0, 4)
    assert out.startswith("| input | contender | seconds |")
    assert "\n| start-up: the sample | this loader |" in out


# -- Bad records


def test_bad_records(clone: Clone) -> None:
    """The rest is loaded; what was bad is loaded once it is correct."""
    bad = lines(event("a"), b"[]", event("b", msec="long"))
    (clone.directory / "events.jsons").write_bytes(bad)
    load = ".venv/bin/python load_active_users.py"
    assert clone.run(f"{load} events.jsons")[0] == 1
    assert not clone.loader.db.exists()
    (options,) = re.findall(r"`(--max-bad-records \d+ --rejects bad\.jsons)`", README)
    assert clone.run(f"{load} {options} events.jsons")[0] == 0
    assert clone.loader.users() == ["a"]
    rejects = clone.directory / "bad.jsons"
    assert rejects.read_bytes() == b"".join(bad.splitlines(keepends=True)[1:])
    rejects.write_bytes(lines(event("b", msec="3000")))
    assert clone.run(f"{load} bad.jsons")[0] == 0
    assert clone.loader.users() == ["a", "b"]
