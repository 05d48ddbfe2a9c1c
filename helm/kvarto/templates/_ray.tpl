{{/*
Probes of Ray pods. KubeRay submits the Serve config only to a head that is Ready, so startup and readiness ask Ray alone
(on the head: raylet and GCS), never the model. Liveness also fails when the application itself says that it makes no
progress (503); that it is not deployed yet (404, or nobody listens) is no failure.
*/}}
{{- define "kvarto.rayHealth" -}}
httpGet:
  path: /api/healthz
  port: 52365
timeoutSeconds: 10
{{- end }}

{{- define "kvarto.rayStartupProbe" -}}
startupProbe:
  {{- include "kvarto.rayHealth" . | nindent 2 }}
  periodSeconds: 5
  failureThreshold: {{ div (add .Values.probes.rayStartSeconds 4) 5 }}
{{- end }}

{{- define "kvarto.headProbes" -}}
{{ include "kvarto.rayStartupProbe" . }}
readinessProbe:
  {{- include "kvarto.rayHealth" . | nindent 2 }}
  periodSeconds: 5
  failureThreshold: 3
livenessProbe:
  exec:
    command:
      - bash
      - -c
      - >-
        wget --tries 1 -T 5 -q -O /dev/null http://localhost:52365/api/healthz &&
        ! wget --tries 1 -T 5 -S -O /dev/null http://localhost:{{ include "kvarto.httpPort" . }}/health/live 2>&1 |
        grep -q 'HTTP/1.1 503'
  timeoutSeconds: 15
  periodSeconds: 10
  failureThreshold: {{ div (add .Values.probes.stuckSeconds 9) 10 }}
{{- end }}

{{/*
KubeRay's Service takes every worker that is Ready for one that answers HTTP. So, as with KubeRay's own probe, a worker
is Ready when a Serve proxy runs on it, and with `serve.httpOnHead` none does: workers then stay 0/1 while they compute.
*/}}
{{- define "kvarto.workerProbes" -}}
{{ include "kvarto.rayStartupProbe" . }}
readinessProbe:
  exec:
    command:
      - bash
      - -c
      - >-
        wget --tries 1 -T 5 -q -O /dev/null http://localhost:52365/api/healthz &&
        wget --tries 1 -T 5 -q -O /dev/null http://localhost:{{ include "kvarto.httpPort" . }}/-/healthz
  timeoutSeconds: 15
  periodSeconds: 5
  failureThreshold: 1
livenessProbe:
  {{- include "kvarto.rayHealth" . | nindent 2 }}
  periodSeconds: 10
  failureThreshold: 12
{{- end }}

{{/* CPUs of a pod for Ray, whole: the limit, or the request. Call with a `resources`. */}}
{{- define "kvarto.cpus" -}}
{{- $cpu := (.limits.cpu | default .requests.cpu) | toString -}}
{{- if hasSuffix "m" $cpu -}}
{{- div (add (trimSuffix "m" $cpu | int) 999) 1000 -}}
{{- else -}}
{{- $cpu | float64 | ceil -}}
{{- end -}}
{{- end }}

{{/*
rayStartParams of the head: strings, as KubeRay passes them on the command line. With worker groups the head has no CPUs
to give, so that ranks land on workers.
*/}}
{{- define "kvarto.headStartParams" -}}
{{- $cpus := ternary "0" (include "kvarto.cpus" .Values.head.resources) (not (empty .Values.workerGroups)) -}}
{{- $params := dict "dashboard-host" "0.0.0.0" "num-cpus" $cpus "object-store-memory" (.Values.ray.objectStoreMemory | int64 | toString) -}}
{{- toYaml (merge (deepCopy .Values.head.rayStartParams) $params) -}}
{{- end }}

{{/* Call with (dict "root" $ "group" values). */}}
{{- define "kvarto.workerStartParams" -}}
{{- $params := dict "num-cpus" (include "kvarto.cpus" .group.resources) "object-store-memory" (.root.Values.ray.objectStoreMemory | int64 | toString) -}}
{{- toYaml (merge (deepCopy (.group.rayStartParams | default dict)) $params) -}}
{{- end }}

{{/*
Topology of a worker group: its pods spread over nodes and, where each is a replica of its own, over zones. The hosts of
one multi-host replica are drawn together instead: collectives between them are on every token's path. Call with
(dict "root" $ "group" values).
*/}}
{{- define "kvarto.workerTopology" -}}
{{- $hosts := .group.numOfHosts | default 1 | int -}}
{{- $topology := .root.Values.topology -}}
{{- if $topology.spread }}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "kvarto.selectorLabels" .root | nindent 8 }}
        ray.io/group: {{ .group.name }}
    # The pods of an old cluster do not count during an upgrade.
    matchLabelKeys: [ray.io/cluster]
  {{- if eq $hosts 1 }}
  - maxSkew: 1
    topologyKey: topology.kubernetes.io/zone
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "kvarto.selectorLabels" .root | nindent 8 }}
        ray.io/group: {{ .group.name }}
    matchLabelKeys: [ray.io/cluster]
  {{- end }}
{{- end }}
{{- if .group.affinity }}
affinity:
  {{- toYaml .group.affinity | nindent 2 }}
{{- else if gt $hosts 1 }}
affinity:
  podAffinity:
    preferredDuringSchedulingIgnoredDuringExecution:
      - weight: 100
        podAffinityTerm:
          topologyKey: {{ $topology.hostsTogetherIn }}
          labelSelector:
            matchLabels:
              {{- include "kvarto.selectorLabels" .root | nindent 14 }}
              ray.io/group: {{ .group.name }}
          {{- /* On by default from 1.31. */}}
          {{- if semverCompare ">=1.31.0-0" .root.Capabilities.KubeVersion.Version }}
          matchLabelKeys: [ray.io/cluster]
          {{- end }}
{{- end }}
{{- end }}

{{/* NewCluster or NewClusterWithIncrementalUpgrade; auto takes the second where all that it needs is there. */}}
{{- define "kvarto.upgradeType" -}}
{{- $upgrade := .Values.upgradeStrategy -}}
{{- if ne $upgrade.type "auto" -}}
{{- $upgrade.type -}}
{{- else if and $upgrade.gatewayClassName .Values.ray.autoscaler.enabled (.Capabilities.APIVersions.Has "gateway.networking.k8s.io/v1") -}}
NewClusterWithIncrementalUpgrade
{{- else -}}
NewCluster
{{- end -}}
{{- end }}
