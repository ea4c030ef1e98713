"""httpx: the few calls of the Kubernetes API that we need, with kubectl's own credentials or a pod's.

Enters: a kubeconfig, or the token of a service account; manifests. Leaves: objects as the server knows them.
Refuses: to reach a server without checking its certificate, unless the kubeconfig itself says plain HTTP.
"""

from __future__ import annotations

import base64
import json
import os
import shlex
import ssl
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import yaml

from fmops.errors import EXIT_FAILED, FmopsError, unknown

Manifest = dict[str, Any]
MANAGER = "fmops"
"""Who owns the fields that we apply, in the server's books."""
POD_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
PLURALS = {
    "ConfigMap": "configmaps", "Deployment": "deployments", "HTTPRoute": "httproutes", "Job": "jobs", "Pod": "pods",
    "InferenceService": "inferenceservices", "PodDisruptionBudget": "poddisruptionbudgets", "RayJob": "rayjobs",
    "RayService": "rayservices", "Service": "services",
}  # fmt: skip


class ApiError(FmopsError):
    """The API server refuses."""

    exit_code = EXIT_FAILED

    def __init__(self, text: str, *, status: int) -> None:
        super().__init__(text)
        self.status = status


class Conflict(ApiError):
    """Somebody changed the object since it was read, or it is there already."""


@dataclass
class Cluster:
    """One API server. `token` is asked again when the server no longer takes it."""

    server: str
    context: str
    """What people call it."""
    tls: ssl.SSLContext | None = None
    token: Callable[[], str | None] = lambda: None
    timeout_s: float = 30.0
    _client: httpx.Client = field(init=False, repr=False)
    _known: str | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self._client = httpx.Client(base_url=self.server, verify=self.tls or True, timeout=self.timeout_s)

    def get(self, kind: str, name: str, *, version: str, namespace: str | None = None) -> Manifest | None:
        """An object, or None where there is none (or no such kind)."""
        found = self.request("GET", path_of(kind, version=version, namespace=namespace, name=name), missing=True)
        return found if found is not None else None

    def list(self, kind: str, *, version: str, namespace: str | None = None, labels: str = "") -> list[Manifest]:
        """Objects, those with the labels (`app=x`) only; none where there is no such kind."""
        path = path_of(kind, version=version, namespace=namespace)
        found = self.request("GET", path, query={"labelSelector": labels} if labels else {}, missing=True)
        return list(found["items"]) if found else []

    def create(self, manifest: Manifest) -> Manifest:
        """Make an object.

        Raises:
            Conflict: there is one of that name.
        """
        return self.request("POST", _path(manifest, name=False), body=manifest) or {}

    def apply(self, manifest: Manifest) -> Manifest:
        """Make an object so, whether or not it is there; fields that others own stay (server-side apply)."""
        query = {"fieldManager": MANAGER, "force": "true"}
        return (
            self.request("PATCH", _path(manifest), body=manifest, query=query, form="application/apply-patch+yaml")
            or {}
        )

    def replace(self, manifest: Manifest) -> Manifest:
        """Put an object back that was read and changed.

        Raises:
            Conflict: it is another by now.
        """
        return self.request("PUT", _path(manifest), body=manifest) or {}

    def delete(self, kind: str, name: str, *, version: str, namespace: str | None = None) -> bool:
        """End an object; it is there until all that it made is gone. False where there is none."""
        path = path_of(kind, version=version, namespace=namespace, name=name)
        return self.request("DELETE", path, query={"propagationPolicy": "Foreground"}, missing=True) is not None

    def lines(self, pod: str, *, container: str, namespace: str, since: str | None) -> Iterator[tuple[str, str]]:
        """(time stamp, line) that a container has written after `since`; none while it has not started."""
        query = {"timestamps": "true", "container": container} | (
            {"sinceTime": since.partition(".")[0] + "Z"} if since else {}
        )
        path = path_of("Pod", version="v1", namespace=namespace, name=pod) + "/log"
        reply = self._send("GET", path, params=query)
        for line in reply.text.splitlines() if reply.is_success else ():
            stamp, _, text = line.partition(" ")
            # The server knows seconds only: what was seen within the same one comes again.
            if since is None or stamp > since:
                yield stamp, text

    def ask(
        self, service: str, path: str, body: Manifest, *, namespace: str, timeout_s: float = 60.0
    ) -> httpx.Response:
        """POST to a service inside the cluster, through the API server (`service` as `http:name:port`)."""
        address = f"/api/v1/namespaces/{namespace}/services/{service}/proxy{path}"
        return self._send("POST", address, json=body, timeout=timeout_s)

    def request(
        self, verb: str, path: str, *, body: Manifest | None = None, query: Mapping[str, str] | None = None,
        form: str = "application/json", missing: bool = False,
    ) -> Manifest | None:  # fmt: skip
        """One call; None for a 404 that `missing` allows.

        Raises:
            ApiError: what the server says, with the remedy.
        """
        content = None if body is None else json.dumps(body)
        reply = self._send(verb, path, content=content, params=dict(query or {}), headers={"Content-Type": form})
        if reply.status_code == 404 and missing:
            return None
        if reply.is_success:
            return dict(reply.json())
        raise self._refusal(verb, path, reply)

    def _send(self, verb: str, path: str, **arguments: Any) -> httpx.Response:
        try:
            reply = self._client.request(verb, path, auth=self._authorise, **arguments)
            if reply.status_code == 401:
                # A token of EKS lives fifteen minutes.
                self._known = None
                reply = self._client.request(verb, path, auth=self._authorise, **arguments)
        except httpx.HTTPError as error:
            raise ApiError(
                f"the Kubernetes API of {self.context} ({self.server}) cannot be reached: {error}. Its address is a "
                "private one: be inside its network (VPN), or name another with `kubectl config use-context`.",
                status=0,
            ) from None
        return reply

    def _authorise(self, request: httpx.Request) -> httpx.Request:
        self._known = self._known or self.token()
        if self._known:
            request.headers["Authorization"] = f"Bearer {self._known}"
        return request

    def _refusal(self, verb: str, path: str, reply: httpx.Response) -> ApiError:
        try:
            said = str(reply.json()["message"])
        except (ValueError, KeyError, TypeError):
            said = reply.text[:300]
        text = f"{self.context} answers {reply.status_code} to {verb} {path}: {said}."
        if reply.status_code == 409:
            return Conflict(text, status=409)
        remedies = {
            401: " Log in again (`aws eks update-kubeconfig`).",
            403: " Your role may not do that: see the access entries in infra/cluster/access.tf.",
            404: " Is the platform installed? `kubectl get crd`; see infra/README.md.",
        }
        return ApiError(text + remedies.get(reply.status_code, ""), status=reply.status_code)


