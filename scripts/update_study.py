"""Write the tables of the study into docs/, from the committed runs.

    python scripts/update_study.py [--check]

Between two markers of a page stands what the runs say, and nothing else; ``--check`` writes nothing and fails where a
page says something else.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import pandas as pd
from study_aims import AIMS, conditions, reached, reservations
from study_claims import CLAIMS, Study, verdict
from study_runs import ONCE, PAIRS, PLANNED, RECIPE_RUNS, ROOT, SPLITS, folders, planned, recipe_of

from mechtransplant.experiment import read_screen, reported_power, reported_results, runs_table
from mechtransplant.experiment.words import head_of, row_of


def markdown(columns: list[str], rows: list[list[Any]]) -> str:
    """A table in markdown."""
    return "\n".join([*head_of(columns), *map(row_of, rows)]) + "\n"


def power() -> str:
    """The paper's ten rows, and how likely 50 or 500 questions are to show them."""
    rows = []
    for row in reported_power().to_dict("records"):
        chance = [f"{100 * row[f'{what}_{n}']:.0f} %" for n in (50, 500) for what in ("kept", "independent")]
        shares = [f"{row[f'{role}_accuracy']:.0f}" for role in ("target", "source", "after")]
        rows.append(
            [row["pair"].capitalize(), row["max_new_tokens"], row["direction"], *shares, row["best_k"], *chance]
        )
    columns = ["pair", "tokens", "direction", "target, %", "source, %", "after, %", "best K"]
    return markdown([*columns, *(f"{what}, n = {n}" for n in (50, 500) for what in ("kept", "independent"))], rows)


def interval(low: float, high: float, scale: float = 1.0, digits: int = 1) -> str:
    return f"[{scale * low:.{digits}f}, {scale * high:.{digits}f}]"


def outcome(row: dict[str, Any]) -> list[str]:
    """What every table says of a run's graft."""
    found = [f"{100 * row[what]:.1f}" for what in ("target", "source", "after")]
    found.append(
        "–" if pd.isna(row["tir"]) else f"{row['tir']:.2f} {interval(row['tir_low'], row['tir_high'], digits=2)}"
    )
    recovery = f"{row['recovery']:.0f} {interval(row['recovery_low'], row['recovery_high'], digits=0)}"
    found.append("withheld" if pd.isna(row["recovery"]) else recovery)
    return [*found, *among(row, "random")]


def among(row: dict[str, Any], controls: str) -> list[str]:
    """Median and range of random sets ("random"; "tuned": at their own strength) or random weights ("weights"), and how
    many are beaten."""
    n = row.get(f"{controls}_n")
    if n is None or pd.isna(n):
        return ["–", "–"]
    low, median, high = (f"{100 * row[f'{controls}_{end}']:.1f}" for end in ("low", "median", "high"))
    beaten = f"{row[f'{controls}_beaten']:.0f} of {n:.0f} (p = {row[f'{controls}_p_value']:.2g})"
    nats = row.get(f"{controls}_beaten_log_probability")
    if nats is not None and not pd.isna(nats):
        beaten += f"; by log-probability {nats:.0f} (p = {row[f'{controls}_p_value_log_probability']:.2g})"
    return [f"{median} ({low} – {high})", beaten]


def changed(row: dict[str, Any]) -> str:
    """The share of the numbers in linear layers that a graft changes, or that its directions take, in per cent."""
    share = row.get("changed_share")
    return f"{100 * (row['parameter_share'] if share is None or pd.isna(share) else share):.1f}"


def moved(row: dict[str, Any]) -> str:
    """How long a graft's change is, and its random counterparts' in the median, in % of the whole difference."""

    def way(name: str) -> str:
        return "" if pd.isna(row.get(f"{name}distance_share")) else f"{100 * row[f'{name}distance_share']:.0f}"

    names = {"random": "", "tuned": "at their own strength ", "weights": ""}
    beside = ", ".join(f"{name}{way(f'{key}_')}" for key, name in names.items() if way(f"{key}_"))
    return (way("") or "–") + (f" ({beside})" if beside else "")


#: a graft's size: whose layers, and how much of them
TOUCHED, CHANGED = "layers altered (of linear layers' weights)", "numbers stored (of linear layers'), %"
MOVED = "length of the change, % of the whole difference: graft (random sets or draws)"
OUTCOME = ["target, %", "source, %", "after, %", "TIR", "Recovery, %", "random sets: median (range), %", "beaten"]


