"""What the chart says about `config` is what ServeConfig says, and the schema's defaults are not of another day."""

import importlib.util
import json
from pathlib import Path

import pytest

from kvarto.protos.config import ServeConfig
from kvarto.protos.errors import ConfigError

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "kvarto"

_spec = importlib.util.spec_from_file_location("generate_schema", ROOT / "helm" / "generate_schema.py")
assert _spec and _spec.loader
generate = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(generate)


@pytest.fixture(scope="module")
def properties():
    return json.loads((CHART / "values.schema.json").read_text())["properties"]["config"]["properties"]


def test_files_are_up_to_date():
    again = "run: python helm/generate_schema.py"
    assert (CHART / "values.schema.json").read_text() == generate.schema_text(), again
    assert (CHART / "values.yaml").read_text() == generate.values_text(), again


def test_every_key_but_three_can_be_set(properties):
    assert set(ServeConfig.model_fields) - set(properties) == {"api_key", "host", "executor"}


@pytest.mark.parametrize("size", [8, 16, 32, 64, 128])
def test_block_sizes_are_those_that_the_configuration_takes(properties, size):
    assert ServeConfig.parse({"model": "m", "block_size": size})
    assert properties["block_size"]["enum"] == [8, 16, 32, 64, 128]
    with pytest.raises(ConfigError):
        ServeConfig.parse({"model": "m", "block_size": size + 1})


def test_defaults_that_the_templates_repeat_are_the_configuration_s():
    config = ServeConfig(model="m")
    helpers = (CHART / "templates" / "_helpers.tpl").read_text()
    assert f"default {config.port} " in helpers
    assert f"default {config.grpc_port} " in helpers
    assert f"\n{config.drain_timeout_s:.0f}\n" in helpers
