"""Checksums that a file carries of its own content, so that a changed bit is noticed when the file is read.

Files of earlier versions carry none and are read as they are. So that damage cannot make a sealed file look like one of
those, what says that there is a seal is long or doubled: one changed bit leaves enough of it to be recognised.

    text    ends with the line "# sha256: " and 64 digits, a comment of YAML, over everything before that line
    values  have a "format" and a "sha256" over all the others; a file without a seal has neither
"""

import hashlib
import json
import re
from typing import Any

FORMAT = 2
"""Of files that carry a checksum over all that they say; 1, or none: of an earlier version."""
_MARK = b"# sha256: "
_SEAL = re.compile(rb"# sha256: ([0-9a-f]{64})")
_LENGTH = len(_MARK) + 64


def seal_text(content: bytes) -> bytes:
    """The lines of a YAML file, and one more with their checksum."""
    return content + _MARK + hashlib.sha256(content).hexdigest().encode() + b"\n"


def unseal_text(content: bytes) -> bytes:
    """What `seal_text` was given; a file without a seal as it is.

    Raises:
        ValueError: it was changed since, the seal included.
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
    """SHA-256 of values as JSON gives them back, in whatever order they stand."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def seal_values(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a JSON file with their format and checksum."""
    sealed = {"format": FORMAT, **values}
    return {**sealed, "sha256": digest(sealed)}


def unseal_values(values: Any) -> dict[str, Any]:
    """What `seal_values` was given; values without a seal as they are.

    Raises:
        ValueError: they are no mapping, or were changed since.
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
