"""Parse YAML and JSON that a stranger may have written; every fault of the content is a ValueError.

The parsers themselves raise a dozen kinds of errors for bad input (an empty `!!int`, a number of 5,000 digits, nesting
200,000 deep). Aliases of YAML are refused, because a few lines of them can stand for a list of billions of values.
"""

import json
from typing import Any

import yaml

from metaheed.errors import brief

_FAULTS = (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError)


class _Loader(yaml.SafeLoader):
    """Loads plain values only, and refuses anchors and aliases."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "anchor", None) is not None:  # the event is an anchor or an alias
            raise yaml.composer.ComposerError(None, None, "anchors and aliases are not read here", event.start_mark)
        return super().compose_node(parent, index)


def from_yaml(content: bytes) -> Any:
    """Return the value of a YAML document.

    Raises:
        ValueError: the content is not YAML, has an anchor or alias, or is nested too deep.
    """
    try:
        return yaml.load(content, _Loader)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except _FAULTS as error:
        raise ValueError(f"it is not YAML of plain values ({brief(str(error), 200)})") from error


def from_json(content: bytes | str) -> Any:
    """Return the value of a JSON document.

    Raises:
        ValueError: the content is not JSON, or is nested too deep.
    """
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except ValueError as error:
        raise ValueError(f"it is not JSON ({brief(str(error), 200)})") from error
