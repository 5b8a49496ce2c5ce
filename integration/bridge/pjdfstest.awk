# Of what pjdfstest says: how many tests were skipped for which reason, and which.
/ skipped$/ {
    name = $1
    getline reason
    sub(/^[ \t]+/, "", reason)
    count[reason]++
    names[reason] = names[reason] " " name
}
END {
    for (reason in count) print "skipped " count[reason] ": " reason ":" names[reason]
}
