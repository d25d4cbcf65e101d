"""The picture: where everything is, what it says, and that cron can draw it too."""

import itertools
import stat
import subprocess
from datetime import date, timedelta
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from helpers import (
    AS_ROOT,
    DAY,
    NOON,
    SAMPLE,
    WITHOUT_CAPABILITIES,
    Loader,
    event,
    lines,
    picture_texts,
)
from hypothesis import given
from hypothesis import strategies as st

from load_active_users import Rule, draw_figure, draw_picture, week_averages

RULE = Rule()
MAGIC = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}
FIRST = (date(2019, 12, 29) - date(1970, 1, 1)).days  # a Sunday
NAN = float("nan")
COUNTS = [n * 7919 % 1001 for n in range(100)]
Rows = list[tuple[str, int]]


def series(days: int, missing: tuple[int, ...] = (), first: str = "2019-12-29") -> Rows:
    start = date.fromisoformat(first)
    numbers = [n for n in range(days) if n not in missing]
    return [(str(start + timedelta(n)), 1000 + n * 37 % 1001) for n in numbers]


def picture(rows: Rows, rule: Rule | None, suffix: str) -> bytes:
    return draw_picture(dict(rows), rule, suffix)


class Drawn:
    """What is in a figure, in its own coordinates: days since 1970-01-01 and users."""

    def __init__(self, rows: Rows, rule: Rule = RULE) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        self.figure = draw_figure(dict(rows), rule)
        FigureCanvasAgg(self.figure).draw()
        (self.axes,) = self.figure.axes

    def bars(self) -> list[tuple[float, float, float]]:
        """Return the left and right edge and the height of each bar that is filled."""
        from matplotlib.patches import StepPatch

        patches = self.axes.patches
        (steps,) = [patch for patch in patches if isinstance(patch, StepPatch)]
        values, edges, baseline = steps.get_data()
        assert (baseline, steps.get_fill()) == (0, True)
        bars = zip(edges[:-1], edges[1:], values, strict=True)
        return [bar for bar in bars if bar[2] == bar[2]]  # NaN between them

    def gaps(self) -> list[tuple[float, float]]:
        """Return the edges of each grey stretch, as high as the picture, frameless."""
        from matplotlib.patches import Rectangle

        spans = [patch for patch in self.axes.patches if isinstance(patch, Rectangle)]
        for span in spans:
            frame = (span.get_y(), span.get_height(), span.get_linewidth())
            assert frame == (0, 1, 0)
        return [(span.get_x(), span.get_x() + span.get_width()) for span in spans]

    def line(self) -> dict[float, float]:
        """Return the points of the 7-day average, from left to right."""
        points = [xy for line in self.axes.lines for xy in line.get_xydata().tolist()]
        assert points == sorted(points, key=lambda xy: xy[0])
        return dict(points)

    def labels(self) -> list[tuple[float, float, str]]:
        return [(*text.xy, text.get_text()) for text in self.axes.texts]

    def ticks(self) -> list[str]:
        return [label.get_text() for label in self.axes.get_xticklabels()]

    def legend(self) -> list[str]:
        legend = self.axes.get_legend()
        return [text.get_text() for text in legend.get_texts()] if legend else []


@cache
def of_days(days: int) -> Drawn:
    return Drawn(series(days))


# -- Where everything is


@pytest.mark.parametrize(
    ("days", "margin"),
    [(1, 3), (3, 2), (6, 0.6), (13, 0.6), (14, 0.6), (70, 0.7), (71, 0.71)],
)
def test_the_limits_of_a_picture(days: int, margin: float) -> None:
    """It shows a week at least, and some air above the bars."""
    axes = of_days(days).axes
    assert axes.get_xlim() == pytest.approx((FIRST - margin, FIRST + days - 1 + margin))
    highest = max(count for _, count in series(days))
    assert axes.get_ylim() == pytest.approx((0, 1.08 * highest))


@pytest.mark.parametrize(
    ("days", "half"),
    [(1, 0.4), (3, 0.4), (13, 0.4), (14, 0.4), (70, 0.4), (71, 0.4), (400, 0.5)],
)
def test_a_bar_is_as_high_as_its_count(days: int, half: float) -> None:
    """It is on its date, and apart from its neighbours while there is room for that."""
    expected = [
        (FIRST + n - half, FIRST + n + half, count)
        for n, (_, count) in enumerate(series(days))
    ]
    assert of_days(days).bars() == expected


