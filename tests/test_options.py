"""The command line and the environment: usage errors, outputs that clash with files."""

import itertools
import os
import shutil
import sqlite3
import subprocess
from contextlib import closing
from pathlib import Path

import click
import pytest
from helpers import (
    AS_ROOT,
    NOT_AN_OBJECT,
    OTHER_OPTIONS,
    SAMPLE,
    SAMPLE_TABLE,
    Loader,
    event,
    lines,
    other_rule,
    usage,
)

import load_active_users

# -- The environment

GOOD_ROW = lines(event("a"))
BAD_AND_GOOD = lines(event("a"), event("b", event_name="b c"), b"bad")
FROM_ENVIRONMENT: dict[str, tuple[str, list[str], list[str], bytes]] = {
    # the value there, the same on the command line, more of that, the events
    "db": ("x.db", ["--db", "x.db"], [], GOOD_ROW),
    "timezone": ("UTC", ["--timezone", "UTC"], [], GOOD_ROW),
    "event_name": (
        "page_view\nb c",
        ["--event-name", "page_view", "--event-name", "b c"],
        ["--max-bad-records", "1"],
        BAD_AND_GOOD,
    ),
    "min_engagement_msec": ("3001", ["--min-engagement-msec", "3001"], [], GOOD_ROW),
    "valuable_event": (
        "engagement time\nx_*",
        ["--valuable-event", "engagement time", "--valuable-event", "x_*"],
        [],
        GOOD_ROW,
    ),
    "dates": ("2020-01-01..", ["--dates", "2020-01-01.."], [], GOOD_ROW),
    "replace": ("1", ["--replace"], ["--dates", "2019-12-30..2019-12-31"], GOOD_ROW),
    "max_bad_records": ("1", ["--max-bad-records", "1"], [], BAD_AND_GOOD),
    "rejects": ("bad.jsons", ["--rejects", "bad.jsons"], [], BAD_AND_GOOD),
    "validate": ("true", ["--validate"], [], GOOD_ROW + b"{,}\n"),
    "workers": ("0", ["--workers", "0"], [], GOOD_ROW),
    "cluster": ("tcp://x:1", ["--cluster", "tcp://x:1"], [], GOOD_ROW),
    "commit_every": ("5", ["--commit-every", "5"], ["--dry-run"], GOOD_ROW),
    "incremental": ("1", ["--incremental"], [], GOOD_ROW),
    "dry_run": ("1", ["--dry-run"], [], GOOD_ROW),
    "format": ("csv", ["--format", "csv"], [], GOOD_ROW),
    "plot": ("users.svg", ["--plot", "users.svg"], [], GOOD_ROW),
    "quiet": ("yes", ["--quiet"], [], GOOD_ROW),
}
OPTIONS = [
    str(option.name)
    for option in load_active_users.main.params
    if isinstance(option, click.Option) and option.name != "version"
]


def outcome(
    directory: Path, args: list[str], data: bytes, env: dict[str, str]
) -> tuple[object, ...]:
    """Return all that two equal loads leave in an empty directory, but for the time."""
    directory.mkdir()
    loader = Loader(directory)
    is_cluster = "cluster" in str([*args, *env]).lower()  # can't be had with "-"
    source = "-" if is_cluster else loader.file(data)
    both = [loader.run(*args, source, env=env) for _ in range(2)]
    names = sorted(path.name for path in directory.iterdir())
    log = []
    if loader.db.exists():
        log = [row[3:] for row in loader.query("SELECT * FROM load_log")]
    rejects = directory / "bad.jsons"
    bad = rejects.read_bytes() if rejects.exists() else b""
    ends = [(done.returncode, done.stdout, done.stderr) for done in both]
    return *ends, names, log, bad


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "progress"])
def test_every_option_can_come_from_the_environment(tmp_path: Path, name: str) -> None:
    """The outcome is the same as on the command line, and another than without."""
    value, args, more, data = FROM_ENVIRONMENT[name]
    there = {f"LOAD_ACTIVE_USERS_{name.upper()}": value}
    expected = outcome(tmp_path / "line", [*args, *more], data, {})
    assert outcome(tmp_path / "environment", more, data, there) == expected
    assert outcome(tmp_path / "without", more, data, {}) != expected


