"""A client of a docker registry: usage: with_registry.py URL. Pushes an image and pulls it."""
import hashlib, json, os, sys, urllib.request

base = sys.argv[1] + "/v2/team/image"


def ask(method, url, body=None, kind=None):
    headers = {"Content-Type": kind or "application/octet-stream", "Accept": "application/vnd.docker.distribution.manifest.v2+json"}
    return urllib.request.urlopen(urllib.request.Request(url, data=body, headers=headers, method=method))


def push(blob):
    name = "sha256:" + hashlib.sha256(blob).hexdigest()
    place = ask("POST", base + "/blobs/uploads/", b"").headers["Location"]
    for start in range(0, len(blob), 7 << 20):
        place = ask("PATCH", place, blob[start : start + (7 << 20)]).headers["Location"]
    ask("PUT", place + "&digest=" + name, b"")
    return {"digest": name, "size": len(blob)}


layer, config = os.urandom(25 << 20), b"{}"
image = "application/vnd.docker.distribution.manifest.v2+json"
manifest = {"schemaVersion": 2, "mediaType": image}
manifest["config"] = {"mediaType": "application/vnd.docker.container.image.v1+json", **push(config)}
manifest["layers"] = [{"mediaType": "application/vnd.docker.image.rootfs.diff.tar.gzip", **push(layer)}]
ask("PUT", base + "/manifests/latest", json.dumps(manifest).encode(), image)
pulled = json.load(ask("GET", base + "/manifests/latest"))
assert pulled == manifest
assert ask("GET", base + "/blobs/" + manifest["layers"][0]["digest"]).read() == layer
assert json.load(ask("GET", base + "/tags/list"))["tags"] == ["latest"]
ask("DELETE", base + "/manifests/sha256:" + hashlib.sha256(json.dumps(manifest).encode()).hexdigest())
