//! `mkv completions`: scripts with which bash, zsh and fish complete commands and flags, made from the table of flags.
//!
//! Before a command all commands are offered, and the flags of every command; behind it also its own flags. Where a
//! value is a file or a folder, files are offered.

use std::fmt::Write;

use crate::cli::{Flag, GROUPS, Group};
use crate::error::{Error, Result};

const SHELLS: [&str; 3] = ["bash", "zsh", "fish"];

/// The script for this shell.
pub fn script(shell: &str) -> Result<String> {
    let (every, commands) = (GROUPS[0].2, &GROUPS[1..]);
    match shell {
        "bash" => Ok(bash(every, commands)),
        "zsh" => Ok(zsh(every, commands)),
        "fish" => Ok(fish(every, commands)),
        _ => Err(Error::Usage(format!("completions {shell}: there are those for {}", SHELLS.join(", ")))),
    }
}

/// What the value of a flag, or the word behind a command, is.
#[derive(PartialEq)]
enum Value {
    Path,
    Words(&'static str),
    Other,
}

fn value_of(value: &str) -> Value {
    match value {
        "DIR" | "FILE" | "PATH" => Value::Path,
        "FORMAT" => Value::Words("text json"),
        "BOOL" => Value::Words("true false"),
        _ => Value::Other,
    }
}

/// The names of the flags for which `is_right`, with one dash each.
fn names(flags: &[Flag], is_right: impl Fn(&Flag) -> bool) -> Vec<String> {
    flags.iter().filter(|flag| is_right(flag)).map(|(name, ..)| format!("-{name}")).collect()
}

/// A pattern of bash's `case`: these flags of all groups, with one dash or two.
fn pattern(every: &[Flag], commands: &[Group], is_right: impl Fn(&Flag) -> bool) -> String {
    let groups = std::iter::once(every).chain(commands.iter().map(|(.., flags)| *flags));
    let mut flags: Vec<String> = groups.flat_map(|flags| names(flags, &is_right)).collect();
    flags.extend(flags.clone().iter().map(|flag| format!("-{flag}")));
    flags.sort();
    flags.dedup();
    flags.join(" | ")
}

fn bash(every: &[Flag], commands: &[Group]) -> String {
    let words: Vec<&str> = commands.iter().map(|(name, ..)| *name).collect();
    let paths = pattern(every, commands, |(_, value, _)| value_of(value) == Value::Path);
    let formats = pattern(every, commands, |(_, value, _)| *value == "FORMAT");
    let others = pattern(every, commands, |(_, value, _)| !value.is_empty() && value_of(value) == Value::Other);
    let mut cases = String::new();
    for (name, _, flags) in commands {
        let _ = writeln!(cases, "    {name}) words+=' {}' ;;", names(flags, |_| true).join(" "));
    }
    format!(
        "# bash completion for mkv: source <(mkv completions bash)
_mkv() {{
  local current=${{COMP_WORDS[COMP_CWORD]}} command='' word words='{every}'
  COMPREPLY=()
  case ${{COMP_WORDS[COMP_CWORD - 1]}} in
    {paths})
      compopt -o filenames 2>/dev/null || true
      mapfile -t COMPREPLY < <(compgen -f -- \"$current\")
      return
      ;;
    {formats})
      mapfile -t COMPREPLY < <(compgen -W 'text json' -- \"$current\")
      return
      ;;
    {others}) return ;;
  esac
  for word in \"${{COMP_WORDS[@]:1:COMP_CWORD-1}}\"; do
    case $word in {patterns}) command=$word ;; esac
  done
  case $command in
{cases}    '') words+=' {commands}' ;;
  esac
  case $command:$current in
    completions:[!-]* | completions:) words='bash zsh fish' ;;
    backup:[!-]* | backup: | restore:[!-]* | restore: | secret:[!-]* | secret:)
      compopt -o filenames 2>/dev/null || true
      mapfile -t COMPREPLY < <(compgen -f -- \"$current\")
      return
      ;;
  esac
  mapfile -t COMPREPLY < <(compgen -W \"$words\" -- \"$current\")
}}
complete -F _mkv mkv",
        every = names(every, |_| true).join(" "),
        patterns = words.join(" | "),
        commands = words.join(" "),
    )
}

