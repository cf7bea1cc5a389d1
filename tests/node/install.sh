#!/usr/bin/env bash
# Installs what a real node of the tests needs into target/tools/node, beside what tests/tools/install.sh puts into target/tools:
# kubelet, kube-proxy and kube-scheduler, compiled from the release of Kubernetes that the tests use; containerd, runc, nft, the
# plugins of CNI and busybox, unpacked from Debian's packages; three images. Nothing is installed outside target/.
#
# Quick when all is there already. Needs apt-get, go and python3, and a network that reaches their registries.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

tests/tools/install.sh coredns kubernetes helm

tools=$PWD/target/tools/node
sources=$PWD/tests/node
debian=$tools/debian
mkdir -p "$tools/bin" "$tools/images"
stamp=$(cat "$sources"/{install.sh,image.py} "$sources"/kubernetes/* target/tools/.coredns.done | sha256sum)
[ "$(cat "$tools/.done" 2>/dev/null)" != "$stamp" ] || exit 0

echo "node: containerd, runc, nft, CNI, busybox: from Debian's packages" >&2
# Package lists of our own: those of the machine may be missing, and need root to renew.
apt=(apt-get -qq -o "Dir::State::Lists=$tools/apt/lists" -o "Dir::Cache=$tools/apt/cache" -o APT::Sandbox::User=)
mkdir -p "$tools/apt/lists/partial" "$tools/apt/cache/archives/partial" "$debian"
packages=(containerd runc containernetworking-plugins nftables busybox-static)
"${apt[@]}" update
# With what they need; a package that the machine has already is fetched all the same.
needed=$("${apt[@]}" -s --no-install-recommends install "${packages[@]}" | awk '/^Inst/ {print $2}')
# shellcheck disable=SC2086 # a list of package names
(cd "$tools/apt/cache/archives" && "${apt[@]}" download "${packages[@]}" $needed && for deb in ./*.deb; do dpkg -x "$deb" "$debian"; done)
# They are laid over /usr, and some have a part in the root.
for folder in bin sbin lib; do [ ! -d "$debian/$folder" ] || cp -a "$debian/$folder/." "$debian/usr/$folder/"; done

version=$(awk '$2 == "k8s.io/kubernetes" {print $3}' "$sources/kubernetes/go.mod")
echo "node: Kubernetes $version: about three minutes of compiling" >&2
(
    cd "$sources/kubernetes"
    export CGO_ENABLED=0 GOFLAGS='-mod=readonly -buildvcs=false'
    set=k8s.io/component-base/version
    minor=${version#v1.}
    flags="-s -w -X $set.gitVersion=$version -X $set.gitMajor=1 -X $set.gitMinor=${minor%%.*}"
    nice -n 10 go build -ldflags "$flags" -o "$tools/bin/" k8s.io/kubernetes/cmd/{kubelet,kube-proxy,kube-scheduler}
)

commands=()
for name in sh cat env grep head id ls nc nslookup sleep wget; do commands+=("bin/$name=>busybox"); done
box=$(find "$debian" -name busybox -type f -perm -u+x | head -1)
"$sources/image.py" "$tools/images/pause.tar" localhost/pause:1 /bin/busybox,sleep,infinity "bin/busybox=$box"
"$sources/image.py" "$tools/images/coredns.tar" localhost/coredns:1 /coredns coredns=target/tools/bin/coredns
"$sources/image.py" "$tools/images/busybox.tar" busybox:1 /bin/sh "bin/busybox=$box" "${commands[@]}"
echo "$stamp" >"$tools/.done"
