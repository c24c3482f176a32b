"""Every family the exporter knows: the one table that an architecture is added to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from edgert.models import decoder
from edgert.models.hagi.graphs import graphs as hagi_graphs
from edgert.models.hagi.model import HAGI
from edgert.models.program import Program

FAMILIES: dict[type[nn.Module], Callable[[Any], Program]] = {
    decoder.Decoder: decoder.graphs,
    HAGI: hagi_graphs,
}
"""The class of a family's model -> what makes its program."""


def program(model: nn.Module) -> Program:
    """The program of a model: its graphs, states and wiring, ready to be traced."""
    return FAMILIES[type(model)](model)
