"""The explorer: a heat map of scores whose cells are buttons, sliders for K and strength, and what the run measured.

A cell's numbers stand in its tooltip, a click puts the module into the graft or takes it out. Nothing is computed: sets
that the run did not measure are said to be so, with the code that measures them.
"""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechtransplant.display import html_table, percent
from mechtransplant.errors import UsageError
from mechtransplant.explorer.cells import Measured, MeasuredRun
from mechtransplant.modules import parse_address

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd

    from mechtransplant.experiment.result import RunResult

#: width and height of a cell, in pixels
_CELL = (34, 20)
#: buttons that a browser still draws in seconds
_MOST = 2000


def explore(run: str | Path | RunResult) -> Explorer:
    """An explorer of a finished run, to be displayed in a notebook: end a cell with it.

    Args:
        run: the run's folder, or what ``run_experiment`` returned.

    Raises:
        UsageError: no finished run, or one of more modules than can be shown (neurons are thousands).
    """
    measured = MeasuredRun(run if isinstance(run, (str, Path)) else run.folder)
    rule = measured.rules[0]
    count = len(measured.ranking(rule, measured.counts(rule)[0]))
    if count > _MOST:
        raise UsageError(
            f"{measured.folder} is a run of {count:,} modules, and the explorer has a button for each: it shows at "
            f"most {_MOST:,}; read its rankings as frames"
        )
    return Explorer(measured)


