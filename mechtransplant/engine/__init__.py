"""Jobs that do not depend on each other, on one process or on several; results are the same.

A *worker* is a function from a job to a result, both JSON. It is made once in every process, by a :class:`Recipe`,
because what it needs (two models) is large. ``serial`` runs jobs where it is; ``processes`` in processes of its own;
``cluster`` in Ray's, on this machine or on many. A process may die without harm.
"""

from mechtransplant.engine.cluster import Ray
from mechtransplant.engine.jobs import Engine, Recipe, Worker, WorkerError
from mechtransplant.engine.processes import Processes
from mechtransplant.engine.serial import Serial

__all__ = ["Engine", "Processes", "Ray", "Recipe", "Serial", "Worker", "WorkerError"]
