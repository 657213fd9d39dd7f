"""The configuration of a run: typed, with errors that name the key."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from mechtransplant.errors import UsageError

#: The seed paper's K as shares of the candidates: 8, 16, 32, 64 and 128 of Phi's 128 linear layers.
PAPER_SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)


def _chosen(device: str) -> str:
    from mechtransplant.weights import chosen_device

    return chosen_device(device)


#: of "auto" a folder notes what it was where it began
Device = Annotated[str, AfterValidator(_chosen)]

Config = TypeVar("Config", bound=BaseModel)


class Strict(BaseModel):
    """Unknown keys are refused, and nothing can be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class PairSpec(Strict):
    """Two model specs, where the pair has no name."""

    source: str
    target: str
    #: their common ancestor, for operators that take changes from one
    base: str | None = None


class FormatSpec(Strict):
    """How a question becomes a prompt; what is not given stays the task's own (see ``tasks.PromptFormat``).

    ``shots`` are worked examples, each a pair of question and completion; ``chat`` is true, false, or null for "where
    the tokenizer has a chat template".
    """

    system: str = ""
    question: str = "{question}"
    completion: str = "{answer}"
    shots: tuple[tuple[str, str], ...] = ()
    chat: bool | None = None
    shot_separator: str = "\n\n"

    @model_serializer(mode="wrap")
    def _as_given(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # what is not given is the task's own, and not a default of this class
        return {key: value for key, value in dump(self).items() if key in self.model_fields_set}


class TaskSpec(Strict):
    """A named task, or a JSONL file, with its options; what is not given stays the task's own.

    ``explore``: another file (a training set) that the ``discover`` and ``choose`` questions are taken from.
    """

    name: str
    explore: str | None = None
    n: int = Field(default=1024, ge=1)
    seed: int = Field(default=0, ge=0)
    question_field: str | None = None
    answer_field: str | None = None
    template_field: str | None = None
    scorer: str | None = None
    max_new_tokens: int | None = Field(default=None, ge=1)
    stop: tuple[str, ...] | None = None
    short_answer: bool | None = None
    format: FormatSpec | None = None


class SplitSpec(Strict):
    """How many questions find modules, choose K and strength, and report."""

    discover: int = Field(default=64, ge=1)
    choose: int = Field(default=64, ge=1)
    test: int = Field(default=256, ge=1)
    seed: int = Field(default=0, ge=0)


def folder_name(value: str) -> str:
    """A name that can be a folder; raises ValueError."""
    if value in ("", ".", "..") or "/" in value or "\\" in value:
        raise ValueError("a name becomes a folder in runs/, so it has no slash: give the place with --out")
    return value


Control = Literal["bottom", "all", "reverse", "unrelated", "self"]
GraftedKind = Literal["linear", "head", "neuron", "mlp", "attn", "block", "part"]


class SideEffectSpec(Strict):
    """What grafts are measured on besides the task; ``questions: 0`` and ``texts: 0`` leave a part out."""

    #: names of tasks; the pair's other ones by default
    tasks: tuple[str, ...] | None = None
    questions: int = Field(default=256, ge=0)
    #: how many texts the target writes, and how long; or a file of texts
    texts: int = Field(default=64, ge=0)
    tokens: int = Field(default=64, ge=2)
    file: str | None = None
    #: how many of the headline's random sets are measured too
    random: int = Field(default=10, ge=0)

    @model_validator(mode="after")
    def _asks(self) -> SideEffectSpec:
        if self.tasks and not self.questions:
            raise ValueError("side_effects: tasks are named and questions is 0: give a number, or leave tasks out")
        return self


class GateSpec(Strict):
    """Grafts are in place only for questions that a gate lets through (see ``grafting.fit_gate``)."""

    #: whose residual stream is read; the middle one by default
    layer: int | None = Field(default=None, ge=0)
    #: how many neutral texts it is fitted to be closed for, and how long
    texts: int = Field(default=64, ge=2)
    tokens: int = Field(default=64, ge=2)
    #: names of other tasks that it is fitted to be closed for
    tasks: tuple[str, ...] = ()


class RunConfig(Strict):
    """One run: a pair, a task, rules, a sweep over K and strength, and its controls.

    ``k`` holds numbers of modules (whole) or shares of all candidates (up to 1.0); ``budgets`` token budgets, of which
    the largest decides the choice. ``random_sets`` is how many matched sets the reported K is compared with,
    ``curve_sets`` how many random orders the other K are; both for every rule, or for the ``controlled`` ones.
    ``kv`` and ``operator`` are a graft's (see ``grafting``); with a ``gate`` every graft of the run is conditional.
    """

    name: str = "run"
    pair: str | PairSpec
    task: str | TaskSpec | None = None
    split: SplitSpec = SplitSpec()
    rule: str | tuple[str, ...] = "lae"
    rule_options: dict[str, Any] = {}
    kind: GraftedKind | tuple[GraftedKind, ...] = "linear"
    k: tuple[int | float, ...] = PAPER_SHARES
    strengths: tuple[float, ...] = (1.0,)
    #: what K and strength are chosen by, on ``choose``
    choose_by: Literal["accuracy", "log_probability"] = "accuracy"
    #: the largest share of the parameters in linear layers that a chosen graft may change
    parameters: float | None = Field(default=None, gt=0, le=1)
    kv: Literal["never", "group", "whole-group"] = "never"
    operator: str | dict[str, Any] = "replace"
    gate: GateSpec | None = None
    budgets: tuple[int, ...] | None = None
    random_sets: int = Field(default=100, ge=0)
    #: whether random sets and orders have as many of each projection too, beside kind, depth and parameters
    random_match: Literal["size", "projection"] = "size"
    curve_sets: int = Field(default=20, ge=0)
    #: strengths among which, and the graft's, the one that suits random sets best on ``choose`` is found
    random_strengths: tuple[float, ...] = ()
    #: of a rule that fits strengths: how many random sets have strengths fitted to them too
    refitted_sets: int = Field(default=0, ge=0)
    #: with TIES, which keeps the largest changes: how many grafts change as many of the same modules' numbers at random
    random_weights: int = Field(default=0, ge=0)
    controlled: tuple[str, ...] | None = None
    controls: tuple[Control, ...] = ("bottom", "all", "reverse", "unrelated", "self")
    #: the task whose ranking is the unrelated control; the pair's first other one by default
    unrelated: str | None = None
    side_effects: SideEffectSpec | None = SideEffectSpec()
    direction: Literal["named", "better"] = "named"
    batch_size: int = Field(default=64, ge=1)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: Device = "cpu"
    #: for models that do not fit into memory together (see ``pair.load_pair``)
    one_at_a_time: bool = False
    #: for models that do not fit on one device: "auto", or part → device (see ``weights.spread``)
    device_map: Literal["auto"] | dict[str, str | int] | None = None
    threads: int | None = Field(default=None, ge=1)
    seed: int = Field(default=42, ge=0)

    @field_validator("k", "strengths", "random_strengths", "budgets", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        values = [value] if isinstance(value, int | float) else value
        if isinstance(values, list | tuple) and any(isinstance(v, bool) for v in values):
            raise ValueError("expected numbers")
        return values

    _a_folder = field_validator("name")(folder_name)

    @model_validator(mode="before")
    @classmethod
    def _map_for_auto(cls, content: Any) -> Any:
        # "auto" chooses where a map has not: the map is followed, and no folder notes a device that nothing is on
        if isinstance(content, dict) and content.get("device") == "auto" and content.get("device_map") is not None:
            return {**content, "device": "cpu"}
        return content

    @model_validator(mode="after")
    def _rules(self) -> RunConfig:
        repeated = [r for r in self.rules if self.rules.count(r) > 1]
        if not self.rules or repeated:
            raise ValueError("rule: name a rule, or a list of different ones")
        strange = [r for r in self.controlled or () if r not in self.rules]
        if strange:
            raise ValueError(f"controlled: {strange[0]} is none of the rules {', '.join(self.rules)}")
        if len(self.rules) > 1:
            for key, value in self.rule_options.items():
                if key not in self.rules or not isinstance(value, dict):
                    raise ValueError(f"rule_options.{key}: with several rules, map each rule to its options")
        return self

    @property
    def rules(self) -> tuple[str, ...]:
        """The rules, the first of which is the headline."""
        return (self.rule,) if isinstance(self.rule, str) else self.rule

    @property
    def kinds(self) -> tuple[GraftedKind, ...]:
        """The kinds of modules that are ranked together."""
        return (self.kind,) if isinstance(self.kind, str) else self.kind

    def options_of(self, rule: str) -> dict[str, Any]:
        """A rule's options."""
        return dict(self.rule_options if len(self.rules) == 1 else self.rule_options.get(rule, {}))

    @property
    def with_controls(self) -> tuple[str, ...]:
        """The rules that have random sets and the other controls of their own."""
        return self.rules if self.controlled is None else self.controlled

    @model_validator(mode="after")
    def _sensible(self) -> RunConfig:
        if not self.k or not self.strengths or self.budgets == ():
            raise ValueError("k, strengths and budgets each need at least one number")
        for k in self.k:
            if k <= 0 or (isinstance(k, float) and k > 1):
                raise ValueError(f"k = {k}: give whole numbers of modules, or shares above 0 and up to 1.0")
        if self.budgets and min(self.budgets) < 1:
            raise ValueError("budgets are numbers of tokens, at least 1")
        return self

    def counts(self, candidates: int) -> list[int]:
        """K in modules, ascending; raises UsageError for a K above the number of candidates."""
        counts = sorted({k if isinstance(k, int) else max(1, round(k * candidates)) for k in self.k})
        if counts[-1] > candidates:
            raise UsageError(
                f"k = {counts[-1]} is above the {candidates} candidates of kind {' and '.join(self.kinds)}: "
                f"ask for at most {candidates}"
            )
        return counts


def read_config(path: str | Path) -> RunConfig:
    """The configuration in a YAML file; raises UsageError with one line for anything wrong in it."""
    return parse_config(read_mapping(path), str(path))


def read_mapping(path: str | Path) -> dict[str, Any]:
    """The keys and values in a YAML file; raises UsageError where it is none."""
    import yaml

    path = Path(path)
    if not path.is_file():
        raise UsageError(
            f"no config at {path}: give the path of a YAML file, for example configs/family-generations.yaml"
        )
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _unique_keys())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise UsageError(
            f"{path}{where}: not valid YAML ({getattr(error, 'problem', None) or error}): fix it"
        ) from error
    if not isinstance(content, dict):
        raise UsageError(f"{path}: expected keys and values (pair: …, task: …), got {type(content).__name__}")
    return content


def _unique_keys() -> Any:
    """YAML's safe loader, which refuses a key that is given twice instead of taking the last."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            # a merge key (<<) is no key of its own
            named = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
            keys = [self.construct_object(key, deep=True) for key in named]
            for at, key in enumerate(keys):
                if key in keys[:at]:
                    raise yaml.MarkedYAMLError(
                        problem=f"the key {key!r} is given twice", problem_mark=named[at].start_mark
                    )
            return super().construct_mapping(node, deep)

    return Loader


def parse_config(content: dict[str, Any], where: str = "config") -> RunConfig:
    """A run's configuration from a mapping; raises UsageError naming the first wrong key."""
    return parse_as(RunConfig, content, where)


def on_device(config: Config, device: str | None) -> Config:
    """The configuration on a device, or as it is where none is given, or "auto" beside a map of devices."""
    if device is None or (device == "auto" and getattr(config, "device_map", None) is not None):
        return config
    return config.model_copy(update={"device": _chosen(device)})


def parse_as(model: type[Config], content: dict[str, Any], where: str) -> Config:
    """A configuration of a kind from a mapping; raises UsageError naming the first wrong key."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        # a union reports each member's failure; the deepest one names the key that the user wrote
        first = max(error.errors(), key=lambda e: (e["type"] == "extra_forbidden", len(e["loc"])))
        # places in the file are keys and numbers; a union's members and a literal's values are pydantic's own words
        unknown = first["type"] == "extra_forbidden"
        places = first["loc"][:-1] if unknown else first["loc"]
        parts: list[type[BaseModel]] = [model, *_INSIDE.values()]
        known_keys = {key for part in parts for key in part.model_fields}
        path = [str(p) for p in places if str(p) in known_keys or isinstance(p, int)]
        if unknown:
            key = str(first["loc"][-1])
            inside = [_INSIDE[key] for key in path if key in _INSIDE]
            known = list((inside[-1] if inside else model).model_fields)
            near = difflib.get_close_matches(key, known, n=1) or [k for k in known if k.startswith(key[:6])][:1]
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}."
            raise UsageError(f"{where}: unknown key {'.'.join([*path, key])!r}: {hint}") from error
        message = first["msg"].removeprefix("Value error, ")
        if not path:
            # a validator of the whole config names its key
            raise UsageError(f"{where}: {message}") from error
        key = ".".join(path)
        raise UsageError(f"{where}: {key}: {message} (got {str(first['input'])[:60]!r}); fix this key") from error


#: key → what it holds
_INSIDE: dict[str, type[BaseModel]] = {
    "pair": PairSpec,
    "task": TaskSpec,
    "format": FormatSpec,
    "split": SplitSpec,
    "side_effects": SideEffectSpec,
    "gate": GateSpec,
}
