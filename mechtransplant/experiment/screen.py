"""Recipes compared on ``choose`` alone: kinds of modules × rules × operators × strengths × shares of the parameters.

A recipe is the longest beginning of a ranking (made on ``discover``) that has no more than a share of all linear
layers' parameters, grafted at one strength by one operator. Each is measured by the mean log-probability of the gold
answers to the ``choose`` questions, and by what it does to the perplexity of neutral text. ``test`` is never asked: the
best recipe is written as the config of a run, which reports it there.

A folder holds ``config.yaml``, ``environment.json``, ``compatibility.csv``, ``rankings/``, ``cells.jsonl``,
``screen.csv`` (one row a recipe), ``best.yaml``, ``summary.md`` and ``figures/``; a killed start continues.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechtransplant.errors import UsageError
from mechtransplant.evaluation.batches import check_lengths, encode
from mechtransplant.evaluation.gold import accepted_ends, gold_outcomes
from mechtransplant.experiment.cells import CellStore, write_atomically
from mechtransplant.experiment.config import GraftedKind, on_device
from mechtransplant.experiment.drawing import draw
from mechtransplant.experiment.folder import begin, locked, write_compatibility
from mechtransplant.experiment.rankings import options_of_rule
from mechtransplant.experiment.screen_config import ScreenConfig
from mechtransplant.experiment.screen_page import page_of
from mechtransplant.experiment.setup import build_task, check_task, exploring_task, pair_of
from mechtransplant.grafting import Graft
from mechtransplant.progress import track
from mechtransplant.ranking import get_rule, plain_modules, rank_modules
from mechtransplant.side_effects import neutral_texts
from mechtransplant.side_effects.divergence import read_text, text_divergence

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Recipe:
    """A way to make a graft; ``share`` is the most of all linear layers' parameters that it may have."""

    kinds: tuple[GraftedKind, ...]
    rule: str
    operator: str | dict[str, Any]
    strength: float
    share: float


def report_screen(config: ScreenConfig, folder: str | Path, progress: bool = True, device: str | None = None) -> str:
    """Measure every recipe and draw; writes the folder and returns its page.

    ``device``: instead of the config's, for this start alone.

    Raises UsageError for anything wrong in the config, for a folder that holds something else, and for one that was
    begun with another config, other weights or other questions.
    """
    import pandas as pd

    folder = Path(folder)
    screen = Screen(on_device(config, device))
    with locked(folder):
        begin(folder, screen.began, compared=("settings", "weights", "questions"))
        write_compatibility(folder, screen.pair)
        table = screen.table(folder, progress)
        write_atomically(folder / "screen.csv", table.to_csv(index=False, float_format="%.8g"))
        table = pd.read_csv(folder / "screen.csv", keep_default_na=False, na_values=[""])
        best = best_recipe(table, config.perplexity)
        (folder / "best.yaml").unlink(missing_ok=True)
        if best is not None:
            write_atomically(folder / "best.yaml", run_config(config, table.loc[best]))
        draw(folder)
        page = page_of(config, screen.pair, len(screen.splits.choose), screen.base, table, best)
        write_atomically(folder / "summary.md", page)
    return page