def harm(row: dict[str, Any]) -> list[str]:
    low, high = row["perplexity_change_low"], row["perplexity_change_high"]
    worst = interval(row["worst_change_low"], row["worst_change_high"], 100)
    shut = row["gate"] and low == high == 0
    return [
        "0 (gate shut for every text)" if shut else f"{100 * row['perplexity_change']:+.1f} {interval(low, high, 100)}",
        f"{row['worst_task']} {100 * row['worst_change']:+.1f} {worst}{opened(row)}",
    ]


def opened(row: dict[str, Any]) -> str:
    """For how many of the other task's questions a run's gate is open."""
    if not row["gate"]:
        return ""
    saved = json.loads((ROOT / "runs" / row["run"] / "outcome.json").read_text(encoding="utf-8"))
    found = next(iter(saved.values()))["gate"].get("elsewhere", {}).get(row["worst_task"])
    return "" if found is None else f" (gate open for {found[0]} of {found[1]})"


def elsewhere(row: dict[str, Any]) -> str:
    """What the layers that the rule picks on another task reach, and how many of them are the graft's own."""
    if pd.isna(row["unrelated"]):
        return "–"
    return f"{100 * row['unrelated']:.1f} ({row['unrelated_shared']:.0f} of {row['k']}; {row['random_shared']:g})"


ELSEWHERE = "another task's layers, % (how many are the same; of random sets)"
HARM = ["perplexity, %", "worst other task, points"]


def status() -> str:
    """How much of the study is there."""
    said = [f"`{what}` {len(folders(what))} of {len(planned(what))}" for what in PLANNED]
    return f"Finished runs so far: {', '.join(said)}.\n"


def setting() -> str:
    """The paper's rule on both pairs and every split."""
    rows = []
    for row in runs_table([*folders("paper"), *folders("projections")]).to_dict("records"):
        share = f"{row['k']} of {row['candidates']}"
        if "projections" in row["run"]:
            row["seed"] = f"{row['seed']}, sets of the same projections"
        others = [f"{100 * row['bottom']:.1f}", elsewhere(row), f"{100 * row['reverse']:.1f}"]
        rows.append([row["pair"], row["seed"], share, *outcome(row), *others, *harm(row)])
    table = markdown(["pair", "split", "K", *OUTCOME, "lowest-ranked, %", ELSEWHERE, "reverse, %", *HARM], rows)
    shown = pictures("paper", "k_curve", "Accuracy of {} against the number of grafted layers")
    return table + shown + pictures("paper", "against_chance", "The paper's rule on {} among its random sets")


def pictures(what: str, figure: str, said: str, split: int = 0) -> str:
    """Figures of the finished runs of a kind on one split, with what they show."""
    lines = []
    for pair in (*PAIRS, *ONCE):
        path = f"runs/study-{pair}-{what}-{split}/figures/{figure}.png"
        if (ROOT / path).exists():
            lines.append(f"\n![{said.format(pair)}](../{path})\n")
    return "".join(lines)


#: nats that 64 questions hardly tell apart
NEAR = 0.03


