"""Seals: a file carries a checksum of its own content, so that a changed bit is noticed when the file is read.

    text    ends with the line "# sha256: " and 64 digits, a YAML comment; the checksum covers everything above it
    values  have the keys "format" and "sha256"; the checksum covers all the other values

Files of earlier versions have no seal and are read unchecked. Damage must not make a sealed file look like one of
those. The mark of a seal is therefore long (text) or doubled (values): it is still recognised after one bit of it has
changed.
"""

import hashlib
import json
import re
from typing import Any

FORMAT = 2
"""The format of sealed files. Files of earlier versions have format 1, or no format."""
_MARK = b"# sha256: "
_SEAL = re.compile(rb"# sha256: ([0-9a-f]{64})")
_LENGTH = len(_MARK) + 64


def seal_text(content: bytes) -> bytes:
    """Return the lines of a YAML file, followed by a line with their checksum."""
    return content + _MARK + hashlib.sha256(content).hexdigest().encode() + b"\n"


def unseal_text(content: bytes) -> bytes:
    """Check and remove the seal of a text; content without a seal is returned as it is.

    Raises:
        ValueError: the text or its seal has been changed.
    """
    body = content.rstrip()
    text, seal = body[:-_LENGTH], body[-_LENGTH:]
    match = _SEAL.fullmatch(seal)
    if match is not None and hashlib.sha256(text).hexdigest().encode() == match[1]:
        return text
    if match is not None or _MARK in content or _resembles_seal(seal):
        raise ValueError("it was altered since it was written: its checksum does not match")
    return content


def _resembles_seal(line: bytes) -> bool:
    marked = sum(a == b for a, b in zip(line, _MARK, strict=False))
    digits = sum(c in b"0123456789abcdef" for c in line[len(_MARK) :])
    return len(line) == _LENGTH and marked + digits >= _LENGTH - 4


def digest(values: dict[str, Any]) -> str:
    """SHA-256 of values that JSON can hold, independent of the order of their keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def seal_values(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a JSON file, with their format and checksum added."""
    sealed = {"format": FORMAT, **values}
    return {**sealed, "sha256": digest(sealed)}


def unseal_values(values: Any) -> dict[str, Any]:
    """Check and remove the seal of values; values without a seal are returned as they are.

    Raises:
        ValueError: the values are not a mapping, or have been changed, or have another format.
    """
    if not isinstance(values, dict):
        raise ValueError(f"it holds a {type(values).__name__}, but it must be a mapping")
    rest = {name: value for name, value in values.items() if name != "sha256"}
    if "format" not in values and "sha256" not in values:
        return rest
    if values.get("sha256") != digest(rest):
        raise ValueError("it was altered since it was written: its checksum does not match")
    if rest.pop("format", None) != FORMAT:
        raise ValueError(f"it has format {str(values.get('format'))[:20]}, but this program reads {FORMAT}")
    return rest
