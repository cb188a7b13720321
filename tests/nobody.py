"""A test's code run as an unprivileged user: what cannot be written is not written, which root never sees."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

needs_root = pytest.mark.skipif(
    os.name != "posix" or os.getuid() != 0, reason="only root can become another user without a password")


def run(imports: str, code: str, folder: Path, **environment: str) -> list[str]:
    """The lines that ``code`` prints, run as ``nobody`` after ``imports`` were made as root.

    Nobody may not be allowed to read the Python installation: what ``code`` needs has to be imported by then.

    Args:
        folder: made reachable for others, for it lies in pytest's own, which is closed to them.
    """
    for path in (folder, *folder.parents):
        if not path.stat().st_mode & 0o001:
            path.chmod(path.stat().st_mode | 0o055)
    program = f"{imports}\nimport os, encodings.cp437  # zipfile's\nos.setgid(65534)\nos.setuid(65534)\n{code}"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parent.parent,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **environment})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()
