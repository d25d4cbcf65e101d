"""Break load_active_users.py in many small ways, and show what no test notices.

    python tests/mutate.py --sample 200 --seed 1 --section "The rule" --dir /tmp/mutants

In a mutant one expression or statement differs: a comparison, an operator, a constant,
a condition negated, an argument or a statement left out. The tests that reach the
statement run on a copy of the project, the quickest first, until one fails; a mutant
per processor at once. A survivor is shown as a diff: a test is missing, or the change
makes no difference that can be seen.

Which tests reach which statement is measured first, by running all of them twice; --dir
keeps that for the next time. Not part of CI: a survivor takes minutes.
"""

import ast
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import zlib
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from bisect import bisect
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = "load_active_users.py"
SILENT = {"annotation", "returns", "names"}  # fields of a node that change nothing
SWAPS: list[tuple[Any, Any]] = [
    *((ast.Lt, ast.LtE), (ast.Gt, ast.GtE), (ast.Eq, ast.NotEq), (ast.Is, ast.IsNot)),
    *(
        (ast.In, ast.NotIn),
        (ast.Add, ast.Sub),
        (ast.Mult, ast.FloorDiv),
        (ast.And, ast.Or),
    ),
    *((ast.LShift, ast.RShift), (ast.BitOr, ast.BitAnd), (ast.Break, ast.Continue)),
    *(("min", "max"), ("any", "all"), ("find", "rfind"), ("startswith", "endswith")),
]
OTHER = dict(SWAPS) | {other: one for one, other in SWAPS}
# Each statement of a function is given a call of this: it logs the test that has
# reached it, also in processes of the command.
REACHED = """
import os as _os
def _reached(line, known=set()):
    row = f"{{line}} {{_os.environ.get('PYTEST_CURRENT_TEST')}}\\n"
    try:
        if row not in known:
            file = _os.open({log!r}, _os.O_WRONLY | _os.O_APPEND | _os.O_CREAT, 0o666)
            _os.write(file, row.encode())  # without open(), which tests replace
            _os.close(file)
            known.add(row)
    except OSError:
        pass
"""


class Mutant(NamedTuple):
    """Other code for some bytes of the source, and the line of the statement that they
    are in."""

    start: int
    end: int
    code: bytes
    line: int


def variants(node: Any) -> Iterator[ast.AST]:
    """Yield what a node can be broken into."""

    def changed(**fields: Any) -> ast.AST:
        other: ast.AST = copy(node)
        other.__dict__.update(fields)
        return other

    match node:
        case ast.Compare(ops=[op]) if type(op) in OTHER:
            yield changed(ops=[OTHER[type(op)]()])
        case ast.BinOp(op=op) | ast.AugAssign(op=op) if type(op) in OTHER:
            yield changed(op=OTHER[type(op)]())
        case ast.BoolOp(op=op, values=[first, *_, last]):
            yield from (changed(op=OTHER[type(op)]()), first, last)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            yield operand
        case ast.Constant(value=bool(value)):
            yield changed(value=not value)
        case ast.Constant(value=int(value) | float(value)):
            yield changed(value=value + 1)
        case ast.Constant(value=str(value)):
            yield changed(value=value + "X")
        case ast.Constant(value=bytes(value)):
            yield changed(value=value + b"X")
        case ast.JoinedStr(values=values):
            yield changed(values=[*values, ast.Constant("X")])
        case ast.Name(id=name) if name in OTHER:
            yield changed(id=OTHER[name])
        case ast.Attribute(attr=name) if name in OTHER:
            yield changed(attr=OTHER[name])
        case ast.Call(keywords=keywords):
            yield from (
                changed(keywords=[k for k in keywords if k is not out])
                for out in keywords
            )
        case ast.Break() | ast.Continue():
            yield OTHER[type(node)]()
    if isinstance(node, ast.Expr | ast.Raise | ast.Return | ast.Delete | ast.AugAssign):
        yield ast.Pass()


def mutants(text: bytes) -> Iterator[Mutant]:
    """Yield the mutants of a source."""
    lines = text.splitlines(keepends=True)
    starts = list(itertools.accumulate(map(len, lines), initial=0))

    def walk(node: Any, line: int, is_condition: bool = False) -> Iterator[Mutant]:
        if is_docstring(node):
            return
        if isinstance(node, ast.stmt) and starts_line(lines, node):
            line = node.lineno
        codes = [f"({ast.unparse(other)})" for other in variants(node)]
        if is_condition and not isinstance(node, ast.UnaryOp | ast.Compare):
            codes.append(f"(not ({ast.unparse(node)}))")
        for code in codes:
            if isinstance(node, ast.stmt):
                code = code[1:-1]
            start = starts[node.lineno - 1] + node.col_offset
            yield Mutant(
                start,
                starts[node.end_lineno - 1] + node.end_col_offset,
                code.encode(),
                line,
            )
        for name, value in ast.iter_fields(node):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST) and name not in SILENT:
                    yield from walk(child, line, name == "test")

    return walk(ast.parse(text), 0)


def is_docstring(node: Any) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def starts_line(lines: list[bytes], node: Any) -> bool:
    """Whether another statement can be put on a line before a statement."""
    line = lines[node.lineno - 1]
    return not line[: node.col_offset].strip() and not line.lstrip().startswith(
        (b"elif", b"@")
    )


