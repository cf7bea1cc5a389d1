{{- define "gangplank.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{/* The release's name, if it has the chart's in it; else both. 50 octets leave room for what is appended. */}}
{{- define "gangplank.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- $name := include "gangplank.name" . -}}
{{- ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* All pods of the release. */}}
{{- define "gangplank.instanceLabels" -}}
app.kubernetes.io/name: {{ include "gangplank.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{/* The pods of the server. */}}
{{- define "gangplank.selectorLabels" -}}
{{ include "gangplank.instanceLabels" . }}
app.kubernetes.io/component: server
{{- end -}}

{{- define "gangplank.labels" -}}
{{ include "gangplank.instanceLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{/* Name, namespace and labels of an object, with `component` at the end of its name. */}}
{{- define "gangplank.metadata" -}}
name: {{ include "gangplank.fullname" .root }}{{ with .suffix }}-{{ . }}{{ end }}
namespace: {{ .root.Release.Namespace }}
labels:
  {{- include "gangplank.labels" .root | nindent 2 }}
{{- end -}}

{{- define "gangplank.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ default .Chart.AppVersion .Values.image.tag }}
{{- end -}}
{{- end -}}

{{/* "true" if machines join: then gangplank has a CA of its own, and Secrets. */}}
{{- define "gangplank.hasSecrets" -}}
{{- if or (not .Values.tls.secretName) .Values.tls.serverCASecretName -}}true{{- end -}}
{{- end -}}

{{/* Where registrants reach a process: what the user says, its pod, and the Service. */}}
{{- define "gangplank.advertise" -}}
{{- $service := printf "%s.%s.svc" (include "gangplank.fullname" .) .Release.Namespace -}}
{{- $port := int .Values.grpc.service.port -}}
{{- if ne $port 9080 -}}{{- $service = printf "%s:%d" $service $port -}}{{- end -}}
{{- join "," (concat .Values.grpc.advertise (list "$(POD_IPS)" $service)) -}}
{{- end -}}

{{/* What no schema can say. */}}
{{- define "gangplank.check" -}}
{{- if and .Values.persistence.enabled (gt (int .Values.replicas) 1) -}}
{{- fail "persistence.enabled: a data directory has one process: set replicas to 1, or leave persistence out; with two replicas what is acknowledged is in Kubernetes" -}}
{{- end -}}
{{- if and .Values.persistence.existingClaim (not .Values.persistence.enabled) -}}
{{- fail "persistence.existingClaim: means nothing without persistence.enabled=true" -}}
{{- end -}}
{{- if and (or .Values.tls.clientCASecretName .Values.tls.serverCASecretName) (not .Values.tls.secretName) -}}
{{- fail "tls.clientCASecretName and tls.serverCASecretName: mean nothing without tls.secretName" -}}
{{- end -}}
{{- if and (eq .Values.grpc.service.type "ClusterIP") (or .Values.grpc.service.nodePort .Values.grpc.service.loadBalancerSourceRanges .Values.grpc.service.loadBalancerClass) -}}
{{- fail "grpc.service: nodePort and loadBalancer… mean nothing with type ClusterIP" -}}
{{- end -}}
{{- if and (eq .Values.grpc.service.type "NodePort") (or .Values.grpc.service.loadBalancerSourceRanges .Values.grpc.service.loadBalancerClass) -}}
{{- fail "grpc.service: loadBalancer… means nothing with type NodePort" -}}
{{- end -}}
{{- end -}}
