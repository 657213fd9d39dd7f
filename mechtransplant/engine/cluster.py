"""Jobs in the processes of Ray: on this machine, or on the nodes of a cluster that is there already.

What a worker is made of is put into Ray's store once, which brings it to every node once; the processes of a node read
it there. Jobs are scheduled from here: a process that dies, with its node or alone, is replaced wherever there is room.
"""

from __future__ import annotations

import os
import socket
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

from mechtransplant import __version__
from mechtransplant.engine.jobs import (
    ATTEMPTS,
    TRIES,
    Done,
    Job,
    Recipe,
    Try,
    WorkerError,
    again,
    answer_to,
    checked,
    died,
)
from mechtransplant.errors import UsageError, check_count, one_line
from mechtransplant.progress import EVERY, LOG

#: seconds after which it is said that processes have not started
PATIENCE = 60.0


class Ray:
    """``workers`` processes, each with a worker that the recipe makes; started when there are jobs for them.

    Args:
        address: of a cluster ("auto": the one that this machine belongs to, "ray://HOST:10001", …); without one, Ray is
            started on this machine, and stopped by ``close``.
        threads: of each process, which asks its node for as many cores; without a number, the most with which all the
            processes find room. Results can depend on it in their last bits.
        gpus: that each process asks its node for; a share of one where several fit.

    Raises UsageError where Ray is not installed, or no cluster answers at the address.
    """

    def __init__(
        self, recipe: Recipe, workers: int, threads: int | None = 1, address: str | None = None, gpus: float = 0
    ) -> None:
        check_count("workers", workers)
        if threads is not None:
            check_count("threads", threads)
        try:
            import ray  # noqa: F401
        except ImportError as error:
            raise UsageError("the engine ray needs Ray: pip install 'mechtransplant[ray]'") from error
        self.recipe, self.workers, self.address, self.gpus = recipe, workers, address, gpus
        self._asked, self.threads = threads, threads or 1
        self._ours = self._warned = self._local = False
        self._recipe: Any = None
        self._idle: list[Any] = []
        #: what says that a process runs → the process, and when it was asked for; only one that runs gets a job, since
        #: one for which there is no room would keep it for ever
        self._starting: dict[Any, tuple[Any, float]] = {}
        self._nodes = _Nodes()

    def run(self, jobs: Sequence[Job], done: Done) -> None:
        """Do the jobs, the first ones first; raises UsageError and WorkerError for a job's own errors."""
        import ray

        if not jobs:
            return
        self._connect()
        waiting = [Try(number) for number in range(len(jobs))][::-1]
        #: what is awaited → (the process, the job)
        asked: dict[Any, tuple[Any, Try]] = {}
        self._drop_the_dead()
        starting, lost = self._starting, 0
        try:
            while waiting or asked:
                while waiting and self._idle:
                    this = waiting.pop()
                    process = self._idle.pop()
                    asked[process.do.remote(jobs[this.number])] = process, this
                wanted = min(self.workers - len(asked), len(waiting)) - len(starting)
                # where processes end as they start, those that run do the work; without any another one is tried
                for _ in range(wanted if lost < TRIES or not (asked or starting) else 0):
                    process = self._start()
                    starting[process.here.remote()] = process, time.monotonic()
                ready = self._first([*asked, *starting], bool(waiting))
                if ready in starting:
                    process, _ = starting.pop(ready)
                    try:
                        ray.get(ready)
                    except ray.exceptions.RayError as end:
                        lost += 1
                        said = f"{lost} processes of Ray's ended as they started ({one_line(end)})"
                        if lost >= TRIES and not (asked or starting or self._idle):
                            raise WorkerError(said) from end
                        if lost == TRIES:
                            warnings.warn(f"{said}: no more are started for now", stacklevel=2)
                        continue
                    lost = 0
                    self._idle.append(process)
                    continue
                process, this = asked.pop(ready)
                try:
                    answer = checked(ray.get(ready))
                except ray.exceptions.RayError as end:
                    # its process or its node has died, or Ray has ended it for its memory
                    ray.kill(process)
                    if this.deaths + 1 >= TRIES:
                        raise died(TRIES, one_line(end)) from end
                    waiting.append(replace(this, deaths=this.deaths + 1))
                    continue
                except WorkerError as error:
                    # memory or a device may be spent there: another process takes the job up
                    ray.kill(process)
                    if this.failures + 1 >= ATTEMPTS:
                        raise
                    warnings.warn(again(error), stacklevel=2)
                    waiting.append(replace(this, failures=this.failures + 1))
                    continue
                self._idle.append(process)
                self._nodes.count(answer["node"])
                done(this.number, answer["result"])
        except BaseException:
            for process, _ in asked.values():
                # nobody waits for what it is doing
                ray.kill(process)
            self.close()
            raise
        self._nodes.say()

    def _first(self, awaited: list[Any], jobs_wait: bool) -> Any:
        """The first answer of those awaited; says so once where processes that jobs wait for have not started."""
        import ray

        while True:
            ready, _ = ray.wait(awaited, timeout=PATIENCE)
            since = min((asked for _, asked in self._starting.values()), default=float("inf"))
            if jobs_wait and not self._warned and time.monotonic() - since >= PATIENCE:
                self._warned = True
                warnings.warn(
                    f"{len(self._starting)} of {self.workers} processes with {self._needs()} each have not started "
                    f"after {PATIENCE:g} s: Ray may have no room (see `ray status`). Those that run do the work",
                    stacklevel=3,
                )
            if ready:
                return ready[0]

    def _drop_the_dead(self) -> None:
        """Forget kept processes that have ended since: a job is not to be counted as tried in them."""
        import ray

        asked = [(process, process.here.remote()) for process in self._idle]
        self._idle = []
        for process, answer in asked:
            try:
                ray.get(answer, timeout=PATIENCE)
            except ray.exceptions.RayError:
                ray.kill(process)
                continue
            self._idle.append(process)

    def close(self) -> None:
        """End the processes, and Ray where it was started here."""
        import ray

        if not ray.is_initialized():
            return
        for process in (*self._idle, *(process for process, _ in self._starting.values())):
            ray.kill(process)
        self._idle, self._recipe = [], None
        self._starting.clear()
        if self._ours:
            ray.shutdown()
            self._ours = False

    def _connect(self) -> None:
        import ray

        local = self._local
        if not ray.is_initialized():
            # no report about its use leaves this machine
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            quiet: dict[str, Any] = {"logging_level": "error", "log_to_driver": False}
            self._local = local = self.address is None
            if local:
                # the cores are this machine's to share: it is asked for so many processes
                cores = os.cpu_count() or 1
                self.threads = self._asked or max(1, cores // self.workers)
                quiet |= {"num_cpus": max(cores, self.workers * self.threads), "include_dashboard": False}
            try:
                if self.address not in (None, "auto", "local"):
                    _knock(str(self.address))
                ray.init(address=self.address, **quiet)
            except (OSError, ValueError, RuntimeError) as error:
                where = f"at {self.address!r}" if self.address else "on this machine"
                raise UsageError(
                    f"no Ray {where}: {one_line(error).rstrip('.')}. Start a cluster with `ray start "
                    "--head`, or leave --address out"
                ) from error
            self._ours = True
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        # once: processes of one run have as many threads, whatever nodes come and go
        if self._asked is None and self._recipe is None and not local:
            self.threads = most_threads(nodes, self.workers, self.gpus)
        if not any(places(node, self.threads, self.gpus) for node in nodes):
            largest: Mapping[str, float] = max(
                nodes, key=lambda node: (node.get("GPU", 0), node.get("CPU", 0)), default={}
            )
            raise UsageError(
                f"a process asks its node for {self._needs()}, and the largest has {largest.get('CPU', 0):g} CPU and "
                f"{largest.get('GPU', 0):g} GPU: use fewer threads, or another device"
            )
        if self._recipe is None:
            self._recipe = ray.put(self.recipe)

    def _needs(self) -> str:
        """What a process asks its node for."""
        return f"{self.threads} CPU" + (f" and {self.gpus:g} GPU" if self.gpus else "")

    def _start(self) -> Any:
        import ray

        environment = {name: str(self.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        remote = ray.remote(_Process).options(
            num_cpus=self.threads, num_gpus=self.gpus, max_restarts=0, runtime_env={"env_vars": environment}
        )
        return remote.remote(self._recipe, __version__)


def places(node: Mapping[str, float], threads: int, gpus: float) -> int:
    """How many processes have room on a node of so many "CPU" and "GPU"."""
    fit = int(node.get("CPU", 0) // threads)
    return min(fit, int(node.get("GPU", 0) // gpus)) if gpus else fit


def most_threads(nodes: Sequence[Mapping[str, float]], workers: int, gpus: float) -> int:
    """The most cores for each of so many processes with which as many find room as ever do; at least 1."""
    most = int(max((node.get("CPU", 0) for node in nodes), default=1))
    goal = max(1, min(workers, sum(places(node, 1, gpus) for node in nodes)))
    fitting = (t for t in range(most, 1, -1) if sum(places(node, t, gpus) for node in nodes) >= goal)
    return next(fitting, 1)


def _knock(address: str) -> None:
    """Raise OSError or ValueError where nobody listens: Ray itself would go on trying for minutes."""
    place = urlsplit(address if "://" in address else f"ray://{address}")
    if not place.hostname or not place.port:
        raise ValueError("expected HOST:PORT, ray://HOST:PORT or auto")
    socket.create_connection((place.hostname, place.port), timeout=10).close()


class _Nodes:
    """The log's lines about which node has done how many jobs so far: at a node's first, and once a minute."""

    def __init__(self) -> None:
        self.jobs: Counter[str] = Counter()
        self.last = time.monotonic()

    def count(self, node: str) -> None:
        """One more."""
        self.jobs[node] += 1
        now = time.monotonic()
        if self.jobs[node] == 1 or now - self.last >= EVERY:
            self.last = now
            self.say()

    def say(self) -> None:
        """A line now."""
        LOG.info("jobs done by node: %s", ", ".join(f"{node} {done:,}" for node, done in self.jobs.items()))


class _Process:
    """One worker, in a process of Ray's."""

    def __init__(self, recipe: Recipe, version: str) -> None:
        self.recipe, self.version = recipe, version
        self.worker: Any = None

    def here(self) -> None:
        """Answers once there is room for it."""

    def do(self, job: Job) -> dict[str, Any]:
        """The job's result, or in words why there is none (see ``answer_to``)."""
        return answer_to(lambda: {"result": self._worker()(job), "node": socket.gethostname()})

    def _worker(self) -> Any:
        if self.worker is None:
            if self.version != __version__:
                raise UsageError(
                    f"a node has mechtransplant {__version__}, and the run {self.version}: install one on all nodes"
                )
            self.worker = self.recipe.make()
        return self.worker
