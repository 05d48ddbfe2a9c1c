"""Render every example anew into tests/helm/golden."""

import importlib.util
from pathlib import Path

_spec = importlib.util.spec_from_file_location("helm_binary", Path(__file__).with_name("helm_binary.py"))
assert _spec and _spec.loader
chart = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(chart)

for values in sorted((chart.CHART / "examples").glob("*.yaml")):
    done = chart.template(values, *chart.GOLDEN_ARGS)
    done.check_returncode()
    (Path(__file__).with_name("golden") / values.name).write_text(done.stdout)
