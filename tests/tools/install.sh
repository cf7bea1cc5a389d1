#!/usr/bin/env bash
# Installs the programs that tests run beside gangplank, by name, into target/tools:
#
#   tests/tools/install.sh            everything the tests use
#   tests/tools/install.sh dns go     only these: dns (dig, nslookup, kdig, drill, knotd, curl), libc (a lookup by glibc's
#                                     and by musl's resolver), python, go, coredns, kubernetes (etcd, kube-apiserver, kube-controller-manager, kubectl), helm, promtool, deny, deb,
#                                     election (only if asked for: a comparison of `make mirror-figures`)
#
# GANGPLANK_TEST_KUBERNETES chooses the release of Kubernetes, here and for the tests: 1.36 unless set, or 1.35.
# Both may be there, side by side.
#
# Quick when all is there already. Needs apt-get, python3, go and cargo, and a network that
# reaches their package registries. Nothing is installed outside target/, so no root is needed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

tools=$PWD/target/tools
bin=$tools/bin
sources=$PWD/tests/tools
mkdir -p "$bin"

say() { printf 'tools: %s\n' "$*" >&2; }

# done_for NAME FILE...: whether NAME was installed by its function as it is now, from exactly these files; mark_done says that
# it was. What is after a `-` in NAME is a release.
stamp() { { declare -f unpack "install_${1%%-*}"; cat /dev/null "${@:2}"; } | sha256sum | cut -d' ' -f1; }
done_for() { [ "$(cat "$tools/.$1.done" 2>/dev/null)" = "$(stamp "$@")" ]; }
mark_done() { stamp "$@" >"$tools/.$1.done"; }

