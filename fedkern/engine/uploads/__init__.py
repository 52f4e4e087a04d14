"""Filters of uploads on their way to the server, a file each.

`fedkern.engine.setup.order` holds their order.
"""
