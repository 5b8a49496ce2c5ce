#!/usr/bin/env bash
# git: clones a repository that the script creates onto the mount, checks it, works in it.
# Options: those of with.sh, --commits N (2,000), --files N (3,000); or --repository DIR, an existing
# bare repository (an absolute path; a large one takes some minutes).
# shellcheck disable=SC2016 # the steps are expanded by the shells that run them
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/suite.sh"
need git git
own='commits files repository'
on_mount "$@"

commits=${commits:-2000} files=${files:-3000}
export GIT_CONFIG_GLOBAL=/dev/null GIT_AUTHOR_NAME=n GIT_AUTHOR_EMAIL=e GIT_COMMITTER_NAME=n \
    GIT_COMMITTER_EMAIL=e
git() { command git -c advice.detachedHead=false -c gc.auto=0 -c safe.directory='*' "$@"; }
export -f git

# made: creates the repository from a stream for fast-import, with $files files in the first commit
# and one changed in each further commit.
made() {
    awk -v commits="$commits" -v files="$files" 'BEGIN {
        for (c = 1; c <= commits; c++) {
            print "commit refs/heads/main\ncommitter n <e> " 1700000000 + c " +0000\ndata 1\nc"
            for (f = c == 1 ? 1 : c % files + 1; f <= (c == 1 ? files : c % files + 1); f++) {
                text = ""
                for (l = 0; l < f % 40 + 1; l++) text = text "line " l " of " f " at " c "\n"
                print "M 644 inline d" f % 50 "/e" f % 7 "/f" f "\ndata " length(text) "\n" text
            }
        }
    }' >"$PLAIN/stream"
    git init --quiet --bare "$PLAIN/origin"
    git --git-dir "$PLAIN/origin" symbolic-ref HEAD refs/heads/main
    git --git-dir "$PLAIN/origin" fast-import --quiet <"$PLAIN/stream"
}

if [[ ${repository:-} ]]; then
    origin=$repository slowly=20
    loose='git --git-dir "$MNT/loose" -c transfer.unpackLimit=1000000000 fetch --quiet "$origin" "+refs/*:refs/*"'
else
    made
    origin=$PLAIN/origin slowly=1
    loose='git --git-dir "$MNT/loose" -c fastimport.unpackLimit=1000000 fast-import --quiet <"$PLAIN/stream"'
fi
main=$(git --git-dir "$origin" symbolic-ref --short HEAD)
commits=$(git --git-dir "$origin" rev-list --first-parent --count HEAD)
export origin main commits

step() { check "git $1" $(($2 * slowly)) bash -euc "$3"; }
step 'clone, packed' 120 'git clone --quiet --no-local "$origin" "$MNT/clone"'
step 'clone, loose' 300 "git init --quiet --bare \"\$MNT/loose\"
    $loose"
for clone in clone loose; do
    step "fsck of $clone" 120 "git -C \"\$MNT/$clone\" fsck --full --strict"
done
step 'status is clean' 60 'cd "$MNT/clone" && [[ -z $(git status --porcelain) ]]'
step 'files are the same' 120 'git clone --quiet "$origin" "$PLAIN/clone"
    diff -r --exclude=.git "$PLAIN/clone" "$MNT/clone"
    [[ $(git -C "$MNT/clone" rev-parse HEAD) == $(git --git-dir "$origin" rev-parse HEAD) ]]
    diff <(git --git-dir "$origin" for-each-ref) <(git --git-dir "$MNT/loose" for-each-ref)'
step 'checkout of old commits and back' 120 'cd "$MNT/clone"
    for part in 40 10 4; do git checkout --quiet "$main~$((commits / part))"; done
    git checkout --quiet "$main" && [[ -z $(git status --porcelain) ]]'
step 'commit, branch, merge, rebase' 120 'cd "$MNT/clone"
    for i in 1 2 3 4 5; do
        git checkout --quiet -b "side$i" "$main~$i" && echo "$i" >"new$i" && git add . &&
            git commit --quiet -m "$i"
    done
    git checkout --quiet "$main" && git merge --quiet -m m side1 side2 side3 &&
        git checkout --quiet side4 && git rebase --quiet "$main"'
step 'repack, gc, fsck' 240 'cd "$MNT/clone" && git repack -adfq && git gc --quiet --prune=now &&
    git fsck --full --strict'
step 'clone on the mount, with hard links' 120 'git clone --quiet "$MNT/clone" "$MNT/second" &&
    git -C "$MNT/second" fsck --full'
step 'worktree and bisect' 120 'cd "$MNT/clone" && git worktree add --quiet ../tree "$main~20" &&
    cd ../tree && git bisect start "$main" "$main~100" && git bisect run true'
step 'remove all' 120 'rm -rf "$MNT/clone" "$MNT/loose" "$MNT/second" "$MNT/tree" &&
    [[ -z $(ls -A "$MNT") ]]'
summary
