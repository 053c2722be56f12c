"""From what a user types, `digits`, `text:./corpus` or `train.py:job`, to a `Job`."""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from batchlab import workloads
from batchlab.core.errors import InputError
from batchlab.core.job import Job

_READY: dict[str, Callable[..., Job]] = {name: getattr(workloads, name) for name in workloads.__all__}


def job_names() -> list[str]:
    """What can stand for a job, as a user would type it."""
    return [_form(name) for name in _READY] + ["FILE.py:NAME"]


def load_job(spec: str, **options: Any) -> Job:
    """The job that `spec` names.

    spec: a bundled job ("digits"); a kind of job and the path of its data ("text:PATH"); or "FILE.py:NAME", where
    NAME is a `Job` or a function that returns one and needs no arguments. FILE is run as a module whose `__name__`
    is not "__main__", its own folder first on `sys.path`; relative paths in it are relative to the working directory.
    An exception in it comes through unchanged, but for `sys.exit`, which is refused.
    options: keyword arguments of that job's function; one that is None counts as not given.

    Raises `InputError` where there is no such job, file, name or option.
    """
    given = {name: value for name, value in options.items() if value is not None}
    kind, colon, path = spec.partition(":")
    if kind in _READY:
        return _load_ready(kind, path if colon else None, given)
    file, colon, name = spec.rpartition(":") if ":" in spec else (spec, "", "")
    if file.endswith(".py"):
        return _load_from_file(Path(file), name, given)
    raise InputError(f"there is no job {spec!r}{_suggestion(spec)} There are {', '.join(job_names())}")


def _takes_path(name: str) -> bool:
    return "path" in inspect.signature(_READY[name]).parameters


def _form(name: str) -> str:
    return f"{name}:PATH" if _takes_path(name) else name


def _suggestion(spec: str) -> str:
    kind, colon, path = spec.partition(":")
    close = difflib.get_close_matches(kind, list(_READY), n=1)
    if not close:
        return "."
    meant = close[0] + (colon + path if _takes_path(close[0]) else "")
    return f", did you mean {meant!r}?"


def _load_ready(name: str, path: str | None, options: dict[str, Any]) -> Job:
    make = _READY[name]
    _check_options(name, make, options)
    if not _takes_path(name):
        if path is not None:
            raise InputError(f"the job {name!r} has its own data and takes no path, got {path!r}")
        return make(**options)
    if not path:
        raise InputError(f"the job {name!r} needs the path of its data, {name}:PATH")
    return make(path, **options)


def _check_options(name: str, make: Callable[..., Any], options: dict[str, Any]) -> None:
    accepted = [p.name for p in inspect.signature(make).parameters.values() if p.name != "path"]
    for option in options:
        if option not in accepted:
            takes = f"it takes {', '.join(accepted)}" if accepted else "it takes none"
            raise InputError(f"the job {name!r} has no option {option!r}; {takes}")


def _load_from_file(file: Path, name: str, options: dict[str, Any]) -> Job:
    if not file.is_file():
        raise InputError(f"{file} is not a file")
    with _folder_on_path(file.resolve().parent):
        module = _run(file)
        found = getattr(module, name, None) if name else None
        if found is None:
            raise InputError(f"{file} has no {name!r}; {_contents(module)}" if name else _no_name(file, module))
        return _as_job(f"{file}:{name}", found, options)


def _no_name(file: Path, module: ModuleType) -> str:
    return f"{file} needs the name of a job in it, {file}:NAME; {_contents(module)}"


def _run(file: Path) -> ModuleType:
    """The file as a freshly run module, known to `sys.modules` so that dataclasses and pickling in it work."""
    name = f"batchlab_job_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file.resolve())
    assert spec is not None and spec.loader is not None  # the suffix is .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except SystemExit as error:
        del sys.modules[name]
        if type(error) is not SystemExit:  # a signal's
            raise
        raise InputError(
            f"{file} ends the process, by sys.exit({error.code!r}), when it is run as a module: put what trains under "
            "`if __name__ == '__main__':`"
        ) from None
    except BaseException:
        del sys.modules[name]
        raise
    return module


@contextlib.contextmanager
def _folder_on_path(folder: Path) -> Iterator[None]:
    """First on `sys.path` inside; last afterwards, where late imports of siblings find it and it shadows nothing."""
    entry = str(folder)
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        sys.path.remove(entry)
        if entry not in sys.path:
            sys.path.append(entry)


def _as_job(label: str, found: Any, options: dict[str, Any]) -> Job:
    if isinstance(found, Job):
        if options:
            raise InputError(f"{label} is a Job and takes no options, got {', '.join(options)}")
        return found
    if not inspect.isfunction(found):
        raise InputError(f"{label} must be a batchlab.Job or a function that returns one, got {_kind(found)}")
    _check_options(label, found, options)
    needed = [p.name for p in inspect.signature(found).parameters.values() if p.default is p.empty]
    if missing := [p for p in needed if p not in options]:
        raise InputError(f"{label} must need no arguments, but needs {', '.join(missing)}")
    try:
        job = found(**options)
    except SystemExit as error:
        if type(error) is not SystemExit:  # a signal's
            raise
        raise InputError(f"{label} ends the process, by sys.exit({error.code!r}), and returns no job") from None
    if not isinstance(job, Job):
        raise InputError(f"{label} must return a batchlab.Job, got {_kind(job)}")
    return job


def _kind(value: Any) -> str:
    return "None" if value is None else type(value).__name__


def _contents(module: ModuleType) -> str:
    """The jobs of a module, and its own functions that could return one."""
    own = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    jobs = [name for name, value in own.items() if isinstance(value, Job)]
    functions = [n for n, v in own.items() if inspect.isfunction(v) and v.__module__ == module.__name__]
    return f"its jobs: {', '.join(jobs) or 'none'}; its functions: {', '.join(functions) or 'none'}"
