"""A worker's process: a recipe, then jobs, one JSON line each on the standard input; results on the standard output.

Started by ``processes``. It ends when its input does, in the middle of a job as well, so that no worker outlives the
process that asked for it.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from typing import Any

from mechtransplant.engine.jobs import Recipe, Worker, answer_to


def main() -> None:
    """Make the worker, say so, and do jobs until there are no more."""
    # what anything prints must not come between the results
    results = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def say(answer: dict[str, Any]) -> None:
        results.write(json.dumps(answer) + "\n")
        results.flush()

    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def listen() -> None:
        for line in sys.stdin:
            lines.put(line)
        # nobody is left who wants the result of what is being done
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    made: list[Worker] = []

    def answer() -> dict[str, Any]:
        said = json.loads(lines.get())
        if made:
            return {"result": made[0](said)}
        made.append(Recipe(**said).make())
        return {"ready": os.getpid()}

    while True:
        say(answer_to(answer))


if __name__ == "__main__":
    main()
