{{/*
The ServeConfig that the server is started with: `config`, and what the chart decides. `host` is every interface: a pod's
firewall is its NetworkPolicy. A null means the default, so it is left out.
*/}}
{{- define "kvarto.config" -}}
{{- $config := dict "host" "0.0.0.0" -}}
{{- range $key, $value := .Values.config -}}
{{- if not (kindIs "invalid" $value) -}}
{{- /* Helm reads numbers as floats; %v of a large one would be 1e+06. */ -}}
{{- if and (kindIs "float64" $value) (eq (floor $value) $value) -}}
{{- $_ := set $config $key (int64 $value) -}}
{{- else -}}
{{- $_ := set $config $key $value -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if not .Values.grpc.enabled -}}
{{- $_ := set $config "grpc_port" nil -}}
{{- end -}}
{{- toYaml $config -}}
{{- end }}

{{/* The Ray Serve config file. */}}
{{- define "kvarto.serveConfig" -}}
proxy_location: EveryNode
http_options:
  host: 0.0.0.0
  port: {{ include "kvarto.httpPort" . }}
applications:
  - name: kvarto
    route_prefix: /
    import_path: kvarto:build_app
    args:
      {{- include "kvarto.config" . | nindent 6 }}
    {{- if or .Values.serve.httpOnHead .Values.serve.autoscaling.enabled }}
    deployments:
      - name: http
        {{- with .Values.serve.autoscaling }}
        {{- if .enabled }}
        num_replicas: auto
        autoscaling_config:
          min_replicas: {{ .minReplicas }}
          max_replicas: {{ .maxReplicas }}
          target_ongoing_requests: {{ .targetOngoingRequests }}
        {{- end }}
        {{- end }}
        {{- if .Values.serve.httpOnHead }}
        ray_actor_options:
          num_cpus: 0
          resources:
            "node:__internal_head__": 0.001
        {{- end }}
    {{- end }}
{{- end }}