class Explorer:
    """Widgets over a measured run; ``modules`` is the set that is chosen now, ``graft`` the same as a Graft."""

    def __init__(self, run: MeasuredRun) -> None:
        import ipywidgets as widgets

        self.run = run
        self.chosen: set[str] = set()
        self.buttons: dict[str, Any] = {}
        # while widgets are set by the program, what they tell is no wish of the user
        self.quiet = False
        wide: dict[str, Any] = {"style": {"description_width": "70px"}, "layout": widgets.Layout(width="420px")}
        self.rule = widgets.Dropdown(options=run.rules, description="rule", **wide)
        self.k = widgets.SelectionSlider(options=run.counts(run.rules[0]), description="K", **wide)
        self.strength = widgets.SelectionSlider(options=[1.0], description="strength", **wide)
        self.budget = widgets.SelectionSlider(options=run.budgets, value=run.budgets[-1], description="tokens", **wide)
        self.grid, self.said = widgets.VBox([]), widgets.HTML()
        for control in (self.rule, self.k, self.strength, self.budget):
            control.observe(self._moved, names="value")
        controls = [self.rule, self.k, self.strength, *([self.budget] if len(run.budgets) > 1 else [])]
        self.box = widgets.VBox([widgets.VBox(controls), widgets.HBox([self.grid, self.said])])
        self._new_rule()

    def _ipython_display_(self) -> None:
        from IPython.display import display

        display(self.box)

    @property
    def modules(self) -> tuple[str, ...]:
        """The chosen modules, best first."""
        return tuple(m for m in self.ranking.module if m in self.chosen)

    @property
    def graft(self) -> Any:
        """The chosen modules as a graft, as the run makes them; without its gate, if it has one.

        Strengths that were fitted are those of the rule's own K modules.
        """
        from mechtransplant.grafting import Graft

        config, strength = self.run.config, self.strength.value
        each = [strength * own for own in self.fitted] or strength
        return Graft(self.modules, each, kv=config.kv, operator=config.operator)

    @property
    def fitted(self) -> list[float]:
        """Strengths that the rule fitted to the chosen modules, in their order; [] where it did not."""
        size = len(self.chosen)
        ranking = self.run.ranking(self.rule.value, size) if size else self.ranking
        if "strength" not in ranking or not self._mine():
            return []
        own = dict(zip(ranking.module, ranking.strength, strict=True))
        return [float(own[m]) for m in self.modules]

    # --- what moves --------------------------------------------------------------------------------------------------

    def _moved(self, change: dict[str, Any]) -> None:
        if self.quiet:
            return
        if change["owner"] is self.rule:
            self._new_rule()
        elif change["owner"] is self.k:
            self._new_k()
        else:
            self._tell()

    def _new_rule(self) -> None:
        counts = self.run.counts(self.rule.value)
        self.quiet = True
        # the run's own K, where the rule has it
        self.k.options = counts
        self.quiet = False
        self._new_k()

    def _new_k(self) -> None:
        rule, k = self.rule.value, self.k.value
        self.ranking = self.run.ranking(rule, k)
        self.chosen = set(self.ranking.module[:k])
        strengths = self.run.strengths(rule, k)
        self.quiet = True
        kept = self.strength.value
        self.strength.options = strengths
        self.strength.value = kept if kept in strengths else min(strengths, key=lambda s: abs(s - 1))
        self.quiet = False
        self._draw()
        self._tell()

    def _clicked(self, module: str) -> None:
        self.chosen ^= {module}
        self._mark(module)
        self._tell(module)

    # --- what is shown -----------------------------------------------------------------------------------------------

    def _draw(self) -> None:
        """Every module as a button: layers upwards, as in the figures."""
        import ipywidgets as widgets

        places = {module: _place(module) for module in self.ranking.module}
        columns = sorted({column for _, column in places.values()}, key=_order)
        layers = sorted({layer for layer, _ in places.values()}, reverse=True)
        at = {place: module for module, place in places.items()}
        if set(self.buttons) != set(places):
            self.buttons = {module: self._button(module) for module in places}
            cell = widgets.Layout(width=f"{_CELL[0]}px", height=f"{_CELL[1]}px", margin="0")
            empty = [widgets.Label("", layout=cell) for _ in range(len(layers) * len(columns) - len(places))]
            rows = []
            for layer in layers:
                name = widgets.Label(
                    str(layer), layout=widgets.Layout(width="26px", height=f"{_CELL[1]}px", margin="0")
                )
                cells = [self.buttons[at[layer, c]] if (layer, c) in at else empty.pop() for c in columns]
                rows.append(widgets.HBox([name, *cells]))
            names = [widgets.Label(c, layout=widgets.Layout(width=f"{_CELL[0]}px", margin="0")) for c in columns]
            corner = widgets.Label("", layout=widgets.Layout(width="26px", margin="0"))
            self.grid.children = [*rows, widgets.HBox([corner, *names])]
        for module, colour, ink, text in _coloured(self.ranking):
            button = self.buttons[module]
            button.style.button_color, button.style.text_color, button.tooltip = colour, ink, text
            self._mark(module)

    def _button(self, module: str) -> Any:
        import ipywidgets as widgets

        layout = widgets.Layout(width=f"{_CELL[0]}px", height=f"{_CELL[1]}px", margin="0", padding="0")
        button = widgets.Button(layout=layout)
        button.on_click(lambda _: self._clicked(module))
        return button

    def _mark(self, module: str) -> None:
        self.buttons[module].description = "●" if module in self.chosen else ""

    def _tell(self, module: str | None = None) -> None:
        self.said.value = self.text(module)

    def text(self, module: str | None = None) -> str:
        """What the run knows of the chosen set, and of the module that was clicked last, as HTML."""
        run, rule, budget, strength = self.run, self.rule.value, self.budget.value, float(self.strength.value)
        # a rule that is learned for one K has another ranking for each
        size = len(self.chosen)
        mine = self._mine()
        name = f"the {size} highest by {rule}" if mine else f"your own {size} modules"
        rows: list[tuple[str, str]] = []
        fitted = bool(self.fitted)
        measured = {
            split: run.of_set(frozenset(self.chosen), strength, split, budget, fitted) for split in ("choose", "test")
        }
        for split, found in measured.items():
            rows.append((f"accuracy on {split}", "not measured" if found is None else _share(found)))
        for role in ("target", "source"):
            value = run.accuracy(role, "test", budget)
            rows.append((f"{role} on test", "–" if value is None else percent(value)))
        random, test = run.random(rule, len(self.chosen), strength, budget), measured["test"]
        if mine and len(random):
            ends = f"{100 * random.min():.1f} – {100 * random.max():.1f}"
            beaten = "" if test is None else f"; {int((random < test.accuracy).sum())} beaten"
            rows.append(
                (
                    f"random sets of the run ({len(random)}) on test",
                    f"{percent(float(random.median()))} ({ends}){beaten}",
                )
            )
        rows += self._harm(rule, strength) if mine else []
        notes = [] if mine else ["Chosen by eye: a number on test is then no held-out number."]
        how = "fitted strengths × " if fitted else "strength "
        parts = [html_table(rows, title=f"{name[0].upper()}{name[1:]}, {how}{strength:g}", notes=notes)]
        if all(found is None for found in measured.values()):
            parts.append(f"<p>This run has not measured the set:</p><pre>{escape(self.code())}</pre>")
        if module is not None:
            what = "in the set" if module in self.chosen else "not in the set"
            parts.append(f"<p>{escape(self.buttons[module].tooltip)}, {what}</p>")
        return "\n".join(parts)

    def _mine(self) -> bool:
        """Whether the chosen modules are the rule's own highest, of a K that it has a ranking for."""
        size, rule = len(self.chosen), self.rule.value
        if not size or not self.run.is_ranked(rule, size):
            return False
        return self.chosen == set(self.run.ranking(rule, size).module[:size])

    def _harm(self, rule: str, strength: float) -> list[tuple[str, str]]:
        row = self.run.harm(rule, len(self.chosen), strength)
        if row is None:
            return []
        found = [("accuracy elsewhere", f"{round(-100 * row['harm'], 1) + 0.0:+.1f} points")] if "harm" in row else []
        if "perplexity_change" in row:
            found.append(("perplexity of neutral text", f"{round(100 * row['perplexity_change'], 1) + 0.0:+.1f} %"))
        return found

    def code(self) -> str:
        """The lines that measure the chosen set as the run would: its splits, direction, operator and token budgets."""
        names = ", ".join(f'"{m}"' for m in self.modules)
        each = f", strengths={self.fitted}" if self.fitted else ""
        return (
            "from mechtransplant.explorer import MeasuredRun\n\n"
            f"run = MeasuredRun({self.run.folder.as_posix()!r})\n"
            f"print(run.measure([{names}], strength={self.strength.value:g}{each}))"
        )


