//! Heat maps: one hue from light to dark, with the number in each cell.

use std::fmt::Write;

use super::{begin, text};

/// A table of shares.
pub struct Heatmap {
    pub title: String,
    /// What the columns are, and each of them.
    pub columns: (String, Vec<String>),
    /// What the rows are, and each of them.
    pub rows: (String, Vec<String>),
    /// A list for each row, 0 to 1; `None` where there is no value.
    pub cells: Vec<Vec<Option<f64>>>,
}

const CELL: (usize, usize) = (58, 28);
/// Room left of the cells and above them.
const MARGIN: (usize, usize) = (80, 40);
/// Room below the cells, for the labels of the columns.
const BELOW: usize = 60;

/// Ends of the ramp.
const LIGHT: [f64; 3] = [247.0, 251.0, 255.0];
const DARK: [f64; 3] = [8.0, 48.0, 107.0];
/// Above it the ground is so dark that white stands out better than black.
const WHITE_INK: f64 = 0.65;

/// The heat maps below each other.
pub fn svg(title: &str, maps: &[Heatmap]) -> String {
    let height = |map: &Heatmap| MARGIN.1 + CELL.1 * map.rows.1.len() + BELOW;
    let columns = maps.iter().map(|map| map.columns.1.len()).max().unwrap_or(0);
    // Titles need room where the columns are few.
    let width = (MARGIN.0 + CELL.0 * columns + 20).max(420);
    let total: usize = maps.iter().map(height).sum::<usize>() + 30;
    let mut out = begin(width, total, title);
    let mut top = 30;
    for map in maps {
        draw(&mut out, map, top);
        top += height(map);
    }
    out.push_str("</svg>\n");
    out
}

fn draw(out: &mut String, map: &Heatmap, top: usize) {
    let (left, first) = (MARGIN.0, top + MARGIN.1);
    text(out, (12, top + 18), "start", "font-weight=\"bold\"", &map.title);
    text(out, (left - 8, first - 6), "end", "fill=\"#555555\"", &map.rows.0);
    for (row, (label, cells)) in map.rows.1.iter().zip(&map.cells).enumerate() {
        let y = first + row * CELL.1;
        text(out, (left - 8, y + 18), "end", "", label);
        for (column, &value) in cells.iter().enumerate() {
            let x = left + column * CELL.0;
            let _ = writeln!(
                out,
                "<rect x=\"{x}\" y=\"{y}\" width=\"{}\" height=\"{}\" fill=\"{}\" stroke=\"#888888\"/>",
                CELL.0,
                CELL.1,
                value.map_or("#ffffff".into(), color)
            );
            let ink = if value > Some(WHITE_INK) { "fill=\"#ffffff\"" } else { "fill=\"#000000\"" };
            let label = value.map_or("bad".into(), |value| format!("{value:.2}"));
            text(out, (x + CELL.0 / 2, y + 18), "middle", ink, &label);
        }
    }
    let bottom = first + CELL.1 * map.rows.1.len();
    for (column, label) in map.columns.1.iter().enumerate() {
        text(out, (left + column * CELL.0 + CELL.0 / 2, bottom + 18), "middle", "", label);
    }
    text(out, (left, bottom + 38), "start", "fill=\"#555555\"", &map.columns.0);
}

/// The ramp at `value`.
fn color(value: f64) -> String {
    let mix =
        |channel: usize| (LIGHT[channel] + (DARK[channel] - LIGHT[channel]) * value.clamp(0.0, 1.0)).round() as u8;
    format!("#{:02x}{:02x}{:02x}", mix(0), mix(1), mix(2))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cell_shows_its_number_on_a_ground_that_darkens() {
        let map = Heatmap {
            title: "a < b & c".into(),
            columns: ("tokens".into(), vec!["1000".into(), "2000".into(), "3000".into()]),
            rows: ("depth".into(), vec!["0".into(), "100".into()]),
            cells: vec![vec![Some(0.0), Some(0.25), None], vec![Some(0.5), Some(1.0), None]],
        };
        let svg = svg("title", &[map]);
        assert!(svg.contains("a &lt; b &amp; c"));
        for cell in [">0.00<", ">0.25<", ">0.50<", ">1.00<"] {
            assert_eq!(svg.matches(cell).count(), 1, "{cell}");
        }
        assert_eq!(svg.matches(">bad<").count(), 2);
        assert!(svg.contains("#f7fbff") && svg.contains("#08306b"), "the ends of the ramp");
    }

    /// Contrast by the rule of WCAG 2: relative luminances, lighter to darker.
    #[test]
    fn numbers_can_be_read_on_every_ground() {
        let luminance = |hex: &str| -> f64 {
            let channel = |at: usize| {
                let c = u8::from_str_radix(&hex[at..at + 2], 16).unwrap() as f64 / 255.0;
                if c <= 0.04045 { c / 12.92 } else { ((c + 0.055) / 1.055).powf(2.4) }
            };
            0.2126 * channel(1) + 0.7152 * channel(3) + 0.0722 * channel(5)
        };
        for step in 0..=100 {
            let value = step as f64 / 100.0;
            let (ground, ink) = (luminance(&color(value)), if value > WHITE_INK { 1.0 } else { 0.0 });
            let contrast = (ground.max(ink) + 0.05) / (ground.min(ink) + 0.05);
            assert!(contrast >= 4.5, "{contrast} at {value}");
        }
    }
}
