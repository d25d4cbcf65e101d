"""Memory is bounded, whatever the input: endless lines, bombs, many users and dates."""

import gzip
import json

import pytest
from helpers import (
    NOON,
    NOT_AN_OBJECT,
    Loader,
    event,
    lines,
    make_dates,
    make_rule,
    peak_memory,
)
from hypothesis import given
from hypothesis import strategies as st

import load_active_users
from load_active_users import (
    OBJECT_OVERHEAD,
    Range,
    Run,
    Scanner,
    Staging,
    encode_json,
    merge_runs,
)


def test_a_line_of_100_mb(loader: Loader) -> None:
    path = loader.directory / loader.file(lines(event("a")))
    with path.open("ab") as file:
        file.write(lines(event("b", pad="PAD")).replace(b"PAD", b"x" * 100_000_000))
        file.write(b'{"' + b"y" * 100_000_000 + b"\n" + lines(event("c")))
    options = ["-q", "--max-bad-records", 1]
    done = loader.run(*options, path, process=True)  # of several, maybe
    said = f"{path}:3: {NOT_AN_OBJECT}\n"
    assert (done.returncode, done.stderr.decode()) == (0, said)
    assert loader.table() == {"2019-12-30": 3}


def test_a_line_without_end(loader: Loader) -> None:
    """A gzip bomb of one line is refused before it fills the memory."""
    bomb = gzip.compress(b"x" * 10_000_000, 9) * 60
    names = [loader.file(lines(event()), "a"), loader.file(bomb, "bomb.gz")]
    status, output, megabytes = peak_memory(loader, *names)
    what = b"a line of more than 128 MiB; one event per line is expected"
    assert (status, output) == (1, b"Error: bomb.gz:1: " + what)
    assert megabytes < 500


BOMB = b'{"event_name":"user_engagement","event_timestamp":0}\n'


