"""`freeflow run`: many systems, each in a process of its own, here or on a Dask cluster.

Every finished run is a line of results.jsonl and a file of its own; a run that is begun again finds them and goes on
with what is missing. Importing this module starts neither JAX nor Dask.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from freeflow import children, config
from freeflow.cores import cores
from freeflow.errors import FreeflowError, InputError
from freeflow.folders import alone_in
from freeflow.interrupts import uninterrupted

RESULTS = "results.jsonl"
_NOT_RELIABLE = 3  # exit status of a run that has an answer all the same
_TOPIC = "freeflow"
_NAME_BYTES = 200


class Job(NamedTuple):
    """A system to estimate."""

    name: str
    key: str  # of the resolved system and the options: the same key is the same run
    system: str  # text of its system.yaml, resolved
    options: tuple[str, ...]  # of `freeflow estimate`


class Outcome(NamedTuple):
    """What a run came to."""

    name: str
    key: str
    status: str  # converged | target_not_reached | unreliable | failed
    message: str  # why it failed, or the one line of its answer
    attempts: int
    result: Mapping[str, Any] | None  # the JSON document of `freeflow estimate`

    @property
    def failed(self) -> bool:
        return self.status == "failed"


class Told(NamedTuple):
    """Something to say about a run."""

    name: str
    text: str
    outcome: Outcome | None = None  # when it has ended
    recalled: bool = False  # it had ended before


Report = Callable[[Told], None]


# ------------------------------------------------------------------------------ what to run


def gather(sources: Iterable[str], options: Sequence[str] = ()) -> tuple[list[Job], list[Outcome]]:
    """Jobs of systems, and those whose file cannot be used.

    Args:
        sources: system.yaml files, names of shipped systems, folders (every .yaml or .yml in them), and .txt files with
            one of these on each line, from the list's folder.
        options: Of `freeflow estimate`, for all of them.

    Raises:
        InputError: If there is nothing to run.
    """
    jobs: dict[str, Job] = {}
    broken = []
    for source in _expanded(sources):
        try:
            _, folder, section = config.read(source)
            values = config.with_absolute_paths(section.resolved(), folder)
        except FreeflowError as error:
            broken.append(Outcome(Path(source).stem, _key(source), "failed", str(error), 0, None))
            continue
        text = config.dump(values)
        key = _key(text, *options)
        jobs.setdefault(key, Job(section.name, key, text, tuple(options)))
    if not jobs and not broken:
        raise InputError("nothing to run: name system files, folders with them, or lists of them")
    return list(jobs.values()), broken


def _key(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def _expanded(sources: Iterable[str]) -> Iterator[str]:
    for source in sources:
        path = Path(source)
        if path.is_dir():
            yield from sorted(str(file) for file in path.iterdir() if file.suffix in {".yaml", ".yml"})
        elif path.suffix == ".txt" and path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines()
            named = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
            near = [str(path.parent / name) if (path.parent / name).exists() else name for name in named]
            yield from _expanded(near)
        else:
            yield source


# ------------------------------------------------------------------------------ what is known


def recalled(folder: Path) -> dict[str, Outcome]:
    """Runs that have ended, by key; the last line of each counts. A line that was cut off is no line."""
    found: dict[str, Outcome] = {}
    try:
        lines = (folder / RESULTS).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return found
    for line in lines:
        with suppress(ValueError, TypeError, KeyError):
            outcome = Outcome(**json.loads(line))
            found[outcome.key] = outcome
    return found


def keep(folder: Path, outcome: Outcome) -> None:
    """Append a line: it is there whole or, where the machine fails, as a torso that `recalled` passes over.

    Raises:
        FreeflowError: If it cannot be written, as on a full disk.
    """
    path = folder / RESULTS
    try:
        _append(path, json.dumps(outcome._asdict(), allow_nan=False) + "\n")
    except OSError as error:
        raise FreeflowError(f"{path}: cannot be written: {error.strerror}") from None
    if outcome.result is not None:
        from freeflow.documents import write_atomically

        text = json.dumps(outcome.result, indent=2, allow_nan=False) + "\n"
        write_atomically(folder / f"{_file_name(outcome.name)}-{outcome.key[:8]}.json", text)


def _append(path: Path, line: str) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":  # behind a torso
            line = "\n" + line
        content = line.encode()
        try:
            while content:  # a disk that is nearly full takes a part
                content = content[os.write(descriptor, content) :]
            os.fsync(descriptor)
        except OSError:
            os.ftruncate(descriptor, size)
            raise
    finally:
        os.close(descriptor)


def _file_name(name: str) -> str:
    """A name as the start of a file's: no separators, and few enough bytes for any file system."""
    plain = "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name)
    return plain.encode()[:_NAME_BYTES].decode(errors="ignore")


