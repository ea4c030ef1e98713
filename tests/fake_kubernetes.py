"""A small Kubernetes API over real HTTP: objects with versions, conflicts, apply, labels, a service proxy.

Enters: HTTP requests. Leaves: objects, kept in memory. Refuses: a write from a stale version (409) and a wrong token
(401), as the real one does.

It knows no schemas and runs no controllers: a test plays those, with `change` and `serve_with`.
"""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from werkzeug.serving import WSGIRequestHandler, make_server
from werkzeug.wrappers import Request, Response

Manifest = dict[str, Any]
Answer = Callable[[str, Manifest], tuple[int, Manifest]]
"""Path below a service and body → status and JSON."""


@dataclass
class FakeKubernetes:
    """Objects by their path; `requests` notes (verb, path); `refusals` are statuses for the next requests of a verb."""

    url: str = ""
    token: str = "let me in"
    objects: dict[str, Manifest] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    refusals: list[tuple[str, int]] = field(default_factory=list)
    allowed: set[str] = field(default_factory=set)
    """Kinds, in the plural, that a SelfSubjectAccessReview grants the caller."""
    hidden: tuple[str, ...] = ()
    """Beginnings of paths that the caller may not read (403)."""
    services: dict[str, Answer] = field(default_factory=dict)
    logs: dict[tuple[str, str], list[tuple[str, str]]] = field(default_factory=dict)
    """(time stamp, line) of each (pod, container)."""
    before: Callable[[str, str], None] | None = None
    """Called with verb and path before each request is answered, outside the lock: a test's other actor."""
    lock: threading.RLock = field(default_factory=threading.RLock)
    _version: int = 0

    def find(self, kind: str, name: str) -> Manifest | None:
        """A copy of the object of this kind and name."""
        with self.lock:
            for manifest in self.objects.values():
                if manifest["kind"] == kind and manifest["metadata"]["name"] == name:
                    return copy.deepcopy(manifest)
        return None

    def change(self, kind: str, name: str, **parts: Any) -> None:
        """Set top-level parts of an object (`status=…`), as its controller would."""
        with self.lock:
            manifest = next(
                each for each in self.objects.values() if each["kind"] == kind and each["metadata"]["name"] == name
            )
            manifest.update(parts)
            self._stamp(manifest)

    def serve_with(self, service: str, answer: Answer) -> None:
        """Answer what is sent to a service (`http:name:port`) through the proxy."""
        self.services[service] = answer

    def kubeconfig(self, path: Path) -> Path:
        """A kubeconfig for this server."""
        config = {
            "apiVersion": "v1", "kind": "Config", "current-context": "fake",
            "clusters": [{"name": "fake", "cluster": {"server": self.url}}],
            "users": [{"name": "me", "user": {"token": self.token}}],
            "contexts": [{"name": "fake", "context": {"cluster": "fake", "user": "me"}}],
        }  # fmt: skip
        path.write_text(yaml.safe_dump(config))
        return path

    def answer(self, request: Request) -> Response:
        path = request.path
        if self.before:
            self.before(request.method, path)
        with self.lock:
            self.requests.append((request.method, path))
            if request.headers.get("Authorization") != f"Bearer {self.token}":
                return _failure(401, "Unauthorized")
            for refusal in self.refusals:
                if refusal[0] == request.method:
                    self.refusals.remove(refusal)
                    return _failure(refusal[1], "ordered by the test")
            if path.startswith(self.hidden):
                return _failure(403, "your role may not")
            body = yaml.safe_load(request.get_data()) if request.get_data() else {}
            if path.endswith("/selfsubjectaccessreviews"):
                granted = body["spec"]["resourceAttributes"]["resource"] in self.allowed
                return _json({**body, "status": {"allowed": granted}}, status=201)
            if "/proxy/" in path:
                front, _, rest = path.partition("/proxy/")
                service = self.services.get(front.rpartition("/")[2])
                status, reply = service(f"/{rest}", body) if service else (503, {"message": "no endpoints available"})
                return Response(json.dumps(reply), status=status, mimetype="application/json")
            if path.endswith("/log"):
                return self._log(path.split("/")[-2], request)
            return getattr(self, f"_{request.method.lower()}")(path, body, request)

    def _log(self, pod: str, request: Request) -> Response:
        lines = self.logs.get((pod, request.args.get("container", "")))
        if lines is None:
            return _failure(400, "container is waiting to start")
        since = request.args.get("sinceTime", "")
        return Response("".join(f"{stamp} {text}\n" for stamp, text in lines if stamp >= since.rstrip("Z")))

    def _get(self, path: str, _: Manifest, request: Request) -> Response:
        if path in self.objects:
            return _json(self.objects[path])
        labels = [part.split("=", 1) for part in request.args.get("labelSelector", "").split(",") if part]
        below = [each for place, each in self.objects.items() if place.rpartition("/")[0] == path]
        found = [
            each for each in below if all(each["metadata"].get("labels", {}).get(key) == value for key, value in labels)
        ]
        if below or _is_collection(path):
            return _json({"kind": "List", "items": found})
        return _failure(404, f"{path.rpartition('/')[2]} not found")

    def _post(self, path: str, body: Manifest, _: Request) -> Response:
        place = f"{path}/{body['metadata']['name']}"
        if place in self.objects:
            return _failure(409, f"{body['metadata']['name']} already exists")
        return _json(self._keep(place, body), status=201)

    def _put(self, path: str, body: Manifest, _: Request) -> Response:
        if path not in self.objects:
            return _failure(404, "not found")
        if body["metadata"].get("resourceVersion") not in (None, self.objects[path]["metadata"]["resourceVersion"]):
            return _failure(409, "the object has been modified; please apply your changes to the latest version")
        return _json(self._keep(path, body))

    def _patch(self, path: str, body: Manifest, request: Request) -> Response:
        if request.content_type == "application/apply-patch+yaml":
            return _json(self._keep(path, _merged(self.objects.get(path, {}), body)))
        if path not in self.objects:
            return _failure(404, "not found")
        return _json(self._keep(path, _merged(self.objects[path], body)))

    def _delete(self, path: str, _: Manifest, __: Request) -> Response:
        if path not in self.objects:
            return _failure(404, "not found")
        gone = self.objects.pop(path)
        for place, each in list(self.objects.items()):
            if {"uid": gone["metadata"]["uid"]} in each["metadata"].get("ownerReferences", ()):
                del self.objects[place]
                self.logs = {of: lines for of, lines in self.logs.items() if of[0] != each["metadata"]["name"]}
        return _json(gone)

    def _keep(self, place: str, manifest: Manifest) -> Manifest:
        self.objects[place] = copy.deepcopy(manifest)
        self._stamp(self.objects[place])
        return self.objects[place]

    def _stamp(self, manifest: Manifest) -> None:
        self._version += 1
        manifest["metadata"]["resourceVersion"] = str(self._version)
        manifest["metadata"].setdefault("uid", f"uid-{self._version}")


class _KeepAlive(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"

    def log(self, *_: Any, **__: Any) -> None:
        return


@contextmanager
def serve() -> Iterator[FakeKubernetes]:
    """The API on this machine until the block ends."""
    fake = FakeKubernetes()

    def application(environ: dict[str, Any], start: Any) -> Any:
        return fake.answer(Request(environ))(environ, start)

    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=_KeepAlive)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    fake.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _is_collection(path: str) -> bool:
    """Whether a path ends with a kind, not with an object's name: /api/v1/namespaces/a/pods, not …/pods/b."""
    parts = path.strip("/").split("/")
    return len(parts[2 if parts[0] == "api" else 3 :]) % 2 == 1


def _merged(old: Any, new: Any) -> Any:
    """Objects are merged key by key; everything else is replaced."""
    if isinstance(old, dict) and isinstance(new, dict):
        return {**old, **{key: _merged(old.get(key), value) for key, value in new.items()}}
    return copy.deepcopy(new)


def _json(body: Manifest, *, status: int = 200) -> Response:
    return Response(json.dumps(body), status=status, mimetype="application/json")


def _failure(status: int, message: str) -> Response:
    return _json({"kind": "Status", "status": "Failure", "message": message, "code": status}, status=status)
