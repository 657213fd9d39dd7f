"""The planted benchmark as a folder that a killed start continues: table, summary, page and figure.

A folder holds ``config.yaml``, ``environment.json``, ``cells.jsonl`` (one cell a pair, rule and seed), ``results.csv``,
``summary.csv``, ``summary.md`` and ``figures/``.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechtransplant.errors import UnknownNameError, UsageError, check_count
from mechtransplant.experiment.cells import CellStore, cell_key, write_atomically
from mechtransplant.experiment.config import read_mapping
from mechtransplant.experiment.drawing import draw
from mechtransplant.experiment.folder import check_ours, locked, write_starts
from mechtransplant.experiment.planted import (
    Problem,
    check_names,
    default_rules,
    is_drifted,
    planted_pairs,
    splits_of,
    summary_of,
)
from mechtransplant.pair import load_pair
from mechtransplant.progress import track
from mechtransplant.ranking import get_rule

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class PlantedConfig:
    """What is measured; see :func:`bench_planted`.

    ``single``: rules that get one seed only (they are expensive), after all others. ``overrides``: beginning of a
    pair's name → other values for it of ``seeds``, ``discover``, ``choose``, ``test``, ``batch_size``, ``options``,
    ``single``.
    """

    pairs: tuple[str, ...] = ()
    rules: tuple[str, ...] = ()
    seeds: int = 3
    discover: int = 64
    choose: int = 64
    test: int = 128
    batch_size: int = 64
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    single: tuple[str, ...] = ()
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)

    def of(self, pair: str) -> PlantedConfig:
        """The config with what is overridden for a pair."""
        changed = self
        for prefix, values in self.overrides.items():
            if pair.startswith(prefix):
                given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
                changed = replace(changed, **given)
        return changed


def read_planted_config(path: str | Path) -> PlantedConfig:
    """The configuration in a YAML file; raises UsageError naming the first wrong key."""
    path = Path(path)
    content = read_mapping(path)
    _check_types(content, str(path))
    for prefix, values in content.get("overrides", {}).items():
        _check_types(values, f"{path}: overrides.{prefix}")
    given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in content.items()}
    return PlantedConfig(**given)


def _check_types(content: dict[str, Any], where: str) -> None:
    """Refuse an unknown key, and a value of another type than the default's."""
    known = {f.name: getattr(PlantedConfig(), f.name) for f in fields(PlantedConfig)}
    for key, value in content.items():
        if key not in known:
            raise UnknownNameError(f"key of {where}", key, known)
        if isinstance(known[key], tuple):
            what, right = "a list of names", isinstance(value, list) and all(isinstance(v, str) for v in value)
        elif isinstance(known[key], dict):
            what = "a mapping from name to a mapping"
            right = isinstance(value, dict) and all(isinstance(v, dict) for v in value.values())
        else:
            what, right = "a whole number", isinstance(value, int) and not isinstance(value, bool)
        if not right:
            raise UsageError(f"{where}: {key}: expected {what}, got {str(value)[:60]!r}; fix this key")


#: what may differ between pairs
_OVERRIDABLE = ("seeds", "discover", "choose", "test", "batch_size", "options", "single")


def load_plugin(path: str | Path) -> list[str]:
    """Run a Python file that registers rules, and return their names; raises UsageError for one that registers none."""
    import runpy

    from mechtransplant.ranking import RULES

    path = Path(path)
    if not path.is_file():
        raise UsageError(f"no file at {path}: give a Python file that calls register_rule")
    before = set(RULES)
    try:
        runpy.run_path(str(path), run_name="mechtransplant_plugin")
    except Exception as error:
        raise UsageError(f"{path} cannot be run ({type(error).__name__}: {error}): fix it") from error
    found = [name for name in RULES if name not in before]
    if not found:
        raise UsageError(f"{path} registers no rule: call mechtransplant.register_rule in it")
    return found


