{{- define "apps.check" -}}
{{- if not .Values.git.repo }}{{ fail "git.repo is empty: name your fork (make platform GIT_REPO=https://… GIT_REVISION=…)" }}{{ end -}}
{{- if not .Values.git.revision }}{{ fail "git.revision is empty: name the commit or tag to run" }}{{ end -}}
{{- if not .Values.cluster }}{{ fail "cluster is missing: add -f infra/platform/cluster.yaml (make platform-values writes it)" }}{{ end -}}
{{- if not .Values.images }}{{ fail "images are missing: add -f infra/platform/images.lock.yaml (make images writes it)" }}{{ end -}}
{{- end -}}
