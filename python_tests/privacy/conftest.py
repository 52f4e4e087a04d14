"""The tiny federation of the engine's tests."""

from python_tests.engine.conftest import make_config as make_config
from python_tests.engine.conftest import make_data as make_data