def test_gaps_are_grey_and_not_zeros() -> None:
    """They begin and end at midnight. A count of 0 is no gap."""
    picture_ = Drawn(series(12, missing=(1, 4, 5, 6, 10)))
    bars = [left + 0.4 - FIRST for left, _, _ in picture_.bars()]
    assert bars == pytest.approx([0, 2, 3, 7, 8, 9, 11])
    gaps = [(left - FIRST, right - FIRST) for left, right in picture_.gaps()]
    assert gaps == [(0.5, 1.5), (3.5, 6.5), (9.5, 10.5)]
    assert picture_.legend() == ["no data"]
    rows = [("2020-01-01", 5), ("2020-01-02", 0), ("2020-01-03", 5)]
    assert (Drawn(rows).gaps(), len(Drawn(rows).bars())) == ([], 3)


def averages(counts: dict[int, int]) -> dict[int, float]:
    """Return the averages by day, or NaN where the line is broken.

    At least four of the seven days that end on the day must have a count.
    """
    found = {}
    for day in sorted({*counts, *(day + 1 for day in counts)}):
        week = [counts[one] for one in range(day - 6, day + 1) if one in counts]
        is_there = day in counts and day >= min(counts) + 6 and len(week) >= 4
        found[day] = sum(week) / len(week) if is_there else NAN
    return found


@pytest.mark.parametrize("days", [14, 70, 71])
def test_the_line_is_the_average_of_seven_days(days: int) -> None:
    """It begins on the seventh day, in the middle of the bar."""
    expected = averages({FIRST + n: count for n, (_, count) in enumerate(series(days))})
    is_drawn = [value == value for value in expected.values()]
    assert is_drawn == [False] * 6 + [True] * (days - 6) + [False]
    assert of_days(days).line() == pytest.approx(expected, nan_ok=True)
    assert of_days(days).legend() == ["7-day average"]


def test_less_than_two_weeks_have_no_line() -> None:
    assert (of_days(13).line(), of_days(13).legend()) == ({}, [])


def test_the_line_is_broken_at_gaps() -> None:
    """It is broken too where fewer than four of seven days have a count."""
    missing = (9, 16, 17, 18, 19)
    present = (FIRST + n for n in range(24) if n not in missing)
    counts = dict(zip(present, COUNTS, strict=False))
    epoch = date(1970, 1, 1)
    rows = [(str(epoch + timedelta(day)), count) for day, count in counts.items()]
    expected = averages(counts)
    breaks = (9, 16, 24)  # of each the first day
    assert [n for n in breaks if expected[FIRST + n] == expected[FIRST + n]] == []
    assert Drawn(rows).line() == pytest.approx(expected, nan_ok=True)
    drawn_ = Drawn(rows)
    assert drawn_.legend() == ["no data", "7-day average"]
    box = drawn_.axes.get_legend().get_window_extent()
    frame = drawn_.axes.get_window_extent()
    assert box.y0 > frame.y1  # it is above the bars, at the right
    assert frame.x1 - 20 < box.x1 <= frame.x1


@pytest.mark.parametrize("days", [1, 3, 13])
def test_a_label_is_over_the_middle_of_its_bar(days: int) -> None:
    expected = [
        (FIRST + n, count, f"{count:,}") for n, (_, count) in enumerate(series(days))
    ]
    assert of_days(days).labels() == expected
    axes = of_days(days).axes
    for text, (day, count, _) in zip(axes.texts, expected, strict=True):
        middle, top = axes.transData.transform((day, count))
        box = text.get_window_extent()
        assert (box.x0 + box.x1) / 2 == pytest.approx(middle, abs=1)
        assert top < box.y0 < top + 10


def test_many_days_have_no_labels() -> None:
    assert of_days(14).labels() == []


