"""An HTTP proxy that stands in front of an S3 server and does to requests what networks and busy servers do.

It passes the Host header on as it is, so the server checks signatures that were made for the proxy.
"""

import http.client
import random
import socket
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

ERRORS = {  # fault: status, code, message
    "503": (503, "SlowDown", "Please reduce your request rate."),
    "500": (500, "InternalError", "We encountered an internal error."),
    "429": (429, "TooManyRequests", "Too many requests."),
}
REFUSED = (403, "AccessDenied", "Access Denied.")
CUTS = (
    "cut",  # the connection ends before the server has seen the request
    "cut in answer",  # … in the middle of the answer's body
    "cut in upload",  # … in the middle of the request's body, of which the server sees nothing
    "answer lost",  # … after the server has done what was asked for
)
STALLS = ("stall", "stall in answer")  # nothing more comes, and the connection stays open
PART = 256 << 10  # bytes of a part, where tests say how large they are
FAULTS = (*ERRORS, *CUTS, *STALLS)
LONGEST_STALL = 60.0  # seconds


class FaultProxy:
    """Listens on a port of its own; use as a context manager.

    Attributes:
        rates: of requests, for each fault, the share that suffers it.
        requests: (method, path with query) of all that came, faults included.
        received, sent: bytes of bodies.
        injected: how often each fault was done.
        denied: parts of a path with its query to which the answer is `refusal`: its status, code and message.
    """

    def __init__(self, port, seed=0):
        self.upstream = port
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self.stopping = threading.Event()
        self.calm()
        self.reset()
        handler = type("Handler", (_Handler,), {"proxy": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self):
        return f"http://127.0.0.1:{self._server.server_port}"

    def calm(self):
        """No faults from here on."""
        self.rates, self.denied, self._planned = {}, [], []
        self.refusal = REFUSED

    def reset(self):
        """Counts from zero."""
        self.requests, self.injected, self.received, self.sent = [], Counter(), 0, 0

    def fail(self, fault, times=1, method=None, query=""):
        """The next `times` requests of this method, with this in their query, suffer a fault."""
        self._planned.append([fault, times, method, query])

    def count(self, method, query=""):
        return sum(m == method and query in path for m, path in self.requests)

    def count_sent(self, length):
        with self._lock:
            self.sent += length

    def draw(self, method, path, length):
        """The fault that a request with a body of `length` bytes suffers; None: none."""
        with self._lock:
            self.requests.append((method, path))
            self.received += length
            if any(part in unquote(path) for part in self.denied):
                return "denied"
            fault = self._planned_fault(method, path) or self._random_fault()
            # What can't be done to this request is not done.
            if fault == "cut in upload" and not length:
                fault = None
            if fault in ("cut in answer", "stall in answer") and method != "GET":
                fault = None
            if fault:
                self.injected[fault] += 1
            return fault

    def _planned_fault(self, method, path):
        for plan in self._planned:
            fault, times, wanted, query = plan
            if times and wanted in (None, method) and query in path:
                plan[1] -= 1
                return fault
        return None

    def _random_fault(self):
        value = self._random.random()
        for fault, rate in self.rates.items():
            value -= rate
            if value < 0:
                return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    proxy: FaultProxy

    def log_message(self, *_):
        pass

    def handle_one_request(self):
        try:
            super().handle_one_request()
        except (OSError, http.client.HTTPException):  # one side has gone: so does the other
            self.close_connection = True

    def handle_expect_100(self):
        result = super().handle_expect_100()
        self.wfile.flush()
        return result

    def do(self):
        length = int(self.headers.get("Content-Length") or 0)
        fault = self.proxy.draw(self.command, self.path, length)
        if fault == "cut in upload":
            self.rfile.read(length // 2)
            return self.cut()
        body = self.rfile.read(length)
        if fault == "denied":
            return self.refuse(*self.proxy.refusal)
        if fault in ERRORS:
            return self.refuse(*ERRORS[fault])
        if fault == "stall":
            return self.stall()
        if fault == "cut":
            return self.cut()
        status, reason, headers, content = self.forward(body)
        if fault == "answer lost":
            return self.cut()
        self.send_response_only(status, reason)
        for name, value in headers:
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        length = dict(headers).get("Content-Length", "0") if self.command == "HEAD" else str(len(content))
        self.send_header("Content-Length", length)
        self.end_headers()
        if fault in ("cut in answer", "stall in answer"):
            self.wfile.write(content[: len(content) // 2])
            return self.cut() if fault == "cut in answer" else self.stall()
        self.proxy.count_sent(len(content))  # before the client has it all, and may count anew
        self.wfile.write(content)
        return None

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do

    def forward(self, body):
        upstream = http.client.HTTPConnection("127.0.0.1", self.proxy.upstream, timeout=LONGEST_STALL)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("connection", "expect"):
                    upstream.putheader(name, value)
            upstream.endheaders(body)
            answer = upstream.getresponse()
            return answer.status, answer.reason, answer.getheaders(), answer.read()
        finally:
            upstream.close()

    def refuse(self, status, code, message):
        content = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
        self.send_response_only(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def cut(self):
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def stall(self):
        """Until the client has had enough."""
        self.wfile.flush()
        self.connection.settimeout(0.2)
        end = time.monotonic() + LONGEST_STALL
        while time.monotonic() < end and not self.proxy.stopping.is_set():
            try:
                if not self.connection.recv(1):
                    break
            except TimeoutError:
                continue
        self.cut()
