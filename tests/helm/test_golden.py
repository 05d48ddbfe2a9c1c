"""What each example renders, to be looked at when it changes: `python tests/helm/update_golden.py`."""

from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "helm/kvarto/examples").glob("*.yaml"))
GOLDEN = Path(__file__).with_name("golden")


@pytest.mark.parametrize("values", EXAMPLES, ids=lambda path: path.stem)
def test_renders_as_before(chart, values):
    done = chart.template(values, *chart.GOLDEN_ARGS)
    assert done.stdout == (GOLDEN / values.name).read_text(), "python tests/helm/update_golden.py, and read the diff"


def test_every_golden_file_has_an_example():
    assert sorted(path.name for path in GOLDEN.iterdir()) == [path.name for path in EXAMPLES]