@pytest.mark.parametrize("count", [999_999, 8_888_888, 88_888_888])
@pytest.mark.parametrize("days", [1, 7, 8, 13])
def test_labels_do_not_touch(days: int, count: int) -> None:
    """They touch neither each other, whatever their heights, nor the edges."""
    rows = [(day, count - n % 2) for n, (day, _) in enumerate(series(days))]
    figure = Drawn(rows)
    boxes = [text.get_window_extent() for text in figure.axes.texts]
    widest = max(box.width for box in boxes)
    gaps = [right.x0 - left.x1 for left, right in itertools.pairwise(boxes)]
    assert len(boxes) == days
    assert [gap for gap in gaps if gap < 3] == [], f"labels of {widest} pixels"
    frame = figure.figure.bbox
    right, top = frame.x1, figure.axes.bbox.y1
    assert [b for b in boxes if b.x0 < 0 or b.x1 > right or b.y1 > top] == []


@pytest.mark.parametrize("days", [1, 10, 11, 12, 13, 14, 70, 71, 400])
def test_dates_do_not_touch(days: int) -> None:
    figure = of_days(days)
    labels = [label for label in figure.axes.get_xticklabels() if label.get_text()]
    boxes = [label.get_window_extent() for label in labels]
    gaps = [right.x0 - left.x1 for left, right in itertools.pairwise(boxes)]
    assert 1 <= len(boxes) <= 13
    assert [gap for gap in gaps if gap < 3] == []


def test_which_dates_are_named() -> None:
    """Of a few days each is named, of some weeks the Mondays, of many days some."""
    from matplotlib.dates import num2date

    few = ["Sun\n2019-12-29", "Mon\n2019-12-30", "Tue\n2019-12-31"]
    assert of_days(3).ticks() == few
    assert of_days(10).ticks()[-1] == "Tue\n2020-01-07"
    assert of_days(15).ticks() == ["Mon\n2019-12-30", "Mon\n2020-01-06"]
    assert {text[:4] for text in of_days(70).ticks()} == {"Mon\n"}
    assert "2021-01-01" in of_days(1000).ticks()
    named = of_days(71)
    assert named.ticks() == [f"{num2date(x):%Y-%m-%d}" for x in named.axes.get_xticks()]


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, ["0", "1"]),
        (1, ["0", "1"]),
        (3, ["0", "1", "2", "3"]),
        (20, ["0", "5", "10", "15", "20"]),
    ],
)
def test_the_axis_of_users_has_whole_numbers(count: int, expected: list[str]) -> None:
    axes = Drawn([("2020-01-01", count)]).axes
    low, high = axes.get_ylim()
    shown = zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)
    labels = [label.get_text() for value, label in shown if low <= value <= high]
    assert labels == expected


@given(st.dictionaries(st.integers(0, 40), st.integers(0, 1000), min_size=1))
def test_week_averages(some: dict[int, int]) -> None:
    counts = dict(sorted(some.items()))
    found = week_averages(counts)
    assert list(found) == sorted(found)
    assert found == pytest.approx(averages(counts), nan_ok=True)


# -- What it says


def test_what_a_picture_says() -> None:
    said = picture_texts(picture(series(3), RULE, ".svg"))
    assert "Active users per day" in said
    rule = "US/Central dates · user_engagement of at least 3000 ms · *_event"
    assert f"{rule} · 2019-12-29 to 2019-12-31" in said
    days = {day for day, _ in series(3)}
    assert days | {"1,000", "1,037", "1,074"} <= set(said)


def test_the_look_of_a_picture() -> None:
    """Light lines lie behind the bars; words are small; the only frame is an axis."""
    from matplotlib.text import Text

    drawn_ = Drawn(series(14))
    axes = drawn_.axes
    assert axes.get_axisbelow() is True
    ticks = [tick.tick1line for tick in axes.xaxis.get_major_ticks()]
    assert {tick.get_markersize() for tick in ticks} == {3.5}
    across, along = axes.get_ygridlines(), axes.get_xgridlines()
    lines = {(line.get_color(), line.get_visible()) for line in across}
    assert lines == {("0.9", True)}
    assert {line.get_visible() for line in along} == {False}
    frame = [side for side, spine in axes.spines.items() if spine.get_visible()]
    assert frame == ["bottom"]
    ticks = [tick.tick1line for tick in axes.yaxis.get_major_ticks()]
    assert {tick.get_markersize() for tick in ticks} == {0}
    figure = drawn_.figure
    assert (tuple(figure.get_size_inches()), figure.dpi) == ((10, 5), 120)
    words = {text.get_text(): text for text in figure.findobj(Text)}
    title, caption = words[axes.get_title(loc="left")], words[figure.get_supxlabel()]
    assert title.get_fontsize() == 14
    assert (caption.get_fontsize(), caption.get_color()) == (8, "0.4")
    assert (caption.get_position()[0], caption.get_ha()) == (0.01, "left")
    assert [text.get_fontsize() for text in axes.get_legend().get_texts()] == [9]
    assert axes.get_legend().get_frame_on() is False


