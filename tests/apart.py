"""Packages that only the processes of their own tests see, in a folder of the environment that the Makefile fills.

``python -m tests.apart`` prints what is to be installed there.
"""

from __future__ import annotations

import os
import sys
import tomllib
from pathlib import Path

FOLDER = Path(sys.prefix) / "apart"


def environment() -> dict[str, str]:
    """What a process needs in its environment to see the packages."""
    return {"PYTHONPATH": os.pathsep.join(filter(None, (str(FOLDER), os.environ.get("PYTHONPATH"))))}


if __name__ == "__main__":
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    print(*project["optional-dependencies"]["torchao"])
