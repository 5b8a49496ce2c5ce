#!/usr/bin/env bash
# Two directories under one mount (`--vfs`), mounted here by the real FUSE client. Programs work in
# both, alone and at once, and across them; each result is compared with what they do in two plain
# directories, or with what is in the directories behind the mount. Options: those of with.sh.
set -euo pipefail
# shellcheck source=suite.sh
. "$(dirname "${BASH_SOURCE[0]}")/suite.sh"
need git git
[[ ${MNT:-} ]] || set -- --vfs yes "$@"
on_mount "$@"

mkdir "$PLAIN/one" "$PLAIN/two"
top=$(realpath "$MNT/..")

# both COMMAND: the same command, with $ONE and $TWO in the mount, and in plain directories.
both() {
    (ONE=$MNT TWO=$MNT2 && eval "$1") && (ONE=$PLAIN/one TWO=$PLAIN/two && eval "$1")
}

# same: what was made in the mount is what was made in plain directories, and is behind the mount.
same() {
    local pair
    for pair in "$MNT $PLAIN/one" "$MNT2 $PLAIN/two" "$SHARE $PLAIN/one" "$SHARE2 $PLAIN/two"; do
        read -r left right <<<"$pair"
        diff -r --no-dereference "$left" "$right" &&
            diff <(cd "$left" && find . -printf '%P %y %m %l %n\n' | grep -v ' d ' | sort) \
                <(cd "$right" && find . -printf '%P %y %m %l %n\n' | grep -v ' d ' | sort) || return 1
    done
}

copies_across() {
    both "cp -r '$here/src' \$ONE/copied && cp -a \$ONE/copied \$TWO/ && cp -a \$TWO/copied \$TWO/again" && same
}

moves_across() {
    # rename(2) fails, and mv copies.
    both 'mkdir $ONE/moved && head -c 3000000 /dev/urandom >$ONE/moved/large &&
        mv $ONE/moved $TWO/moved && test ! -e $ONE/moved && rm $TWO/moved/large' && same &&
        ! python3 -c "import os; os.rename('$MNT/copied', '$MNT2/elsewhere')" 2>/dev/null &&
        ! ln "$MNT/copied/main.rs" "$MNT2/linked" 2>/dev/null
}

clones_across() {
    both 'git -c init.defaultBranch=main init -q $ONE/repository && cd $ONE/repository &&
        cp -r $ONE/copied . && git add . && git -c user.name=n -c user.email=e commit -qm first &&
        git clone -q --no-hardlinks $ONE/repository $TWO/clone && git -C $TWO/clone gc -q &&
        git -C $TWO/clone fsck --strict && test -z "$(git -C $TWO/clone status --porcelain)" &&
        rm -rf $ONE/repository/.git $TWO/clone/.git' && same
}

writes_both_at_once() {
    both 'seq 400 | ONE=$ONE TWO=$TWO xargs -P 8 -I{} sh -c "
        mkdir -p \$ONE/many/\$(({} % 7)) \$TWO/many/\$(({} % 5)) &&
        echo {} >\$ONE/many/\$(({} % 7))/{} && cp \$ONE/many/\$(({} % 7))/{} \$TWO/many/\$(({} % 5))/{}"' && same
}

root_cannot_be_changed() {
    [[ $(ls -A "$top") == $'deep\none' && $(ls -A "$top/deep") == two ]] &&
        ! mkdir "$top/new" 2>/dev/null && ! touch "$top/deep/new" 2>/dev/null &&
        ! rmdir "$top/one" 2>/dev/null && ! mv "$top/one" "$top/three" 2>/dev/null &&
        ! rm -rf "$top/deep" 2>/dev/null && mkdir "$MNT2/still-there" && rmdir "$MNT2/still-there"
}

finds_its_way_up() {
    [[ $(cd "$MNT2/again" && cd ../../.. && pwd -P) == "$top" ]] &&
        [[ $(cd "$MNT2" && python3 -c 'import os; print(os.getcwd())') == "$MNT2" ]]
}

for name in copies_across moves_across clones_across writes_both_at_once finds_its_way_up \
    root_cannot_be_changed; do
    began=$SECONDS
    if output=$($name 2>&1); then
        passed=$((passed + 1))
        echo "passed $name ($((SECONDS - began)) s)"
    else
        failed=$((failed + 1))
        echo "FAILED $name" && tail -n 20 <<<"$output"
    fi
done
summary
