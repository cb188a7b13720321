"""Fetch what the tests stand on: four package archives and the default base, into lora-kit's cache.

Set-up, not a test: ``make test`` runs it first, so that no test needs a network. What lies in
the cache already is not fetched again. ``--archives-only`` leaves the base out.
"""

from __future__ import annotations

import sys
from pathlib import Path

from lora_kit import shipped, sources
from lora_kit.errors import LoraKitError
from lora_kit.recipe_file import read_recipe

SHA256 = {
    "pypi:chitchat-dataset==0.9.0": "7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e",
    "pypi:bfcl-eval==2026.3.23": "3bb6dfa5f0c68ad403c9ec50b00db2bb3b4cc9b38ab1ff33f48fe30d853d3a0a",
    "pypi:kubernetes-validate==1.37.0": "85136d018a27b50ec7fc049d902bfa5193f5976807e6c0f408e3ab6fe078cad9",
    "pypi:skypilot==0.14.1": "8201f566a051677713e288231c7a994e9ebb5ea79bea9bc36eeeffb654543d02",
}
"""Archive -> its SHA-256."""

_MEMBERS = ("chitchat_dataset/dataset.json", "bfcl_eval/data/BFCL_v4_simple_python.json",
            "kubernetes_validate/kubernetes-json-schema/v1.37.0-local-strict/job-batch-v1.json", "sky/utils/schemas.py")


def member(reference: str) -> Path:
    """The file that ``reference`` (an archive of SHA256 and a member of it) stands for, its answers beside it."""
    archive = reference.partition("/")[0]
    name = Path(reference).name
    companions = (f"possible_answer/{name}",) if "/data/BFCL_v4_" in reference else ()
    return sources.resolve(reference, sha256=SHA256[archive], relative_to=Path.cwd(), companions=companions).path


def base() -> Path:
    """Folder of the default base (that of recipes/chat.yaml) as a bf16 checkpoint."""
    from lora_kit.model import find_base

    recipe_file = read_recipe(shipped.recipe_path("chat"))
    return Path(find_base(recipe_file.recipe.model, recipe_file.folder)["artifact"]["path"])


def main(arguments: list[str]) -> int:
    try:
        for archive, name in zip(SHA256, _MEMBERS, strict=True):
            print(member(f"{archive}/{name}"))
        if "--archives-only" not in arguments:
            print(base())
    except LoraKitError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
