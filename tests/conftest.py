"""The fixtures that several test files share."""

import itertools
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.register_assert_rewrite("helpers", "servers")  # so that they tell what differs

from helpers import SAMPLE, Loader, numbered_sample
from hypothesis import settings
from servers import (
    PostgresLoader,
    PostgresServer,
    needs_postgres,
    running_postgres,
)

import load_active_users as program

for name in [name for name in os.environ if name.startswith("LOAD_ACTIVE_USERS_")]:
    del os.environ[name]
# As under cron: what can't be written stays in a buffer.
os.environ.pop("PYTHONUNBUFFERED", None)
# Under nohup, or in the background of a shell, tests must not inherit ignored signals.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
# How long an example takes says nothing.
settings.register_profile("here", deadline=None)
settings.load_profile("here")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin early with tests that wait long, so that nothing waits for them at the end.

    xdist gives each of its processes an equal share of the tests to begin with. The
    tests that wait are put at the start of different shares.
    """
    early = [item for item in items if item.get_closest_marker("begin_early")]
    others = [item for item in items if not item.get_closest_marker("begin_early")]
    for number, item in enumerate(early):
        others.insert(number * len(items) // len(early), item)
    items[:] = others


@pytest.fixture
def loader(tmp_path: Path) -> Loader:
    return Loader(tmp_path)


@pytest.fixture(scope="session")
def server() -> Iterator[PostgresServer]:
    with running_postgres() as server:
        yield server


@pytest.fixture(params=["SQLite", pytest.param("PostgreSQL", marks=needs_postgres)])
def either(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Loader]:
    """A loader with either database."""
    if request.param == "SQLite":
        yield Loader(tmp_path)
        return
    loader = PostgresLoader(tmp_path, request.getfixturevalue("server"))
    yield loader
    loader.drop()


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that is large enough for several processes, with a few bad records."""
    path = tmp_path_factory.mktemp("large") / "large.jsons"
    samples = [numbered_sample(number) for number in range(7)]
    bad = b'{"event_name":"user_engagement"}\n{cut off\n'
    with path.open("wb") as file:
        for number in range(28):
            file.write(samples[number % 7])
            file.write(b"\n" if number % 3 else bad)
    assert path.stat().st_size > program.POOL_MIN_BYTES
    return path


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that is large enough for several processes, without a bad record."""
    path = tmp_path_factory.mktemp("good") / "good.jsons"
    with path.open("wb") as file:
        file.writelines(itertools.repeat(SAMPLE.read_bytes(), 28))
    assert path.stat().st_size > program.POOL_MIN_BYTES
    return path


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)]
    subprocess.run(mount, check=True)
    yield path
    subprocess.run(["umount", str(path)], check=True)