def report_planted(
    config: PlantedConfig, folder: str | Path, progress: bool = True, *, finished_only: bool = False
) -> str:
    """Measure and draw; writes the folder and returns its page.

    ``finished_only`` computes nothing and reports what is there. A folder may be continued with more pairs and rules
    (see :func:`continued`): what it holds is not computed again. Raises UsageError for unknown names, for a folder that
    holds something else, and for one that was measured otherwise.
    """
    folder = Path(folder)
    config = continued(folder, asdict(config))
    pairs, rules = list(config.pairs or planted_pairs()), list(config.rules or default_rules())
    for values in config.overrides.values():
        for key in values:
            if key not in _OVERRIDABLE:
                raise UnknownNameError("override", key, _OVERRIDABLE)
    for name in ("", *pairs):
        mine = config.of(name)
        for key in ("seeds", "discover", "choose", "test", "batch_size"):
            check_count(key, getattr(mine, key))
        check_names([name] * bool(name), rules, {r: o for r, o in mine.options.items() if r in rules})
        for rule in (*mine.options, *mine.single):
            get_rule(rule)
    with locked(folder):
        _begin(folder, config)
        rows = _measure(config, pairs, rules, CellStore(folder / "cells.jsonl"), progress, finished_only)
        if rows.empty:
            raise UsageError(f"{folder} holds no finished cell of this config: run it without --finished-only")
        return _write(folder, rows)


def continued(folder: Path, given: Mapping[str, Any]) -> PlantedConfig:
    """The config of a folder, with more pairs and rules where some are given; what is given alone where it is new.

    Raises UsageError for anything else that is given and differs: rows that were measured otherwise are no comparison.
    """
    new = PlantedConfig(**given)
    if not (folder / "config.yaml").is_file():
        return new
    check_ours(folder, "benchmark", what=WHAT)
    with_lists = read_planted_config(folder / "config.yaml")
    held = PlantedConfig(**{f.name: _plain(getattr(with_lists, f.name)) for f in fields(PlantedConfig)})
    added: dict[str, Any] = {}
    for key in given:
        mine, theirs = _plain(getattr(held, key)), _plain(getattr(new, key))
        if key in ("pairs", "rules", "single"):
            # of pairs and rules nothing named means all
            every = key != "single" and not (mine and theirs)
            added[key] = () if every else tuple(dict.fromkeys([*mine, *theirs]))
        elif key == "options" and theirs and set(theirs) <= set(new.rules) - set(held.rules):
            # of rules that join with them
            added[key] = {**mine, **theirs}
        elif mine != theirs:
            raise UsageError(
                f"{folder} was measured with {key} = {mine!r}, not {theirs!r}, and rows of both are no comparison: "
                "choose another --out folder, or leave that option out"
            )
    return replace(held, **added)


def _plain(value: Any) -> Any:
    """As a config file gives it back: tuples inside are lists there."""
    return tuple(value) if isinstance(value, list | tuple) else json.loads(json.dumps(value))


#: what a folder of this benchmark says it is
WHAT = "planted benchmark"


def _begin(folder: Path, config: PlantedConfig) -> None:
    import yaml

    check_ours(folder, "benchmark", what=WHAT)
    write_starts(folder, {"what": WHAT}, compared=())
    write_atomically(folder / "config.yaml", str(yaml.safe_dump(json.loads(json.dumps(asdict(config))))))


def _measure(
    config: PlantedConfig, pairs: list[str], rules: list[str], store: CellStore, progress: bool, finished_only: bool
) -> pd.DataFrame:
    """Every pair, seed and rule, from the cells where they are there."""
    import pandas as pd

    rows = []
    # every pair at the first seed, then the next, and expensive rules last: a run that is cut short has compared most
    jobs = [
        (name, seed, rule)
        for expensive in (False, True)
        for seed in range(max(config.of(name).seeds for name in pairs))
        for name in pairs
        if seed < (1 if expensive else config.of(name).seeds)
        for rule in rules
        if (rule in config.of(name).single) == expensive
    ]
    pair, problem, problem_seed = None, None, 0
    for name, seed, rule in track(jobs, "planted pairs", progress):
        if pair is None or pair.name != name:
            pair, problem = load_pair(name), None
        mine = config.of(name)
        if problem is None or problem.pair is not pair or problem_seed != seed:
            problem, problem_seed = Problem(pair, _splits(mine, pair, seed), mine.batch_size), seed
            prints = {"source": pair.source.fingerprint, "target": pair.target.fingerprint}
            prints |= {s.role: s.fingerprint for s in problem.splits}
        options = mine.options.get(rule, {})
        content = {**prints, "rule": rule, "seed": seed, "options": options, "batch_size": mine.batch_size}
        content |= {"planted": list(pair.planted), **_code_of(rule)}
        if finished_only and cell_key(content) not in store.cells:
            continue
        found = store.get(content, lambda p=problem, r=rule, s=seed, o=options: p.measure(r, s, o))  # type: ignore[misc]
        rows.append({"pair": name, "drifted": is_drifted(name), **{k: v for k, v in found.items() if k != "key"}})
    return pd.DataFrame(rows)