def test_progress_can_come_from_the_environment(loader: Loader) -> None:
    """A bad record draws a bar at once, above which it is printed."""
    name = loader.file(b"bad\n")
    refused = "Error: bad records: 1, more than --max-bad-records 0; nothing was loaded"
    for value in "10":
        env = {"LOAD_ACTIVE_USERS_PROGRESS": value}
        said = loader.refuse(name, env=env)
        assert f"{name}:1: {NOT_AN_OBJECT}\n" in said
        assert said.endswith(f"{refused}\n")
        assert ("%|" in said) == (value == "1")
    said = loader.refuse(name, status=2, env={"LOAD_ACTIVE_USERS_PROGRESS": "x"})
    what = "Invalid value for '--progress': 'x' is not a valid boolean."
    assert said.startswith(usage(what)[:-1])


@pytest.mark.parametrize("name", OPTIONS)
def test_an_empty_variable_is_refused(loader: Loader, name: str) -> None:
    variable = f"LOAD_ACTIVE_USERS_{name.upper()}"
    said = loader.refuse(SAMPLE, status=2, env={variable: ""})
    assert said == usage(f"{variable} must not be empty; unset it, or set a value")


@pytest.mark.parametrize("name", ["event_name", "valuable_event"])
def test_an_empty_line_of_a_variable_is_refused(loader: Loader, name: str) -> None:
    variable = f"LOAD_ACTIVE_USERS_{name.upper()}"
    option = "--" + name.replace("_", "-")
    said = loader.refuse(loader.file(GOOD_ROW), status=2, env={variable: "a\n\nb"})
    assert said == usage(f"Invalid value for '{option}': must not be empty")


def test_the_command_line_goes_before_the_environment(loader: Loader) -> None:
    prefix = "LOAD_ACTIVE_USERS"
    env = {f"{prefix}_TIMEZONE": "Asia/Kolkata", f"{prefix}_EVENT_NAME": "x\ny"}
    args = ["--timezone", "UTC", "--event-name", "user_engagement"]
    loader.load(*args, loader.file(GOOD_ROW), env=env)
    assert loader.last_log("timezone", "event_names") == ("UTC", '["user_engagement"]')


def test_version(loader: Loader) -> None:
    done = loader.run("--version")
    version = f"{load_active_users.__version__}\n".encode()
    assert (done.returncode, done.stdout, done.stderr) == (0, version, b"")


@pytest.mark.parametrize("name", ["VERSION", "HELP"])
def test_version_and_help_do_not_come_from_the_environment(
    loader: Loader, name: str
) -> None:
    for value in ("1", ""):
        loader.load(SAMPLE, env={f"LOAD_ACTIVE_USERS_{name}": value})
        assert loader.table() == SAMPLE_TABLE


# -- Usage errors


NO_ZONES = [
    *["Mars/Base", "/etc/localtime", "../zoneinfo/UTC", "Europe/../UTC", "./UTC"],
    *["Europe", "UTC+3", "localtime", "posixrules", "us/central"],
    *["US//Central", "US/Central/", "Europe/"],
]


@pytest.mark.parametrize("name", NO_ZONES)
def test_a_time_zone_that_is_not_known(loader: Loader, name: str) -> None:
    examples = "names are like US/Central, Europe/Berlin, UTC"
    what = f"{name!r} is not an IANA time zone; {examples}"
    said = loader.refuse("--timezone", name, "x", status=2)
    assert said == usage(f"Invalid value for '--timezone': {what}")


@pytest.mark.parametrize("text", ["0.0", "0.9", "1000001", "5s", "nan", "inf"])
def test_an_interval_that_is_no_number_of_seconds(loader: Loader, text: str) -> None:
    what = f"{text!r} is not a number of seconds from 1 to 1000000"
    said = loader.refuse("--commit-every", text, "x", status=2)
    assert said == usage(f"Invalid value for '--commit-every': {what}")


NO_DATES = [
    *["x", "yesterday", "20200101", "2020-1-1", "2020-01", "2020-01-01..x"],
    *["2020-01-01...2020-01-02", "2020-01-01..2020-01-02..2020-01-03"],
    *["2020-01-01T00:00..2020-01-02", "٢020-01-01", "2020-02-30", "..2020-13-01"],
]


