"""A local AWS API for `terraform apply`: moto's server, and the parts of EKS's API that moto lacks.

Enters: HTTP requests of the AWS provider. Leaves: answers in EKS's JSON, kept in memory.
Refuses: nothing on its own: what neither knows is moto's error, and the apply fails on it.

moto 5.2 has EKS clusters and node groups. Add-ons, access entries, Pod Identity associations and the subscribers of
budgets are answered here, in the form of AWS's API references: enough to prove the order of creation and destruction,
no proof that AWS accepts a value.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import unquote
from urllib.request import urlopen

from werkzeug.serving import make_server
from werkzeug.wrappers import Request, Response

ACCOUNT = "123456789012"  # moto's
KEYS = {"aws_access_key_id": "local", "aws_secret_access_key": "local"}
ROUTE = re.compile(
    r"^/clusters/(?P<cluster>[^/]+)/(?P<kind>addons|access-entries|pod-identity-associations)(?P<rest>/.*)?$"
)
CREATED = 1_790_000_000


class EksExtras:
    """Add-ons, access entries with their policies, and Pod Identity associations of every cluster."""

    def __init__(self) -> None:
        self.addons: dict[str, dict[str, Any]] = {}
        self.entries: dict[str, dict[str, Any]] = {}
        self.policies: dict[str, list[dict[str, Any]]] = {}
        self.associations: dict[str, dict[str, Any]] = {}
        self.subscribers: list[dict[str, Any]] = []
        self.budget_tags: list[dict[str, str]] = []

    def budgets(self, request: Request, action: str) -> Response | None:
        """Tags and subscribers of a budget, which moto forgets. None: moto's own business."""
        body = json.loads(request.get_data() or b"{}")
        if action == "CreateBudget":
            self.budget_tags = body.get("ResourceTags", [])
        if action == "ListTagsForResource":
            return _json({"ResourceTags": self.budget_tags})
        if action == "CreateNotification":
            self.subscribers.append(body)
        if action != "DescribeSubscribersForNotification":
            return None
        notice = body["Notification"]
        known = [one for one in self.subscribers if notice.items() >= one["Notification"].items()]
        return _json({"Subscribers": [who for one in known for who in one["Subscribers"]]})

    def answer(self, request: Request, cluster: str, kind: str, rest: list[str]) -> Response:
        body = json.loads(request.get_data() or b"{}")
        kinds = {"addons": self.addon, "access-entries": self.entry, "pod-identity-associations": self.association}
        try:
            return _json(kinds[kind](request.method, cluster, rest, body))
        except KeyError as missing:
            text = {"message": f"No {kind} {missing} in {cluster}"}
            return _json(text, status=404, error="ResourceNotFoundException")

    def addon(self, verb: str, cluster: str, rest: list[str], body: dict[str, Any]) -> dict[str, Any]:
        if verb == "POST" and not rest:
            pods = [
                self._associate(cluster, {**one, "namespace": "kube-system"})
                for one in body.get("podIdentityAssociations", [])
            ]
            name = body["addonName"]
            self.addons[name] = {
                **body, "clusterName": cluster, "status": "ACTIVE", "health": {"issues": []},
                "addonVersion": body.get("addonVersion") or "v1.0.0-eksbuild.1",
                "addonArn": f"arn:aws:eks:us-east-1:{ACCOUNT}:addon/{cluster}/{name}/1", "createdAt": CREATED,
                "modifiedAt": CREATED, "podIdentityAssociations": [pod["associationArn"] for pod in pods],
            }  # fmt: skip
            return {"addon": self.addons[name]}
        if verb == "DELETE":
            gone = self.addons.pop(rest[0])
            for arn in gone["podIdentityAssociations"]:
                del self.associations[arn.rpartition("/")[2]]
            return {"addon": {**gone, "status": "DELETING"}}
        return {"addon": self.addons[rest[0]]}

    def entry(self, verb: str, cluster: str, rest: list[str], body: dict[str, Any]) -> dict[str, Any]:
        if rest[1:] == ["access-policies"] or len(rest) == 3:
            return self._policy(verb, rest, body)
        if verb == "POST" and not rest:
            arn = body["principalArn"]
            self.entries[arn] = {
                "kubernetesGroups": [], "type": "STANDARD", "username": arn, "tags": {}, **body, "clusterName": cluster,
                "accessEntryArn": f"arn:aws:eks:us-east-1:{ACCOUNT}:access-entry/{cluster}/{len(self.entries)}",
                "createdAt": CREATED, "modifiedAt": CREATED,
            }  # fmt: skip
            return {"accessEntry": self.entries[arn]}
        if verb == "DELETE":
            del self.entries[rest[0]]
            return {}
        return {"accessEntry": self.entries[rest[0]]}

    def _policy(self, verb: str, rest: list[str], body: dict[str, Any]) -> dict[str, Any]:
        entry = self.entries[rest[0]]
        held = self.policies.setdefault(rest[0], [])
        if verb == "POST":
            held.append({**body, "associatedAt": CREATED, "modifiedAt": CREATED})
            return {"clusterName": entry["clusterName"], "principalArn": rest[0], "associatedAccessPolicy": held[-1]}
        if verb == "DELETE":
            self.policies[rest[0]] = [one for one in held if one["policyArn"] != rest[2]]
            return {}
        return {"clusterName": entry["clusterName"], "principalArn": rest[0], "associatedAccessPolicies": held}

    def association(self, verb: str, cluster: str, rest: list[str], body: dict[str, Any]) -> dict[str, Any]:
        if verb == "POST" and not rest:
            return {"association": self._associate(cluster, body)}
        if not rest:
            return {"associations": list(self.associations.values())}
        if verb == "DELETE":
            return {"association": self.associations.pop(rest[0])}
        return {"association": self.associations[rest[0]]}

    def _associate(self, cluster: str, body: dict[str, Any]) -> dict[str, Any]:
        name = f"a-{len(self.associations):017d}"
        self.associations[name] = {
            "tags": {}, **body, "clusterName": cluster, "associationId": name,
            "createdAt": CREATED, "modifiedAt": CREATED,
            "associationArn": f"arn:aws:eks:us-east-1:{ACCOUNT}:podidentityassociation/{cluster}/{name}",
        }  # fmt: skip
        return self.associations[name]


