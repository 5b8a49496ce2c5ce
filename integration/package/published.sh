#!/usr/bin/env bash
# Looks at the crate that `cargo package` has made: it has the sources, the licences and the
# documentation, and no target whose file it lacks.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

crate=$(find target/package -maxdepth 1 -name 'ringfsd-*.crate' -printf '%T@ %p\n' | sort -n | tail -1)
crate=${crate#* }
[[ -n $crate ]] || {
    echo 'published: no crate in target/package' >&2
    exit 1
}
name=$(basename "$crate" .crate)
files=$(tar -tzf "$crate")
for file in Cargo.toml Cargo.lock README.md LICENSE-APACHE LICENSE-BSD-3-Clause src/lib.rs src/main.rs docs/manual.md; do
    grep -qx "$name/$file" <<<"$files" || {
        echo "published: $crate lacks $file" >&2
        exit 1
    }
done
if grep -E "^$name/(integration|tests)/" <<<"$files"; then
    echo "published: $crate has files that don't build without this repository" >&2
    exit 1
fi
if tar -xzOf "$crate" "$name/Cargo.toml" | grep -E '^\[\[(test|bench|example)\]\]|^path = "\.\./|^path = "integration'; then
    echo "published: the manifest of $crate names targets that aren't in it" >&2
    exit 1
fi
