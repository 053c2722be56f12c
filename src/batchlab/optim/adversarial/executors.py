"""Where adversarial inputs are made while a step trains: in line, in a thread, in a process, on a CUDA stream.

An executor is given a batch and makes its input with the weights of that moment; the result is the same in all four.
All but the one in line compute on copies of the model in evaluation mode, one for each batch under way, which take
over the parameters and buffers at each call, and nothing else: an attribute that is no tensor stays as it was.
"""

from __future__ import annotations

import contextlib
import copy
import io
import os
import signal
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing import process
from multiprocessing.reduction import ForkingPickler
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from batchlab.core.errors import BatchlabError, InputError
from batchlab.parallel.shards import is_spread

Make = Callable[[nn.Module, Any, Any], Tensor]  # model, batch, settings -> the adversarial input
Result = Callable[[], Tensor]
PATIENCE_S = 0.5  # how long one end waits before it looks whether the other still lives


class Executor(Protocol):
    """`submit` begins to make the input of a batch with the weights of now; the result waits for it if need be."""

    def submit(self, batch: Any, x: Tensor, settings: Any) -> Result: ...

    def close(self) -> None: ...


class Inline:
    """In the calling thread, on the model itself: no copy, and nothing at the same time."""

    def __init__(self, model: nn.Module, make: Make, slots: int) -> None:
        self._model, self._make = model, make

    def submit(self, batch: Any, x: Tensor, settings: Any) -> Result:
        made = self._make(self._model, batch, settings)
        return lambda: made

    def close(self) -> None:
        """Nothing to end."""


class Threaded:
    """In a second thread, for models on the CPU. An error in it is raised where the result is asked for."""

    def __init__(self, model: nn.Module, make: Make, slots: int) -> None:
        _check_device(model, "thread", "cpu")
        self._replicas, self._make = Replicas(model, slots), make
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="adversarial")

    def submit(self, batch: Any, x: Tensor, settings: Any) -> Result:
        return self._pool.submit(self._make, self._replicas.now()[1], batch, settings).result

    def close(self) -> None:
        """Ends the thread after what it is at."""
        self._pool.shutdown(cancel_futures=True)


class Streamed:
    """On a CUDA stream beside the one in use: both passes share the model's device."""

    def __init__(self, model: nn.Module, make: Make, slots: int) -> None:
        _check_device(model, "stream", "cuda")
        self._replicas, self._make = Replicas(model, slots), make
        self._device = next((p.device for p in model.parameters()), None)
        self._stream: Any = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def submit(self, batch: Any, x: Tensor, settings: Any) -> Result:
        _, replica = self._replicas.now()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            made = self._make(replica, batch, settings)
            done = self._stream.record_event()

        def result(_: Any = (batch, settings)) -> Tensor:  # held: freed before, their memory could be written again
            current = torch.cuda.current_stream(self._device)
            current.wait_event(done)
            made.record_stream(current)
            return made

        return result

    def close(self) -> None:
        """Waits for what is under way."""
        self._stream.synchronize()


class Processed:
    """In a second process, for models on the CPU, begun by spawn: `make` and the model must be importable there.

    Weights, batches and results lie in shared memory, so the trainer never waits for the process but to read a result.
    It has as many threads as the trainer, since sums depend on how they are cut. It ends with `close`, with this
    object, and, within a second after what it is at, when the trainer is gone, however that came.
    """

    def __init__(self, model: nn.Module, make: Make, slots: int) -> None:
        _check_device(model, "process", "cpu")
        if process.current_process().daemon:
            raise InputError('executor "process" cannot be begun in a daemonic process: use "thread"')
        self._replicas = Replicas(model, slots)
        _check_sendable(make, self._replicas.models[0])
        for replica in self._replicas.models:
            replica.share_memory()
        self._waiting: deque[_Answer] = deque()
        context = torch.multiprocessing.get_context("spawn")
        self._link, theirs = context.Pipe()
        arguments = (theirs, os.getpid(), make, self._replicas.models, _numerics())
        self._process = context.Process(target=_serve, args=arguments, name="adversarial", daemon=True)
        self._process.start()
        theirs.close()
        self._end = weakref.finalize(self, _end, self._link, self._process, os.getpid())

    def submit(self, batch: Any, x: Tensor, settings: Any) -> Result:
        if not self._end.alive:
            raise InputError("the executor is closed: make a new ConcurrentAdversarial")
        slot, _ = self._replicas.now()
        made: Any = torch.empty_like(x, requires_grad=False)
        answer = _Answer(made.share_memory_())
        try:  # a copy, since to send a tensor moves its storage, which may be the caller's NumPy array
            self._link.send((slot, *copy.deepcopy((batch, settings)), answer.made))
        except OSError:
            raise BatchlabError(self._gone()) from None
        self._waiting.append(answer)
        return partial(self._result, answer)

    def _result(self, answer: _Answer) -> Tensor:
        while not answer.there:
            self._receive()
        if answer.error is not None:
            raise BatchlabError(f"an adversarial input could not be made in the second process:\n{answer.error}")
        return answer.made

    def _receive(self) -> None:
        """Waits for the oldest answer that is not there yet."""
        while not self._link.poll(PATIENCE_S):
            if not self._process.is_alive():
                raise BatchlabError(self._gone())
        try:
            error = self._link.recv()
        except (EOFError, OSError):
            raise BatchlabError(self._gone()) from None
        answer = self._waiting.popleft()
        answer.error, answer.there = error, True

    def _gone(self) -> str:
        self._process.join(5)
        return (
            f"the process that makes adversarial inputs ended with exit code {self._process.exitcode}; "
            'if it never began, keep the training script\'s work under `if __name__ == "__main__":`'
        )

    def close(self) -> None:
        """Ends the process."""
        self._end()


