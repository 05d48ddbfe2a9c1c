"""Services, routes, policies and monitors point at what is there."""

from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "helm/kvarto/examples").glob("*.yaml"))
ROUTES = [part for setting in (
    "gateway.parentRefs[0].name=gateway", "gateway.httpRoute.enabled=true", "gateway.grpcRoute.enabled=true",
    "ingress.enabled=true", "ingress.hosts[0]=llm.example.com", "metrics.serviceMonitor.enabled=true",
    "podDisruptionBudget.enabled=true") for part in ("--set", setting)]


def server(items):
    """The template of the pod that answers, and the Services that KubeRay makes for it: ports by name."""
    for item in items:
        if item["kind"] == "Deployment":
            return item["spec"]["template"], {}
        if item["kind"] == "RayService":
            name = item["metadata"]["name"]
            template = item["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]
            ports = {port["containerPort"] for port in template["spec"]["containers"][0]["ports"]}
            return template, {item["spec"]["serveService"]["metadata"]["name"]: {8000}, f"{name}-head-svc": ports}
    raise AssertionError("no pods")


def of_kind(items, kind):
    return [item for item in items if item["kind"] == kind]


def selects(selector, labels):
    return selector.items() <= labels.items()


@pytest.fixture(params=["rayservice", "standalone"])
def items(request, chart):
    return chart.render(None, "--set", f"mode={request.param}", *ROUTES)


def test_services_select_the_server_and_name_its_ports(items):
    template, _ = server(items)
    named = {port["name"] for port in template["spec"]["containers"][0]["ports"]}
    services = of_kind(items, "Service")
    assert services
    for service in services:
        assert selects(service["spec"]["selector"], template["metadata"]["labels"])
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= named


def test_routes_lead_to_services_that_exist(items):
    _, existing = server(items)
    for service in of_kind(items, "Service"):
        existing[service["metadata"]["name"]] = {port["port"] for port in service["spec"]["ports"]}
    backends = [(backend["name"], backend["port"]) for kind in ("HTTPRoute", "GRPCRoute")
                for route in of_kind(items, kind) for rule in route["spec"]["rules"] for backend in rule["backendRefs"]]
    for ingress in of_kind(items, "Ingress"):
        for rule in ingress["spec"]["rules"]:
            service = rule["http"]["paths"][0]["backend"]["service"]
            backends.append((service["name"], service["port"]["number"]))
    assert len(backends) == 3
    assert all(port in existing[name] for name, port in backends)


def test_only_the_api_is_routed(items):
    (route,) = of_kind(items, "HTTPRoute")
    assert [match["path"]["value"] for rule in route["spec"]["rules"] for match in rule["matches"]] == ["/v1"]


def test_monitor_selects_the_metrics_service_alone(items):
    (monitor,) = of_kind(items, "ServiceMonitor")
    selector = monitor["spec"]["selector"]["matchLabels"]
    (service,) = [each for each in of_kind(items, "Service") if selects(selector, each["metadata"]["labels"])]
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
    assert endpoint["path"] == "/metrics"


def test_budget_counts_the_server(items):
    (budget,) = of_kind(items, "PodDisruptionBudget")
    assert selects(budget["spec"]["selector"]["matchLabels"], server(items)[0]["metadata"]["labels"])


def test_pods_keep_the_labels_that_kuberay_selects_by(chart):
    for values in EXAMPLES:
        for item in of_kind(chart.render(values), "RayService"):
            cluster = item["spec"]["rayClusterConfig"]
            for group in (cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", [])):
                labels = set(group["template"]["metadata"]["labels"])
                assert not labels & {"app.kubernetes.io/name", "app.kubernetes.io/created-by"}


def test_policy_covers_every_pod_and_shuts_ray_s_ports(chart):
    for values in EXAMPLES:
        items = chart.render(values)
        (policy,) = of_kind(items, "NetworkPolicy")
        clients, *inside = policy["spec"]["ingress"]
        assert selects(policy["spec"]["podSelector"]["matchLabels"], server(items)[0]["metadata"]["labels"])
        assert {port["port"] for port in clients["ports"]} == {8000, 9000}
        # 6379, 8265, 10001 and the workers' own: from the release's pods and the operator.
        assert all(rule["from"] for rule in inside)


def test_an_open_policy_names_nobody(chart):
    (policy,) = of_kind(chart.render(None), "NetworkPolicy")
    assert "from" not in policy["spec"]["ingress"][0]
    assert policy["spec"]["policyTypes"] == ["Ingress"]


def test_restricted_egress_lets_the_model_be_fetched(chart):
    (policy,) = of_kind(chart.render(None, "--set", "networkPolicy.restrictEgress=true"), "NetworkPolicy")
    assert 443 in {port["port"] for rule in policy["spec"]["egress"] for port in rule.get("ports", [])}
    (policy,) = of_kind(chart.render(None, "--set", "networkPolicy.restrictEgress=true", "--set",
                                     "modelCache.fetch=false"), "NetworkPolicy")
    assert 443 not in {port["port"] for rule in policy["spec"]["egress"] for port in rule.get("ports", [])}
