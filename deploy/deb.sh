#!/usr/bin/env bash
# deb.sh PROGRAM OUT [FLAG…]: packs a gangplank that is built already into the Debian package OUT. FLAGs are those of cargo-deb
# that say where it was built: `--target TRIPLE`, or `--profile dev`.
set -euo pipefail
program=$(realpath "$1") out=$(realpath -m "$2")
shift 2
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# What the program says of itself.
folder=target/package
rm -rf "$folder"
"$program" man --directory "$folder/man1"
"$program" completions bash >"$folder/gangplank.bash"
"$program" completions zsh >"$folder/_gangplank"
"$program" completions fish >"$folder/gangplank.fish"
target/tools/bin/cargo-deb --no-build --no-strip --quiet --locked --output "$out" "$@"
