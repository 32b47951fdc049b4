"""Opening the database that holds a study, with errors that name the remedy; and a lock among processes."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.storages import RDBStorage
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

from metaheed.errors import ConfigError, RunError, shown
from metaheed.files.opening import cannot_write_message, open_in_place, try_lock

_ATTEMPTS = 4  # attempts to open a database, because another worker may be setting it up
_DRIVERS = {"psycopg2": "psycopg2-binary", "psycopg": "'psycopg[binary]'", "MySQLdb": "mysqlclient"}
FAILURES = (SQLAlchemyError, optuna.exceptions.StorageInternalError)
"""Exceptions that a database raises if it fails while it is used."""


def sqlite_file(storage: str | None) -> Path | None:
    """The file of a SQLite database that --storage names; None if --storage is not given or names another database.

    Raises:
        ConfigError: the value is no URL of a database, or the database is kept in memory.
    """
    if storage is None:
        return None
    try:
        url = sqlalchemy.engine.make_url(storage)
    except ArgumentError:
        raise ConfigError(
            f"--storage is {shown(storage.rpartition('@')[2])}, but it must be a database's URL: sqlite:///FILE, "
            "postgresql://USER:PASSWORD@HOST/NAME, mysql+pymysql://USER:PASSWORD@HOST/NAME, …"
        ) from None
    if url.get_backend_name() != "sqlite":
        return None
    if url.database in (None, "", ":memory:"):
        raise ConfigError(
            f"--storage is {shown(storage)}, which would be kept in memory and lost: name a file, sqlite:///FILE"
        )
    return Path(url.database)


def sqlite_url(file: Path) -> str:
    """The URL of a SQLite database in a file.

    Raises:
        RunError: the file's name cannot be written in a URL (SQLAlchemy before 2.1 does not escape all characters).
    """
    name = str(file.expanduser().absolute())
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise RunError(
            f"the database {name!r} cannot be named in a URL, for its name is not UTF-8: choose another --out"
        ) from error
    url = sqlalchemy.engine.URL.create("sqlite", database=name).render_as_string()
    if sqlalchemy.engine.make_url(url).database != name:  # the database would be kept in another file
        raise RunError(f"the database {name} cannot be named in a URL: choose another --out, without ? in it")
    return url


def connect(url: str, shown: str) -> RDBStorage:
    """Open a database and create its tables if it has none.

    Args:
        url: URL of the database.
        shown: its name in messages, without a password.

    Raises:
        ConfigError: the kind of database is unknown, or its driver is not installed.
        RunError: the database cannot be reached or used.
    """
    parsed = sqlalchemy.engine.make_url(url)
    sqlite = parsed.get_backend_name() == "sqlite"
    # Trials take long, so a connection that a server has closed meanwhile is opened again. SQLite waits up to 60 s for
    # a file that others write.
    options: dict[str, Any] = {"connect_args": {"timeout": 60}} if sqlite else {"pool_pre_ping": True}
    for attempt in range(_ATTEMPTS):
        try:
            # Optuna treats the URL as a format string, so braces are doubled.
            escaped = parsed.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}")
            return RDBStorage(escaped, options)
        except ImportError as error:
            module = getattr(error.__cause__, "name", None) or parsed.drivername
            raise ConfigError(
                f"--storage {shown} needs the database driver {module}, which is not installed: "
                f"pip install {_DRIVERS.get(module, module)}"
            ) from error
        except NoSuchModuleError as error:
            raise ConfigError(
                f"--storage {shown}: {parsed.drivername} is no database that SQLAlchemy knows; known are sqlite, "
                "postgresql, mysql, mariadb, oracle and mssql, or others with their own package"
            ) from error
        except FAILURES as error:
            # If two workers begin at the same time, one may fail because the other has just created a table.
            if attempt == _ATTEMPTS - 1:
                raise RunError(f"the database {shown} cannot be used: {reason(error)}") from error
            time.sleep(0.2 * 2**attempt)
        except RuntimeError as error:
            raise RunError(f"the database {shown} cannot be used: {error}") from error
    raise AssertionError


def shown_as(storage: str | None, out: Path) -> str:
    """The name of the database in messages, without its password."""
    if storage is None:
        return str(out / "study.db")
    return sqlalchemy.engine.make_url(storage).render_as_string(hide_password=True)


def reason(error: BaseException) -> str:
    """The database's own message for an error."""
    cause = error.__cause__ or error
    words = getattr(cause, "orig", None) or cause
    return " ".join(str(words).split()) or type(words).__name__


@contextlib.contextmanager
def exclusive(path: Path | None) -> Iterator[None]:
    """Exclude other processes of this machine that use the same lock file; without effect if `path` is None."""
    if path is None:
        yield
        return
    try:
        opened = open_in_place(path, "a+")
    except OSError as error:
        raise RunError(cannot_write_message(error, path)) from error
    with opened as file:
        while not try_lock(file):
            time.sleep(0.02)
        yield
