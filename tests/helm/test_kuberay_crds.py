"""The RayService is one that KubeRay takes, with no field that its CRD does not name."""

import importlib.util
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "helm/kvarto/examples").glob("*.yaml"))
CRDS = Path(os.environ.get("KVARTO_KUBERAY_CRDS", ROOT.parent / "shared" / "kuberay-crds"))
GATEWAY = ("--api-versions", "gateway.networking.k8s.io/v1")

_spec = importlib.util.spec_from_file_location("structural", Path(__file__).with_name("structural.py"))
assert _spec and _spec.loader
structural = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(structural)

pytestmark = pytest.mark.skipif(
    not CRDS.is_dir(), reason=f"no ray.io_rayservices.yaml in {CRDS}: set KVARTO_KUBERAY_CRDS to its folder")


@pytest.fixture(scope="module")
def rayservice():
    return structural.validator(CRDS / "ray.io_rayservices.yaml", "v1")


@pytest.fixture(scope="module")
def raycluster():
    return structural.validator(CRDS / "ray.io_rayclusters.yaml", "v1")


def rendered(chart, values, *args):
    return [item for item in chart.render(values, *args) if item["kind"] == "RayService"]


@pytest.mark.parametrize("version", ["1.29.0", "1.34.0"])
@pytest.mark.parametrize("values", EXAMPLES, ids=lambda path: path.stem)
def test_examples(chart, values, version, rayservice, raycluster):
    for item in rendered(chart, values, "--kube-version", version):
        assert [error.message for error in rayservice.iter_errors(item)] == []
        cluster = {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": {"name": "kvarto"},
                   "spec": item["spec"]["rayClusterConfig"]}
        assert [error.message for error in raycluster.iter_errors(cluster)] == []


def test_incremental_upgrade(chart, rayservice):
    values = ROOT / "helm/kvarto/examples/many-groups-autoscaling.yaml"
    (item,) = rendered(chart, values, *GATEWAY)
    assert item["spec"]["upgradeStrategy"]["type"] == "NewClusterWithIncrementalUpgrade"
    assert item["spec"]["upgradeStrategy"]["clusterUpgradeOptions"]["stepSizePercent"] == 25
    assert [error.message for error in rayservice.iter_errors(item)] == []
    # Without the Gateway API, the whole cluster is exchanged at once.
    assert rendered(chart, values)[0]["spec"]["upgradeStrategy"] == {"type": "NewCluster"}


def test_settings_of_the_cluster(chart, rayservice):
    (item,) = rendered(
        chart, None, "--set", "ray.authSecret=token", "--set", "service.type=LoadBalancer", "--set",
        "service.annotations.a=b", "--set", "head.podLabels.team=x", "--set", "head.podAnnotations.a=b",
        "--set", "head.runtimeClassName=nvidia", "--set", "imagePullSecrets[0].name=registry")
    assert [error.message for error in rayservice.iter_errors(item)] == []
    assert item["spec"]["rayClusterConfig"]["authOptions"] == {"mode": "token", "secretName": "token"}


@pytest.mark.parametrize(("path", "value", "complaint"), [
    (("rayClusterConfig", "headGroupSpec", "template", "spec", "nodeName2"), "a", "nodeName2"),
    (("rayClusterConfig", "headGroupSpec", "rayStartParams", "num-cpus"), 0, "is not of type 'string'"),
    (("upgradeStrategy", "clusterUpgradeOptions"), {}, "required property"),
])
def test_the_oracle_sees_what_is_wrong(chart, rayservice, path, value, complaint):
    (item,) = rendered(chart, None)
    place = item["spec"]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    assert any(complaint in error.message for error in rayservice.iter_errors(item))
