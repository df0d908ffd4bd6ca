"""Wrong functions with right twins that were written before any check saw them: the honest part of the score.

Each set was complete, its right twins tested with torch's own gradcheck, before torchbp.gradcheck ran on it for the
first time. What that first run said stands in docs/gradcheck.md; checks were then made more general. A twin that proved
to be wrong itself was mended.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch

from tests.device import DEVICE

F64 = torch.float64


@dataclass(frozen=True)
class Unseen:
    name: str
    bug: str
    wrong: Callable[..., Any]
    right: Callable[..., Any]
    make: Callable[[], tuple[Any, ...]]
    kwargs: Callable[[], dict[str, Any]] = field(default=dict)
    missed: str = ""  # why gradcheck still misses it


def outside_autocast(function):
    """Return the function as it is outside of torch.autocast, under which it was not meant to be called."""

    @wraps(function)
    def call(*args, **kwargs):
        with torch.autocast(DEVICE, enabled=False):
            return function(*args, **kwargs)

    return call


FIRST: dict[str, Unseen] = {}
SECOND: dict[str, Unseen] = {}
THIRD: dict[str, Unseen] = {}
FOURTH: dict[str, Unseen] = {}
FIFTH: dict[str, Unseen] = {}
SIXTH: dict[str, Unseen] = {}
SEVENTH: dict[str, Unseen] = {}
EIGHTH: dict[str, Unseen] = {}
NINTH: dict[str, Unseen] = {}
TENTH: dict[str, Unseen] = {}
ELEVENTH: dict[str, Unseen] = {}
TWELFTH: dict[str, Unseen] = {}
THIRTEENTH: dict[str, Unseen] = {}
FOURTEENTH: dict[str, Unseen] = {}
FIFTEENTH: dict[str, Unseen] = {}
SIXTEENTH: dict[str, Unseen] = {}
SEVENTEENTH: dict[str, Unseen] = {}
EIGHTEENTH: dict[str, Unseen] = {}
NINETEENTH: dict[str, Unseen] = {}
TWENTIETH: dict[str, Unseen] = {}
TWENTYFIRST: dict[str, Unseen] = {}
TWENTYSECOND: dict[str, Unseen] = {}
TWENTYTHIRD: dict[str, Unseen] = {}
TWENTYFOURTH: dict[str, Unseen] = {}
TWENTYFIFTH: dict[str, Unseen] = {}
TWENTYSIXTH: dict[str, Unseen] = {}
TWENTYSEVENTH: dict[str, Unseen] = {}
TWENTYEIGHTH: dict[str, Unseen] = {}
TWENTYNINTH: dict[str, Unseen] = {}
THIRTIETH: dict[str, Unseen] = {}
THIRTYFIRST: dict[str, Unseen] = {}
THIRTYSECOND: dict[str, Unseen] = {}
THIRTYTHIRD: dict[str, Unseen] = {}
THIRTYFOURTH: dict[str, Unseen] = {}
THIRTYFIFTH: dict[str, Unseen] = {}
THIRTYSIXTH: dict[str, Unseen] = {}
THIRTYSEVENTH: dict[str, Unseen] = {}
THIRTYEIGHTH: dict[str, Unseen] = {}
THIRTYNINTH: dict[str, Unseen] = {}
FORTIETH: dict[str, Unseen] = {}
FORTYFIRST: dict[str, Unseen] = {}
FORTYSECOND: dict[str, Unseen] = {}
SETS = {
    "first set of unseen wrong functions": FIRST,
    "second set": SECOND,
    "third set": THIRD,
    "fourth set": FOURTH,
    "fifth set": FIFTH,
    "sixth set": SIXTH,
    "seventh set": SEVENTH,
    "eighth set": EIGHTH,
    "ninth set": NINTH,
    "tenth set": TENTH,
    "eleventh set": ELEVENTH,
    "twelfth set": TWELFTH,
    "thirteenth set": THIRTEENTH,
    "fourteenth set": FOURTEENTH,
    "fifteenth set": FIFTEENTH,
    "sixteenth set": SIXTEENTH,
    "seventeenth set": SEVENTEENTH,
    "eighteenth set": EIGHTEENTH,
    "nineteenth set": NINETEENTH,
    "twentieth set": TWENTIETH,
    "twenty-first set": TWENTYFIRST,
    "twenty-second set": TWENTYSECOND,
    "twenty-third set": TWENTYTHIRD,
    "twenty-fourth set": TWENTYFOURTH,
    "twenty-fifth set": TWENTYFIFTH,
    "twenty-sixth set": TWENTYSIXTH,
    "twenty-seventh set": TWENTYSEVENTH,
    "twenty-eighth set": TWENTYEIGHTH,
    "twenty-ninth set": TWENTYNINTH,
    "thirtieth set": THIRTIETH,
    "thirty-first set": THIRTYFIRST,
    "thirty-second set": THIRTYSECOND,
    "thirty-third set": THIRTYTHIRD,
    "thirty-fourth set": THIRTYFOURTH,
    "thirty-fifth set": THIRTYFIFTH,
    "thirty-sixth set": THIRTYSIXTH,
    "thirty-seventh set": THIRTYSEVENTH,
    "thirty-eighth set": THIRTYEIGHTH,
    "thirty-ninth set": THIRTYNINTH,
    "fortieth set": FORTIETH,
    "forty-first set": FORTYFIRST,
    "forty-second set": FORTYSECOND,
}


def every():
    """Import the files, which fill the sets."""
    from tests.verify.unseen import (  # noqa: F401
        eighteenth_algebra,
        eighteenth_caffe,
        eighteenth_elementwise,
        eighteenth_interpolation,
        eighteenth_layers,
        eighteenth_losses,
        eighteenth_networks,
        eighteenth_pooling,
        eighteenth_products,
        eighteenth_regression,
        eighteenth_rendering,
        eighteenth_sequences,
        eighteenth_solutions,
        eighteenth_splats,
        eighteenth_sums,
        eighth,
        eleventh_algebra,
        eleventh_attention,
        eleventh_layers,
        eleventh_physics,
        eleventh_protocol,
        eleventh_vision,
        fifteenth_activations,
        fifteenth_algebra,
        fifteenth_attention,
        fifteenth_bodies,
        fifteenth_filters,
        fifteenth_geometry,
        fifteenth_heads,
        fifteenth_indices,
        fifteenth_interpolation,
        fifteenth_likelihoods,
        fifteenth_losses,
        fifteenth_norms,
        fifteenth_pooling,
        fifteenth_products,
        fifteenth_scans,
        fifteenth_signals,
        fifteenth_statistics,
        fifth,
        fifth_algebra,
        fifth_attention,
        fifth_indices,
        fifth_losses,
        fifth_scans,
        fortieth_algebra,
        fortieth_elementwise,
        fortieth_geometry,
        fortieth_layers,
        fortieth_losses,
        fortieth_sequences,
        fortyfirst_algebra,
        fortyfirst_elementwise,
        fortyfirst_geometry,
        fortyfirst_layers,
        fortyfirst_losses,
        fortyfirst_sequences,
        fortysecond_coverage,
        fortysecond_formula,
        fortysecond_layout,
        fortysecond_precision,
        fortysecond_state,
        fortysecond_transforms,
        fortysecond_upstream,
        fourteenth_algebra,
        fourteenth_densities,
        fourteenth_drafts,
        fourteenth_elementwise,
        fourteenth_graphs,
        fourteenth_habits,
        fourteenth_layers,
        fourteenth_losses,
        fourteenth_mechanics,
        fourteenth_objectives,
        fourteenth_recurrent,
        fourteenth_rendering,
        fourteenth_scans,
        fourteenth_statistics,
        fourth,
        fourth_indices,
        fourth_layers,
        fourth_losses,
        indexing,
        layers,
        layers_weighted,
        linear_algebra,
        losses,
        losses_weighted,
        nineteenth_convolution,
        nineteenth_layers,
        nineteenth_logistic,
        nineteenth_losses,
        nineteenth_matrices,
        nineteenth_networks,
        nineteenth_neurons,
        nineteenth_rotations,
        nineteenth_scalars,
        nineteenth_sequences,
        nineteenth_softmaxes,
        nineteenth_statistics,
        nineteenth_traces,
        ninth,
        numerics,
        protocol,
        second_algebra,
        second_functions,
        second_state,
        second_transforms,
        seventeenth_activations,
        seventeenth_algebra,
        seventeenth_attention,
        seventeenth_blocks,
        seventeenth_divergences,
        seventeenth_fields,
        seventeenth_geometry,
        seventeenth_images,
        seventeenth_layers,
        seventeenth_losses,
        seventeenth_meshes,
        seventeenth_physics,
        seventeenth_sequences,
        seventeenth_soft,
        seventeenth_transforms,
        seventh,
        sixteenth_activations,
        sixteenth_algebra,
        sixteenth_attention,
        sixteenth_densities,
        sixteenth_dynamics,
        sixteenth_heads,
        sixteenth_indices,
        sixteenth_interpolation,
        sixteenth_layers,
        sixteenth_losses,
        sixteenth_norms,
        sixteenth_scans,
        sixteenth_signals,
        sixteenth_softmaxes,
        sixth,
        sixth_algebra,
        sixth_attention,
        sixth_layers,
        sixth_losses,
        sixth_norms,
        sixth_physics,
        tenth,
        third,
        third_layers,
        thirteenth_algebra,
        thirteenth_attention,
        thirteenth_convolution,
        thirteenth_geometry,
        thirteenth_losses,
        thirteenth_norms,
        thirteenth_orders,
        thirteenth_parallel,
        thirteenth_points,
        thirteenth_pooling,
        thirteenth_powers,
        thirteenth_scans,
        thirteenth_sequences,
        thirtieth_elementwise,
        thirtieth_geometry,
        thirtieth_indices,
        thirtieth_layers,
        thirtieth_losses,
        thirtieth_protocol,
        thirtieth_sequences,
        thirtyeighth_coverage,
        thirtyeighth_formula,
        thirtyeighth_precision,
        thirtyeighth_state,
        thirtyeighth_transforms,
        thirtyeighth_upstream,
        thirtyfifth_algebra,
        thirtyfifth_elementwise,
        thirtyfifth_indices,
        thirtyfifth_layers,
        thirtyfifth_sequences,
        thirtyfirst_attention,
        thirtyfirst_layers,
        thirtyfirst_losses,
        thirtyfirst_physics,
        thirtyfirst_sequences,
        thirtyfourth_algebra,
        thirtyfourth_geometry,
        thirtyfourth_layers,
        thirtyfourth_losses,
        thirtyfourth_sequences,
        thirtyninth_coverage,
        thirtyninth_formula,
        thirtyninth_layout,
        thirtyninth_precision,
        thirtyninth_state,
        thirtyninth_transforms,
        thirtyninth_upstream,
        thirtysecond_attention,
        thirtysecond_layers,
        thirtysecond_losses,
        thirtysecond_physics,
        thirtysecond_sequences,
        thirtyseventh_indices,
        thirtyseventh_layers,
        thirtyseventh_losses,
        thirtyseventh_protocol,
        thirtyseventh_rules,
        thirtysixth_attention,
        thirtysixth_geometry,
        thirtysixth_layers,
        thirtysixth_losses,
        thirtysixth_numerics,
        thirtythird_elementwise,
        thirtythird_layers,
        thirtythird_losses,
        thirtythird_places,
        thirtythird_protocol,
        thirtythird_sequences,
        transforms,
        twelfth_attention,
        twelfth_geometry,
        twelfth_layers,
        twelfth_losses,
        twelfth_numerics,
        twelfth_objectives,
        twelfth_scans,
        twentieth_alignment,
        twentieth_experts,
        twentieth_graphs,
        twentieth_losses,
        twentieth_norms,
        twentieth_protocol,
        twentieth_rendering,
        twentieth_rotary,
        twentieth_scans,
        twentieth_signals,
        twentieth_solvers,
        twentieth_transport,
        twentyeighth_algebra,
        twentyeighth_functions,
        twentyeighth_geometry,
        twentyeighth_physics,
        twentyeighth_points,
        twentyeighth_selection,
        twentyeighth_statistics,
        twentyfifth_algebra,
        twentyfifth_attention,
        twentyfifth_elementwise,
        twentyfifth_geometry,
        twentyfifth_layers,
        twentyfifth_losses,
        twentyfifth_protocol,
        twentyfifth_sequences,
        twentyfifth_statistics,
        twentyfirst_attention,
        twentyfirst_colour,
        twentyfirst_finance,
        twentyfirst_geometry,
        twentyfirst_layers,
        twentyfirst_losses,
        twentyfirst_numerics,
        twentyfirst_physics,
        twentyfirst_protocol,
        twentyfirst_recurrence,
        twentyfirst_signals,
        twentyfirst_statistics,
        twentyfourth_calls,
        twentyfourth_coverage,
        twentyfourth_families,
        twentyfourth_layers,
        twentyfourth_losses,
        twentyfourth_promises,
        twentyfourth_signals,
        twentyninth_elementwise,
        twentyninth_geometry,
        twentyninth_indices,
        twentyninth_layers,
        twentyninth_losses,
        twentyninth_sequences,
        twentyninth_values,
        twentysecond_activations,
        twentysecond_algebra,
        twentysecond_attention,
        twentysecond_indices,
        twentysecond_layers,
        twentysecond_losses,
        twentysecond_norms,
        twentysecond_physics,
        twentysecond_sequences,
        twentysecond_signals,
        twentyseventh_activations,
        twentyseventh_attention,
        twentyseventh_classes,
        twentyseventh_experts,
        twentyseventh_layers,
        twentyseventh_losses,
        twentyseventh_norms,
        twentyseventh_protocol,
        twentyseventh_sequences,
        twentyseventh_steps,
        twentysixth_activations,
        twentysixth_algebra,
        twentysixth_geometry,
        twentysixth_layers,
        twentysixth_losses,
        twentysixth_places,
        twentysixth_sequences,
        twentysixth_signals,
        twentysixth_tables,
        twentythird_edges,
        twentythird_functions,
        twentythird_layouts,
        twentythird_losses,
        twentythird_modules,
        twentythird_orders,
        twentythird_precision,
        twentythird_protocol,
        twentythird_state,
    )

    return {name: p for pairs in SETS.values() for name, p in pairs.items()}


def pair(name, wrong, right, make, bug, kwargs=dict, into=FIRST, missed=""):
    into[name] = Unseen(name, bug, wrong, right, make, kwargs, missed)


def real(*shape, seed=0, grad=True, positive=False):
    """One random float64 tensor, as a user would write it."""
    t = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return (t.abs() + 0.1 if positive else t).requires_grad_(grad)


def whole(below, *shape, seed=0):
    """Random integers."""
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(seed))
