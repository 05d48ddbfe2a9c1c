{{/* What every pod has in common, in both modes. */}}
{{- define "kvarto.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
# A cache of many files is not walked at every start.
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "kvarto.securityContext" -}}
allowPrivilegeEscalation: false
privileged: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities:
  drop: [ALL]
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "kvarto.imageFields" -}}
image: {{ include "kvarto.image" . }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
{{- end }}

{{- define "kvarto.cacheEnv" -}}
- name: HOME
  value: /home/kvarto
- name: KVARTO_CACHE
  value: /var/cache/kvarto
- name: HF_HOME
  value: /var/cache/kvarto/huggingface
{{- with .Values.hfToken.existingSecret }}
- name: HF_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ . }}
      key: {{ $.Values.hfToken.key }}
{{- end }}
{{- end }}

{{/* Every Ray pod has the key: Serve may build the application on any of them. */}}
{{- define "kvarto.env" -}}
{{ include "kvarto.cacheEnv" . }}
{{- if include "kvarto.fetches" . }}
- name: HF_HUB_OFFLINE
  value: "1"
{{- end }}
{{- with .Values.apiKey.existingSecret }}
- name: KVARTO_API_KEY
  valueFrom:
    secretKeyRef:
      name: {{ . }}
      key: {{ $.Values.apiKey.key }}
{{- end }}
- name: RAY_USAGE_STATS_ENABLED
  value: "0"
{{- with .Values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* The init container that fetches the model once; with the model in the cache it ends at once. */}}
{{- define "kvarto.fetchContainer" -}}
- name: fetch-model
  {{- include "kvarto.imageFields" . | nindent 2 }}
  args: [fetch, {{ .Values.config.model | quote }}]
  env:
    {{- include "kvarto.cacheEnv" . | nindent 4 }}
    {{- with .Values.extraEnv }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  securityContext:
    {{- include "kvarto.securityContext" . | nindent 4 }}
  resources:
    {{- toYaml .Values.modelCache.fetchResources | nindent 4 }}
  volumeMounts:
    {{- include "kvarto.volumeMounts" . | nindent 4 }}
{{- end }}

{{- define "kvarto.volumeMounts" -}}
- name: tmp
  mountPath: /tmp
- name: home
  mountPath: /home/kvarto
- name: model-cache
  mountPath: /var/cache/kvarto
- name: dshm
  mountPath: /dev/shm
{{- with .Values.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Call with (dict "root" $ "shmSize" size). */}}
{{- define "kvarto.volumes" -}}
# Ray's sessions and logs.
- name: tmp
  emptyDir:
    sizeLimit: {{ .root.Values.tmpSize }}
- name: home
  emptyDir:
    sizeLimit: 1Gi
- name: model-cache
  {{- with .root.Values.modelCache }}
  {{- if eq .type "emptyDir" }}
  emptyDir:
    sizeLimit: {{ .size }}
  {{- else }}
  persistentVolumeClaim:
    claimName: {{ .existingClaim | default (printf "%s-model-cache" (include "kvarto.fullname" $.root)) }}
  {{- end }}
  {{- end }}
# Memory: counts towards the container's limit.
- name: dshm
  emptyDir:
    medium: Memory
    sizeLimit: {{ .shmSize }}
{{- with .root.Values.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Where a pod may run. Call with (dict "root" $ "pod" values). */}}
{{- define "kvarto.scheduling" -}}
{{- with .pod.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .pod.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .pod.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .pod.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* preStop of the pod that answers requests: keep serving until no endpoint names it, then let what runs end. */}}
{{- define "kvarto.serverLifecycle" -}}
preStop:
  exec:
    command:
      - kvarto
      - drain
      - --url
      - http://127.0.0.1:{{ include "kvarto.httpPort" . }}
      - --delay
      - {{ .Values.drain.delaySeconds | quote }}
      - --timeout
      - {{ include "kvarto.drainTimeout" . | quote }}
{{- end }}
