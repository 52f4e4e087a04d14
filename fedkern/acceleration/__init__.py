"""acceleration: convolutions of any network, delayed and then computed in one operator with the layers behind them."""

from fedkern.acceleration.calls import plain
from fedkern.acceleration.rehearsal import accelerate

__all__ = ["accelerate", "plain"]
