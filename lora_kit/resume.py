"""Where a training stands, into a checkpoint and back: adapter, optimizer, random states of every process, position.

A run that goes on continues to the byte as if it had not been stopped, on the same build, device, threads and number
of processes. With another number of processes it goes on with the same examples and other random states, which is told.

Reads and writes ``train/checkpoints/``. (torch inside functions.)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_kit import checkpoint
from lora_kit.errors import RefusedError
from lora_kit.events import Caution, Note, tell
from lora_kit.rundir import Run
from lora_kit.training_log import TrainingLog

_OF_CHECKPOINT = ("random", "log", "scaler")


class Resume:
    """The checkpoints of one training.

    Args:
        named: (name, parameter) of what is trained.
        optimizer: accelerate's.
        run: of which the checkpoints are, held by the main process.
    """

    def __init__(self, run: Run, named, optimizer, log: TrainingLog, accelerator) -> None:
        self.run, self.folder, self.run_id = run, run.work("train") / "checkpoints", run.uid
        self.named, self.optimizer, self.log, self.accelerator = named, optimizer, log, accelerator
        self.found: checkpoint.Checkpoint | None = None
        self.at: tuple | None = None

    def find(self, state: dict[str, Any]) -> dict[str, Any]:
        """``state`` as the newest usable checkpoint has it, or as it is; logs are cut to what that sealed.

        Raises:
            RefusedError: there are checkpoints and none can be used.
        """
        from accelerate.utils import broadcast_object_list

        told: list[Any] = [None, None]
        if self.accelerator.is_main_process:
            try:
                self.found = checkpoint.newest(self.folder, self.run_id, self._check)
                told[0] = self.found.state["step"] if self.found else None
            except RefusedError as error:
                told[1] = (error.where, error.what, error.todo)
        if self.accelerator.num_processes > 1:
            broadcast_object_list(told)
            if told[0] is not None and self.found is None:
                self.found = checkpoint.verified(self._place(told[0]), told[0], self.run_id)
        if told[1]:
            raise RefusedError(*told[1])
        if self.found is None:
            self.log.truncate({})
            return state
        self.log.truncate(self.found.state["log"])
        tell(Note(text=f"going on from {self.found.folder.name}"))
        state = {key: value for key, value in self.found.state.items() if key not in _OF_CHECKPOINT}
        self.at = _position(state)
        return state

    def _check(self, found: checkpoint.Checkpoint) -> None:
        self.log.check(found.state["log"])

    def _place(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"

    def load(self) -> None:
        """Put adapter and optimizer of the checkpoint that was found into place; nothing without one."""
        if self.found is not None:
            self._load_adapter(self.found)
            checkpoint.load_optimizer_tensors(self.optimizer.optimizer,
                                              checkpoint.load_tensors(self.found, "optimizer"))

    def start_random(self, seed: int) -> None:
        """Random states for the next step: those of the checkpoint, or new ones from ``seed``.

        To be called last before the first step: loading and proving draw.
        """
        import random

        import numpy
        import torch

        rank = self.accelerator.process_index
        states = self.found.state["random"] if self.found else []
        if len(states) == self.accelerator.num_processes:
            checkpoint.restore_random_state(states[rank])
            if self.accelerator.scaler is not None and self.found.state.get("scaler"):
                self.accelerator.scaler.load_state_dict(self.found.state["scaler"])
            return
        if states:
            tell(Caution(text=f"{len(states)} processes made the checkpoint, {self.accelerator.num_processes} go on: "
                              "with the same examples and other random numbers"))
            seed += 1_000_003 * self.found.state["step"]
        random.seed(seed + rank)
        numpy.random.seed((seed + rank) % 2**32)
        torch.manual_seed(seed + rank)

    def save(self, state: dict[str, Any], taken: tuple | None = None) -> None:
        """Write a checkpoint, unless this very state has one.

        Args:
            taken: random states of this process (:func:`lora_kit.checkpoint.take_random`), if not those of now.

        Raises:
            MachineError: it cannot be written; the earlier ones are still there.
        """
        if self.at == _position(state):
            return
        tensors, values = self.content(state, taken)
        if self.accelerator.is_main_process:
            self.run.check_held()
            checkpoint.save(self.folder, state["step"], tensors, values, run_id=self.run_id,
                            keep_steps={state["best_step"]} - {None})
        self.at = _position(state)

    def content(self, state: dict[str, Any], taken: tuple | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        """Tensors by file and JSON values of a checkpoint of ``state``; all processes take part."""
        from accelerate.utils import gather_object

        tensors = {"adapter": {name: checkpoint.whole(parameter.detach()) for name, parameter in self.named},
                   "optimizer": checkpoint.optimizer_tensors(self.optimizer.optimizer)}
        random_states = [checkpoint.random_state(taken)]
        if self.accelerator.num_processes > 1:
            random_states = gather_object(random_states)
        sealed = self.log.sealed() if self.accelerator.is_main_process else {}
        scaler = self.accelerator.scaler
        return tensors, {**state, "random": random_states, "log": sealed,
                         "scaler": scaler.state_dict() if scaler is not None else None}

    def load_best(self, step: int) -> None:
        """Put the adapter of the checkpoint of ``step`` into place.

        Raises:
            RefusedError: that checkpoint does not verify.
        """
        self._load_adapter(checkpoint.verified(self._place(step), step, self.run_id))

    def _load_adapter(self, found: checkpoint.Checkpoint) -> None:
        import torch

        saved = checkpoint.load_tensors(found, "adapter")
        with torch.no_grad():
            for name, parameter in self.named:
                parameter.copy_(checkpoint.like(saved[name], parameter))


def _position(state: dict[str, Any]) -> tuple:
    return state["step"], state["evaluated"]
