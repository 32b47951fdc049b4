"""Build backend that packs learn2learn's MAML into a wheel and runs nothing of the archive.

learn2learn 0.2.0 is published as source only, and its C files do not compile on Python 3.11. MAML needs none of them,
only the package's own `__init__` files import them. Left out, those make `learn2learn` and `learn2learn.algorithms`
namespace packages, from which `learn2learn.algorithms.maml` is imported as it was published.

The archive names no build backend, so pip takes setuptools'; `make peers` puts this folder before the real one.
"""

import base64
import hashlib
import sys
import zipfile
from pathlib import Path

NAME = "learn2learn-0.2.0"
MODULES = ("algorithms/base_learner.py", "algorithms/maml.py", "utils/__init__.py")
METADATA = "Metadata-Version: 2.1\nName: learn2learn\nVersion: 0.2.0\nSummary: its MAML only\nLicense: MIT\n"
WHEEL = "Wheel-Version: 1.0\nGenerator: metaheed\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def build_wheel(wheel_directory: str, config_settings: object = None, metadata_directory: str | None = None) -> str:
    """PEP 517's hook, called in the unpacked archive."""
    files = {f"learn2learn/{module}": Path("learn2learn", module).read_bytes() for module in MODULES}
    files[f"{NAME}.dist-info/licenses/LICENSE"] = Path("LICENSE").read_bytes()
    files[f"{NAME}.dist-info/METADATA"] = METADATA.encode()
    files[f"{NAME}.dist-info/WHEEL"] = WHEEL.encode()
    record = [f"{path},sha256={_digest(content)},{len(content)}" for path, content in files.items()]
    files[f"{NAME}.dist-info/RECORD"] = "\n".join([*record, f"{NAME}.dist-info/RECORD,,", ""]).encode()
    wheel = f"{NAME}-py3-none-any.whl"
    with zipfile.ZipFile(Path(wheel_directory, wheel), "w") as archive:
        for path, content in files.items():
            archive.writestr(path, content)
    return wheel


def _digest(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


__legacy__ = sys.modules[__name__]  # the object that pip asks setuptools for