fn zsh(every: &[Flag], commands: &[Group]) -> String {
    let specs = |flags: &[Flag]| flags.iter().map(|flag| format!("\n    {}", zsh_flag(flag))).collect::<String>();
    let words: Vec<&str> = commands.iter().map(|(name, ..)| *name).collect();
    let (mut cases, mut described) = (String::new(), String::new());
    for (name, what, flags) in commands {
        let _ = writeln!(described, "    {}", shell_quoted(&format!("{name}:{}", what.replace(':', "\\:"))));
        let operand = match *name {
            "backup" => "\n      '2:folder:_files -/'",
            "restore" | "secret" => "\n      '2:file:_files'",
            "completions" => "\n      '2:shell:(bash zsh fish)'",
            _ => "",
        };
        let _ = writeln!(cases, "    {name}) flags+=({}{operand}) ;;", specs(flags).replace('\n', "\n  "));
    }
    format!(
        "#compdef mkv
# zsh completion for mkv: source <(mkv completions zsh), or a file _mkv in a folder of $fpath
_mkv() {{
  local command=${{words[(r)({patterns})]}}
  local -a commands flags
  commands=(
{described}  )
  flags=({every}
  )
  case $command in
{cases}  esac
  _arguments $flags '1:command:{{_describe command commands}}'
}}
if [[ $funcstack[1] == _mkv ]]; then _mkv \"$@\"; else compdef _mkv mkv; fi",
        patterns = words.join("|"),
        every = specs(every),
    )
}

/// A flag as `_arguments` of zsh has it.
fn zsh_flag((name, value, what): &Flag) -> String {
    let what: String = what.chars().flat_map(|c| "[]:\\".contains(c).then_some('\\').into_iter().chain([c])).collect();
    let action = match value_of(value) {
        _ if value.is_empty() => String::new(),
        Value::Path => format!(":{value}:_files"),
        Value::Words(words) => format!(":{value}:({words})"),
        Value::Other => format!(":{}: ", value.replace(':', "\\:")),
    };
    shell_quoted(&format!("-{name}[{what}]{action}"))
}

fn fish(every: &[Flag], commands: &[Group]) -> String {
    let words: Vec<&str> = commands.iter().map(|(name, ..)| *name).collect();
    let before = format!("not __fish_seen_subcommand_from {}", words.join(" "));
    let mut text = String::from("# fish completion for mkv: mkv completions fish | source\ncomplete -c mkv -f\n");
    for flag in every {
        let _ = writeln!(text, "complete -c mkv {}", fish_flag(flag));
    }
    for (name, what, flags) in commands {
        let _ = writeln!(text, "complete -c mkv -n '{before}' -a {name} -d {}", shell_quoted(what));
        let behind = format!("complete -c mkv -n '__fish_seen_subcommand_from {name}'");
        for flag in *flags {
            let _ = writeln!(text, "{behind} {}", fish_flag(flag));
        }
        match *name {
            "backup" | "restore" | "secret" => _ = writeln!(text, "{behind} -F"),
            "completions" => _ = writeln!(text, "{behind} -a '{}'", SHELLS.join(" ")),
            _ => {}
        }
    }
    text.trim_end().to_string()
}

fn fish_flag((name, value, what): &Flag) -> String {
    let takes = match value_of(value) {
        _ if value.is_empty() => String::new(),
        Value::Path => " -rF".into(),
        Value::Words(words) => format!(" -xa '{words}'"),
        Value::Other => " -x".into(),
    };
    format!("-o {name}{takes} -d {}", shell_quoted(what))
}

/// In single quotes, for any of the shells.
fn shell_quoted(text: &str) -> String {
    // A quoted quote differs between the shells; a typographic one means the same to a reader.
    format!("'{}'", text.replace('\'', "\u{2019}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_and_flag_is_completed_in_every_shell() {
        for shell in SHELLS {
            let script = script(shell).unwrap();
            for (group, _, flags) in GROUPS {
                assert!(script.contains(group) || group == GROUPS[0].0, "{shell}: {group}");
                for (name, ..) in flags {
                    let flag = if shell == "fish" { format!("-o {name} ") } else { format!("-{name}") };
                    assert!(script.contains(&flag), "{shell}: {flag}");
                }
            }
        }
        assert_eq!(script("tcsh").unwrap_err().exit_code(), 2);
    }
}
