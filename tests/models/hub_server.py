"""A hub on this machine: as much of its HTTP interface as downloading a model takes."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serve(folder: Path, repo_id: str) -> Iterator[tuple[str, list[str]]]:
    """Serves a folder as a repository; gives the address and the list of files asked for."""
    asked: list[str] = []

    def own_name(path):
        """The name of a file within the repository, from `/owner/name/resolve/revision/...`."""
        return path.split("/", 5)[5]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.answer(with_body=True)

        def do_HEAD(self):
            self.answer(with_body=False)

        def answer(self, with_body):
            path = unquote(urlsplit(self.path).path)
            api, resolve = f"/api/models/{repo_id}", f"/{repo_id}/resolve/"
            if path in (f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
                self.send_json({"id": repo_id, "sha": COMMIT, "siblings": []})
            elif path.startswith(f"{api}/tree/"):
                files = sorted(file for file in folder.rglob("*") if file.is_file())
                self.send_json([self.entry(file) for file in files])
            elif path.startswith(resolve) and (folder / own_name(path)).is_file():
                self.send_file(own_name(path), with_body)
            else:
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()

        @staticmethod
        def entry(file):
            digest = hashlib.sha1(file.read_bytes()).hexdigest()
            name = file.relative_to(folder).as_posix()
            return {"type": "file", "path": name, "size": file.stat().st_size, "oid": digest}

        def send_json(self, contents):
            body = json.dumps(contents).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def send_file(self, name, with_body):
            body = (folder / name).read_bytes()
            self.send_response(200)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if with_body:
                asked.append(name)
                self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