@pytest.mark.parametrize("text", NO_DATES)
def test_dates_that_are_none(loader: Loader, text: str) -> None:
    what = f"{text!r} is not FROM..TO with dates like 2020-01-31"
    for args in (["x"], ["--plot", "x.png"]):
        said = loader.refuse("--dates", text, *args, status=2)
        assert said == usage(f"Invalid value for '--dates': {what}")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("2020-01-02..2020-01-01", "2020-01-02..2020-01-01"),
        ("..1999-12-31", "2000-01-01..1999-12-31"),
    ],
)
def test_dates_that_end_before_they_begin(
    loader: Loader, text: str, shown: str
) -> None:
    said = loader.refuse("--dates", text, "x", status=2)
    assert said == usage(f"Invalid value for '--dates': {shown} ends before it begins")


@pytest.mark.parametrize(
    "dates", [[], ["--dates", "2020-01-01.."], ["--dates", "..2020-01-01"]]
)
def test_replace_needs_both_ends_of_the_dates(loader: Loader, dates: list[str]) -> None:
    said = loader.refuse("--replace", *dates, "x", status=2)
    assert said == usage("--replace needs --dates FROM..TO, the dates that it replaces")


@pytest.mark.parametrize(
    ("option", "empty"),
    [
        *itertools.product(
            ["--db", "--timezone", "--event-name", "--valuable-event", "--dates"],
            ["", " "],
        ),
        *itertools.product(["--rejects", "--plot", "--cluster"], [""]),
    ],
)
def test_an_empty_value_is_refused(loader: Loader, option: str, empty: str) -> None:
    said = loader.refuse(option, empty, "x", status=2)
    assert said == usage(f"Invalid value for '{option}': must not be empty")


MISSPELT = "No such option '--timezon'. Did you mean '--timezone'?"
NO_INTEGER = "'3s' is not a valid integer range."
NO_FORMAT = "'xml' is not one of 'table', 'json', 'csv'."
USAGE_ERRORS = [
    ([], "Missing argument 'EVENTS...'."),
    (["--timezon", "UTC"], MISSPELT),
    (
        ["--min-engagement-msec", "3s"],
        f"Invalid value for '--min-engagement-msec': {NO_INTEGER}",
    ),
    (["--format", "xml"], f"Invalid value for '--format': {NO_FORMAT}"),
    *[
        (
            [option, value],
            f"Invalid value for '{option}': {value} is not in the range {bounds}.",
        )
        for option, value, bounds in [
            ("--min-engagement-msec", "-1", "x>=0"),
            ("--max-bad-records", "-1", "x>=0"),
            ("--workers", "0", "x>=1"),
        ]
    ],
]


@pytest.mark.parametrize(
    ("args", "message"), USAGE_ERRORS, ids=[" ".join(args) for args, _ in USAGE_ERRORS]
)
def test_a_wrong_command_line(loader: Loader, args: list[str], message: str) -> None:
    sources = ["x"] if args else []
    assert loader.refuse(*args, *sources, status=2) == usage(message)


LIVE_REFUSED = {
    "--replace": ["--replace", "--dates", "2020-01-01"],
    "--dry-run": ["--dry-run"],
    "--incremental": ["--incremental"],
    "--cluster": ["--cluster", "tcp://127.0.0.1:1"],
}


@pytest.mark.parametrize("name", LIVE_REFUSED)
def test_options_that_commit_every_refuses(loader: Loader, name: str) -> None:
    args = ["--commit-every", 5, *LIVE_REFUSED[name], SAMPLE]
    what = f"--commit-every can't be combined with {name}"
    assert loader.refuse(*args, status=2) == usage(what)


def test_a_cluster_cannot_read_standard_input(loader: Loader) -> None:
    said = loader.refuse("--cluster", "tcp://127.0.0.1:1", "-", status=2)
    assert said == usage("--cluster can't be combined with standard input")


