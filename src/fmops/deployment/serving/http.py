"""HTTP/1.1 as both servers read it: uvicorn's faster parser, with an end to what it holds.

Enters: bytes of a connection. Leaves: requests.
Refuses: more than `HEAD_BYTES` of a head, a trailer or a chunk's extension: the parser itself would keep them all.
"""

from __future__ import annotations

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_BYTES = 64 * 1024
"""Longest head of a request; one read of the socket, at most 256 kB, may come on top."""


class BoundedHttp(HttpToolsProtocol):
    """Counts the bytes since the parser last came to something: a whole head, a piece of a body, an end."""

    _unread = 0
    _advanced = False

    def data_received(self, data: bytes) -> None:
        self._advanced = False
        super().data_received(data)
        self._unread = 0 if self._advanced else self._unread + len(data)
        if self._unread > HEAD_BYTES and not self.transport.is_closing():
            if self.cycle is None or self.cycle.response_complete:
                self.send_400_response(f"A head of more than {HEAD_BYTES} bytes is not read.")
            else:
                self.transport.close()

    def on_headers_complete(self) -> None:
        self._advanced = True
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._advanced = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._advanced = True
        super().on_message_complete()
