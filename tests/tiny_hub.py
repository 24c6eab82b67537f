"""A small model hub of our own, on this machine."""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tiny import sha256

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """As much of a model hub as a download of one snapshot needs."""

    files: dict[str, bytes]
    requested: list[str]

    def do_GET(self):
        self.requested.append(self.path)
        path = self.path.split("?")[0]
        if match := re.fullmatch(r"/api/models/lab/(\w+)(?:/revision/main)?", path):
            if match[1] == "absent":
                return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            if match[1] == "broken":
                return self.answer(500, b"{}")
            siblings = [{"rfilename": name} for name in self.files]
            info = {"id": f"lab/{match[1]}", "sha": COMMIT, "siblings": siblings}
            return self.answer(200, json.dumps(info).encode())
        if re.fullmatch(rf"/api/models/lab/\w+/tree/{COMMIT}", path):
            rows = [
                {"type": "file", "path": name, "size": len(data), "oid": sha256(data)[:40]}
                for name, data in self.files.items()
            ]
            return self.answer(200, json.dumps(rows).encode())
        if match := re.fullmatch(rf"/lab/(\w+)/resolve/{COMMIT}/(.+)", path):
            if match[1] == "gated":
                return self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
            data = self.files[match[2]]
            return self.answer(200, data, {"ETag": f'"{sha256(data)}"', "X-Repo-Commit": COMMIT})
        return self.answer(404, b"{}")

    do_HEAD = do_GET

    def answer(self, status: int, body: bytes, headers: dict | None = None) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextmanager
def served(handler: type[Hub]) -> Iterator[str]:
    """Serve in threads of this process; gives the address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()
