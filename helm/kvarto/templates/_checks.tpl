{{/* What values.schema.json cannot say: values that do not go together. Every message begins with the key. */}}
{{- define "kvarto.checks" -}}
{{- include "kvarto.checkMode" . -}}
{{- include "kvarto.checkGroups" . -}}
{{- include "kvarto.checkDevice" . -}}
{{- include "kvarto.checkCache" . -}}
{{- include "kvarto.checkUpgrade" . -}}
{{- include "kvarto.checkNetwork" . -}}
{{- end }}

{{- define "kvarto.checkMode" -}}
{{- if eq .Values.mode "standalone" -}}
{{- if .Values.workerGroups -}}{{- fail "workerGroups: mode standalone is one pod without workers; use mode rayservice" -}}{{- end -}}
{{- if .Values.ray.autoscaler.enabled -}}{{- fail "ray.autoscaler.enabled: needs mode rayservice" -}}{{- end -}}
{{- if .Values.serve.autoscaling.enabled -}}{{- fail "serve.autoscaling.enabled: needs mode rayservice" -}}{{- end -}}
{{- end -}}
{{- with .Values.serve.autoscaling -}}
{{- if and .enabled (hasKey $.Values.config "num_frontends") -}}{{- fail "config.num_frontends: serve.autoscaling.enabled decides on the number; use minReplicas and maxReplicas" -}}{{- end -}}
{{- if gt (int .minReplicas) (int .maxReplicas) -}}{{- fail "serve.autoscaling.minReplicas: is above maxReplicas" -}}{{- end -}}
{{- end -}}
{{- end }}

{{- define "kvarto.checkGroups" -}}
{{- $names := list -}}
{{- range .Values.workerGroups -}}
{{- if has .name $names -}}{{- fail (printf "workerGroups: two groups are named %q" .name) -}}{{- end -}}
{{- $names = append $names .name -}}
{{- $min := .minReplicas | default .replicas | int -}}
{{- $max := .maxReplicas | default .replicas | int -}}
{{- if or (gt $min (int .replicas)) (lt $max (int .replicas)) -}}
{{- fail (printf "workerGroups: %s: replicas (%d) must lie between minReplicas (%d) and maxReplicas (%d)" .name (int .replicas) $min $max) -}}
{{- end -}}
{{- end -}}
{{- if and .Values.ray.autoscaler.enabled (not .Values.workerGroups) -}}{{- fail "ray.autoscaler.enabled: there are no workerGroups to scale" -}}{{- end -}}
{{- end }}

{{/* GPUs of one pod: the sum of the limits whose name ends in /gpu. Call with a `resources`. */}}
{{- define "kvarto.gpus" -}}
{{- $gpus := 0 -}}
{{- range $name, $count := .limits -}}
{{- if hasSuffix "/gpu" $name -}}{{- $gpus = add $gpus (int $count) -}}{{- end -}}
{{- end -}}
{{- $gpus -}}
{{- end }}

{{- define "kvarto.checkDevice" -}}
{{- $gpus := include "kvarto.gpus" .Values.head.resources | int -}}
{{- range .Values.workerGroups -}}
{{- $gpus = add $gpus (mul (include "kvarto.gpus" .resources | int) (int .replicas) (.numOfHosts | default 1 | int)) -}}
{{- end -}}
{{- $cuda := eq (.Values.config.device | default "auto") "cuda" -}}
{{- if and $gpus (not $cuda) -}}
{{- /* auto would be decided when only the head, without GPUs, has joined. */ -}}
{{- fail "config.device: must be cuda, because resources ask for GPUs" -}}
{{- end -}}
{{- if $cuda -}}
{{- $ranks := mul (.Values.config.tensor_parallel_size | default 1 | int) (.Values.config.num_worker_groups | default 1 | int) -}}
{{- if lt (int $gpus) (int $ranks) -}}
{{- fail (printf "config.tensor_parallel_size: %d ranks (tensor_parallel_size x num_worker_groups) need a GPU each, resources ask for %d" (int $ranks) (int $gpus)) -}}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "kvarto.checkCache" -}}
{{- with .Values.modelCache -}}
{{- if and (eq .type "existingClaim") (not .existingClaim) -}}{{- fail "modelCache.existingClaim: must name a claim with modelCache.type existingClaim" -}}{{- end -}}
{{- if and (ne .type "existingClaim") .existingClaim -}}{{- fail "modelCache.existingClaim: needs modelCache.type existingClaim" -}}{{- end -}}
{{- if eq .type "pvc" -}}
{{- $shared := has "ReadWriteMany" .accessModes -}}
{{- if and (eq $.Values.mode "rayservice") (not $shared) -}}
{{- fail "modelCache.accessModes: head, workers and the cluster of an upgrade use the claim at once: needs ReadWriteMany (or modelCache.type emptyDir)" -}}
{{- end -}}
{{- if and (not $shared) (or (gt (int $.Values.standalone.replicas) 1) (ne $.Values.standalone.strategy.type "Recreate")) -}}
{{- fail "modelCache.accessModes: a claim that is not ReadWriteMany needs standalone.replicas 1 and standalone.strategy.type Recreate" -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "kvarto.checkUpgrade" -}}
{{- if eq .Values.mode "rayservice" -}}
{{- if eq (include "kvarto.upgradeType" .) "NewClusterWithIncrementalUpgrade" -}}
{{- if not .Values.upgradeStrategy.gatewayClassName -}}{{- fail "upgradeStrategy.gatewayClassName: NewClusterWithIncrementalUpgrade shifts traffic by a Gateway: name its class" -}}{{- end -}}
{{- if not .Values.ray.autoscaler.enabled -}}{{- fail "ray.autoscaler.enabled: KubeRay's NewClusterWithIncrementalUpgrade needs it" -}}{{- end -}}
{{- if or .Values.ingress.enabled .Values.gateway.httpRoute.enabled -}}{{- fail "upgradeStrategy.type: with NewClusterWithIncrementalUpgrade KubeRay makes the Gateway and the HTTPRoute; turn ingress and gateway.httpRoute off" -}}{{- end -}}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "kvarto.checkNetwork" -}}
{{- if and .Values.ingress.enabled (not .Values.ingress.hosts) -}}{{- fail "ingress.hosts: name at least one host" -}}{{- end -}}
{{- if and (or .Values.gateway.httpRoute.enabled .Values.gateway.grpcRoute.enabled) (not .Values.gateway.parentRefs) -}}{{- fail "gateway.parentRefs: name the Gateway" -}}{{- end -}}
{{- if and .Values.gateway.grpcRoute.enabled (not .Values.grpc.enabled) -}}{{- fail "gateway.grpcRoute.enabled: needs grpc.enabled" -}}{{- end -}}
{{- if and .Values.metrics.serviceMonitor.enabled (not .Values.metrics.service.enabled) -}}{{- fail "metrics.serviceMonitor.enabled: needs metrics.service.enabled" -}}{{- end -}}
{{- if and .Values.grpc.enabled (eq (include "kvarto.httpPort" .) (include "kvarto.grpcPort" .)) -}}{{- fail "config.grpc_port: is config.port too" -}}{{- end -}}
{{- if and (not .Values.grpc.enabled) (hasKey .Values.config "grpc_port") -}}{{- fail "config.grpc_port: grpc.enabled is false" -}}{{- end -}}
{{- end }}