def _json(body: dict[str, Any], *, status: int = 200, error: str = "") -> Response:
    headers = {"x-amzn-ErrorType": error} if error else {}
    return Response(json.dumps(body), status=status, headers=headers, mimetype="application/json")


def application() -> tuple[Callable[..., Any], EksExtras]:
    """The WSGI application, and its memory of what moto lacks."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from moto.rds import models as rds

    # moto gives every database the same resource id, by which the provider then finds two.
    made = rds.DBInstance.__init__

    def make(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        self.dbi_resource_id = f"db-{hashlib.sha256(self.db_instance_identifier.encode()).hexdigest()[:26].upper()}"

    rds.DBInstance.__init__ = make  # type: ignore[method-assign]
    moto, extras = DomainDispatcherApplication(create_backend_app), EksExtras()

    def answer(environ: dict[str, Any], start_response: Any) -> Any:
        request = Request(environ, populate_request=False)
        service, _, action = request.headers.get("X-Amz-Target", "").partition(".")
        if service == "AWSBudgetServiceGateway":
            body = request.get_data()
            environ["wsgi.input"] = io.BytesIO(body)
            ours = extras.budgets(Request({**environ, "wsgi.input": io.BytesIO(body)}), action)
            if ours:
                return ours(environ, start_response)
        # The raw path: an ARN inside it holds escaped slashes.
        found = ROUTE.match(environ.get("REQUEST_URI", request.path).partition("?")[0])
        if not found or "/eks/" not in request.headers.get("Authorization", ""):
            return moto(environ, start_response)
        rest = [unquote(part) for part in (found["rest"] or "").split("/") if part]
        return extras.answer(request, found["cluster"], found["kind"], rest)(environ, start_response)

    return answer, extras


@contextmanager
def serve() -> Iterator[tuple[str, EksExtras]]:
    """The API's address on this machine, until the block ends; it knows nothing of what ran before in this process."""
    answer, extras = application()
    server = make_server("127.0.0.1", 0, answer, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    try:
        _forget(address)
        yield address, extras
    finally:
        _forget(address)
        server.shutdown()
        server.server_close()
        thread.join()


def _forget(address: str) -> None:
    """moto's memory is the process's, and other tests of it use moto, too."""
    with urlopen(f"{address}/moto-api/reset", data=b"", timeout=60) as reply:
        assert reply.status == 200