class _Answer:
    """The input that the process writes, and the text of what went wrong there."""

    def __init__(self, made: Tensor) -> None:
        self.made, self.there = made, False
        self.error: str | None = None


class Replicas:
    """`slots` copies of a model, used in turn; each takes over the model's tensors when its turn comes."""

    def __init__(self, model: nn.Module, slots: int) -> None:
        if any(is_spread(tensor) for tensor in _tensors(model)):
            raise InputError('a model of DTensors (fully_shard) has no copy on one rank: use executor "inline"')
        self._model, self._turn = model, 0
        self.models = [copy.deepcopy(model).eval().requires_grad_(False) for _ in range(slots)]
        for replica in self.models:
            for parameter in replica.parameters():
                parameter.grad = None

    @torch.no_grad()
    def now(self) -> tuple[int, nn.Module]:
        """The number of the copy whose turn it is, and the copy, with the weights of now."""
        slot = self._turn % len(self.models)
        self._turn += 1
        source, target = _tensors(self._model), _tensors(self.models[slot])
        if [_form(tensor) for tensor in source] != [_form(tensor) for tensor in target]:
            raise InputError("the model's parameters and buffers must stay those it was given with: make a new one")
        torch._foreach_copy_(target, source)
        return slot, self.models[slot]


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _form(tensor: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return tensor.shape, tensor.dtype, tensor.device


def _check_device(model: nn.Module, executor: str, device: str) -> None:
    for name, tensor in model.named_parameters():
        if tensor.device.type != device:
            right = '"stream" or "inline"' if device == "cpu" else '"thread", "process" or "inline"'
            raise InputError(
                f"executor {executor!r} is for models on {device}, {name} is on {tensor.device}: use {right}"
            )


def _check_sendable(make: Make, model: nn.Module) -> None:
    """Refuses what a spawned process could not be given, before one is begun. Weights play no part: none are sent."""
    try:
        ForkingPickler(io.BytesIO()).dump((make, copy.deepcopy(model).to("meta")))
    except Exception as error:
        raise InputError(
            'executor "process" needs a loss_fn and a model that can be imported by name in another process, as a '
            f"function at a module's top level can: {error}"
        ) from error


def _numerics() -> dict[str, Any]:
    """What the bits of a result depend on, beside its inputs."""
    return {
        "set_num_threads": torch.get_num_threads(),
        "set_default_dtype": torch.get_default_dtype(),
        "set_float32_matmul_precision": torch.get_float32_matmul_precision(),
        "use_deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
    }


def _serve(link: Any, trainer: int, make: Make, replicas: list[nn.Module], numerics: dict[str, Any]) -> None:
    """Makes one input after the other, until the trainer says None or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both; the trainer is the one to act on it
    for setting, value in numerics.items():
        getattr(torch, setting)(value)
    while True:
        while not link.poll(PATIENCE_S):  # a forked child of the trainer may hold the pipe open after its death
            if os.getppid() != trainer:
                return
        try:
            job = link.recv()
            if job is None:
                return
            slot, batch, settings, made = job
            made.copy_(make(replicas[slot], batch, settings))
            error = None
        except (EOFError, ConnectionError):
            return
        except Exception:
            error = traceback.format_exc()
        try:
            link.send(error)
        except OSError:
            return


def _end(link: Any, worker: Any, owner: int) -> None:
    if os.getpid() != owner:  # a forked child has a copy of this object, and no part in the process
        return
    with contextlib.suppress(OSError):
        link.send(None)
    deadline = time.monotonic() + 1.0
    while worker.is_alive() and time.monotonic() < deadline:
        worker.join(0.05)
    if worker.is_alive():
        worker.kill()
    worker.join()
    link.close()


EXECUTORS: dict[str, Callable[[nn.Module, Make, int], Executor]] = {
    "inline": Inline,
    "thread": Threaded,
    "process": Processed,
    "stream": Streamed,
}
