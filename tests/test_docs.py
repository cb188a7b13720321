"""The documentation: its links lead somewhere, its commands and recipes are ones that lora-kit takes."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from ruamel.yaml import YAML

import lora_kit
from lora_kit import errors, formats, shipped
from lora_kit.cli import app
from lora_kit.recipe import Recipe
from lora_kit.recipe_file import parse_recipe, read_recipe
from lora_kit.suite import read_suite

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
VERBS = typer.main.get_command(app).commands
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
_LAUNCHED = re.compile(r"-m lora_kit\.cli (.+)")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, *languages: str) -> list[str]:
    """The fenced blocks of ``page`` in one of ``languages``."""
    return [body for language, body in _FENCE.findall(page.read_text()) if language in languages]


def prose(page: Path) -> str:
    return _FENCE.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE):
        anchor = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        number = 0
        while (unique := f"{anchor}-{number}" if number else anchor) in found:
            number += 1
        found.add(unique)
    return found


def commands(page: Path) -> list[str]:
    """What follows ``lora-kit`` in every command line of a page: in blocks, in inline code, behind a launcher."""
    found = []
    for block in blocks(page, "bash", "console"):
        # In a console block a command stands behind a prompt; the rest is output.
        lines = [line.removeprefix("$ ") for line in block.splitlines()
                 if line.startswith("$ ") or block in blocks(page, "bash")]
        found += [line.partition(" #")[0] for line in lines]
    found += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(page))]
    taken = []
    for line in found:
        launched = _LAUNCHED.search(line)
        if launched:
            taken.append(launched[1].removesuffix(" ..."))
        elif re.match(r"(\.venv/bin/)?lora-kit(?= |$)", line):
            taken.append(line.partition("lora-kit")[2].strip())
    return taken


def problem_with(arguments: str) -> str | None:
    """What is wrong with a command line, or None."""
    words = shlex.split(arguments)
    if not words or words[0].startswith("-"):
        return None if set(words) <= {"--help", "-h", "--version"} else f"no such option of lora-kit: {words}"
    verb, *rest = words
    if " ".join(words[:2]) in VERBS:
        verb, rest = " ".join(words[:2]), words[2:]
    if verb not in VERBS:
        return f"there is no verb {verb}"
    options = {name: parameter for parameter in VERBS[verb].params for name in parameter.opts}
    options |= {"--help": None, "-h": None}
    words = iter(rest)
    for word in words:
        if not word.startswith("-"):
            if word.startswith("recipes/") and not (ROOT / word).is_file():
                return f"there is no {word}"
            continue
        if word not in options:
            return f"{verb} has no option {word}"
        if word == "--set":
            section, _, key = next(words).partition("=")[0].partition(".")
            field = Recipe.model_fields.get(section)
            if field is None or (key and key.split(".")[0] not in field.annotation.model_fields):
                return f"there is no key {section}.{key}"
        elif options[word] is not None and not options[word].is_flag:
            next(words)
    if verb == "init" and rest and rest[0] not in shipped.recipe_names():
        return f"there is no recipe {rest[0]}"
    return None


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_are_ones_that_the_command_line_takes(page):
    problems = {command: problem_with(command) for command in commands(page)}
    assert not {command: problem for command, problem in problems.items() if problem}


def test_the_check_of_commands_sees_mistakes():
    assert len(commands(ROOT / "README.md")) > 5 and len(commands(ROOT / "docs" / "processes.md")) > 3
    for wrong in ("trian x.yaml", "run x.yaml --fast", "run recipes/nothing.yaml", "run x.yaml --set train.stpes=1",
                  "init chta", "--verison"):
        assert problem_with(wrong), wrong
    assert problem_with("run x.yaml --runs elsewhere --set train.steps=10 --fresh") is None


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_recipes_suites_and_tasks_are_read(page, tmp_path):
    for text in blocks(page, "yaml"):
        tree = YAML(typ="safe", pure=True).load(text)
        if "tasks" in tree:
            (tmp_path / "capitals.yaml").write_text(next(
                (other for other in blocks(page, "yaml") if other.startswith("# capitals.yaml")), ""))
            (tmp_path / "suite.yaml").write_text(text)
            read_suite("./suite.yaml", tmp_path, ["base", "merged", "gguf-q8_0"])
            continue
        if "kind" in tree or "output_type" in tree:
            for folder, content in (("suites/s.yaml", "tasks: shown\n"), ("tasks/shown/task.yaml", text)):
                (tmp_path / folder).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / folder).write_text(content)
            assert read_suite("suites/s.yaml", tmp_path).tasks[0].spec.kind == \
                tree.get("kind", tree.get("output_type"))
            continue
        assert set(tree) <= set(Recipe.model_fields), "neither a recipe nor a part of one"
        needed = {"model": "model: {base: ./model}\n", "data": "data: {train: rows.jsonl}\n"}
        parse_recipe(text + "".join(line for section, line in needed.items() if section not in tree),
                     tmp_path / "recipe.yaml")


def test_the_recipe_of_the_readme_is_the_shipped_one():
    [text] = blocks(ROOT / "README.md", "yaml")
    ours = parse_recipe(text, ROOT / "recipes" / "chat.yaml").recipe.model_dump(exclude_unset=True)
    whole = read_recipe(ROOT / "recipes" / "chat.yaml").recipe.model_dump()

    def differing(part, of, at=""):
        if isinstance(part, dict):
            return [found for key, value in part.items() for found in differing(value, of[key], f"{at}.{key}")]
        if isinstance(part, list) and part and isinstance(part[0], dict):
            keys = [key for key in ("source", "type") if key in part[0]]
            return [found for value in part for found in differing(
                value, next(entry for entry in of if all(entry[key] == value[key] for key in keys)), at)]
        return [] if part == of else [at]

    assert differing(ours, whole) == []


def test_the_readme_names_make_targets_that_there_are():
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        code = re.findall(r"`([^`\n]+)`", prose(page)) + "\n".join(blocks(page, "bash", "console")).splitlines()
        named = {found[1] for line in code if (found := re.match(r"make ([a-z-]+)", line))}
        assert named <= targets, page
    assert "`make demo" in (ROOT / "README.md").read_text()


def test_exit_codes_of_the_readme_are_those_of_the_code():
    text = (ROOT / "README.md").read_text()
    table = text.partition("## Exit codes")[2].partition("\n## ")[0]
    rows = {int(code): meaning for code, meaning in re.findall(r"^\| (\d+) \| (.+) \|$", table, re.MULTILINE)}
    assert rows.keys() == {0, 130, *errors.BY_EXIT_CODE}
    for code, meaning in rows.items():
        assert code in (0, 130) or re.search(rf" {code}   {re.escape(meaning)}$", errors.__doc__, re.MULTILINE)


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent.name == "docs"], ids=name_of)
def test_exit_codes_of_the_pages_exist(page):
    table = prose(page).partition("## Errors")[2]
    for codes in re.findall(r"^\| ([\d, ]+) \|", table, re.MULTILINE):
        assert {int(code) for code in codes.split(",")} <= {0, 130, *errors.BY_EXIT_CODE}


def test_every_verb_has_a_page_with_its_usage():
    index = (ROOT / "docs" / "index.md").read_text()
    for verb in VERBS:
        first = verb.partition(" ")[0]  # a verb of two words stands on the page of its first
        page = (ROOT / "docs" / f"{first}.md").read_text()
        assert page.startswith(f"# lora-kit {first}\n")
        assert f"<!-- generated: usage {verb} -->\n```text\nUsage: lora-kit {verb} " in page
        assert f"({first}.md)" in index


def test_every_format_is_described():
    described = anchors(ROOT / "docs" / "sources-and-formats.md")
    assert set(formats.names()) <= described


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_names_what_lora_kit_has(page):
    for text in blocks(page, "python"):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("lora_kit"):
                module = __import__(node.module, fromlist=["_"])
                assert all(hasattr(module, alias.name) for alias in node.names)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "lora_kit":
                assert getattr(lora_kit, node.attr)


def test_the_generated_parts_are_what_the_code_says():
    done = subprocess.run([sys.executable, "docs/build.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_generator_says_how_it_is_used():
    done = subprocess.run([sys.executable, "docs/build.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "--write | --check" in done.stderr
