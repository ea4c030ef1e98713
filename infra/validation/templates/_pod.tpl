{{- define "pod" }}
automountServiceAccountToken: false
serviceAccountName: stages
restartPolicy: Never
priorityClassName: fmops-training
securityContext: {runAsNonRoot: true, runAsUser: 1000, seccompProfile: {type: RuntimeDefault}}
{{- end }}
{{- define "container" }}
securityContext: {allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}
{{- end }}
{{- define "image" -}}
{{ .root.Values.cluster.registry }}/{{ .name }}@{{ (index .root.Values.images .name).digest | required (printf "images.%s.digest is empty: run make images" .name) }}
{{- end }}
