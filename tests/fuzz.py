"""Search with a coverage-guided fuzzer for files that the scanner and the oracle read
in different ways.

    pip install atheris
    python tests/fuzz.py -max_total_time=60

Options are those of libFuzzer. A find ends the run with the traceback, and leaves the
input in a file crash-*.
"""

import itertools
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["load_active_users", "json"]):
    # This imports the program.
    from helpers import ALL_DATES, SAMPLE, event, lines, scan
import oracle
from records import ACTIVE, BAD_RECORDS, INACTIVE, NO_ENGAGEMENT

DIRECTORY = Path(tempfile.mkdtemp())
SEEDS = [*ACTIVE.values(), *INACTIVE.values(), *NO_ENGAGEMENT.values()]
SEEDS += [row[1] for row in BAD_RECORDS]
NAMES = [("user_engagement",), ("*",), ("user_engagement", "page_view"), ("x",)]
DATES = [ALL_DATES, ("2019-12-30", "2019-12-30")]
RULES = [(oracle.Rule(names=n), dates) for n, dates in itertools.product(NAMES, DATES)]
HEADER = 3


def read_alike(data: bytes) -> None:
    """Read a file in both ways.

    Two bytes of the input say how the file is cut into ranges and blocks. One says by
    which rule it is read. The rest is the file.
    """
    file = data[HEADER:]
    if len(data) < HEADER or oracle.other_format(file):
        return
    path = DIRECTORY / "events"
    path.write_bytes(file)
    cuts = [data[0], 3 * data[0]] if data[0] else []
    rule, dates = RULES[data[2] % len(RULES)]
    found = scan(path, cuts, 1 + 7 * data[1], rule, dates)
    assert found == oracle.read(file, rule, dates)


def main() -> None:
    corpus = DIRECTORY / "corpus"
    corpus.mkdir()
    sample = SAMPLE.read_bytes().splitlines(keepends=True)
    files = [lines(seed) for seed in SEEDS if len(lines(seed)) < 5000]
    files += [b"".join(files[:3]), lines(event(), b"", b"{", event("b"))]
    files += [b"".join(sample[9:11])]
    for number, file in enumerate(files):
        header = bytes([number % 256, 255 - number % 256, number % 256])
        (corpus / str(number)).write_bytes(header + file)
    limits = ["-max_len=8192", "-rss_limit_mb=4096"]
    arguments = [sys.argv[0], *limits, *sys.argv[1:], str(corpus)]
    atheris.Setup(arguments, read_alike)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