def test_a_picture_of_no_dates() -> None:
    assert picture_texts(picture([], None, ".svg")) == [
        "Active users per day",
        "no dates yet",
    ]
    assert picture_texts(picture([], RULE, ".svg")) == [
        "Active users per day",
        "no dates yet",
    ]


def test_a_picture_without_a_known_rule() -> None:
    """A role may read the counts alone."""
    said = picture_texts(picture(series(2), None, ".svg"))
    assert "2019-12-29 to 2019-12-30" in said


@pytest.mark.parametrize("suffix", MAGIC)
@pytest.mark.parametrize("days", [3, 40])
def test_a_picture_is_a_function_of_the_table(days: int, suffix: str) -> None:
    """The same rows give the same bytes, on any day."""
    first = picture(series(days), RULE, suffix)
    assert first.startswith(MAGIC[suffix])
    assert first == picture(series(days), RULE, suffix)
    assert b"Date>" not in first
    assert b"CreationDate" not in first
    assert b"Software" not in first  # with a version of matplotlib
    assert first != picture(series(days, first="2019-12-28"), RULE, suffix)


STRANGE_TABLES: dict[str, Rows] = {
    "the first date": [("0001-01-01", 1)],
    "the last date": [("9999-12-31", 1)],
    "all of time": [("0001-01-01", 0), ("9999-12-31", 10**15)],
    "nobody": [("2020-02-29", 0)],
    "everybody": [("2020-02-29", 2**63 - 1)],
    "odd days": series(400, missing=tuple(range(1, 400, 2))),
}


@pytest.mark.parametrize("rows", STRANGE_TABLES.values(), ids=STRANGE_TABLES)
def test_pictures_of_strange_tables(rows: Rows) -> None:
    """The bars are there, and the caption names the rule as it is."""
    names, globs = ("$\\frac$", "*"), ("$\\frac$", "漢字_*", "a" * 500)
    odd_rule = Rule("Europe/Berlin", names, 10**15, globs)
    figure = Drawn(rows, odd_rule)
    assert [height for *_, height in figure.bars()] == [count for _, count in rows]
    caption = "".join(figure.figure.get_supxlabel().split("\n"))
    rule = f"Europe/Berlin dates · $\\frac$, * of at least {10**15} ms"
    days = " to ".join(dict.fromkeys([rows[0][0], rows[-1][0]]))
    for part in (rule, *globs, days):
        assert part.replace(" ", "") in caption.replace(" ", "")
    assert picture(rows, odd_rule, ".png").startswith(MAGIC[".png"])


# -- The command


def test_plot_draws_the_whole_table(loader: Loader) -> None:
    loader.load(SAMPLE)
    late = loader.file(lines(event("late", time=NOON + 5 * DAY)))
    done = loader.run("--quiet", "--plot", "a.svg", late)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    said = picture_texts((loader.directory / "a.svg").read_bytes())
    rule = "US/Central dates · user_engagement of at least 3000 ms · *_event"
    assert f"{rule} · 2019-12-29 to 2020-01-04" in said
    assert {"11", "31", "22", "1", "no data"} <= set(said)


def test_plot_without_events(loader: Loader) -> None:
    loader.load("--timezone", "Europe/Berlin", SAMPLE)
    before = loader.content()
    for name in ("a.SVG", "b.svg"):
        done = loader.run("--plot", name)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    first = (loader.directory / "a.SVG").read_bytes()
    assert first == (loader.directory / "b.svg").read_bytes()
    assert "Europe/Berlin dates" in " ".join(picture_texts(first))
    assert loader.content() == before
    names = sorted(path.name for path in loader.directory.iterdir())
    assert names == ["a.SVG", "active_user_table.db", "b.svg"]


def test_an_empty_database_is_drawn_too(loader: Loader) -> None:
    loader.db.touch()
    done = loader.run("--plot", "a.svg")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert "no dates yet" in picture_texts((loader.directory / "a.svg").read_bytes())


