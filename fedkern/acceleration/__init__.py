"""acceleration: convolutions of any network wait for what follows them, and both are computed by one operator."""

from fedkern.acceleration.calls import plain
from fedkern.acceleration.rehearsal import accelerate

__all__ = ["accelerate", "plain"]