def _code_of(rule: str) -> dict[str, str]:
    """The text of a rule that is not the package's own: an edited rule is another rule."""
    import inspect

    function = get_rule(rule).score
    if function.__module__.startswith("mechtransplant."):
        return {}
    try:
        return {"code": hashlib.sha256(inspect.getsource(function).encode()).hexdigest()[:16]}
    except (OSError, TypeError):
        # a rule that was typed in has no text to read: computed anew with each process
        return {"code": f"{id(function)} {time.time()}"}


def _splits(config: PlantedConfig, pair: Any, seed: int) -> Any:
    return splits_of(pair, config.discover, config.choose, config.test, seed)


def _write(folder: Path, rows: pd.DataFrame) -> str:
    flat = rows.assign(top=[" ".join(t) for t in rows.top])
    write_atomically(folder / "results.csv", flat.to_csv(index=False, float_format="%.6g"))
    summary = summary_of(rows)
    write_atomically(folder / "summary.csv", summary.to_csv(index=False, float_format="%.6g"))
    draw(folder)
    page = planted_page(rows, summary)
    write_atomically(folder / "summary.md", page)
    return page


def planted_page(rows: pd.DataFrame, summary: pd.DataFrame) -> str:
    """The page, in Markdown: rules by mean AUROC on drifted pairs, then every pair."""
    import pandas as pd

    pairs = list(dict.fromkeys(rows.pair))
    drifted = [p for p in pairs if is_drifted(p)]
    lines = [
        "# The planted benchmark",
        "",
        f"{len(pairs)} pair{'s' * (len(pairs) != 1)} whose planted modules are known ({len(drifted)} drifted: every "
        "module differs). "
        "Candidates are all heads and MLPs, ranked together. AUROC: the probability that a planted module ranks above "
        "another; AP: average precision; P@K and Recovery: the share of planted modules among the K highest, and what "
        "grafting those K recovers of the gap on questions that ranked nothing, K being the number planted; "
        "stability: Jaccard index of the K highest between seeds. Means over pairs of means over seeds.",
        "",
        "| rule | needs | drifted pairs | AUROC, drifted | worst pair | AP | P@K | Recovery, % | AUROC, clean | "
        "Recovery, % | stability | seeds | s |",
        "|" + "---|" * 13,
    ]

    def shown(value: Any, digits: int = 3) -> str:
        return "–" if value is None or pd.isna(value) else f"{round(value, digits) + 0.0:.{digits}f}"

    for row in summary.to_dict("records"):
        cells = [f"`{row['rule']}`", row["needs"], str(row["drifted_pairs"])]
        cells += [shown(row.get(f"drifted_{n}")) for n in ("auroc", "worst", "average_precision", "precision")]
        cells += [
            shown(row.get("drifted_recovery"), 0),
            shown(row.get("clean_auroc")),
            shown(row.get("clean_recovery"), 0),
        ]
        cells += [shown(row["stability"], 2), str(row["seeds"]), shown(row["seconds"], 1)]
        lines.append(f"| {' | '.join(cells)} |")
    withheld = int(rows.recovery.isna().sum())
    asked = summary.drifted_pairs.max()
    if (summary.drifted_pairs < asked).any():
        fewer = ", ".join(f"`{r}`" for r in summary[summary.drifted_pairs < asked].rule)
        lines += ["", f"Not measured on every pair yet, and no fair comparison with the others: {fewer}."]
    lines += ["", f"Recovery is withheld in {withheld} of {len(rows)} rows.", ""] if withheld else [""]
    lines += ["## AUROC, pair by pair (mean over seeds)", ""]
    lines += [f"| rule | {' | '.join(pairs)} |", "|" + "---|" * (len(pairs) + 1)]
    means = rows.groupby(["rule", "pair"]).auroc.mean()
    for rule in summary.rule:
        lines.append(f"| `{rule}` | {' | '.join(shown(means.get((rule, p))) for p in pairs)} |")
    lines += [
        "",
        'Your own rule: register it in a file (`@mechtransplant.register_rule("mine")`), then '
        "`mechtransplant bench planted --plugin FILE --out FOLDER`, FOLDER being a copy of this one: its rows stay, "
        "and only what is missing is computed.",
    ]
    return "\n".join(lines) + "\n"
