"""Decide whether the code of a user's network may run.

A config can name a network that is not one of metaheed's, as module:Class. Using such a network imports its module, and
importing a module runs it. On the command line or in a call, the users themselves name it. In a file (a run's
config.yaml, a recipe, a study's search.yaml), a stranger may have named it. `config.from_dict` therefore marks every
name that it reads (`NamedByFile`). Every such name must pass `require` before it is imported, and it passes only if

- the user allowed it in this process (`allow`: by naming it, or with --trust or trust=True), or
- the user allowed it before on this machine, and the code has not changed since.

The second case is recorded in the user's state folder, outside every run folder: one file for each module, named by the
hash of the module's path and holding the hash of its code. The code consists of

- the module's file and the packages that it lies in,
- what these import by name from the same folder, directly or indirectly, and
- files in that folder that have the name of a module elsewhere (yaml.py, say), because an import of that module may get
  them instead.

It does not include what is imported from other places (an installed library) or by other means (importlib, exec).
Nothing is imported to find the code.
"""

import ast
import contextlib
import hashlib
import importlib.machinery
import importlib.util
import json
import os
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from metaheed.errors import ConfigError, brief, shown
from metaheed.files.opening import put_in_place, read_bounded
from metaheed.files.places import state_folder

_allowed: dict[str, str] = {}  # allowed in this process: file, or name of a module without a file -> hash of its code
_RECORD_BYTES = 2**16


class NamedByFile(str):
    """The name of a network that was read from a file, so that its code may not run without the user's permission.

    It is a subclass of str, so that the mark survives when a config is copied, pickled or changed in other fields.
    """

    __slots__ = ()


class ModuleCode(NamedTuple):
    """The code that importing a module runs, as far as that can be found without importing it."""

    file: Path | None
    """The module's file. None if the module was not found, or has no file because it is built in."""
    sha256: str
    """The hash of that file and of the files that it imports from the same folder."""


def allow(name: str, folder: Path | None) -> None:
    """Record that the user allows the code of "module:Class" to run, now and until the code changes.

    If the user's state folder cannot be written, a message says so, and the permission holds for this process alone.

    Args:
        name: the name of the network; for a network of metaheed's own, nothing is recorded.
        folder: the folder in which its module is looked for first.

    Raises:
        ConfigError: METAHEED_STATE is not an absolute path.
    """
    module, separator, _ = name.partition(":")
    if not separator:
        return
    code = find_code(module, folder)
    _allowed[_key(module, code)] = code.sha256
    if code.file is None:
        return
    if _allowed_hash(code.file) == code.sha256:
        return
    try:
        _remember(code)
    except OSError as error:
        print(
            f"the permission to import {name} could not be saved ({error}): give --trust each time, or set "
            "METAHEED_STATE to a folder that can be written",
            file=sys.stderr,
        )


def require(name: str, folder: Path | None) -> None:
    """Raise ConfigError unless the user has allowed the code of "module:Class" to run; nothing is imported.

    Raises:
        ConfigError: the message says which code would run, and how to allow it.
    """
    module, _, _ = name.partition(":")
    code = find_code(module, folder)
    if _allowed.get(_key(module, code)) == code.sha256:
        return
    recorded = None if code.file is None else _allowed_hash(code.file)
    if recorded == code.sha256:
        return
    if code.file is not None:
        where = brief(str(code.file), 300)
    elif module in sys.modules or module in sys.builtin_module_names:
        where = f"the module {shown(module)} of Python itself"
    else:
        where = f"the module {shown(module)}, which was not found here"
    since = "" if recorded is None else ", which has changed since it was last allowed"
    raise ConfigError(
        f"the network {shown(str(name))} is named by a file and not by you, and using it would run {where}{since}. If "
        "you know what that code does, allow it with --trust (in Python: trust=True)"
    )


def find_code(module: str, folder: Path | None) -> ModuleCode:
    """Find the code that importing `module` would run, without importing or running anything."""
    files, top = _find_files(module, folder)
    if not files:
        return ModuleCode(None, "")
    own = files[0]
    if top is not None:
        files = _with_imports([*files, *_shadowing_files(top)], top)
    digest = hashlib.sha256()
    for file in sorted({*files}):
        with contextlib.suppress(OSError):  # the file has just been deleted, so that its import will fail, too
            digest.update(f"{file}\0".encode(errors="surrogateescape"))
            digest.update(hashlib.sha256(read_bounded(file)).digest())
    return ModuleCode(own, digest.hexdigest())


@contextlib.contextmanager
def import_from_source() -> Iterator[None]:
    """Import from the source files that were hashed, not from compiled files beside them, which may differ."""
    before = sys.pycache_prefix, sys.dont_write_bytecode
    with tempfile.TemporaryDirectory(prefix="metaheed-") as empty:
        sys.pycache_prefix, sys.dont_write_bytecode = empty, True
        try:
            yield
        finally:
            sys.pycache_prefix, sys.dont_write_bytecode = before


def _key(module: str, code: ModuleCode) -> str:
    return f"module {module}" if code.file is None else str(code.file)


def _record_file(file: Path) -> Path | None:
    folder = state_folder()
    if folder is None:
        return None
    return folder / "trusted" / f"{hashlib.sha256(os.fsencode(file)).hexdigest()[:32]}.json"


def _allowed_hash(file: Path) -> str | None:
    """The hash of the code that the user allowed for that file; None if none was allowed."""
    record = _record_file(file)
    if record is None:
        return None
    try:
        if hasattr(os, "getuid") and os.lstat(record).st_uid not in (os.getuid(), 0):
            return None  # another user wrote it
        values = json.loads(read_bounded(record, _RECORD_BYTES))
        found = values["sha256"] if values["file"] == str(file) else None
        return found if isinstance(found, str) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None  # without a readable record, the user is asked again


