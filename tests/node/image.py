#!/usr/bin/env python3
"""image.py OUT.tar NAME:TAG COMMAND[,ARGUMENT…] PATH=FILE…: an image that has only these files, as an OCI archive.

PATH=FILE copies a program, PATH=>TARGET makes a symbolic link.
"""

import hashlib
import io
import json
import os
import sys
import tarfile


def add(archive, path, data, mode=0o644):
    entry = tarfile.TarInfo(path)
    entry.size, entry.mode = len(data), mode
    archive.addfile(entry, io.BytesIO(data))


def layer(items):
    octets = io.BytesIO()
    with tarfile.open(fileobj=octets, mode="w") as archive:
        folders = {os.path.dirname(item.partition("=")[0]) for item in items} - {""}
        for folder in sorted(folders):
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            archive.addfile(entry)
        for item in items:
            path, _, source = item.partition("=")
            if source.startswith(">"):
                entry = tarfile.TarInfo(path)
                entry.type, entry.linkname = tarfile.SYMTYPE, source[1:]
                archive.addfile(entry)
            else:
                with open(source, "rb") as file:
                    add(archive, path, file.read(), 0o755)
    return octets.getvalue()


def main():
    out, name, command, *items = sys.argv[1:]
    architecture = {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine]
    with tarfile.open(out, "w") as archive:

        def blob(data, kind):
            digest = hashlib.sha256(data).hexdigest()
            add(archive, "blobs/sha256/" + digest, data)
            return {"mediaType": "application/vnd.oci.image." + kind, "digest": "sha256:" + digest, "size": len(data)}

        def document(value):
            return json.dumps(value, sort_keys=True).encode()

        add(archive, "oci-layout", document({"imageLayoutVersion": "1.0.0"}))
        content = blob(layer(items), "layer.v1.tar")
        config = {
            "architecture": architecture,
            "os": "linux",
            "config": {"Cmd": command.split(","), "Env": ["PATH=/bin"], "WorkingDir": "/"},
            "rootfs": {"type": "layers", "diff_ids": [content["digest"]]},
        }
        kind = "manifest.v1+json"
        manifest = {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image." + kind,
            "config": blob(document(config), "config.v1+json"),
            "layers": [content],
        }
        described = blob(document(manifest), kind)
        described["annotations"] = {
            "io.containerd.image.name": name if "/" in name else "docker.io/library/" + name,
            "org.opencontainers.image.ref.name": name.rsplit(":", 1)[1],
        }
        index = {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": [described]}
        add(archive, "index.json", document(index))


main()
