//! The flags of every command, and the help that is made from them.

/// Name, value (empty: a switch), and help.
pub type Flag = (&'static str, &'static str, &'static str);

/// A command, what it does, and its own flags.
pub type Group = (&'static str, &'static str, &'static [Flag]);

pub(super) const EVERY: &str = "every command";

/// The flags of every command, then each command.
pub const GROUPS: [Group; 14] = [
    (
        EVERY,
        "",
        &[
            ("db", "DIR", "the folder of the index, or postgres://user@host,host2/database"),
            ("volumes", "LIST", "the volumes, host:port,host:port,…"),
            ("replicas", "N", "how many volumes hold a value (3)"),
            ("subvolumes", "N", "how many folders, each a disk, a volume has (10)"),
            ("userpass", "USER:PASS", "the login for volumes with basic authorization; MKV_USERPASS hides it from ps"),
            ("secret", "FILE", "sign all requests and redirects with a secret that the volumes share"),
            ("voltimeout", "TIME", "how long to wait for a volume's HEAD, as 500ms or 1s (1s)"),
            ("v", "", "log each request, show every finding"),
            ("log", "FORMAT", "how to log: text, or json for one object a line (text)"),
            ("version", "", "print the version, its commit, and RocksDB's version"),
            ("help", "", "print this; mkv COMMAND -help prints the flags of one command"),
        ],
    ),
    (
        "server",
        "answer requests until SIGTERM or Ctrl-C",
        &[
            ("host", "ADDR", "the address to listen on (all)"),
            ("port", "N", "the port to listen on (3000)"),
            ("fallback", "HOST:PORT", "where to send a GET of a key that is not here"),
            ("protect", "", "a key must be unlinked before it can be deleted, and is never replaced"),
            ("settle", "TIME", "how long copies of REBALANCE rest before what they replace is deleted (60s)"),
            ("basicauth", "", "every request needs a login that the volumes accept"),
            ("linktime", "TIME", "how long the redirect of a GET is valid, with -secret (1h)"),
            ("accel", "", "let the nginx of deploy/front.conf fetch the value, in place of a redirect"),
            ("md5sum", "BOOL", "keep the md5 of each value (true)"),
            ("backup", "TIME", "store a copy of the index on the volumes this often, as 24h (never)"),
            ("sync", "", "flush the index to the disk before a write is answered"),
            ("s3", "PORT", "serve S3 on this port, too (off)"),
            (
                "s3keys",
                "FILE",
                "the keys of S3, a line each: ACCESS SECRET [ro] [bucket…]; read again on SIGHUP (none: open to all)",
            ),
            ("s3redirect", "", "redirect S3's GET to the volumes where a client is known to follow"),
            ("peer", "URL", "the other machine's mkv; if it was promoted in place of this one, follow it"),
            ("keeplog", "MIB", "how much of the index's log to keep for followers (1024)"),
            ("s3uploads", "TIME", "how long a multipart upload may take before its parts are deleted (168h)"),
            ("maxconns", "N", "the most connections of clients (4096)"),
            ("headtimeout", "TIME", "how long the head of a request may take (30s)"),
            ("idletimeout", "TIME", "how long a connection may wait for its next request (60s)"),
            ("stalltimeout", "TIME", "how long a client may take for 1 KiB of a body (60s)"),
        ],
    ),
    (
        "follow",
        "serve reads from a copy that trails a master's index; takes the server's flags too",
        &[("from", "URL", "the master, http://host:port")],
    ),
    ("promote", "make the index of a follower, which may run, a master's; stop the old master first", &[]),
    (
        "rebuild",
        "make a new index from the files on the volumes",
        &[
            ("rehash", "", "read the blobs whose md5 is not known"),
            ("from", "PATH", "another -db, or a backup, to carry over unlinked states, hashes and debris from"),
            ("nobackup", "", "do not look for a backup of the index on the volumes"),
            ("lost", "VOLUME", "host:port or host:port/svXX that is gone for good; may be repeated"),
        ],
    ),
    (
        "rebalance",
        "move values to the volumes where they belong",
        &[
            ("dry-run", "", "say what would be done"),
            ("settle", "TIME", "how long copies rest before what they replace is deleted (60s)"),
            ("sync", "", "flush the index to the disk with each change"),
            ("lost", "VOLUME", "treat as empty, ask it nothing; may be repeated"),
        ],
    ),
    (
        "verify",
        "compare the index with the volumes, and repair",
        &[
            ("deep", "", "read every blob and compare its md5"),
            ("repair", "", "restore replicas, remove debris and surplus; stop the master first"),
            ("strays", "", "with -repair: remove blobs of keys that the index does not know"),
            ("grace", "TIME", "leave strays that are younger than this (24h)"),
        ],
    ),
    (
        "import",
        "take over the index of a Go minikeyvalue, or another one of mkv",
        &[
            ("leveldb", "DIR", "the index of a Go minikeyvalue; it is only read"),
            ("index", "DB", "another -db of mkv, as a folder or a database; it is only read"),
        ],
    ),
    ("s3key", "print a new key for -s3keys", &[]),
    ("secret", "write a new secret to a new file: mkv secret FILE; or print one", &[]),
    ("dump", "print the index: a percent-encoded key, a tab and its record on each line", &[]),
    (
        "backup",
        "copy the index of a running master into a file in DIR, and check the copy",
        &[("master", "URL", "the master (http://127.0.0.1:3000)"), ("keep", "N", "how many backups stay in DIR (7)")],
    ),
    ("restore", "make an index in a new -db from FILE, a backup", &[]),
    ("completions", "print the completions for SHELL: bash, zsh or fish", &[]),
];

/// The commands that take a word more.
const OPERANDS: [(&str, &str); 3] = [("backup", "DIR"), ("restore", "FILE"), ("completions", "SHELL")];

/// The word that a command takes.
pub fn operand_of(command: &str) -> Option<&'static str> {
    OPERANDS.iter().find(|(name, _)| *name == command).map(|(_, operand)| *operand)
}

/// The exit statuses of every command.
pub const EXIT_STATUSES: [(&str, &str); 3] = [
    ("0", "all was done, and nothing wrong was found"),
    ("1", "something failed or was found wrong; what is printed says what to do"),
    ("2", "the command line is wrong; nothing was done"),
];

/// The usage text, of all commands or of one.
pub fn help(only: Option<&str>) -> String {
    let mut text = String::from("mkv, a distributed key-value store: plain files behind nginx, one small index\n\n");
    let commands = GROUPS[1..].iter().map(|(name, ..)| *name).collect::<Vec<_>>().join(" | ");
    let usage = only.map(|only| format!("{only} {}", operand_of(only).unwrap_or_default()));
    text += &format!("usage: mkv [flags] <{}>\n", usage.as_deref().unwrap_or(&commands).trim_end());
    for (group, what, flags) in GROUPS {
        let what = operand_of(group).map_or(what.to_string(), |operand| format!("{what}: mkv {group} {operand}"));
        if group != EVERY && only.is_some_and(|only| group != only) {
            continue;
        }
        text += &format!("\n{}\n", format!("{group}: {what}").trim_end_matches(": "));
        for (name, value, what) in flags {
            text += &format!("  {:<20} {what}\n", format!("-{name} {value}").trim_end());
        }
    }
    text += "\nexit status\n";
    for (status, what) in EXIT_STATUSES {
        text += &format!("  {status:<20} {what}\n");
    }
    text.trim_end().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn help_is_grouped_by_command() {
        let all = help(None);
        assert!(GROUPS[1..].iter().all(|(name, ..)| all.contains(&format!("\n{name}: "))), "{all}");
        let one = help(Some("rebuild"));
        assert!(one.contains("-rehash") && one.contains("-db DIR"), "{one}");
        assert!(!one.contains("-port") && !one.contains("-deep"), "{one}");
        assert!(help(Some("restore")).contains("mkv [flags] <restore FILE>\n"));
        assert!(all.contains("exit status\n  0 ") && one.contains("exit status\n  0 "));
    }
}
