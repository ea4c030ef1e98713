"""A local S3 API for the store: moto's server, with what a real one also does.

Enters: HTTP requests of boto3. Leaves: S3's answers; every request is noted. Refuses: nothing on its own.

Beyond moto 5.2: a request is answered before the next one begins, since S3's conditional writes are atomic and moto's
are not; a part or an object whose bytes are not those of its SHA-256 is refused (moto takes it); and faults can be
ordered: a status, a lost answer, a wrong clock.
"""

from __future__ import annotations

import base64
import hashlib
import io
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from werkzeug.serving import WSGIRequestHandler, make_server
from werkzeug.wrappers import Request, Response

BUCKET = "fmops-artifacts"
KEYS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}


@dataclass
class Fault:
    """What happens to the next `times` requests of this method and path."""

    method: str
    path: str
    """A piece of the path that is meant."""
    status: int
    code: str
    times: int = 1
    answered: bool = False
    """The request is done first, and only its answer is lost."""


@dataclass
class LocalS3:
    """The server's address, its memory of requests, and the faults that wait."""

    url: str = ""
    client: Any = None
    requests: list[tuple[str, str]] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def environment(self) -> dict[str, str]:
        return {"AWS_ENDPOINT_URL": self.url, **KEYS}

    def count(self, method: str, piece: str) -> int:
        return sum(verb == method and piece in path for verb, path in self.requests)

    def names(self, prefix: str = "") -> list[str]:
        return [found["Key"] for found in self.client.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])]

    def flip(self, name: str) -> None:
        """Change one byte of an object, as nobody should."""
        content = bytearray(self.client.get_object(Bucket=BUCKET, Key=name)["Body"].read())
        content[0] ^= 1
        self.client.put_object(Bucket=BUCKET, Key=name, Body=bytes(content))

    def answer(self, application: Callable[..., Any], environ: dict[str, Any], start_response: Any) -> Any:
        path = f"{environ['PATH_INFO']}?{environ.get('QUERY_STRING', '')}"
        request = Request(environ)
        body = request.get_data()
        environ["wsgi.input"] = io.BytesIO(body)
        with self.lock:
            self.requests.append((request.method, path))
            fault = next((f for f in self.faults if f.method == request.method and f.path in path), None)
            if fault:
                fault.times -= 1
                self.faults = [f for f in self.faults if f.times > 0]
                if not fault.answered:
                    return _error(fault.status, fault.code)(environ, start_response)
            stated = request.headers.get("x-amz-checksum-sha256")
            if stated and stated != base64.b64encode(hashlib.sha256(body).digest()).decode():
                return _error(400, "BadDigest")(environ, start_response)
            done = list(application(environ, start_response if not fault else lambda *_: None))
        return _error(fault.status, fault.code)(environ, start_response) if fault else done


class _KeepAlive(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"

    def log(self, *_: Any, **__: Any) -> None:
        return


@contextmanager
def serve() -> Iterator[LocalS3]:
    """The API on this machine until the block ends, with one empty bucket."""
    import boto3
    from moto.backends import get_backend
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app

    local = LocalS3()
    moto = DomainDispatcherApplication(create_backend_app)
    server = make_server(
        "127.0.0.1", 0, lambda environ, start: local.answer(moto, environ, start), threaded=True,
        request_handler=_KeepAlive,
    )  # fmt: skip
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    local.url = f"http://127.0.0.1:{server.server_port}"
    local.client = boto3.client(
        "s3", endpoint_url=local.url, aws_access_key_id="testing", aws_secret_access_key="testing",
        region_name="us-east-1",
    )  # fmt: skip
    local.client.create_bucket(Bucket=BUCKET)
    try:
        yield local
    finally:
        # moto keeps its buckets in the process, beyond the server.
        get_backend("s3").reset()
        server.shutdown()
        server.server_close()
        thread.join()


def _error(status: int, code: str) -> Response:
    text = f"<Error><Code>{code}</Code><Message>{code}</Message><RequestId>test</RequestId></Error>"
    return Response(text, status=status, mimetype="application/xml")
