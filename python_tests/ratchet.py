"""Counts of code and language, and the ceilings in ``ratchet.toml`` that they must not exceed.

    python -m python_tests.ratchet                        # counts beside their ceilings
    python -m python_tests.ratchet --list fedkern participles
    python -m python_tests.ratchet --lower                # writes counts that have fallen into ratchet.toml

Ceilings only fall.  A feature that needs more lines removes others.
"""

import argparse
import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CEILINGS = Path(__file__).with_name("ratchet.toml")
CODE = ("fedkern", "python_tests", "benchmarks")
LANGUAGE = ("fedkern", "python_tests")
KINDS = {
    "semicolons": "docstrings whose first paragraph has a semicolon",
    "clauses": "docstrings that begin with What, Whether, How or another clause",
    "participles": "functions named by a bare participle",
    "grammar": "names and arguments that are grammar words",
    "any": "uses of Any in signatures",
}
CLAUSE = re.compile(r"(What|Whether|How|Whoever|Whose|Where|That|Those|Nothing|As )\b")
GRAMMAR = frozenset(
    re.findall(
        r"\w+",
        "each every first one ones what there rest some other others another which who whose that this those these it "
        "its they them both none such same more most least many few much whole apart alone elsewhere here now then "
        "still",
    )
)
IRREGULAR = frozenset(
    re.findall(
        r"\w+",
        "told said given known made kept found left held shown seen sent taken brought done gone written drawn chosen "
        "begun spoken met lost lent meant built bought caught felt led paid sold spent stood thought understood worn "
        "won bound borne laid lain hidden spared",
    )
)
QUOTES = re.compile(r"'''|\"\"\"")
NO_PARTICIPLES = {"seed", "speed", "embed", "shed", "feed", "need", "exceed", "proceed", "indeed", "red"}


def walk(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield all nodes but operators and contexts, in half the time that ``ast.walk`` takes."""
    nodes = [tree]
    while nodes:
        node = nodes.pop()
        yield node
        for field in node._fields:
            value = getattr(node, field, None)
            if isinstance(value, list):
                nodes += [child for child in value if isinstance(child, ast.AST)]
            elif isinstance(value, ast.AST) and value._fields:
                nodes.append(value)


def count_code_lines(text: str, nodes: list[ast.AST]) -> int:
    """Return the number of lines without blank ones, comments, and strings that stand alone (docstrings)."""
    rows = text.split("\n")
    lines = {number for number, row in enumerate(rows, 1) if row.strip() and row.lstrip()[0] != "#"}
    docstrings = set()
    for node in nodes:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            docstrings.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        elif isinstance(node, (ast.Constant, ast.JoinedStr)) and QUOTES.search(rows[node.lineno - 1]):
            lines.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines - docstrings)


def find_language(nodes: list[ast.AST]) -> Iterator[tuple[str, int, str]]:
    """Yield kind, line number and wording of each finding of ``KINDS``."""
    for node in nodes:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)):
            summary = (ast.get_docstring(node) or "").split("\n\n")[0]
            line = getattr(node, "lineno", 1)
            if ";" in summary:
                yield "semicolons", line, summary[:90]
            if CLAUSE.match(summary):
                yield "clauses", line, summary[:90]
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            if is_participle(node.name):
                yield "participles", node.lineno, node.name
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            for argument in arguments:
                if argument.arg in GRAMMAR:
                    yield "grammar", node.lineno, argument.arg
            for hint in (*(argument.annotation for argument in arguments), node.returns):
                names = walk(hint) if hint is not None else ()
                for _ in (name for name in names if isinstance(name, ast.Name) and name.id == "Any"):
                    yield "any", node.lineno, node.name
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id in GRAMMAR:
            yield "grammar", node.lineno, node.id


def is_participle(name: str) -> bool:
    """Return whether a function's name is one past participle, without an object or an auxiliary."""
    word = name.lstrip("_")
    return word in IRREGULAR or (
        word.endswith("ed") and len(word) > 4 and "_" not in word and word not in NO_PARTICIPLES
    )


def read_files(folder: str) -> Iterator[tuple[Path, str, list[ast.AST]]]:
    """Yield path, text and syntax of every Python file below a folder of the checkout."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        text = path.read_text()
        yield path, text, [*walk(ast.parse(text))]


def count_all() -> dict[str, dict[str, int]]:
    """Return all counts in the form of ``ratchet.toml``: a table of code lines, and one of language per folder."""
    counts: dict[str, dict[str, int]] = {"code_lines": {}}
    for folder in CODE:
        lines, kinds = 0, dict.fromkeys(KINDS, 0)
        for _, text, nodes in read_files(folder):
            lines += count_code_lines(text, nodes)
            for kind, _, _ in find_language(nodes) if folder in LANGUAGE else ():
                kinds[kind] += 1
        counts["code_lines"][folder] = lines
        if folder in LANGUAGE:
            counts[folder] = kinds
    return counts


def read_ceilings() -> dict[str, dict[str, int]]:
    """Return the ceilings of ``ratchet.toml``."""
    return tomllib.loads(CEILINGS.read_text())


def lower(counts: dict[str, dict[str, int]]) -> None:
    """Write each count that lies below its ceiling into ``ratchet.toml``.

    Comments stay.
    """
    lines, table = [], ""
    for line in CEILINGS.read_text().splitlines(keepends=True):
        if heading := re.match(r"\[(\w+)\]", line):
            table = heading[1]
        elif entry := re.match(r"(\w+) = (\d+)", line):
            count = min(int(entry[2]), counts[table][entry[1]])
            line = f"{entry[1]} = {count}{line[entry.end() :]}"
        lines.append(line)
    CEILINGS.write_text("".join(lines))


def main() -> None:
    """Run the command line of the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lower", action="store_true", help="lower the ceilings to counts that have fallen")
    parser.add_argument("--list", nargs=2, metavar=("FOLDER", "KIND"), help=f"list places; kinds: {', '.join(KINDS)}")
    arguments = parser.parse_args()
    if arguments.list:
        folder, wanted = arguments.list
        for path, _, nodes in read_files(folder):
            for kind, line, wording in sorted(find_language(nodes), key=lambda place: place[1]):
                if kind == wanted:
                    print(f"{path.relative_to(ROOT)}:{line} {wording}")
        return
    counts, ceilings = count_all(), read_ceilings()
    for table, entries in ceilings.items():
        for name, ceiling in entries.items():
            print(f"{table} {name}: {counts[table][name]:,} of {ceiling:,}")
    if arguments.lower:
        lower(counts)


if __name__ == "__main__":
    sys.exit(main())
