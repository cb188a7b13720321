"""The ways in which lora-kit stops, each with its exit code.

Every error that reaches a user is one line, ``where: what; what to do``, and ends
the process with the exit code of its class::

    LoraKitError
    ├── GateFailed          1   a gate of the recipe or of an eval suite failed
    ├── RecipeError         2   the recipe or the command line is wrong
    ├── GateInconclusive    3   a gate cannot be decided with this many items
    ├── DataError           4   rows are missing, broken or unusable
    ├── ModelError          5   a model or an adapter is missing or does not fit
    ├── MachineError        6   disk, memory, a missing package, a run in use
    ├── RefusedError        7   unsafe or corrupt: refused
    ├── DivergedError       8   training diverged
    ├── InternalError      70   a bug of ours
    └── StoppedError       75   stopped with a verified checkpoint: run again

130 (interrupted elsewhere) is Python's KeyboardInterrupt and has no class here.
Reads and writes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence


class LoraKitError(Exception):
    """An error with a place, a statement and a remedy.

    Args:
        where: the file, line, key or stage that it is about.
        what: what is wrong, as a statement.
        todo: what the user can do about it; empty when there is nothing to say.
    """

    exit_code = 70

    def __init__(self, where: str, what: str, todo: str = "") -> None:
        self.where = _one_line(where)
        self.what = _one_line(what)
        self.todo = _one_line(todo)
        super().__init__(str(self))

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" + (f"; {self.todo}" if self.todo else "")

    def lines(self) -> list[str]:
        """The lines to print: one, or one for each of several problems."""
        return [str(self)]

    def __reduce__(self):
        return (type(self), (self.where, self.what, self.todo))


class GateFailed(LoraKitError):
    exit_code = 1


class RecipeError(LoraKitError):
    """A recipe or a command line that cannot be used, with all its problems at once."""

    exit_code = 2

    @classmethod
    def of(cls, problems: Sequence[LoraKitError]) -> RecipeError:
        """One error that carries every problem of ``problems`` (at least one)."""
        assert problems
        first = problems[0]
        error = cls(first.where, first.what, first.todo)
        error.problems = list(problems)
        return error

    problems: list[LoraKitError] = []

    def lines(self) -> list[str]:
        return [str(problem) for problem in self.problems] or [str(self)]


class GateInconclusive(LoraKitError):
    exit_code = 3


class DataError(LoraKitError):
    exit_code = 4


class ModelError(LoraKitError):
    exit_code = 5


class MachineError(LoraKitError):
    exit_code = 6


class RefusedError(LoraKitError):
    exit_code = 7


class DivergedError(LoraKitError):
    exit_code = 8


class InternalError(LoraKitError):
    exit_code = 70


class StoppedError(LoraKitError):
    exit_code = 75


BY_EXIT_CODE: dict[int, type[LoraKitError]] = {
    kind.exit_code: kind
    for kind in (
        GateFailed, RecipeError, GateInconclusive, DataError, ModelError, MachineError,
        RefusedError, DivergedError, InternalError, StoppedError,
    )
}

_WORST_FIRST = (70, 7, 8, 5, 4, 2, 6, 75)


def worst_exit_code(codes: Sequence[int]) -> int:
    """The exit code that speaks for several ranks: the first of 70, 7, 8, 5, 4, 2, 6, 75."""
    for code in _WORST_FIRST:
        if code in codes:
            return code
    return next((code for code in codes if code), 0)


def _one_line(text: str) -> str:
    return " ".join(str(text).split())
