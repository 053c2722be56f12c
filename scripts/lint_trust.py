"""Refuses, by reading the syntax tree, what batchlab promises never to do.

No pickle, no `torch.load` without `weights_only=True`, no `eval`, `exec` or `yaml.load`, no shell, no network.
usage: lint_trust.py FILE_OR_FOLDER ...; prints one line for each offence and exits with 1 if there is any.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

PICKLES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
NETWORK = {
    "aiohttp",
    "ftplib",
    "http",
    "httpx",
    "imaplib",
    "requests",
    "smtplib",
    "socketserver",
    "ssl",
    "telnetlib",
    "urllib",
    "urllib3",
    "webbrowser",
    "xmlrpc",
}
CALLS = {
    "eval": "eval runs text as code",
    "exec": "exec runs text as code",
    "os.system": "os.system runs a shell",
    "os.popen": "os.popen runs a shell",
    "yaml.load": "yaml.load can build any object",
    "yaml.unsafe_load": "yaml.unsafe_load can build any object",
    "torch.hub.load": "torch.hub downloads code",
    "torch.package.PackageImporter": "torch.package reads pickles",
}
SOCKET_NAMES_ALLOWED = {"gethostname"}  # names this machine; opens nothing


def offences(source: str) -> Iterator[tuple[int, str]]:
    """(line, what is wrong) of each offence in a module's text."""
    tree = ast.parse(source)
    names = _imported_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _import(node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield from _import(node.lineno, node.module)
            if node.module == "socket":
                for alias in node.names:
                    yield from _socket(node.lineno, alias.name)
        elif isinstance(node, ast.Attribute) and _dotted(node.value, names) == "socket":
            yield from _socket(node.lineno, node.attr)
        elif isinstance(node, ast.Call):
            yield from _call(node, _dotted(node.func, names))


def _import(line: int, module: str) -> Iterator[tuple[int, str]]:
    root = module.split(".")[0]
    if root in PICKLES:
        yield line, f"{module}: nothing that batchlab writes or reads is a pickle"
    if root in NETWORK:
        yield line, f"{module}: batchlab uses no network"


def _socket(line: int, name: str) -> Iterator[tuple[int, str]]:
    if name not in SOCKET_NAMES_ALLOWED:
        yield line, f"socket.{name}: batchlab opens no socket"


def _call(node: ast.Call, name: str) -> Iterator[tuple[int, str]]:
    keywords = {keyword.arg: keyword.value for keyword in node.keywords}
    if name in CALLS:
        yield node.lineno, CALLS[name]
    if name in ("importlib.import_module", "__import__") and node.args and isinstance(node.args[0], ast.Constant):
        yield from _import(node.lineno, str(node.args[0].value))
    if name in ("torch.load", "torch.serialization.load") and not _is_true(keywords.get("weights_only")):
        yield node.lineno, "torch.load without weights_only=True reads pickles"
    if name in ("numpy.load", "np.load") and "allow_pickle" in keywords and not _is_false(keywords["allow_pickle"]):
        yield node.lineno, "numpy.load with allow_pickle reads pickles"
    if "shell" in keywords and not _is_false(keywords["shell"]):
        yield node.lineno, "shell=True runs a shell"


def _is_true(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def _is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def _imported_names(tree: ast.Module) -> dict[str, str]:
    """What each imported name stands for: {"load": "torch.load"} after `from torch import load`."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _dotted(node: ast.expr, names: dict[str, str]) -> str:
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return ""
    name = ".".join([names.get(node.id, node.id), *reversed(parts)])
    return name.removeprefix("builtins.")


def main(arguments: list[str]) -> int:
    """Prints the offences in the files and folders given; 1 if there are any, 2 if nothing was read."""
    files = [file for given in map(Path, arguments) for file in ([given] if given.is_file() else given.rglob("*.py"))]
    if not files:
        print("usage: lint_trust.py FILE_OR_FOLDER ... (no Python file found)", file=sys.stderr)
        return 2
    found = [f"{file}:{line}: {what}" for file in sorted(files) for line, what in offences(file.read_text("utf-8"))]
    print("\n".join(found) or f"trust: {len(files)} files keep the rules")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
