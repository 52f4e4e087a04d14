"""The tiny federation of the engine's tests, and FedDRA's two sides on it."""

import pytest

from python_tests.engine.conftest import make_config as make_config
from python_tests.engine.conftest import make_data as make_data
from python_tests.engine.conftest import make_pairs as make_pairs
from python_tests.engine.conftest import make_public as make_public
from python_tests.engine.conftest import make_small as make_small
from python_tests.engine.conftest import played_once as played_once
from python_tests.methods.feddra_parts import SETTINGS, Parts


@pytest.fixture
def parts(make_pairs, make_config):
    def make(sizes=(20, 13, 9), settings=None, **options):
        config = make_config("feddra", **{**SETTINGS, **(settings or {})})
        return Parts(make_pairs(sizes), config, **{"alignment_steps": 2, **options})

    return make
