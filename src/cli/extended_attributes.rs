//! Options of the heading Extended attributes: whether they are served, under which names, and
//! what the guest's kernel uses them for.

use clap::Args;

use crate::fs::passthrough::XattrMap;
use crate::fuse::Wanted;

/// Extended attributes, ACLs and labels.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Extended attributes")]
pub struct ExtendedAttributes {
    /// Serve extended attributes (default)
    ///
    /// Without them copies lose capabilities, labels and ACLs, which programs rely on. This is the
    /// default, except with --compat virtiofsd; --no-xattr turns it off. The options below imply it.
    #[arg(long, overrides_with = "no_xattr")]
    pub xattr: bool,

    /// Don't serve extended attributes
    ///
    /// The guest's kernel then doesn't ask for security.capability before a write. With --killpriv-v2,
    /// which is the default, it asks once for each file.
    #[arg(long)]
    pub no_xattr: bool,

    /// Store extended attributes under other names
    ///
    /// RULES have the form :TYPE:SCOPE:KEY:PREPEND: or :map:KEY:PREPEND:, which the manual explains.
    /// Example for a server without privileges: :map::user.guest.:
    #[arg(long, value_name = "RULES")]
    pub xattrmap: Option<XattrMap>,

    /// POSIX ACLs: never, auto or always
    ///
    /// The host's file system must support ACLs. --posix-acl alone means
    /// always.
    ///
    /// - never: the guest sees no ACLs
    /// - auto: with guests that support them
    /// - always: reject guests without support
    #[arg(
        long,
        value_name = "WHEN",
        value_enum,
        num_args = 0..=1,
        require_equals = true,
        ignore_case = true,
        default_value_t,
        default_missing_value = "always",
        hide_possible_values = true,
        verbatim_doc_comment
    )]
    pub posix_acl: Wanted,

    /// Security labels (SELinux): never, auto or always
    ///
    /// A new inode has the security label of the guest's kernel from its
    /// creation on. Needs CAP_SYS_ADMIN, or --xattrmap to store labels
    /// under other names. --security-label alone means always.
    ///
    /// - never: new inodes have no label
    /// - auto: with guests that support it
    /// - always: reject guests without support
    #[arg(
        long,
        value_name = "WHEN",
        value_enum,
        num_args = 0..=1,
        require_equals = true,
        ignore_case = true,
        default_value_t,
        default_missing_value = "always",
        hide_possible_values = true,
        verbatim_doc_comment
    )]
    pub security_label: Wanted,
}
