# Every command of this project. `make` alone lists them.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:

target := $(or $(CARGO_TARGET_DIR),target)
tools := target/tools/bin

.PHONY: help
help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-17s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# The development profile compiles in half the time of a release build. `make release` builds what
# one would install or measure.
.PHONY: run
run: ## start the server with its defaults: gRPC 9080, DNS 1053, admin 9153, all on 127.0.0.1
	cargo run -- serve

.PHONY: release
release: ## build target/release/gangplank, optimised
	cargo build --release --locked

# Linked with everything it needs, glibc too, so that it runs in an empty image and on every Linux of this architecture.
host = $(shell rustc -vV | sed -n 's/^host: //p')
.PHONY: static
static: ## build target/static/gangplank, optimised, which needs no library
	RUSTFLAGS="-C target-feature=+crt-static" cargo build --release --locked --bin gangplank --target $(host)
	install -D $(target)/$(host)/release/gangplank target/static/gangplank

.PHONY: deb
deb: static ## pack it into target/static/gangplank.deb with its unit, manual pages and completions
	tests/tools/install.sh deb
	deploy/deb.sh target/static/gangplank target/static/gangplank.deb --target $(host)

.PHONY: image
image: static ## pack it into an image, target/static/gangplank.tar (OCI), without a container engine
	deploy/image.py target/static/gangplank gangplank:$$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -1) target/static/gangplank.tar

# Runs against Kubernetes 1.36, or against 1.35 with GANGPLANK_TEST_KUBERNETES=1.35; `make older`
# runs only the tests that need Kubernetes, against 1.35.
.PHONY: test
test: lint doc deny ## everything that CI runs: lints, docs, licences, benches compile, all tests
	tests/tools/install.sh dns libc python go coredns kubernetes helm promtool deb
	cargo test --locked --benches --no-run
	cargo test --locked --bench allocations
	cargo test --locked --no-fail-fast

.PHONY: check
check: lint ## formatting, lints and unit tests: about a minute once the dependencies are built
	cargo test --locked --lib

.PHONY: lint
lint: ## formatting, clippy with warnings as errors, and that every source file is compiled
	cargo fmt --check
	cargo clippy --locked --all-targets -- -D warnings
	@cat $(target)/debug/deps/*.d | tr -s ' :' '\n' | sed "s|^$$PWD/||" | sort -u >$(target)/compiled-files
	@find src tests benches -name '*.rs' 2>/dev/null | sort | comm -23 - $(target)/compiled-files >$(target)/uncompiled-files
	@if [ -s $(target)/uncompiled-files ]; then \
		echo "no target compiles these files; declare them with \`mod\`, or delete them:"; cat $(target)/uncompiled-files; exit 1; fi

.PHONY: fmt
fmt: ## format the sources
	cargo fmt

.PHONY: doc
doc: ## build the API docs, warnings as errors
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --no-deps

.PHONY: deny
deny: ## licences, duplicate crates and sources of the dependencies
	tests/tools/install.sh deny
	$(tools)/cargo-deny check licenses bans sources

.PHONY: advisories
advisories: ## known vulnerabilities of the dependencies (fetches the advisory database)
	tests/tools/install.sh deny
	$(tools)/cargo-deny check advisories

.PHONY: tools
tools: ## install what the tests run beside gangplank (dig, Go and Python clients, …) into target/tools
	tests/tools/install.sh

.PHONY: bench
bench: ## run the benches (about twenty minutes)
	cargo bench

.PHONY: crash
crash: ## 200 cycles of kill -9 under load, each checked against what was acknowledged
	GANGPLANK_CRASH_CYCLES=200 cargo test --locked --test integration crash -- --nocapture

# The rounds run in four lanes, each with a control plane (0.5 GB) and processes of its own: most of a round is waiting
# for the Lease to expire. GANGPLANK_TRIAL_ROUNDS, _LANES, _SEED and _FIRST set the rounds (tests/mirror/trial/mod.rs).
.PHONY: trial
trial: ## 100 rounds of faults with two processes, and 100 with three, each checked; a rolling update under load
	GANGPLANK_TRIAL_ROUNDS=$${GANGPLANK_TRIAL_ROUNDS:-100} GANGPLANK_TRIAL_LANES=$${GANGPLANK_TRIAL_LANES:-4} \
		GANGPLANK_TRIAL_QUERIES=10000 GANGPLANK_TRIAL_REGISTRATIONS=1000 \
		cargo test --locked --test integration mirror::trial -- --nocapture --test-threads 1

.PHONY: read-your-writes
read-your-writes: ## 100 000 acknowledgements, each checked in DNS the moment it arrives
	GANGPLANK_VISIBILITY_CHECKS=100000 cargo test --locked --test integration read_your_writes -- --nocapture

.PHONY: mirror
mirror: ## the Kubernetes mirror at length: 200 and 50 kills in the middle of writes, bulks of 10 000, silent watches
	GANGPLANK_MIRROR_KILLS=200 GANGPLANK_MIRROR_OUTAGES=50 GANGPLANK_MIRROR_BULK=10000 GANGPLANK_MIRROR_LONG=1 \
		cargo test --locked --test integration mirror:: -- --nocapture --test-threads 1

.PHONY: mirror-figures
mirror-figures: ## our DNS beside CoreDNS, a take-over beside client-go's, what followers and slices cost the API server
	tests/tools/install.sh election
	GANGPLANK_MIRROR_FIGURES=200 cargo test --locked --test integration mirror::figures -- --nocapture --test-threads 1

# In namespaces of its own: the machine keeps its links, routes and mounts, also when this is killed (tests/node/run).
# GANGPLANK_NODE_BINARY=FILE takes a static binary that is there already.
.PHONY: node
node: ## the chart on a real node with kubelet, containerd, kube-proxy and pods; needs root
	tests/node/install.sh
	@[ -n "$$GANGPLANK_NODE_BINARY" ] || $(MAKE) static
	cargo test --locked --test integration --no-run
	tests/node/run cargo test --locked --offline --test integration -- --ignored --nocapture --test-threads 1

.PHONY: older
older: ## the Kubernetes tests on the previous release, 1.35 (built the first time: about ten minutes)
	GANGPLANK_TEST_KUBERNETES=1.35 tests/tools/install.sh dns coredns kubernetes
	GANGPLANK_TEST_KUBERNETES=1.35 cargo test --locked --test integration -- cluster mirror:: kubernetes

.PHONY: clean
clean: ## delete everything that was built, the test tools too
	cargo clean
