"""The configuration of a screen: what recipes are compared, and by what."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from mechtransplant.experiment.config import (
    Device,
    GraftedKind,
    PairSpec,
    RunConfig,
    SplitSpec,
    Strict,
    TaskSpec,
    folder_name,
    parse_as,
    read_mapping,
)
from mechtransplant.modules import share_no_weights


class ScreenConfig(Strict):
    """Every combination of ``kinds``, ``rules``, ``operators``, ``strengths`` and ``shares`` is a recipe.

    ``kinds`` holds kinds, or lists of kinds that are ranked together. ``shares`` are of the parameters in linear
    layers, of which a graft may have, or (``counted: changes``) change, so much. ``texts`` (of so many ``tokens``)
    measure harm, and ``perplexity`` is the highest rise that the best recipe may have (null: any).
    """

    name: str = "screen"
    pair: str | PairSpec
    task: str | TaskSpec | None = None
    split: SplitSpec = SplitSpec()
    kinds: tuple[GraftedKind | tuple[GraftedKind, ...], ...] = ("linear",)
    rules: tuple[str, ...] = ("lae", "gradient", "integrated_gradient")
    rule_options: dict[str, dict[str, Any]] = Field(default_factory=dict)
    operators: tuple[str | dict[str, Any], ...] = ("replace",)
    strengths: tuple[float, ...] = (1.0,)
    shares: tuple[float, ...] = (0.05, 0.1, 0.15)
    #: what a share counts: the numbers of the grafted modules, or those that the operator changes (TIES drops some), or
    #: that its directions take (low_rank)
    counted: Literal["modules", "changes"] = "modules"
    kv: Literal["never", "group", "whole-group"] = "never"
    texts: int = Field(default=32, ge=0)
    tokens: int = Field(default=64, ge=2)
    perplexity: float | None = None
    batch_size: int = Field(default=64, ge=1)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: Device = "cpu"
    threads: int | None = Field(default=None, ge=1)
    seed: int = Field(default=42, ge=0)

    _a_folder = field_validator("name")(folder_name)

    @field_validator("shares")
    @classmethod
    def _are_shares(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if any(not 0 < value <= 1 for value in values):
            raise ValueError("shares of the parameters are above 0 and at most 1")
        return values

    @model_validator(mode="after")
    def _sensible(self) -> ScreenConfig:
        for key in ("kinds", "rules", "operators", "strengths", "shares"):
            if not getattr(self, key):
                raise ValueError(f"{key}: name at least one")
        strange = [rule for rule in self.rule_options if rule not in self.rules]
        if strange:
            raise ValueError(f"rule_options: {strange[0]} is none of the rules {', '.join(self.rules)}")
        if self.counted == "changes" and (self.kv != "never" or not all(map(share_no_weights, self.grafted))):
            raise ValueError("counted: changes are counted by module: give kv: never, and kinds that share no weights")
        if self.perplexity is not None and not self.texts:
            raise ValueError("perplexity: a limit needs texts: give texts, or leave the limit out")
        return self

    @property
    def grafted(self) -> tuple[tuple[GraftedKind, ...], ...]:
        """The kinds that are ranked together, one tuple each."""
        return tuple((kinds,) if isinstance(kinds, str) else kinds for kinds in self.kinds)

    def as_run(self, kinds: tuple[GraftedKind, ...], rule: str) -> RunConfig:
        """A run of one rule on the same models and questions."""
        own = ("pair", "task", "split", "kv", "batch_size", "dtype", "device", "threads", "seed")
        given: dict[str, Any] = {key: getattr(self, key) for key in own if getattr(self, key) is not None}
        if rule in self.rule_options:
            given["rule_options"] = self.rule_options[rule]
        kind: Any = kinds[0] if len(kinds) == 1 else kinds
        return RunConfig(name=f"{self.name}-best", kind=kind, rule=rule, **given)


def read_screen(path: str | Path) -> ScreenConfig:
    """The configuration in a YAML file; raises UsageError with one line for anything wrong in it."""
    return parse_as(ScreenConfig, read_mapping(path), str(path))
