"""Reading and checking the result file of an evaluation."""

import math
from pathlib import Path
from typing import Any

from metaheed.config import RunConfig
from metaheed.errors import RunError, brief, shown
from metaheed.files.opening import JSON_BYTES, read_bounded
from metaheed.files.parsing import from_json
from metaheed.files.seals import unseal_values
from metaheed.running.folder import RunFolder

TaskShape = tuple[int | None, int | None, int | None]
"""(ways, shots, queries) of an evaluation; None stands for the run's own number."""


OWN_SHAPE: TaskShape = (None, None, None)


_RESULT_FIELDS: dict[str, type] = {
    **{"algorithm": str, "checkpoint": str, "episodes_sha256": str},
    **{"accuracies": list, "accuracy": float, "seed": int, "tasks": int},
}


_FURTHER_FIELDS: dict[str, type] = {
    **{"data": str, "split": str, "ways": int, "shots": int, "iteration": int, "half_width_95": float}
}


_ROUNDED = 1e-5  # a bound on the error of a mean of accuracies that are rounded to a millionth


def result_file(folder: RunFolder, run: RunConfig, data: str, shape: tuple[int, int, int], split: str = "test") -> Path:
    """The result file of an evaluation; its name says where data set, shape and split differ from the run's own."""
    own = run.episodes
    return folder.result(split, None if data == own.data else data, None if shape == own.test_shape else shape)


def read_result(path: str | Path, data: str | None = None, shape: TaskShape = OWN_SHAPE) -> dict[str, Any]:
    """The content of a run's result.json, or of its evaluation on another data set or on tasks of another shape.

    What `compare` and `report` rely on is checked here.

    Raises:
        RunError: the file is missing or damaged, or its numbers contradict each other.
    """
    folder = RunFolder(path)
    file, again = folder.result_file, f"metaheed evaluate {path}"
    if data is not None or shape != OWN_SHAPE:
        run = folder.read_config()
        own = run.episodes
        ways, shots, queries = (o if a is None else a for a, o in zip(shape, own.test_shape, strict=True))
        file = result_file(folder, run, data or own.data, (ways, shots, queries))
        named = {"data": None if data == own.data else data, "ways": shape[0], "shots": shape[1], "queries": shape[2]}
        again += "".join(f" --{name} {value}" for name, value in named.items() if value is not None)
    try:
        result = unseal_values(from_json(read_bounded(file, JSON_BYTES)))
        missing = {*_RESULT_FIELDS} - set(result)
        if not missing:
            _check_result(result)
    except FileNotFoundError:
        raise RunError(f"{path} has no {file.name}: run '{again}' first") from None
    except OSError as error:
        raise RunError(f"{file} cannot be read ({error.strerror or error}): run '{again}' again") from error
    except (ValueError, TypeError, ArithmeticError) as error:
        raise RunError(f"{file} cannot be read ({brief(str(error), 300)}): run '{again}' again") from error
    if missing:
        raise RunError(f"{file} lacks {', '.join(sorted(missing))}: run '{again}' again")
    return result


def _check_result(result: dict[str, Any]) -> None:
    """Raise ValueError unless a result is one that evaluation can have written."""
    for name, kind in {**_RESULT_FIELDS, **_FURTHER_FIELDS}.items():
        value = result.get(name)
        if (
            not isinstance(value, kind)
            or isinstance(value, bool)
            or (isinstance(value, int) and not 0 <= value < 2**63)
        ):
            raise ValueError(f"its {name} is {shown(value)}")
    if not isinstance(result.get("trained_on", ""), str):
        raise ValueError(f"its trained_on is {shown(result['trained_on'])}")
    accuracies, tasks = result["accuracies"], result["tasks"]
    if len(accuracies) != tasks or tasks < 2:
        raise ValueError(
            f"it has {tasks} tasks and {len(accuracies)} accuracies; one for each of two tasks is the least"
        )
    for accuracy in accuracies:
        if not isinstance(accuracy, float | int) or isinstance(accuracy, bool) or not 0 <= accuracy <= 1:
            raise ValueError(f"one of its accuracies is {shown(accuracy)}, and not a number from 0 to 1")
    found, mean = result["accuracy"], math.fsum(accuracies) / tasks
    if not abs(found - mean) <= _ROUNDED:  # written so that NaN fails as well
        raise ValueError(f"its accuracy is {shown(found)}, but its tasks' mean is {mean:.6f}")
    if not 0 <= result["half_width_95"] <= 1:  # the largest is 0.98: two tasks with accuracies 0 and 1
        raise ValueError(f"its half_width_95 is {shown(result['half_width_95'])}")
