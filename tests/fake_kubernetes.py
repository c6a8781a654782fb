"""A Kubernetes API server that knows JobSets and nothing else: what kubectl needs to make one."""

import contextlib
import http.server
import json
import pathlib
import re
import threading
from collections.abc import Iterator

GROUP, VERSION = "jobset.x-k8s.io", "v1alpha2"
PATH = re.compile(rf"/apis/{GROUP}/{VERSION}/namespaces/([^/]+)/jobsets(?:/([^/]+))?")
RESOURCE = dict(
    name="jobsets", singularName="jobset", namespaced=True, kind="JobSet",
    verbs=["create", "delete", "get", "list"],
)  # fmt: skip
DISCOVERY = {
    "/api": dict(kind="APIVersions", versions=["v1"]),
    "/api/v1": dict(kind="APIResourceList", groupVersion="v1", resources=[]),
    "/apis": dict(
        kind="APIGroupList", apiVersion="v1", groups=[dict(
            name=GROUP, versions=[dict(groupVersion=f"{GROUP}/{VERSION}", version=VERSION)],
            preferredVersion=dict(groupVersion=f"{GROUP}/{VERSION}", version=VERSION))],
    ),
    f"/apis/{GROUP}/{VERSION}": dict(
        kind="APIResourceList", groupVersion=f"{GROUP}/{VERSION}", resources=[RESOURCE]
    ),
    "/openapi/v3": dict(paths={
        f"apis/{GROUP}/{VERSION}": dict(serverRelativeURL=f"/openapi/v3/apis/{GROUP}/{VERSION}")}),
    # all that kubectl wants to read here: that the server itself looks for unknown fields
    f"/openapi/v3/apis/{GROUP}/{VERSION}": dict(
        openapi="3.0.0", info=dict(title="JobSet", version=VERSION), paths={
            f"/apis/{GROUP}/{VERSION}/namespaces/{{namespace}}/jobsets/{{name}}": dict(patch={
                "parameters": [dict(name="fieldValidation", **{"in": "query"})],
                "responses": {},
                "x-kubernetes-group-version-kind":
                    dict(group=GROUP, version=VERSION, kind="JobSet")})}),
}  # fmt: skip


@contextlib.contextmanager
def serve(directory: pathlib.Path) -> Iterator[tuple[pathlib.Path, dict]]:
    """A kubeconfig file for the server, and its JobSets by (namespace, name)."""
    jobsets = {}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(jobsets))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    cluster = dict(server=f"http://127.0.0.1:{server.server_port}")
    file = directory / "kubeconfig"
    file.write_text(json.dumps({  # JSON is YAML
        "apiVersion": "v1", "kind": "Config", "current-context": "fake",
        "clusters": [dict(name="fake", cluster=cluster)],
        "contexts": [dict(name="fake", context=dict(cluster="fake", user="fake"))],
        "users": [dict(name="fake", user={})],
    }))  # fmt: skip
    try:
        yield file, jobsets
    finally:
        server.shutdown()
        server.server_close()


def _handler(jobsets: dict):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            path = self.path.partition("?")[0]
            if path in DISCOVERY:
                return self.answer(200, DISCOVERY[path])
            return self.found(path, jobsets.get)

        def do_DELETE(self):
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            return self.found(self.path.partition("?")[0], jobsets.pop)

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            namespace = PATH.fullmatch(self.path.partition("?")[0])[1]
            key = (namespace, body["metadata"]["name"])
            if key in jobsets:
                return self.fail(409, "AlreadyExists", f'jobsets "{key[1]}" already exists')
            jobsets[key] = body
            return self.answer(201, body)

        def found(self, path, take):
            match = PATH.fullmatch(path)
            body = take(match.groups(), None) if match else None
            if body is None:
                return self.fail(404, "NotFound", f"{path} not found")
            return self.answer(200, body)

        def fail(self, code, reason, message):
            self.answer(code, dict(kind="Status", apiVersion="v1", status="Failure",
                                   code=code, reason=reason, message=message))  # fmt: skip

        def answer(self, code, body):
            data = json.dumps(body).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    return Handler
