"""--incremental: files that an earlier load has read are skipped, and nothing else."""

import os
import random
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import oracle
import pytest
from helpers import (
    DAY,
    KILLS,
    NOON,
    SAMPLE,
    SAMPLE_TABLE,
    Loader,
    event,
    lines,
    noon,
    numbered_sample,
    today,
    usage,
)
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule
from servers import Cluster, PostgresLoader, PostgresServer, needs_postgres

COUNTS = "SELECT date, active_user_count FROM active_user_table ORDER BY 1"
USERS = "SELECT date, user_pseudo_id FROM active_user ORDER BY 1, 2"
FILES = "SELECT path, version, first_date, last_date FROM loaded_file ORDER BY 1"
STEPS = int(os.environ.get("STEPS", "1"))  # times the examples of each state machine


def skipped(report: dict[str, Any]) -> tuple[int, int]:
    """Return the files that were skipped, and the lines of those that were read."""
    return report["skipped_files"], report["lines"]


def version(path: Path) -> str:
    status = path.stat()
    return f"{status.st_size} {status.st_mtime_ns}"


# -- What is skipped


def test_a_file_is_read_once(either: Loader) -> None:
    first = either.load("--incremental", SAMPLE)
    assert skipped(first) == (0, 1000)
    again = either.load("--incremental", SAMPLE)
    nothing = dict.fromkeys([*first], 0)
    assert again == {**nothing, "dates": [], "skipped_files": 1}
    assert either.table() == SAMPLE_TABLE
    log = "SELECT lines, skipped_files FROM load_log ORDER BY lines"
    assert either.query(log) == [(0, 1), (1000, 0)]


CHANGED: dict[str, Callable[[Path], object]] = {
    "appended": lambda path: path.open("ab").write(lines(event("c"))),
    "rewritten, of the same size": lambda path: rewrite(path, lines(event("c"))),
    "touched": lambda path: os.utime(path, ns=(1, 1)),
    "touched by a nanosecond": lambda path: os.utime(
        path, ns=(1, path.stat().st_mtime_ns + 1)
    ),
    "truncated": lambda path: os.truncate(path, 0),
}


def rewrite(path: Path, content: bytes) -> None:
    """Write a file, at another time than the last time, whatever the clock's tick."""
    last = path.stat().st_mtime_ns if path.exists() else 0
    path.write_bytes(content)
    now = max(path.stat().st_mtime_ns, last + 1)
    os.utime(path, ns=(now, now))


@pytest.mark.parametrize("change", CHANGED)
def test_a_file_that_has_changed_is_read_again(loader: Loader, change: str) -> None:
    other = loader.file(lines(event("a")), "a")
    path = loader.directory / loader.file(lines(event("b")), "b")
    loader.load("--incremental", other, path.name)
    CHANGED[change](path)
    users = ["a", "b", "c"] if '"c"' in path.read_text() else ["a", "b"]
    count = len(path.read_bytes().splitlines())
    assert skipped(loader.load("--incremental", other, path.name)) == (1, count)
    assert loader.users() == users
    assert skipped(loader.load("--incremental", other, path.name)) == (2, 0)


def test_names_of_one_file(loader: Loader) -> None:
    """A relative name, an absolute one and a symbolic link are one file; a hard link,
    a copy and a new name are others."""
    directory = loader.directory / "a directory"
    directory.mkdir()
    path = directory / "events"
    path.write_bytes(lines(event("a")))
    (loader.directory / "link").symlink_to(directory)
    (loader.directory / "to it").symlink_to("link/events")
    loader.load("--incremental", "a directory/events")
    for name in (path, "link/events", "to it", "./link/../a directory/events"):
        assert skipped(loader.load("--incremental", name)) == (1, 0)
    assert loader.query(FILES) == [(str(path), version(path), "2000-01-01", None)]

    os.link(path, loader.directory / "hard")
    shutil.copy2(path, loader.directory / "copy")
    for name in ("hard", "copy"):
        assert skipped(loader.load("--incremental", name)) == (0, 1)
    path.rename(loader.directory / "moved")
    assert skipped(loader.load("--incremental", "moved")) == (0, 1)
    (loader.directory / "to it").unlink()
    (loader.directory / "to it").symlink_to("hard")
    assert skipped(loader.load("--incremental", "to it")) == (1, 0)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("日本.json", r"\u65e5\u672c.json"),
        ("é \U0001f600.json", r"\u00e9 \ud83d\ude00.json"),
        (os.fsdecode(b"\xff.json"), r"\udcff.json"),
        ("a \"quoted\" 'name'%s?.json", "a \"quoted\" 'name'%s?.json"),
    ],
)
def test_names_of_any_bytes(either: Loader, name: str, path: str) -> None:
    either.file(lines(event("a")), name)
    assert skipped(either.load("--incremental", name)) == (0, 1)
    assert skipped(either.load("--incremental", name)) == (1, 0)
    [row] = either.query(FILES)
    assert row[0] == f"{either.directory}/{path}"


