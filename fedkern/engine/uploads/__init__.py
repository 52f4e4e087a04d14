"""What every upload passes on its way to the server, a file each; `fedkern.engine.order` holds their order."""