def screens() -> str:
    """The best recipe of every kind of modules in every finished screen, by what screens compare: no result."""
    rows, near = [], []
    for folder in sorted((ROOT / "runs").glob("study-*-screen-*")):
        if not (folder / "screen.csv").exists():
            continue
        table = pd.read_csv(folder / "screen.csv", keep_default_na=False, na_values=[""])
        table = table[table.log_probability.notna()].sort_values("log_probability", ascending=False, kind="stable")
        # a set that several rules rank first is one graft
        # also where heads or MLPs alone are the best of heads and MLPs
        grafts = table.drop_duplicates(["operator", "strength", "k", "log_probability"])
        close = int((grafts.log_probability >= grafts.log_probability.iloc[0] - NEAR).sum()) - 1
        near.append(f"In {folder.name} {close} of {len(grafts) - 1} other grafts lie within {NEAR} nats of the first.")
        candidates = {path.stem: len(pd.read_csv(path)) for path in (folder / "rankings").glob("*.csv")}
        for row in table.drop_duplicates("kind").to_dict("records"):
            counted = " carried" if read_screen(folder / "config.yaml").counted == "changes" else ""
            size = f"{row['k']} ({100 * row['parameters']:.1f} %{counted})"
            # neurons' rankings, of which no graft takes everything, are too long to be committed
            everything = candidates.get(f"{row['kind'].replace('+', '-')}-{row['rule']}")
            rule = "any: all of them" if row["k"] == everything else f"`{row['rule']}`"
            cells = [folder.name.removeprefix("study-"), row["kind"], rule, row["operator"].replace('"', "")]
            ends = ", ".join(f"{row.get(f'{role}_log_probability', float('nan')):.3f}" for role in ("target", "source"))
            cells += [f"{row['strength']:g}", size, f"{row['log_probability']:.3f}", ends]
            rows.append([*cells, f"{100 * row['accuracy']:.1f}", f"{100 * row['perplexity_change']:+.1f}"])
    columns = ["screen", "kind", "best rule", "operator", "strength", "K (of linear layers' weights)"]
    columns += ["log-probability, nats", "target, source", "right on choose, %", "perplexity, %"]
    shown = pictures("screen", "recipe_curves", "Log-probability of {} against parameters")
    return markdown(columns, rows) + "\n" + " ".join(near) + "\n" + shown


def recipes() -> str:
    """The recipes that a screen chose, on every split."""
    rows = []
    for what in RECIPE_RUNS:
        for row in runs_table(folders(what)).to_dict("records"):
            size = f"{row['k']} of {row['candidates']} ({100 * row['parameter_share']:.1f} %)"
            again = row.get("refitted_n")
            refitted = "–" if pd.isna(again) or not again else refitted_of(row)
            tuned, weights = (", ".join(dict.fromkeys(among(row, which))) for which in ("tuned", "weights"))
            cells = [row["pair"], row["seed"], what, recipe_of(row), size, changed(row), moved(row), *outcome(row)]
            rows.append([*cells, tuned, elsewhere(row), weights, refitted, *harm(row)])
    columns = ["pair", "split", "what", "recipe", TOUCHED, CHANGED, MOVED, *OUTCOME]
    columns += ["at the strength that suits them", ELSEWHERE]
    columns += ["as many changes (or directions) at random: median (range), %, beaten"]
    table = markdown([*columns, "random sets with strengths fitted to them: median, beaten", *HARM], rows)
    # a gated run has the accuracies of the one without
    drawn = [what for what in RECIPE_RUNS if "gated" not in what]
    return table + "".join(pictures(what, "against_chance", "{} (" + what + ") beside its controls") for what in drawn)


def aims() -> str:
    """Which recipes reach what the study aims at."""
    rows = []
    for pair in (*PAIRS, *ONCE):
        for row in runs_table([f for what in RECIPE_RUNS for f in folders(what, pair)]).to_dict("records"):
            found = conditions(row)
            rows.append([row["run"].removeprefix("study-"), *found, f"**{reached(found)}**", reservations(found)])
    return markdown(["run", *AIMS, "all of it", "reservations"], rows)


def headline() -> str:
    """What README says of the study: every finished run of the paper's rule and of a recipe on the first split."""
    rows = []
    for pair in (*PAIRS, *ONCE):
        for what in ("paper", *RECIPE_RUNS):
            for row in runs_table([f for f in folders(what, pair) if f.name.endswith("-0")]).to_dict("records"):
                run = f"[{row['run'].removeprefix('study-')}](runs/{row['run']}/summary.md)"
                found = outcome(row)[:5]
                size = f"{row['k']} of {row['candidates']}"
                beside = [", ".join(dict.fromkeys(among(row, which))) for which in ("random", "tuned", "weights")]
                beside.append(elsewhere(row))
                rows.append([run, recipe_of(row), size, changed(row), moved(row), *found, *beside, *harm(row)])
    columns = ["run", "recipe", "layers altered", CHANGED, MOVED, *OUTCOME[:5]]
    controls = ("random sets", "these at the strength that suits them", "as many changes (or directions) at random")
    columns += [f"{which}: median (range), %, beaten" for which in controls]
    return markdown([*columns, ELSEWHERE, *HARM], rows) + "\n" + status()


def refitted_of(row: dict[str, Any]) -> str:
    """Random sets whose strengths were fitted to them."""
    return f"{100 * row['refitted_median']:.1f}, {row['refitted_beaten']:.0f} of {row['refitted_n']:.0f}"


