//! Means with their intervals: in rows, or as curves over a number. Series differ in shape as well as in colour.

use std::fmt::Write;

use super::super::stats::Interval;
use super::{begin, text};

/// Colours of Okabe and Ito, dark enough for white paper, and a shape for each.
const SERIES: [(&str, Shape); 6] = [
    ("#0072b2", Shape::Disc),
    ("#d55e00", Shape::Square),
    ("#009e73", Shape::Triangle),
    ("#cc79a7", Shape::Diamond),
    ("#000000", Shape::Wedge),
    ("#e69f00", Shape::Slab),
];

#[derive(Clone, Copy)]
enum Shape {
    Disc,
    Square,
    Triangle,
    Diamond,
    Wedge,
    Slab,
}

/// A share with a name.
pub struct Bar {
    pub label: String,
    /// Those of one series look alike.
    pub series: usize,
    pub share: Interval,
}

/// Shares below each other.
pub struct Panel {
    pub title: String,
    pub bars: Vec<Bar>,
}

const WIDTH: usize = 640;
const ROW: usize = 24;
/// Left and right end of the scale from 0 to 1.
const SCALE: (usize, usize) = (250, 500);

/// A mean and its interval in each row, with the numbers.
pub fn rows(title: &str, panels: &[Panel]) -> String {
    let height = |panel: &Panel| 30 + ROW * panel.bars.len() + 34;
    let mut out = begin(WIDTH, 40 + panels.iter().map(height).sum::<usize>(), title);
    let x = |share: f64| SCALE.0 as f64 + (SCALE.1 - SCALE.0) as f64 * share.clamp(0.0, 1.0);
    let mut top = 40;
    for panel in panels {
        let (first, bottom) = (top + 30, top + 30 + ROW * panel.bars.len());
        text(&mut out, (12, top + 16), "start", "font-weight=\"bold\"", &panel.title);
        for tick in 0..=4 {
            let (share, label) = (tick as f64 / 4.0, ["0", "0.25", "0.5", "0.75", "1"][tick]);
            line(&mut out, (x(share), first as f64), (x(share), bottom as f64), "stroke=\"#dddddd\"");
            text(&mut out, (x(share) as usize, bottom + 16), "middle", "fill=\"#555555\"", label);
        }
        for (row, Bar { label, series, share }) in panel.bars.iter().enumerate() {
            let middle = first + ROW * row + ROW / 2;
            text(&mut out, (SCALE.0 - 12, middle + 4), "end", "", label);
            let (color, _) = SERIES[series % SERIES.len()];
            let style = format!("stroke=\"{color}\" stroke-width=\"2\"");
            line(&mut out, (x(share.low), middle as f64), (x(share.high), middle as f64), &style);
            marker(&mut out, (x(share.mean), middle as f64), *series);
            let numbers = format!("{:.3} [{:.3}, {:.3}]", share.mean, share.low, share.high);
            text(&mut out, (SCALE.1 + 14, middle + 4), "start", "", &numbers);
        }
        top += height(panel);
    }
    out.push_str("</svg>\n");
    out
}

/// Shares over a number that is above 0, joined by a line.
pub struct Curve {
    pub label: String,
    pub series: usize,
    /// Label, number and share of each point, in order of the number.
    pub points: Vec<(String, f64, Interval)>,
}

/// The plot's left, top, right and bottom.
const PLOT: [usize; 4] = [70, 60, 600, 360];