@pytest.mark.parametrize("url", ["s3://bob:S3CRT@b/x.png", "https:/bob:S3CRT@h/x.png"])
@pytest.mark.parametrize("option", ["--rejects", "--plot"])
def test_an_output_is_a_local_file(loader: Loader, option: str, url: str) -> None:
    """A URL is taken for a path: no such directory is there. Its password is hidden."""
    shown = url.replace("bob:S3CRT@", "")
    directory = f"{loader.directory}/{shown.replace('//', '/').rpartition('/')[0]}"
    what = f"there is no directory {directory}; create it first"
    assert loader.refuse(option, url, SAMPLE) == f"Error: {shown}: {what}\n"


# -- What can be known before the scan


CHANGED = {  # databases, by what makes them so
    "other.db": "DROP TABLE load_log; CREATE TABLE load_log (x)",
    "half.db": "DROP TABLE active_user",
}
OTHER = (
    "its table load_log has no column load_id of type TEXT, as in schema.sql; "
    "choose another --db"
)
HALF = "it has a table active_user_table, but no active_user, as in schema.sql; "
HALF += "choose another --db"
TWO_RULES = other_rule(f"--timezone UTC {OTHER_OPTIONS}")
IRREGULAR = "is not a regular file"
EARLY = [
    (["--timezone", "UTC"], f"active_user_table.db: {TWO_RULES}"),
    (
        ["--rejects", "none/x"],
        "none/x: there is no directory HERE/none; create it first",
    ),
    (["--rejects", "."], ".: is not a regular file; name another"),
    (
        ["--plot", "none/x.png"],
        "none/x.png: there is no directory HERE/none; create it first",
    ),
    (["--plot", "dir.png"], "dir.png: is not a regular file; name another"),
    (["--db", "none/x"], "none/x: there is no directory HERE/none; create it first"),
    (["--db", "dir.png"], "dir.png: is not a regular file; name another"),
    (["--dry-run", "--db", "dir.png"], f"dir.png: {IRREGULAR}; choose another --db"),
    (["--db", "fifo.png"], f"fifo.png: {IRREGULAR}; name another"),
    (["--db", "/dev/null"], f"/dev/null: {IRREGULAR}; name another"),
    (["--dry-run", "--db", "fifo.png"], f"fifo.png: {IRREGULAR}; choose another --db"),
    (["--plot", "fifo.png"], f"fifo.png: {IRREGULAR}; name another"),
    (["--plot", "null.png"], f"null.png: {IRREGULAR}; name another"),
    (["--db", "text"], "text: file is not a database; choose another --db"),
    (["--db", "other.db"], f"other.db: {OTHER}"),
    (["--db", "half.db"], f"half.db: {HALF}"),
]


@pytest.mark.parametrize(
    ("options", "what"), EARLY, ids=[" ".join(o) for o, _ in EARLY]
)
def test_what_can_be_known_is_refused_before_the_scan(
    loader: Loader, options: list[str], what: str
) -> None:
    loader.load(SAMPLE)
    (loader.directory / "dir.png").mkdir()
    os.mkfifo(loader.directory / "fifo.png")
    (loader.directory / "null.png").symlink_to("/dev/null")
    loader.file(b"A text that is longer than the header of a database. " * 9, "text")
    for name, change in CHANGED.items():
        shutil.copy(loader.db, loader.directory / name)
        with closing(sqlite3.connect(loader.directory / name)) as db:
            db.executescript(change)
    before = sorted(loader.directory.iterdir())
    message = f"Error: {what.replace('HERE', str(loader.directory))}\n"
    assert loader.run_without_end(*options) == (1, b"", message)
    assert sorted(loader.directory.iterdir()) == before


WRONG = [
    (
        ["--plot", "x.jpg"],
        "Invalid value for '--plot': 'x.jpg' does not end in .png, .svg, .pdf",
    ),
    (
        ["--plot", ".png"],
        "Invalid value for '--plot': '.png' does not end in .png, .svg, .pdf",
    ),
    (
        ["--commit-every", "nan"],
        "Invalid value for '--commit-every': 'nan' is not a number of seconds "
        "from 1 to 1000000",
    ),
    (["--cluster", ""], "Invalid value for '--cluster': must not be empty"),
    (["--event-name", "\udcff"], "Invalid value for '--event-name': must be UTF-8"),
    (
        ["--valuable-event", "a\udcff"],
        "Invalid value for '--valuable-event': must be UTF-8",
    ),
    (["--db", ""], "Invalid value for '--db': must not be empty"),
    (["--rejects", ""], "Invalid value for '--rejects': must not be empty"),
    (["--plot", ""], "Invalid value for '--plot': must not be empty"),
]


