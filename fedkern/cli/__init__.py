"""The parts of the command line: flags, commands, the ``list``."""
