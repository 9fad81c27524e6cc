//! The page's contents, and how they are put into `page.html`.
//!
//! A `View` holds texts, rows of tables and charts by name. The server writes it into the page as HTML; the page's
//! script takes the same view as JSON and replaces what has changed. So both show the same, and only the server words
//! anything. All texts are escaped here; the script makes text nodes of them.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde::Serialize;

const TEMPLATE: &str = include_str!("page.html");

/// Height of a chart, and units between two samples.
const HEIGHT: f64 = 100.0;
const STEP: usize = 1;

#[derive(Default, Serialize)]
pub struct View {
    pub texts: BTreeMap<&'static str, String>,
    pub rows: BTreeMap<&'static str, Vec<Vec<Cell>>>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub charts: BTreeMap<&'static str, Chart>,
    /// Whether all is well: `ok`, `warn` or `bad`.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub state: &'static str,
    /// The URL of the next page of keys; empty: there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
}

/// A table's cell. The first cell of a row is its header.
#[derive(Default, Serialize)]
pub struct Cell {
    /// The class.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub k: &'static str,
    pub l: Vec<Line>,
}

#[derive(Default, Serialize)]
pub struct Line {
    /// The text.
    pub t: String,
    /// The class.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub k: &'static str,
    /// The URL of a link.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub h: Option<String>,
    /// A bar, filled to this percentage.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub b: Option<u8>,
    /// A small chart.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub c: Option<String>,
}

/// A line chart: the paths of its line and of the area below.
#[derive(Serialize)]
pub struct Chart {
    pub line: String,
    pub area: String,
}

impl Cell {
    pub fn text(text: impl Into<String>) -> Cell {
        Cell { k: "", l: vec![Line::text(text, "")] }
    }

    /// A cell with digits, which are set under each other.
    pub fn number(text: impl Into<String>) -> Cell {
        Cell { k: "n", ..Cell::text(text) }
    }
}

impl Line {
    pub fn text(text: impl Into<String>, class: &'static str) -> Line {
        Line { t: text.into(), k: class, ..Line::default() }
    }
}

/// The chart of these values, of which `width` fit in. The largest one touches the top.
pub fn chart(values: &[f64], width: usize) -> Chart {
    let top = values.iter().copied().fold(0.0, f64::max);
    let height =
        |value: &f64| if top > 0.0 { (HEIGHT - value / top * (HEIGHT - 4.0)).round() as i64 } else { HEIGHT as i64 };
    let left = (width - values.len().min(width)) * STEP;
    let Some(first) = values.first() else { return Chart { line: String::new(), area: String::new() } };
    let (mut line, mut at, mut flat) = (format!("M{left} {}", height(first)), height(first), 0);
    for value in &values[1..] {
        let next = height(value);
        if next == at {
            flat += STEP;
            continue;
        }
        if flat > 0 {
            let _ = write!(line, "h{flat}");
        }
        let _ = write!(line, "l{STEP} {}", next - at);
        (at, flat) = (next, 0);
    }
    if flat > 0 {
        let _ = write!(line, "h{flat}");
    }
    let area = format!("{line}V{HEIGHT}H{left}Z");
    Chart { line, area }
}

impl View {
    /// The page. `nonce` is that of its Content-Security-Policy.
    pub fn html(&self, nonce: &str) -> String {
        let mut page = String::with_capacity(TEMPLATE.len() + 16_384);
        for (n, piece) in TEMPLATE.split("{{").enumerate() {
            let (name, text) = if n == 0 { ("", piece) } else { piece.split_once("}}").unwrap_or(("", piece)) };
            match name.split_once(':').unwrap_or(("", name)) {
                ("", "") => {}
                ("", "nonce") => page += nonce,
                ("", "state") => page += self.state,
                ("", "next") => page += &escaped(self.next.as_deref().unwrap_or_default()),
                ("", "no-next") => {
                    page += if self.next.as_deref().unwrap_or_default().is_empty() { "hidden" } else { "" }
                }
                ("rows", name) => self.rows.get(name).into_iter().flatten().for_each(|row| write_row(&mut page, row)),
                ("line", name) => page += self.charts.get(name).map_or("", |chart| &chart.line),
                ("area", name) => page += self.charts.get(name).map_or("", |chart| &chart.area),
                (_, name) => page += &escaped(self.texts.get(name).map_or("", String::as_str)),
            }
            page += text;
        }
        page
    }
}

