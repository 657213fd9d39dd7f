"""The rankings of a run: one a rule, computed once and kept in the folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechtransplant.experiment.cells import CellStore, write_atomically
from mechtransplant.experiment.config import RunConfig
from mechtransplant.pair import Pair
from mechtransplant.ranking import get_rule, rank_modules
from mechtransplant.ranking.steps import keeping
from mechtransplant.selection import remembering
from mechtransplant.tasks import Splits
from mechtransplant.tasks.scorers import scoring_of

if TYPE_CHECKING:
    import pandas as pd


#: the steps of the search that is going on
STEPS = ".steps.jsonl"


def options_of_rule(rule: str, given: dict[str, Any], batch_size: int, **own: Any) -> dict[str, Any]:
    """What a rule is called with: of the experiment's own options those that it takes, and all that the user gave."""
    entry = get_rule(rule)
    # a backward pass keeps every layer's activations
    size = min(16, batch_size) if entry.needed(given) == "gradients" else batch_size
    return {key: v for key, v in {"batch_size": size, **own}.items() if entry.takes(key, given)} | given


def ranking_path(folder: Path, config: RunConfig, rule: str, k: int | None = None) -> Path:
    """Where a run keeps a rule's ranking: the headline's is ``ranking.csv``, and a rule that is learned for one K has
    one for each K below all."""
    if k is not None:
        return folder / "rankings" / f"{rule}-{k}.csv"
    return folder / ("ranking.csv" if rule == config.rules[0] else f"rankings/{rule}.csv")


def read_ranking(folder: Path, config: RunConfig, rule: str, k: int) -> pd.DataFrame:
    """All modules by a rule as a finished run has them for that K.

    Of a rule that is learned for one K, where the run has none for this K, as they are for the nearest.
    """
    import pandas as pd

    learned, plain = learned_rankings(folder, rule), ranking_path(folder, config, rule)
    if k in learned or (learned and not plain.exists()):
        return pd.read_csv(learned[min(learned, key=lambda size: (abs(size - k), size))])
    return pd.read_csv(plain)


def learned_rankings(folder: Path, rule: str) -> dict[int, Path]:
    """K → the ranking that a run has for it, of a rule that is learned for one K; {} of any other."""
    sizes = {path.stem.removeprefix(f"{rule}-"): path for path in (folder / "rankings").glob(f"{rule}-*.csv")}
    return {int(size): path for size, path in sizes.items() if size.isdigit()}


def strengths_in(frame: pd.DataFrame, k: int) -> tuple[float, ...]:
    """The strengths of a ranking's first K modules; () where it has none."""
    return tuple(map(float, frame.strength[:k])) if "strength" in frame else ()


def learned_by_k(config: RunConfig, rule: str) -> bool:
    """Whether a rule is learned for one K, which the config leaves to the run."""
    given = config.options_of(rule)
    return get_rule(rule).takes("k", given) and "k" not in given