@pytest.mark.parametrize(
    ("options", "what"), WRONG, ids=[" ".join(o) for o, _ in WRONG]
)
def test_a_wrong_command_line_does_not_wait_for_input(
    loader: Loader, options: list[str], what: str
) -> None:
    assert loader.run_without_end(*options) == (2, b"", usage(what))
    assert list(loader.directory.iterdir()) == []


# -- Outputs that clash with other files

NAMES = [  # of the file events.jsons, in the directory HERE
    ("itself", "events.jsons", "events.jsons"),
    ("a longer name", "./events.jsons", "events.jsons"),
    ("a whole name", "HERE/events.jsons", "events.jsons"),
    ("a link", "link", "events.jsons"),
    ("a hard link", "hard", "events.jsons"),
    ("the other way round", "events.jsons", "link"),
    ("standard input", "events.jsons", "-"),
    ("standard input by name", "events.jsons", "/dev/stdin"),
    ("standard input by number", "events.jsons", "/dev/fd/0"),
    ("a descriptor of the process", "events.jsons", "/proc/self/fd/0"),
    ("both by descriptor", "/dev/stdin", "-"),
    ("a URL", "events.jsons", "file://HERE/events.jsons"),
    ("a URL of a link", "events.jsons", "file://HERE/link"),
    ("a URL of the other kind", "events.jsons", "local://HERE/events.jsons"),
    ("a URL with wildcards", "events.jsons", "file://HERE/event?.jsons"),
]


STANDARD_INPUT = {"-", "/dev/stdin", "/dev/fd/0", "/proc/self/fd/0"}


@pytest.mark.parametrize("option", ["--rejects", "--db", "--plot"])
@pytest.mark.parametrize(
    ("output", "source"), [n[1:] for n in NAMES], ids=[n[0] for n in NAMES]
)
def test_an_output_is_never_an_input(
    loader: Loader, option: str, output: str, source: str
) -> None:
    data = lines(b"bad", event("a"))
    name = "events.png" if option == "--plot" else "events.jsons"
    path = loader.directory / loader.file(data, name)
    link, hard = ("link.png", "hard.png") if option == "--plot" else ("link", "hard")
    (loader.directory / link).symlink_to(path)
    os.link(path, loader.directory / hard)

    def named(text: str) -> str:
        text = text.replace("events.jsons", name).replace(".jsons", Path(name).suffix)
        text = text.replace("link", link).replace("hard", hard)
        return text.replace("HERE", str(loader.directory))

    output, source = named(output), named(source)
    args = ["--max-bad-records", 9, option, output, source]
    if {output, source} & STANDARD_INPUT:
        with path.open("rb") as file:
            done = loader.run(*args, input=file)
    else:
        done = loader.run(*args)
    found = source.replace("?", "s")  # what the wildcards stand for
    what = f"{option} and the input {found} are the same file: {output!r}"
    if option == "--plot" and output == "/dev/stdin":
        suffixes = ".png, .svg, .pdf"
        what = f"Invalid value for '--plot': '/dev/stdin' does not end in {suffixes}"
    assert path.read_bytes() == data
    said = done.stderr.decode()
    assert (done.returncode, done.stdout, said) == (2, b"", usage(what))
    assert not loader.db.exists()


TWICE = [
    (["--rejects", "active_user_table.db"], "--rejects and --db"),
    (["--rejects", "x.png", "--plot", "x.png"], "--plot and --rejects"),
    (["--rejects", "x.png", "--plot", "link.png"], "--plot and --rejects"),
    (["--rejects", "link.png", "--plot", "x.png"], "--plot and --rejects"),
    (["--rejects", "to.db"], "--rejects and --db"),
    (["--rejects", "./active_user_table.db"], "--rejects and --db"),
    (["--rejects", "x.png", "--plot", "./x.png"], "--plot and --rejects"),
]


