"""Jobs in processes of their own on this machine; one that dies, or fails, is replaced, and its job done again."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from mechtransplant.engine.jobs import ATTEMPTS, TRIES, Done, Job, Recipe, Try, WorkerError, again, checked, died
from mechtransplant.errors import check_count


class Processes:
    """``workers`` processes, each with a worker that the recipe makes; started when there are jobs for them.

    Args:
        threads: of each process (so many that all cores are used once). Results can depend on it in their last bits:
            with the same number they are those of a serial run to the bit.
    """

    def __init__(self, recipe: Recipe, workers: int, threads: int | None = None) -> None:
        check_count("workers", workers)
        self.recipe, self.workers = recipe, workers
        self.threads = max(1, (os.cpu_count() or 1) // workers) if threads is None else threads
        check_count("threads", self.threads)
        #: all that were started, and those that have no job
        self._started: list[_Process] = []
        self._idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()

    def run(self, jobs: Sequence[Job], done: Done) -> None:
        """Do the jobs, the first ones first; raises UsageError and WorkerError for a job's own errors."""
        waiting: queue.SimpleQueue[Try] = queue.SimpleQueue()
        for number in range(len(jobs)):
            waiting.put(Try(number))
        answers: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        stop = threading.Event()
        threads = [
            threading.Thread(target=self._serve, args=(jobs, waiting, answers, stop), daemon=True)
            for _ in range(min(self.workers, len(jobs)))
        ]
        for thread in threads:
            thread.start()
        try:
            left = len(jobs)
            while left:
                number, answer = answers.get()
                if isinstance(answer, _Again):
                    warnings.warn(again(answer.error), stacklevel=2)
                    continue
                left -= 1
                if isinstance(answer, BaseException):
                    raise answer
                done(number, answer)
        except BaseException:
            stop.set()
            # nobody waits for the answer of a process that is in the middle of a job
            self.close()
            raise
        finally:
            for thread in threads:
                thread.join()
            if stop.is_set():
                # what was being started meanwhile
                self.close()

    def close(self) -> None:
        """End the processes."""
        self._idle = queue.SimpleQueue()
        while self._started:
            self._started.pop().end()

    def _serve(
        self,
        jobs: Sequence[Job],
        waiting: queue.SimpleQueue[Try],
        answers: queue.SimpleQueue[tuple[int, Any]],
        stop: threading.Event,
    ) -> None:
        """One process's thread: jobs until there are none, or one has failed."""
        process: _Process | None = None
        while not stop.is_set():
            try:
                this = waiting.get_nowait()
            except queue.Empty:
                break
            try:
                if process is None:
                    process = self._idle_one() or self._start()
                    if stop.is_set():
                        process.end()
                        break
                answers.put((this.number, process.do(jobs[this.number])))
            except EOFError as end:
                process = None
                if this.deaths + 1 < TRIES:
                    waiting.put(replace(this, deaths=this.deaths + 1))
                else:
                    answers.put((this.number, died(TRIES, end)))
            except WorkerError as error:
                if this.failures + 1 >= ATTEMPTS:
                    answers.put((this.number, error))
                    break
                # memory or a device may be spent there: another process takes the job up
                answers.put((this.number, _Again(error)))
                if process is not None:
                    process.end()
                process = None
                waiting.put(replace(this, failures=this.failures + 1))
            except Exception as error:
                answers.put((this.number, error))
                break
        if process is not None and not stop.is_set():
            self._idle.put(process)

    def _idle_one(self) -> _Process | None:
        try:
            return self._idle.get_nowait()
        except queue.Empty:
            return None

    def _start(self) -> _Process:
        process = _Process(self.threads)
        self._started.append(process)
        try:
            process.ask({"function": self.recipe.function, "arguments": self.recipe.arguments})
        except BaseException:
            # what it has loaded so far would stay beside that of the next
            process.end()
            raise
        return process


@dataclass(frozen=True)
class _Again:
    """Says that a job has failed and is tried again."""

    error: WorkerError


class _Process:
    """One worker's process."""

    def __init__(self, threads: int) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mechtransplant.engine.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env=environment,
            # an interrupt from the keyboard reaches a whole group: the process that asks decides what becomes of it
            start_new_session=True,
        )

    def do(self, job: Job) -> dict[str, Any]:
        """A job's result; raises EOFError where the process has died."""
        result: dict[str, Any] = self.ask(job)["result"]
        return result

    def ask(self, what: dict[str, Any]) -> dict[str, Any]:
        """Send a line, and wait for the answer; raises what the worker raised, and EOFError where it has died."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(what) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except (BrokenPipeError, ValueError) as error:
            raise EOFError(f"exit code {self.process.wait()}") from error
        if not line.endswith("\n"):
            raise EOFError(f"exit code {self.process.wait()}")
        return checked(json.loads(line))

    def end(self) -> None:
        """End it, whatever it is doing."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                # what a process that died has not read is of no use to anyone
                with suppress(OSError):
                    pipe.close()
