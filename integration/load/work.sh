#!/usr/bin/env bash
# Measures what programs take on a mount: virtio-fs servers in turn, and the plain directory, through
# the bridge, which is the real FUSE client. Prints medians and ratios as Markdown. Runs on Debian, as
# root; installs what is missing.
#
#   work.sh [OPTION...]
#
#   --rounds N       rounds, each of which does all work with every server (3)
#   --works A,B      some of tree, sqlite, postgres, npm, cargo, image, million (all but million)
#   --servers A,B    some of ringfsd, virtiofsd, c-virtiofsd, plain (all)
#   --server N=LINE  one more server: its name, and a shell command in which %SOCKET% and %SHARE%
#                    stand for the paths; may be repeated
#   --ringfsd PATH   this program instead of one built here
#   --ringfsd-args A more arguments for ringfsd
#   --host A,B       how busy the host is (quiet): quiet; loops, an endless loop for each processor;
#                    quota, where the server has half a processor's time (a control group's limit)
#   --cold yes       drop the host's caches before each step
#   --files N        number of files in the tree (5000)
#   --million N      number of files of the work million (1000000)
#   --dir DIR        where everything is made (the target directory)
#   --results FILE   append the single results there, a line each: the server, the host, the step, its
#                    seconds, and the seconds of processor time of the server, the bridge and the programs
#   --table FILE     only print the tables of such results
#
# Servers run with their default options and log errors only. virtiofsd's thread pool is off then, which
# is its best setting for programs that wait for each reply. What the work has made is compared with
# what it should be, in the directory itself. A peer that crashes, or runs out of descriptors, has no
# figures for the rest of a work.
#
# Each server has a new ext4 for each work, in a file (if loop devices can't be had, the directory it is
# in, and the output says so): for minutes after many files were deleted, ext4 takes several times as long
# to create others, so a server would pay for what the one before it has removed.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)

### The work, inside a mount

