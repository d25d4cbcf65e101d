"""What the tests share: events, files of them, and the command as a real process."""

import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "load_active_users.py"
SAMPLE = ROOT / "data" / "bq-results-sample-data.jsons"
NOON = 1577728800_000000  # 2019-12-30 12:00 in US/Central, in microseconds UTC

sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
settings.register_profile("here", deadline=None)  # how long an example takes decides nothing
settings.load_profile("here")


def event(
    user: Any = "u", time: Any = NOON, msec: Any = 3000, key: Any = "x_event", **fields: Any
) -> dict[str, Any]:
    """An engagement event that is active unless told otherwise."""
    params = [
        {"key": "engagement_time_msec", "value": {"int_value": msec}},
        {"key": key, "value": {"int_value": 1}},
    ]
    return {
        "event_timestamp": time,
        "event_name": "user_engagement",
        "event_params": params,
        "user_pseudo_id": user,
        **fields,
    }


def lines(*events: Any) -> bytes:
    """Events and raw lines as a file."""
    rows = (e if isinstance(e, bytes) else json.dumps(e).encode() for e in events)
    return b"".join(row + b"\n" for row in rows)


def environment(env: dict[str, str] | None = None) -> dict[str, str]:
    """This environment without settings of the loader, and with some of a test."""
    ours = {k: v for k, v in os.environ.items() if not k.startswith("LOAD_ACTIVE_USERS_")}
    return {**ours, "PYTHONUNBUFFERED": "", **(env or {})}


class Loader:
    """The command, run as a process in a directory of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.db = directory / "active_user_table.db"

    def file(self, content: bytes, name: str = "events.jsons") -> str:
        (self.directory / name).write_bytes(content)
        return name

    def command(self, *args: object) -> list[str]:
        return [sys.executable, str(SCRIPT), *map(str, args)]

    def run(
        self, *args: object, input: bytes = b"", env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            self.command(*args),
            cwd=self.directory,
            input=input,
            env=environment(env),
            capture_output=True,
            timeout=300,
        )

    def load(
        self,
        *args: object,
        input: bytes = b"",
        env: dict[str, str] | None = None,
        warning: str = "",
    ) -> dict[str, Any]:
        """The report of a load that succeeds and says nothing but a warning."""
        done = self.run("--format", "json", *args, input=input, env=env)
        assert (done.returncode, done.stderr.decode()) == (0, warning)
        report: dict[str, Any] = json.loads(done.stdout)
        return report

    def refuse(
        self,
        *args: object,
        input: bytes = b"",
        status: int = 1,
        env: dict[str, str] | None = None,
    ) -> str:
        """What is said about a load that is refused, which changes nothing in the database."""
        before = self.content()
        done = self.run(*args, input=input, env=env)
        assert (done.returncode, done.stdout) == (status, b""), done
        assert b"Traceback" not in done.stderr
        assert self.content() == before
        return done.stderr.decode()

    def table(self) -> dict[str, int]:
        query = "SELECT date, active_user_count FROM active_user_table ORDER BY date"
        return dict(self.query(query))

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        with closing(sqlite3.connect(self.db)) as db:
            return db.execute(sql).fetchall()

    def execute(self, script: str) -> None:
        """Change the database by hand."""
        with closing(sqlite3.connect(self.db)) as db:
            db.executescript(script)

    def content(self) -> list[str] | None:
        if not self.db.exists():
            return None
        with closing(sqlite3.connect(self.db)) as db:
            version = db.execute("PRAGMA user_version").fetchone()
            return [*db.iterdump(), f"version {version[0]}"]


@pytest.fixture
def loader(tmp_path: Path) -> Loader:
    return Loader(tmp_path)
