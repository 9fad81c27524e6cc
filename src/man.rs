//! The manual page, `mkv man`: the commands and flags of `-help` as roff, for the Debian package.
//!
//! `deploy/mkv.1` holds the page of this version; `tests/packages.sh` fails when the two differ.

use crate::cli::{EXIT_STATUSES, GROUPS, operand_of};

const FILES: [(&str, &str); 3] = [
    ("/etc/mkv/master.env", "FLAGS and SERVER_FLAGS of the systemd unit mkv.service"),
    ("/etc/mkv/volume-NAME.env", "DIR, PORT, BIND, AUTH and WORKERS of the systemd unit mkv-volume@NAME.service"),
    ("/usr/share/doc/mkv/examples", "front.conf, and rules and a dashboard for Prometheus and Grafana"),
];

/// The page, in roff with man macros.
pub fn page() -> String {
    let mut page = format!(".TH MKV 1 \"\" \"mkv {}\" \"User Commands\"\n", env!("CARGO_PKG_VERSION"));
    page += ".SH NAME\nmkv \\- distributed key\\-value store: plain files behind nginx, one small index\n";
    page += ".SH SYNOPSIS\n.B mkv\n[\\fIflags\\fR]\n.I command\n";
    page += ".SH DESCRIPTION\n\
        Each value is a plain file on several nginx servers, the volumes. One process, the master, keeps an index of\n\
        which key lies on which volumes, and answers a GET with a redirect to one of them.\n\
        .BR mkv\\-volume (1)\nruns a volume.\n.PP\n\
        A flag may stand before or after the command, with one dash or two, with a space or = before its value; the\n\
        last one counts.\n";
    page += ".SH COMMANDS\n";
    for (name, what, _) in &GROUPS[1..] {
        page += &item(name, operand_of(name).unwrap_or_default(), what);
    }
    page += ".SH OPTIONS\n";
    for (group, _, flags) in GROUPS {
        if !flags.is_empty() {
            page += &format!(".SS {}\n", escape(group));
        }
        for (name, value, what) in flags {
            page += &item(&format!("-{name}"), value, what);
        }
    }
    for (title, items) in [("EXIT STATUS", EXIT_STATUSES), ("FILES", FILES)] {
        page += &format!(".SH {title}\n");
        for (name, what) in items {
            page += &item(name, "", what);
        }
    }
    page + ".SH SEE ALSO\n.BR mkv\\-volume (1),\n.BR thrasher (1),\n.BR nginx (8)"
}

/// A tagged paragraph: a name in bold, its value in italics, and what it is for.
fn item(name: &str, value: &str, what: &str) -> String {
    let value = if value.is_empty() { String::new() } else { format!(" \\fI{}\\fR", escape(value)) };
    format!(".TP\n\\fB{}\\fR{value}\n{}\n", escape(name), escape(what))
}

/// Text that roff prints as it is: a bare `-` would be a hyphen, and a leading `.` or `'` a request.
fn escape(text: &str) -> String {
    let text = text.replace('\\', "\\e").replace('-', "\\-").replace('…', "...");
    if text.starts_with(['.', '\'']) { format!("\\&{text}") } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_has_every_command_and_every_flag() {
        let page = page();
        for (name, ..) in &GROUPS[1..] {
            assert!(page.contains(&format!("\n\\fB{name}\\fR")), "{name}");
        }
        for (name, ..) in GROUPS.iter().flat_map(|(_, _, flags)| *flags) {
            assert!(page.contains(&format!("\n\\fB\\-{}\\fR", escape(name))), "{name}");
        }
    }

    #[test]
    fn text_is_escaped() {
        assert_eq!(escape(".so a\\b-c…"), "\\&.so a\\eb\\-c...");
        assert_eq!(item("-db", "DIR", "'x"), ".TP\n\\fB\\-db\\fR \\fIDIR\\fR\n\\&'x\n");
    }
}
