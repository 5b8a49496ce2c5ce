complete -c ringfsd -l socket -l socket-path -d 'Listen for the VMM on a new Unix socket at PATH' -r -F
complete -c ringfsd -l fd -d 'Listen on inherited socket descriptor N' -r
complete -c ringfsd -l socket-group -d 'Let members of GROUP connect to the new socket too' -r
complete -c ringfsd -l tag -d 'Tag by which the guest mounts the directory' -r
complete -c ringfsd -l request-queues -d 'Request queues that the VMM may set up, 1 to 1024' -r
complete -c ringfsd -l workers -d 'Threads that serve the queues, 1 to 256' -r
complete -c ringfsd -l runtime -d 'File I/O by: auto, uring, tokio, tokio-uring' -r -f -a "auto\t''
uring\t''
tokio\t''
tokio-uring\t''"
complete -c ringfsd -l poll-us -d 'Poll the rings for up to N µs before sleeping' -r
complete -c ringfsd -l pid-file -d 'Write the process id to PATH, and lock the file' -r -F
complete -c ringfsd -l compat -d 'Behave like ringfsd or virtiofsd' -r -f -a "ringfsd\t'Its own'
virtiofsd\t'Those of virtiofsd 1.14'"
complete -c ringfsd -s o -d 'Take options as a list: -o source=DIR,cache=auto' -r
complete -c ringfsd -l thread-pool-size -d 'Accepted for compatibility; has no effect' -r
complete -c ringfsd -l shared-dir -d 'Directory to share' -r -F
complete -c ringfsd -l vfs -d 'Share something at a mount point; may be repeated' -r
complete -c ringfsd -l overlay -d 'Share layers as one directory' -r
complete -c ringfsd -l rafs -d 'Share a RAFS image (needs --blobs)' -r -F
complete -c ringfsd -l blobs -d 'Directory of the image\'s data' -r -F
complete -c ringfsd -l cache-dir -d 'Directory for decompressed data of the image' -r -F
complete -c ringfsd -l rafs-prefetch -d 'Read files of the image in advance: none, named or all' -r -f -a "none\t''
named\t''
all\t''"
complete -c ringfsd -l inode-file-handles -d 'Use file handles: never, prefer or mandatory' -r -f -a "never\t''
prefer\t''
mandatory\t''"
complete -c ringfsd -l lock-wait-limit -d 'How long to wait for a lock; 0 sets no limit' -r
complete -c ringfsd -l max-inodes -d 'Maximum number of inodes the guest may know' -r
complete -c ringfsd -l max-handles -d 'Maximum number of files the guest may have open' -r
complete -c ringfsd -l max-open-inodes -d 'Maximum number of descriptors for inodes and files' -r
complete -c ringfsd -l rlimit-nofile -d 'Limit of open files (RLIMIT_NOFILE)' -r
complete -c ringfsd -l remember-inodes -d 'Dropped inodes whose file handles stay valid' -r
complete -c ringfsd -l limit-iops -d 'Maximum operations a second; may be repeated' -r
complete -c ringfsd -l limit-bandwidth -d 'Maximum bytes read and written a second; may be repeated' -r
complete -c ringfsd -l limit-space -d 'Maximum space the directory may take' -r
complete -c ringfsd -l cache -d 'Caching policy: never, metadata, auto or always' -r -f -a "never\t''
metadata\t''
auto\t''
always\t''"
complete -c ringfsd -l attr-timeout -d 'How long the guest may rely on attributes' -r
complete -c ringfsd -l entry-timeout -d 'How long the guest may rely on a name' -r
complete -c ringfsd -l negative-timeout -d 'How long the guest may rely on a name\'s absence' -r
complete -c ringfsd -l max-spare-files -d 'Closed files to keep open for reuse' -r
complete -c ringfsd -l dax-window -d 'Size of the window in which the guest maps files (DAX)' -r
complete -c ringfsd -l dax -d 'What the guest maps: always, inode or never' -r -f -a "always\t'All regular files'
inode\t'Those that are large enough'
never\t'None'"
complete -c ringfsd -l dax-min-size -d 'Size from which a file is mapped with --dax inode' -r
complete -c ringfsd -l dax-include -d 'Names of files that are mapped; repeatable' -r
complete -c ringfsd -l dax-exclude -d 'Names of files that are not mapped; repeatable' -r
complete -c ringfsd -l translate-uid -d 'Translate user ids between guest and host' -r
complete -c ringfsd -l translate-gid -d 'Translate group ids between guest and host' -r
complete -c ringfsd -l xattrmap -d 'Store extended attributes under other names' -r
complete -c ringfsd -l posix-acl -d 'POSIX ACLs: never, auto or always' -r -f -a "never\t''
auto\t''
always\t''"
complete -c ringfsd -l security-label -d 'Security labels (SELinux): never, auto or always' -r -f -a "never\t''
auto\t''
always\t''"
complete -c ringfsd -l sandbox -d 'Sandbox: namespace, chroot or none' -r -f -a "namespace\t''
chroot\t''
none\t''"
complete -c ringfsd -l seccomp -d 'Seccomp: kill, trap, log or none' -r -f -a "kill\t''
trap\t''
log\t''
none\t''"
complete -c ringfsd -l modcaps -d 'Capabilities to keep or drop: +sys_admin:-mknod' -r
complete -c ringfsd -l uid-map -d 'Map user ids of the server\'s user namespace' -r
complete -c ringfsd -l gid-map -d 'Map group ids of the server\'s user namespace' -r
complete -c ringfsd -l migration-mode -d 'Identify files: find-paths or file-handles' -r -f -a "find-paths\t''
file-handles\t''"
complete -c ringfsd -l migration-on-error -d 'If a file is missing: abort or guest-error' -r -f -a "abort\t''
guest-error\t''"
complete -c ringfsd -l state -d 'Keep the session in FILE for the next server' -r -F
complete -c ringfsd -l log-level -d 'Log level: off, error, warn, info, debug or trace' -r -f -a "off\t''
error\t''
warn\t''
info\t''
debug\t''
trace\t''"
complete -c ringfsd -l log-format -d 'Format of log records: text or json' -r -f -a "text\t''
json\t''"
complete -c ringfsd -l metrics -d 'Serve metrics at unix:PATH, 127.0.0.1:PORT or [::1]:PORT' -r
complete -c ringfsd -l control -d 'Let the server be controlled by a new socket: unix:PATH' -r -F
complete -c ringfsd -l once -d 'Exit when the first VMM disconnects'
complete -c ringfsd -l keep-listening -d 'Wait for the next VMM when one disconnects'
complete -c ringfsd -s f -d 'Accepted for compatibility; has no effect'
complete -c ringfsd -l readonly -d 'Refuse all changes with EROFS'
complete -c ringfsd -l announce-submounts -d 'Tell the guest about mounts in the directory (default)'
complete -c ringfsd -l no-announce-submounts -d 'Show mounts in the directory as part of it'
complete -c ringfsd -l preserve-noatime -d 'Keep O_NOATIME when the guest opens a file'
complete -c ringfsd -l posix-locks -d 'Take record locks (fcntl, lockf) on the host'
complete -c ringfsd -l flock -d 'Take whole-file locks (flock) on the host'
complete -c ringfsd -l writeback -d 'Let the guest collect writes and send them later'
complete -c ringfsd -l allow-direct-io -d 'Pass the guest\'s O_DIRECT on to the host'
complete -c ringfsd -l allow-mmap -d 'Allow shared writable mmap with any --cache policy'
complete -c ringfsd -l no-readdirplus -d 'List directories without attributes of the files'
complete -c ringfsd -l no-open -d 'Let the guest use files without OPEN requests'
complete -c ringfsd -l no-opendir -d 'Let the guest read directories without OPENDIR requests'
complete -c ringfsd -l dax-fs-map -d 'Map by FS_MAP under a VMM without SHMEM'
complete -c ringfsd -l killpriv-v2 -d 'Clear set-ID bits on behalf of the guest\'s kernel'
complete -c ringfsd -l no-killpriv-v2 -d 'Let the guest\'s kernel clear set-ID bits'
complete -c ringfsd -l xattr -d 'Serve extended attributes (default)'
complete -c ringfsd -l no-xattr -d 'Don\'t serve extended attributes'
complete -c ringfsd -l disable-sandbox -d 'Same as --sandbox none'
complete -c ringfsd -l migration-verify-handles -d 'Send file handles along with paths'
complete -c ringfsd -l migration-confirm-paths -d 'Check each path before it is sent'
complete -c ringfsd -l supervise -d 'Restart the serving process if it is killed'
complete -c ringfsd -s d -d 'Same as --log-level debug'
complete -c ringfsd -l syslog -d 'Log to syslog'
complete -c ringfsd -l print-capabilities -d 'Print what the server supports as JSON, and exit'
complete -c ringfsd -s h -l help -d 'Print help (see more with \'--help\')'
complete -c ringfsd -s V -l version -d 'Print version'