# ------------------------------------------------------------------------------ one run


def execute(
    job: Job,
    tell: Callable[[str], None] = lambda _: None,
    on: frozenset[int] | None = None,
    live: set[subprocess.Popen[str]] | None = None,
) -> Outcome:
    """A run in a process of its own.

    Args:
        job: What to run.
        tell: Told each line of progress.
        on: Cores that it may use; by default all that this process may.
        live: Where the process is listed while it runs.
    """
    live = set() if live is None else live
    with tempfile.TemporaryDirectory(prefix="freeflow-") as place:
        system, answer = Path(place, "system.yaml"), Path(place, "result.json")
        system.write_text(job.system, encoding="utf-8")
        process = subprocess.Popen(
            children.command("freeflow.run_worker"),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=children.environment(),
            text=True,
            errors="replace",
        )
        with process:
            if on and hasattr(os, "sched_setaffinity"):
                with suppress(OSError):  # it may have ended already
                    os.sched_setaffinity(process.pid, on)
            last = deque[str](maxlen=20)
            live.add(process)
            try:
                assert process.stdin is not None and process.stderr is not None
                with suppress(BrokenPipeError):
                    process.stdin.write(
                        json.dumps(["estimate", str(system), "--json", str(answer), *job.options]) + "\n"
                    )
                    process.stdin.flush()
                for line in process.stderr:
                    last.append(line.strip())
                    if line.startswith("freeflow: "):
                        tell(line.strip().removeprefix("freeflow: "))
                status = process.wait()
            except BaseException:
                process.kill()
                raise
            finally:
                live.discard(process)
        if answer.is_file() and status in {0, _NOT_RELIABLE}:
            result = json.loads(answer.read_text(encoding="utf-8"))
            return Outcome(job.name, job.key, result["status"], _in_short(result), 1, result)
    return Outcome(job.name, job.key, "failed", _reason(status, last).replace(f"{system}: ", ""), 1, None)


def _in_short(result: Mapping[str, Any]) -> str:
    value, error = result.get("beta_f_per_atom"), result.get("beta_f_per_atom_std_error")
    if "delta_f" in result:
        value, error, what = result["delta_f"], result.get("delta_f_std_error"), "delta F"
    else:
        what = "beta F / N"
    if value is None or error is None:
        return "no answer"
    from freeflow.result import format_with_error

    return f"{what} = {format_with_error(value, error)} kT"


def _reason(status: int, last: Iterable[str]) -> str:
    said = [line for line in last if line.startswith("freeflow: error: ")]
    if said:
        return said[-1].removeprefix("freeflow: error: ")
    return f"its process ended by signal {-status}" if status < 0 else f"its process ended with status {status}"


def _worth_another_try(outcome: Outcome) -> bool:
    """Whether a failed run failed by accident: what is wrong with its input will be wrong again."""
    return outcome.failed and outcome.message.startswith("its process ended")


# ------------------------------------------------------------------------------ all of them


