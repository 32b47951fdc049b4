"""Names: of classes and files in one form, whichever system wrote them; and of files that may be written.

Unicode writes é as one character or as e and an accent. Linux and Windows keep whichever a file was given; macOS hands
out the second for what was given the first. Compared and sorted as they come, the same folder would be divided
otherwise on another machine, and a class could be in two splits under what looks like one name.
"""

import codecs
import unicodedata
from pathlib import Path

from metaheed.errors import ConfigError, option


def composed(name: str) -> str:
    """A name in Unicode's composed form (NFC), in which names are compared, sorted and recorded."""
    return unicodedata.normalize("NFC", name)


def decoded(content: bytes) -> str:
    """The text of a list that somebody wrote: UTF-8, or the UTF-16 with a mark that Windows' tools write.

    Raises:
        ValueError: it is neither.
    """
    marked = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return content.decode("utf-16" if marked else "utf-8-sig")


def check_out(path: Path) -> None:
    """Refuse to write a file where it could not be, or would take the place of something else.

    Raises:
        ConfigError: the path has no name, or a folder, a pipe or a device is there, which a file renamed to it would
            replace.
    """
    if not path.name:
        raise ConfigError(f"{option('out')} is {str(path)!r}, but it must be the name of a file to write")
    if path.exists() and not path.is_file():
        raise ConfigError(
            f"{option('out')} is {path}, but a folder, a pipe or a device is there: choose the name of a file"
        )
