"""What a run does around its rounds, a file each.

`fedkern.engine.setup.order` holds their order.
"""