def test_every_batch_load_keeps_a_record(either: Loader) -> None:
    """With or without --incremental, with --replace, of an empty and a bad file."""
    names = [either.file(lines(event("a")), "a"), either.file(b"", "empty")]
    names.append(either.file(b"bad\n" + lines(event("b")), "bad"))
    either.load("--dates", "2019-12-01..2019-12-31", names[0])
    either.load("--replace", "--dates", "2019-12-30..2019-12-31", names[1])
    done = either.run("-q", "--max-bad-records", 1, names[2])
    assert done.returncode == 0
    paths = {name: either.directory / name for name in names}
    assert either.query(FILES) == [
        (str(paths["a"]), version(paths["a"]), "2019-12-01", "2019-12-31"),
        (str(paths["bad"]), version(paths["bad"]), "2000-01-01", None),
        (str(paths["empty"]), version(paths["empty"]), "2000-01-01", None),
    ]
    ids = either.query("SELECT load_id, loaded_at FROM loaded_file")
    assert set(ids) <= set(either.query("SELECT load_id, loaded_at FROM load_log"))
    assert skipped(either.load("--incremental", *names)) == (2, 1)


def test_what_keeps_no_record(loader: Loader) -> None:
    """Standard input, a pipe, a live load, a dry run."""
    name = loader.file(lines(event("a")))
    loader.load("--dry-run", name)
    assert not loader.db.exists()
    loader.load("-", input=lines(event("b")))
    loader.load("--commit-every", 1, name)
    with (loader.directory / name).open("rb") as file:
        done = loader.run("-q", "-", input=file)
    assert (done.returncode, done.stderr) == (0, b"")
    os.mkfifo(loader.directory / "fifo")
    with loader.start("--incremental", "fifo") as load:
        (loader.directory / "fifo").write_bytes(lines(event("c")))
        _, err = load.communicate(timeout=30)
    assert (load.returncode, err) == (0, b"")
    assert loader.users() == ["a", "b", "c"]
    assert loader.query(FILES) == []


def test_a_load_may_mix_files_and_pipes(loader: Loader) -> None:
    name = loader.file(lines(event("a")))
    loader.load(name)
    report = loader.load("--incremental", name, "-", name, input=lines(event("b")))
    assert skipped(report) == (2, 1)


# -- Dates

DATES: dict[str, tuple[str | None, str | None, bool]] = {
    # dates of the earlier load, of the later one, whether its file is skipped
    "the same": ("2020-01-01..2020-01-31", "2020-01-01..2020-01-31", True),
    "fewer": ("2020-01-01..2020-01-31", "2020-01-02..2020-01-30", True),
    "an earlier one": ("2020-01-02..2020-01-31", "2020-01-01..2020-01-31", False),
    "a later one": ("2020-01-01..2020-01-30", "2020-01-01..2020-01-31", False),
    "to tomorrow, then fewer": (None, "2020-01-01..2020-01-31", True),
    "fewer, then to tomorrow": ("2020-01-01..2020-01-31", None, False),
    "from then to tomorrow": ("2020-01-01..", "2020-01-01..", True),
    "before 2000": (None, "1999-12-31..", False),
    "from before 2000": ("1999-12-31..", None, True),
    "up to tomorrow": (None, f"..{today()}", True),
}


@pytest.mark.parametrize("case", DATES)
def test_dates_that_were_not_counted(either: Loader, case: str) -> None:
    earlier, later, is_skipped = DATES[case]
    name = either.file(lines(event("a", noon("2020-01-15"))))
    either.load(*(["--dates", earlier] if earlier else []), name)
    dates = ["--dates", later] if later else []
    report = either.load("--incremental", *dates, name)
    assert skipped(report) == ((1, 0) if is_skipped else (0, 1))


def test_dates_after_tomorrow_are_never_skipped(loader: Loader) -> None:
    name = loader.file(lines(event("a", noon("2020-01-15")), event("b", 2 * NOON)))
    dates = ["--dates", "2000-01-01..2100-12-31"]
    for _ in range(2):
        assert skipped(loader.load("--incremental", *dates, name)) == (0, 2)
    assert skipped(loader.load("--incremental", name)) == (1, 0)


