"""The Serve config in the RayService, and the file of the standalone mode, are what the server takes: read by Ray
Serve's own schema and by ServeConfig."""

from pathlib import Path

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from kvarto.protos.config import ServeConfig

EXAMPLES = sorted((Path(__file__).parents[2] / "helm/kvarto/examples").glob("*.yaml"))
RAYSERVICE = [path for path in EXAMPLES if "mode: standalone" not in path.read_text()]
STANDALONE = [path for path in EXAMPLES if path not in RAYSERVICE]


def serve_config(items):
    (service,) = [item for item in items if item["kind"] == "RayService"]
    return yaml.safe_load(service["spec"]["serveConfigV2"])


def server_config(items):
    (file,) = [item for item in items if item["kind"] == "ConfigMap"]
    return yaml.safe_load(file["data"]["config.yaml"])


def given(values):
    return yaml.safe_load(values.read_text())["config"]


@pytest.mark.parametrize("values", RAYSERVICE, ids=lambda path: path.stem)
def test_ray_serve_reads_it(chart, values):
    read = ServeDeploySchema.model_validate(serve_config(chart.render(values)))
    (application,) = read.applications
    assert application.import_path == "kvarto:build_app"
    assert (read.http_options.host, read.http_options.port) == ("0.0.0.0", 8000)


@pytest.mark.parametrize("values", RAYSERVICE, ids=lambda path: path.stem)
def test_arguments_are_the_values(chart, values):
    arguments = serve_config(chart.render(values))["applications"][0]["args"]
    assert ServeConfig.parse(arguments) == ServeConfig.parse(given(values) | {"host": "0.0.0.0"})


@pytest.mark.parametrize("values", STANDALONE, ids=lambda path: path.stem)
def test_file_is_the_values(chart, values):
    assert ServeConfig.parse(server_config(chart.render(values))) == ServeConfig.parse(
        given(values) | {"host": "0.0.0.0"})


@pytest.mark.parametrize(("setting", "key", "value"), [
    ("kv_cache_memory_bytes=8589934592", "kv_cache_memory_bytes", 8589934592),
    ("swap_space_bytes=0", "swap_space_bytes", 0),
    ("cpus_per_rank=0.5", "cpus_per_rank", 0.5),
    ("seed=1000000", "seed", 1000000),
    ("enable_prefix_caching=false", "enable_prefix_caching", False),
    ("max_model_len=null", "max_model_len", None),
    ("drain_timeout_s=0", "drain_timeout_s", 0),
])
def test_values_arrive_as_they_were_given(chart, setting, key, value):
    arguments = serve_config(chart.render(None, "--set-json", f"config.{setting}"))["applications"][0]["args"]
    read = getattr(ServeConfig.parse(arguments), key)
    assert (read, type(read)) == (value, type(getattr(ServeConfig(model="m", **{key: value}), key)))


def test_without_grpc_there_is_no_grpc(chart):
    arguments = serve_config(chart.render(None, "--set", "grpc.enabled=false"))["applications"][0]["args"]
    assert ServeConfig.parse(arguments).grpc_port is None


def test_http_is_kept_on_the_head_unless_told_otherwise(chart):
    (deployment,) = serve_config(chart.render(None))["applications"][0]["deployments"]
    assert deployment["name"] == "http"
    assert deployment["ray_actor_options"]["resources"] == {"node:__internal_head__": 0.001}
    anywhere = serve_config(chart.render(None, "--set", "serve.httpOnHead=false"))
    assert "deployments" not in anywhere["applications"][0]


def test_serve_autoscaling(chart):
    items = chart.render(None, "--set", "serve.autoscaling.enabled=true", "--set", "serve.autoscaling.maxReplicas=7")
    (application,) = ServeDeploySchema.model_validate(serve_config(items)).applications
    (deployment,) = application.deployments
    assert deployment.num_replicas == "auto"
    assert deployment.autoscaling_config["max_replicas"] == 7


@pytest.mark.parametrize("mode", ["rayservice", "standalone"])
def test_another_configuration_is_another_pod(chart, mode):
    def checksum(*args):
        for item in chart.render(None, "--set", f"mode={mode}", *args):
            if item["kind"] == "RayService":
                return item["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["metadata"]["annotations"]
            if item["kind"] == "Deployment":
                return item["spec"]["template"]["metadata"]["annotations"]
        raise AssertionError("no pods")

    assert checksum() == checksum("--set", "service.type=LoadBalancer")
    assert checksum() != checksum("--set", "config.max_num_seqs=8")
