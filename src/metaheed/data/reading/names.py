"""Names of classes and files, in one form of Unicode.

Unicode can write é as one character, or as an e followed by an accent. Linux and Windows keep the form that a file was
given; macOS can turn the first form into the second. If names were compared and sorted as they come, the same folder
could be divided in another way on another machine, and a class could be in two splits under names that look the same.
"""

import codecs
import unicodedata


def composed(name: str) -> str:
    """Return a name in Unicode's composed form (NFC), in which names are compared, sorted and recorded."""
    return unicodedata.normalize("NFC", name)


def decode_text(content: bytes) -> str:
    """Decode a text file: UTF-8, or UTF-16 with a byte order mark, which tools of Windows write.

    Raises:
        ValueError: it is neither.
    """
    marked = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return content.decode("utf-16" if marked else "utf-8-sig")