def test_the_last_date_moves_on_every_night(loader: Loader) -> None:
    """A load that reached tomorrow then is complete on all later nights."""
    name = loader.file(lines(event("a")))
    loader.load(name)
    loader.execute("UPDATE loaded_file SET loaded_at = '2020-01-01T00:00:00Z'")
    assert skipped(loader.load("--incremental", name)) == (1, 0)


# -- What is said


@pytest.mark.parametrize("number", [1, 2])
def test_all_are_skipped(loader: Loader, number: int) -> None:
    loader.load(SAMPLE)
    text = {1: "1 unchanged file skipped\n", 2: "2 unchanged files skipped\n"}[number]
    done = loader.run("--incremental", *[SAMPLE] * number)
    assert (done.returncode, done.stdout.decode(), done.stderr) == (0, text, b"")
    done = loader.run("--incremental", "--format", "csv", SAMPLE)
    head = b"date,active_user_count,added,removed\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, head, b"")
    assert loader.query("SELECT count(*) FROM load_log") == [(3,)]


def test_some_are_skipped(loader: Loader) -> None:
    name = loader.file(lines(event("a"), event("old", 1)))
    loader.load(SAMPLE)
    done = loader.run("--incremental", SAMPLE, name, env={"COLUMNS": "200"})
    last = done.stdout.decode().splitlines()[-1]
    assert last == (
        "2 lines → 2 engagement events → 2 active → 1 user-day (1 new); "
        "1 out of range event; 1 unchanged file skipped"
    )
    done = loader.run(SAMPLE, name)
    assert b"skipped" not in done.stdout
    done = loader.run("--incremental", loader.file(b"", "empty"), SAMPLE)
    assert b"0 lines" in done.stdout


@pytest.mark.parametrize("content", [lines({"event_name": "x"}), lines(event("a", 1))])
def test_a_load_that_skips_files_gives_no_warning(
    loader: Loader, content: bytes
) -> None:
    """A small new file may well hold no engagement event, or wrong clocks alone."""
    name = loader.file(content)
    loader.load(SAMPLE)
    assert skipped(loader.load("--incremental", SAMPLE, name)) == (1, 1)


def test_the_picture_is_drawn_all_the_same(loader: Loader) -> None:
    loader.load(SAMPLE)
    done = loader.run("-q", "--incremental", "--plot", "a.svg", SAMPLE)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert (loader.directory / "a.svg").read_bytes() == loader.draw("svg")


def test_a_dry_run_tells_what_would_be_skipped(either: Loader) -> None:
    name = either.file(lines(event("a")))
    assert skipped(either.load("--dry-run", "--incremental", name)) == (0, 1)
    either.load(name)
    before = either.content()
    other = either.file(lines(event("b")), "other")
    report = either.load("--dry-run", "--incremental", name, other)
    assert skipped(report) == (1, 1)
    assert either.content() == before


USAGE = {
    "--replace": ["--replace", "--dates", "2020-01-01"],
    "--commit-every": ["--commit-every", "1"],
}


@pytest.mark.parametrize("option", USAGE)
def test_what_it_cannot_be_combined_with(loader: Loader, option: str) -> None:
    pair = ("--commit-every", "--incremental")
    if option == "--replace":
        pair = ("--incremental", "--replace")
    said = loader.refuse("--incremental", *USAGE[option], SAMPLE, status=2)
    assert said == usage(f"{pair[0]} can't be combined with {pair[1]}")


def test_a_file_that_is_missing(loader: Loader) -> None:
    loader.load(SAMPLE)
    said = loader.refuse("--incremental", SAMPLE, "missing")
    assert said == "Error: missing: No such file or directory\n"


def test_from_the_environment(loader: Loader) -> None:
    loader.load(SAMPLE)
    env = {"LOAD_ACTIVE_USERS_INCREMENTAL": "1"}
    assert skipped(loader.load(SAMPLE, env=env)) == (1, 0)


# -- No record is wrong


def test_a_refused_load_keeps_no_record(loader: Loader) -> None:
    good, bad = loader.file(lines(event("a")), "a"), loader.file(b"bad\n", "bad")
    assert "bad records: 1" in loader.refuse("--incremental", good, bad)
    loader.load(SAMPLE)
    assert "bad records: 1" in loader.refuse("--incremental", SAMPLE, good, bad)
    assert skipped(loader.load("--incremental", SAMPLE, good)) == (1, 1)


