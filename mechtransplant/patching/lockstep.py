"""The source reads what the target reads, pass by pass, with a key-value cache of its own beside the target's."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from mechtransplant.errors import UsageError
from mechtransplant.evaluation.batches import scored
from mechtransplant.patching.passes import Pass
from mechtransplant.patching.sites import Body, Site

if TYPE_CHECKING:
    from torch import Tensor


class Lockstep:
    """Runs the source just before every pass of the target, and holds its activations at some sites.

    With ``remember`` a pass without a cache that reads what the last one read is not run again.
    """

    def __init__(self, source: Body, sites: Iterable[Site], remember: bool = False) -> None:
        self.source, self.remember, self.sites = source, remember, list(sites)
        self._last: Pass | None = None
        self.seen: dict[Site, Tensor] = {}
        self.running = False
        #: whether the source is another model than the target, with a bridge of its own
        self.own = True
        #: the target's cache → the source's
        self._caches: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
        self._unclaimed: Any = None
        self._ends: list[Callable[[], None]] = []
        self._listen()

    def _listen(self) -> None:
        for site in self.sites:
            self._ends.append(self.source.listen(site, self._keeper(site)))

    def _renew(self) -> None:
        """Move to the source's present bridge, if it was made again since (see ``LanguageModel.weights_changed``)."""
        current = self.source.model.__dict__.get("bridge")
        if self.source.bridge is not None and current is not self.source.bridge and self.own:
            self.close()
            self.source = Body(self.source.model, self.source.model.bridge)
            self._listen()

    def _keeper(self, site: Site) -> Callable[[Tensor], None]:
        def keep(tensor: Tensor) -> None:
            # in a pair of one model with itself, the target's own passes come by here too
            if self.running:
                # a copy: some blocks (Falcon's) add to their MLP's output in place
                self.seen[site] = tensor.detach().clone()

        return keep

    def follow(self, now: Pass) -> None:
        """Run the source on a pass that the target is about to run."""
        import torch

        if self.remember and self._last is not None and _same_text(self._last, now):
            return
        self.seen.clear()
        self._renew()
        root = self.source.root
        keywords = {k: v for k, v in now.keywords.items() if k not in ("input_ids", "past_key_values", "labels")}
        keywords["past_key_values"] = self._cache_for(now)
        if self.source.bridge is None:
            keywords["logits_to_keep"] = scored(now.ids, now.ids.shape[1] - 1, now.ids.shape[1])
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
            self._join(now.past, DynamicCache(config=self.source.model.hf.config))
        held = self._caches.get(now.past)
        if held is None or held.get_seq_length() != now.past.get_seq_length():
            raise UsageError(
                "this key-value cache was filled or changed outside the patch, so the source has not read the same "
                "tokens: begin with the prompt inside the block"
            )
        return held

    def _join(self, ours: Any, theirs: Any) -> None:
        """Hold the source's cache beside the target's; what is done to the target's is done to it (beam search)."""
        if not isinstance(getattr(ours, "layers", None), list) or not hasattr(ours, "reorder_cache"):
            raise UsageError(f"a patch needs a dynamic key-value cache, got {type(ours).__name__}")
        joined = ours in self._caches
        self._caches[ours] = theirs
        if joined:
            return
        caches = self._caches
        reference = weakref.ref(ours)
        for name in ("reorder_cache", "batch_select_indices", "batch_repeat_interleave", "crop", "reset"):
            done = getattr(type(ours), name, None)
            if done is None:
                continue

            # by a weak reference: a cache that holds itself would live until the next garbage collection
            def both(*arguments: Any, done: Callable[..., Any] = done, name: str = name) -> Any:
                cache = reference()
                held = caches.get(cache)
                if held is not None:
                    getattr(held, name)(*arguments)
                return done(cache, *arguments)

            setattr(ours, name, both)

    def claim(self, output: Any) -> None:
        """After the target's pass: a cache that the target made belongs to the one that the source made."""
        made = getattr(output, "past_key_values", None)
        if made is not None and self._unclaimed is not None:
            self._join(made, self._unclaimed)
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