# processor_time PID...: seconds that these processes and their descendants have run.
processor_time() {
    local pid list=("$@") files=()
    while ((${#list[@]})); do
        pid=${list[0]} list=("${list[@]:1}")
        files+=("/proc/$pid/task/"*/schedstat)
        # shellcheck disable=SC2207 # numbers
        list+=($(cat "/proc/$pid/task/"*/children 2>/dev/null))
    done
    awk '{ t += $1 } END { printf "%.6f", t / 1e9 }' "${files[@]}" /dev/null 2>/dev/null
}

# step NAME COMMAND: runs a shell command in $MNT and appends how long it took to $LINES.
step() {
    local began ended status=0 server=() bridge=() served=(0 0) passed=(0 0) TIMEFORMAT='%U %S'
    if [[ $SERVER != plain ]]; then server=("$SERVER_PID") bridge=("$(cat "$AGAIN.pid")"); fi
    if [[ $COLD ]]; then sync && echo 3 >/proc/sys/vm/drop_caches; fi
    served[0]=$(processor_time "${server[@]}") passed[0]=$(processor_time "${bridge[@]}")
    began=$EPOCHREALTIME
    { time (cd "$MNT" && bash -ec "$2" >"$OUT" 2>&1); } 2>"$OUT.time" || status=$?
    ended=$EPOCHREALTIME
    served[1]=$(processor_time "${server[@]}") passed[1]=$(processor_time "${bridge[@]}")
    if ((status)); then
        echo "work.sh: $1 failed with $status on $SERVER:" >&2
        tail -n 20 "$OUT" >&2
        exit 1
    fi
    echo "$ended $began ${served[1]} ${served[0]} ${passed[1]} ${passed[0]} $(cat "$OUT.time")" |
        awk -v of="$SERVER $HOST $1" '{ print of, $1 - $2, $3 - $4, $5 - $6, $7 + $8 }' >>"$LINES"
}

# check COMMAND: fails if what the steps have made is wrong, as seen in the directory itself.
check() {
    (cd "$SHARE" && bash -ec "$1") >"$OUT" 2>&1 && return
    echo "work.sh: $SERVER has not done the work $WORK right:" >&2
    tail -n 20 "$OUT" >&2
    exit 1
}

work_tree() {
    export HOME=$PLAIN GIT_CONFIG_NOSYSTEM=1 GIT_AUTHOR_NAME=n GIT_AUTHOR_EMAIL=e
    export GIT_COMMITTER_NAME=n GIT_COMMITTER_EMAIL=e
    step 'tar x' "tar xf $FIXTURES/tree.tar"
    step 'git add, commit' 'cd tree && git -c init.defaultBranch=main init -q && git add . && git commit -qm first'
    step 'git status' 'cd tree && git status --porcelain'
    step 'git status again' 'cd tree && git status --porcelain'
    step 'git checkout' 'cd tree && git rm -rq --cached . && git commit -qm empty && git stash -uq 2>/dev/null
        git checkout -qf main~1'
    step 'find' 'find tree -type f -size +100k'
    step 'du' 'du -s tree'
    step 'grep -r' 'grep -rc unsafe_impl tree >/dev/null || true'
    step 'rg' 'rg -uu --count unsafe_impl tree >/dev/null || true'
    step 'cp -r' 'cp -r tree copy'
    step 'rsync' 'rsync -a tree/ synced/'
    check "((\$(tar tf $FIXTURES/tree.tar | grep -vc '/$') == \$(find tree -path tree/.git -prune -o -type f -print | wc -l)))
        diff -rq tree copy && diff -rq tree synced"
    step 'rm -rf' 'rm -rf tree copy synced'
}

work_sqlite() {
    {
        echo 'PRAGMA journal_mode=WAL; CREATE TABLE t(id INTEGER PRIMARY KEY, v TEXT);'
        for ((i = 0; i < 1000; i++)); do echo "INSERT INTO t(v) VALUES('value $i');"; done
    } >"$PLAIN/insert.sql"
    for ((i = 0; i < 20000; i++)); do
        echo "SELECT v FROM t WHERE id = $((i * 7919 % 50000 + 1));"
    done >"$PLAIN/select.sql"
    step 'SQLite: transactions' "sqlite3 db <$PLAIN/insert.sql"
    step 'SQLite: bulk' "sqlite3 db \"WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c WHERE n < 50000)
        INSERT INTO t(v) SELECT hex(randomblob(100)) FROM c\""
    step 'SQLite: reads' "sqlite3 -cmd 'PRAGMA cache_size=50' db <$PLAIN/select.sql"
    check '[[ $(sqlite3 db "PRAGMA integrity_check; SELECT count(*) FROM t" | tee /dev/stderr | xargs) == "ok 51000" ]]'
}

work_postgres() {
    local bin data=$MNT/pg
    bin=$(printf '%s\n' /usr/lib/postgresql/*/bin | tail -n 1)
    mkdir "$data" && chown postgres "$data"
    export bin data
    local as='setpriv --reuid postgres --regid postgres --init-groups'
    step 'PostgreSQL: initdb' "$as $bin/initdb -D $data -A trust >/dev/null"
    chmod 777 "$PLAIN"
    $as "$bin/pg_ctl" -s -w -D "$data" -l "$PLAIN/pg.log" \
        -o "-c listen_addresses= -k $PLAIN -c shared_buffers=16MB" start
    # shellcheck disable=SC2064 # the values of now
    trap "$as $bin/pg_ctl -s -m immediate -D $data stop" EXIT
    step 'pgbench: load' "$bin/pgbench -h $PLAIN -U postgres -q -i -s 3 postgres"
    step 'pgbench' "$bin/pgbench -h $PLAIN -U postgres -n -c 2 -t 400 postgres | grep 'processed: 800/800'"
    trap - EXIT
    $as "$bin/pg_ctl" -s -m fast -D "$data" stop
}

work_npm() {
    cp "$FIXTURES/npm/package.json" "$FIXTURES/npm/package-lock.json" "$SHARE/"
    step 'npm ci' "npm ci --offline --no-audit --no-fund --cache $FIXTURES/npm-cache"
    step 'require all' 'node -e "for (const name of Object.keys(require(\"./package.json\").dependencies)) require(name)"'
}

work_cargo() {
    cp -r "$FIXTURES/crate" "$SHARE/crate"
    step 'cargo build' 'cd crate && env -u CARGO_TARGET_DIR cargo build --quiet --offline'
    step 'cargo build again' 'cd crate && env -u CARGO_TARGET_DIR cargo build --quiet --offline'
    check crate/target/debug/hello
}

work_image() {
    step 'unpack a root file system' "mkdir root && tar xf $FIXTURES/image.tar -C root"
    step 'tar c of it' 'tar cf - -C root . | cat >/dev/null'
    check "tar df $FIXTURES/image.tar -C root"
}

work_million() {
    step "create $MILLION files" "perl -e 'for my \$f (0 .. $MILLION - 1) {
        my \$d = int(\$f / 10000); mkdir \$d if \$f % 10000 == 0; open(my \$h, q(>), qq(\$d/\$f)) or die }'"
    step "list $MILLION files" "(($MILLION == \$(find . -type f -printf x | wc -c)))"
    step "remove $MILLION files" 'rm -rf ./*'
    check '[[ -z $(ls) ]]'
}

if [[ ${WORK:-} ]]; then
    loops=()
    if [[ $HOST == loops ]]; then
        for ((i = $(nproc); i > 0; i--)); do
            setpriv --pdeathsig KILL bash -c 'while :; do :; done' &
            loops+=($!)
        done
    fi
    OUT=$PLAIN/out
    status=0
    ("work_$WORK") || status=$?
    if ((${#loops[@]})); then kill -KILL "${loops[@]}"; fi
    exit "$status"
fi

### Options

rounds=3 works=tree,sqlite,postgres,npm,cargo,image servers=ringfsd,virtiofsd,c-virtiofsd,plain
ringfsd='' ringfsd_args='' hosts=quiet cold='' files=5000 million=1000000 results='' table=''
target=${CARGO_TARGET_DIR:-$root/target}
dir=$target
declare -A more_servers=()
while (($#)); do
    if (($# < 2)); then
        sed -n '2,/^[^#]/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
        exit 2
    fi
    case $1 in
    --rounds) rounds=$2 ;;
    --works) works=$2 ;;
    --servers) servers=$2 ;;
    --server) more_servers[${2%%=*}]=${2#*=} servers+=${servers:+,}${2%%=*} ;;
    --ringfsd) ringfsd=$2 ;;
    --ringfsd-args) ringfsd_args=$2 ;;
    --host) hosts=$2 ;;
    --cold) cold=$2 ;;
    --files) files=$2 ;;
    --million) million=$2 ;;
    --dir) dir=$2 ;;
    --results) results=$2 ;;
    --table) table=$2 ;;
    *) echo "work.sh: no option $1" >&2 && exit 2 ;;
    esac
    shift 2
done

### The report

# Medians of seconds, and each server's as a ratio to ringfsd's: above 1, ringfsd is faster. And medians of
# processor time, which shows what part of a work is the server's.
report() {
    sort -k2,2 -k1,1 -k3 "$1" | awk '
        function median(list, parts, n, i, j, t) {
            n = split(list, parts, " ")
            for (i = 2; i <= n; i++)
                for (j = i; j > 1 && parts[j - 1] + 0 > parts[j] + 0; j--) {
                    t = parts[j]; parts[j] = parts[j - 1]; parts[j - 1] = t
                }
            return n % 2 ? parts[(n + 1) / 2] : (parts[n / 2] + parts[n / 2 + 1]) / 2
        }
        {
            server = $1; host = $2; seconds = $(NF - 3)
            name = $3; for (i = 4; i < NF - 3; i++) name = name " " $i
            if (!(host in seen_host)) { seen_host[host]; hosts[++host_count] = host }
            if (!(server in seen_server)) { seen_server[server]; names[++name_count] = server }
            if (!(name in seen_work)) { seen_work[name]; list[++work_count] = name }
            values[host, name, server] = values[host, name, server] " " seconds
            for (i = 0; i < 3; i++)
                cpu[host, name, server, i] = cpu[host, name, server, i] " " $(NF - 2 + i)
        }
        END {
            for (h = 1; h <= host_count; h++) {
                host = hosts[h]
                printf "\nThe host: %s. Seconds, and in brackets how many times as long as with ringfsd:\n\n| work |", host
                for (s = 1; s <= name_count; s++) printf " %s |", names[s]
                printf "\n| --- |"
                for (s = 1; s <= name_count; s++) printf " --: |"
                print ""
                for (w = 1; w <= work_count; w++) {
                    name = list[w]
                    base = values[host, name, "ringfsd"] == "" ? 0 : median(values[host, name, "ringfsd"])
                    printf "| %s |", name
                    for (s = 1; s <= name_count; s++) {
                        v = values[host, name, names[s]]
                        if (v == "") { printf " – |"; continue }
                        m = median(v)
                        if (!base || names[s] == "ringfsd") printf " %.2f |", m
                        else {
                            printf " %.2f (%.2f) |", m, m / base
                            logs[host, names[s]] += log(m / base); counts[host, names[s]]++
                        }
                    }
                    print ""
                }
                printf "| geometric mean |"
                for (s = 1; s <= name_count; s++)
                    if (counts[host, names[s]])
                        printf " %.2f |", exp(logs[host, names[s]] / counts[host, names[s]])
                    else printf " |"
                print ""
                printf "\nProcessor time, seconds: the server, the bridge and the programs:\n\n| work |"
                for (s = 1; s <= name_count; s++) printf " %s |", names[s]
                printf "\n| --- |"
                for (s = 1; s <= name_count; s++) printf " --: |"
                print ""
                for (w = 1; w <= work_count; w++) {
                    printf "| %s |", list[w]
                    for (s = 1; s <= name_count; s++) {
                        if (values[host, list[w], names[s]] == "") { printf " – |"; continue }
                        for (i = 0; i < 3; i++)
                            printf "%s%.2f", i ? ", " : " ", median(cpu[host, list[w], names[s], i])
                        printf " |"
                    }
                    print ""
                }
            }
        }'
}
if [[ $table ]]; then
    report "$table"
    exit
fi

### What is needed

((EUID == 0)) || {
    echo 'work.sh: the servers must run as root' >&2
    exit 1
}
peers=$target/peers
mkdir -p "$dir"
scratch=$(mktemp -d "$dir/work-XXXXXX")
# PostgreSQL's user needs access to it.
chmod 755 "$scratch"
group=''
cleanup() {
    if mountpoint -q "$scratch/disk"; then umount "$scratch/disk" || umount -l "$scratch/disk"; fi
    rm -rf --one-file-system "$scratch"
    if [[ $group ]]; then rmdir "$group" 2>/dev/null || true; fi
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
# shellcheck source=peers.sh
. "$here/peers.sh"

wanted() { [[ ",$1," == *",$2,"* ]]; }
if wanted "$servers" ringfsd && [[ -z $ringfsd ]]; then
    cargo build --quiet --release --locked --target-dir "$target" --manifest-path "$root/Cargo.toml"
    ringfsd=$target/release/ringfsd
fi
BRIDGE=${BRIDGE:-}
if [[ -z $BRIDGE ]]; then
    cargo build --quiet --release --locked --target-dir "$target" --manifest-path "$here/../bridge/Cargo.toml"
    BRIDGE=$target/release/bridge
fi
export BRIDGE
virtiofsd='' c_virtiofsd=''
for name in virtiofsd c-virtiofsd; do
    if wanted "$servers" $name && ! "get_${name//-/_}"; then
        echo "- $name is left out: it could not be installed"
        servers=$(sed "s/\b$name\b,\?//" <<<",$servers," | sed 's/^,*//;s/,*$//')
    fi
done
packages=(git rsync perl ripgrep)
if wanted "$works" sqlite; then packages+=(sqlite3); fi
if wanted "$works" postgres; then packages+=(postgresql); fi
if wanted "$works" npm; then packages+=(npm); fi
if wanted "$works" npm && command -v npm >/dev/null; then packages=("${packages[@]/npm/}"); fi
# shellcheck disable=SC2046 # one word for each package
apt_install $(printf '%s\n' "${packages[@]}")

# Real sources: those that cargo has unpacked to build the server.
export FIXTURES=$dir/work-fixtures
sources=${CARGO_HOME:-$HOME/.cargo}/registry/src
mkdir -p "$FIXTURES"
if wanted "$works" tree && [[ ! -e $FIXTURES/tree.tar || $(cat "$FIXTURES/files" 2>/dev/null) != "$files" ]]; then
    rm -rf "$FIXTURES/tree" && mkdir "$FIXTURES/tree"
    (cd "$sources" && find . -type f -size -200k -not -path '*/.git/*' | sort | awk -v n="$files" 'NR <= n' |
        tar cf - -T - | tar xf - -C "$FIXTURES/tree")
    tar cf "$FIXTURES/tree.tar" -C "$FIXTURES" tree
    rm -rf "$FIXTURES/tree"
    echo "$files" >"$FIXTURES/files"
fi
if wanted "$works" image && [[ ! -e $FIXTURES/image.tar ]]; then
    # What a small image has: programs, libraries of scripts, many small files.
    (cd / && find usr/bin usr/share/zoneinfo usr/share/perl usr/lib/python3 -xdev -size -1024k | sort |
        tar cf "$FIXTURES/image.tar" --no-recursion -T -)
fi
if wanted "$works" cargo && [[ ! -e $FIXTURES/crate ]]; then
    mkdir "$FIXTURES/crate" "$FIXTURES/crate/src"
    printf '%s\n' '[package]' 'name = "hello"' 'version = "0.1.0"' 'edition = "2024"' '[workspace]' \
        '[dependencies]' 'libc = "*"' 'log = "*"' 'memchr = "*"' >"$FIXTURES/crate/Cargo.toml"
    echo 'fn main() { log::info!("{:?}", memchr::memchr(b"e"[0], b"hello")); }' >"$FIXTURES/crate/src/main.rs"
    (cd "$FIXTURES/crate" && cargo generate-lockfile --quiet --offline)
fi
if wanted "$works" npm && [[ ! -e $FIXTURES/npm/package-lock.json ]]; then
    mkdir -p "$FIXTURES/npm"
    echo '{"name": "work", "version": "1.0.0", "private": true, "dependencies":
        {"express": "4", "lodash": "4", "webpack": "5"}}' >"$FIXTURES/npm/package.json"
    # The first makes the lock file, the second fetches everything in it.
    (cd "$FIXTURES/npm" && npm install --silent --package-lock-only --no-audit --no-fund &&
        npm ci --silent --no-audit --no-fund --cache "$FIXTURES/npm-cache" && rm -rf node_modules)
fi
if wanted "$hosts" quota; then
    if [[ -e /sys/fs/cgroup/cgroup.controllers ]]; then
        group=/sys/fs/cgroup/ringfsd-work-$$
        echo +cpu >/sys/fs/cgroup/cgroup.subtree_control
        mkdir "$group" && echo '50000 100000' >"$group/cpu.max"
    else
        group=/sys/fs/cgroup/cpu/ringfsd-work-$$
        mkdir "$group"
        echo 100000 >"$group/cpu.cfs_period_us"
        echo 50000 >"$group/cpu.cfs_quota_us"
    fi
fi

### The rounds

# new_disk: makes an empty $scratch/disk: a file system, or a directory if that can't be had.
disk=''
new_disk() {
    local device
    if mountpoint -q "$scratch/disk"; then umount "$scratch/disk" || umount -l "$scratch/disk"; fi
    rm -rf --one-file-system "$scratch/disk" "$scratch/disk.img"
    mkdir "$scratch/disk"
    truncate -s 16G "$scratch/disk.img"
    mkfs.ext4 -q -F -i 8192 -E lazy_itable_init=0,lazy_journal_init=0 "$scratch/disk.img"
    if device=$(losetup --find --show --direct-io=on "$scratch/disk.img" 2>/dev/null) &&
        mount "$device" "$scratch/disk"; then
        disk='a new ext4 for each work'
        rmdir "$scratch/disk/lost+found"
    else
        disk=$(findmnt -n -o FSTYPE -T "$scratch")
    fi
    # It is released when it is unmounted.
    if [[ $device ]]; then losetup --detach "$device"; fi
    chmod 755 "$scratch/disk"
}

LINES=${results:-$scratch/results}
COLD=$cold MILLION=$million
export LINES COLD MILLION
touch "$LINES"
line_of() {
    case $1 in
    ringfsd) printf '%q --socket %%SOCKET%% --shared-dir %%SHARE%% --log-level error %s' "$ringfsd" "$ringfsd_args" ;;
    virtiofsd) printf '%q --socket-path %%SOCKET%% --shared-dir %%SHARE%% --log-level error' "$virtiofsd" ;;
    c-virtiofsd) printf '%q -f --socket-path=%%SOCKET%% -o source=%%SHARE%% -o sandbox=chroot -o log_level=err' "$c_virtiofsd" ;;
    *) echo "${more_servers[$1]:?there is no server $1}" ;;
    esac
}
# Reads what a work begins with, so that the first server in turn doesn't wait for the disk alone.
warm_up() {
    local -A paths=(
        [tree]=$FIXTURES/tree.tar [image]=$FIXTURES/image.tar [cargo]=$FIXTURES/crate
        [npm]="$FIXTURES/npm-cache /usr/share/nodejs" [postgres]=/usr/lib/postgresql
    )
    # shellcheck disable=SC2086 # several paths
    [[ -z ${paths[$1]:-} ]] || find -L ${paths[$1]} -type f -exec cat {} + >/dev/null 2>&1 || true
}
IFS=, read -ra work_list <<<"$works"
IFS=, read -ra server_list <<<"$servers"
IFS=, read -ra host_list <<<"$hosts"
for ((round = 1; round <= rounds; round++)); do
    for HOST in "${host_list[@]}"; do
        for WORK in "${work_list[@]}"; do
            warm_up "$WORK"
            for ((turn = 0; turn < ${#server_list[@]}; turn++)); do
                SERVER=${server_list[(turn + round - 1) % ${#server_list[@]}]}
                export HOST WORK SERVER
                if [[ -t 2 ]]; then printf '\r\033[Kround %d: %s, %s, %s' "$round" "$HOST" "$WORK" "$SERVER" >&2; fi
                new_disk
                if [[ $SERVER == plain ]]; then
                    mkdir "$scratch/disk/share" "$scratch/disk/beside"
                    MNT=$scratch/disk/share SHARE=$scratch/disk/share PLAIN=$scratch/disk/beside "$here/work.sh"
                    continue
                fi
                line="exec $(line_of "$SERVER")"
                if [[ $HOST == quota ]]; then line="echo \$\$ >$group/cgroup.procs && $line"; fi
                TMPDIR=$scratch/disk "$here/../bridge/with.sh" --server "$line" -- "$here/work.sh" || {
                    # virtiofsd ends with its client, and reports that as a failure.
                    (($? == 125)) && [[ $SERVER == *virtiofsd ]]
                }
            done
        done
    done
done
if [[ -t 2 ]]; then printf '\r\033[K' >&2; fi

processor=$(awk -F ': ' '/^model name/ { print $2; exit }' /proc/cpuinfo)
echo "- $(date -u +%F), $(nproc) processors ($processor), Linux $(uname -r), $disk"
echo "- rounds: $rounds, a tree of $files files${cold:+, cold caches}"
report "$LINES"