def test_a_load_that_cannot_commit_keeps_no_record(loader: Loader) -> None:
    name = loader.file(lines(event("a")))
    loader.load(SAMPLE)
    loader.execute(
        "CREATE TRIGGER stop BEFORE INSERT ON loaded_file "
        "BEGIN SELECT RAISE(ABORT, 'not now'); END"
    )
    said = loader.refuse("--incremental", name)
    assert said == f"Error: {loader.db.name}: not now\n"
    loader.execute("DROP TRIGGER stop")
    assert skipped(loader.load("--incremental", name)) == (0, 1)


def test_a_file_that_grows_while_it_is_read(loader: Loader) -> None:
    """The record has the version from before: the next load reads it again."""
    path = loader.directory / loader.file(lines(event("a")))
    os.mkfifo(loader.directory / "fifo")
    with loader.start("-q", path.name, "fifo") as load:
        with (loader.directory / "fifo").open("wb"):  # all sources have been looked at
            with path.open("ab") as file:
                file.write(lines(event("b")))
        _, err = load.communicate(timeout=30)
    assert (load.returncode, err) == (0, b"")
    report = loader.load("--incremental", path.name)
    assert skipped(report) == (0, 2)
    assert loader.users() == ["a", "b"]


def test_killed_at_any_moment(either: Loader) -> None:
    """However often it is killed: in the end all users of all files are there."""
    names = [either.file(numbered_sample(n) * 4, f"{n}") for n in range(8)]
    expected = oracle.read(b"".join(map(numbered_sample, range(8))))[0]
    choice = random.Random(1)
    for number in range(KILLS):
        path = either.directory / choice.choice(names)
        rewrite(path, path.read_bytes() + lines(event(f"late {number}")))
        expected["2019-12-30"].add(f"late {number}")
        with either.start("-q", "--incremental", *names) as load:
            time.sleep(choice.uniform(0.05, 0.3))
            load.kill()
    either.load("--incremental", *names, process=True)
    assert either.all_users() == expected
    assert either.table() == {day: len(expected[day]) for day in sorted(expected)}
    assert skipped(either.load("--incremental", *names)) == (8, 0)


def test_two_loads_at_once(either: Loader) -> None:
    """Loads of the same files, which change meanwhile, leave no wrong record."""
    names = [f"{number}" for number in range(8)]
    for name in names:
        either.file(lines(event(f"{name} first")), name)
    either.load(*names)
    for turn in range(4):
        with ExitStack() as stack:
            loads = [
                stack.enter_context(either.start("-q", "--incremental", *names))
                for _ in range(3)
            ]
            for name in names:
                path = either.directory / name
                rewrite(path, path.read_bytes() + lines(event(f"{name} {turn}")))
                time.sleep(0.01)
            said = [load.communicate(timeout=60)[1] for load in loads]
        assert [load.returncode for load in loads] == [0, 0, 0], said
    either.load("--incremental", *names)
    expected = {f"{name} {turn}" for name in names for turn in ["first", 0, 1, 2, 3]}
    assert either.all_users() == {"2019-12-30": expected}


# -- The state machine


