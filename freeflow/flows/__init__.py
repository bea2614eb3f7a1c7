"""Learned flows: named architectures, assembled from bijectors and networks."""

from freeflow.flows.atomic_solids import atomic_solids, position_symmetries
from freeflow.flows.core import Flow, pulled_back, softened, training_ensemble
from freeflow.flows.residual import residual, starting_from

__all__ = [
    "Flow",
    "atomic_solids",
    "position_symmetries",
    "pulled_back",
    "residual",
    "softened",
    "starting_from",
    "training_ensemble",
]
