"""Every family the exporter knows: the one table that an architecture is added to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from edgert.models import decoder
from edgert.models.hagi.graphs import graphs as hagi_graphs
from edgert.models.hagi.model import HAGI
from edgert.models.hrm.bidir import Bidir
from edgert.models.hrm.graphs import bidir_graphs
from edgert.models.hrm.graphs import graphs as hrm_graphs
from edgert.models.hrm.model import HRM
from edgert.models.program import Program

FAMILIES: dict[type[nn.Module], Callable[[Any], Program]] = {
    decoder.Decoder: decoder.graphs,
    HAGI: hagi_graphs,
    HRM: hrm_graphs,
    Bidir: bidir_graphs,
}
"""The class of a family's model -> what makes its program."""


def program(model: nn.Module) -> Program:
    """The program of a model: its graphs, states and wiring, ready to be traced."""
    return FAMILIES[type(model)](model)
