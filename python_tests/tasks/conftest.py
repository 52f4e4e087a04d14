"""Fixture of the engine's tiny federation."""

from python_tests.engine.conftest import make_config as make_config
from python_tests.engine.conftest import make_data as make_data
from python_tests.engine.conftest import make_pairs as make_pairs
