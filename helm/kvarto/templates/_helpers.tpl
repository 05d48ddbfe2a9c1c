{{/*
Names. KubeRay appends up to 23 characters to a RayService's name ("-xxxxx-head-svc" and pod suffixes), all of which
must fit 63.
*/}}
{{- define "kvarto.name" -}}
{{- .Values.nameOverride | default .Chart.Name | trunc 40 | trimSuffix "-" -}}
{{- end }}

{{- define "kvarto.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- $name := include "kvarto.name" . -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* Where clients connect. In rayservice mode KubeRay keeps both Services pointed at the cluster that serves. */}}
{{- define "kvarto.httpService" -}}
{{- include "kvarto.fullname" . -}}
{{- end }}

{{- define "kvarto.grpcService" -}}
{{- if eq .Values.mode "rayservice" -}}
{{- printf "%s-head-svc" (include "kvarto.fullname" .) -}}
{{- else -}}
{{- include "kvarto.fullname" . -}}
{{- end -}}
{{- end }}

{{- define "kvarto.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- .Values.serviceAccount.name | default (include "kvarto.fullname" .) -}}
{{- else -}}
{{- .Values.serviceAccount.name | default "default" -}}
{{- end -}}
{{- end }}

{{/* Labels of the chart's own objects. */}}
{{- define "kvarto.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/name: {{ include "kvarto.name" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{ include "kvarto.selectorLabels" . }}
{{- end }}

{{/*
Labels of pods, by which they are selected. `app.kubernetes.io/name` and `created-by` are not among them: KubeRay sets
both on its pods and selects the head by them.
*/}}
{{- define "kvarto.selectorLabels" -}}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/part-of: kvarto
{{- end }}

{{/* The pod that answers HTTP and gRPC. */}}
{{- define "kvarto.serverSelector" -}}
{{ include "kvarto.selectorLabels" . }}
app.kubernetes.io/component: {{ ternary "head" "server" (eq .Values.mode "rayservice") }}
{{- end }}

{{/* By digest, or by version: the image that has the device's libraries. */}}
{{- define "kvarto.image" -}}
{{- if .Values.image.digest -}}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest -}}
{{- else -}}
{{- $built := ternary "cuda" "cpu" (eq (.Values.config.device | default "auto") "cuda") -}}
{{- printf "%s:%s" .Values.image.repository (.Values.image.tag | default (printf "%s-%s" .Chart.AppVersion $built)) -}}
{{- end -}}
{{- end }}

{{/* Whether an init container fetches the model: a path is there already. */}}
{{- define "kvarto.fetches" -}}
{{- if and .Values.modelCache.fetch (not (hasPrefix "/" .Values.config.model)) -}}true{{- end -}}
{{- end }}

{{/* Ports, by the configuration's names and defaults. */}}
{{- define "kvarto.httpPort" -}}
{{- .Values.config.port | default 8000 | int -}}
{{- end }}

{{- define "kvarto.grpcPort" -}}
{{- .Values.config.grpc_port | default 9000 | int -}}
{{- end }}

{{/* Seconds that running requests may take to end: `drain_timeout_s`, by its default in ServeConfig. */}}
{{- define "kvarto.drainTimeout" -}}
{{- if hasKey .Values.config "drain_timeout_s" -}}
{{- .Values.config.drain_timeout_s | float64 | ceil | int -}}
{{- else -}}
30
{{- end -}}
{{- end }}

{{/* preStop's delay and drain, and what Ray takes to end. */}}
{{- define "kvarto.gracePeriod" -}}
{{- add .Values.drain.delaySeconds (include "kvarto.drainTimeout" . | int) .Values.drain.marginSeconds -}}
{{- end }}
