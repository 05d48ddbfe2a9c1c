"""Every object that the chart renders is one that Kubernetes takes, from 1.29 to 1.34, with no field that it does not
know. The oracle is Kubernetes' own OpenAPI, as kubernetes-validate packages it."""

from pathlib import Path

import kubernetes_validate
import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "helm/kvarto/examples").glob("*.yaml"))
VERSIONS = ["1.29", "1.30", "1.31", "1.32", "1.33", "1.34"]
CUSTOM = {"RayService", "ServiceMonitor", "HTTPRoute", "GRPCRoute"}
STANDALONE = ["mode=standalone"]
ROUTES = ["gateway.parentRefs[0].name=gateway", "gateway.httpRoute.enabled=true", "gateway.grpcRoute.enabled=true"]
GROUP = ["workerGroups[0].name=cpu", "workerGroups[0].replicas=2", "workerGroups[0].shmSize=1Gi",
         "workerGroups[0].resources.requests.cpu=2", "workerGroups[0].resources.requests.memory=4Gi",
         "workerGroups[0].resources.limits.memory=4Gi"]
TOGGLES = {
    "defaults": [],
    "standalone": STANDALONE,
    "no gRPC": ["grpc.enabled=false"],
    "standalone without gRPC": [*STANDALONE, "grpc.enabled=false"],
    "secrets": ["apiKey.existingSecret=key", "hfToken.existingSecret=hub"],
    "ingress": ["ingress.enabled=true", "ingress.hosts[0]=llm.example.com", "ingress.className=nginx"],
    "routes": ROUTES,
    "standalone routes": [*STANDALONE, *ROUTES],
    "monitor": ["metrics.serviceMonitor.enabled=true"],
    "budget": ["podDisruptionBudget.enabled=true"],
    "claim": ["modelCache.type=pvc", "modelCache.storageClassName=shared"],
    "existing claim": ["modelCache.type=existingClaim", "modelCache.existingClaim=models", "modelCache.fetch=false"],
    "closed": ["networkPolicy.restrictEgress=true", "networkPolicy.extraEgress[0].ports[0].port=4318"],
    "bare": ["networkPolicy.enabled=false", "metrics.service.enabled=false", "serviceAccount.create=false",
             "topology.spread=false"],
    "workers": GROUP,
    "autoscaling": [*GROUP, "ray.autoscaler.enabled=true", "serve.autoscaling.enabled=true", "serve.httpOnHead=false"],
    "hosts": [*GROUP, "workerGroups[0].numOfHosts=2", "workerGroups[0].priorityClassName=high"],
}


def check(objects, version):
    for item in objects:
        if item["kind"] not in CUSTOM:
            kubernetes_validate.validate(item, version, strict=True)
            continue
        assert item["metadata"]["name"]
        if item["kind"] == "RayService":
            for template in pod_templates(item):
                pod = {"apiVersion": "v1", "kind": "Pod", "spec": template["spec"],
                       "metadata": {"name": "pod"} | template["metadata"]}
                kubernetes_validate.validate(pod, version, strict=True)
            service = {"apiVersion": "v1", "kind": "Service"} | item["spec"]["serveService"]
            kubernetes_validate.validate(service, version, strict=True)


def pod_templates(rayservice):
    cluster = rayservice["spec"]["rayClusterConfig"]
    return [group["template"] for group in (cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", []))]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("values", EXAMPLES, ids=lambda path: path.stem)
def test_examples(chart, values, version):
    check(chart.render(values, "--kube-version", f"{version}.0"), version)


@pytest.mark.parametrize("version", [VERSIONS[0], VERSIONS[-1]])
@pytest.mark.parametrize("toggles", TOGGLES)
def test_toggles(chart, toggles, version):
    settings = [part for setting in TOGGLES[toggles] for part in ("--set", setting)]
    check(chart.render(None, "--kube-version", f"{version}.0", *settings), version)


def test_the_oracle_sees_an_unknown_field(chart):
    (account,) = [item for item in chart.render(None) if item["kind"] == "ServiceAccount"]
    with pytest.raises(kubernetes_validate.ValidationError, match="automountToken"):
        kubernetes_validate.validate(account | {"automountToken": False}, "1.34", strict=True)