def test_a_dry_run_draws_nothing(loader: Loader) -> None:
    loader.load("--dry-run", "--plot", "a.png", SAMPLE)
    assert list(loader.directory.iterdir()) == []


def test_a_database_that_is_not_there_cannot_be_drawn(loader: Loader) -> None:
    said = loader.refuse("--plot", "a.png")
    what = "there is no such database; load events into it first"
    assert said == f"Error: active_user_table.db: {what}\n"
    assert list(loader.directory.iterdir()) == []


def test_a_database_without_the_tables_is_drawn_empty(loader: Loader) -> None:
    loader.execute("CREATE TABLE other (x)")
    before = loader.content()
    assert "no dates yet" in picture_texts(loader.draw("svg"))
    assert loader.content() == before


def test_tables_of_another_program_cannot_be_drawn(loader: Loader) -> None:
    loader.execute("CREATE TABLE active_user_table (x)")
    what = "it has a table active_user_table, but no active_user, as in schema.sql"
    said = f"Error: active_user_table.db: {what}; choose another --db\n"
    assert loader.refuse("--plot", "a.png") == said


def test_a_row_changed_by_hand_cannot_be_drawn(loader: Loader) -> None:
    """One line tells what is wrong; what else was loaded is loaded."""
    loader.load(SAMPLE)
    loader.execute("INSERT INTO active_user_table VALUES ('2020-02-30', 12)")
    what = "the plot could not be drawn (any load is committed)"
    expected = f"Error: a.png: {what}: ValueError: day is out of range for month\n"
    assert loader.refuse("--plot", "a.png") == expected
    done = loader.run("-q", "--plot", "a.png", loader.file(lines(event("late"))))
    assert (done.returncode, done.stdout, done.stderr.decode()) == (1, b"", expected)
    assert loader.table()["2019-12-30"] == 32
    assert not (loader.directory / "a.png").exists()


# -- Where it is written


@pytest.mark.parametrize("target", ["there/real.png", "{}/there/real.png"])
def test_a_picture_behind_a_link(loader: Loader, target: str) -> None:
    """It is written there, with the mode that it had; the link stays."""
    real, link = loader.directory / "there" / "real.png", loader.directory / "link.png"
    real.parent.mkdir()
    real.write_bytes(b"old")
    real.chmod(0o604)
    link.symlink_to(target.format(loader.directory))
    loader.load("--plot", "link.png", SAMPLE)
    assert link.is_symlink()
    assert real.read_bytes() == loader.draw("png")
    assert stat.S_IMODE(real.stat().st_mode) == 0o604
    assert [path.name for path in real.parent.iterdir()] == ["real.png"]


def test_a_picture_behind_a_link_to_nothing_yet(loader: Loader) -> None:
    link = loader.directory / "link.png"
    link.symlink_to("real.png")
    loader.load("--plot", "link.png", SAMPLE)
    assert link.is_symlink()
    assert (loader.directory / "real.png").read_bytes() == loader.draw("png")


def test_the_mode_of_a_picture(loader: Loader) -> None:
    """It is that of any new file, or what somebody has changed it to."""
    path = loader.directory / "a.png"
    for before, after in ((None, 0o640), (0o606, 0o606)):
        if before:
            path.chmod(before)
        args = ["-q", "--plot", "a.png", SAMPLE]
        with loader.start(*args, umask=0o027) as process:
            assert process.communicate(timeout=60) == (b"", b"")
        assert process.returncode == 0
        assert stat.S_IMODE(path.stat().st_mode) == after


@AS_ROOT
@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_a_full_disk_for_the_picture(loader: Loader, disk: Path, suffix: str) -> None:
    loader.load(SAMPLE)
    (disk / "other").write_bytes(bytes((1 << 20) - 4096))
    path = f"{disk}/x.{suffix}"
    what = "No space left on device; free some disk space and load again"
    said = (
        f"Error: {path}: the plot could not be drawn (any load is committed): {what}\n"
    )
    assert loader.refuse("--plot", path) == said
    assert [file.name for file in disk.iterdir()] == ["other"]


# -- Wherever it is drawn


def test_plot_in_an_environment_without_anything(loader: Loader) -> None:
    """Cron has no display and maybe no home for caches. The font may lack letters."""
    events = loader.file(lines(event(key="漢字")))
    options = ["--quiet", "--valuable-event", "漢字", "--plot", "a.png"]
    done = loader.run_under("env -i HOME=/proc/none", *options, SAMPLE, events)
    assert done == (0, b"", "")
    assert (loader.directory / "a.png").read_bytes() == loader.draw("png")