def traced(text: bytes, log: Path) -> bytes:
    """A source whose statements log the test that reaches them."""
    lines = text.splitlines(keepends=True)
    tree = ast.parse(text)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    for node in {
        node
        for function in functions
        for part in function.body
        for node in ast.walk(part)
        if not is_docstring(node)  # click prints that of main()
    }:
        decorators = getattr(node, "decorator_list", ())
        if isinstance(node, ast.stmt) and starts_line(lines, node) and not decorators:
            indent = b" " * node.col_offset
            lines[node.lineno - 1] = (
                b"%s_reached(%d)\n" % (indent, node.lineno) + lines[node.lineno - 1]
            )
    future = b"from __future__ import annotations\n"
    source = b"".join(lines).replace(
        future, future + REACHED.format(log=str(log)).encode(), 1
    )
    # Tests share a process: one must not find what another has cached.
    return re.sub(rb"(?m)^@lru_cache\(.*\)$", b"@lru_cache(maxsize=0)", source)


def run_tests(
    directory: Path, name: str, text: bytes, *arguments: object, seconds: float = 9999
) -> int:
    """The exit status of pytest in a copy of the project with another text of the
    script."""
    copied = directory / name
    if not copied.exists():
        shutil.copytree(
            ROOT, copied, ignore=shutil.ignore_patterns(".git", ".venv", ".*cache")
        )
    (copied / SCRIPT).write_bytes(text)
    limits = ["prlimit", "--as=16000000000", "timeout", "-s", "KILL", seconds]
    command = [
        *limits,
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        *arguments,
    ]
    environment = {
        **os.environ,
        "PYTHONDONTWRITEBYTECODE": "1",
    }  # it can't tell mutants apart
    done = subprocess.run(
        list(map(str, command)), cwd=copied, env=environment, capture_output=True
    )
    return done.returncode


def measure(
    directory: Path, text: bytes
) -> tuple[dict[str, float], dict[str, list[str]]]:
    """The seconds that each test takes that succeeds, and the tests that reach each
    line."""
    report, log = directory / "report.xml", directory / "reached"
    taken: dict[str, float] = defaultdict(float)
    failed = set()
    print("Measuring the tests, in two runs ...", file=sys.stderr)
    run_tests(directory, "plain", text, f"--junitxml={report}")
    for case in ElementTree.parse(report).iter("testcase"):
        name = case.attrib["name"].split("[")[0]
        test = f"{case.attrib['classname'].replace('.', '/')}.py::{name}"
        taken[test] += float(case.attrib["time"])
        if any(case.find(what) is not None for what in ("failure", "error")):
            failed.add(test)
    run_tests(directory, "traced", traced(text, log))
    reached: dict[str, set[str]] = defaultdict(set)
    for row in log.read_text().splitlines():
        line, _, test = row.partition(" ")
        reached[line].add(re.split(r"\[| \(", test)[0])
    good = {test: seconds for test, seconds in taken.items() if test not in failed}
    return good, {line: [*tests & good.keys()] for line, tests in reached.items()}


def difference(text: bytes, mutant: Mutant) -> str:
    """The lines that a mutant changes, as a diff."""
    first = text.rfind(b"\n", 0, mutant.start) + 1
    last = text.index(b"\n", mutant.end)
    after = text[first : mutant.start] + mutant.code + text[mutant.end : last]
    rows = [f"-{row}" for row in text[first:last].decode().splitlines()]
    number = text[:first].count(b"\n") + 1
    return "\n".join(
        [
            f"{SCRIPT}:{number}",
            *rows,
            *(f"+{row}" for row in after.decode().splitlines()),
        ]
    )


def main() -> None:
    parser = ArgumentParser(
        description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sample", type=int, default=10**6, help="mutants to draw (default: all)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the drawing (default: 0)"
    )
    parser.add_argument(
        "--section", default="", help='a section of the file, as in "The rule"'
    )
    parser.add_argument("--dir", type=Path, help="where to keep what was measured")
    options = parser.parse_args()
    text = (ROOT / SCRIPT).read_bytes()
    sections = re.split(rb"(?m)^(?=# -- )", text)
    ends = list(itertools.accumulate(map(len, sections)))
    heads = [section.partition(b"\n")[0].decode() for section in sections]
    drawn = [
        m for m in mutants(text) if options.section in heads[bisect(ends, m.start)]
    ]
    drawn = random.Random(options.seed).sample(drawn, min(options.sample, len(drawn)))
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        kept = (options.dir or directory) / f"reached-{zlib.crc32(text):x}.json"
        if not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(measure(directory, text)))
        taken, reached = json.loads(kept.read_text())

        def survives(mutant: Mutant) -> bool:
            tests = sorted(
                reached.get(str(mutant.line), taken), key=lambda test: taken[test]
            )
            broken = text[: mutant.start] + mutant.code + text[mutant.end :]
            seconds = 60 + 3 * sum(taken[test] for test in tests)
            name = threading.current_thread().name  # a copy of the project for each
            return not run_tests(
                directory, name, broken, "-x", "-n0", *tests, seconds=seconds
            )

        survivors = 0
        with ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="mutant") as pool:
            found = zip(drawn, pool.map(survives, drawn), strict=True)
            for number, (mutant, survived) in enumerate(found, 1):
                if survived:
                    print(difference(text, mutant), end="\n\n", flush=True)
                    survivors += 1
                print(
                    f"judged {number}, survived {survivors}",
                    file=sys.stderr,
                    flush=True,
                )
    print(
        f"{len(drawn) - survivors} of {len(drawn)} mutants killed, {survivors} survived"
    )


if __name__ == "__main__":
    main()
