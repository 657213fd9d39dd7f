"""Heads against MLPs on one pair and task: grafts and ablations of heads, of MLPs and of both, as one folder.

Sets are the top of rankings on ``discover``, of each kind alone and of both together, at an equal number of modules and
at equal parameters, anywhere and in each third of the depth; every number is of ``test``. A folder holds
``config.yaml``, ``environment.json``, ``compatibility.csv``, ``rankings/``, ``cells.jsonl`` (one a model and set of
modules), ``study.csv``, ``summary.md`` and ``figures/``; a killed start continues.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from mechtransplant.errors import UnknownNameError, UsageError, check_count, check_seed
from mechtransplant.experiment.cells import CellStore, write_atomically
from mechtransplant.experiment.drawing import draw
from mechtransplant.experiment.folder import begin, locked, write_compatibility
from mechtransplant.experiment.heads_mlps_page import page_of
from mechtransplant.experiment.heads_mlps_sets import ARMS, Arm, sets_of
from mechtransplant.experiment.heads_mlps_study import Study
from mechtransplant.experiment.rankings import options_of_rule
from mechtransplant.grafting import KV, Graft
from mechtransplant.pair import Pair, load_pair
from mechtransplant.patching.ablation import Method
from mechtransplant.ranking import get_rule, plain_modules, rank_modules
from mechtransplant.tasks import Task, load_task

#: ablations that the study knows: a resampled one is another draw at every start
METHODS: tuple[Method, ...] = ("mean", "zero")


@dataclass(frozen=True)
class HeadsMlpsConfig:
    """What is compared: a pair, its task (by default the pair's own), the rule that ranks, and numbers of MLPs.

    ``methods``: ablations of the source, "mean" (of the ``discover`` prompts) or "zero". ``sets``: how many random sets
    every set is compared with. ``kv``: what a head's graft moves of K and V.
    """

    pair: str
    task: str | None = None
    rule: str = "integrated_gradient"
    counts: tuple[int, ...] = (1, 2, 4)
    methods: tuple[Method, ...] = ("mean",)
    sets: int = 20
    discover: int = 64
    test: int = 256
    batch_size: int = 64
    kv: KV = "never"
    seed: int = 0

    def check(self) -> None:
        """Raise UsageError for anything that can be seen to be wrong before weights are loaded."""
        check_seed(self.seed)
        for key in ("sets", "discover", "test", "batch_size"):
            check_count(key, getattr(self, key))
        if not self.counts:
            raise UsageError("give at least one count of MLPs, for example --counts 1,2")
        for count in self.counts:
            check_count("count", count)
        for method in self.methods:
            if method not in METHODS:
                raise UnknownNameError("ablation", method, METHODS)
        rule = get_rule(self.rule)
        rule.check(("head", "mlp"), {})
        if rule.splits[0] != "discover":
            raise UsageError(f"rule {self.rule!r} selects on {rule.splits[0]}; the study ranks on discover alone")
        if rule.refit is not None:
            raise UsageError(
                f"rule {self.rule!r} gives every module a strength of its own, and this study grafts all at one: name "
                "another rule"
            )
        Graft([], kv=self.kv)


def report_heads_and_mlps(config: HeadsMlpsConfig, folder: str | Path, progress: bool = True) -> str:
    """Measure and draw; writes the folder and returns its page.

    Raises UsageError for anything wrong in the config, for a folder that holds something else, and for one that was
    begun with another config, other weights or other questions.
    """
    import pandas as pd

    folder = Path(folder)
    config.check()
    pair = load_pair(config.pair)
    name = config.task or pair.default_task
    if name is None:
        raise UsageError(f"pair {config.pair!r} has no task of its own: give --task")
    # nothing is chosen: the smallest choose split, which nobody asks
    splits = load_task(name).split(config.discover, 1, config.test, config.seed)
    most = max(len(pair.modules("head")), len(pair.modules("mlp")))
    for count in config.counts:
        check_count("count", count, most=most)
    began = {
        "config": json.loads(json.dumps(asdict(config))),
        "weights": {"source": pair.source.fingerprint, "target": pair.target.fingerprint},
        "questions": {s.role: {"n": len(s), "fingerprint": s.fingerprint} for s in (splits.discover, splits.test)},
    }
    with locked(folder):
        begin(folder, began)
        write_compatibility(folder, pair)
        rankings = {
            arm: _ranking(config, pair, splits.discover, arm, folder / "rankings" / f"{arm}.csv", progress)
            for arm in ARMS
        }
        study = Study(config, pair, splits, CellStore(folder / "cells.jsonl"))
        sets, left_out = sets_of(pair, rankings, config.counts, config.kv)
        written = study.table(sets, progress).to_csv(index=False, float_format="%.8g")
        write_atomically(folder / "study.csv", written)
        # figures and page say what the file says
        table = pd.read_csv(folder / "study.csv")
        draw(folder)
        page = page_of(config, pair, study.base("target"), study.base("source"), table, left_out)
        write_atomically(folder / "summary.md", page)
    return page


def _ranking(config: HeadsMlpsConfig, pair: Pair, discover: Task, arm: Arm, path: Path, progress: bool) -> list[str]:
    """An arm's candidates ranked among themselves, best first; kept in the folder."""
    import pandas as pd

    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        options = options_of_rule(config.rule, {}, config.batch_size, kv=config.kv)
        ranked = rank_modules(pair, discover, config.rule, ARMS[arm], seed=config.seed, progress=progress, **options)
        plain_modules(ranked, config.rule, "this study")
        # 17 significant digits: the file gives back the very same numbers
        write_atomically(path, ranked.to_csv(index=False, float_format="%.17g"))
    return plain_modules(pd.read_csv(path), config.rule, "this study")
