"""A Hub on loopback: just what a download of single files needs. Run its client in a subprocess with `env()`."""

import hashlib
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote


class HubServer:
    """`repos`: id → revision → {path: bytes}. A private repository is in `tokens` with the token that opens it."""

    def __init__(self):
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.tokens: dict[str, str] = {}
        self.gated: set[str] = set()
        self.requests: list[tuple[str, str, str | None]] = []  # method, path, Authorization
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self):
                hub.answer(self, body=False)

            def do_GET(self):
                hub.answer(self, body=True)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def add(self, repo, files, revision="main"):
        self.repos.setdefault(repo, {})[revision] = files

    @staticmethod
    def commit(repo, revision):
        return hashlib.sha1(f"{repo}@{revision}".encode()).hexdigest()

    def env(self, home, **extra):
        """The environment for a client: this server as the Hub, `home` for its cache."""
        kept = {
            k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "http", "HTTP", "ALL_", "all_"))
        }
        return {**kept, "HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", **extra}

    def find(self, repo, revision):
        """(revision's name, files), by name or commit."""
        for name, files in self.repos[repo].items():
            if revision in (name, self.commit(repo, name)):
                return name, files
        return None, None

    def answer(self, request, body):
        path, authorization = unquote(request.path), request.headers.get("Authorization")
        self.requests.append((request.command, path, authorization))
        repo, _, rest = path.lstrip("/").partition("/resolve/")
        if repo not in self.repos or not rest:
            return self.refuse(request, 404, "RepoNotFound")
        if repo in self.tokens and authorization != f"Bearer {self.tokens[repo]}":
            return self.refuse(request, 401, "RepoNotFound")
        if repo in self.gated and authorization is None:
            return self.refuse(request, 403, "GatedRepo")
        names = sorted(self.repos[repo], key=len, reverse=True)
        names += [self.commit(repo, name) for name in names]
        revision = next((name for name in names if rest.startswith(name + "/")), None)
        if revision is None:
            return self.refuse(request, 404, "RevisionNotFound")
        name, files = self.find(repo, revision)
        content = files.get(rest[len(revision) + 1 :])
        if content is None:
            return self.refuse(request, 404, "EntryNotFound", self.commit(repo, name))
        request.send_response(200)
        request.send_header("Content-Length", str(len(content)))
        request.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        request.send_header("X-Repo-Commit", self.commit(repo, name))
        request.send_header("Accept-Ranges", "bytes")
        request.end_headers()
        if body:
            request.wfile.write(content)
        return None

    def refuse(self, request, status, code, commit=None):
        request.send_response(status)
        request.send_header("Content-Length", "0")
        request.send_header("X-Error-Code", code)
        request.send_header("X-Error-Message", code)
        if commit:
            request.send_header("X-Repo-Commit", commit)
        request.end_headers()
