//! Charts as SVG, and as PNG made from it. Nothing is told by colour alone: print and the colour-blind lose nothing.

pub mod heatmap;
pub mod points;

use std::fmt::Write;
use std::sync::Arc;

use resvg::tiny_skia::{Pixmap, Transform};
use resvg::usvg::{Options, Tree, fontdb};

/// Roboto by Google, Apache License 2.0, cut down to Latin letters, so that a PNG needs no font of the machine.
const FONT: &[u8] = include_bytes!("Roboto.ttf");

/// Pixels of a PNG for each unit of the SVG: sharp in print.
const ZOOM: f32 = 2.0;

/// The beginning of a drawing: white ground and a title.
fn begin(width: usize, height: usize, title: &str) -> String {
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" viewBox=\"0 0 {width} {height}\" \
         font-family=\"Roboto, sans-serif\" font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n"
    );
    text(&mut out, (12, 22), "start", "font-size=\"14\" font-weight=\"bold\"", title);
    out
}

fn text(out: &mut String, (x, y): (usize, usize), anchor: &str, style: &str, content: &str) {
    let content = content.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    let _ = writeln!(out, "<text x=\"{x}\" y=\"{y}\" text-anchor=\"{anchor}\" {style}>{content}</text>");
}

/// A drawing as PNG; in words why not, should it be too large to draw.
pub fn png(svg: &str) -> Result<Vec<u8>, String> {
    let mut fonts = fontdb::Database::new();
    fonts.load_font_data(FONT.to_vec());
    let options = Options { font_family: "Roboto".into(), fontdb: Arc::new(fonts), ..Options::default() };
    let tree = Tree::from_str(svg, &options).map_err(|error| error.to_string())?;
    let size = tree.size().to_int_size().scale_by(ZOOM).ok_or("the chart has no size")?;
    let mut pixels = Pixmap::new(size.width(), size.height()).ok_or("the chart is too large")?;
    resvg::render(&tree, Transform::from_scale(ZOOM, ZOOM), &mut pixels.as_mut());
    pixels.encode_png().map_err(|error| error.to_string())
}
