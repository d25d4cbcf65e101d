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


def event(user: Any = "u", time: Any = NOON, msec: Any = 3000, key: Any = "x_event", **fields: Any) -> dict[str, Any]:
    """An engagement event that is active unless told otherwise."""
    params = [{"key": "engagement_time_msec", "value": {"int_value": msec}}, {"key": key, "value": {"int_value": 1}}]
    return {
        "event_timestamp": time,
        "event_name": "user_engagement",
        "event_params": params,
        "user_pseudo_id": user,
        **fields,
    }


def lines(*events: Any) -> bytes:
    """Events and raw lines as a file."""
    return b"".join((e if isinstance(e, bytes) else json.dumps(e).encode()) + b"\n" for e in events)


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

    def run(self, *args: object, input: bytes = b"", env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
        return subprocess.run(
            self.command(*args),
            cwd=self.directory,
            input=input,
            env={**os.environ, "PYTHONUNBUFFERED": "", **(env or {})},
            capture_output=True,
            timeout=300,
        )

    def load(self, *args: object, input: bytes = b"", env: dict[str, str] | None = None) -> dict[str, Any]:
        """The report of a load that succeeds in silence."""
        done = self.run("--format", "json", *args, input=input, env=env)
        assert (done.returncode, done.stderr) == (0, b"")
        return json.loads(done.stdout)

    def refuse(self, *args: object, input: bytes = b"", status: int = 1) -> str:
        """What is said about a load that is refused, which changes nothing in the database."""
        before = self.content()
        done = self.run(*args, input=input)
        assert (done.returncode, done.stdout) == (status, b""), done
        assert b"Traceback" not in done.stderr
        assert self.content() == before
        return done.stderr.decode()

    def table(self) -> dict[str, int]:
        return dict(self.query("SELECT date, active_user_count FROM active_user_table ORDER BY date"))

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        with closing(sqlite3.connect(self.db)) as db:
            return db.execute(sql).fetchall()

    def content(self) -> list[str] | None:
        if not self.db.exists():
            return None
        with closing(sqlite3.connect(self.db)) as db:
            return list(db.iterdump())


@pytest.fixture
def loader(tmp_path: Path) -> Loader:
    return Loader(tmp_path)
