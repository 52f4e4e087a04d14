"""What every upload passes on its way to the server, a file each.

`fedkern.engine.setup.order` holds their order.
"""
