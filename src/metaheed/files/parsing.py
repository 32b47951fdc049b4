"""YAML and JSON that a stranger may have written, as plain values: whatever is wrong with it is a ValueError.

PyYAML's and the standard library's parsers raise a dozen kinds of errors for bad input (an empty `!!int`, a number of
5,000 digits, nesting 200,000 deep). YAML's aliases are refused: with them a few lines stand for a list of billions.
"""

import json
from typing import Any

import yaml

from metaheed.errors import brief

_FAULTS = (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError)


class _Loader(yaml.SafeLoader):
    """Plain values only, each written out where it stands."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "anchor", None) is not None:  # both of an anchor and of an alias
            raise yaml.composer.ComposerError(None, None, "anchors and aliases are not read here", event.start_mark)
        return super().compose_node(parent, index)


def from_yaml(content: bytes) -> Any:
    """The value that a YAML document stands for.

    Raises:
        ValueError: it is none, holds an alias, or nests too deep.
    """
    try:
        return yaml.load(content, _Loader)
    except RecursionError:
        raise ValueError("it nests too deep") from None
    except _FAULTS as error:
        raise ValueError(f"it is not YAML that is read here ({brief(str(error), 200)})") from error


def from_json(content: bytes | str) -> Any:
    """The value that a JSON document stands for.

    Raises:
        ValueError: it is none, or nests too deep.
    """
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("it nests too deep") from None
    except ValueError as error:
        raise ValueError(f"it is not JSON ({brief(str(error), 200)})") from error
