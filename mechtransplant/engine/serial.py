"""One job after another, in this process."""

from __future__ import annotations

from collections.abc import Sequence

from mechtransplant.engine.jobs import Done, Job, Worker


class Serial:
    """The engine that needs no other process."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker

    def run(self, jobs: Sequence[Job], done: Done) -> None:
        """Do the jobs in their order."""
        for number, job in enumerate(jobs):
            done(number, self.worker(job))

    def close(self) -> None:
        """Nothing is held."""
