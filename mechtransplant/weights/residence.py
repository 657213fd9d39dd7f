"""Models of which one at a time has its weights in memory; those of the others lie in files.

A model that is *away* can be looked at: its parameters are the file's own numbers, on the CPU, read when they are used.
Before a model runs it is called (:func:`awaken`), and the one that was there goes away. Parameters stay the same
objects, so whoever holds them (a bridge over the same parameters) sees where they are.

What was written into a model's parameters while it was there goes to its file with it. While a graft is in place its
model stays, since what the graft will restore are the tensors that it wrote into.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mechtransplant.errors import UsageError
from mechtransplant.weights.tensor_file import Place, TensorFile, bits_of

if TYPE_CHECKING:
    import torch


@dataclass(eq=False)
class Residence:
    """Room for one of several models, on the ``device`` that they run on."""

    device: torch.device | None = None
    models: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet)
    #: who is there, if anyone
    resident: weakref.ref[Any] | None = None
    #: how many grafts are in place in it
    pins: int = 0


@dataclass(eq=False)
class Tenant:
    """A model's file, and in which state its parameters were last seen."""

    residence: Residence
    file: TensorFile
    places: dict[str, Place]
    #: parameter → (its memory, how often it was written to)
    seen: dict[str, tuple[int, int]] = field(default_factory=dict)
    #: how often the parameters were given other memory
    moves: int = 0


_TENANTS: weakref.WeakKeyDictionary[Any, Tenant] = weakref.WeakKeyDictionary()


def admit(hf: Any, residence: Residence) -> None:
    """Write a model's parameters to a file and send it away; from then on :func:`awaken` calls it.

    Raises UsageError where the temporary folder has too little room.
    """
    import torch

    residence.device = residence.device or hf.device
    parameters = dict(hf.named_parameters())
    file = TensorFile("weights", sum(p.numel() * p.element_size() for p in parameters.values()))
    places: dict[str, Place] = {}
    known: dict[tuple[Any, ...], Place] = {}
    for name, parameter in parameters.items():
        # two that share their numbers go on doing so
        memory = (parameter.untyped_storage().data_ptr(), parameter.storage_offset(), parameter.shape)
        places[name] = known[memory] if memory in known else file.add(parameter)
        known[memory] = places[name]
    tenant = _TENANTS[hf] = Tenant(residence, file, places)
    residence.models.add(hf)
    _put(hf, tenant, torch.device("cpu"))
    hf.register_forward_pre_hook(arriving, with_kwargs=True)


def arriving(hf: Any, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    """Before a pass that somebody begins by hand: the model is called, and what it reads goes where it runs."""
    import torch

    awaken(hf)
    device = runs_on(hf)

    def moved(value: Any) -> Any:
        return value.to(device) if isinstance(value, torch.Tensor) else value

    return tuple(map(moved, inputs)), {key: moved(value) for key, value in keywords.items()}


def awaken(hf: Any) -> None:
    """Have a model's parameters where it runs; of a pair that is loaded one at a time, the other model goes away.

    Raises UsageError where a graft is in place in the other one.
    """
    import torch

    tenant = _TENANTS.get(hf)
    if tenant is None:
        return
    residence = tenant.residence
    there = None if residence.resident is None else residence.resident()
    if there is hf:
        return
    if residence.pins:
        raise UsageError(
            "a graft is in place, and only one of the two models is in memory: leave the graft's block before the "
            "other model is used, or load the pair without one_at_a_time"
        )
    for model in residence.models:
        _write_back(model, _TENANTS[model], everything=model is there)
    # an interrupt may come between any two lines
    residence.resident = None
    for model in residence.models:
        # those that were away as well: what was looked at since is in memory
        if model is not hf:
            _put(model, _TENANTS[model], torch.device("cpu"))
    _put(hf, tenant, residence.device or hf.device)
    residence.resident = weakref.ref(hf)


def pin(hf: Any) -> None:
    """A graft is in place in a model: it has to stay."""
    awaken(hf)
    if hf in _TENANTS:
        _TENANTS[hf].residence.pins += 1


def unpin(hf: Any) -> None:
    """The opposite of :func:`pin`, once."""
    if hf in _TENANTS:
        _TENANTS[hf].residence.pins -= 1


def takes_turns(hf: Any) -> bool:
    """Whether a model is one of those that are in memory one at a time."""
    return hf in _TENANTS


def moves(hf: Any) -> int:
    """How often a model's parameters were given other memory: what holds views of them is then out of date."""
    tenant = _TENANTS.get(hf)
    return 0 if tenant is None else tenant.moves


def is_here(hf: Any) -> bool:
    """Whether a model's parameters are where it runs."""
    tenant = _TENANTS.get(hf)
    return tenant is None or (tenant.residence.resident is not None and tenant.residence.resident() is hf)


def runs_on(hf: Any) -> torch.device:
    """The device that a model runs on, wherever its parameters are now."""
    tenant = _TENANTS.get(hf)
    there = None if tenant is None else tenant.residence.device
    return there or hf.device  # type: ignore[no-any-return]


@contextmanager
def lent(module: Any, hf: Any) -> Iterator[None]:
    """A module of a model that may be away, with its parameters where it runs for the length of a block."""
    device = runs_on(hf)
    moved = [(p, p.data) for p in module.parameters() if p.device != device] if takes_turns(hf) else []
    try:
        for parameter, _ in moved:
            parameter.data = parameter.data.to(device)
        yield
    finally:
        for parameter, before in moved:
            parameter.data = before


def _put(hf: Any, tenant: Tenant, device: torch.device) -> None:
    """Parameters become the file's, on a device; a new map, since the old one's pages were read, or written to."""
    parameters, mapped = dict(hf.named_parameters()), tenant.file.mapped()
    made: dict[Place, Any] = {}
    for name, place in tenant.places.items():
        if place not in made:
            made[place] = mapped[place].to(device)
        parameters[name].data = made[place]
    tenant.moves += 1
    tenant.seen = {name: (p.data_ptr(), p._version) for name, p in parameters.items()}


def _write_back(hf: Any, tenant: Tenant, everything: bool) -> None:
    """Put into the file what was written into the parameters.

    Writes by way of ``.data`` leave no mark, so all that a model had in memory is compared; of one that was away, what
    has a mark.
    """
    import torch

    mapped = tenant.file.mapped()
    for name, parameter in hf.named_parameters():
        if not everything and tenant.seen.get(name) == (parameter.data_ptr(), parameter._version):
            continue
        place = tenant.places.get(name)
        if place is None or (parameter.dtype, tuple(parameter.shape)) != (place.dtype, place.shape):
            raise UsageError(
                f"{name} is new, or was given another dtype or shape, which a pair that is loaded one at a time cannot "
                "keep: load it without one_at_a_time"
            )
        if not torch.equal(bits_of(parameter), bits_of(mapped[place])):
            tenant.file.put(place, parameter)