fn write_row(page: &mut String, row: &[Cell]) {
    *page += "<tr>";
    for (n, cell) in row.iter().enumerate() {
        let tag = if n == 0 { "th" } else { "td" };
        let scope = if n == 0 { " scope=\"row\"" } else { "" };
        let _ = write!(page, "<{tag}{scope}{}>", class(cell.k));
        cell.l.iter().for_each(|line| write_line(page, line));
        let _ = write!(page, "</{tag}>");
    }
    *page += "</tr>";
}

fn write_line(page: &mut String, Line { t, k, h, b, c }: &Line) {
    let _ = write!(page, "<div{}>", class(k));
    if let Some(percent) = b {
        let _ = write!(
            page,
            "<svg class=\"bar\" viewBox=\"0 0 100 1\" preserveAspectRatio=\"none\" aria-hidden=\"true\">\
             <rect width=\"{percent}\" height=\"1\"/></svg>"
        );
    }
    if let Some(path) = c {
        let _ = write!(
            page,
            "<svg class=\"spark\" viewBox=\"0 0 179 100\" preserveAspectRatio=\"none\" aria-hidden=\"true\">\
             <path d=\"{path}\"/></svg>"
        );
    }
    let _ = match h {
        Some(url) => write!(page, "<a href=\"{}\">{}</a></div>", escaped(url), escaped(t)),
        None => write!(page, "{}</div>", escaped(t)),
    };
}

fn class(class: &str) -> String {
    if class.is_empty() { String::new() } else { format!(" class=\"{class}\"") }
}

/// A text in HTML, also in an attribute's double quotes.
pub fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for char in text.chars() {
        match char {
            '&' => escaped += "&amp;",
            '<' => escaped += "&lt;",
            '>' => escaped += "&gt;",
            '"' => escaped += "&quot;",
            '\'' => escaped += "&#39;",
            char => escaped.push(char),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_and_cells_are_escaped() {
        let line = Line { h: Some("/a\"b".into()), b: Some(7), ..Line::text("<script>'&", "m") };
        let row = vec![Cell::text("a<b"), Cell { k: "n", l: vec![line] }];
        let mut page = String::new();
        write_row(&mut page, &row);
        assert!(
            page.starts_with("<tr><th scope=\"row\"><div>a&lt;b</div></th><td class=\"n\"><div class=\"m\">"),
            "{page}"
        );
        assert!(page.ends_with("<a href=\"/a&quot;b\">&lt;script&gt;&#39;&amp;</a></div></td></tr>"), "{page}");
        assert!(page.contains("<rect width=\"7\" "), "{page}");
    }

    #[test]
    fn a_chart_ends_at_the_right_edge_and_touches_the_top() {
        let Chart { line, area } = chart(&[0.0, 0.0, 5.0, 10.0, 10.0], 180);
        assert_eq!(line, "M175 100h1l1 -48l1 -48h1");
        assert_eq!(area, "M175 100h1l1 -48l1 -48h1V100H175Z");
        assert_eq!(chart(&[], 180).line, "");
    }

    #[test]
    fn the_page_is_small_and_names_only_what_a_view_has() {
        assert!(TEMPLATE.len() < 24 << 10, "{}", TEMPLATE.len());
        let page = View { state: "ok", ..View::default() }.html("abc");
        assert!(page.contains("nonce=\"abc\"") && !page.contains("{{") && !page.contains("}}"));
    }
}
