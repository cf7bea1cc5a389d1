#!/usr/bin/env python3
"""image.py BINARY NAME:TAG OUT.tar: the image of deploy/Dockerfile as an OCI archive, without a container engine.

`podman load`, `ctr images import`, `skopeo copy oci-archive:OUT.tar …` take it. The same binary makes the same octets. It is
refused if it needs a library or a loader, which the image does not have: `make static` builds one that needs none.
"""

import hashlib
import io
import json
import struct
import sys
import tarfile

# As in deploy/Dockerfile.
PROGRAM = "/usr/bin/gangplank"
USER = "65532:65532"

MACHINES = {62: "amd64", 183: "arm64"}
PT_INTERP = 3


def architecture(elf):
    """What the image is for. Ends the program if the binary cannot run in it."""
    if elf[:6] != b"\x7fELF\x02\x01":
        sys.exit("image: the binary is no 64-bit ELF file")
    machine = struct.unpack_from("<H", elf, 18)[0]
    headers, size, count = (struct.unpack_from("<" + form, elf, at)[0] for form, at in (("Q", 32), ("H", 54), ("H", 56)))
    if any(struct.unpack_from("<I", elf, headers + n * size)[0] == PT_INTERP for n in range(count)):
        sys.exit("image: the binary needs a dynamic loader, which an empty image has not: build it with `make static`")
    if machine not in MACHINES:
        sys.exit(f"image: no architecture is known for the ELF machine {machine}")
    return MACHINES[machine]


def add(archive, path, data, mode=0o644):
    entry = tarfile.TarInfo(path)
    entry.size, entry.mode = len(data), mode
    archive.addfile(entry, io.BytesIO(data))


def layer(binary):
    octets = io.BytesIO()
    with tarfile.open(fileobj=octets, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for folder in ("usr", "usr/bin"):
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            archive.addfile(entry)
        add(archive, PROGRAM.lstrip("/"), binary, 0o755)
    return octets.getvalue()


def main():
    if len(sys.argv) != 4 or ":" not in sys.argv[2]:
        sys.exit(__doc__)
    source, name, out = sys.argv[1:]
    with open(source, "rb") as file:
        binary = file.read()
    system = {"architecture": architecture(binary), "os": "linux"}
    with tarfile.open(out, "w", format=tarfile.USTAR_FORMAT) as archive:

        def blob(data, kind):
            digest = hashlib.sha256(data).hexdigest()
            add(archive, "blobs/sha256/" + digest, data)
            return {"mediaType": "application/vnd.oci.image." + kind, "digest": "sha256:" + digest, "size": len(data)}

        def document(value):
            return json.dumps(value, sort_keys=True).encode()

        add(archive, "oci-layout", document({"imageLayoutVersion": "1.0.0"}))
        content = blob(layer(binary), "layer.v1.tar")
        run = {"Entrypoint": [PROGRAM], "Env": ["PATH=/usr/bin"], "User": USER, "WorkingDir": "/"}
        config = blob(
            document({**system, "config": run, "rootfs": {"type": "layers", "diff_ids": [content["digest"]]}}),
            "config.v1+json",
        )
        kind = "manifest.v1+json"
        media = "application/vnd.oci.image." + kind
        manifest = blob(document({"schemaVersion": 2, "mediaType": media, "config": config, "layers": [content]}), kind)
        manifest["platform"] = system
        manifest["annotations"] = {
            "io.containerd.image.name": name,
            "org.opencontainers.image.ref.name": name.rsplit(":", 1)[1],
        }
        index = {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": [manifest]}
        add(archive, "index.json", document(index))


main()
