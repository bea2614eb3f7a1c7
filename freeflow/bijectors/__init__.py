"""Bijectors: invertible maps of one configuration with their log det Jacobians.

`core` combines them and holds what is linear; `splines` and `circle` hold elementwise maps, which
`coupling` drives with a conditioner network. `chain(...)` them into a flow.
"""

from freeflow.bijectors.circle import laps, moebius, wrap
from freeflow.bijectors.core import (
    Elementwise,
    affine,
    at,
    chain,
    compose,
    elementwise,
    identity,
    invert,
    mean_free,
    repeat,
    scaled,
    shift,
    sinh_arcsinh,
    whitened,
)
from freeflow.bijectors.coupling import augmented_coupling, axis_coupling, coupling, leaf_coupling
from freeflow.bijectors.splines import (
    circular_spline,
    interval_spline,
    inverse_rational_quadratic,
    line_spline,
    rational_quadratic,
)

__all__ = [
    "Elementwise",
    "affine",
    "at",
    "augmented_coupling",
    "axis_coupling",
    "chain",
    "circular_spline",
    "compose",
    "coupling",
    "elementwise",
    "identity",
    "interval_spline",
    "inverse_rational_quadratic",
    "invert",
    "laps",
    "leaf_coupling",
    "line_spline",
    "mean_free",
    "moebius",
    "rational_quadratic",
    "repeat",
    "scaled",
    "shift",
    "sinh_arcsinh",
    "whitened",
    "wrap",
]
