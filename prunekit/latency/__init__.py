"""Latency as a cost: a table of measured layers, and the model that adds them up to a whole Architecture."""

from prunekit.latency.measuring import measure_table
from prunekit.latency.model import LatencyModel
from prunekit.latency.table import LatencyTable, LayerTimes, conditions_of

__all__ = ["LatencyModel", "LatencyTable", "LayerTimes", "conditions_of", "measure_table"]
