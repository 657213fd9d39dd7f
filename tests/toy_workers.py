"""Workers for tests of engines: they square, sleep, print, fail, and die."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from mechtransplant.errors import UsageError


def make(power: int = 2) -> Any:
    def work(job: dict[str, Any]) -> dict[str, Any]:
        what = job.get("what")
        if what == "both":
            what = "error once" if Path(job["marks"][0]).exists() else "die"
            job = {**job, "mark": job["marks"][what == "error once"]}
        if what == "print":
            print("noise on the standard output")
        if what == "sleep":
            time.sleep(job["seconds"])
        if what == "usage":
            raise UsageError("the job is wrong: make another")
        if what == "error":
            raise ZeroDivisionError("in the worker")
        if what == "error once":
            mark = Path(job["mark"])
            if not mark.exists():
                mark.write_text(str(os.getpid()))
                raise MemoryError("nothing is left here")
        if what == "die":
            # once: the file says that it has been here
            mark = Path(job["mark"])
            if job.get("always") or not mark.exists():
                mark.write_text("x")
                os.kill(os.getpid(), signal.SIGKILL)
        if job.get("node"):
            import ray

            return {
                "value": job["number"] ** power,
                "pid": os.getpid(),
                "node": ray.get_runtime_context().get_node_id(),
            }
        return {"value": job["number"] ** power, "pid": os.getpid(), "threads": os.environ.get("OMP_NUM_THREADS")}

    return work


def refuse() -> Any:
    raise UsageError("no worker can be made here")


def full_once(mark: str) -> Any:
    if not Path(mark).exists():
        Path(mark).write_text(str(os.getpid()))
        raise MemoryError("too large")
    return make(1)


def adding(factor: int, shipped: Any) -> Any:
    return lambda job: {"value": int(factor * shipped.sum() + job["number"])}