@pytest.mark.parametrize("line", [b"\n", b"x\n", BOMB])
def test_a_bomb_of_many_lines(loader: Loader, line: bytes) -> None:
    count = 1_000_000 // len(line) // 20 * 20
    bomb = loader.file(gzip.compress(line * (count // 20), 9) * 20, "bomb.gz")
    options = ["--max-bad-records", 10**9, "--format", "json"]
    status, output, megabytes = peak_memory(loader, *options, bomb)
    assert (status, json.loads(output.splitlines()[-1])["lines"]) == (0, count)
    assert megabytes < 150


def test_long_keys_are_not_remembered(loader: Loader) -> None:
    rows = (lines(event(key=f"{number:040000}")) for number in range(3000))
    name = loader.file(b"".join(map(gzip.compress, rows)))
    status, output, megabytes = peak_memory(loader, "--format", "json", name)
    assert (status, json.loads(output)["engagement_events"]) == (0, 3000)
    assert megabytes < 100


def test_what_a_rule_remembers_is_bounded() -> None:
    matcher = load_active_users.matcher_for(make_rule())
    roles = [matcher.role_of(f"{number}_event") for number in range(70_000)]
    assert roles == [(False, True)] * 70_000
    assert matcher.role_of.cache_info().currsize == 65_536


def test_the_size_of_a_batch_is_what_it_holds() -> None:
    """Its users are JSON; a bad record takes some bytes beside its own."""
    data = lines(*(event(f"{number:010}") for number in range(100)), b"x" * 1000)
    scanner = Scanner(make_rule(), make_dates(), keep=True)
    (batch,) = scanner(Range("-", data=data))
    users = len("[" + ",".join(['"0123456789"'] * 100) + "]")
    assert batch.size() == users + 1000 + OBJECT_OVERHEAD


def test_very_many_dates(loader: Loader) -> None:
    """Clocks can go wild. No step may take longer per date the more dates there are."""
    row = lines(event("u", "TIME"))
    with (loader.directory / loader.file(b"")).open("wb") as file:
        for day in range(30_000):
            file.write(row.replace(b"TIME", b"%d" % (day * 86_400 * 10**6)))
    options = ["--dates", "1900-01-01..2999-12-31", "--format", "json"]
    status, output, megabytes = peak_memory(loader, *options, "events.jsons")
    assert (status, len(json.loads(output)["dates"])) == (0, 30_000)
    assert megabytes < 200


# -- Staging


def test_many_users_are_staged_in_bounded_memory(loader: Loader) -> None:
    row = lines(event("USER", "TIME"))
    with (loader.directory / loader.file(b"")).open("wb") as file:
        for number in range(250_000):
            time_utc = b"%d" % (NOON + number % 40 * 86_400 * 10**6)
            user = b"%064x" % number
            file.write(row.replace(b"USER", user).replace(b"TIME", time_utc))
    status, output, megabytes = peak_memory(loader, "--format", "json", "events.jsons")
    added = [day["added"] for day in json.loads(output)["dates"]]
    assert (status, added) == (0, [6250] * 40)
    assert list(loader.table().values()) == added
    assert megabytes < 200


def test_a_load_holds_some_users_and_stages_the_rest() -> None:
    """It gives them back in order, each once."""
    dates = make_dates()
    load, most = Staging(dates), 0
    rule = make_rule("UTC", min_msec=1, globs=("*",))
    scan = load_active_users.Scanner(rule, dates)
    row = lines(event("USER", str(NOON)))
    for number in range(8):
        users = (b"%d-%0120d" % (number % 4, user) for user in range(18_000))
        data = b"".join(row.replace(b"USER", user) for user in users)
        for batch in scan(Range("x", data=data)):
            load.add(batch)
            most = max(most, load.size)
    assert load_active_users.SPILL_BYTES // 2 < most < 2 * load_active_users.SPILL_BYTES
    found = [user for some in load.get_users("2019-12-30") for user in some]
    load.close()
    expected = {f"{n}-{user:0120}" for n in range(4) for user in range(18_000)}
    assert found == sorted(expected)


@given(st.lists(st.lists(st.integers(0, 30), min_size=1), max_size=12))
def test_merged_runs_are_in_order_and_hold_each_user_once(
    some: list[list[int]],
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("load_active_users.CHUNK_USERS", 4)
        sets = [sorted({f"u{number:02}" for number in each}) for each in some]
        runs = [Run("", users[0], encode_json(users)) for users in sets]
        found = list(merge_runs(sorted(runs)))
    assert [user for users in found for user in users] == sorted(set().union(*sets))
    assert all(found)


def test_users_of_several_files_overlap_beyond_a_chunk(loader: Loader) -> None:
    """More than 32,768 users are in memory, and each is taken once, in order."""
    row = lines(event("USER"))
    ranges = [range(40_000), range(20_000, 60_000), range(0, 80_000, 2)]
    names = []
    for number, users in enumerate(ranges):
        data = b"".join(row.replace(b"USER", b"%d" % user) for user in users)
        names.append(loader.file(data, f"{number}.jsons"))
    everyone = {str(user) for users in ranges for user in users}
    count = len(everyone)
    day = "2019-12-30"
    expected = {"date": day, "active_user_count": count, "added": count, "removed": 0}
    assert loader.load(*names)["dates"] == [expected]
    assert loader.users() == sorted(everyone)
    again = loader.load("--replace", "--dates", day, *names)["dates"]
    assert again == [expected | {"added": 0}]


def test_spilled_users_leave_memory(loader: Loader) -> None:
    """They would take 100 MB: far more than the program and its chunks of users."""
    row = lines(event("USER")).replace(b" ", b"")
    name = loader.file(b"")
    with (loader.directory / name).open("wb") as file:
        for start in range(0, 800_000, 1000):
            users = (b"%0120x" % user for user in range(start, start + 1000))
            file.write(b"".join(row.replace(b"USER", user) for user in users))
    options = ["--dry-run", "--workers", 1, "--format", "json"]
    status, output, megabytes = peak_memory(loader, *options, name)
    assert (status, json.loads(output)["dates"][0]["added"]) == (0, 800_000)
    assert megabytes < 130


def test_a_machine_without_memory_is_a_clear_error(
    loader: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also outside of the blocks that name a file or a database."""

    def add(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Staging, "add", add)
    said = loader.refuse(loader.file(lines(event())))
    assert said == "Error: MemoryError: MemoryError\n"
