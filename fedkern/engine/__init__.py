"""Engine that runs a method: round loop, local training, executors, run folders.

The package is private: scripts use :func:`fedkern.simulate`, :func:`fedkern.load` and :class:`fedkern.Run`.
"""
