"""The tiny federation of the engine's tests."""

import importlib.util
from pathlib import Path

_path = Path(__file__).parents[1] / "engine" / "conftest.py"
_spec = importlib.util.spec_from_file_location("engine_conftest", _path)
_engine = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_engine)

make_data, make_config, make_pairs = _engine.make_data, _engine.make_config, _engine.make_pairs
