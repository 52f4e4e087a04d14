"""The commands, a file each, as `fedkern.cli.command_parser` asks for them."""