/// Curves over a logarithmic scale from the least number to the greatest, with a legend below.
pub fn curves(title: &str, (x_title, y_title): (&str, &str), curves: &[Curve]) -> String {
    let [left, top, right, bottom] = PLOT;
    let mut out = begin(WIDTH, bottom + 60 + 20 * curves.len(), title);
    let numbers = || curves.iter().flat_map(|curve| &curve.points).map(|(_, number, _)| number.max(1.0));
    let (least, most) = (numbers().fold(f64::MAX, f64::min) / 1.5, numbers().fold(1.0, f64::max) * 1.5);
    let x = |number: f64| {
        left as f64 + (right - left) as f64 * (number.max(1.0) / least).ln() / (most / least).ln().max(1e-9)
    };
    let y = |share: f64| bottom as f64 - (bottom - top) as f64 * share.clamp(0.0, 1.0);

    text(&mut out, (left - 8, top - 14), "start", "fill=\"#555555\"", y_title);
    for tick in 0..=4 {
        let (share, label) = (tick as f64 / 4.0, ["0", "0.25", "0.5", "0.75", "1"][tick]);
        line(&mut out, (left as f64, y(share)), (right as f64, y(share)), "stroke=\"#dddddd\"");
        text(&mut out, (left - 8, y(share) as usize + 4), "end", "fill=\"#555555\"", label);
    }
    for exponent in 0..10 {
        for step in [1, 2, 5] {
            let number = step as f64 * 10f64.powi(exponent);
            if (least..=most).contains(&number) {
                line(&mut out, (x(number), top as f64), (x(number), bottom as f64), "stroke=\"#dddddd\"");
                text(&mut out, (x(number) as usize, bottom + 18), "middle", "fill=\"#555555\"", &number.to_string());
            }
        }
    }
    text(&mut out, (right, bottom + 36), "end", "fill=\"#555555\"", x_title);

    for (index, curve) in curves.iter().enumerate() {
        let (color, _) = SERIES[curve.series % SERIES.len()];
        for pair in curve.points.windows(2) {
            let style = format!("stroke=\"{color}\" stroke-width=\"1.5\"");
            line(&mut out, (x(pair[0].1), y(pair[0].2.mean)), (x(pair[1].1), y(pair[1].2.mean)), &style);
        }
        for (label, number, share) in &curve.points {
            let style = format!("stroke=\"{color}\" stroke-width=\"1.5\"");
            line(&mut out, (x(*number), y(share.low)), (x(*number), y(share.high)), &style);
            marker(&mut out, (x(*number), y(share.mean)), curve.series);
            text(&mut out, (x(*number) as usize + 9, y(share.mean) as usize + 16), "start", "", label);
        }
        let legend = bottom + 52 + 20 * index;
        marker(&mut out, (left as f64, legend as f64 - 4.0), curve.series);
        text(&mut out, (left + 14, legend), "start", "", &curve.label);
    }
    out.push_str("</svg>\n");
    out
}

fn line(out: &mut String, from: (f64, f64), to: (f64, f64), style: &str) {
    let _ = writeln!(
        out,
        "<line x1=\"{:.1}\" y1=\"{:.1}\" x2=\"{:.1}\" y2=\"{:.1}\" {style}/>",
        from.0, from.1, to.0, to.1
    );
}

/// The sign of a series.
fn marker(out: &mut String, (x, y): (f64, f64), series: usize) {
    let (color, shape) = SERIES[series % SERIES.len()];
    let corners: &[(f64, f64)] = match shape {
        Shape::Disc => {
            let _ = writeln!(out, "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"5\" fill=\"{color}\"/>");
            return;
        }
        Shape::Square => &[(-4.5, -4.5), (4.5, -4.5), (4.5, 4.5), (-4.5, 4.5)],
        Shape::Triangle => &[(0.0, -6.0), (5.5, 4.5), (-5.5, 4.5)],
        Shape::Wedge => &[(0.0, 6.0), (5.5, -4.5), (-5.5, -4.5)],
        Shape::Slab => &[(-6.5, -2.5), (6.5, -2.5), (6.5, 2.5), (-6.5, 2.5)],
        Shape::Diamond => &[(0.0, -6.5), (6.5, 0.0), (0.0, 6.5), (-6.5, 0.0)],
    };
    let points: Vec<String> = corners.iter().map(|(dx, dy)| format!("{:.1},{:.1}", x + dx, y + dy)).collect();
    let _ = writeln!(out, "<polygon points=\"{}\" fill=\"{color}\"/>", points.join(" "));
}