class Screen:
    """The models, questions and texts of a screen."""

    def __init__(self, config: ScreenConfig) -> None:
        for rule in config.rules:
            known, options = get_rule(rule), config.rule_options.get(rule, {})
            for kinds in config.grafted:
                known.check(kinds, options)
            if known.sees(options)[0] != "discover" or known.takes("k", options):
                raise UsageError(
                    f"rule {rule!r} searches on `choose`, or learns for one K, and a screen compares on the same "
                    "questions: give rules that rank once on discover, and this one to a run"
                )
        for operator in config.operators:
            Graft([], operator=operator)
        self.config = config
        if config.threads:
            import torch

            torch.set_num_threads(config.threads)
        run = config.as_run(config.grafted[0], config.rules[0])
        check_task(run)
        self.pair = pair_of(run)
        self.task = build_task(run, self.pair)
        self.splits = self.task.split(**config.split.model_dump(), explore=exploring_task(run))
        self._check_questions()
        self.everything = Graft(self.pair.modules("linear")).parameter_count(self.pair)
        self._sizes: dict[tuple[str, ...], int] = {}
        self._changed: dict[tuple[str, str], int] = {}
        smallest = min(
            self._size([m], o) for kinds in config.grafted for m in self.pair.modules(kinds) for o in config.operators
        )
        if smallest > max(config.shares) * self.everything:
            raise UsageError(
                f"shares: the smallest module has {smallest / self.everything:.2g} of the parameters, more than "
                f"{max(config.shares):g}: give a larger share, or a finer kind"
            )

    def _check_questions(self) -> None:
        """What cannot be asked is refused before anything is written."""
        target = self.pair.target
        accepted_ends(target, self.task)
        rows = [encode(split, target.tokenizer) for split in (self.splits.discover, self.splits.choose)]
        longest = max(len(p) + len(c) for e in rows for p, c in zip(e.prompts, e.completions, strict=True))
        check_lengths(target.hf, max(longest, self.config.tokens + 1))

    @cached_property
    def began(self) -> dict[str, Any]:
        """What the numbers depend on."""
        asked = {
            s.role: {"n": len(s), "fingerprint": s.fingerprint} for s in (self.splits.discover, self.splits.choose)
        }
        config = json.loads(self.config.model_dump_json())
        weights = {"source": self.pair.source.fingerprint, "target": self.pair.target.fingerprint}
        if self.pair.base is not None:
            weights["base"] = self.pair.base.fingerprint
        # more recipes may join a folder, and another limit may choose among them
        settings = {key: config[key] for key in _DECIDES}
        return {"config": config, "settings": settings, "weights": weights, "questions": asked}

    @cached_property
    def base(self) -> dict[str, dict[str, float | None]]:
        """Accuracy and log-probability of target and source on ``choose``."""
        return {role: self._asked(getattr(self.pair, role)) for role in ("target", "source")}

    @cached_property
    def reading(self) -> Any:
        """The neutral texts, of another seed than a run's, which measures harm on its own."""
        texts = neutral_texts(self.pair.target, self.config.texts, self.config.tokens, self.config.seed + 1)
        return read_text(self.pair.target, texts, self.config.batch_size)

    def recipes(self) -> Iterator[Recipe]:
        """Every recipe, ranking by ranking."""
        config = self.config
        for kinds, rule in product(config.grafted, config.rules):
            for operator, strength, share in product(config.operators, config.strengths, config.shares):
                yield Recipe(kinds, rule, operator, strength, share)

    def table(self, folder: Path, progress: bool) -> pd.DataFrame:
        """One row a recipe; a ranking is kept in the folder, and a set at a strength is measured once."""
        import pandas as pd

        store = CellStore(folder / "cells.jsonl")
        rows = []
        for recipe in track(list(self.recipes()), "recipes", progress):
            order = self._ranking(recipe, folder / "rankings" / f"{'-'.join(recipe.kinds)}-{recipe.rule}.csv")
            modules = self._within(order, recipe.share, recipe.operator)
            operator = recipe.operator if isinstance(recipe.operator, str) else json.dumps(recipe.operator)
            row: dict[str, Any] = {
                "kind": "+".join(recipe.kinds), "rule": recipe.rule, "operator": operator,
                "strength": recipe.strength, "share": recipe.share, "k": len(modules),
            }  # fmt: skip
            row |= {f"{role}_log_probability": said["log_probability"] for role, said in self.base.items()}
            if modules:
                graft = Graft(modules, recipe.strength, kv=self.config.kv, operator=recipe.operator)
                # a set is the same cell whatever ranked it, and whatever else the config compares
                content = {key: self.began[key] for key in ("settings", "weights", "questions")}
                content |= {"modules": sorted(modules), "strength": recipe.strength, "operator": operator}
                found = store.get(content, partial(self._measured, graft))
                row |= {"parameters": self._size(modules, recipe.operator) / self.everything}
                row |= {key: found[key] for key in ("log_probability", "accuracy", "perplexity_change", "kl")}
            rows.append(row)
        return pd.DataFrame(rows, columns=COLUMNS)

    def _ranking(self, recipe: Recipe, path: Path) -> list[str]:
        import pandas as pd

        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            config = self.config
            given = config.rule_options.get(recipe.rule, {})
            # as a run ranks
            own = {"max_new_tokens": self.task.max_new_tokens, "kv": config.kv}
            options = options_of_rule(recipe.rule, given, config.batch_size, **own)
            ranked = rank_modules(
                self.pair, self.splits.discover, recipe.rule, recipe.kinds, seed=config.seed, **options
            )
            write_atomically(path, ranked.to_csv(index=False, float_format="%.17g"))
        return plain_modules(pd.read_csv(path), recipe.rule, "a screen")

    def _within(self, order: Sequence[str], share: float, operator: Any = "replace") -> list[str]:
        """The longest beginning of a ranking that has (or changes) at most a share of the parameters."""
        limit, low, high = share * self.everything, 0, len(order)
        # sizes grow with the set
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._size(order[:middle], operator) <= limit else (low, middle - 1)
        return list(order[:low])

    def _size(self, modules: Sequence[str], operator: Any = "replace") -> int:
        if self.config.counted == "changes" and operator != "replace":
            # module by module: counting changes computes them, and a set is one of many
            return sum(self._changes(module, json.dumps(operator)) for module in modules)
        names = tuple(sorted(modules))
        if names not in self._sizes:
            self._sizes[names] = Graft(names, kv=self.config.kv).parameter_count(self.pair)
        return self._sizes[names]

    def _changes(self, module: str, operator: str) -> int:
        """How many numbers of a module a graft carries at strength 1."""
        if (module, operator) not in self._changed:
            graft = Graft([module], kv=self.config.kv, operator=json.loads(operator))
            self._changed[module, operator] = graft.carried_count(self.pair)
        return self._changed[module, operator]

    def _asked(self, model: Any) -> dict[str, float | None]:
        choose = self.splits.choose
        found = gold_outcomes(model, choose, self.config.batch_size)
        # of a free-form answer the gold text is one of many that are right
        right = float(found.correct.mean()) if choose.short_answer else None
        return {"log_probability": float(found.log_probability.mean()), "accuracy": right}

    def _measured(self, graft: Graft) -> dict[str, float | None]:
        reading = self.reading if self.config.texts else None
        with graft.applied(self.pair):
            found = self._asked(self.pair.target)
        read = None if reading is None else text_divergence(self.pair, graft, reading)
        harm = (None, None) if read is None else (read.perplexity_change, read.mean_kl)
        return {**found, "perplexity_change": harm[0], "kl": harm[1]}