@pytest.mark.parametrize("is_there", [False, True])
@pytest.mark.parametrize(
    ("options", "what"), TWICE, ids=[str(what) for _, what in TWICE]
)
def test_an_output_is_never_another_output(
    loader: Loader, options: list[object], what: str, is_there: bool
) -> None:
    if is_there:
        loader.load(SAMPLE)
        loader.file(b"some", "x.png")
    (loader.directory / "link.png").symlink_to("x.png")
    (loader.directory / "to.db").symlink_to(loader.db)

    def files() -> dict[Path, bytes]:
        paths = loader.directory.iterdir()
        return {path: path.read_bytes() for path in paths if path.is_file()}

    before = files()
    said = loader.refuse(*options, SAMPLE, status=2)
    assert said == usage(f"{what} are the same file: {str(options[-1])!r}")
    assert files() == before


@AS_ROOT
def test_files_of_one_number_on_two_disks_are_two(loader: Loader, disk: Path) -> None:
    """Each disk numbers its own files."""
    other = loader.directory / "other"
    other.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(other)], check=True)
    try:
        events, rejects = disk / "events.jsons", other / "rejects"
        events.write_bytes(lines(event("a"), b"bad"))
        rejects.touch()
        assert events.stat().st_ino == rejects.stat().st_ino
        options = ["--max-bad-records", 1, "--rejects", rejects]
        loader.load(*options, events, warning=f"{events}:2: {NOT_AN_OBJECT}\n")
        assert rejects.read_bytes() == b"bad\n"
    finally:
        subprocess.run(["umount", str(other)], check=True)


@pytest.mark.parametrize("option", ["--rejects", "--db", "--plot"])
@pytest.mark.parametrize(
    ("stream", "name"), [("stdout", "standard output"), ("stderr", "standard error")]
)
def test_an_output_is_never_a_standard_stream(
    loader: Loader, option: str, stream: str, name: str
) -> None:
    path = loader.directory / "x.png"
    for output in ("x.png", "/dev/stdout" if stream == "stdout" else "/dev/stderr"):
        if output != "x.png" and option == "--plot":
            continue
        with (
            path.open("wb") as file,
            loader.start(option, output, SAMPLE, **{stream: file}) as process,
        ):
            out, err = process.communicate(timeout=60)
        what = usage(f"{option} and {name} are the same file: {output!r}").encode()
        said = {"stdout": out, "stderr": err, stream: path.read_bytes()}
        assert (process.returncode, said) == (2, {"stdout": b"", "stderr": what})
    assert not loader.db.exists()


@pytest.mark.parametrize("source", ["ap", "-", "file://HERE/ap", "/dev/fd/0"])
def test_a_report_is_not_appended_to_its_events(loader: Loader, source: str) -> None:
    """Warnings may go where the report goes."""
    path = loader.directory / loader.file(lines(event()), "ap")
    source = source.replace("HERE", str(loader.directory))
    with path.open("rb") as stdin, path.open("ab") as stdout:
        with loader.start(source, stdin=stdin, stdout=stdout) as process:
            _, err = process.communicate(timeout=60)
    what = usage(f"standard output and the input {source} are the same file")
    assert (process.returncode, err.decode()) == (2, what)
    assert path.read_bytes() == lines(event())
    with (loader.directory / "log").open("wb") as log:
        with loader.start("--format", "csv", "ap", stdout=log, stderr=log) as process:
            assert process.wait(60) == 0
    rows = b"date,active_user_count,added,removed\n2019-12-30,1,1,0\n"
    assert (loader.directory / "log").read_bytes() == rows


def test_a_device_may_be_written_twice(loader: Loader) -> None:
    """It may even be read as well."""
    for args in (["--rejects", "/dev/null"], ["--rejects", "/dev/null", "/dev/null"]):
        loader.load(*args, SAMPLE)
        assert loader.table() == SAMPLE_TABLE


# -- Variables that packagers and shells set


@pytest.mark.parametrize(
    "variable", [{"VERSION": "1"}, {"VERSION": "1.1.0"}, {"HELP": "1"}]
)
def test_the_version_and_the_help_come_from_no_variable(
    loader: Loader, variable: dict[str, str]
) -> None:
    """LOAD_ACTIVE_USERS_VERSION may be what an image says of itself."""
    env = {f"LOAD_ACTIVE_USERS_{name}": value for name, value in variable.items()}
    assert loader.load(SAMPLE, env=env)["lines"] == 1000
    assert loader.table() == SAMPLE_TABLE
