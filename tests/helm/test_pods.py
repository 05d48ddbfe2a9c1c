"""Every pod that the chart describes is right by default: security, resources, probes, drain, secrets, image."""

import json
import math
import re
from pathlib import Path

import pytest
import yaml

EXAMPLES = sorted((Path(__file__).parents[2] / "helm/kvarto/examples").glob("*.yaml"))
SECRETS = ["--set", "apiKey.existingSecret=api", "--set", "hfToken.existingSecret=hub"]
RAY_DRAIN_S = 30
WRITABLE = {"/tmp", "/home/kvarto", "/var/cache/kvarto", "/dev/shm"}


def templates(items):
    found = []
    for item in items:
        if item["kind"] == "Deployment":
            found.append(item["spec"]["template"])
        if item["kind"] == "RayService":
            cluster = item["spec"]["rayClusterConfig"]
            found += [group["template"] for group in (cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", []))]
    return found


def containers(template):
    return template["spec"].get("initContainers", []) + template["spec"]["containers"]


@pytest.fixture(params=EXAMPLES, ids=lambda path: path.stem)
def example(request, chart):
    return yaml.safe_load(request.param.read_text()), templates(chart.render(request.param))


def test_security(example):
    for template in example[1]:
        pod = template["spec"]
        context = pod["securityContext"]
        assert context["runAsNonRoot"] and context["runAsUser"] > 0 and context["fsGroup"] > 0
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        assert not any("hostPath" in volume for volume in pod["volumes"])
        for container in containers(template):
            context = container["securityContext"]
            assert context["runAsNonRoot"] and context["readOnlyRootFilesystem"]
            assert not context["allowPrivilegeEscalation"] and not context["privileged"]
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert context["seccompProfile"] == {"type": "RuntimeDefault"}


def test_the_api_server_s_token_is_mounted_for_the_autoscaler_only(chart):
    values = EXAMPLES[0].with_name("many-groups-autoscaling.yaml")
    head, *workers = templates(chart.render(values))
    assert head["spec"]["automountServiceAccountToken"]
    assert not any(worker["spec"]["automountServiceAccountToken"] for worker in workers)
    assert not any(each["spec"]["automountServiceAccountToken"] for each in templates(chart.render(None)))


def test_what_must_be_writable_is_a_volume(example):
    for template in example[1]:
        volumes = {volume["name"] for volume in template["spec"]["volumes"]}
        for container in containers(template):
            mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
            assert set(mounts) >= WRITABLE
            assert set(mounts.values()) <= volumes


def test_shared_memory_is_sized_and_fits_the_limit(example):
    for template in example[1]:
        (shm,) = [volume["emptyDir"] for volume in template["spec"]["volumes"] if volume["name"] == "dshm"]
        (limit,) = [c["resources"]["limits"]["memory"] for c in template["spec"]["containers"]]
        assert shm["medium"] == "Memory"
        assert gibibytes(shm["sizeLimit"]) < gibibytes(limit)


def gibibytes(quantity):
    assert quantity.endswith("Gi")
    return float(quantity[:-2])


def test_resources_are_set(example):
    for template in example[1]:
        for container in containers(template):
            assert set(container["resources"]["requests"]) >= {"cpu", "memory"}
            assert "memory" in container["resources"]["limits"]


def test_probes(example):
    for template in example[1]:
        (container,) = template["spec"]["containers"]
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert container[probe]["failureThreshold"] >= 1 and container[probe]["periodSeconds"] >= 1


def test_server_pods_say_whether_work_makes_progress(chart):
    (server,) = templates(chart.render(None, "--set", "mode=standalone"))
    (container,) = server["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert container["startupProbe"]["grpc"] == {"port": ports["grpc"]}
    assert container["readinessProbe"]["httpGet"] == {"path": "/health/ready", "port": "http"}
    assert container["livenessProbe"]["httpGet"] == {"path": "/health/live", "port": "http"}
    (server,) = templates(chart.render(None, "--set", "mode=standalone", "--set", "grpc.enabled=false"))
    assert server["spec"]["containers"][0]["startupProbe"]["httpGet"]["path"] == "/health/ready"


def test_the_head_is_ready_before_the_application_is(chart):
    """KubeRay deploys the application to a Ready head only."""
    (head,) = templates(chart.render(None))
    (container,) = head["spec"]["containers"]
    for probe in ("startupProbe", "readinessProbe"):
        assert container[probe]["httpGet"] == {"path": "/api/healthz", "port": 52365}
    assert "http://localhost:8000/health/live" in container["livenessProbe"]["exec"]["command"][2]


def test_liveness_outlasts_the_server_s_own_recovery(example):
    values, found = example
    recovery = values["config"].get("step_timeout_s", 120)
    probe = found[0]["spec"]["containers"][0]["livenessProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] > 2 * recovery


def test_grace_covers_the_drain(example):
    values, found = example
    drain = values["config"].get("drain_timeout_s", 30)
    for template in found:
        (container,) = template["spec"]["containers"]
        command = container["lifecycle"]["preStop"]["exec"]["command"]
        assert command[:2] == ["kvarto", "drain"]
        assert command[command.index("--timeout") + 1] == str(math.ceil(drain))
        delay = int(command[command.index("--delay") + 1]) if "--delay" in command else 0
        assert template["spec"]["terminationGracePeriodSeconds"] >= delay + drain + RAY_DRAIN_S + 10
        assert ("--worker" in command) == (container["name"] == "ray-worker")


@pytest.mark.parametrize(("setting", "image"), [
    ("image.tag=1.2.3", r"ghcr\.io/kvarto/kvarto:1\.2\.3"),
    (f"image.digest=sha256:{'a' * 64}", r"ghcr\.io/kvarto/kvarto@sha256:a{64}"),
    ("image.repository=registry:5000/kvarto", r"registry:5000/kvarto:\d+\.\d+\.\d+-cpu"),
])
def test_image_is_pinned(chart, setting, image):
    for template in templates(chart.render(None, "--set", setting)):
        assert all(re.fullmatch(image, container["image"]) for container in containers(template))


def test_gpus_get_the_image_with_their_libraries(example):
    values, found = example
    built = "-cuda" if values["config"].get("device") == "cuda" else "-cpu"
    assert all(container["image"].endswith(built) for template in found for container in containers(template))


@pytest.mark.parametrize("mode", ["rayservice", "standalone"])
def test_secrets_are_references_only(chart, mode):
    for template in templates(chart.render(None, "--set", f"mode={mode}", *SECRETS)):
        (container,) = template["spec"]["containers"]
        env = {item["name"]: item for item in container["env"]}
        assert env["KVARTO_API_KEY"]["valueFrom"] == {"secretKeyRef": {"name": "api", "key": "api-key"}}
        assert env["HF_TOKEN"]["valueFrom"] == {"secretKeyRef": {"name": "hub", "key": "token"}}
        (fetch,) = template["spec"]["initContainers"]
        assert "KVARTO_API_KEY" not in json.dumps(fetch)


def test_every_ray_pod_has_the_key(chart):
    found = templates(chart.render(EXAMPLES[0].with_name("tensor-parallel-8-gpus.yaml")))
    assert len(found) == 2
    for template in found:
        assert "KVARTO_API_KEY" in {item["name"] for item in template["spec"]["containers"][0]["env"]}


def test_the_chart_makes_no_secrets(chart):
    for values in EXAMPLES:
        assert "Secret" not in {item["kind"] for item in chart.render(values, *SECRETS)}


def test_model_is_fetched_once_and_then_not_asked_for(chart):
    (head,) = templates(chart.render(None))
    (fetch,) = head["spec"]["initContainers"]
    assert fetch["args"] == ["fetch", "smollm2-135m"]
    cache = {"name": "model-cache", "mountPath": "/var/cache/kvarto"}
    assert cache in fetch["volumeMounts"] and cache in head["spec"]["containers"][0]["volumeMounts"]
    offline = {"name": "HF_HUB_OFFLINE", "value": "1"}
    assert offline in head["spec"]["containers"][0]["env"] and offline not in fetch["env"]


@pytest.mark.parametrize("setting", ["modelCache.fetch=false", "config.model=/var/cache/kvarto/m"])
def test_what_is_there_already_is_not_fetched(chart, setting):
    (head,) = templates(chart.render(None, "--set", setting))
    assert "initContainers" not in head["spec"]
