"""A Ray cluster of two nodes on this machine: both work, and the loss of one in the middle loses no job."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mechtransplant.engine import Ray, Recipe

ray = pytest.importorskip("ray", reason="Ray is not installed (pip install 'mechtransplant[ray]')")


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    quiet: dict[str, Any] = {"num_cpus": 1, "include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args=quiet)
    yield made
    ray.shutdown()
    made.shutdown()


def test_a_node_that_is_lost_loses_no_job(nodes: Any) -> None:
    other = nodes.add_node(num_cpus=1)
    nodes.wait_for_nodes()
    engine = Ray(Recipe("toy_workers:make"), 2, address=nodes.address)
    jobs = [{"number": n, "what": "sleep", "seconds": 0.5, "node": True} for n in range(40)]
    found: dict[int, list[dict[str, Any]]] = {}
    left: set[str] = set()

    def take(at: int, result: dict[str, Any]) -> None:
        found.setdefault(at, []).append(result)
        if not left and len({r["node"] for rows in found.values() for r in rows}) == 2:
            # both have done a job: now one is lost, in the middle of another
            left.add(other.node_id)
            nodes.remove_node(other, allow_graceful=False)

    engine.run(jobs, take)
    engine.close()
    assert left, "one node did everything"
    assert {at: [r["value"] for r in rows] for at, rows in found.items()} == {n: [n**2] for n in range(40)}
    assert len({r["pid"] for rows in found.values() for r in rows}) >= 2
