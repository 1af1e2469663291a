"""F5: checkpoints."""

from jaxquant.io.info import CheckpointInfo
from jaxquant.io.manifest import CheckpointError
from jaxquant.io.orbax import inspect, restore, save

__all__ = ["CheckpointError", "CheckpointInfo", "inspect", "restore", "save"]
