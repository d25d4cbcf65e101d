"""Search with a coverage-guided fuzzer for files that the scanner reads in another way
than the plain reading does.

pip install atheris python tests/fuzz.py -max_total_time=60

Options are libFuzzer's. A find ends the run with the traceback, and leaves the input in
a file crash-*.
"""

import itertools
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["load_active_users", "json"]):
    from conftest import SAMPLE, event, lines

    import load_active_users  # noqa: F401 - to be instrumented
import plain
from test_load import ACTIVE, BAD_RECORDS, INACTIVE, NO_ENGAGEMENT
from test_scan import ALL_DATES, scan

DIRECTORY = Path(tempfile.mkdtemp())
SEEDS = [*ACTIVE.values(), *INACTIVE.values(), *NO_ENGAGEMENT.values()]
SEEDS += [row[1] for row in BAD_RECORDS]
NAMES = [("user_engagement",), ("*",), ("user_engagement", "page_view"), ("x",)]
DATES = [ALL_DATES, ("2019-12-30", "2019-12-30")]
RULES = [
    (plain.Rule(names=names), dates) for names, dates in itertools.product(NAMES, DATES)
]
HEADER = 3


def read_alike(data: bytes) -> None:
    """Of the bytes of input two say how the file is cut into ranges and blocks and one
    says by which rule it is read; the rest is the file."""
    file = data[HEADER:]
    if len(data) < HEADER or plain.other_format(file):
        return
    path = DIRECTORY / "events"
    path.write_bytes(file)
    cuts = [data[0], 3 * data[0]] if data[0] else []
    rule, dates = RULES[data[2] % len(RULES)]
    assert scan(path, cuts, 1 + 7 * data[1], rule, dates) == plain.read(
        file, rule, dates
    )


def main() -> None:
    corpus = DIRECTORY / "corpus"
    corpus.mkdir()
    sample = SAMPLE.read_bytes().splitlines(keepends=True)
    files = [lines(seed) for seed in SEEDS if len(lines(seed)) < 5000]
    files += [
        b"".join(files[:3]),
        lines(event(), b"", b"{", event("b")),
        b"".join(sample[9:11]),
    ]
    for number, file in enumerate(files):
        header = bytes([number % 256, 255 - number % 256, number % 256])
        (corpus / str(number)).write_bytes(header + file)
    arguments = [
        sys.argv[0],
        "-max_len=8192",
        "-rss_limit_mb=4096",
        *sys.argv[1:],
        str(corpus),
    ]
    atheris.Setup(arguments, read_alike)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
