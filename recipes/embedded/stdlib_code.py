"""Python code to learn from: the source of the running interpreter's standard library.

Whole modules are held out, by a stable hash of their path, so that a held-out function shares no file with training.
"""

import ast
import hashlib
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SKIPPED_PARTS = {
    "site-packages",
    "test",
    "tests",
    "idlelib",
    "idle_test",
    "lib2to3",
    "encodings",
    "pydoc_data",
    "__phello__",
    "ensurepip",
    "turtledemo",
    "__pycache__",
    "lib-dynload",
    "config",
}
# Tables or generated text rather than code.
SKIPPED_FILES = {"_sysconfigdata", "keyword.py", "token.py", "sre_constants.py", "this.py", "__phello__.foo.py"}
TABLE_FILES = ("html/entities.py", "stringprep.py", "opcode.py", "_pydecimal.py", "pickletools.py", "turtle.py")
SMALLEST, LARGEST = 300, 130_000
BUCKETS, HELD_OUT_BUCKETS = 1000, 35


def library() -> Path:
    """The folder of the standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def modules() -> list[str]:
    """Relative paths of the modules used, sorted."""
    root, found = library(), []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_PARTS & set(relative.parts) or any(part.startswith("config-") for part in relative.parts):
            continue
        if relative.name.startswith("_sysconfigdata") or relative.name in SKIPPED_FILES:
            continue
        if relative.as_posix() in TABLE_FILES or not SMALLEST <= path.stat().st_size <= LARGEST:
            continue
        found.append(relative.as_posix())
    return found


def held_out(relative: str) -> bool:
    """Whether this module is kept away from training; depends on its path alone."""
    digest = hashlib.sha256(relative.encode()).digest()
    return int.from_bytes(digest[:8]) % BUCKETS < HELD_OUT_BUCKETS


def read(relative: str) -> str:
    """A module's source with plain line ends; empty where it is no UTF-8."""
    try:
        return (library() / relative).read_text(encoding="utf-8").replace("\r\n", "\n").strip() + "\n"
    except UnicodeDecodeError:
        return ""


def training_documents() -> Iterator[str]:
    """The sources to train on."""
    yield from (text for path in modules() if not held_out(path) and (text := read(path)))


def held_out_documents() -> Iterator[str]:
    """The sources kept away from training."""
    yield from (text for path in modules() if held_out(path) and (text := read(path)))


def held_out_functions(n: int, seed: int) -> list[str]:
    """Openings of held-out functions: the `def` line and the first lines after it, 3 to 10 lines in all.

    At least three more lines follow in the original. A method comes after the `class` line it belongs to: training
    never shows an indented `def` at the start of a text. The last line's end is left to the model, because a line end
    and the indentation after it are one token; a prompt that ended with it would promise an unindented line.
    """
    found = set()
    for text in held_out_documents():
        lines, tree = text.splitlines(), ast.parse(text)
        owners: list[ast.Module | ast.ClassDef] = [tree, *(n for n in tree.body if isinstance(n, ast.ClassDef))]
        for owner in owners:
            head = [lines[owner.lineno - 1]] if isinstance(owner, ast.ClassDef) else []
            if head and not head[0].rstrip().endswith(":"):
                continue  # the class line goes on below; half of it would be no Python
            for node in owner.body:
                if not isinstance(node, ast.FunctionDef):
                    continue
                opening, last = _opening(node), node.end_lineno or node.lineno
                if len(head) + opening <= 10 and last - node.lineno + 1 >= opening + 3:
                    first = node.lineno - 1
                    found.add("\n".join([*head, *lines[first : first + opening]]))
    chosen = sorted(found)
    random.Random(seed).shuffle(chosen)
    return chosen[:n]


def _opening(node: ast.FunctionDef) -> int:
    """Lines from `def` to the end of the docstring, or three lines where that is less."""
    documented = ast.get_docstring(node) is not None
    end = node.body[0].end_lineno if documented else node.lineno + 2
    return max(3, (end or node.lineno) - node.lineno + 1)


if __name__ == "__main__":
    kept = list(training_documents())
    away = [path for path in modules() if held_out(path)]
    print(len(kept), "modules,", sum(map(len, kept)), "characters; held out:", away)
    print(len(held_out_functions(10_000, 0)), "held-out functions")
    print(*held_out_functions(3, 0), sep="\n---\n")
