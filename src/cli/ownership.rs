//! Options of the heading Ownership: who owns files in the guest and on the host.

use clap::Args;

use crate::fs::passthrough::IdRule;

/// User and group ids.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Ownership")]
pub struct Ownership {
    /// Translate user ids between guest and host
    ///
    /// May be given several times. Ids without a rule are not translated.
    ///
    /// - map:GUEST:HOST:COUNT: COUNT ids, both ways
    /// - guest:GUEST:HOST:COUNT: only ids that the guest sets
    /// - host:HOST:GUEST:COUNT: only ids that the guest sees
    /// - squash-guest:GUEST:HOST:COUNT: set COUNT ids as the one id HOST
    /// - squash-host:HOST:GUEST:COUNT: show COUNT ids as the one id GUEST
    /// - forbid-guest:GUEST:COUNT: setting these fails with EPERM
    #[arg(long, value_name = "RULE", verbatim_doc_comment)]
    pub translate_uid: Vec<IdRule>,

    /// Translate group ids between guest and host
    ///
    /// The rules are those of --translate-uid.
    #[arg(long, value_name = "RULE")]
    pub translate_gid: Vec<IdRule>,

    /// Clear set-ID bits on behalf of the guest's kernel
    ///
    /// The server clears the set-user-ID and set-group-ID bits of a file that is written, truncated
    /// or given another owner. The guest's kernel then asks for security.capability once for each
    /// file, not before each write. This is the default where extended attributes are served. It
    /// has no effect where --xattrmap stores security.capability under another name, as the host
    /// doesn't clear that.
    #[arg(long, overrides_with = "no_killpriv_v2")]
    pub killpriv_v2: bool,

    /// Let the guest's kernel clear set-ID bits
    ///
    /// With extended attributes, the guest's kernel then sends one more request before each write.
    #[arg(long)]
    pub no_killpriv_v2: bool,
}
