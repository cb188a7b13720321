"""Write the generated parts of the documentation, or tell which are out of date.

    python docs/build.py --write | --check

``lora_kit/reference.py`` makes whole files (docs/recipe.md, docs/extensions.md, the recipe's JSON
Schema); this program makes docs/cli.md from the command line itself and fills blocks in pages that
are written by hand::

    <!-- generated: usage train -->
    ...
    <!-- end generated -->

It is no part of the package, because the command line stands above everything that may import it.
Reads the code and the pages; writes the pages.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from lora_kit import reference

ROOT = Path(__file__).resolve().parent.parent
_BLOCK = re.compile(r"(<!-- generated: (?P<what>[^>]+?) -->\n).*?(<!-- end generated -->)", re.DOTALL)
_WIDTH = "80"

_CLI = """\
# Command line

<!-- Generated from lora_kit/cli.py by `make docs`. Change the help texts there, not this page. -->

Every verb as `--help` prints it. Options stand after the verb.
"""


def usage(*verb: str) -> str:
    """What ``lora-kit VERB --help`` prints, as a fenced block."""
    from typer.testing import CliRunner

    from lora_kit.cli import app

    told = CliRunner().invoke(app, [*verb, "--help"], prog_name="lora-kit", env={"COLUMNS": _WIDTH})
    assert told.exit_code == 0, told.output
    lines = "\n".join(line.rstrip() for line in told.output.strip().splitlines())
    return f"```text\n{lines}\n```"


def verbs() -> dict[str, str]:
    """The verbs in the order of ``--help``, each with its summary."""
    import typer

    from lora_kit.cli import app

    commands = typer.main.get_command(app).commands
    return {name: " ".join((command.help or "").split()) for name, command in commands.items()}


def page_of(verb: str) -> str:
    """The page of a verb: one of two words is told on that of its first."""
    return f"{verb.partition(' ')[0]}.md"


def verb_table(folder: str) -> str:
    """The verbs with their summaries; ``folder`` leads from the page to docs/."""
    rows = [f"| [`{name}`]({folder}{page_of(name)}) | {summary} |" for name, summary in verbs().items()]
    return "\n".join(["| verb | what it does |", "|---|---|", *rows])


def command_line() -> str:
    """docs/cli.md."""
    parts = [_CLI, usage(), "\n## Exit codes\n", reference.exit_code_table(), ""]
    for name in verbs():
        parts.append(f"## {name}\n\n[What it does, reads and writes]({page_of(name)}).\n\n{usage(name)}\n")
    return "\n".join(parts)


def block(what: str, page: Path) -> str:
    """The text of the block ``<!-- generated: what -->`` in ``page``."""
    kind, _, name = what.partition(" ")
    if kind == "usage":
        return usage(name)
    makers = {
        "verbs": lambda: verb_table("docs/" if page.parent == ROOT else ""),
        "exit codes": reference.exit_code_table,
        "formats": reference.format_rows,
    }
    if what not in makers:
        sys.exit(f"{page}: nothing generates '{what}'; known: usage VERB, {', '.join(makers)}")
    return makers[what]()


def filled(page: Path) -> str:
    """The text of ``page`` with its generated blocks as they should be."""
    return _BLOCK.sub(lambda found: f"{found[1]}{block(found['what'], page)}\n{found[3]}", page.read_text("utf-8"))


def files() -> dict[Path, str]:
    """Every file of the documentation that is generated, whole or in part, as it should be."""
    whole = {ROOT / name: text for name, text in reference.files().items()}
    whole[ROOT / "docs" / "cli.md"] = command_line()
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return whole | {page: filled(page) for page in pages if page not in whole}


def stale() -> list[Path]:
    """The files that are missing or not as they should be."""
    return [path for path, text in files().items() if not path.is_file() or path.read_text("utf-8") != text]


def main(arguments: list[str]) -> None:
    """``--write`` or ``--check``; ends the process with 1 and the stale files' names, or a line on its use."""
    if arguments == ["--write"]:
        made = files()
        for path in stale():
            path.write_text(made[path], encoding="utf-8")
            print(path.relative_to(ROOT))
    elif arguments == ["--check"]:
        found = stale()
        if found:
            names = ", ".join(str(path.relative_to(ROOT)) for path in found)
            sys.exit(f"{names}: not what the code says; run make docs")
    else:
        sys.exit("python docs/build.py --write | --check")


if __name__ == "__main__":
    main(sys.argv[1:])