class Rankings:
    """Rankings by rule, and by K for rules that are learned for one K."""

    def __init__(
        self,
        config: RunConfig,
        pair: Pair,
        splits: Splits,
        budget: int,
        folder: Path,
        progress: bool,
        fingerprints: dict[str, str],
        taken: Mapping[str, str] | None = None,
        before: Callable[[bool], None] = lambda taken: None,
    ) -> None:
        #: called before a ranking is written, with whether it is another run's
        self.before = before
        #: rankings of another run that would be these, by name
        self.taken = taken or {}
        self.fingerprints = fingerprints
        self.config, self.pair, self.splits, self.budget = config, pair, splits, budget
        self.folder, self.progress = folder, progress
        self.known: dict[Path, pd.DataFrame] = {}

    def of(self, rule: str) -> pd.DataFrame:
        """All modules by a rule; the headline's is ``ranking.csv``, the others' are in ``rankings/``."""
        path = ranking_path(self.folder, self.config, rule)
        return self._kept(path, lambda: self._rank(rule, self.splits))

    def by_k(self, rule: str) -> bool:
        """Whether the rule is learned for one K, and has another ranking for each."""
        return learned_by_k(self.config, rule)

    def frame(self, rule: str, k: int) -> pd.DataFrame:
        """All modules by a rule, as it is for that K."""
        told = self._told(rule, k)
        if told:
            path = ranking_path(self.folder, self.config, rule, k)
            return self._kept(path, lambda: self._rank(rule, self.splits, **told))
        return self.of(rule)

    def _told(self, rule: str, k: int) -> dict[str, int]:
        """The K that a rule is told: all candidates need no search, but strengths that are fitted to them."""
        some = k < len(self.pair.modules(self.config.kinds)) or get_rule(rule).refit is not None
        return {"k": k} if some and self.by_k(rule) else {}

    def top(self, rule: str, k: int) -> tuple[str, ...]:
        """The K modules to graft."""
        return tuple(self.frame(rule, k).module[:k])

    def strengths(self, rule: str, k: int) -> tuple[float, ...]:
        """The strengths of those modules, in their order; () of a rule that fits none."""
        return strengths_in(self.frame(rule, k), k)

    def refitted(self, rule: str, k: int, number: int, modules: tuple[str, ...]) -> tuple[float, ...]:
        """Strengths of a random set, fitted as the rule fits its own: on the same questions, in as many steps."""
        path = self.folder / f"rankings/{rule}-{k}-set-{number}.csv"
        refit, seed, task = get_rule(rule).refit, self.config.seed, self.splits.discover
        given = {"batch_size": min(16, self.config.batch_size), **self.config.options_of(rule)}
        assert refit is not None, "checked before the run"

        def fitted() -> pd.DataFrame:
            named = {"rule": rule, "modules": list(modules), "task": task.fingerprint, "seed": seed, **given}
            with self._keeping(named | self.fingerprints):
                found = refit(self.pair, task, modules, seed, **given)
            return found.rename_axis("module").reset_index()

        return strengths_in(self._kept(path, fitted), k)

    def unrelated(self, rule: str, splits: Splits, k: int) -> pd.DataFrame:
        """All modules by a rule on another task, as it is for that K."""
        more = self._told(rule, k)
        name = f"{rule}-{k}-unrelated" if more else f"{rule}-unrelated"
        return self._kept(self.folder / f"rankings/{name}.csv", lambda: self._rank(rule, splits, **more))

    def _rank(self, rule: str, splits: Splits, **more: Any) -> pd.DataFrame:
        entry, config = get_rule(rule), self.config
        given = config.options_of(rule)
        own = {"max_new_tokens": self.budget, "kv": config.kv}
        options = options_of_rule(rule, given, config.batch_size, **own) | more
        task = splits.choose if entry.sees(given)[0] == "choose" else splits.discover
        named = {"rule": rule, "kinds": list(config.kinds), "seed": config.seed, "task": task.fingerprint, **options}
        with self._keeping(named | scoring_of(task.scorer) | self.fingerprints):
            return rank_modules(
                self.pair, task, rule, config.kinds, seed=config.seed, progress=self.progress, **options
            )

    def _keeping(self, named: dict[str, Any]) -> AbstractContextManager[None]:
        """A block in which the steps of a search are kept in the folder."""
        steps = CellStore(self.folder / STEPS)

        def keep(what: dict[str, Any], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
            return steps.get({**named, "dtype": self.config.dtype, **what}, compute)

        return keeping(keep)

    def _kept(self, path: Path, compute: Callable[[], pd.DataFrame]) -> pd.DataFrame:
        import pandas as pd

        if path not in self.known:
            if not path.exists():
                path.parent.mkdir(exist_ok=True)
                known = self.taken.get(str(path.relative_to(self.folder)))
                # 17 significant digits: the file gives back the very same numbers
                text = known or compute().to_csv(index=False, float_format="%.17g")
                self.before(known is not None)
                write_atomically(path, text)
                # a search that was ended goes on from them; the ranking has all that they led to
                (self.folder / STEPS).unlink(missing_ok=True)
            frame = pd.read_csv(path)
            # a file forgets what selected: a run ranks on discover, or searches on choose, and picks K on choose
            seen = [*self.splits.discover.keys, *self.splits.choose.keys]
            self.known[path] = frame.assign(module=remembering(frame.module, seen))
        return self.known[path]
