"""Draws a roofline from what `gpu_kernels` printed: each kernel's FLOP/s over its FLOPs per byte, under what the GPU can do.

usage: roofline.py benches/results/kernels_SHAPE_DEVICE.txt OUT.svg      (needs nothing but Python)
"""
import math
import re
import sys
from pathlib import Path

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 900, 560, 70, 210, 50, 55
X_RANGE, Y_RANGE = (0.5, 4000.0), (0.5, 1200.0)  # FLOP/byte, TFLOP/s
# Distinct in print and for the colour-blind: shapes tell kernels apart, shades the numbers of rows.
SHAPES = ["circle", "square", "diamond", "up", "down", "cross"]
SHADES = ["#ffffff", "#9ecae1", "#4292c6", "#08306b"]

ROW = re.compile(r"^(\S+(?: \S+)?)\s+(\d+) x (\d+) x (\d+)\s+([\d.]+)\s+([\d.]+)\s+([\d.]+)\s+(\d+)\s+([\d.]+)\s+\d+%")
CEILINGS = re.compile(r"best product (\d+) GFLOP/s, best copy (\d+) GB/s")


def x_of(intensity):
    share = math.log(intensity / X_RANGE[0]) / math.log(X_RANGE[1] / X_RANGE[0])
    return LEFT + share * (WIDTH - LEFT - RIGHT)


def y_of(tflops):
    share = math.log(tflops / Y_RANGE[0]) / math.log(Y_RANGE[1] / Y_RANGE[0])
    return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def mark(shape, x, y, fill):
    r = 6
    style = f'fill="{fill}" stroke="#222" stroke-width="0.8"'
    polygons = {
        "square": [(-r, -r), (r, -r), (r, r), (-r, r)],
        "diamond": [(0, -r - 2), (r + 2, 0), (0, r + 2), (-r - 2, 0)],
        "up": [(0, -r - 1), (r + 1, r), (-r - 1, r)],
        "down": [(0, r + 1), (r + 1, -r), (-r - 1, -r)],
        "cross": [(-2, -r), (2, -r), (2, -2), (r, -2), (r, 2), (2, 2), (2, r), (-2, r), (-2, 2), (-r, 2), (-r, -2), (-2, -2)],
    }
    if shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r}" {style}/>'
    points = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in polygons[shape])
    return f'<polygon points="{points}" {style}/>'


def text(x, y, words, anchor="start", size=12, extra=""):
    words = words.replace("&", "&amp;").replace("<", "&lt;")
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" {extra}>{words}</text>'


def main(source, target):
    lines = Path(source).read_text().splitlines()
    ceilings = next((CEILINGS.search(line) for line in lines if CEILINGS.search(line)), None)
    if ceilings is None:
        sys.exit(f"{source}: no line with the best product and the best copy; is it what gpu_kernels printed?")
    best_product, best_copy = int(ceilings[1]) / 1e3, int(ceilings[2]) / 1e3  # TFLOP/s, TB/s
    title = next(line for line in lines if " on cuda:" in line)
    recorded = {key: line.split(":", 1)[1].strip() for line in lines for key in ["date", "commit"] if line.startswith(key + ":")}
    kernels = {}  # name -> [(rows, intensity, TFLOP/s)]
    for match in filter(None, map(ROW.match, lines)):
        name, rows, mb, gflop = match[1], int(match[2]), float(match[6]), float(match[7])
        gb_per_s, tflops = int(match[8]), float(match[9])
        if name.startswith("gemv"):
            # Two FLOPs for each weight, which has two bytes.
            kernels.setdefault("gemv, five products", []).append((rows, 1.0, gb_per_s / 1e3))
        elif gflop > 1:
            kernels.setdefault(name, []).append((rows, gflop * 1e3 / mb, tflops))

    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">',
           f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>', text(LEFT, 24, title, size=15),
           text(LEFT, 41, f"{recorded.get('date', '')}, commit {recorded.get('commit', '')}", size=11, extra='fill="#555"')]
    for value in [1, 10, 100, 1000]:
        out.append(f'<line x1="{x_of(value):.1f}" x2="{x_of(value):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="#ddd"/>')
        out.append(text(x_of(value), HEIGHT - BOTTOM + 18, str(value), "middle"))
        out.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y_of(value):.1f}" y2="{y_of(value):.1f}" stroke="#ddd"/>')
        out.append(text(LEFT - 8, y_of(value) + 4, str(value), "end"))
    out.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 14, "FLOP per byte of operands", "middle", 13))
    out.append(f'<g transform="rotate(-90 20 {HEIGHT / 2})">{text(20, HEIGHT / 2, "TFLOP/s", "middle", 13)}</g>')
    ridge = best_product / best_copy
    roof = [(X_RANGE[0], X_RANGE[0] * best_copy), (ridge, best_product), (X_RANGE[1], best_product)]
    points = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in roof)
    out.append(f'<polyline points="{points}" fill="none" stroke="#b30000" stroke-width="2"/>')
    out.append(text(x_of(ridge) + 6, y_of(best_product) - 7, f"best product, {best_product:.0f} TFLOP/s", extra='fill="#b30000"'))
    out.append(text(x_of(3), y_of(3 * best_copy) - 12, f"best copy, {best_copy:.1f} TB/s", "end", extra='fill="#b30000"'))
    all_rows = sorted({rows for of_kernel in kernels.values() for rows, *_ in of_kernel})
    for index, (name, of_kernel) in enumerate(kernels.items()):
        shape = SHAPES[index % len(SHAPES)]
        for rows, intensity, tflops in of_kernel:
            out.append(mark(shape, x_of(intensity), y_of(tflops), SHADES[all_rows.index(rows) % len(SHADES)]))
        y = TOP + 20 + 22 * index
        out.append(mark(shape, WIDTH - RIGHT + 25, y, SHADES[2]) + text(WIDTH - RIGHT + 40, y + 4, name))
    for index, rows in enumerate(all_rows):
        y = TOP + 40 + 22 * (len(kernels) + index)
        out.append(mark("circle", WIDTH - RIGHT + 25, y, SHADES[index % len(SHADES)]) + text(WIDTH - RIGHT + 40, y + 4, f"{rows} rows" if rows > 1 else "1 row"))
    out.append("</svg>\n")
    Path(target).write_text("\n".join(out))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
