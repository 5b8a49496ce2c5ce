#!/usr/bin/env bash
# Prometheus scrapes a loaded server through a kill and an upgrade. Then each query of
# docs/grafana.json, and each expression of docs/alerts.yml without its last comparison and with any
# errno, has to return data, and no counter may have gone back. Installs prometheus, jq and curl if they are missing. Takes
# about 30 seconds.
#
#   check.sh [--ringfsd PATH] [--load PATH] [--keep DIR]
#
#   --ringfsd, --load   these programs instead of those in target/release
#   --keep DIR          keep what each query has returned there
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
ringfsd=$root/target/release/ringfsd load=$root/target/release/load keep=
while (($#)); do
    case $1 in
        --ringfsd) ringfsd=$2 ;;
        --load) load=$2 ;;
        --keep) keep=$2 ;;
        *) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" >&2; exit 2 ;;
    esac
    shift 2
done
die() { echo "metrics: $*" >&2; exit 1; }

missing=()
command -v prometheus >/dev/null && command -v promtool >/dev/null || missing+=(prometheus)
command -v jq >/dev/null || missing+=(jq)
command -v curl >/dev/null || missing+=(curl)
if ((${#missing[@]})); then
    echo "installing ${missing[*]}"
    apt() { DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=300 "$@" >/dev/null; }
    apt update && apt install --no-install-recommends "${missing[@]}" || die "can't install ${missing[*]}"
    # The package starts one of its own.
    systemctl stop prometheus 2>/dev/null || true
fi

# In memory: the load generator makes tens of thousands of files.
work=$(mktemp -d -p "$([[ -w /dev/shm ]] && echo /dev/shm || echo /tmp)")
server='' prometheus='' loaded=''
finish() {
    local status=$?
    trap - EXIT
    for pid in $loaded $prometheus $server; do kill "$pid" 2>/dev/null || true; done
    wait 2>/dev/null || true
    ((status == 0)) || { tail -n 20 "$work"/*.log >&2 || true; }
    rm -rf "$work"
    exit "$status"
}
trap finish EXIT

# until COMMAND...: repeats it until it succeeds, for 30 seconds.
until_succeeds() {
    local end=$((SECONDS + 30))
    until "$@"; do
        ((SECONDS < end)) || die "timed out: $*"
        sleep 0.1
    done
}

mkdir "$work/share"
"$ringfsd" --socket "$work/socket" --shared-dir "$work/share" --tag checked --supervise \
    --metrics 127.0.0.1:0 2>"$work/server.log" &
server=$!
until_succeeds grep -q 'Waiting for vhost-user' "$work/server.log"
target=$(sed -n 's|.*metrics are served on http://\([^/]*\)/metrics.*|\1|p' "$work/server.log" | head -n 1)

cat >"$work/prometheus.yml" <<EOF
global: { scrape_interval: 500ms, scrape_timeout: 400ms, evaluation_interval: 1s }
rule_files: ["$root/docs/alerts.yml"]
scrape_configs:
  - job_name: ringfsd
    static_configs: [{ targets: ["$target"] }]
EOF
promtool check rules "$root/docs/alerts.yml" || die 'docs/alerts.yml'
port=$((20000 + RANDOM % 20000))
prometheus --config.file="$work/prometheus.yml" --storage.tsdb.path="$work/data" \
    --web.listen-address="127.0.0.1:$port" >"$work/prometheus.log" 2>&1 &
prometheus=$!
api=http://127.0.0.1:$port/api/v1
# query EXPRESSION: the result of an instant query, as JSON.
query() { curl -sS --max-time 10 --data-urlencode "query=$1" "$api/query"; }
# value EXPRESSION: the value of the first series; 0 if there is none.
value() { query "$1" | jq -r '.data.result[0].value[1] // "0"'; }
until_succeeds curl -sf -o "$work/ready" "http://127.0.0.1:$port/-/ready"
at_least() { [[ $(value "$1" | cut -d. -f1) -ge $2 ]]; }
until_succeeds at_least 'count(up{job="ringfsd"} == 1)' 1

cases=mixed/4k@8,lookup-absent@8,create@8
for ((n = 0; n < 100; n++)); do echo "$cases"; done | while read -r cases; do
    "$load" --socket "$work/socket" --shared-dir "$work/share" --file-size 16m --keep \
        --case "$cases" --seconds 2 --warm-up 0.1 >"$work/load.log" 2>&1 || exit 1
done &
loaded=$!

until_succeeds at_least 'sum(ringfsd_requests_total)' 1000
sleep 2
kill -KILL "$(pgrep -P $server | head -n 1)"
until_succeeds grep -q 'serving again' "$work/server.log"
until_succeeds at_least 'ringfsd_restarts_total{reason="killed"}' 1
sleep 1
"$ringfsd" upgrade --pid $server
until_succeeds at_least 'ringfsd_restarts_total{reason="upgrade"}' 1
sleep 4
kill -0 $loaded 2>/dev/null || die 'the load has ended'

# Counters don't go back, and no scrape has failed.
resets=$(query 'sort_desc(resets({__name__=~"ringfsd_.*_(total|count|sum|bucket)"}[1m])) > 0')
[[ $(jq '.data.result | length' <<<"$resets") == 0 ]] || die "counters went back: $resets"
failed=$(query 'count_over_time((up{job="ringfsd"} == 0)[1m:500ms])')
[[ $(jq '.data.result | length' <<<"$failed") == 0 ]] || echo "a scrape met a restart: $failed"
counted=$(value 'count({__name__=~"ringfsd_.*"})')
echo "$counted series, none of which went back"

# returns WHAT EXPRESSION: the expression has to return series.
queries=0
returns() {
    local result expression=$2
    expression=${expression//\$__rate_interval/5s}
    expression=${expression//\$share/.*}
    result=$(query "$expression")
    [[ $(jq -r .status <<<"$result") == success ]] || die "$1: $expression: $result"
    local series
    series=$(jq '.data.result | length' <<<"$result")
    ((series)) || die "$1: no data: $expression"
    ! jq -e '.data.result[] | select(.value[1] == "NaN") | halt_error' <<<"$result" >/dev/null 2>&1 ||
        echo "$1: some are NaN"
    queries=$((queries + 1))
    [[ -z $keep ]] || printf '%s\n%s\n' "$1: $expression" \
        "$(jq -r '.data.result[:4][] | "    \(.metric) \(.value[1])"' <<<"$result")" >>"$keep/queries.txt"
}
[[ -z $keep ]] || { mkdir -p "$keep"; : >"$keep/queries.txt"; }
while IFS=$'\t' read -r title expression; do
    returns "dashboard, $title" "$expression"
done < <(jq -r '.panels[] | select(.targets) | .title as $title | .targets[] | [$title, .expr] | @tsv' \
    "$root/docs/grafana.json")
dashboard=$queries
jq -r '.annotations.list[].expr' "$root/docs/grafana.json" | while read -r expression; do
    returns annotation "${expression% > 0}"
done
curl -sS "$api/rules" >"$work/rules.json"
while IFS=$'\t' read -r name expression; do
    # Without the comparison, so that there is data while all is well.
    expression=$(sed -E 's/ (>|==) [0-9.]+$//; s/errno=~"[^"]*"/errno=~".+"/' <<<"$expression")
    returns "alert $name" "$expression"
done < <(jq -r '.data.groups[].rules[] | [.name, .query] | @tsv' "$work/rules.json")
unhealthy=$(jq -r '.data.groups[].rules[] | select(.health == "err") | .name + ": " + .lastError' "$work/rules.json")
[[ -z $unhealthy ]] || die "rules that can't be evaluated: $unhealthy"
((queries > dashboard)) || die 'no alert was checked'
labels=$(curl -sS "$api/label/share/values" | jq -r '.data[]')
[[ $labels == checked ]] || die "the label share is $labels"
echo "metrics: $dashboard queries of the dashboard and $((queries - dashboard)) alerts return data"