def answers() -> str:
    """The same grafts where the whole text has to be the boxed answer, and where the last number counts."""
    rows = []
    right = {"directions": "the whole text is `\\boxed{ANSWER}`", "number": "the last number of the text"}
    for what, counts in right.items():
        for row in runs_table(folders(what, "instruct")).to_dict("records"):
            rows.append([row["pair"], counts, recipe_of(row), row["n"], *outcome(row)[:5]])
    return markdown(["pair", "right is", "recipe", "n", *OUTCOME[:5]], rows)


def parts() -> str:
    """Heads alone and MLPs alone."""
    rows = []
    for what in ("heads", "mlps"):
        for row in runs_table(folders(what)).to_dict("records"):
            size = f"{row['k']} of {row['candidates']} ({100 * row['parameter_share']:.1f} %)"
            rows.append([row["pair"], row["kind"], f"`{row['rule']}`", size, *outcome(row), *harm(row)])
    return markdown(["pair", "kind", "rule", TOUCHED, *OUTCOME, *HARM], rows)


def beside() -> str:
    """The paper's ten rows, and ours."""
    rows = []
    for row in reported_results().to_dict("records"):
        recovery = "undefined" if pd.isna(row["recovery_percent"]) else f"{row['recovery_percent']:.0f}"
        shares = [f"{row[f'{role}_accuracy']:.0f}" for role in ("target", "source", "after")]
        name = f"{row['pair'].capitalize()} {row['direction'].replace('->', '→')}, {row['max_new_tokens']} tokens"
        share = f"{row['best_k']} of {row['candidates']}"
        rows.append(["paper", name, 50, share, *shares, f"{row['tir']:.2f}", recovery, "–"])
    for row in runs_table(folders("paper")).to_dict("records"):
        name, share = f"{row['pair']}, split {row['seed']}", f"{row['k']} of {row['candidates']}"
        target, source, after, tir, recovery, _, beaten = outcome(row)
        rows.append(["this study", name, row["n"], share, target, source, after, tir, recovery, beaten])
    columns = ["of", "row", "n", "K", "target, %", "source, %", "after, %", "TIR", "Recovery, %", "random sets beaten"]
    return markdown(columns, rows)


def verdicts() -> str:
    """Claim → evidence → verdict, a pair at a time."""
    rows = []
    for claim, (rule, judge) in CLAIMS.items():
        for pair in PAIRS:
            found = [judge(Study(folder)) for folder in folders("paper", pair)]
            if found:
                n = Study(folders("paper", pair)[0]).row["n"]
                evidence = "; ".join(e.said for e in found)
                rows.append([claim, rule, f"smollm2/{pair}", evidence, n, f"**{verdict(found, len(SPLITS))}**"])
    return markdown(["claim of the paper", "what decides", "pair", "evidence, split by split", "n", "verdict"], rows)


#: page → marker → what stands there
SECTIONS: dict[str, dict[str, Callable[[], str]]] = {
    "../README.md": {"study": headline},
    "paper-recipes.md": {"power": power},
    "study.md": {
        "status": status,
        "setting": setting,
        "beside": beside,
        "verdicts": verdicts,
        "screens": screens,
        "recipes": recipes,
        "aims": aims,
        "answers": answers,
        "parts": parts,
    },
}


def updated(text: str, sections: dict[str, Callable[[], str]]) -> str:
    """A page with its sections as the runs have them now."""
    for name, make in sections.items():
        begin, end = f"<!-- {name}: scripts/update_study.py -->\n", f"<!-- end of {name} -->\n"
        before, rest = text.split(begin)
        text = before + begin + "\n" + make() + "\n" + end + rest.split(end)[1]
    return text


def main() -> None:
    wrong = []
    for page, sections in SECTIONS.items():
        path = ROOT / "docs" / page
        text = path.read_text(encoding="utf-8")
        new = updated(text, sections)
        if "--check" not in sys.argv:
            path.write_text(new, encoding="utf-8")
        elif new != text:
            wrong.append(f"docs/{page}")
    if wrong:
        sys.exit(f"{', '.join(wrong)}: not what the runs say: python scripts/update_study.py")


if __name__ == "__main__":
    main()