def _remember(code: ModuleCode) -> None:
    """Write the record that the user allows this code."""
    assert code.file is not None  # `allow` has checked it
    record = _record_file(code.file)
    if record is None:
        raise OSError("this user has no home")
    record.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    number, part = tempfile.mkstemp(dir=record.parent, suffix=".part")  # only this user can read it
    try:
        with os.fdopen(number, "w", encoding="utf-8") as file:
            json.dump({"file": str(code.file), "sha256": code.sha256}, file)
        put_in_place(Path(part), record)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise


def _find_files(module: str, folder: Path | None) -> tuple[list[Path], Path | None]:
    """Return the files that an import runs, the module's own first, and the folder that contains its outermost package.

    The folder is None for an installed library, whose imports are not followed.
    """
    parents = module.split(".")
    if not all(part.isidentifier() for part in parents):
        return [], None
    search: Sequence[str] | None = None
    files: list[Path] = []
    top: Path | None = None
    for depth in range(len(parents)):
        found = _locate_module(".".join(parents[: depth + 1]), search, folder)
        if found is None:
            break  # its import fails, but only after the packages above it have run
        origin, search = found
        if origin is not None:
            files.insert(0, origin)
        if depth == 0:
            # For a package, the folder above its own (which may have no __init__.py); for a module, its file's folder.
            top = Path(next(iter(search))).resolve().parent if search else None if origin is None else origin.parent
        if search is None:
            break  # it is a module and no package, so that the rest of the name cannot be found in it
    if top is not None and any(top == place for place in _installed()):
        top = None
    return files, top


def _locate_module(
    name: str, search: Sequence[str] | None, folder: Path | None
) -> tuple[Path | None, list[str] | None] | None:
    """Return a module's file and, for a package, the folders of its modules; None if there is no such module."""
    loaded = sys.modules.get(name)
    spec = getattr(loaded, "__spec__", None)
    if loaded is not None and spec is None:
        file = getattr(loaded, "__file__", None)
        return (None if file is None else _existing_file(file)), [*getattr(loaded, "__path__", ())] or None
    if spec is None and search is None:
        spec = _ask_finders(name, sys.path if folder is None else [str(folder), *sys.path], top=True)
    elif spec is None:
        spec = _ask_finders(name, search, top=False)
    if spec is None:
        return None
    places = None if spec.submodule_search_locations is None else [*spec.submodule_search_locations]
    return (_existing_file(spec.origin) if spec.has_location and spec.origin else None), places


def _ask_finders(name: str, path: Sequence[str] | None, top: bool) -> importlib.machinery.ModuleSpec | None:
    """Ask the import system's finders for a module, in the order in which an import asks them; they run nothing."""
    for finder in sys.meta_path:
        if finder is importlib.machinery.PathFinder:
            spec = importlib.machinery.PathFinder.find_spec(name, path)
        else:
            find = getattr(finder, "find_spec", None)
            try:
                spec = None if find is None else find(name, None if top else path)
            except (ImportError, AttributeError, TypeError, ValueError, OSError):
                spec = None  # a finder of another program failed; what it would find must be allowed each time
        if spec is not None:
            return spec
    return None


def _existing_file(name: str) -> Path:
    """The file with its links resolved; for a module inside a zip file, the zip file."""
    file = Path(name).resolve()
    while not file.exists() and file != file.parent:
        file = file.parent
    return file


def _installed() -> set[Path]:
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    return {Path(path).resolve() for name in names if (path := sysconfig.get_path(name))}


def _shadowing_files(top: Path) -> list[Path]:
    """The modules in a folder that have the same name as a module of Python or of an installed library."""
    elsewhere = [path for path in sys.path if Path(path).resolve() != top]
    found: list[Path] = []
    with contextlib.suppress(OSError):  # the folder cannot be listed
        for name in sorted({entry.name.partition(".")[0] for entry in top.iterdir()}):
            spec = importlib.machinery.PathFinder.find_spec(name, elsewhere)
            if name in sys.stdlib_module_names or (spec is not None and spec.origin is not None):
                found += _module_files(top, [name])
    return found


def _with_imports(files: list[Path], top: Path) -> list[Path]:
    """The files, and the files in the folder `top` that they import by name, directly or indirectly."""
    found = [*files]
    for file in found:  # the list grows during the loop
        for imported in _imports(file, top):
            if imported not in found:
                found.append(imported)
    return found


def _imports(file: Path, top: Path) -> Iterator[Path]:
    """Yield the files in the folder `top` (or, for relative imports, near the file) that a file imports by name."""
    if file.suffix != ".py":
        return
    try:
        tree = ast.parse(read_bounded(file))
    except (OSError, ValueError, SyntaxError, RecursionError, MemoryError):
        return  # a file that cannot be parsed as Python cannot be imported either
    package = file.parent
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _module_files(top, alias.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            base = top
            if node.level:
                base = package
                for _ in range(node.level - 1):
                    base = base.parent
            names = node.module.split(".") if node.module else []
            yield from _module_files(base, names)
            for alias in node.names:
                yield from _module_files(base, [*names, alias.name])


def _module_files(base: Path, names: Sequence[str]) -> Iterator[Path]:
    """The files below the folder `base` that importing names[0].names[1]… runs."""

    for depth in range(len(names)):
        place = base.joinpath(*names[: depth + 1])
        for candidate in (place / "__init__.py", place.with_name(f"{place.name}.py")):
            if candidate.is_file():
                yield candidate.resolve()
        for suffix in importlib.machinery.EXTENSION_SUFFIXES:
            candidate = place.with_name(place.name + suffix)
            if candidate.is_file():
                yield candidate.resolve()
