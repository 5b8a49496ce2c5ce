#!/usr/bin/env bash
# The overlay: compared with the kernel's overlayfs by random operations, with each of the settings;
# then fsx and git on files that are copied up. Options: --runtime R.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/suite.sh"
runtime=auto
while (($#)); do
    case $1 in
    --runtime) runtime=$2 ;;
    *) echo "overlay.sh: no option $1" >&2 && exit 2 ;;
    esac
    shift 2
done

for settings in default redirect user; do
    shown=60 check "random operations as on the kernel's overlayfs, $settings" 200 \
        "$here/../overlay/oracle.sh" --ops 3000 --settings "$settings" \
        --server-arg --runtime --server-arg "$runtime"
done
server="$here/overlay-server.sh %SOCKET% %SHARE% --runtime $runtime"
check 'fsx' 200 "$here/fsx.sh" --server "$server" --request-queues 2 --ops 500
check git 200 "$here/git.sh" --server "$server" --request-queues 2 --commits 100 --files 200
summary
