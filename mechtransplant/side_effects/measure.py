"""Side effects of a graft: accuracy on other tasks, perplexity and KL on neutral text, before and after, paired."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from mechtransplant.errors import UsageError, check_count, check_seed
from mechtransplant.evaluation import Evaluation, Outcome, evaluate
from mechtransplant.evaluation.outcome import check_questions
from mechtransplant.grafting import ConditionalGraft, Gate, Graft
from mechtransplant.progress import track
from mechtransplant.selection import selected_by
from mechtransplant.side_effects.divergence import (
    LONGEST,
    Divergence,
    Reading,
    check_untouched,
    read_text,
    text_divergence,
)
from mechtransplant.side_effects.neutral import NeutralText, load_texts, neutral_texts
from mechtransplant.significance import (
    bootstrap_indices,
    mcnemar_exact,
    paired_difference_interval,
    percentile_interval,
)
from mechtransplant.tasks import Task, list_tasks, load_task

if TYPE_CHECKING:
    import pandas as pd

    from mechtransplant.pair import LanguageModel, Pair

Interval = tuple[float, float]
Text = NeutralText | str | Path | Literal[False] | None

RESAMPLES = 10_000
#: below so many questions an interval says little, and below so many texts bootstrap percentiles are too narrow
SMALL = 50


@dataclass(frozen=True)
class Baseline:
    """What the target does without a graft, to be measured once for many grafts (see :func:`side_effect_baseline`)."""

    #: of the target's weights: a baseline of another model, or of a grafted one, is refused
    fingerprint: str
    tasks: tuple[Task, ...]
    evaluations: dict[str, Evaluation]
    text: NeutralText | None
    reading: Reading | None
    batch_size: int


@dataclass(frozen=True)
class SideEffects:
    """What a graft did elsewhere.

    ``frame`` has one row a task, and two for neutral text (perplexity, KL): ``what, kind`` ("task", "text"), ``n``
    (questions or texts), ``before, after, change, low, high`` (95 % interval of the change: Tango's for a task,
    bootstrap percentiles over texts for text), ``p_value`` (exact McNemar's), ``gained, lost`` (flipped questions),
    ``unit``. A task's change is after − before as a share, negative where the graft harms; perplexity's is
    after/before − 1; KL's is KL(target || grafted) in nats a token; both of these are harmful where they are positive.
    ``evaluations`` are (before, after) by task, ``divergence`` the text's sums (None without text), and ``notes`` say
    what a number cannot show.
    """

    frame: pd.DataFrame
    evaluations: dict[str, tuple[Evaluation, Evaluation]]
    divergence: Divergence | None
    text: NeutralText | None
    notes: tuple[str, ...]
    graft: str = ""

    @property
    def perplexity_change(self) -> float | None:
        """Perplexity after over before, minus 1; None without text."""
        return None if self.divergence is None else self.divergence.perplexity_change

    @property
    def kl(self) -> float | None:
        """KL(target || grafted), nats a token; None without text."""
        return None if self.divergence is None else self.divergence.mean_kl

    @property
    def worst(self) -> pd.Series:
        """The row of the task that lost most accuracy (or gained least); perplexity's where no task was measured."""
        losses = self.frame.change.where(self.frame.kind == "task")
        return self.frame.iloc[int(losses.argmin()) if losses.notna().any() else 0]

    @property
    def mean_change(self) -> float | None:
        """Mean change of accuracy over the tasks, each counted once; None without tasks."""
        rows = self.frame[self.frame.kind == "task"]
        return None if rows.empty else float(rows.change.mean())

    @property
    def mean_interval(self) -> Interval | None:
        """95 % interval of ``mean_change`` from the tasks' own intervals, whose questions are different ones.

        mean ± √(Σ (estimate − end)²) / tasks (MOVER, Zou and Donner 2008): the tasks are fixed, questions are not.
        """
        rows = self.frame[self.frame.kind == "task"]
        if rows.empty:
            return None
        below, above = (float(np.sqrt(((rows.change - rows[end]) ** 2).sum())) / len(rows) for end in ("low", "high"))
        return float(rows.change.mean()) - below, float(rows.change.mean()) + above

    def against(self, outcome: Outcome, **labels: Any) -> dict[str, Any]:
        """A row for :func:`pareto_front` and :func:`~mechtransplant.figures.gain_against_harm`.

        ``gain``, ``gain_low``, ``gain_high``: the outcome's difference in accuracy; ``harm``, ``harm_low``,
        ``harm_high``: minus ``mean_change``; ``perplexity_change`` and ``kl`` with their ends where text was read; and
        the labels as they are given. Raises UsageError where no task was measured.
        """
        change, interval = self.mean_change, self.mean_interval
        if change is None or interval is None:
            raise UsageError("these side effects have no task: measure some with tasks=")
        if not isinstance(outcome, Outcome):
            raise UsageError(f"the gain is an outcome (see compare), got {type(outcome).__name__}")
        row: dict[str, Any] = {
            "gain": outcome.difference,
            "gain_low": outcome.interval[0],
            "gain_high": outcome.interval[1],
        }
        # 0.0 −: no harm is 0, not −0
        row |= {"harm": 0.0 - change, "harm_low": 0.0 - interval[1], "harm_high": 0.0 - interval[0]}
        for read in self.frame[self.frame.kind == "text"].itertuples():
            name = "kl" if read.what == "KL" else "perplexity_change"
            row |= {name: read.change, f"{name}_low": read.low, f"{name}_high": read.high}
        return {**row, **labels}

    def card(self) -> dict[str, dict[str, str]]:
        """The table that a model card shows: ``export_graft(…, side_effects=effects.card())``."""
        said = {}
        for row in self.frame.itertuples():
            before, after = (_plain(value, row.what) for value in (row.before, row.after))
            change = _change(row)
            if row.kind == "task":
                change += f"; {row.gained} gained, {row.lost} lost"
            said[str(row.what)] = {"target": before, "this model": after, "change [95 %]": change, "n": str(row.n)}
        return said

    def __str__(self) -> str:
        lines = [f"{self.graft or 'graft'}, elsewhere:"]
        width = max(len(what) for what in self.frame.what)
        for row in self.frame.itertuples():
            before, after = (_plain(value, row.what) for value in (row.before, row.after))
            unit = "texts" if row.kind == "text" else "questions"
            said = _change(row) if row.what == "KL" else f"{before} → {after}, {_change(row)}"
            if row.kind == "task":
                said += f", {row.gained} gained, {row.lost} lost, McNemar p = {row.p_value:.2g}"
            lines.append(f"  {row.what:{width}}  {said} ({row.n} {unit})")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def side_effect_baseline(
    pair: Pair,
    *,
    tasks: Iterable[str | Task] | str | Task | None = None,
    text: Text = None,
    n: int = 256,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = False,
) -> Baseline:
    """The target without a graft, on other tasks and neutral text: give it as ``before=`` for many grafts.

    Arguments and errors: see :func:`measure_side_effects`.
    """
    check_untouched(pair)
    check_count("batch_size", batch_size)
    chosen = _tasks_of(pair, tasks, n, seed)
    neutral = _text_of(pair.target, text, seed, batch_size)
    if not chosen and neutral is None:
        raise UsageError("nothing to measure: give tasks, or leave text to be sampled")
    evaluations = _evaluate(pair.target, chosen, batch_size, "before", progress)
    reading = None if neutral is None else read_text(pair.target, neutral, batch_size)
    return Baseline(pair.target.fingerprint, chosen, evaluations, neutral, reading, batch_size)


def measure_side_effects(
    pair: Pair,
    graft: Graft | ConditionalGraft,
    *,
    tasks: Iterable[str | Task] | str | Task | None = None,
    text: Text = None,
    n: int = 256,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = False,
    before: Baseline | None = None,
) -> SideEffects:
    """What a graft does to other tasks and to neutral text; every comparison on the same questions and texts.

    Args:
        tasks: names, of which the test split (``n`` questions) is asked, paths of JSONL files, or tasks (whole or a
            test split); by default ``pair.tasks`` without the pair's own.
        text: neutral text, or the path of a .txt or .jsonl file; by default 64 texts of 64 tokens sampled by the target
            without the graft; False for none (a conditional graft asks for questions, which text has not, unless
            its predicate is a gate).
        seed: of the questions' split, the sampled text and the resampling of texts.
        before: the target's own results, from :func:`side_effect_baseline`, with its tasks and text.

    Raises:
        UsageError: questions that served to select, a graft that is in place already, a baseline of another model.
    """
    if not isinstance(graft, Graft | ConditionalGraft):
        raise UsageError(f"side effects are those of a Graft or ConditionalGraft, got {type(graft).__name__}")
    check_untouched(pair)
    check_seed(seed)
    plain = graft if isinstance(graft, Graft) else graft.graft
    if before is None:
        chosen = _tasks_of(pair, tasks, n, seed)
        _check_unseen(pair, plain, chosen)
        before = side_effect_baseline(
            pair, tasks=chosen, text=text, n=n, seed=seed, batch_size=batch_size, progress=progress
        )
    elif not isinstance(before, Baseline):
        raise UsageError(f"before is a side_effect_baseline(…), got {type(before).__name__}")
    elif tasks is not None or text is not None:
        raise UsageError("a baseline has its own tasks and text: leave out tasks and text, or before")
    elif before.fingerprint != pair.target.fingerprint:
        raise UsageError(f"this baseline is of other weights than {pair.target.name} has now: measure it again")
    else:
        _check_unseen(pair, plain, before.tasks)
    gate = None
    if before.reading is not None and isinstance(graft, ConditionalGraft):
        gate = graft.accepts if isinstance(graft.accepts, Gate) and graft.when == "always" else None
        if gate is None:
            raise UsageError(
                "this conditional graft asks for a prompt or a question, which neutral text has not: text=False, or "
                "accepts=fit_gate(…), which reads texts too"
            )

    with graft.applied(pair):
        after = _evaluate(pair.target, before.tasks, before.batch_size, "after", progress)
    evaluations = {name: (before.evaluations[name], after[name]) for name in after}
    rows = [_task_row(name, *both) for name, both in evaluations.items()]
    notes = _task_notes(rows)
    measured = None
    if before.reading is not None:
        measured = text_divergence(pair, plain, before.reading)
        if gate is not None:
            open_for = gate.opens_for_texts(before.reading.rows)
            measured = measured.only(open_for)
            notes.append(f"the gate is open for {int(open_for.sum())} of {len(open_for)} texts")
        rows += _text_rows(measured, seed)
        if len(measured.tokens) < SMALL:
            notes.append(f"{len(measured.tokens)} texts are few: their bootstrap intervals are too narrow")
        if before.reading.cut:
            notes.append(f"{before.reading.cut} texts are longer than {LONGEST} tokens: their beginnings were read")
    said = f"{'conditional ' if plain is not graft else ''}graft of {len(plain)} modules into {pair.target.name}"
    return SideEffects(_frame(rows), evaluations, measured, before.text, tuple(notes), said)


def _tasks_of(pair: Pair, tasks: Any, n: int, seed: int) -> tuple[Task, ...]:
    """The tasks to measure, each name once; raises UsageError for questions that served to select."""
    check_count("n", n)
    check_seed(seed)
    if tasks is None:
        tasks = [name for name in pair.tasks if name != pair.default_task]
    chosen: dict[str, Task] = {}
    for given in [tasks] if isinstance(tasks, str | Path | Task) else list(tasks):
        if isinstance(given, Task):
            task = given
        elif str(given) in list_tasks():
            # of the same size as a run's, so that its test questions are these
            task = load_task(str(given), max(1024, n + 128)).split(test=n, seed=seed).test
        else:
            task = load_task(given)
        if task.role in ("discover", "choose"):
            raise UsageError(
                f"these questions of {task.name!r} are the {task.role!r} split, which served to select: measure side "
                "effects on a test split"
            )
        if task.name in chosen:
            raise UsageError(f"the task {task.name!r} is given twice: keep one")
        chosen[task.name] = task
    return tuple(chosen.values())


def _check_unseen(pair: Pair, graft: Graft, tasks: tuple[Task, ...]) -> None:
    """Raise UsageError where questions selected the graft's modules, before anything is measured."""
    selections = selected_by(pair.target.hf, graft.modules)
    for task in tasks:
        check_questions(task.name, task.role, task.keys, selections)


def _text_of(model: LanguageModel, text: Any, seed: int, batch_size: int) -> NeutralText | None:
    if text is False:
        return None
    if text is None:
        return neutral_texts(model, seed=seed, batch_size=batch_size)
    if isinstance(text, str | Path):
        return load_texts(text)
    if not isinstance(text, NeutralText):
        raise UsageError(f"text is neutral text (see neutral_texts, load_texts) or a path, got {type(text).__name__}")
    return text


def _evaluate(
    model: LanguageModel, tasks: tuple[Task, ...], batch_size: int, what: str, progress: bool
) -> dict[str, Evaluation]:
    return {task.name: evaluate(model, task, batch_size=batch_size) for task in track(tasks, what, progress)}


@lru_cache(maxsize=2)
def _picks(n: int, seed: int) -> NDArray[np.int64]:
    """The resamples of texts, kept: a sweep over grafts asks for the same ones again and again."""
    return bootstrap_indices(n, RESAMPLES, seed)


def _task_row(name: str, before: Evaluation, after: Evaluation) -> dict[str, Any]:
    low, high = paired_difference_interval(before.correct, after.correct)
    return {
        "what": name,
        "kind": "task",
        "n": len(before),
        "before": before.accuracy,
        "after": after.accuracy,
        "change": after.accuracy - before.accuracy,
        "low": low,
        "high": high,
        "p_value": mcnemar_exact(before.correct, after.correct),
        "gained": int(np.sum(~before.correct & after.correct)),
        "lost": int(np.sum(before.correct & ~after.correct)),
        "unit": "share",
    }


def _task_notes(rows: list[dict[str, Any]]) -> list[str]:
    notes = [
        f"{row['what']}: the target answers none of the questions, so there is nothing to lose"
        for row in rows
        if row["before"] == 0
    ]
    few = [f"{row['what']} ({row['n']})" for row in rows if row["n"] < SMALL]
    if few:
        notes.append(f"few questions: {', '.join(few)}")
    return notes


def _text_rows(measured: Divergence, seed: int) -> list[dict[str, Any]]:
    n = len(measured.tokens)
    picks = _picks(n, seed)
    tokens = measured.tokens[picks].sum(axis=1)
    common = {"kind": "text", "n": n, "p_value": np.nan, "gained": None, "lost": None}
    rises = np.expm1((measured.after - measured.before)[picks].sum(axis=1) / tokens)
    low, high = percentile_interval(rises)
    kl_low, kl_high = percentile_interval(measured.kl[picks].sum(axis=1) / tokens)
    perplexity = {
        "what": "perplexity",
        "before": measured.perplexity_before,
        "after": measured.perplexity_after,
        "change": measured.perplexity_change,
        "low": low,
        "high": high,
        "unit": "relative",
    }
    divergence = {
        "what": "KL",
        "before": 0.0,
        "after": measured.mean_kl,
        "change": measured.mean_kl,
        "low": kl_low,
        "high": kl_high,
        "unit": "nats a token",
    }
    return [{**common, **perplexity}, {**common, **divergence}]


def _frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    import pandas as pd

    columns = ["what", "kind", "n", "before", "after", "change", "low", "high", "p_value", "gained", "lost", "unit"]
    return pd.DataFrame(rows, columns=columns).astype({"gained": "Int64", "lost": "Int64"})


def _plain(value: Any, what: Any) -> str:
    """A value before or after, in words."""
    return {"perplexity": f"{value:.4g}", "KL": f"{value:.3g}"}.get(str(what), f"{value:.1%}")


def _change(row: Any) -> str:
    """A row's change with its interval and unit."""
    if row.unit == "nats a token":
        return f"{row.change:.3g} [{row.low:.3g}, {row.high:.3g}] nats a token"
    unit = "points" if row.unit == "share" else "%"
    change, low, high = (_hundredfold(value) for value in (row.change, row.low, row.high))
    return f"{change} [{low}, {high}] {unit}"


def _hundredfold(value: float) -> str:
    """Points or per cent with a sign; small ones keep two digits, so that only no change at all is 0."""
    scaled = 100 * value
    return f"{scaled:+,.1f}" if scaled == 0 or abs(scaled) >= 0.1 else f"{scaled:+.2g}"
