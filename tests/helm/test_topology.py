"""Where pods land: ranks on workers, replicas apart, the hosts of one replica together."""

from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "helm/kvarto/examples"


def cluster(items):
    (service,) = [item for item in items if item["kind"] == "RayService"]
    return service["spec"]["rayClusterConfig"]


def test_without_workers_the_model_runs_on_the_head(chart):
    assert cluster(chart.render(None))["headGroupSpec"]["rayStartParams"]["num-cpus"] == "2"


def test_with_workers_ranks_land_on_them(chart):
    found = cluster(chart.render(EXAMPLES / "tensor-parallel-8-gpus.yaml"))
    assert found["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert found["workerGroupSpecs"][0]["rayStartParams"]["num-cpus"] == "32"


@pytest.mark.parametrize(("cpu", "whole"), [("500m", "1"), ("2500m", "3"), ("4", "4"), ("1.5", "2")])
def test_ray_counts_whole_cpus(chart, cpu, whole):
    items = chart.render(None, "--set-string", f"head.resources.limits.cpu={cpu}")
    assert cluster(items)["headGroupSpec"]["rayStartParams"]["num-cpus"] == whole


def test_given_flags_win(chart):
    items = chart.render(None, "--set-string", "head.rayStartParams.num-cpus=7")
    assert cluster(items)["headGroupSpec"]["rayStartParams"]["num-cpus"] == "7"


def test_hosts_of_a_replica_are_drawn_together(chart):
    (group,) = cluster(chart.render(EXAMPLES / "two-hosts.yaml"))["workerGroupSpecs"]
    assert group["numOfHosts"] == 2
    (preferred,) = group["template"]["spec"]["affinity"]["podAffinity"][
        "preferredDuringSchedulingIgnoredDuringExecution"]
    assert preferred["podAffinityTerm"]["topologyKey"] == "topology.kubernetes.io/rack"
    assert preferred["podAffinityTerm"]["labelSelector"]["matchLabels"]["ray.io/group"] == "h100-pair"
    # Zones apart would pull against it.
    assert [each["topologyKey"] for each in group["template"]["spec"]["topologySpreadConstraints"]] == [
        "kubernetes.io/hostname"]


def test_groups_spread_over_nodes_and_zones(chart):
    for group in cluster(chart.render(EXAMPLES / "many-groups-autoscaling.yaml"))["workerGroupSpecs"]:
        spread = group["template"]["spec"]["topologySpreadConstraints"]
        assert [each["topologyKey"] for each in spread] == ["kubernetes.io/hostname", "topology.kubernetes.io/zone"]
        assert all(each["labelSelector"]["matchLabels"]["ray.io/group"] == group["groupName"] for each in spread)


def test_given_affinity_wins(chart):
    (group,) = cluster(chart.render(EXAMPLES / "two-hosts.yaml", "--set-json",
                                    'workerGroups[0].affinity={"nodeAffinity":{}}'))["workerGroupSpecs"]
    assert group["template"]["spec"]["affinity"] == {"nodeAffinity": {}}
