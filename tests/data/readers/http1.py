"""Reads HTTP/1.1 requests with Python's own http.server, so that what hyper wrote or read is judged by another reader.

Standard input is a JSON list of byte streams in base64. Standard output is a JSON list with the requests of each stream
in order: method, target, headers, and whether the request is whole. The last one may have an error in their place.
"""

import base64
import io
import json
import sys
from http.server import BaseHTTPRequestHandler


class Stream(io.BytesIO):
    """Remembers the last line, which tells the end of a head from the end of the bytes."""

    last = b""

    def readline(self, *args):
        self.last = super().readline(*args)
        return self.last

    def exactly(self, count):
        data = self.read(count)
        if len(data) < count:
            raise EOFError
        return data

    def line(self):
        line = self.readline()
        if not line.endswith(b"\n"):
            raise EOFError
        return line.rstrip(b"\r\n")


class Reader(BaseHTTPRequestHandler):
    def __init__(self, data):
        self.rfile, self.requests, self.error = Stream(data), [], None

    def send_error(self, code, message=None, explain=None):
        self.error = f"{code} {message}"

    def read(self):
        while True:
            # A server should ignore empty lines before a request (RFC 9112, section 2.2).
            line = self.rfile.readline(65537)
            while line in (b"\r\n", b"\n"):
                line = self.rfile.readline(65537)
            if not line:
                return self.requests
            self.raw_requestline = line
            if not self.parse_request():
                self.requests.append({"error": self.error})
                return self.requests
            text = lambda value: value.encode("latin-1").decode("utf-8", "replace")
            headers = [[name.lower(), text(value)] for name, value in self.headers.items()]
            whole = self.rfile.last in (b"\r\n", b"\n") and self.read_body()
            self.requests.append({"method": self.command, "target": self.path, "headers": headers, "whole": whole})
            if not whole or "upgrade" in self.headers or self.command == "CONNECT":
                return self.requests

    def read_body(self):
        try:
            if "transfer-encoding" in self.headers:
                while size := int(self.rfile.line().split(b";")[0], 16):
                    self.rfile.exactly(size)
                    if self.rfile.line():
                        return False
                while self.rfile.line():
                    pass
            else:
                self.rfile.exactly(int(self.headers.get("content-length", 0)))
        except (EOFError, ValueError):
            return False
        return True


streams = [base64.b64decode(stream) for stream in json.load(sys.stdin)]
json.dump([Reader(stream).read() for stream in streams], sys.stdout)
