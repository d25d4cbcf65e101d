"""Search with a coverage-guided fuzzer for files that the scanner reads in another way than the plain reading does.

    pip install atheris
    python tests/fuzz.py -max_total_time=60

Options are libFuzzer's. A find ends the run with the traceback, and leaves the input in a file crash-*.
"""

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["load_active_users", "json"]):
    from conftest import SAMPLE, event, lines

    import load_active_users as loader
import plain
from test_load import ACTIVE, BAD_RECORDS, INACTIVE, NO_ENGAGEMENT
from test_scan import scan, without_zeros

DIRECTORY = Path(tempfile.mkdtemp())
SEEDS = [*ACTIVE.values(), *INACTIVE.values(), *NO_ENGAGEMENT.values(), *(row[1] for row in BAD_RECORDS)]


def read_alike(data: bytes) -> None:
    """Two bytes of input say how it is cut into ranges and blocks, the rest is the file."""
    if len(data) < 2 or data[2:].startswith((loader.GZIP, loader.ZSTD)):
        return
    path = DIRECTORY / "events"
    path.write_bytes(data[2:])
    cuts = [data[0], 3 * data[0]] if data[0] else []
    assert scan(path, cuts, 1 + 7 * data[1]) == without_zeros(plain.read(data[2:]))


def main() -> None:
    corpus = DIRECTORY / "corpus"
    corpus.mkdir()
    sample = SAMPLE.read_bytes().splitlines(keepends=True)
    files = [lines(seed) for seed in SEEDS if len(lines(seed)) < 5000]
    files += [b"".join(files[:3]), lines(event(), b"", b"{", event("b")), b"".join(sample[9:11])]
    for number, file in enumerate(files):
        (corpus / str(number)).write_bytes(bytes([number % 256, 255 - number % 256]) + file)
    arguments = [sys.argv[0], "-max_len=8192", "-rss_limit_mb=4096", *sys.argv[1:], str(corpus)]
    atheris.Setup(arguments, read_alike)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