# unpack ROOT PACKAGE...: Debian's packages and what they need, unpacked below ROOT.
unpack() {
    local root=$1 cache=$tools/apt/cache-${1##*/}
    shift
    # Package lists of our own: those of the machine may be missing, and need root to renew.
    local apt=(apt-get -qq -o "Dir::State::Lists=$tools/apt/lists" -o "Dir::Cache=$cache" -o APT::Sandbox::User=)
    mkdir -p "$tools/apt/lists/partial" "$cache/archives/partial" "$root"
    "${apt[@]}" update
    # What an installation would add; a package that the machine has already is fetched all the same.
    local wanted
    wanted=$("${apt[@]}" -s --no-install-recommends install "$@" | awk '/^Inst/ {print $2}')
    # shellcheck disable=SC2086 # a list of package names
    (cd "$cache/archives" && "${apt[@]}" download "$@" $wanted && for deb in ./*.deb; do dpkg -x "$deb" "$root"; done)
}

# Debian's DNS clients, Knot DNS and curl, unpacked beside their libraries; a wrapper in bin/ finds those.
install_dns() {
    local root=$tools/debian name
    done_for dns && return
    say "dig, nslookup, kdig, drill, knotd, curl: from Debian's packages"
    unpack "$root" bind9-dnsutils knot-dnsutils ldnsutils knot curl
    for name in bin/dig bin/nslookup bin/kdig bin/drill sbin/knotd bin/curl; do
        cat >"$bin/${name#*/}" <<WRAPPER
#!/bin/sh
LD_LIBRARY_PATH="$root/usr/lib/$(dpkg-architecture -qDEB_HOST_MULTIARCH 2>/dev/null || gcc -print-multiarch)" exec "$root/usr/$name" "\$@"
WRAPPER
        chmod +x "$bin/${name#*/}"
    done
    mark_done dns
}

# One C program, linked with glibc and with musl. musl's own compiler wrapper has absolute paths.
install_libc() {
    local inputs=("$sources/c/lookup.c") root=$tools/musl
    done_for libc "${inputs[@]}" && return
    say "a lookup by glibc and by musl, which is from Debian's packages"
    unpack "$root" musl-dev
    local lib include
    lib=$(dirname "$(find "$root/usr/lib" -name libc.a)")
    include=$root/usr/include/${lib##*/}
    gcc -O1 -o "$bin/lookup-glibc" "$sources/c/lookup.c"
    gcc -O1 -static -no-pie -nostdinc -isystem "$include" -nostdlib -o "$bin/lookup-musl" "$lib/crt1.o" "$lib/crti.o" \
        "$sources/c/lookup.c" "$lib/libc.a" -lgcc "$lib/libc.a" "$lib/crtn.o"
    mark_done libc "${inputs[@]}"
}

# grpcio in a virtual environment, with stubs generated from the frozen contract and from ours.
install_python() {
    local inputs=("$sources/python/requirements.txt" "$sources/contract/registry.proto" proto/registry.proto)
    done_for python "${inputs[@]}" && return
    say "the Python registrant: grpcio and its generated stubs"
    python3 -m venv "$tools/venv"
    "$tools/venv/bin/pip" install --quiet --requirement "$sources/python/requirements.txt"
    local contract
    for contract in frozen:$sources/contract current:$PWD/proto; do
        local out=$tools/stubs/${contract%%:*} from=${contract#*:}
        mkdir -p "$out"
        "$tools/venv/bin/python" -m grpc_tools.protoc -I "$from" --python_out="$out" --grpc_python_out="$out" "$from/registry.proto"
    done
    mark_done python "${inputs[@]}"
}

# The Go tool, compiled against stubs that are generated from the frozen contract.
install_go() {
    local inputs=("$sources"/go/* "$sources/contract/registry.proto")
    done_for go "${inputs[@]}" && return
    install_python # for its protoc
    say "the Go registrant and resolver"
    rm -rf "$tools/go"
    mkdir -p "$tools/go/contract"
    cp "$sources"/go/* "$tools/go/"
    (
        cd "$tools/go"
        export GOBIN=$bin GOFLAGS=-mod=readonly
        go build -o "$bin/" google.golang.org/protobuf/cmd/protoc-gen-go google.golang.org/grpc/cmd/protoc-gen-go-grpc
        PATH=$bin:$PATH "$tools/venv/bin/python" -m grpc_tools.protoc -I "$sources/contract" \
            --go_out=contract --go_opt=paths=source_relative \
            --go-grpc_out=contract --go-grpc_opt=paths=source_relative registry.proto
        go build -o "$bin/gotool" .
    )
    mark_done go "${inputs[@]}"
}

# CoreDNS, to stand in front of gangplank.
install_coredns() {
    local version=v1.15.0
    done_for coredns && return
    say "CoreDNS $version: about two minutes of compiling"
    (cd "$tools" && CGO_ENABLED=0 GOBIN=$bin GOFLAGS=-buildvcs=false go install -ldflags '-s -w' "github.com/coredns/coredns@$version")
    mark_done coredns
}

# A control plane: etcd and three programs of Kubernetes, each release in a folder of its own. The module in
# kubernetes/RELEASE says which versions belong together.
install_kubernetes() {
    local release=${GANGPLANK_TEST_KUBERNETES:-1.36}
    local module=$sources/kubernetes/$release out=$tools/kubernetes-$release
    [ -d "$module" ] || { say "GANGPLANK_TEST_KUBERNETES=$release: there is no $module; take 1.36 or 1.35" && exit 2; }
    local inputs=("$module"/*)
    done_for "kubernetes-$release" "${inputs[@]}" && return
    local version
    version=$(awk '$1 == "k8s.io/kubernetes" {print $2}' "$module/go.mod")
    say "Kubernetes $version: about five minutes of compiling"
    mkdir -p "$out/bin"
    (
        cd "$module"
        export CGO_ENABLED=0 GOFLAGS='-mod=readonly -buildvcs=false'
        # The server derives from its version which features are on; without one it calls itself v0.0.0.
        local set=k8s.io/component-base/version
        local minor=${release#*.}
        local flags="-s -w -X $set.gitVersion=$version -X $set.gitMajor=1 -X $set.gitMinor=$minor"
        go build -ldflags '-s -w' -o "$out/bin/etcd" go.etcd.io/etcd/server/v3
        go build -ldflags "$flags" -o "$out/bin/" \
            k8s.io/kubernetes/cmd/{kube-apiserver,kube-controller-manager,kubectl}
    )
    mark_done "kubernetes-$release" "${inputs[@]}"
}

# Helm, which renders the chart, and the definitions of the ServiceMonitor and the PrometheusRule in it.
install_helm() {
    local version=v4.3.1 operator=github.com/prometheus-operator/prometheus-operator@v0.85.0 folder
    done_for helm && return
    say "Helm $version: about two minutes of compiling"
    (
        cd "$tools"
        export CGO_ENABLED=0 GOBIN=$bin GOFLAGS=-buildvcs=false
        go install -ldflags '-s -w' "helm.sh/helm/v4/cmd/helm@$version"
    )
    folder=$(go mod download -json "$operator" | sed -n 's/^\t"Dir": "\(.*\)",$/\1/p')
    install -m 644 "$folder/example/prometheus-operator-crd/monitoring.coreos.com_servicemonitors.yaml" "$tools/servicemonitors.yaml"
    install -m 644 "$folder/example/prometheus-operator-crd/monitoring.coreos.com_prometheusrules.yaml" "$tools/prometheusrules.yaml"
    mark_done helm
}

# promtool, which checks and tests the alerts. The module in prometheus/ says which version.
install_promtool() {
    local inputs=("$sources"/prometheus/*)
    done_for promtool "${inputs[@]}" && return
    say "promtool: about three minutes of compiling"
    (
        cd "$sources/prometheus"
        export CGO_ENABLED=0 GOFLAGS='-mod=readonly -buildvcs=false'
        go build -ldflags '-s -w' -o "$bin/promtool" github.com/prometheus/prometheus/cmd/promtool
    )
    mark_done promtool "${inputs[@]}"
}

# A candidate of client-go's leader election.
install_election() {
    local inputs=("$sources"/election/*)
    done_for election "${inputs[@]}" && return
    say "leader election of client-go"
    (cd "$sources/election" && CGO_ENABLED=0 GOFLAGS='-mod=readonly -buildvcs=false' go build -ldflags '-s -w' -o "$bin/election" .)
    mark_done election "${inputs[@]}"
}

# cargo-deny, which checks licences, duplicates and sources.
install_deny() {
    local version=0.20.2
    [ "$("$bin/cargo-deny" --version 2>/dev/null)" = "cargo-deny $version" ] && return
    say "cargo-deny: about two minutes of compiling"
    cargo install --quiet --locked --root "$tools" "cargo-deny@$version"
}

# cargo-deb, which packs the Debian package.
install_deb() {
    local version=3.8.0
    [ "$("$bin/cargo-deb" --version 2>/dev/null)" = "cargo-deb $version" ] && return
    say "cargo-deb: about two minutes of compiling"
    cargo install --quiet --locked --root "$tools" "cargo-deb@$version"
}

if [ $# -eq 0 ]; then set -- dns libc python go coredns kubernetes helm promtool deny deb; fi
for tool in "$@"; do
    case $tool in
        dns | libc | python | go | coredns | kubernetes | helm | promtool | deny | deb | election) "install_$tool" ;;
        *) say "no tool is called $tool: dns, libc, python, go, coredns, kubernetes, helm, promtool, deny, deb or election" && exit 2 ;;
    esac
done