def run_all(
    jobs: Sequence[Job],
    folder: Path,
    *,
    workers: int = 1,
    dask: str | None = None,
    retries: int = 1,
    report: Report = lambda _: None,
) -> list[Outcome]:
    """Outcomes of all jobs, in their order; those that `folder` knows are not run again, failures are.

    Args:
        jobs: What to run.
        folder: Where results are kept; made if need be.
        workers: Runs side by side in processes here; the cores are dealt out among them.
        dask: Address of the scheduler of a Dask cluster that runs them instead.
        retries: How often a run is tried again whose process died.
        report: Told of progress and outcomes.

    Raises:
        InputError: If the folder cannot be written or another run is at work in it, or the cluster not be reached.
        FreeflowError: If an outcome cannot be written.
        KeyboardInterrupt: If interrupted; what had ended is kept.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / RESULTS).open("a"):
            pass
    except OSError as error:
        raise InputError(f"{folder}: cannot be written: {error.strerror}") from None
    with alone_in(folder):
        return _run_in(folder, jobs, workers, dask, retries, report)


def _run_in(
    folder: Path, jobs: Sequence[Job], workers: int, dask: str | None, retries: int, report: Report
) -> list[Outcome]:
    known = recalled(folder)
    done = {job.key: known[job.key] for job in jobs if job.key in known and not known[job.key].failed}
    for outcome in done.values():
        report(Told(outcome.name, outcome.message, outcome, recalled=True))
    ended = (_locally if dask is None else functools.partial(_on_dask, dask))(
        [job for job in jobs if job.key not in done], workers, retries, report
    )
    for outcome in ended:
        keep(folder, outcome)
        done[outcome.key] = outcome
        report(Told(outcome.name, outcome.message, outcome))
    return [done[job.key] for job in jobs]


def _locally(jobs: Sequence[Job], workers: int, retries: int, report: Report) -> Iterator[Outcome]:
    """Outcomes as they come, from processes of this machine."""
    if not jobs:
        return
    workers = max(1, min(workers, len(jobs)))
    shares = deque(_dealt(workers))  # a deque is safe between threads
    live: set[subprocess.Popen[str]] = set()

    def one(job: Job) -> Outcome:
        share = shares.popleft()
        try:
            for attempt in range(1, retries + 2):
                outcome = execute(job, lambda text: report(Told(job.name, text)), share, live)
                outcome = outcome._replace(attempts=attempt)
                if not _worth_another_try(outcome):
                    break
                report(Told(job.name, f"{outcome.message}, attempt {attempt}"))
            return outcome
        finally:
            shares.append(share)

    threads = ThreadPoolExecutor(workers, thread_name_prefix="freeflow-run")
    try:
        waiting = {threads.submit(one, job) for job in jobs}
        while waiting:
            with uninterrupted():
                ended, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in ended)
    except BaseException:  # Ctrl-C: nothing goes on behind the user's back
        threads.shutdown(wait=False, cancel_futures=True)
        for process in list(live):
            process.kill()
        raise
    finally:
        threads.shutdown(wait=True, cancel_futures=True)


def _dealt(workers: int) -> list[frozenset[int] | None]:
    """Cores for each of so many runs side by side."""
    own = cores()
    if own is None:
        return [None] * workers
    return [frozenset(own[k::workers]) or frozenset({own[k % len(own)]}) for k in range(workers)]


def _on_dask(address: str, jobs: Sequence[Job], _workers: int, retries: int, report: Report) -> Iterator[Outcome]:
    """Outcomes as they come, from a Dask cluster, which gives the runs of workers that die to others."""
    try:
        from distributed import Client, as_completed
    except ImportError:
        raise InputError("--dask: the package distributed is missing; pip install 'freeflow[dask]'") from None
    if not jobs:
        return
    try:
        client = Client(address, timeout="20s")
    except (OSError, ValueError) as error:  # a timeout is an OSError too
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"--dask: no cluster at {address}: {said[0]}") from None
    with client:
        client.subscribe_topic(_TOPIC, lambda event: report(Told(*event[1])))
        # Another name in every session: the scheduler must not hand out an old failure.
        session = f"{time.time_ns():x}"
        futures = {
            client.submit(_on_worker, tuple(job), key=f"freeflow-{job.key}-{session}", pure=False, retries=retries): job
            for job in jobs
        }
        try:
            for future in as_completed(list(futures)):
                job = futures[future]
                if future.status == "finished":
                    yield Outcome(*future.result())
                    continue
                error = future.exception()
                said = str(error).strip().splitlines() or [type(error).__name__]
                yield Outcome(job.name, job.key, "failed", said[0], retries + 1, None)
        except BaseException:
            client.cancel(list(futures))
            raise


def _on_worker(job: tuple[Any, ...]) -> tuple[Any, ...]:
    """On the cluster: plain values in and out, so that a worker needs nothing but this package."""
    from distributed import get_worker

    worker, what = get_worker(), Job(*job)
    outcome = execute(what, lambda text: worker.log_event(_TOPIC, (what.name, text)))
    if _worth_another_try(outcome):
        raise RuntimeError(outcome.message)  # the scheduler tries again
    return tuple(outcome)