#: keys of the config that decide a ranking, or a set's values
_DECIDES = ("pair", "task", "split", "rule_options", "kv", "texts", "tokens", "batch_size", "dtype", "seed")
COLUMNS = [
    "kind", "rule", "operator", "strength", "share", "k", "parameters", "log_probability", "accuracy",
    "perplexity_change", "kl", "target_log_probability", "source_log_probability",
]  # fmt: skip


def best_recipe(table: pd.DataFrame, perplexity: float | None) -> int | None:
    """The row of the highest log-probability that raises perplexity by at most so much; None where there is none."""
    rows = table[table.log_probability.notna()]
    if perplexity is not None:
        rows = rows[rows.perplexity_change <= perplexity]
    return None if rows.empty else int(rows.index[int(rows.log_probability.argmax())])


def run_config(config: ScreenConfig, best: Any) -> str:
    """The best recipe as a run's config, in YAML."""
    import yaml

    operator = best.operator if best.operator[0] != "{" else json.loads(best.operator)
    kinds = tuple(best.kind.split("+"))
    run = config.as_run(kinds, best["rule"]).model_copy(
        update={"k": (int(best.k),), "strengths": (float(best.strength),), "operator": operator}
    )
    content = run.model_dump(mode="json", exclude_unset=True)
    said = f"# the best recipe of the screen {config.name} on `choose`; no `test` question was asked for it\n"
    return said + str(yaml.safe_dump(content, sort_keys=False))
