"""The commands, a file each (see `fedkern.cli.command_parser`)."""
