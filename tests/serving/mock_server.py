"""The benchmarks' mock of a model server, for tests: `benchmarks/mock_upstream.py`."""

import importlib.util
import sys
from pathlib import Path

_PATH = Path(__file__).parents[2] / "benchmarks" / "mock_upstream.py"
_spec = importlib.util.spec_from_file_location("mock_upstream", _PATH)
assert _spec
assert _spec.loader
mock_upstream = importlib.util.module_from_spec(_spec)
sys.modules["mock_upstream"] = mock_upstream
_spec.loader.exec_module(mock_upstream)
Mock, Settings, serving = mock_upstream.Mock, mock_upstream.Settings, mock_upstream.serving
