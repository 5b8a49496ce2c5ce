#!/usr/bin/env bash
# Tells a bridge that stays connected (`bridge --stay-connected`) to mount again, and waits for the
# mount.
#
#   again.sh BRIDGE OPTION,... MOUNTPOINT
#
# BRIDGE is a path: BRIDGE.pid has the bridge's process id, BRIDGE.wanted is the FIFO that it reads,
# and BRIDGE.log its output. The options may be empty. Exit status 1 if there is no bridge, 75 if it
# has a mount that has not ended after five seconds, and 32, as mount(8), if it does not mount.
set -euo pipefail
bridge=$1 options=$2 mountpoint=$3

# said WHAT: prints how often the bridge has said it.
said() { grep -c "^bridge: $1" "$bridge.log" || true; }
runs() { [[ -s $bridge.pid ]] && kill -0 "$(<"$bridge.pid")" 2>/dev/null; }

runs || exit 1
for ((tries = 0; $(said 'mounted on') > $(said unmounted); tries++)); do
    ((tries < 250)) || exit 75
    sleep 0.02
    runs || exit 1
done
before=$(said 'mounted on')
# Open for reading too, so that it doesn't block if the bridge ends now.
printf '%s %s\n' "$options" "$mountpoint" 1<>"$bridge.wanted"
until (($(said 'mounted on') > before)); do
    if ! runs; then
        cat "$bridge.log" >&2
        exit 32
    fi
    sleep 0.02
done