@pytest.fixture(scope="module")
def drawn_before(tmp_path_factory: pytest.TempPathFactory) -> Loader:
    """Return a loader whose database has been drawn in drawn.svg."""
    loader = Loader(tmp_path_factory.mktemp("drawn"))
    loader.load("--plot", "drawn.svg", SAMPLE)
    return loader


def assert_drawn_alike(loader: Loader, drawn_before: Loader, **env: str) -> None:
    """Draw the same database again, in a process of its own and in silence."""
    args = ["--db", drawn_before.db, "--plot", "a.svg"]
    done = loader.run(*args, env=env, process=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    expected = (drawn_before.directory / "drawn.svg").read_bytes()
    assert (loader.directory / "a.svg").read_bytes() == expected


@pytest.mark.parametrize("backend", ["TkAgg", ""])
def test_the_backend_of_the_environment(
    loader: Loader, drawn_before: Loader, backend: str
) -> None:
    assert_drawn_alike(loader, drawn_before, MPLBACKEND=backend)


SETTINGS = {
    "that draw otherwise": b"axes.facecolor: black\nsavefig.dpi: 20\nbackend: TkAgg\n",
    "with keys that are none": b"no.such.key: 1\naxes.grid\n",
    "with values that are none": (
        b"axes.grid: perhaps\nbackend: none such\nfigure.dpi: many\n"
    ),
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_the_settings_of_matplotlib_change_nothing(
    loader: Loader, drawn_before: Loader, settings: bytes
) -> None:
    """Matplotlib looks for a matplotlibrc in the working directory and elsewhere."""
    name = loader.file(settings, "matplotlibrc")
    assert_drawn_alike(loader, drawn_before)
    (loader.directory / name).rename(loader.directory / "named")
    named = str(loader.directory / "named")
    assert_drawn_alike(loader, drawn_before, MATPLOTLIBRC=named)


def test_the_working_directory_of_somebody_else(loader: Loader) -> None:
    """As with sudo -u in /root, nothing in it may be opened, nor may it be entered."""
    loader.load(SAMPLE)
    picture = loader.draw("png")
    closed = loader.directory / "closed"
    closed.mkdir()
    shell = f'chmod 0 . && exec {WITHOUT_CAPABILITIES} "$@"'
    files = ["--db", loader.db, "--plot", loader.directory / "x.png"]
    command = ["sh", "-c", shell, "sh", *loader.command(*files)]
    done = subprocess.run(command, cwd=closed, capture_output=True, timeout=60)
    closed.chmod(0o755)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert (loader.directory / "x.png").read_bytes() == picture


def test_settings_that_were_made_before() -> None:
    """A notebook makes them, or a matplotlibrc that is found all the same."""
    import matplotlib

    rows = series(3)
    expected = picture(rows, RULE, ".png")
    settings: Any = {"figure.facecolor": "red", "font.size": 20, "savefig.dpi": 50}
    with matplotlib.rc_context(settings):
        assert picture(rows, RULE, ".png") == expected


# -- Eleven to thirteen days


@pytest.mark.parametrize("first", ["2019-12-29", "2020-02-26", "2019-12-23"])
@pytest.mark.parametrize("days", [11, 12, 13])
def test_each_day_that_is_numbered_is_named(days: int, first: str) -> None:
    """Neither the numbers nor the dates touch each other or an edge."""
    rows = [(day, 88_888_888) for day, _ in series(days, first=first)]
    figure = Drawn(rows)
    expected = [f"{date.fromisoformat(day):%a%n%Y-%m-%d}" for day, _ in rows]
    assert figure.ticks() == expected
    assert [text for _, _, text in figure.labels()] == ["88,888,888"] * days
    axes = figure.axes
    for texts in (axes.get_xticklabels(), axes.texts):
        boxes = [text.get_window_extent() for text in texts]
        gaps = [right.x0 - left.x1 for left, right in itertools.pairwise(boxes)]
        assert min(gaps) >= 3
        assert boxes[0].x0 >= 0
        assert boxes[-1].x1 <= figure.figure.bbox.x1
