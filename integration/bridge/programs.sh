# shellcheck shell=bash
# To be sourced after suite.sh: programs make, write, read, list, rename and remove files in $MNT, and
# each result is compared with what they do in the plain directory $PLAIN.

need git git

# both COMMAND: the same command, in the mount and in the plain directory.
both() {
    (cd "$MNT" && eval "$1") && (cd "$PLAIN" && eval "$1")
}

# same: both have the same names, types, permissions and contents.
same() {
    diff -r --no-dereference "$MNT" "$PLAIN" &&
        diff <(cd "$MNT" && find . -printf '%P %y %m %l %n\n' | grep -v ' d ' | sort) \
            <(cd "$PLAIN" && find . -printf '%P %y %m %l %n\n' | grep -v ' d ' | sort)
}

copies_a_tree() {
    both "cp -r '$here/src' copied" && same
}

writes_in_place() {
    both "head -c 300000 /dev/zero | tr '\0' x >large && echo more >>large &&
        printf middle | dd of=large bs=1 seek=1000 conv=notrunc status=none && truncate -s 250001 large" && same
}

makes_and_removes_names() {
    both "mkdir -p a/b/c && echo 1 >a/one && ln a/one a/two && ln -s ../a/one a/b/link &&
        mv a/b/c a/d && mv a/one a/b/three && rm a/two && chmod 600 a/b/three" && same
}

maps_files() {
    # git maps its index and its packs.
    both "git -c init.defaultBranch=main init -q repository && cd repository && cp -r '$here/src' . &&
        git add . && git -c user.name=n -c user.email=e commit -qm first && git gc -q &&
        git fsck --strict && test -z \"\$(git status --porcelain)\" && rm -rf .git"
    same
}

many_at_once() {
    both "seq 400 | xargs -P 8 -I{} sh -c 'mkdir -p many/\$(({} % 7)) && echo {} >many/\$(({} % 7))/{}'" && same
}

removes_everything() {
    rm -rf "${MNT:?}"/* && rm -rf "${PLAIN:?}"/* && same && [[ -z $(ls -A "$MNT") ]]
}

programs=(copies_a_tree writes_in_place makes_and_removes_names maps_files many_at_once
    removes_everything)

# run_programs [PREFIX]: runs all of them; PREFIX begins the lines that are printed.
run_programs() {
    local name output began prefix=${1:-}
    for name in "${programs[@]}"; do
        began=$SECONDS
        if output=$($name 2>&1); then
            passed=$((passed + 1))
            echo "passed $prefix$name ($((SECONDS - began)) s)"
        else
            failed=$((failed + 1))
            echo "FAILED $prefix$name" && tail -n 20 <<<"$output"
        fi
    done
}
