"""ASE calculators in processes of their own, and batches of configurations spread over them."""

from __future__ import annotations

import contextlib
import pickle
import subprocess
import threading
import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from freeflow import children
from freeflow.errors import CalculatorError


class Job(NamedTuple):
    """What a worker is to calculate."""

    calculator: str  # module:factory
    arguments: Mapping[str, Any]  # of the factory
    folder: str  # where the module may lie
    species: tuple[str, ...]
    cell: np.ndarray  # (3, 3) [angstrom]
    sites: np.ndarray  # (n_atoms, 3) [angstrom]


class Pool:
    """Processes that each hold a calculator of their own; they start when there is work for them.

    After a failure the pool answers with NaN and does no more work: `failure` says what went wrong. That is because
    an exception could not pass through compiled code in one line.
    """

    def __init__(self, job: Job, n_workers: int):
        self._job, self._n_workers = job, n_workers
        self._workers: list[subprocess.Popen[bytes]] = []
        self._lock = threading.Lock()
        self.failure: CalculatorError | None = None
        # With the pool, or at the end of the program, its processes end.
        self.close = weakref.finalize(self, _end, self._workers)

    def evaluate(
        self, positions: Float[np.ndarray, "batch n_atoms 3"]
    ) -> tuple[Float[np.ndarray, " batch"], Float[np.ndarray, "batch n_atoms 3"]]:
        """Energies [eV] and gradients [eV/angstrom]; NaN once the pool has failed."""
        energies, gradients, _ = self._answers(positions, None)
        return energies, gradients

    def evaluate_in_cells(
        self, positions: Float[np.ndarray, "batch n_atoms 3"], cells: Float[np.ndarray, "batch 3 3"]
    ) -> tuple[Float[np.ndarray, " batch"], Float[np.ndarray, "batch n_atoms 3"], Float[np.ndarray, "batch 3 3"]]:
        """The same in cells of their own, and the virials dU/d(strain) [eV]."""
        return self._answers(positions, cells)

    def _answers(self, positions: np.ndarray, cells: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        with self._lock:
            if self.failure is None:
                try:
                    return self._evaluate(np.asarray(positions, np.float64), cells)
                except CalculatorError as error:
                    self.failure = error
                    _end(self._workers)
        n = len(positions)
        return np.full(n, np.nan), np.full(positions.shape, np.nan), np.full((n, 3, 3), np.nan)

    def require(self) -> None:
        """Nothing, unless the pool has failed.

        Raises:
            CalculatorError: What went wrong; one line.
        """
        if self.failure is not None:
            raise CalculatorError(str(self.failure))

    def _evaluate(self, positions: np.ndarray, cells: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        n = min(len(positions), self._n_workers)
        while len(self._workers) < n:
            self._start()
        parts = np.array_split(positions, n)
        boxes = [None] * n if cells is None else np.array_split(cells, n)
        for worker, part, box in zip(self._workers, parts, boxes, strict=False):
            self._send(worker, (part, box))
        answers = [answer for worker, _ in zip(self._workers, parts, strict=False) for answer in self._receive(worker)]
        energies, forces, virials = zip(*answers, strict=True)
        return np.array(energies), -np.array(forces), np.array([] if cells is None else virials)

    def _start(self) -> None:
        # A worker leaves the other cores to the others.
        worker = subprocess.Popen(
            children.command("freeflow.ase_worker"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=children.environment(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1"),
        )
        self._workers.append(worker)
        self._send(worker, self._job._asdict())
        self._receive(worker)

    def _send(self, worker: subprocess.Popen[bytes], message: Any) -> None:
        assert worker.stdin is not None
        try:
            pickle.dump(message, worker.stdin, protocol=pickle.HIGHEST_PROTOCOL)
            worker.stdin.flush()
        except OSError:
            raise self._died(worker) from None

    def _receive(self, worker: subprocess.Popen[bytes]) -> Any:
        assert worker.stdout is not None
        try:
            state, content = pickle.load(worker.stdout)
        except (EOFError, OSError, pickle.UnpicklingError):
            raise self._died(worker) from None
        if state == "failed":
            raise CalculatorError(f"potential: {self._job.calculator}: {content.removeprefix('potential: ')}")
        return content

    def _died(self, worker: subprocess.Popen[bytes]) -> CalculatorError:
        worker.kill()  # it may only have closed its output
        status = worker.wait()
        how = f"signal {-status}" if status < 0 else f"exit status {status}"
        return CalculatorError(f"potential: a process with the calculator {self._job.calculator} died ({how})")


def _end(workers: list[subprocess.Popen[bytes]]) -> None:
    for worker in workers:
        worker.kill()
        worker.wait()
        for stream in (worker.stdin, worker.stdout):
            with contextlib.suppress(OSError):  # what was still to be flushed has no reader any more
                if stream is not None:
                    stream.close()
    workers.clear()


_POOLS: weakref.WeakValueDictionary[bytes, Pool] = weakref.WeakValueDictionary()


def shared_pool(job: Job, n_workers: int) -> Pool:
    """A pool for a job; systems that differ in temperature alone share one."""
    key = pickle.dumps((job, n_workers))
    pool = _POOLS.get(key)
    if pool is None or pool.failure is not None:
        pool = _POOLS[key] = Pool(job, n_workers)
    return pool
