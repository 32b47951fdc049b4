"""Where metaheed keeps its cache and what it remembers about the user."""

from collections.abc import Callable
from pathlib import Path

import pytest

from metaheed.errors import ConfigError
from metaheed.files.places import cache_folder, state_folder

on_linux = pytest.mark.skipif("sys.platform != 'linux'", reason="other systems have customs of their own")
both = pytest.mark.parametrize(
    ("folder", "kind", "below_home"),
    [(cache_folder, "CACHE", ".cache/metaheed"), (state_folder, "STATE", ".local/state/metaheed")],
)


@on_linux
@both
def test_variables_come_first_and_then_the_customary_place(
    folder: Callable[[], Path | None], kind: str, below_home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv(f"XDG_{kind}_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv(f"METAHEED_{kind}", str(tmp_path / "chosen"))
    assert folder() == tmp_path / "chosen"
    monkeypatch.delenv(f"METAHEED_{kind}")
    assert folder() == tmp_path / "xdg" / "metaheed"
    for unusable in ("relative", ""):
        monkeypatch.setenv(f"XDG_{kind}_HOME", unusable)
        assert folder() == tmp_path / "home" / below_home
    assert not [*tmp_path.iterdir()], "asking makes no folder"


@both
def test_a_user_without_a_home_has_no_such_folder(
    folder: Callable[[], Path | None], kind: str, below_home: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(name: str) -> Path:
        raise RuntimeError("could not determine the home directory")

    monkeypatch.delenv(f"METAHEED_{kind}", raising=False)
    monkeypatch.setattr(f"platformdirs.user_{kind.lower()}_path", unknown)
    assert folder() is None


def test_the_state_folder_must_be_absolute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAHEED_STATE", "state")
    with pytest.raises(ConfigError, match="METAHEED_STATE is 'state', but it must be an absolute path"):
        state_folder()
