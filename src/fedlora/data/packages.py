"""Text of installed Python packages, read from their files: nothing here imports what it reads.

Two uses: docstrings as pretraining text for the embedded language model, and source files as the
private data of the quickstart's clients. The code bases of `HELD_OUT` serve the second use only.
"""

import ast
import importlib.util
import inspect
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

from fedlora.errors import UserError

HELD_OUT = (
    # On every machine with fedlora's core dependencies: networkx, sympy, mpmath, jinja2 and fsspec come with torch,
    # pandas and aiohttp with datasets.
    "networkx",
    "sympy.physics",
    "scipy.stats",
    "asyncio",
    "email",
    "unittest",
    "xml",
    "sklearn.linear_model",
    "pandas.io",
    "torch.distributions",
    "jinja2",
    "fsspec",
    "aiohttp",
    "multiprocessing",
    "mpmath",
    "rich",
    "pydantic",
    "http",
    "importlib",
    "urllib",
    # Some Linux distributions package these apart from Python.
    "tkinter",
    "idlelib",
)
"""Code bases no docstring of which is in the embedded model's pretraining text, in the order the quickstart takes."""

_SKIPPED_FOLDERS = frozenset(
    {"__pycache__", "site-packages", "test", "tests", "testing", "idle_test"}
    | {"_vendor", "vendor", "vendored", "externals", "extern", "thirdparty"}
)
_MIN_BYTES, _MAX_BYTES, _MAX_LINE = 500, 400_000, 1_000
_GENERATED = re.compile(r"(auto-?|automatically )?generated (by|from|using)|do not edit", re.IGNORECASE)


def locate(package: str) -> Path | None:
    """Folder (or single file) of an installed package or module, `None` where it is absent.

    Only the top-level name goes through the import system, which does not execute it; the rest is resolved by path.

    >>> locate("xml.dom").name, locate("textwrap").name, locate("no_such_package.part")
    ('dom', 'textwrap.py', None)
    """
    top, *parts = package.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    if not spec.submodule_search_locations:
        is_source = spec.origin is not None and spec.origin.endswith(".py") and not parts
        return Path(str(spec.origin)) if is_source else None
    for folder in spec.submodule_search_locations:
        path = Path(folder, *parts)
        if path.is_dir():
            return path
        if parts and path.with_suffix(".py").is_file():
            return path.with_suffix(".py")
    return None


def available(packages: tuple[str, ...] = HELD_OUT) -> list[str]:
    """Those of `packages` that are installed here and have source files, in the order given.

    >>> available(("email", "no_such_package"))
    ['email']
    """
    return [name for name in packages if (path := locate(name)) is not None and any(_files(path))]


def sources(package: str) -> list[tuple[str, str]]:
    """Source files of an installed package as (path relative to the package, text), sorted by path.

    Left out: tests and vendored copies, generated files, files under 500 bytes or over 400 kB, files that are not
    UTF-8. Raises `UserError` where the package is not installed.

    >>> [path for path, _ in sources("http")]
    ['__init__.py', 'client.py', 'cookiejar.py', 'cookies.py', 'server.py']
    """
    root = locate(package)
    if root is None:
        raise UserError(f"Package {package!r} is not installed here", "install it or choose another code base")
    base = root if root.is_dir() else root.parent
    found: list[tuple[str, str]] = []
    for file in _files(root):
        text = _read(file)
        if text is not None and not _is_generated(text):
            found.append((file.relative_to(base).as_posix(), text))
    return found


def docstrings(package: str) -> list[tuple[str, str]]:
    """English text of a package's docstrings, one entry (relative path, text) for each file that has any.

    The docstrings of a file are joined by blank lines; see `prose` for what is taken out of them.
    """
    return [(path, "\n\n".join(texts)) for path, source in sources(package) if (texts := docstrings_of(source))]


def docstrings_of(source: str) -> list[str]:
    r"""Docstrings of one source text in file order, reduced to their prose; none where it does not parse.

    >>> docstrings_of('"Adds numbers for you."\ndef add(a, b):\n    "Return the sum of both."\n    return a + b')
    ['Adds numbers for you.', 'Return the sum of both.']
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "\d" in other people's strings
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError, RecursionError):
            return []
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    raw = [ast.get_docstring(node) for node in _in_file_order(tree) if isinstance(node, documented)]
    return [text for doc in raw if doc and len(text := prose(doc)) >= 20]


def prose(docstring: str) -> str:
    r"""A docstring without its code: doctests with their output, fenced, `::` and directive blocks, rules.

    >>> prose("Add one.\n\nExample::\n\n    x = add(1)\n\nNever fails.\n\n>>> add(1)\n2\n\nSee also sub.")
    'Add one.\n\nExample:\n\nNever fails.\n\nSee also sub.'
    """
    kept: list[str] = []
    fenced = doctest = False
    block: int | None = None  # indentation of the line that opened an indented code block
    for line in inspect.cleandoc(docstring).expandtabs(4).splitlines():
        stripped, indent = line.strip(), len(line) - len(line.lstrip())
        if stripped.startswith(("```", "~~~")):
            fenced = not fenced
            continue
        if not stripped:
            doctest = False
        elif block is not None and indent <= block:
            block = None
        doctest = doctest or stripped.startswith(">>>")
        in_code = fenced or doctest or (block is not None and stripped)
        if in_code or (stripped and not re.search(r"\w", stripped)):
            continue
        if stripped.startswith(".. ") and not stripped.startswith((".. note", ".. warning")):
            block = indent
            continue
        if stripped.endswith("::"):
            block = indent
            line = line.rstrip()[:-1]
        kept.append(line.rstrip())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip()


def _files(root: Path) -> Iterator[Path]:
    if root.is_file():
        yield root
        return
    for file in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).parts):
        parts = file.relative_to(root).parts
        if _SKIPPED_FOLDERS.isdisjoint(parts[:-1]) and not re.match(r"(test_|conftest)", parts[-1]):
            yield file


def _read(file: Path) -> str | None:
    data = file.read_bytes()
    if not _MIN_BYTES <= len(data) <= _MAX_BYTES:
        return None
    try:
        return data.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError:
        return None


def _is_generated(text: str) -> bool:
    comments = "\n".join(line for line in text[:1500].splitlines() if line.lstrip().startswith("#"))
    return bool(_GENERATED.search(comments)) or max(map(len, text.splitlines()), default=0) > _MAX_LINE


def _in_file_order(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):
            yield from _in_file_order(child)