def _share(found: Measured) -> str:
    recovery = "" if found.recovery is None else f", Recovery {found.recovery + 0.0:.0f} %"
    return f"{percent(found.accuracy, (found.low, found.high))}{recovery}"


def _place(module: str) -> tuple[int, str]:
    """(layer, column) of a module."""
    address = parse_address(module)
    if address.head is not None:
        return address.layer, str(address.head)
    if address.neuron is not None:
        return address.layer, f"N{address.neuron}"
    return address.layer, module.partition(".")[2].removesuffix("_proj") or "block"


def _order(column: str) -> tuple[int, int, str]:
    """Heads by number, then linear layers in the order of a block, then the rest, neurons by number."""
    known = ("q", "k", "v", "o", "gate", "up", "down")
    if column.isdigit():
        return 0, int(column), ""
    if column[1:].isdigit():
        return 3, int(column[1:]), ""
    return (1, known.index(column), "") if column in known else (2, 0, column)


def _coloured(ranking: pd.DataFrame) -> Sequence[tuple[str, str, str, str]]:
    """(module, colour of its cell, colour of its mark, what it says) of every module."""
    from matplotlib import colormaps, colors

    low, high = min(0.0, float(ranking.score.min())), float(ranking.score.max())
    scale = colors.Normalize(low, high if high > low else low + 1)
    found = []
    for row in ranking.to_dict("records"):
        red, green, blue, _ = colormaps["cividis"](scale(float(row["score"])))
        ink = "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"
        text = f"{row['module']}: score {row['score']:.4g}, rank {row['rank']} of {len(ranking)}"
        found.append((str(row["module"]), colors.to_hex((red, green, blue)), ink, text))
    return found