class Twins(RuleBasedStateMachine):
    """An incremental database, and one into which every load read all of its files.

    Whatever happens to the files, both have the same counts and users.
    """

    options: tuple[object, ...] = ()
    make_loader: Callable[[Path], Loader] = staticmethod(Loader)

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="load_active_users-"))
        self.files = self.root / "files"
        self.files.mkdir()
        self.loaders = []
        for name in ("incremental", "full"):
            directory = self.root / name
            directory.mkdir()
            self.loaders.append(self.make_loader(directory))
        self.clock = 1_600_000_000 * 10**9  # of the files, in nanoseconds

    def teardown(self) -> None:
        for loader in self.loaders:
            if isinstance(loader, PostgresLoader):
                loader.drop()
        shutil.rmtree(self.root)

    events = st.lists(
        st.builds(
            event,
            st.sampled_from(["a", "b", "c", "d", None]),
            st.integers(-2, 3).map(lambda days: NOON + days * DAY) | st.just(1),
            st.sampled_from([2999, 3000]),
        )
        | st.sampled_from([b"bad", b"", {"event_name": "other"}]),
        max_size=4,
    )
    names = st.sampled_from(["one", "two", "three", "four"])
    days = st.sampled_from(["2019-12-28", "2019-12-30", "2020-01-01", str(today()), ""])

    def names_of_files(self) -> list[str]:
        return sorted(path.name for path in self.files.iterdir())

    def has_files(self) -> bool:
        return bool(self.names_of_files())

    def put(self, name: str, content: bytes) -> None:
        self.clock += 1
        path = self.files / name
        path.write_bytes(content)
        os.utime(path, ns=(self.clock, self.clock))

    @rule(name=names, some=events)
    def write(self, name: str, some: list[Any]) -> None:
        self.put(name, lines(*some))

    @precondition(has_files)
    @rule(data=st.data(), some=events)
    def append(self, data: Any, some: list[Any]) -> None:
        name = data.draw(st.sampled_from(self.names_of_files()))
        self.put(name, (self.files / name).read_bytes() + lines(*some))

    @precondition(has_files)
    @rule(data=st.data())
    def touch(self, data: Any) -> None:
        name = data.draw(st.sampled_from(self.names_of_files()))
        self.put(name, (self.files / name).read_bytes())

    @precondition(has_files)
    @rule(data=st.data(), other=names)
    def rename(self, data: Any, other: str) -> None:
        name = data.draw(st.sampled_from(self.names_of_files()))
        (self.files / name).rename(self.files / other)

    @precondition(has_files)
    @rule(data=st.data())
    def delete(self, data: Any) -> None:
        name = data.draw(st.sampled_from(self.names_of_files()))
        (self.files / name).unlink()

    @precondition(has_files)
    @rule(data=st.data(), first=days, last=days, bad=st.sampled_from([0, 99]))
    def load(self, data: Any, first: str, last: str, bad: int) -> None:
        some = st.lists(st.sampled_from(self.names_of_files()), min_size=1, max_size=5)
        paths = [self.files / name for name in data.draw(some)]
        ends = sorted(filter(None, (first, last)))
        if len(ends) == 2:
            dates = ["--dates", "..".join(ends)]
        else:
            dates = ["--dates", f"{first}..{last}"] if ends else []
        options = [*self.options, "-q", "--max-bad-records", bad, *dates, *paths]
        incremental, full = self.loaders
        done = full.run(*options)
        if done.returncode:
            # A load that reads all files may be refused for one that the other skips:
            # then the twin is spared as well.
            return
        done = incremental.run("--incremental", *options)
        assert done.returncode == 0, done.stderr
        for query in (COUNTS, USERS):
            assert incremental.query(query) == full.query(query)


def run_twins(machine: type[Twins], examples: int, steps: int) -> None:
    machine.TestCase.settings = settings(
        max_examples=examples * STEPS,
        stateful_step_count=steps,
        suppress_health_check=list(HealthCheck),
        deadline=None,
    )
    case = machine.TestCase()
    case.runTest()


def test_the_tables_are_those_of_full_loads() -> None:
    run_twins(Twins, examples=30, steps=30)


@needs_postgres
def test_the_tables_are_those_of_full_loads_on_postgresql(
    server: PostgresServer,
) -> None:
    class PostgresTwins(Twins):
        @staticmethod
        def make_loader(directory: Path) -> Loader:
            number = re.sub(r"\W", "", directory.parent.name)
            own = directory / f"{number}-{directory.name}"
            own.mkdir()
            return PostgresLoader(own, server)

    run_twins(PostgresTwins, examples=4, steps=20)


def test_the_tables_are_those_of_full_loads_by_processes() -> None:
    class ManyProcesses(Twins):
        options = ("--workers", 2)

        @staticmethod
        def make_loader(directory: Path) -> Loader:
            return Loader(directory).with_constants(POOL_MIN_BYTES=0)

    run_twins(ManyProcesses, examples=3, steps=15)


def test_the_tables_are_those_of_full_loads_by_a_cluster(tmp_path: Path) -> None:
    with closing(Cluster(tmp_path / "cluster")) as cluster:
        cluster.workers(2)

        class ClusterTwins(Twins):
            options = ("--cluster", cluster.address)

            @staticmethod
            def make_loader(directory: Path) -> Loader:
                return ProcessLoader(directory)

        run_twins(ClusterTwins, examples=3, steps=15)


class ProcessLoader(Loader):
    """The command, always as a real process."""

    def run(self, *args: Any, **more: Any) -> subprocess.CompletedProcess[bytes]:
        return super().run(*args, **{**more, "process": True})


def test_a_cluster_is_not_needed_when_all_is_skipped(loader: Loader) -> None:
    loader.load(SAMPLE)
    options = ["--incremental", "--cluster", "tcp://127.0.0.1:1"]
    assert skipped(loader.load(*options, SAMPLE)) == (1, 0)
