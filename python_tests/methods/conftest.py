"""The tiny federation of the engine's tests, and FedDRA's two sides on it."""

import importlib.util
from pathlib import Path

import pytest
from feddra_parts import SETTINGS, Parts

_path = Path(__file__).parents[1] / "engine" / "conftest.py"
_spec = importlib.util.spec_from_file_location("engine_conftest", _path)
_engine = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_engine)

make_data, make_public, make_config = _engine.make_data, _engine.make_public, _engine.make_config
make_pairs = _engine.make_pairs


@pytest.fixture
def parts(make_pairs, make_config):
    def make(sizes=(20, 13, 9), settings=None, **options):
        config = make_config("feddra", **{**SETTINGS, **(settings or {})})
        return Parts(make_pairs(sizes), config, **{"alignment_steps": 2, **options})

    return make
