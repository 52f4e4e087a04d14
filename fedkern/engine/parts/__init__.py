"""Parts of a run around its rounds, a file each.

`fedkern.engine.setup.order` holds their order.
"""
