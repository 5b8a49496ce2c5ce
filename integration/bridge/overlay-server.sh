#!/usr/bin/env bash
# Serves an overlay of three directories in SHARE, for with.sh's --server.
#
#   overlay-server.sh SOCKET SHARE [ARGUMENT...]
#
# The arguments are ringfsd's. $RINGFSD names the program.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
socket=$1 share=$2
shift 2
mkdir -p "$share"/{lower,upper,work}
chmod 755 "$share" "$share"/{lower,upper,work}
exec "${RINGFSD:-$here/../../target/release/ringfsd}" --socket "$socket" --request-queues 2 \
    --modcaps=+sys_admin --overlay "lower=$share/lower,upper=$share/upper,work=$share/work" "$@"
