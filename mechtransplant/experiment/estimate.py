"""What a run will cost, before it starts: how many cells, and how long they take on this machine.

Counts are a little high: cells that turn out to be the same one (a control that is another rule's graft) are computed
once. A file of neutral texts is not counted. Seconds are those of the target on a few questions, measured now;
rankings are not counted.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mechtransplant.evaluation import evaluate_budgets
from mechtransplant.evaluation.batches import encode
from mechtransplant.experiment.random_weights import SCALES
from mechtransplant.experiment.rankings import learned_by_k
from mechtransplant.experiment.run_controls import TRIED
from mechtransplant.progress import in_words
from mechtransplant.ranking import get_rule

if TYPE_CHECKING:
    from mechtransplant.experiment.run import Run

#: questions that are timed
TIMED = 16


@dataclass(frozen=True)
class Estimate:
    """A run's cells and seconds.

    ``cells`` maps what they are for → (how many, questions of each); a side effect's texts count as so many questions
    as have their tokens. ``finished`` are in the folder already; ``seconds`` is for one question in one cell.
    """

    cells: dict[str, tuple[int, float]]
    finished: int
    seconds: float
    rankings: int
    workers: int = 1
    #: cells of another run, of which those that this one shares will be taken; how many cannot be known before ranking
    elsewhere: int = 0

    @property
    def total(self) -> int:
        """All cells of the run."""
        return sum(n for n, _ in self.cells.values())

    @property
    def remaining_seconds(self) -> float:
        """Seconds for what is not finished, cell after cell on this machine."""
        everything = sum(n * questions for n, questions in self.cells.values()) * self.seconds
        return everything * max(0, self.total - self.finished) / max(1, self.total)

    def __str__(self) -> str:
        parts = ", ".join(f"{n:,} {what} ({q:,.0f} questions each)" for what, (n, q) in self.cells.items() if n)
        done = f", {min(self.finished, self.total):,} of them finished" if self.finished else ""
        rankings = "1 ranking" if self.rankings == 1 else f"{self.rankings} rankings"
        shared = self.remaining_seconds / self.workers
        others = (
            f"; less what it shares with the {self.elsewhere:,} cells of the run to reuse" if self.elsewhere else ""
        )
        together = (
            ""
            if self.workers == 1
            else f"; shared by {self.workers} workers that each are as fast as it, {in_words(shared)}"
        )
        return (
            f"{self.total:,} cells{done}, about {in_words(self.remaining_seconds)} on this machine, one after another "
            f"({1e3 * self.seconds:.3g} ms a question, just measured){together}, and {rankings}: {parts}{others}"
        )


def estimate(run: Run, finished: int = 0) -> Estimate:
    """What a run costs; measures the target on a few questions of ``choose``."""
    config, counts, n = run.config, run.counts, len(run.candidates)
    choose, test = len(run.splits.choose), len(run.splits.test)
    rules, controlled = len(config.rules), len(config.with_controls)
    sizes = [k for k in counts if k < n]
    refitted = sum(config.refitted_sets for rule in config.with_controls if get_rule(rule).refit)
    weights = len(SCALES) * controlled if config.random_weights else 0
    # everything grafted has no random set
    drawn = config.random_sets if sizes else 0
    tuned = controlled if config.random_strengths and sizes else 0
    searches = sum(len(counts) if learned_by_k(config, rule) else 1 for rule in config.rules) + refitted
    cells: dict[str, tuple[int, float]] = {
        "on choose": (
            2
            + (rules * len(counts) + weights) * len(config.strengths)
            + TRIED * tuned * (1 + len(config.random_strengths)),
            choose,
        ),
        "K-curves on test": (2 + rules * len(sizes) + 1, test),
        "random": (
            controlled * (config.curve_sets * len(sizes) + drawn * len(run.budgets) + config.random_weights)
            + refitted
            + tuned * drawn,
            test,
        ),
    }
    others = controlled * ("bottom" in config.controls)
    others += sum(run.controls.has_unrelated(rule) and run.other is not None for rule in config.with_controls)
    others += controlled * ("reverse" in config.controls) + (
        "self" in config.controls and config.rules[0] in config.with_controls
    )
    cells["other controls"] = (others, test)
    if run.elsewhere.wanted and config.side_effects is not None:
        spec = config.side_effects
        jobs = rules + 1 + len(counts) - 1 + (spec.random if config.rules[0] in config.with_controls else 0)
        asked = sum(len(task) for task in run.elsewhere.tasks)
        encoded = encode(run.splits.choose, run.pair.target.tokenizer)
        length = sum(map(len, [*encoded.prompts, *encoded.completions])) / choose
        cells["side effects"] = (jobs, asked + (spec.texts * spec.tokens / length if run.elsewhere.text is None else 0))
    workers = 1 if run.where.name == "serial" else run.where.count
    return Estimate(cells, finished, seconds_a_question(run), searches, workers, len(run.reused.cells))


def seconds_a_question(run: Run) -> float:
    """Seconds that the target takes for one question, at all token budgets, as the run will ask it."""
    few = run.splits.choose.subset(range(min(TIMED, len(run.splits.choose))))
    size = run.config.batch_size

    def ask() -> None:
        evaluate_budgets(run.pair.target, few, run.budgets, size, method="auto")

    if few.short_answer:
        # what is done once is not what a cell costs; a generation is too long to be done twice
        ask()
    started = time.perf_counter()
    ask()
    return (time.perf_counter() - started) / len(few)