def connect(context: str | None = None) -> Cluster:
    """The cluster of a pod's own service account, else of $KUBECONFIG or ~/.kube/config.

    Raises:
        FmopsError: there is neither, or no such context.
    """
    host = os.environ.get("KUBERNETES_SERVICE_HOST")
    if host and context is None and (POD_ACCOUNT / "token").is_file():
        return Cluster(
            server=f"https://{host}:{os.environ.get('KUBERNETES_SERVICE_PORT', '443')}",
            context="this cluster",
            tls=ssl.create_default_context(cafile=str(POD_ACCOUNT / "ca.crt")),
            # The kubelet renews the file.
            token=lambda: (POD_ACCOUNT / "token").read_text().strip(),
        )
    path = Path(os.environ.get("KUBECONFIG", "").split(os.pathsep)[0] or Path.home() / ".kube" / "config")
    if not path.is_file():
        raise FmopsError(f"no cluster: there is no {path}. `aws eks update-kubeconfig --name CLUSTER` writes it.")
    config = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    name: str | None = context or config.get("current-context")
    contexts = {each["name"]: each["context"] for each in config.get("contexts") or ()}
    if name is None or name not in contexts:
        raise unknown("context", str(name), contexts)
    return _of_context(config, name, contexts[name], folder=path.parent)


def path_of(kind: str, *, version: str, namespace: str | None = None, name: str | None = None) -> str:
    """Where the API keeps objects of a kind."""
    if kind not in PLURALS:
        raise unknown("kind", kind, PLURALS)
    root = f"/apis/{version}" if "/" in version else f"/api/{version}"
    space = f"/namespaces/{namespace}" if namespace else ""
    return f"{root}{space}/{PLURALS[kind]}" + (f"/{name}" if name else "")


def _path(manifest: Manifest, *, name: bool = True) -> str:
    metadata = manifest["metadata"]
    return path_of(
        manifest["kind"], version=manifest["apiVersion"], namespace=metadata.get("namespace"),
        name=metadata["name"] if name else None,
    )  # fmt: skip


def _of_context(config: Manifest, name: str, context: Manifest, *, folder: Path) -> Cluster:
    cluster = next(each["cluster"] for each in config["clusters"] if each["name"] == context["cluster"])
    users = {each["name"]: each["user"] for each in config.get("users") or ()}
    user: Manifest = users.get(context.get("user")) or {}
    server = str(cluster["server"])
    if cluster.get("insecure-skip-tls-verify"):
        raise FmopsError(
            f"context {name!r} does not check its server's certificate. Give it its certificate-authority."
        )
    tls = None
    if server.startswith("https://"):
        tls = ssl.create_default_context()
        authority = _content(cluster, "certificate-authority", folder=folder)
        if authority:
            tls = ssl.create_default_context(cadata=authority)
        certificate, key = (_content(user, what, folder=folder) for what in ("client-certificate", "client-key"))
        if certificate and key:
            # OpenSSL reads certificates from files alone.
            with tempfile.NamedTemporaryFile("w", suffix=".pem") as both:
                both.write(f"{certificate}\n{key}\n")
                both.flush()
                tls.load_cert_chain(both.name)
    return Cluster(server=server, context=name, tls=tls, token=lambda: _token(user, name=name))


def _content(section: Manifest, what: str, *, folder: Path) -> str | None:
    if section.get(f"{what}-data"):
        return base64.b64decode(section[f"{what}-data"]).decode()
    return (folder / section[what]).read_text() if section.get(what) else None


def _token(user: Manifest, *, name: str) -> str | None:
    """A stated token, or the one that the kubeconfig's command prints (EKS: `aws eks get-token`)."""
    if user.get("token") or not user.get("exec"):
        return user.get("token")
    plugin = user["exec"]
    command = [plugin["command"], *(plugin.get("args") or ())]
    wanted = {"apiVersion": plugin["apiVersion"], "kind": "ExecCredential", "spec": {"interactive": False}}
    extra = {each["name"]: each["value"] for each in plugin.get("env") or ()}
    environment = {**os.environ, **extra, "KUBERNETES_EXEC_INFO": json.dumps(wanted)}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=True)
        return str(json.loads(done.stdout)["status"]["token"])
    except (OSError, subprocess.SubprocessError, ValueError, KeyError) as error:
        said = getattr(error, "stderr", None) or error
        raise FmopsError(f"context {name!r}: `{shlex.join(command)}` gives no token: {str(said).strip()}.") from None
