"""The source reads what the target reads, pass by pass, with a key-value cache of its own beside the target's."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from mechtransplant.errors import UsageError
from mechtransplant.patching.passes import Pass
from mechtransplant.patching.sites import Body, Site

if TYPE_CHECKING:
    from torch import Tensor


class Lockstep:
    """Runs the source just before every pass of the target, and holds its activations at some sites.

    With ``remember`` a pass without a cache that reads what the last one read is not run again.
    """

    def __init__(self, source: Body, sites: Iterable[Site], remember: bool = False) -> None:
        self.source, self.remember = source, remember
        self._last: Pass | None = None
        self.seen: dict[Site, Tensor] = {}
        self.running = False
        #: the target's cache → the source's
        self._caches: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
        self._unclaimed: Any = None
        self._ends: list[Callable[[], None]] = []
        for site in sites:
            self._ends.append(source.listen(site, self._keeper(site)))

    def _keeper(self, site: Site) -> Callable[[Tensor], None]:
        def keep(tensor: Tensor) -> None:
            # in a pair of one model with itself, the target's own passes come by here too
            if self.running:
                self.seen[site] = tensor.detach()

        return keep

    def follow(self, now: Pass) -> None:
        """Run the source on a pass that the target is about to run."""
        import torch

        if self.remember and self._last is not None and _same_text(self._last, now):
            return
        self.seen.clear()
        root = self.source.root
        keywords = {k: v for k, v in now.keywords.items() if k not in ("input_ids", "past_key_values", "labels")}
        keywords["past_key_values"] = self._cache_for(now)
        if self.source.bridge is None:
            keywords["logits_to_keep"] = 1
        elif hasattr(self.source.bridge, "pos_embed"):
            # what the bridge's own forward does before it calls the model
            self.source.bridge.pos_embed._current_batch_size = now.ids.shape[0]
        self.running = True
        try:
            with torch.no_grad():
                output = root(now.ids, **keywords)
        finally:
            self.running = False
        self._unclaimed = getattr(output, "past_key_values", None) if now.past is None else None
        self._last = now if now.past is None else None

    def _cache_for(self, now: Pass) -> Any:
        from transformers import DynamicCache

        if now.past is None:
            return None
        if now.prompt:
            self._caches[now.past] = DynamicCache(config=self.source.model.hf.config)
        elif now.past not in self._caches:
            raise UsageError(
                "this key-value cache was filled outside the patch, so the source has not read its tokens: begin with "
                "the prompt inside the block"
            )
        return self._caches[now.past]

    def claim(self, output: Any) -> None:
        """After the target's pass: a cache that the target made belongs to the one that the source made."""
        made = getattr(output, "past_key_values", None)
        if made is not None and self._unclaimed is not None:
            self._caches[made] = self._unclaimed
        self._unclaimed = None
        if not self.remember:
            self.seen.clear()

    def close(self) -> None:
        """Stop listening."""
        while self._ends:
            self._ends.pop()()


def _same_text(one: Pass, other: Pass) -> bool:
    import torch

    alike = one.past is None and other.past is None and one.ids.shape == other.ids.shape
    return alike and torch.equal(one.ids, other.ids) and torch.equal(one.real, other.real)
