"""Wrong values are refused before anything is installed, by a message that names the key."""

import re

import pytest

STANDALONE = ["mode=standalone"]
GPUS = ["config.device=cuda", "head.resources.limits.nvidia\\.com/gpu=2"]
GROUP = ["workerGroups[0].name=a", "workerGroups[0].replicas=2", "workerGroups[0].shmSize=1Gi",
         "workerGroups[0].resources.requests.cpu=2", "workerGroups[0].resources.requests.memory=4Gi",
         "workerGroups[0].resources.limits.memory=4Gi"]

WRONG = {
    "unknown key": (["replicas=2"], "replicas"),
    "unknown configuration key": (["config.max_modellen=2"], "max_modellen"),
    "unknown key deep inside": (["workerGroups[0].gpus=2"], "gpus"),
    "key in plain text": (["config.api_key=secret"], "api_key"),
    "host is the chart's": (["config.host=127.0.0.1"], "host"),
    "executor is Ray": (["config.executor=inline"], "executor"),
    "no model": (["config.model="], "model"),
    "wrong type": (["config.max_num_seqs=many"], "max_num_seqs"),
    "below the bound": (["config.lease_s=1"], "lease_s"),
    "not a power of two": (["config.block_size=24"], "block_size"),
    "unknown choice": (["config.kv_cache_dtype=int3"], "kv_cache_dtype"),
    "privileged port": (["config.port=80"], "port"),
    "any free port": (["config.grpc_port=0"], "grpc_port"),
    "latest": (["image.tag=latest"], "tag"),
    "not a digest": (["image.digest=sha256:abc"], "digest"),
    "unknown mode": (["mode=statefulset"], "mode"),
    "secret in a variable": (["extraEnv[0].name=KVARTO_API_KEY", "extraEnv[0].value=x"], "extraEnv"),
    "label that KubeRay selects by": (["head.podLabels.app\\.kubernetes\\.io/name=x"], "podLabels"),
    "no memory limit": (["head.resources.limits.memory=null"], "limits"),
    "zero replicas": (["workerGroups[0].replicas=0"], "replicas"),
    "token authentication off": (["ray.authMode=disabled"], "authMode"),
    "flags are strings": (["head.rayStartParams.num-cpus=1"], "num-cpus"),
    "workers without Ray cluster": ([*STANDALONE, *GROUP], "workerGroups"),
    "autoscaler without Ray cluster": ([*STANDALONE, "ray.autoscaler.enabled=true"], "ray.autoscaler.enabled"),
    "replicas by Serve without Ray cluster": ([*STANDALONE, "serve.autoscaling.enabled=true"],
                                              "serve.autoscaling.enabled"),
    "number of frontends twice": (["serve.autoscaling.enabled=true", "config.num_frontends=2"],
                                  "config.num_frontends"),
    "minimum above maximum": (["serve.autoscaling.minReplicas=9"], "serve.autoscaling.minReplicas"),
    "replicas above the maximum": ([*GROUP, "workerGroups[0].maxReplicas=1"], "workerGroups"),
    "two groups of one name": ([*GROUP, *[each.replace("[0]", "[1]") for each in GROUP]], "workerGroups"),
    "nothing to scale": (["ray.autoscaler.enabled=true"], "ray.autoscaler.enabled"),
    "GPUs unused": (["head.resources.limits.nvidia\\.com/gpu=2"], "config.device"),
    "too few GPUs": ([*GPUS, "config.tensor_parallel_size=4"], "config.tensor_parallel_size"),
    "no GPUs": (["config.device=cuda"], "config.tensor_parallel_size"),
    "claim without a name": (["modelCache.type=existingClaim"], "modelCache.existingClaim"),
    "claim that is not used": (["modelCache.existingClaim=models"], "modelCache.existingClaim"),
    "claim of one node": (["modelCache.type=pvc", "modelCache.accessModes[0]=ReadWriteOnce"],
                          "modelCache.accessModes"),
    "claim that the old pod holds": ([*STANDALONE, "modelCache.type=pvc", "modelCache.accessModes[0]=ReadWriteOnce"],
                                     "modelCache.accessModes"),
    "incremental upgrade without Gateway": (["upgradeStrategy.type=NewClusterWithIncrementalUpgrade"],
                                            "upgradeStrategy.gatewayClassName"),
    "incremental upgrade without autoscaler": (
        ["upgradeStrategy.type=NewClusterWithIncrementalUpgrade", "upgradeStrategy.gatewayClassName=istio"],
        "ray.autoscaler.enabled"),
    "two who route": (
        [*GROUP, "ray.autoscaler.enabled=true", "upgradeStrategy.type=NewClusterWithIncrementalUpgrade",
         "upgradeStrategy.gatewayClassName=istio", "ingress.enabled=true", "ingress.hosts[0]=a.b"],
        "upgradeStrategy.type"),
    "ingress without hosts": (["ingress.enabled=true"], "ingress.hosts"),
    "route without Gateway": (["gateway.httpRoute.enabled=true"], "gateway.parentRefs"),
    "gRPC route without gRPC": (
        ["gateway.grpcRoute.enabled=true", "gateway.parentRefs[0].name=a", "grpc.enabled=false"],
        "gateway.grpcRoute.enabled"),
    "monitor without Service": (["metrics.serviceMonitor.enabled=true", "metrics.service.enabled=false"],
                                "metrics.serviceMonitor.enabled"),
    "one port twice": (["config.grpc_port=8000"], "config.grpc_port"),
    "port of no server": (["config.grpc_port=9001", "grpc.enabled=false"], "config.grpc_port"),
}


@pytest.mark.parametrize("case", WRONG)
def test_refused_by_name(chart, case):
    settings, key = WRONG[case]
    done = chart.template(None, *[part for setting in settings for part in ("--set", setting)])
    assert done.returncode != 0
    assert re.search(rf"[/' .]{re.escape(key)}[':/ .]", done.stderr), done.stderr


def test_long_names_leave_room_for_kuberay_s_endings(chart):
    items = chart.render(None, "--set", f"fullnameOverride={'long-' * 20}")
    assert all(len(item["metadata"]["name"]) <= 40 + len("-model-cache") for item in items)
    assert not any(item["metadata"]["name"].endswith("-") for item in items)
